"""open_clip's VisionTransformer: how it is found, read, refused and run.

Blocks are read by the names of their parameters, not by their class: open_clip has had several
attention classes, and nn.MultiheadAttention and a raw `in_proj_weight` hold the same numbers.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from lraee.layers.int8_attention import PLAIN_CALL
from lraee.layers.modules import is_hooked
from lraee.towers.families import Family, UnsupportedBlockError
from lraee.towers.runner import RowwiseTower
from lraee.towers.spec import (
    Attention,
    BlockSpec,
    Call,
    Linear,
    Mlp,
    Norm,
    PatchEmbedding,
    Pooling,
    PoolingKind,
    Projection,
    Rows,
    TowerSpec,
)

NAME = "open_clip"
BLOCKS = "transformer.resblocks"

# Blocks

_NAMES = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
_REQUIRED = {f"{module}.weight" for module in _NAMES} | {"attn.in_proj_weight"}
_OPTIONAL = {f"{module}.bias" for module in _NAMES} | {
    "attn.in_proj_bias", "ls_1.gamma", "ls_2.gamma",
}  # fmt: skip
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


def read_block(block: nn.Module) -> BlockSpec:
    """The spec of a float ResidualAttentionBlock or CustomResidualAttentionBlock.

    Raises: UnsupportedBlockError, what of it has no int8 kernel.
    """
    _require_parts(block)
    attn = block.get_submodule("attn")
    if not hasattr(attn, "num_heads") or getattr(attn, "add_zero_attn", False):
        raise UnsupportedBlockError("has an attn without num_heads or with add_zero_attn")
    held = {name for name, _ in block.named_parameters()}
    num_heads, width = cast(int, attn.num_heads), block.get_parameter("ln_1.weight").shape[0]
    bias = "attn.in_proj_bias" if "attn.in_proj_bias" in held else None
    is_sequence_first = not getattr(attn, "batch_first", True)

    def linear(path: str, site: Any) -> Linear:
        own_bias = f"{path}.bias" if f"{path}.bias" in held else None
        return Linear(path, site, (Rows(f"{path}.weight", own_bias),))

    return BlockSpec(
        attention=Attention(
            "attn",
            num_heads,
            width // num_heads,
            Linear("attn.in_proj", "in_proj", (Rows("attn.in_proj_weight", bias),)),
            linear("attn.out_proj", "out_proj"),
            call=None if isinstance(attn, nn.MultiheadAttention) else PLAIN_CALL,
        ),
        mlp=Mlp(
            linear("mlp.c_fc", "c_fc"),
            linear("mlp.c_proj", "c_proj"),
            cast(str, activation_of(block.get_submodule("mlp.gelu"))),
        ),
        norm_1=Norm("ln_1"),
        norm_2=Norm("ln_2"),
        scale_1="ls_1.gamma" if "ls_1.gamma" in held else None,
        scale_2="ls_2.gamma" if "ls_2.gamma" in held else None,
        call=Call(
            ("q_x", "k_x", "v_x", "attn_mask")
            if isinstance(attn, nn.MultiheadAttention)
            else ("x", "attn_mask"),
            mask="attn_mask",
            is_sequence_first=is_sequence_first,
        ),
    )


def _require_parts(block: nn.Module) -> None:
    """Raises UnsupportedBlockError on a part that has no int8 kernel, or a missing one."""
    modules = dict(block.named_modules())
    held = {name for name, _ in [*block.named_parameters(), *block.named_buffers()]}
    idle = {name for name, m in modules.items() if isinstance(m, nn.Identity | nn.Dropout)}
    for name in sorted(held - _REQUIRED - _OPTIONAL) + sorted(set(modules) - _MODULES - idle):
        option = next((o for part, o in _OPTIONS.items() if name.startswith(part)), None)
        hint = "" if option is None else f" (option {option})"
        raise UnsupportedBlockError(f"has {name}{hint}, for which INT8 has no kernel")
    missing = sorted(_REQUIRED - held)
    if missing:
        raise UnsupportedBlockError(f"lacks {missing[0]}, without which INT8 cannot read the block")
    for name in ("ln_1", "ln_2"):
        if not isinstance(modules[name], nn.LayerNorm):
            kind = type(modules[name]).__name__
            raise UnsupportedBlockError(f"has a {kind} as {name}, and INT8 knows LayerNorm")
    if activation_of(modules.get("mlp.gelu")) is None:
        kind = type(modules.get("mlp.gelu")).__name__
        raise UnsupportedBlockError(f"has {kind} as mlp.gelu, and INT8 knows GELU and QuickGELU")


def activation_of(module: nn.Module | None) -> str | None:
    """The operators' name of what an activation module computes, or None."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else None


# The tower


def is_tower(module: nn.Module) -> bool:
    """Whether this is open_clip's VisionTransformer, or built like it."""
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    return isinstance(blocks, nn.ModuleList) and hasattr(module, "conv1")


def read_tower(tower: nn.Module) -> TowerSpec:
    """The spec of a VisionTransformer, float or accelerated."""
    embedding = cast(Any, tower.conv1)
    tokens, width = cast(Tensor, tower.positional_embedding).shape
    pooling, proj = _read_pooling(tower, tokens), getattr(tower, "proj", None)
    projection = None if proj is None else Projection("proj", True, (proj.shape[1], proj.shape[0]))
    is_own = type(tower) is VisionTransformer or isinstance(tower, RowwiseTower)
    gives_one = is_own and projection is not None and getattr(tower, "pool_type", "") != "none"
    patch = cast(tuple[int, int], tuple(embedding.kernel_size))
    size = cast(int | tuple[int, int], tower.image_size)
    return TowerSpec(
        family=NAME,
        float_class=VisionTransformer,
        blocks=BLOCKS,
        patch_embedding=PatchEmbedding(
            "conv1",
            patch,
            (tokens - 1) * embedding.out_channels * embedding.in_channels * math.prod(patch),
        ),
        pooling=pooling,
        projection=projection,
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        tokens=tokens,
        width=width,
        prefix_tokens=1,
        final_norm="ln_post",
        embedding_size=projection.shape[0] if gives_one and projection is not None else None,
        extra_output="output_tokens" if tower.output_tokens else None,
    )


def _read_pooling(tower: nn.Module, tokens: int) -> Pooling:
    pool_type = getattr(tower, "pool_type", "tok")
    poolers = list(_poolers(tower))
    attention, macs, L = [], 0, tokens
    for path, pooler in poolers:
        macs += _pooler_macs(pooler, L)
        if getattr(tower, "attn_pool_type", "") == "cascade":
            L = pooler.get_parameter("query").shape[0]
        attn = cast(nn.MultiheadAttention, pooler.get_submodule("attn"))
        attention += [f"{path}.attn"] if attn.batch_first else []
    vectors = 1
    if pool_type == "none" and len(poolers) < 2:
        vectors = poolers[0][1].get_parameter("query").shape[0] if poolers else tokens
    kind: PoolingKind = {"tok": "class", "avg": "mean"}.get(pool_type, "none")  # type: ignore[assignment]
    return Pooling("perceiver" if poolers else kind, tuple(attention), vectors, macs)


def _poolers(tower: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attentional poolers of the tower: none, one, or two."""
    for path in ("attn_pool", "attn_pool_contrastive"):
        pooler = tower._modules.get(path)
        if pooler is not None:
            yield path, pooler


def _pooler_macs(pooler: nn.Module, L: int) -> int:
    """Attention of learned queries over L tokens."""
    queries, D = pooler.get_parameter("query").shape
    context = int(cast(nn.MultiheadAttention, pooler.attn).kdim)
    return 2 * queries * D * D + 2 * L * context * D + 2 * queries * L * D


class OpenClipTower(RowwiseTower):
    """Runs an accelerated VisionTransformer."""

    transformer: nn.Module
    ln_post: nn.Module
    _pool: Callable[[Tensor], tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Any:
        """Images [B, 3, H, W] -> pooled [B, E], or (pooled, tokens) with `output_tokens`."""
        if not self.output_tokens:
            return self.embed_images(x)
        self._active_router(x)
        pooled, tokens = self._pool(self._runs_blocks(self._embeds(x)))
        return self._project(pooled), tokens

    def _runs_blocks(self, z: Tensor, rope: Any = None) -> Tensor:
        return cast(Tensor, self.transformer(z))

    def _ends_with_class_token(self) -> bool:
        is_alone = self.pool_type == "tok" and self.attn_pool is None
        return is_alone and not is_hooked(self.get_submodule("ln_post"))

    def _extra_output(self) -> str | None:
        return "output_tokens" if self.output_tokens else None

    def _finish(self, z: Tensor) -> Tensor:
        if self._ends_with_class_token():
            return self._project(self.ln_post(z[:, 0]))  # one token in fifty, the same bits
        return self._project(self._pool(z)[0])

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> dict[str, Any]:
        """As open_clip's; `image_features` are those of forward."""
        unprojected = copy.copy(self)  # shares all modules; only its own proj is absent
        unprojected._parameters = {**self._parameters, "proj": None}
        output = VisionTransformer.forward_intermediates(unprojected, x, *args, **options)
        features = output.get("image_features")
        return output if features is None else {**output, "image_features": self._project(features)}


def refusal(tower: nn.Module) -> str | None:
    """Why a tower of open_clip of another class is not run in int8."""
    if type(tower).__name__ == "ModifiedResNet":
        return (
            "it is convolutional, and INT8 has no kernels for convolutions; load ViT-B-32 or"
            " ViT-B-16"
        )
    return None


FAMILY = Family(
    name="open_clip VisionTransformer",
    paths=("visual",),
    is_tower=is_tower,
    read_tower=read_tower,
    read_block=read_block,
    embed=VisionTransformer._embeds,
    adapter=OpenClipTower,
    refusal=refusal,
)
