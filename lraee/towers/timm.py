"""timm's VisionTransformer and Eva: alone, or as the trunk of open_clip's TimmModel.

SigLIP, SigLIP2, PE-Core, EVA01, EVA02, MobileCLIP-B, ViTamin, DINOv2 and DINOv3 are such trunks.
"""

import threading
import weakref
from typing import Any, cast

import torch
from open_clip.timm_model import TimmModel
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lraee.layers.batch_invariant import Rowwise
from lraee.layers.modules import Adapter, is_hooked, without_numbers
from lraee.layers.pooling import Latents, RowwiseMap, rowwise_mean
from lraee.towers.families import Family
from lraee.towers.runner import RowwiseTower, exits_of
from lraee.towers.spec import PatchEmbedding, Pooling, PoolingKind, Projection, TowerSpec
from lraee.towers.timm_blocks import read_block

_TRUNKS = (VisionTransformer, Eva)
_POOLINGS: dict[str, PoolingKind] = {
    "token": "class", "avg": "mean", "avgmax": "mean", "max": "mean", "map": "map", "": "none",
}  # fmt: skip

_CONVOLUTIONAL = {
    "FastVit": "MobileCLIP2-B or MobileCLIP2-L-14",
    "ConvNeXt": "ViT-B-16 or ViT-L-14",
    "ResNet": "ViT-B-32 or ViT-B-16",
}


# What is what


def _trunk(tower: nn.Module) -> nn.Module:
    return cast(nn.Module, tower.trunk) if isinstance(tower, TimmModel) else tower


def _is_trunk(module: nn.Module) -> bool:
    is_own = type(module) in _TRUNKS or isinstance(module, Adapter)
    return is_own and isinstance(module, _TRUNKS) and _why_no_trunk(module) is None


def _why_no_trunk(trunk: Any) -> str | None:
    """What of a VisionTransformer or Eva cannot be run, or None."""
    if trunk.global_pool not in _POOLINGS:
        return f"it pools by {trunk.global_pool!r}, and INT8 knows {', '.join(_POOLINGS)[:-2]}"
    if getattr(trunk, "rope_mixed", False):
        return "its rotary positions differ by block and head, for which INT8 has no kernel"
    pool = trunk.attn_pool
    if pool is not None and not isinstance(pool, AttentionPoolLatent):
        return f"it pools by {type(pool).__name__}, for which INT8 has no kernel"
    if pool is not None and not isinstance(pool.q_norm, nn.Identity):
        return "its attention pooling norms queries and keys, for which INT8 has no kernel"
    return None


def is_timm_model(module: nn.Module) -> bool:
    """Whether this is open_clip's TimmModel with a transformer as trunk."""
    return isinstance(module, TimmModel) and _is_trunk(module.trunk) and _has_plain_head(module)


def _has_plain_head(tower: nn.Module) -> bool:
    """Whether nothing but dropout and one linear follow the trunk."""
    return set(tower.get_submodule("head")._modules) <= {"drop", "proj"}


def refusal(tower: nn.Module) -> str | None:
    """Why a tower of timm is not run in int8: one that is convolutional, or of another class."""
    trunk = _trunk(tower)
    if not type(trunk).__module__.startswith(("timm.", "lraee.")):
        return None
    kind = type(trunk).__name__
    if isinstance(trunk, _TRUNKS) and type(trunk) in _TRUNKS:
        return _why_no_trunk(trunk) or "INT8 has no kernels for what follows its trunk"
    instead = next((name for part, name in _CONVOLUTIONAL.items() if part in kind), None)
    if instead is None and not any("attn" in name for name, _ in trunk.named_modules()):
        instead = "ViT-B-32 or ViT-B-16"
    if instead is not None:
        return f"it is convolutional, and INT8 has no kernels for convolutions; load {instead}"
    known = " and ".join(each.__name__ for each in _TRUNKS)
    return f"of timm's classes INT8 knows {known}"


# The spec


def read_tower(tower: nn.Module) -> TowerSpec:
    """The spec of a TimmModel, VisionTransformer or Eva, float or accelerated."""
    trunk = cast(Any, _trunk(tower))
    at = "trunk." if trunk is not tower else ""
    base = TimmModel if at else Eva if isinstance(trunk, Eva) else VisionTransformer
    tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    projection, pooling = _projection(tower, at), _pooling(trunk, tokens)
    size = trunk.embed_dim if projection is None else projection.shape[0]
    has_norm = not isinstance(trunk.norm, nn.Identity)
    adapters: list[tuple[str, type[Adapter]]] = []
    if not isinstance(trunk.patch_embed, PatchEmbed):
        adapters.append((f"{at}patch_embed", OneByOne))
    if trunk.attn_pool is not None:
        adapters.append((f"{at}attn_pool", TimmMap))
    if at:
        adapters.append(("trunk", RowwisePool))
    return TowerSpec(
        family=TIMM_MODEL.name if at else TRUNK.name,
        float_class=base,
        blocks=f"{at}blocks",
        patch_embedding=_patch_embedding(trunk, at),
        pooling=pooling,
        projection=projection,
        image_size=_image_size(tower, trunk),
        tokens=tokens,
        width=trunk.embed_dim,
        prefix_tokens=trunk.num_prefix_tokens,
        final_norm=f"{at}norm" if has_norm else None,
        embedding_size=None if pooling.kind == "none" else size,
        adapters=tuple(adapters),
    )


def _image_size(tower: nn.Module, trunk: Any) -> tuple[int, int]:
    size = trunk.patch_embed.img_size or trunk.default_cfg["input_size"][1:]
    return int(size[0]), int(size[1])


def _patch_embedding(trunk: Any, at: str) -> PatchEmbedding:
    embedding = trunk.patch_embed
    size = cast(tuple[int, int], tuple(embedding.feat_ratio(as_scalar=False)))
    if not isinstance(embedding, PatchEmbed):
        return PatchEmbedding(f"{at}patch_embed", size, _macs_of_stem(embedding))
    proj = embedding.proj
    macs = embedding.num_patches * proj.out_channels * proj.in_channels * size[0] * size[1]
    return PatchEmbedding(f"{at}patch_embed.proj", size, macs)


_stems: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, int]]" = weakref.WeakKeyDictionary()


def _macs_of_stem(stem: nn.Module) -> int:
    """Multiply-adds of one image in the convolutions before the blocks."""
    held = cast(Any, stem)
    macs = _stems.get(stem)
    if macs is None or macs[0] != held.img_size:
        numberless = without_numbers(stem).to("meta")
        channels = next(m.in_channels for m in stem.modules() if isinstance(m, nn.Conv2d))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            numberless(torch.empty(1, channels, *held.img_size, device="meta"))
        macs = _stems[stem] = held.img_size, counter.get_total_flops() // 2
    return macs[1]


def _pooling(trunk: Any, tokens: int) -> Pooling:
    kind = _POOLINGS[trunk.global_pool]
    if trunk.attn_pool is None:
        return Pooling(kind, vectors=tokens if kind == "none" else 1)
    pool, D = trunk.attn_pool, trunk.embed_dim
    takes_prefix = isinstance(trunk, Eva) or trunk.pool_include_prefix
    N = tokens if takes_prefix else tokens - trunk.num_prefix_tokens
    linears = [m for m in (pool.q, pool.proj, pool.mlp) if m is not None]
    weights = sum(p.numel() for m in linears for p in m.parameters() if p.dim() == 2)
    Q = pool.latent_len
    return Pooling("map", macs=Q * weights + 2 * N * D * D + 2 * N * Q * D)


def _projection(tower: nn.Module, at: str) -> Projection | None:
    """The last linear: open_clip's behind the trunk, or the trunk's own head."""
    for path in ("head.proj", f"{at}head"):
        try:
            module = tower.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear):
            bias = f"{path}.bias" if module.bias is not None else None
            shape = module.out_features, module.in_features
            return Projection(f"{path}.weight", False, shape, bias)
    return None


# How it runs


def embed(tower: nn.Module, x: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
    trunk = cast(Any, _trunk(tower))
    z = trunk._pos_embed(trunk.patch_embed(x))
    z = z[0] if isinstance(trunk, Eva) else trunk.patch_drop(z)
    return cast(Tensor, trunk.norm_pre(z))


class OneByOne(Rowwise):
    """Convolutions before the blocks, image by image: their sums may differ by batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> patches [B, N, D]."""
        if len(x) < 2:
            return cast(Tensor, super().forward(x))
        return torch.cat([super(OneByOne, self).forward(one) for one in torch.split(x, 1)])


class TimmMap(RowwiseMap):
    """timm's AttentionPoolLatent."""

    latent_len: int

    def _latents(self) -> Latents:
        pool = cast(Any, self)
        latent = pool.latent[0]
        queries = latent if isinstance(pool.q, nn.Identity) else self._linear(latent, pool.q)
        D = pool.kv.out_features // 2
        weight, bias = pool.kv.weight, pool.kv.bias
        value_bias = None if bias is None else bias[D:]
        return Latents(queries, weight[:D], weight[D:], value_bias, pool.num_heads)

    def _tokens(self, x: Tensor) -> Tensor:
        positions = cast(Tensor | None, self.pos_embed)
        return x if positions is None else x + positions.to(x.dtype)

    def _finish(self, y: Tensor) -> Tensor:
        pool = cast(Any, self)
        y = y if isinstance(pool.proj, nn.Identity) else self._linear(y, pool.proj)
        if pool.mlp is not None:
            mlp = pool.mlp
            y = y + self._mlp(pool.norm(y), mlp.fc1, mlp.act, mlp.fc2)
        if pool.pool == "avg":
            return rowwise_mean(y, self.rowwise_backend)
        return y[:, 0] if pool.pool == "token" else y


class RowwisePool(Rowwise):
    """A trunk whose means over tokens have one order of sums."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, L, D] -> [B, D], as the library's."""
        trunk = cast(Any, self)
        kind = trunk.global_pool if pool_type is None else pool_type
        if trunk.attn_pool is not None or kind not in ("avg", "avgmax"):
            return cast(Tensor, super().pool(x, pool_type))  # type: ignore[misc]
        prefix = 0 if getattr(trunk, "pool_include_prefix", False) else trunk.num_prefix_tokens
        patches = x[:, prefix:]
        mean = rowwise_mean(patches, trunk.rowwise_backend)
        return mean if kind == "avg" else 0.5 * (patches.amax(1) + mean)


_call = threading.local()
"""The rotary positions of the call that this thread is in."""


class TimmTower(RowwiseTower):
    """Runs an accelerated TimmModel."""

    def forward(self, x: Tensor) -> Any:
        """Images [B, 3, H, W] -> embeddings [B, E]."""
        if exits_of(self) is None and is_hooked(self._trunk):
            return self.tower_spec.float_class.forward(self, x)  # the hook sees the trunk's call
        return self.embed_images(x)

    @property
    def _trunk(self) -> Any:
        return _trunk(self)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
        trunk = self._trunk
        if self._has_rope_of_size:
            embedding = trunk.patch_embed
            grid = embedding.dynamic_feat_size(images.shape[-2:])
            _call.rope = trunk.rope.get_embed(shape=grid)
        return super().embed(images)

    @property
    def _has_rope_of_size(self) -> bool:
        """Whether rotary positions are made anew in each call, for the size of its images."""
        rope = getattr(self._trunk, "rope", None)
        return rope is not None and (
            self._trunk.dynamic_img_size or not hasattr(rope, "feat_shape")
        )

    def _rope(self) -> Any:
        rope = getattr(self._trunk, "rope", None)
        if rope is None:
            return None
        return _call.rope if self._has_rope_of_size else rope.get_embed()

    def _is_rope_lasting(self) -> bool:
        if self._has_rope_of_size:
            return False
        rope = self._rope()
        return rope is None or rope is self._rope()

    def _runs_blocks(self, z: Tensor, rope: Any) -> Tensor:
        blocks = self._trunk.blocks
        if isinstance(blocks, nn.Sequential) and rope is None:
            return cast(Tensor, blocks(z))
        return super()._runs_blocks(z, rope)

    def _finish(self, z: Tensor) -> Tensor:
        trunk = self._trunk
        z = z[:, :1] if self._ends_with_class_token() else z
        y = trunk.forward_head(trunk.norm(z))
        return cast(Tensor, y if trunk is self else cast(Any, self).head(y))


class TrunkTower(RowwisePool, TimmTower):
    """Runs an accelerated VisionTransformer or Eva."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
        """Images [B, 3, H, W] -> embeddings [B, E].

        Raises: NotImplementedError on a mask.
        """
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                f"{type(self).__name__}: attn_mask must be None and is_causal False; INT8 has no"
                " kernel for them, use the float model (lraee.restore)"
            )
        return self.embed_images(x)


_MODELS = (
    "SigLIP", "SigLIP2", "PE-Core", "EVA01", "EVA02", "MobileCLIP-B", "MobileCLIP2-L", "ViTamin",
)  # fmt: skip

TIMM_MODEL = Family(
    name="open_clip TimmModel (timm VisionTransformer, Eva)",
    paths=("visual",),
    is_tower=is_timm_model,
    read_tower=read_tower,
    read_block=read_block,
    embed=embed,
    adapter=TimmTower,
    models=_MODELS,
    refusal=refusal,
)
TRUNK = Family(
    name="timm VisionTransformer, Eva",
    paths=(),
    is_tower=_is_trunk,
    read_tower=read_tower,
    read_block=read_block,
    embed=embed,
    adapter=TrunkTower,
    models=(*_MODELS, "CLIP", "DINOv2", "DINOv3", "AIMv2", "ViT", "DeiT III"),
    refusal=refusal,
)
