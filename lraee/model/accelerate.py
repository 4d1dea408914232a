"""accelerate: a float CLIP model to an int8 one."""

import copy
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from lraee.exits.bundle import Exits
from lraee.layers.build import Quantize, build_block, build_patch_embedding
from lraee.layers.modules import Take, put_module, without_numbers
from lraee.layers.scheme import FROM_IMAGES, Scheme, find_scheme, quantize_weight
from lraee.model.acceleration import (
    Acceleration,
    acceleration_of,
    as_is,
    base_hash_of,
    copier,
    image_tower,
    mark_fast,
    mark_float,
    replaced_parts,
    set_record,
)
from lraee.model.fidelity import compare, require_fidelity
from lraee.model.messages import log_result, warn_of_float16
from lraee.model.set_classes import ClassSetter
from lraee.model.text import TextRecord, require_text_scheme
from lraee.ops.backend import Backend, implementation, require_backend
from lraee.quantization.any_block import Tensors
from lraee.quantization.calibrated import calibrate_tower, put, require_scheme
from lraee.quantization.images import Calibration, Images
from lraee.towers import runner
from lraee.towers import text as texts
from lraee.towers.families import (
    block_specs,
    blocks_of,
    device_of,
    encode,
    find_tower,
    require_kept,
    require_supported,
    tower_spec,
)
from lraee.towers.state import tower_hash
from lraee.towers.wrappers import require_own_weights, unwrapped

Model = TypeVar("Model", bound=nn.Module)

_CHECK_BATCH = 32


def accelerate(
    model: Model,
    *,
    scheme: str | Scheme = "int8",
    backend: Backend = "auto",
    exits: Exits | str | os.PathLike[str] | None = None,
    text: str | None = None,
    inplace: bool = False,
    check: Tensor | None = None,
    calibration: Images | Calibration | None = None,
) -> Model:
    """The same model with the image tower's blocks in int8, and early exits if it is given some.

        fast = lraee.accelerate(model)
        fast = lraee.accelerate(model, exits=lraee.calibrate(fast, images, classes=texts))

    It is an instance of the model's own class and answers as before; the text tower, the patch
    embedding and the last projection stay float. The blocks hold no float copy of their weights.
    The scheme "int8-patches" quantizes the patch embedding as well, text="int8" the text tower.
    encode_text of a causal text tower leaves out the tokens after the end of the text: float, the
    numbers agree with those of all tokens within 1e-5; in int8 a text has the same bits in any
    batch, whatever stands after its end.
    With exits each image leaves the tower at the depth where its gate is sure; the model then has
    `set_classes(text_features)`, which gives the gate other classes.

    On a GPU a call without gradients replays CUDA graphs, made when the tower first sees a batch of
    about its size; `model.visual.cuda_graphs = False` turns them off.

    With calibration images the scheme is "int8-calibrated": weights and norms are fitted to what
    the images bring, which halves the error and costs nothing at run time.

        fast = lraee.accelerate(model, calibration=images)

    Args:
      model: in eval mode, with an image tower of a known family (lraee.towers), such as
        open_clip's CLIP or CustomTextCLIP with a VisionTransformer; or such a tower alone. Of a
        model in torch.compile's module or in DataParallel, the result is in such a one as well.
      scheme: "int8", "int8-patches", "int8-calibrated" (needs calibration), "paper" (torch's
        quantize_dynamic, for comparison) or a Scheme.
      backend: "auto" takes what the device has; "reference" plain torch; "cpu" or "triton" that
        implementation or an error.
      exits: from lraee.calibrate, or where Exits.save put them; made for this tower and scheme.
      text: "int8" runs the blocks of the text tower in int8 too, by the same scheme (docs/text.md
        has the towers); None leaves it float. A text model alone of transformers, such as
        CLIPTextModel, needs it.
      inplace: change the model itself, which frees its float weights; else it stays as it is.
      check: preprocessed images [n, 3, H, W]; both towers run on them, at full depth, and must
        agree.
      calibration: 64 to 256 preprocessed images, [n, 3, H, W] or an iterable of such batches, no
        labels; or lraee.Calibration, which adds options. Minutes on a CPU.
    Returns: the fast model.
    Raises: TypeError or NotImplementedError on a model without int8 kernels, ValueError on options
      and on exits of another tower, RuntimeError if the backend is not available, CheckpointError
      on a damaged file, FidelityError if check fails.
    """
    scheme = _requested(find_scheme(scheme), calibration)
    tower = checked_tower(model, scheme, backend, text)
    if tower is None:
        _require_none(model, exits=exits, check=check, calibration=calibration)
    calibrated = None
    if calibration is not None and tower is not None:
        calibrated, scheme = _calibrate(tower, scheme, backend, Calibration.of(calibration))
    if exits is not None and not isinstance(exits, Exits):
        exits = Exits.load(exits)
    expected = None if check is None else encode(model, check, batch=_CHECK_BATCH)
    text_tower = None if text is None else texts.require_text(model)
    record = _record(model, text_tower, scheme, backend, is_kept=not inplace)
    if exits is not None and tower is not None:
        _require_same_tower(exits, record)
        runner.require_exits_fit(tower, exits.router(backend=backend))
    float_parts = replaced_parts(tower, scheme) if check is not None else []
    text_blocks = list(text_tower.blocks) if text_tower and check is not None else []
    swap = _swap_blocks if inplace else _copy_with_blocks
    fast = swap(model, record, None if calibrated is None else _stored(calibrated, record))
    if calibrated is not None:
        put(find_tower(fast), calibrated)
    if check is not None and expected is not None:
        try:
            require_fidelity(compare(expected, encode(fast, check, batch=_CHECK_BATCH)))
        except Exception:
            if inplace:
                mark_float(model, float_parts, text_blocks)
            raise
    if exits is not None:
        add_exits(fast, exits)
    log_result(image_tower(fast), implementation(backend, device_of(model)))
    warn_of_float16(tower, device_of(model))
    return fast


def assemble(
    model: Model,
    *,
    scheme: Scheme,
    backend: Backend,
    base_hash: str,
    text_hash: str | None,
    quantize: Quantize,
    calibrated: Mapping[str, Tensor] | None = None,
) -> Model:
    """accelerate(model, scheme=scheme, backend=backend) with int8 weights made earlier.

    Args:
      model, scheme, backend: as in accelerate, seen by checked_tower; the model stays as it is.
      base_hash: base_hash_of the model.
      text_hash: tower_hash of the blocks of its text tower, where those are int8 too; else None.
      quantize: where the int8 weights come from.
      calibrated: of a calibrated tower its linears and norms, by name.
    """
    text = None if text_hash is None else texts.require_text(model)
    record = _record(
        model, text, scheme, backend,
        is_kept=True, base_hash=base_hash, text_hash=text_hash,
    )  # fmt: skip
    fast = _copy_with_blocks(model, record, quantize)
    if calibrated is not None:
        put(find_tower(fast), calibrated)
    return fast


def _require_none(model: nn.Module, **options: object) -> None:
    """Raises ValueError on the first option that a model without an image tower has no use for."""
    for name, value in options.items():
        if value is not None:
            what = "images" if name == "check" else "an image tower"
            raise ValueError(
                f"accelerate: {name} must be None for a model without {what},"
                f" got {type(model).__name__}"
            )


# Calibration


def _requested(scheme: Scheme, calibration: Any) -> Scheme:
    """The scheme as calibration makes it; raises ValueError on one without the other."""
    if calibration is not None:
        require_scheme(scheme)
        return replace(scheme, calibration=FROM_IMAGES)
    if scheme.calibration:
        raise ValueError(
            "accelerate: scheme int8-calibrated must come with calibration=<64 to 256 images>, got"
            " none; give some, or lraee.load a model that was calibrated (`lraee quantize`)"
        )
    return scheme


def _calibrate(
    tower: nn.Module, scheme: Scheme, backend: Backend, calibration: Calibration
) -> tuple[Tensors, Scheme]:
    """Linears and norms of the tower by name, and the scheme with their hash."""
    plain = replace(scheme, calibration="")
    record = _record(tower, None, plain, backend, is_kept=False, base_hash="-")
    fast = _copy_with_blocks(tower, record)
    tensors = calibrate_tower(tower, find_tower(fast), plain, calibration)
    return tensors, replace(scheme, calibration=tower_hash(tensors))


def _stored(tensors: Tensors, record: Acceleration) -> Quantize:
    """Where the int8 weights of a calibrated tower come from; a text tower has none there."""

    def stored(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        if f"{name}.w_q" not in tensors:
            return quantize_weight(weight, record.scheme, record.backend)
        w_q, w_scale = (tensors[f"{name}.{own}"].to(weight.device) for own in ("w_q", "w_scale"))
        return w_q, w_scale

    return stored


# Exits


def _require_same_tower(exits: Exits, record: Acceleration) -> None:
    """Raises ValueError on exits that were made for other weights or another scheme."""
    if exits.base_hash != record.base_hash:
        raise ValueError(
            "accelerate: exits must be made for this tower's weights (sha256"
            f" {record.base_hash[:12]}), got those of {exits.base_hash[:12]}; calibrate again"
        )
    if exits.scheme != record.scheme:
        raise ValueError(
            f"accelerate: exits must be made for this scheme ({record.scheme}), got {exits.scheme};"
            " calibrate again"
        )


def replace_exits(model: nn.Module, exits: Exits) -> None:
    """Gives an accelerated model these exits instead of any that it has.

    Raises: ValueError on exits of another tower or scheme.
    """
    tower = find_tower(model)
    _require_same_tower(exits, cast(Acceleration, acceleration_of(model)))
    runner.require_exits_fit(tower, exits.router(backend="auto"))
    runner.detach_exits(tower)
    add_exits(model, exits)


def add_exits(model: nn.Module, exits: Exits) -> None:
    """Gives an accelerated model early exits, and the method set_classes."""
    tower = find_tower(model)
    record = cast(Acceleration, acceleration_of(model))
    router = exits.router(backend=record.backend, device=device_of(tower))
    runner.attach_exits(tower, router)
    set_record(model, replace(record, exits=exits))
    for module in {model, tower}:
        module.__dict__["set_classes"] = ClassSetter(module)


# Making


def checked_tower(
    model: nn.Module, scheme: Scheme, backend: Backend, text: str | None = None
) -> nn.Module | None:
    """The float image tower of a model that can be accelerated so, None of one that is a text tower
    alone; raises one line if it cannot.
    """
    require_text_scheme(text)
    is_alone = texts.text_alone(model) is not None
    if is_alone and text is None:
        raise ValueError(
            f"accelerate: text must be 'int8' for {type(model).__name__}, which has no image tower,"
            " got None"
        )
    tower = None if is_alone else find_tower(model)
    if acceleration_of(model) is not None:
        raise ValueError("accelerate: model must be float, got one that is accelerated already")
    if unwrapped(model).training or (tower is not None and tower.training):
        raise ValueError("accelerate: model must be in eval mode, got train mode; call .eval()")
    require_own_weights(model if tower is None else tower)
    of_text = () if text is None else texts.linear_shapes(texts.require_text(model))
    if tower is None:
        require_kept(scheme, of_text)
    else:
        require_supported(tower, scheme, of_text)
    require_backend(backend, device_of(model))
    return tower


def _record(
    model: nn.Module,
    text: texts.TextTower | None,
    scheme: Scheme,
    backend: Backend,
    *,
    is_kept: bool,
    base_hash: str | None = None,
    text_hash: str | None = None,
) -> Acceleration:
    tower = image_tower(model)
    return Acceleration(
        scheme=scheme,
        backend=backend,
        base_hash=base_hash or base_hash_of(model),
        skeletons=tuple(without_numbers(part) for part in replaced_parts(tower, scheme)),
        original=weakref.ref(tower) if is_kept and tower is not None else None,
        text=None if text is None else TextRecord.of(text, text_hash, is_kept=is_kept),
    )


def _copy_with_blocks(
    model: Model, record: Acceleration, quantize: Quantize | None = None
) -> Model:
    """A deep copy in which each block is already int8: no float weight is ever copied."""
    memo: dict[int, Any] = {}
    for swap in _swaps(model, record, copier(memo), quantize):
        memo[id(swap.part)] = swap.build()
    fast = copy.deepcopy(model, memo)
    mark_fast(fast, record)
    return fast


def _swap_blocks(model: Model, record: Acceleration, quantize: Quantize | None = None) -> Model:
    """Swaps part by part, so that the float weights of each are freed before the next."""
    swaps = _swaps(model, record, as_is, quantize)
    while swaps:
        swap = swaps.pop(0)
        put_module(swap.root, swap.path, swap.build())
        del swap
    mark_fast(model, record)
    return model


@dataclass(frozen=True)
class _Swap:
    """A float part at a path below a root, and what builds the int8 part for it."""

    root: nn.Module
    path: str
    part: nn.Module
    build: Callable[[], nn.Module]


def _swaps(
    model: nn.Module, record: Acceleration, take: Take, quantize: Quantize | None = None
) -> list[_Swap]:
    """All that the record says is replaced."""
    common: dict[str, Any] = {
        "scheme": record.scheme, "backend": record.backend, "take": take, "quantize": quantize,
    }  # fmt: skip
    tower = image_tower(model)
    swaps = [] if tower is None else _image_swaps(tower, record.scheme, common)
    if record.text is not None:
        text = texts.require_text(model)
        for i, (block, block_spec) in enumerate(zip(text.blocks, text.block_specs(), strict=True)):
            build = partial(build_block, block, block_spec, text.spec.block_name(i), **common)
            swaps.append(_Swap(text.owner, text.spec.block_path(i), block, build))
    return swaps


def _image_swaps(tower: nn.Module, scheme: Scheme, common: dict[str, Any]) -> list[_Swap]:
    spec, swaps = tower_spec(tower), []
    for i, (block, block_spec) in enumerate(zip(blocks_of(tower), block_specs(tower), strict=True)):
        build = partial(build_block, block, block_spec, spec.block_name(i), **common)
        swaps.append(_Swap(tower, f"{spec.blocks}.{i}", block, build))
    if scheme.patch_embedding == "int8":
        path = spec.patch_embedding.path
        embedding = tower.get_submodule(path)
        build_embedding = partial(build_patch_embedding, embedding, path, **common)
        swaps.append(_Swap(tower, path, embedding, build_embedding))
    return swaps
