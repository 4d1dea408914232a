"""transformers' vision models, in its versions 4 and 5: how they are found and read.

The library is never imported here (see hugging_face_layouts).
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.modules import Adapter, library_class
from lraee.towers import text_encoder
from lraee.towers.families import Family, find_tower
from lraee.towers.hugging_face_blocks import read_block
from lraee.towers.hugging_face_checks import forget_recorders
from lraee.towers.hugging_face_layouts import (
    DUAL,
    LAYOUTS,
    PATHS,
    PROJECTED,
    Vision,
    class_names,
    is_a,
    layout_of,
)
from lraee.towers.hugging_face_poolers import (
    Aimv2Map,
    ClassTokenPooler,
    NaflexEmbeddings,
    SiglipMap,
)
from lraee.towers.hugging_face_running import (
    DualTower,
    PassingProjection,
    ProjectedTower,
    VisionModel,
    VisionTower,
    embed,
    patches_of,
    vision_of,
)
from lraee.towers.runner import RowwiseTower
from lraee.towers.spec import PatchEmbedding, Pooling, Projection, TowerSpec
from lraee.towers.wrappers import unwrapped


def read_tower(tower: nn.Module) -> TowerSpec:
    """The spec of a vision model, alone or with its projection, float or accelerated."""
    at, vision = vision_of(tower)
    (H, W), (height, width) = vision.image_size, vision.patch_size
    patches = (H // height) * (W // width)
    D, tokens = int(vision.config.hidden_size), patches + vision.prefix
    channels = int(getattr(vision.config, "num_channels", 3))
    projection = None
    if at:
        weight = cast(Any, tower).visual_projection.weight
        projection = Projection("visual_projection.weight", False, tuple(weight.shape))
    pooling, size = _pooling(vision, tokens, D)
    family = _family_of_class(tower)
    return TowerSpec(
        family=family.name,
        float_class=library_class(tower),
        blocks=at + vision.blocks,
        patch_embedding=PatchEmbedding(
            at + vision.patch_embedding, (height, width), patches * D * channels * height * width
        ),
        pooling=pooling,
        projection=projection,
        image_size=(H, W),
        tokens=tokens,
        width=D,
        prefix_tokens=vision.prefix,
        final_norm=at + vision.layout.norm,
        embedding_size=size if projection is None else projection.shape[0],
        adapters=tuple(_adapters(at, vision)),
    )


def _pooling(vision: Vision, tokens: int, D: int) -> tuple[Pooling, int | None]:
    """Pooling, and how many numbers come out of it; None where it is all tokens."""
    if vision.layout.pooling in ("class", "twice"):
        return Pooling("class"), D
    if vision.head is None:
        return Pooling("none", vectors=tokens), None
    head = vision.module.get_submodule(vision.head)
    if vision.layout.pooling == "pooler":
        weight = cast(Any, head).dense.weight
        return Pooling("class", macs=weight.numel()), int(weight.shape[0])
    weights = sum(p.numel() for p in head.parameters() if p.dim() == 2)
    of_tokens = 2 * D * D  # keys and values
    macs = weights - of_tokens + tokens * of_tokens + 2 * tokens * D
    return Pooling("map", macs=macs), D


def _adapters(at: str, vision: Vision) -> Iterator[tuple[str, type[Adapter]]]:
    if vision.is_naflex:
        yield f"{at}embeddings", NaflexEmbeddings
    if vision.head is not None:
        is_aimv2 = "Aimv2VisionModel" in class_names(vision.module)
        kind = Aimv2Map if is_aimv2 else SiglipMap
        yield at + vision.head, ClassTokenPooler if vision.layout.pooling == "pooler" else kind
    if at:
        yield at.rstrip("."), VisionModel
        yield "visual_projection", PassingProjection


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [B, E] of images [B, 3, H, W]: projected, pooled, or all tokens [B, L, D]."""
    tower = find_tower(model)
    at, vision = vision_of(tower)
    given = {"pixel_values": images}
    if vision.is_naflex:
        given = patches_of(images, vision.patch_size)
        if "Siglip2VisionTransformer" in class_names(vision.module):
            given["attention_mask"] = given.pop("pixel_attention_mask")
    if not at or is_a(tower, PROJECTED):
        output = tower(**given)
    else:
        output = cast(Any, tower).get_image_features(**given)
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output", "last_hidden_state"):
        result = getattr(output, name, None)
        if result is not None:
            return cast(Tensor, result)
    raise TypeError(f"{type(tower).__name__}: output must hold embeddings, got {list(output)}")


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit embeddings [n, E] of token ids [n, T] by a model of both; a tower that pads its texts
    with a token that is to be masked masks it, others are given all of them as valid.
    """
    known = text_encoder.encode(model, tokens)
    if known is not None:
        return F.normalize(known, dim=-1)
    owners = (unwrapped(model), find_tower(model))
    owner = next((each for each in owners if hasattr(each, "get_text_features")), None)
    if owner is None:
        raise TypeError(
            f"set_classes: model must have get_text_features, got {type(model).__name__}; give"
            " text features instead of names"
        )
    output = cast(Any, owner).get_text_features(input_ids=tokens)
    pooled = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(pooled, dim=-1)


def refusal(tower: nn.Module) -> str | None:
    """Why a model of transformers of another class is not run in int8."""
    if not any(True for _ in class_names(tower)):
        return None
    return f"of transformers' classes INT8 knows {', '.join([*DUAL, *PROJECTED, *LAYOUTS])}"


def _family(
    name: str, is_tower: Callable[[nn.Module], bool], adapter: type[RowwiseTower]
) -> Family:
    return Family(
        name=name,
        paths=PATHS,
        is_tower=is_tower,
        read_tower=read_tower,
        read_block=read_block,
        embed=embed,
        adapter=adapter,
        encode_image=encode_image,
        encode_text=encode_text,
        refusal=refusal,
        settle=forget_recorders,
    )


VISION = _family(
    "transformers vision model (CLIP, SigLIP, ViT, DeiT, DINOv2, DINOv3, BLIP, AIMv2)",
    lambda module: layout_of(module) is not None,
    VisionTower,
)
PROJECTED_MODEL = _family(
    "transformers CLIPVisionModelWithProjection",
    lambda module: is_a(module, PROJECTED),
    ProjectedTower,
)
DUAL_MODEL = _family(
    "transformers CLIPModel and its like", lambda module: is_a(module, DUAL), DualTower
)
FAMILIES = (DUAL_MODEL, PROJECTED_MODEL, VISION)


def _family_of_class(tower: nn.Module) -> Family:
    return next(family for family in FAMILIES if family.is_tower(tower))
