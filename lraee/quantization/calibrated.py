"""The int8 linears and norms that calibration gives a tower: made, put in, and named."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.modules import put_module
from lraee.layers.scheme import Scheme
from lraee.layers.spec import BlockSpec, Linear
from lraee.quantization import images
from lraee.quantization.any_block import AnyBlock, Tensors, put_linear
from lraee.quantization.images import Calibration, read_tokens
from lraee.quantization.plain_block import PlainBlock, is_folded
from lraee.quantization.streams import Streams
from lraee.storage.stages import Stages
from lraee.towers.families import block_specs, blocks_of, linear_shapes, tower_spec
from lraee.towers.runner import RowwiseTower
from lraee.towers.state import tower_hash

RECIPE = 3
"""Of the algorithm: stages that another one left are not used."""


def require_scheme(scheme: Scheme) -> None:
    """Raises ValueError on a scheme that calibration does not know how to serve."""
    wanted = {"weights": "channel", "activations": "token", "patch_embedding": "float"}
    for name, value in wanted.items():
        if getattr(scheme, name) != value:
            raise ValueError(
                f"accelerate: calibration must have a scheme with {name}={value!r}, got"
                f" {getattr(scheme, name)!r}; leave scheme out"
            )


@torch.no_grad()
def calibrate_tower(
    tower: nn.Module, fast: nn.Module, scheme: Scheme, calibration: Calibration
) -> Tensors:
    """Int8 linears and norms of a tower, calibrated on images: block by block, in order.

    Args:
      tower: float.
      fast: the same one accelerated by the scheme; its numbers change, see `put`.
      scheme: how it is quantized.
      calibration: images and options.
    Returns: w_q, w_scale and bias of each linear and weight and bias of each folded norm, by name.
    Raises: ValueError, TypeError on images and options, in one line.
    """
    require_scheme(scheme)
    tokens, digest = read_tokens(cast(RowwiseTower, fast), calibration.images)
    chunk = _chunk(tower, tokens, calibration.memory_mb)
    settings = {
        "recipe": RECIPE, "images": digest, "scheme": scheme.fields, "chunk": chunk,
        "base": tower_hash(tower.state_dict()),
    }  # fmt: skip
    folder = None if calibration.folder is None else Path(calibration.folder)
    stages = Stages(folder, settings)
    spec, specs = tower_spec(tower), block_specs(tower)
    streams = Streams(tokens, chunk, has_class=spec.prefix_tokens > 0)
    is_plain = _is_plain(tower, scheme)
    tensors: Tensors = {}
    places = range(len(specs))
    for i in tqdm(places, desc="calibrate blocks", disable=not calibration.progress, leave=False):
        given = (blocks_of(tower)[i], specs[i], spec.block_name(i), scheme, streams)
        work = PlainBlock(*given) if is_plain else AnyBlock(*given, fast=fast, i=i)
        tensors |= _stage(stages, f"block-{i}", work)
    stages.clear()
    return tensors


def _stage(stages: Stages, name: str, work: PlainBlock | AnyBlock) -> Tensors:
    """The tensors of one block, from a run before or made now; the streams go on behind it."""
    is_new = False

    def make() -> Tensors:
        nonlocal is_new
        is_new = True
        return work.calibrate()

    tensors = stages.get(name, make)
    if not is_new:
        work.advance(tensors)
    return tensors


def _chunk(tower: nn.Module, tokens: Tensor, memory_mb: int) -> int:
    n, L, width = tokens.shape
    shapes = linear_shapes(tower).values()
    largest = max(K * (6 * K + 8 * N) for N, K in shapes)
    widest = max(max(shape) for shape in shapes)
    return images.chunk_of(
        n, L, width=width, widest=widest, products=8 * largest, memory_mb=memory_mb
    )


def _is_plain(tower: nn.Module, scheme: Scheme) -> bool:
    spec = tower_spec(tower)
    pairs = zip(blocks_of(tower), block_specs(tower), strict=True)
    return all(
        is_folded(block, each, spec.block_name(i), scheme) for i, (block, each) in enumerate(pairs)
    )


def other_shapes(tower: nn.Module, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint of a calibrated tower holds beside w_q and w_scale, by name:
    biases of the int8 linears, and folded norms. Of a float tower and of its int8 form the same.
    """
    if not scheme.calibration:
        return {}
    spec, is_plain = tower_spec(tower), _is_plain(tower, scheme)
    result: dict[str, tuple[int, ...]] = {}
    for i, (block, each) in enumerate(zip(blocks_of(tower), block_specs(tower), strict=True)):
        name = spec.block_name(i)
        for linear in each.linears:
            bias = _bias(block, linear)
            if bias is not None and f"{name}.{linear.path}" not in scheme.keep_float:
                result[f"{name}.{linear.path}.bias"] = tuple(bias.shape)
        if is_plain:
            result[f"{name}.{each.mlp.fc2.path}.in_scale"] = (_inputs(block, each.mlp.fc2),)
        for norm in (each.norm_1, each.norm_2) if is_plain else ():
            result |= {f"{name}.{norm.path}.{own}": (spec.width,) for own in ("weight", "bias")}
    return result


def _bias(block: nn.Module, linear: Linear) -> Tensor | None:
    """Of a float or int8 linear."""
    if isinstance(block, Int8Block):
        return cast(Tensor | None, block.get_submodule(linear.path).bias)
    return linear.bias(block)


def _inputs(block: nn.Module, linear: Linear) -> int:
    """K of a float or int8 linear."""
    if isinstance(block, Int8Block):
        return cast(Int8Linear, block.get_submodule(linear.path)).in_features
    return linear.shape(block)[1]


def put(fast: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives an accelerated tower these numbers. Norms are replaced, so that float blocks which
    share them keep theirs.
    """
    spec = tower_spec(fast)
    for i, (block, each) in enumerate(zip(blocks_of(fast), block_specs(fast), strict=True)):
        name = spec.block_name(i)
        for linear in each.linears:
            module = block.get_submodule(linear.path)
            if isinstance(module, Int8Linear):
                put_linear(module, dict(tensors), f"{name}.{linear.path}")
        _put_norms(block, each, name, tensors)


def _put_norms(block: nn.Module, spec: BlockSpec, name: str, tensors: Mapping[str, Tensor]) -> None:
    for norm in (spec.norm_1, spec.norm_2):
        if f"{name}.{norm.path}.weight" not in tensors:
            continue
        module: Any = deepcopy(block.get_submodule(norm.path))
        for own in ("weight", "bias"):
            old = getattr(module, own)
            new = tensors[f"{name}.{norm.path}.{own}"].to(old.device, old.dtype)
            setattr(module, own, nn.Parameter(new.clone(), old.requires_grad))
        put_module(block, norm.path, module)


def others_of(fast: nn.Module, scheme: Scheme) -> Tensors:
    """The tensors that other_shapes names, as an accelerated tower holds them, float32."""
    spec, blocks = tower_spec(fast), blocks_of(fast)
    owners = {spec.block_name(i): block for i, block in enumerate(blocks)}
    result: Tensors = {}
    for name in other_shapes(fast, scheme):
        block_name = ".".join(name.split(".")[:2])
        path, _, own = name.removeprefix(f"{block_name}.").rpartition(".")
        tensor: Tensor = getattr(owners[block_name].get_submodule(path), own)
        result[name] = tensor.detach().float()
    return result
