"""accelerate and restore: a float CLIP model to an int8 one, and back."""

import copy
import logging
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.exits.bundle import Exits
from lraee.layers.int8_block import TRAIN_REFUSED
from lraee.layers.scheme import Scheme, find_scheme
from lraee.model.fidelity import compare, require_fidelity
from lraee.model.set_classes import ClassSetter
from lraee.ops.backend import Backend, implementation, require_backend
from lraee.towers import flops
from lraee.towers import open_clip as towers
from lraee.towers import runner as vision

Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTE = "lraee"
_CHECK_BATCH = 32
_log = logging.getLogger("lraee")


@dataclass(frozen=True)
class Acceleration:
    """What an accelerated tower knows of its making; `acceleration_of` reads it.

    Args:
      scheme: how it was quantized.
      backend: which implementation it asked for.
      base_hash: towers.tower_hash of the float tower.
      skeletons: the float blocks, and the patch embedding where it is int8, without their numbers.
      original: the float tower, as long as its owner keeps it; not pickled.
      exits: its early exits, or None.
    """

    scheme: Scheme
    backend: Backend
    base_hash: str
    skeletons: tuple[nn.Module, ...]
    original: weakref.ref[nn.Module] | None
    exits: Exits | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Acceleration":
        return self  # nothing in it ever changes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": None}


def acceleration_of(model: nn.Module) -> Acceleration | None:
    """How this model was accelerated, or None."""
    return cast(Acceleration | None, getattr(towers.find_tower(model), _ATTRIBUTE, None))


def accelerate(
    model: Model,
    *,
    scheme: str | Scheme = "int8",
    backend: Backend = "auto",
    exits: Exits | str | os.PathLike[str] | None = None,
    inplace: bool = False,
    check: Tensor | None = None,
) -> Model:
    """The same model with the image tower's blocks in int8, and early exits if it is given some.

        fast = lraee.accelerate(model)
        fast = lraee.accelerate(model, exits=lraee.calibrate(fast, images, classes=texts))

    It is an instance of the model's own class and answers as before; the text tower, the patch
    embedding and the last projection stay float. The blocks hold no float copy of their weights.
    The scheme "int8-patches" quantizes the patch embedding as well.
    With exits each image leaves the tower at the depth where its gate is sure; the model then has
    `set_classes(text_features)`, which gives the gate other classes.

    On a GPU a call without gradients replays CUDA graphs, made when the tower first sees a batch of
    about its size; `model.visual.cuda_graphs = False` turns them off.

    Args:
      model: open_clip's CLIP or CustomTextCLIP with a VisionTransformer, in eval mode; or such a
        VisionTransformer alone.
      scheme: "int8", "int8-patches", "paper" (torch's quantize_dynamic, for comparison) or a
        Scheme.
      backend: "auto" takes what the device has; "reference" plain torch; "cpu" or "triton" that
        implementation or an error.
      exits: from lraee.calibrate, or where Exits.save put them; made for this tower and scheme.
      inplace: change the model itself, which frees its float weights; else it stays as it is.
      check: preprocessed images [n, 3, H, W]; both towers run on them, at full depth, and must
        agree.
    Returns: the fast model.
    Raises: TypeError or NotImplementedError on a model without int8 kernels, ValueError on options
      and on exits of another tower, RuntimeError if the backend is not available, CheckpointError
      on a damaged file, FidelityError if check fails.
    """
    scheme = find_scheme(scheme)
    tower = checked_tower(model, scheme, backend)
    if exits is not None and not isinstance(exits, Exits):
        exits = Exits.load(exits)
    expected = None if check is None else _encode(model, check)
    made = _describe(tower, scheme, backend, is_kept=not inplace)
    if exits is not None:
        _require_same_tower(exits, made)
        vision.require_exits_fit(tower, exits.router(backend=backend))
    float_parts = _parts(tower, scheme) if check is not None else []
    fast = _swap_blocks(model, made) if inplace else _copy_with_blocks(model, made)
    if check is not None and expected is not None:
        try:
            require_fidelity(compare(expected, _encode(fast, check)))
        except Exception:
            if inplace:
                _mark_float(model, float_parts)
            raise
    if exits is not None:
        add_exits(fast, exits)
    device = next(tower.parameters()).device
    _log_result(towers.find_tower(fast), implementation(backend, device))
    return fast


def assemble(
    model: Model, *, scheme: Scheme, backend: Backend, base_hash: str, quantize: towers.Quantize
) -> Model:
    """accelerate(model, scheme=scheme, backend=backend) with int8 weights made earlier.

    Args:
      model, scheme, backend: as in accelerate, seen by checked_tower; the model stays as it is.
      base_hash: towers.tower_hash of the model's tower.
      quantize: where the int8 weights come from.
    """
    tower = towers.find_tower(model)
    made = _describe(tower, scheme, backend, is_kept=True, base_hash=base_hash)
    return _copy_with_blocks(model, made, quantize)


def restore(model: Model, base: nn.Module | Mapping[str, Tensor] | None = None) -> Model:
    """The float model again: the image tower as accelerate found it, bit for bit.

    The fast model holds no float weights. They come from the original model, if it is still alive
    and was not changed, or from `base`. All that accelerate copied (text tower, logit scale) is
    copied from the fast model.

    Args:
      model: an accelerated model; it stays as it is.
      base: the original model, or its state dict.
    Returns: a new float model.
    Raises: ValueError if model is float, or if the weights are not those that accelerate saw;
      LookupError if the original is gone and base is not given.
    """
    fast_tower = towers.find_tower(model)
    made = acceleration_of(model)
    if made is None:
        raise ValueError("restore: model must be accelerated, got a float one")
    weights = _base_weights(made, base)
    found = towers.tower_hash(weights)
    if found != made.base_hash:
        raise ValueError(
            f"restore: {'base' if base is not None else 'the original model'} must hold the weights"
            f" that accelerate saw (sha256 {made.base_hash[:12]}), got {found[:12]}; give"
            " base=<model or state dict with the original weights>"
        )
    memo: dict[int, Any] = {}
    parts = [copy.deepcopy(skeleton) for skeleton in made.skeletons]
    for fast_part, part in zip(_parts(fast_tower, made.scheme), parts, strict=True):
        towers.carry_hooks(fast_part, part, _copier(memo))
        memo[id(fast_part)] = part
    result = copy.deepcopy(model, memo)
    vision.detach_exits(towers.find_tower(result))
    device = next(fast_tower.parameters()).device
    copies = {name: tensor.detach().to(device, copy=True) for name, tensor in weights.items()}
    towers.find_tower(result).load_state_dict(copies, assign=True)
    _mark_float(result, parts)
    return result


def _base_weights(made: Acceleration, base: nn.Module | Mapping[str, Tensor] | None) -> Any:
    """State dict of the float tower."""
    if isinstance(base, nn.Module):
        return towers.find_tower(base).state_dict()
    if base is not None:
        prefix = "visual."
        inside = {k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}
        return inside or base
    original = None if made.original is None else made.original()
    if original is None:
        raise LookupError(
            "restore: the original model is gone, and the fast one holds no float weights; give"
            " base=<the original model or its state dict>"
        )
    return original.state_dict()


# Exits


def _require_same_tower(exits: Exits, made: Acceleration) -> None:
    """Raises ValueError on exits that were made for other weights or another scheme."""
    if exits.base_hash != made.base_hash:
        raise ValueError(
            "accelerate: exits must be made for this tower's weights (sha256"
            f" {made.base_hash[:12]}), got those of {exits.base_hash[:12]}; calibrate again"
        )
    if exits.scheme != made.scheme:
        raise ValueError(
            f"accelerate: exits must be made for this scheme ({made.scheme}), got {exits.scheme};"
            " calibrate again"
        )


def add_exits(model: nn.Module, exits: Exits) -> None:
    """Gives an accelerated model early exits, and the method set_classes."""
    tower = towers.find_tower(model)
    made = cast(Acceleration, acceleration_of(model))
    device = next(tower.parameters()).device
    vision.attach_exits(tower, exits.router(backend=made.backend, device=device))
    setattr(tower, _ATTRIBUTE, replace(made, exits=exits))
    for module in {model, tower}:
        module.__dict__["set_classes"] = ClassSetter(module)


# Making


def _parts(tower: nn.Module, scheme: Scheme) -> list[nn.Module]:
    """What the scheme replaces: the blocks, and last the patch embedding where it is int8."""
    conv = tower.get_submodule(towers.PATCH_EMBEDDING)
    return [*towers.blocks_of(tower), *([conv] if scheme.patch_embedding == "int8" else [])]


def checked_tower(model: nn.Module, scheme: Scheme, backend: Backend) -> nn.Module:
    """The float tower of a model that can be accelerated so; raises one line if it cannot."""
    tower = towers.find_tower(model)
    if acceleration_of(model) is not None:
        raise ValueError("accelerate: model must be float, got one that is accelerated already")
    if model.training or tower.training:
        raise ValueError("accelerate: model must be in eval mode, got train mode; call .eval()")
    towers.require_supported(tower, scheme)
    require_backend(backend, next(tower.parameters()).device)
    return tower


def _describe(
    tower: nn.Module,
    scheme: Scheme,
    backend: Backend,
    *,
    is_kept: bool,
    base_hash: str | None = None,
) -> Acceleration:
    return Acceleration(
        scheme=scheme,
        backend=backend,
        base_hash=base_hash or towers.tower_hash(tower.state_dict()),
        skeletons=tuple(towers.without_numbers(part) for part in _parts(tower, scheme)),
        original=weakref.ref(tower) if is_kept else None,
    )


def _copy_with_blocks(
    model: Model, made: Acceleration, quantize: towers.Quantize | None = None
) -> Model:
    """A deep copy in which each block is already int8: no float weight is ever copied."""
    memo: dict[int, Any] = {}
    tower = towers.find_tower(model)
    for i, block in enumerate(towers.blocks_of(tower)):
        memo[id(block)] = towers.build_block(
            block, f"resblocks.{i}", scheme=made.scheme, backend=made.backend, take=_copier(memo),
            quantize=quantize,
        )  # fmt: skip
    if made.scheme.patch_embedding == "int8":
        conv = tower.get_submodule(towers.PATCH_EMBEDDING)
        memo[id(conv)] = towers.build_patch_embedding(
            conv, scheme=made.scheme, backend=made.backend, take=_copier(memo), quantize=quantize
        )
    fast = copy.deepcopy(model, memo)
    _mark_fast(fast, made)
    return fast


def _swap_blocks(model: Model, made: Acceleration) -> Model:
    """Swaps block by block, so that the float weights of each are freed before the next."""
    tower = towers.find_tower(model)
    blocks = towers.blocks_of(tower)
    if made.scheme.patch_embedding == "int8":
        conv = tower.get_submodule(towers.PATCH_EMBEDDING)
        tower.conv1 = towers.build_patch_embedding(
            conv, scheme=made.scheme, backend=made.backend, take=_as_is
        )
    for i in range(len(blocks)):
        blocks[i] = towers.build_block(
            blocks[i], f"resblocks.{i}", scheme=made.scheme, backend=made.backend, take=_as_is
        )
    _mark_fast(model, made)
    return model


def _copier(memo: dict[int, Any]) -> towers.Take:
    return lambda part: copy.deepcopy(part, memo)


def _as_is(part: towers.T) -> towers.T:
    return part


def _encode(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [n, ...] of preprocessed images."""
    encode = getattr(model, "encode_image", model)
    tower = towers.find_tower(model)
    like = next(tower.parameters())
    with torch.no_grad():
        parts = [encode(part.to(like)) for part in torch.split(images, _CHECK_BATCH)]
    return torch.cat([part[0] if isinstance(part, tuple) else part for part in parts])


def _log_result(tower: nn.Module, name: str) -> None:
    blocks = towers.blocks_of(tower)
    count = len(towers.int8_linears(tower))
    macs = flops.count_macs(tower)
    _log.info(
        "accelerate: %d of %d linears in int8, %.1f %% of the tower's multiply-adds in int8"
        " operators, implementation %s",
        count,
        len(towers.PATHS) * len(blocks),
        100 * macs.share,
        name,
    )


# Marking: the record of its making, and the refusal to train


class _TrainGuard:
    """`module.train` of an accelerated module: refuses before any child has switched.

    An attribute of the instance, since the model keeps its own class. It holds its module weakly,
    so that an accelerated model is freed as soon as a float one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __call__(self, mode: bool = True) -> nn.Module:
        module = self.module()
        assert module is not None
        if mode:
            raise RuntimeError(TRAIN_REFUSED)
        return type(module).train(module, False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_TrainGuard":
        return _TrainGuard(memo[id(self.module())])

    def __reduce__(self) -> tuple[type["_TrainGuard"], tuple[nn.Module | None]]:
        return _TrainGuard, (self.module(),)


def _guarded(model: nn.Module) -> list[nn.Module]:
    """Every module whose train() reaches an int8 block; the blocks refuse by themselves."""
    tower = towers.find_tower(model)
    return [model, tower, tower.get_submodule("transformer"), towers.blocks_of(tower)]


def _mark_fast(model: nn.Module, made: Acceleration) -> None:
    tower = towers.find_tower(model)
    setattr(tower, _ATTRIBUTE, made)
    vision.make_rowwise(tower, made.backend)
    for module in _guarded(model):
        module.__dict__["train"] = _TrainGuard(module)


def _mark_float(model: nn.Module, float_parts: list[nn.Module]) -> None:
    """Puts the float parts (back) in, and takes marks and guards off."""
    tower = towers.find_tower(model)
    blocks = towers.blocks_of(tower)
    for i, block in enumerate(float_parts[: len(blocks)]):
        blocks[i] = block
    for conv in float_parts[len(blocks) :]:
        tower.conv1 = conv
    delattr(tower, _ATTRIBUTE)
    vision.unmake_rowwise(tower)
    for module in _guarded(model):
        module.__dict__.pop("train", None)
        module.__dict__.pop("set_classes", None)
