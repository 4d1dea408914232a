"""accelerate: a float CLIP model to an int8 one."""

import copy
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.exits.bundle import Exits
from lraee.layers.build import Quantize, build_block, build_patch_embedding
from lraee.layers.modules import Take, put_module, without_numbers
from lraee.layers.scheme import Scheme, find_scheme
from lraee.model.acceleration import (
    Acceleration,
    acceleration_of,
    as_is,
    copier,
    mark_fast,
    mark_float,
    replaced_parts,
    set_record,
)
from lraee.model.fidelity import compare, require_fidelity
from lraee.model.set_classes import ClassSetter
from lraee.ops.backend import Backend, implementation, require_backend
from lraee.towers import runner
from lraee.towers.families import (
    block_specs,
    blocks_of,
    encode_image,
    find_tower,
    int8_linears,
    require_supported,
    tower_spec,
)
from lraee.towers.flops import count_macs
from lraee.towers.state import tower_hash
from lraee.towers.wrappers import require_own_weights

Model = TypeVar("Model", bound=nn.Module)

_CHECK_BATCH = 32
_log = logging.getLogger("lraee")


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
      model: in eval mode, with an image tower of a known family (lraee.towers), such as
        open_clip's CLIP or CustomTextCLIP with a VisionTransformer; or such a tower alone.
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
    record = _describe(tower, scheme, backend, is_kept=not inplace)
    if exits is not None:
        _require_same_tower(exits, record)
        runner.require_exits_fit(tower, exits.router(backend=backend))
    float_parts = replaced_parts(tower, scheme) if check is not None else []
    fast = _swap_blocks(model, record) if inplace else _copy_with_blocks(model, record)
    if check is not None and expected is not None:
        try:
            require_fidelity(compare(expected, _encode(fast, check)))
        except Exception:
            if inplace:
                mark_float(model, float_parts)
            raise
    if exits is not None:
        add_exits(fast, exits)
    device = next(tower.parameters()).device
    _log_result(find_tower(fast), implementation(backend, device))
    return fast


def assemble(
    model: Model, *, scheme: Scheme, backend: Backend, base_hash: str, quantize: Quantize
) -> Model:
    """accelerate(model, scheme=scheme, backend=backend) with int8 weights made earlier.

    Args:
      model, scheme, backend: as in accelerate, seen by checked_tower; the model stays as it is.
      base_hash: tower_hash of the model's tower.
      quantize: where the int8 weights come from.
    """
    tower = find_tower(model)
    record = _describe(tower, scheme, backend, is_kept=True, base_hash=base_hash)
    return _copy_with_blocks(model, record, quantize)


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


def add_exits(model: nn.Module, exits: Exits) -> None:
    """Gives an accelerated model early exits, and the method set_classes."""
    tower = find_tower(model)
    record = cast(Acceleration, acceleration_of(model))
    device = next(tower.parameters()).device
    runner.attach_exits(tower, exits.router(backend=record.backend, device=device))
    set_record(tower, replace(record, exits=exits))
    for module in {model, tower}:
        module.__dict__["set_classes"] = ClassSetter(module)


# Making


def checked_tower(model: nn.Module, scheme: Scheme, backend: Backend) -> nn.Module:
    """The float tower of a model that can be accelerated so; raises one line if it cannot."""
    tower = find_tower(model)
    if acceleration_of(model) is not None:
        raise ValueError("accelerate: model must be float, got one that is accelerated already")
    if model.training or tower.training:
        raise ValueError("accelerate: model must be in eval mode, got train mode; call .eval()")
    require_own_weights(tower)
    require_supported(tower, scheme)
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
        base_hash=base_hash or tower_hash(tower.state_dict()),
        skeletons=tuple(without_numbers(part) for part in replaced_parts(tower, scheme)),
        original=weakref.ref(tower) if is_kept else None,
    )


def _copy_with_blocks(
    model: Model, record: Acceleration, quantize: Quantize | None = None
) -> Model:
    """A deep copy in which each block is already int8: no float weight is ever copied."""
    memo: dict[int, Any] = {}
    tower = find_tower(model)
    for _, part, build in _builders(tower, record, copier(memo), quantize):
        memo[id(part)] = build()
    fast = copy.deepcopy(model, memo)
    mark_fast(fast, record)
    return fast


def _swap_blocks(model: Model, record: Acceleration) -> Model:
    """Swaps part by part, so that the float weights of each are freed before the next."""
    tower = find_tower(model)
    builders = _builders(tower, record, as_is)
    while builders:
        path, _, build = builders.pop(0)
        put_module(tower, path, build())
        del _, build
    mark_fast(model, record)
    return model


def _builders(
    tower: nn.Module, record: Acceleration, take: Take, quantize: Quantize | None = None
) -> list[tuple[str, nn.Module, Callable[[], nn.Module]]]:
    """Path, float part and what builds the int8 part of all that the scheme replaces."""
    spec, scheme, backend = tower_spec(tower), record.scheme, record.backend
    builders: list[tuple[str, nn.Module, Callable[[], nn.Module]]] = []
    for i, (block, block_spec) in enumerate(zip(blocks_of(tower), block_specs(tower), strict=True)):
        build = partial(
            build_block, block, block_spec, spec.block_name(i),
            scheme=scheme, backend=backend, take=take, quantize=quantize,
        )  # fmt: skip
        builders.append((f"{spec.blocks}.{i}", block, build))
    if scheme.patch_embedding == "int8":
        path = spec.patch_embedding.path
        embedding = tower.get_submodule(path)
        build_embedding = partial(
            build_patch_embedding, embedding, path,
            scheme=scheme, backend=backend, take=take, quantize=quantize,
        )  # fmt: skip
        builders.append((path, embedding, build_embedding))
    return builders


def _encode(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [n, ...] of preprocessed images."""
    like = next(find_tower(model).parameters())
    with torch.no_grad():
        parts = torch.split(images, _CHECK_BATCH)
        return torch.cat([encode_image(model, part.to(like)) for part in parts])


def _log_result(tower: nn.Module, name: str) -> None:
    total = sum(len(spec.linears) for spec in block_specs(tower))
    count = len(int8_linears(tower))
    macs = count_macs(tower)
    _log.info(
        "accelerate: %d of %d linears in int8, %.1f %% of the tower's multiply-adds in int8"
        " operators, implementation %s",
        count,
        total,
        100 * macs.share,
        name,
    )
