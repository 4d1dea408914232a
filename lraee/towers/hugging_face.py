"""transformers' vision models: how they are found, read and run, in its versions 4 and 5.

The library is never imported here (see hugging_face_layouts). An accelerated model runs its own
class's forward over int8 layers, so that outputs, recorded hidden states and options are what they
were; with early exits images go through the runner instead.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.exits.router import EAGER
from lraee.layers.modules import Adapter
from lraee.towers.families import Family, find_tower
from lraee.towers.hugging_face_blocks import read_block
from lraee.towers.hugging_face_layouts import (
    DUAL,
    LAYOUTS,
    PATHS,
    PROJECTED,
    Vision,
    class_names,
    float_class,
    is_a,
    layout_of,
    vision_path,
)  # fmt: skip
from lraee.towers.hugging_face_poolers import (
    Aimv2Map,
    ClassTokenPooler,
    NaflexEmbeddings,
    SiglipMap,
)
from lraee.towers.runner import RowwiseTower, exits_of
from lraee.towers.spec import PatchEmbedding, Pooling, Projection, TowerSpec

_CAPTURING = "transformers.utils.output_capturing"


def _vision(tower: nn.Module) -> tuple[str, Vision]:
    """Path prefix of the vision model in a tower, "" or with a dot at its end, and the model."""
    if layout_of(tower) is not None:
        return "", Vision(tower)
    path = cast(str, vision_path(tower))
    return f"{path}.", Vision(tower.get_submodule(path))


# The spec


def read_tower(tower: nn.Module) -> TowerSpec:
    """The spec of a vision model, alone or with its projection, float or accelerated."""
    at, vision = _vision(tower)
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
        float_class=float_class(tower),
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


# How it runs


def embed(tower: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Images [B, 3, H, W] -> tokens [B, L, D] before the first layer.

    Args:
      tower: of this family.
      x: images; to NaFlex all of one size, without padding.
      options: of the embeddings, such as interpolate_pos_encoding.
    """
    _, vision = _vision(tower)
    if vision.is_naflex:
        given = patches_of(x, vision.patch_size)
        z = vision.embeddings(given["pixel_values"], given["spatial_shapes"])
    else:
        z = vision.embeddings(x, **options)
    return vision.before_blocks(z)


def patches_of(images: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Images [B, C, H, W] as NaFlex takes them: pixel_values, pixel_attention_mask and
    spatial_shapes, without padding.
    """
    B, C, H, W = images.shape
    height, width = size
    rows, columns = H // height, W // width
    whole = images[:, :, : rows * height, : columns * width]
    patches = whole.reshape(B, C, rows, height, columns, width).permute(0, 2, 4, 3, 5, 1)
    N = rows * columns
    return {
        "pixel_values": patches.reshape(B, N, -1),
        "pixel_attention_mask": torch.ones(B, N, dtype=torch.int64, device=images.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * B, device=images.device),
    }


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [B, E] of images [B, 3, H, W]: projected, pooled, or all tokens [B, L, D]."""
    tower = find_tower(model)
    at, vision = _vision(tower)
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


@dataclass
class _Route:
    """A call of a tower with a projection, whose vision model is to give projected embeddings."""

    tower: RowwiseTower
    vision: nn.Module
    embeddings: Tensor | None = None


_route: ContextVar[_Route | None] = ContextVar("lraee_route", default=None)


@contextmanager
def _routed(tower: RowwiseTower) -> Iterator[None]:
    token = _route.set(_Route(tower, _vision(tower)[1].module))
    try:
        yield
    finally:
        _route.reset(token)


class PassingProjection(Adapter):
    """The projection, which leaves alone what left the vision model early as an embedding."""

    adapter_prefix = "Rowwise"

    def forward(self, input: Tensor) -> Tensor:
        """Pooled [B, D] -> [B, E]."""
        route = _route.get()
        if route is not None and input is route.embeddings:
            return input
        return cast(Tensor, super().forward(input))


class VisionModel(Adapter):
    """Runs an accelerated vision model."""

    adapter_prefix = "Rowwise"

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the library's.

        Raises: NotImplementedError where attention weights are wanted, or tokens of images that
          leave early; ValueError on images or a mask of a wrong shape.
        """
        _require_no_attentions(self, named)
        x = args[0] if args else named.get("pixel_values")
        vision = Vision(self)
        _require_images(vision, x, args, named)
        _register_recorders(self)
        tower = self._router_owner()
        if tower is not None and tower._active_router(cast(Tensor, x)) is not None:
            return _leave_early(tower, vision, args, named)
        return float_class(self).forward(self, *args, **named)

    def _router_owner(self) -> RowwiseTower | None:
        """The tower whose exits this call goes by, if it has some."""
        route = _route.get()
        if route is not None and route.vision is self:
            return route.tower
        return self if isinstance(self, RowwiseTower) and exits_of(self) is not None else None


def _leave_early(
    tower: RowwiseTower, vision: Vision, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """What a vision model returns where images leave early: no tokens, but embeddings."""
    names = _parameter_names(vision.module)
    given = {**dict(zip(names, args, strict=False)), **named}
    x, return_dict = given.pop("pixel_values"), given.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(vision.config, "return_dict", True)
    if vision.is_naflex:
        embeddings = _route_naflex(tower, vision, x, given.pop("spatial_shapes"))
        given = {name: value for name, value in given.items() if "attention_mask" not in name}
        options: dict[str, Any] = {}
    else:
        options = {k: given.pop(k) for k in ("interpolate_pos_encoding",) if given.get(k)}
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"exits: {name} must be None or False, got {value!r:.40}: an image that leaves"
                " early has no tokens of the last block; use lraee.full_depth"
            )
    if not vision.is_naflex:
        embeddings = _route_images(tower, x, options)
    route = _route.get()
    if route is not None and route.tower is tower:
        route.embeddings = embeddings
    if not return_dict:
        return None, embeddings
    outputs = cast(Any, sys.modules["transformers.modeling_outputs"])
    return outputs.BaseModelOutputWithPooling(pooler_output=embeddings)


def _route_images(tower: RowwiseTower, x: Tensor, options: dict[str, Any]) -> Tensor:
    x = x.to(next(tower.parameters()).dtype)
    if not options:
        return tower.embed_images(x)
    router = exits_of(tower)
    assert router is not None
    run = partial(embed, tower, **options)
    blocks = tower._blocks(tower._rope(x))
    return cast(Tensor, router(blocks, x, tower._finish, embed=run, run=EAGER))


def _route_naflex(tower: RowwiseTower, vision: Vision, x: Tensor, shapes: Tensor) -> Tensor:
    """Images of one number of tokens at a time, without their padding."""
    router = exits_of(tower)
    assert router is not None
    counts, blocks = shapes.prod(1), tower._blocks(None)
    z = vision.before_blocks(vision.embeddings(x, shapes))
    groups = [(counts == n, n) for n in counts.unique().tolist()]
    parts = [
        (images, router(blocks, z[images, :n].contiguous(), tower._finish,
                        embed=lambda tokens: tokens, run=EAGER))
        for images, n in groups
    ]  # fmt: skip
    result = z.new_zeros(len(z), parts[0][1].shape[1])
    for images, rows in parts:
        result[images] = rows
    return result


class HuggingFaceTower(RowwiseTower):
    """What the towers of this family share."""

    def _rope(self, x: Tensor) -> Any:
        vision = _vision(self)[1].module
        rope = getattr(vision, "rope_embeddings", None)
        return None if rope is None else rope(x)

    def _is_rope_lasting(self) -> bool:
        return not hasattr(_vision(self)[1].module, "rope_embeddings")

    def _finish(self, z: Tensor) -> Tensor:
        return self._project(_vision(self)[1].pool(z))

    def _as_float(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """A method of the library's class; its vision model goes by the exits of this tower."""
        if exits_of(self) is None:
            return method(self, *args, **named)
        with _routed(self):
            return method(self, *args, **named)


class VisionTower(VisionModel, HuggingFaceTower):
    """Runs an accelerated vision model that is the whole tower."""


class ProjectedTower(HuggingFaceTower):
    """Runs an accelerated vision model with its projection."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the library's."""
        return self._as_float(float_class(self).forward, *args, **named)


class DualTower(ProjectedTower):
    """Runs an accelerated model of images and texts."""

    def get_image_features(self, *args: Any, **named: Any) -> Any:
        """As the library's."""
        return self._as_float(cast(Any, float_class(self)).get_image_features, *args, **named)


# What a call must be


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    code = _unwrapped(float_class(module).forward).__code__
    return cast(tuple[str, ...], code.co_varnames[1 : code.co_argcount])


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _require_no_attentions(module: nn.Module, named: dict[str, Any]) -> None:
    wanted = named.get("output_attentions")
    if wanted is None:
        wanted = getattr(module.config, "output_attentions", False)
    if wanted:
        raise NotImplementedError(
            f"{float_class(module).__name__}: output_attentions must be False, got True: INT8"
            " attention keeps no weights; use the float model (lraee.restore)"
        )


def _require_images(vision: Vision, x: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raises TypeError or ValueError, one line, unless the images are such as the model takes."""
    owner = float_class(vision.module).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: pixel_values must be a tensor, got {type(x).__name__}")
    if vision.is_naflex:
        names = _parameter_names(vision.module)
        given = {**dict(zip(names, args, strict=False)), **named}
        mask = given.get("pixel_attention_mask", given.get("attention_mask"))
        _require_naflex(owner, vision, x, mask, given.get("spatial_shapes"))
        return
    names_and_size = f"[B, C, {vision.image_size[0]}, {vision.image_size[1]}]"
    if x.dim() != 4:
        raise ValueError(f"{owner}: pixel_values must be {names_and_size}, got {list(x.shape)}")
    default = "CLIPSegVisionModel" in class_names(vision.module)
    is_interpolated = named.get("interpolate_pos_encoding", len(args) > 1 or default)
    if vision.layout.takes_any_size or is_interpolated or x.shape[2:] == vision.image_size:
        return
    is_aimv2 = "Aimv2VisionModel" in class_names(vision.module)
    if is_aimv2 and vision.config.is_native:
        return
    advice = "" if is_aimv2 else ", or call with interpolate_pos_encoding=True"
    raise ValueError(
        f"{owner}: pixel_values must be {names_and_size}, got {list(x.shape)}; resize them{advice}"
    )


def _require_naflex(owner: str, vision: Vision, x: Tensor, mask: Any, shapes: Any) -> None:
    K = vision.patch_size[0] * vision.patch_size[1] * int(vision.config.num_channels)
    if x.dim() != 3 or x.shape[2] != K:
        raise ValueError(
            f"{owner}: pixel_values must be patches [B, N, {K}], got {list(x.shape)}; take them"
            " from the model's processor"
        )
    B, N = x.shape[:2]
    if not isinstance(shapes, Tensor) or tuple(shapes.shape) != (B, 2):
        got = list(shapes.shape) if isinstance(shapes, Tensor) else type(shapes).__name__
        raise ValueError(
            f"{owner}: spatial_shapes must be rows and columns of each image, [{B}, 2], got {got}"
        )
    counts = shapes.prod(1)
    if bool((shapes < 1).any()) or bool((counts > N).any()):
        raise ValueError(
            f"{owner}: spatial_shapes must be at least 1 and hold at most N = {N} patches, got"
            f" {shapes.tolist()[:4]}"
        )
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (B, N):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{owner}: pixel_attention_mask must be [B, N] = [{B}, {N}], got {got}")
    if not mask.bool().equal(torch.arange(N, device=mask.device) < counts[:, None]):
        raise ValueError(
            f"{owner}: pixel_attention_mask must show the first rows * columns patches of each"
            f" image, as spatial_shapes says, got {mask.sum(1).tolist()[:4]} of"
            f" {counts.tolist()[:4]}"
        )


# What the library keeps about its models


def _register_recorders(module: nn.Module) -> None:
    """Lets hidden states be recorded: the library looks up what to record by the class's name."""
    for name in (_CAPTURING, "transformers.utils.generic"):
        registry = getattr(sys.modules.get(name), "_CAN_RECORD_REGISTRY", None)
        if registry is not None:
            for part in module.modules():
                known = getattr(part, "_can_record_outputs", None)
                if known and str(type(part)) not in registry:
                    dict.__setitem__(registry, str(type(part)), known)


def forget_recorders(model: nn.Module) -> None:
    """Takes off the hooks by which version 5 records outputs; it sets them anew when asked to.

    They stand on the modules of the first such call, and among these are the attentions of layers
    that are other modules now.
    """
    marked = [m for m in model.modules() if m.__dict__.pop(_MARK, False)]
    for module in {inner for m in marked for inner in m.modules()}:
        hooks = module._forward_hooks
        for key in [k for k, hook in hooks.items() if hook.__module__ == _CAPTURING]:
            del hooks[key]


_MARK = "_output_capturing_hooks_installed"


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
