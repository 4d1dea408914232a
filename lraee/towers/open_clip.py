"""The only file that knows open_clip: finds the image tower, reads its blocks, counts its work.

Blocks are read by the names of their parameters, not by their class: open_clip has had several
attention classes, and nn.MultiheadAttention and a raw `in_proj_weight` hold the same numbers.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import RowwiseLinear
from lraee.layers.int8_block import Int8Attention, Int8Block, Int8MultiheadAttention
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.int8_patch_embedding import Int8PatchEmbedding, require_by_patch
from lraee.layers.scheme import SITES, Scheme, Site, quantize_weight
from lraee.ops.backend import Backend
from lraee.ops.checked import Activation
from lraee.ops.rules import FLOAT_TYPES

T = TypeVar("T")


class Take(Protocol):
    """How a part of the float model enters the fast one: copied, or as it is."""

    def __call__(self, part: T) -> T:
        """The part for the fast model."""
        ...


Quantize = Callable[[str, Tensor], tuple[Tensor, Tensor]]
"""Name of a linear in the transformer, such as "resblocks.3.mlp.c_fc", or PATCH_EMBEDDING, and its
float weight [N, K] -> w_q int8 [N, K], w_scale float32 [N]."""

PATCH_EMBEDDING = "conv1"

PATHS: dict[Site, str] = {
    "in_proj": "attn.in_proj",
    "out_proj": "attn.out_proj",
    "c_fc": "mlp.c_fc",
    "c_proj": "mlp.c_proj",
}
"""Where the four linears of a block are, in the fast model."""

_REQUIRED = {
    f"{module}.weight"
    for module in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
} | {"attn.in_proj_weight"}  # fmt: skip
_OPTIONAL = {
    f"{module}.bias" for module in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
} | {"attn.in_proj_bias", "ls_1.gamma", "ls_2.gamma"}  # fmt: skip
_MODULES = {
    "", "ln_1", "attn", "attn.out_proj", "ls_1",
    "ln_2", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "ls_2",
}  # fmt: skip

# The option of open_clip that makes a block hold such a part
_OPTIONS = {
    "attn.ln_q": "qk_norm",
    "attn.ln_k": "qk_norm",
    "attn.logit_scale": "scaled_cosine_attn",
    "attn.head_scale": "scale_heads",
    "attn.ln_inner": "scale_attn_inner",
    "ln_attn": "scale_attn",
    "mlp.ln": "scale_fc",
    "ln_1_kv": "cross attention",
}


def find_tower(model: nn.Module) -> nn.Module:
    """The image tower: `model.visual`, or the model itself if it is a VisionTransformer.

    Raises: TypeError if there is none, NotImplementedError if it is of an unsupported kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model must be an open_clip CLIP model, got {type(model).__name__}"
        )
    tower = model if _is_vision_transformer(model) else getattr(model, "visual", None)
    if not isinstance(tower, nn.Module):
        raise TypeError(
            "accelerate: model must have an image tower at `.visual`, as open_clip's CLIP has,"
            f" got {type(model).__name__}"
        )
    if not _is_vision_transformer(tower):
        raise NotImplementedError(
            "accelerate: the image tower must be open_clip's VisionTransformer, got"
            f" {_kind(tower)}: INT8 has no kernels for it; use a ViT-B, L or H model of open_clip,"
            " or serve this one in float"
        )
    return tower


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The blocks of the tower, in order."""
    return cast(nn.ModuleList, tower.get_submodule("transformer.resblocks"))


def _is_vision_transformer(module: nn.Module) -> bool:
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    return isinstance(blocks, nn.ModuleList) and hasattr(module, "conv1")


def _kind(tower: nn.Module) -> str:
    trunk = getattr(tower, "trunk", None)
    inside = "" if trunk is None else f" (timm {type(trunk).__name__})"
    return type(tower).__name__ + inside


def require_supported(tower: nn.Module, scheme: Scheme) -> None:
    """Raises one line unless each block has its int8 kernels and each kept layer exists.

    Raises: NotImplementedError, ValueError.
    """
    names = [f"resblocks.{i}" for i in range(len(blocks_of(tower)))]
    for name, block in zip(names, blocks_of(tower), strict=True):
        reason = _why_not(block)
        if reason is not None:
            raise NotImplementedError(
                f"accelerate: visual.transformer.{name} {reason}; use a model without it, or serve"
                " this one in float"
            )
    known = {f"{name}.{path}" for name in names for path in PATHS.values()}
    for kept in scheme.keep_float:
        if kept not in known:
            raise ValueError(
                f"Scheme: keep_float must name linears such as 'resblocks.0.mlp.c_fc', got {kept!r}"
            )


def _why_not(block: nn.Module) -> str | None:
    """What of this block has no int8 kernel, or None."""
    modules = dict(block.named_modules())
    held = {name for name, _ in [*block.named_parameters(), *block.named_buffers()]}
    idle = {name for name, m in modules.items() if isinstance(m, nn.Identity | nn.Dropout)}
    for name in sorted(held - _REQUIRED - _OPTIONAL) + sorted(set(modules) - _MODULES - idle):
        option = next((o for part, o in _OPTIONS.items() if name.startswith(part)), None)
        hint = "" if option is None else f" (option {option})"
        return f"has {name}{hint}, for which INT8 has no kernel"
    missing = sorted(_REQUIRED - held)
    if missing:
        return f"lacks {missing[0]}, without which INT8 cannot read the block"
    dtype = block.get_parameter("mlp.c_fc.weight").dtype
    if dtype not in FLOAT_TYPES:
        return f"has weights of {dtype}, and INT8 computes for float32, bfloat16 and float16"
    for name in sorted(_REQUIRED):
        if not all(torch.isfinite(end) for end in torch.aminmax(block.get_parameter(name))):
            return f"has NaN or Inf in {name}"
    for name in ("ln_1", "ln_2"):
        if not isinstance(modules[name], nn.LayerNorm):
            return f"has a {type(modules[name]).__name__} as {name}, and INT8 knows LayerNorm"
    if _activation(modules.get("mlp.gelu")) is None:
        kind = type(modules.get("mlp.gelu")).__name__
        return f"has {kind} as mlp.gelu, and INT8 knows GELU and QuickGELU"
    attn = modules["attn"]
    if not hasattr(attn, "num_heads") or getattr(attn, "add_zero_attn", False):
        return "has an attn without num_heads or with add_zero_attn"
    return None


def _activation(module: nn.Module | None) -> Activation | None:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else None


def linear_shapes(tower: nn.Module) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear of a float tower's blocks, by the name it has in the fast one."""
    shapes = {}
    for i, block in enumerate(blocks_of(tower)):
        for site, path in PATHS.items():
            N, K = block.get_parameter(f"{_source(site)}weight").shape
            shapes[f"resblocks.{i}.{path}"] = (N, K)
    return shapes


def int8_shapes(tower: nn.Module, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear that the scheme quantizes, of a float tower."""
    shapes = {
        name: shape for name, shape in linear_shapes(tower).items() if name not in scheme.keep_float
    }
    if scheme.patch_embedding == "int8":
        conv = cast(nn.Conv2d, tower.conv1)
        shapes[PATCH_EMBEDDING] = conv.out_channels, conv.weight[0].numel()
    return shapes


def int8_linears(tower: nn.Module) -> dict[str, Int8Linear]:
    """The int8 linears of an accelerated tower, by the names that int8_shapes gives them."""
    found = {
        name: module
        for name, module in blocks_of(tower).named_modules(prefix="resblocks")
        if isinstance(module, Int8Linear)
    }
    conv = tower.get_submodule(PATCH_EMBEDDING)
    return found | ({PATCH_EMBEDDING: conv} if isinstance(conv, Int8Linear) else {})


def build_patch_embedding(
    conv: nn.Module,
    *,
    scheme: Scheme,
    backend: Backend,
    take: Take,
    quantize: Quantize | None = None,
) -> Int8PatchEmbedding:
    """The int8 patch embedding that stands for a float conv1; arguments as build_block's.

    Raises: NotImplementedError if it is no linear of each patch.
    """
    require_by_patch(conv)
    conv = cast(nn.Conv2d, conv)
    weight = conv.weight.flatten(1)
    if quantize is None:
        w_q, w_scale = quantize_weight(weight, scheme, backend)
    else:
        w_q, w_scale = quantize(PATCH_EMBEDDING, weight)
    result = Int8PatchEmbedding(conv, w_q, w_scale, backend=backend).eval()
    carry_hooks(conv, result, take)
    return result


def _source(site: Site) -> str:
    """Where a float block holds the linear's weight and bias: what comes before these words."""
    return "attn.in_proj_" if site == "in_proj" else f"{PATHS[site]}."


def build_block(
    block: nn.Module,
    name: str,
    *,
    scheme: Scheme,
    backend: Backend,
    take: Take,
    quantize: Quantize | None = None,
) -> Int8Block:
    """The int8 block that stands for a float one.

    Args:
      block: supported by require_supported.
      name: its name inside the transformer, such as "resblocks.3".
      scheme: how to quantize.
      backend: which implementation to run on.
      take: brings the parts that stay float (norms, activation, hooks) into the fast model.
      quantize: where the int8 weights come from; None quantizes the float ones by the scheme.
    """
    attn, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
    held = dict(block.named_parameters())

    def linear(site: Site) -> nn.Module:
        weight, bias = held[f"{_source(site)}weight"], held.get(f"{_source(site)}bias")
        if f"{name}.{PATHS[site]}" in scheme.keep_float:
            return RowwiseLinear.of(take(weight), None if bias is None else take(bias), backend)
        if quantize is None:
            w_q, w_scale = quantize_weight(weight, scheme, backend)
        else:
            w_q, w_scale = quantize(f"{name}.{PATHS[site]}", weight)
        return Int8Linear(
            w_q, w_scale, bias,
            dtype=weight.dtype, rounding=scheme.rounding(site), backend=backend,
        )  # fmt: skip

    is_multihead = isinstance(attn, nn.MultiheadAttention)
    attention = (Int8MultiheadAttention if is_multihead else Int8Attention)(
        linear("in_proj"),
        linear("out_proj"),
        num_heads=cast(int, attn.num_heads),
        is_int8=scheme.attention == "int8",
        batch_first=bool(getattr(attn, "batch_first", True)),
        backend=backend,
    )
    children = OrderedDict(
        (child, linear(child) if child in SITES else take(module))
        for child, module in mlp.named_children()
    )
    activation = _activation(mlp.get_submodule("gelu"))
    assert activation is not None
    ln_attn = block._modules.get("ln_attn")
    result = Int8Block(
        ln_1=take(cast(nn.LayerNorm, block.ln_1)),
        attn=attention,
        ls_1=take(cast(nn.Module, block.ls_1)),
        ln_2=take(cast(nn.LayerNorm, block.ln_2)),
        mlp=nn.Sequential(children),
        ls_2=take(cast(nn.Module, block.ls_2)),
        ln_attn=None if ln_attn is None else take(ln_attn),
        activation=activation,
    )
    carry_hooks(block, result.eval(), take)
    return result


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def carry_hooks(source: nn.Module, target: nn.Module, take: Take) -> None:
    """Gives each module of target the forward hooks of the module of that name in source."""
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        if name in modules and module is not modules[name]:
            for attribute in _HOOKS:
                module.__dict__[attribute] = take(modules[name].__dict__[attribute])


def without_numbers(block: nn.Module) -> nn.Module:
    """The block on the meta device, without hooks: all that restore needs besides the weights."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in block.parameters()
    }
    for module in block.modules():
        for attribute in _HOOKS:
            memo[id(module.__dict__[attribute])] = OrderedDict()
    return copy.deepcopy(block, memo)


def tower_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over name, type, shape and bytes of each tensor of a tower, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
