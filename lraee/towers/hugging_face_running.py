"""How accelerated vision models of transformers run.

A model runs its own class's forward over int8 layers, so that outputs, recorded hidden states and
options are what they were; with early exits images go through the runner instead.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import Rowwise
from lraee.layers.modules import library_class
from lraee.towers.executor import EagerExecutor
from lraee.towers.hugging_face_checks import (
    parameter_names,
    register_recorders,
    require_images,
    require_no_attentions,
    require_options,
)
from lraee.towers.hugging_face_layouts import Vision, layout_of, vision_path
from lraee.towers.runner import RowwiseTower, exits_of


def vision_of(tower: nn.Module) -> tuple[str, Vision]:
    """Path prefix of the vision model in a tower, "" or with a dot at its end, and the model."""
    if layout_of(tower) is not None:
        return "", Vision(tower)
    path = cast(str, vision_path(tower))
    return f"{path}.", Vision(tower.get_submodule(path))


def embed(tower: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Images [B, 3, H, W] -> tokens [B, L, D] before the first layer.

    Args:
      tower: of this family.
      x: images; to NaFlex all of one size, without padding.
      options: of the embeddings, such as interpolate_pos_encoding.
    """
    _, vision = vision_of(tower)
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


@dataclass
class _Route:
    """A call of a tower with a projection, whose vision model is to give projected embeddings."""

    tower: RowwiseTower
    vision: nn.Module
    embeddings: Tensor | None = None


_route: ContextVar[_Route | None] = ContextVar("lraee_route", default=None)


@contextmanager
def _routed(tower: RowwiseTower) -> Iterator[None]:
    token = _route.set(_Route(tower, vision_of(tower)[1].module))
    try:
        yield
    finally:
        _route.reset(token)


class PassingProjection(Rowwise):
    """The projection, which leaves alone what left the vision model early as an embedding."""

    def forward(self, input: Tensor) -> Tensor:
        """Pooled [B, D] -> [B, E]."""
        route = _route.get()
        if route is not None and input is route.embeddings:
            return input
        return cast(Tensor, super().forward(input))


class VisionModel(Rowwise):
    """Runs an accelerated vision model."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """As the library's.

        Raises: NotImplementedError where attention weights are wanted, or tokens of images that
          leave early; ValueError on images or a mask of a wrong shape.
        """
        require_options(self, named)
        require_no_attentions(self, named)
        x = args[0] if args else named.get("pixel_values")
        vision = Vision(self)
        require_images(vision, x, args, named)
        register_recorders(self)
        tower = self._router_owner()
        if tower is not None and tower._active_router(cast(Tensor, x)) is not None:
            return _leave_early(tower, vision, args, named)
        return library_class(self).forward(self, *args, **named)

    def _router_owner(self) -> RowwiseTower | None:
        """The tower whose exits this call goes by, if it has some."""
        route = _route.get()
        if route is not None and route.vision is self:
            return route.tower
        return self if isinstance(self, RowwiseTower) and exits_of(self) is not None else None


@cache
def _output_class() -> Any:
    """The library's output without tokens, whose second item is the embedding all the same."""
    base: Any = cast(Any, sys.modules["transformers.modeling_outputs"]).BaseModelOutputWithPooling

    class EarlyOutput(base):  # type: ignore[misc]
        def to_tuple(self) -> tuple[Any, ...]:
            return self.last_hidden_state, self.pooler_output

    return dataclass(EarlyOutput)


def _leave_early(
    tower: RowwiseTower, vision: Vision, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """What a vision model returns where images leave early: no tokens, but embeddings."""
    names = parameter_names(vision.module)
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
    return _output_class()(pooler_output=embeddings)


class _Call(threading.local):
    """What a call of this thread gives to the steps of its tower.

    Args:
      options: of the embeddings.
      has_tokens: tokens are given in place of images.
      rope: rotary positions for images of this size.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.has_tokens = False
        self.rope: Any = None


_call = _Call()


def _run(tower: RowwiseTower, x: Tensor, **given: Any) -> Tensor:
    """Images or tokens -> embeddings, by the exits of the tower."""
    _call.__dict__.update(given)
    try:
        return tower._run(exits_of(tower), x, EagerExecutor(tower))
    finally:
        _call.__init__()  # type: ignore[misc]


def _route_images(tower: RowwiseTower, x: Tensor, options: dict[str, Any]) -> Tensor:
    x = x.to(next(tower.parameters()).dtype)
    return _run(tower, x, options=options) if options else tower.embed_images(x)


def _route_naflex(tower: RowwiseTower, vision: Vision, x: Tensor, shapes: Tensor) -> Tensor:
    """Images of one number of tokens at a time, without their padding."""
    counts = shapes.prod(1)
    z = vision.before_blocks(vision.embeddings(x, shapes))
    groups = [(counts == n, n) for n in sorted(set(counts.tolist()))]
    parts = [
        (images, _run(tower, z[images, :n].contiguous(), has_tokens=True)) for images, n in groups
    ]
    result = z.new_zeros(len(z), parts[0][1].shape[1])
    for images, rows in parts:
        result[images] = rows
    return result


class HuggingFaceTower(RowwiseTower):
    """What the towers of this family share."""

    def _embeds(self, x: Tensor) -> Tensor:
        if _call.has_tokens:
            return x
        rope = getattr(vision_of(self)[1].module, "rope_embeddings", None)
        _call.rope = None if rope is None else rope(x)
        return embed(self, x, **_call.options)

    def _rope(self) -> Any:
        return _call.rope

    def _is_rope_lasting(self) -> bool:
        return not hasattr(vision_of(self)[1].module, "rope_embeddings")

    def _finish(self, z: Tensor) -> Tensor:
        return self._project(vision_of(self)[1].pool(z))

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
        return self._as_float(library_class(self).forward, *args, **named)


class DualTower(ProjectedTower):
    """Runs an accelerated model of images and texts."""

    def get_image_features(self, *args: Any, **named: Any) -> Any:
        """As the library's."""
        return self._as_float(cast(Any, library_class(self)).get_image_features, *args, **named)
