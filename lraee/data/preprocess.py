"""A model's own preprocessing, from a picture's bytes to its tensor, on one thread.

The rules are read from the model's transform (torchvision's, as open_clip builds it) or from the
settings of a transformers image processor; a step that is not known is refused by its name.

The image leaves as normalised float32, though levels of uint8 would take a quarter of the bytes,
with the normalisation folded into the patch embedding: `python -m bench.preprocess levels` measures
what that would save.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lraee.data import decoding
from lraee.data.decoding import Decoded, Limits
from lraee.data.resize import Filter, Table, normalization_table, resize

Sizing = Literal["none", "shortest", "exact", "keep_ratio"]
Size = tuple[int, int]

# Values of PIL.Image.Resampling, which transformers stores as numbers
_FILTER_NUMBERS: dict[int, Filter] = {
    1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Preprocess:
    """bytes -> image of the model: decode, resize, crop, normalise, in the bits of its transform.

    Args:
      sizing: how `size` gives the resized image: "shortest" side (of torchvision), "exact" height
        and width, or "keep_ratio" (of open_clip; `longest` 0 fits the shorter side, 1 the longer).
      size: height and width; of "shortest" the first.
      filter: Pillow's filter, with antialiasing.
      crop: height and width cut from the centre, padded with `fill` where the image is smaller.
      table: float32 [3, 256], value of each channel for each of its 256 levels.
      mode: "exact" gives the bits of the transform; "fast" lets JPEG be scaled while it is decoded,
        to not less than twice the size.
      limits: what decoding refuses.
    Where a picture has transparency, 16 bits, an orientation or a palette, the result is that of
    the transform on the decoded RGB picture, which a transform alone would get wrong.
    """

    sizing: Sizing
    size: Size
    filter: Filter
    crop: Size | None
    table: Table = field(repr=False)
    longest: float = 0.0
    fill: int = 0
    crop_rounding: Literal["half_even", "down"] = "half_even"
    mode: decoding.Mode = "exact"
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Refuse what no image could go through; one line, ValueError."""
        for name, value, allowed in (
            ("sizing", self.sizing, get_args(Sizing)),
            ("filter", self.filter, get_args(Filter)),
            ("mode", self.mode, get_args(decoding.Mode)),
        ):
            if value not in allowed:
                raise ValueError(f"preprocess: {name} must be one of {allowed}, got {value!r}")
        if min(*self.size, *(self.crop or self.size)) < 1:
            raise ValueError(f"preprocess: size must be positive, got {self.size}, {self.crop}")

    def __call__(self, data: bytes) -> Tensor:
        """The image of one file; raises DecodeError with the reason it cannot be used."""
        return self.with_size(data)[0]

    def with_size(self, data: bytes) -> tuple[Tensor, Size]:
        """The image of one file, and the upright picture's height and width."""
        decoded = self.decode(data)
        return self.image(decoded), (decoded.height, decoded.width)

    def decode(self, data: bytes) -> Decoded:
        """Decode as this preprocessing needs it; the pixels may be scaled in mode "fast"."""
        # Of "keep_ratio" the shorter side becomes the larger of both sizes at most.
        target = self.size if self.sizing == "exact" else max(self.size)
        return decoding.decode(
            data,
            limits=self.limits,
            target=None if self.sizing == "none" else target,
            mode=self.mode,
        )

    def image(self, decoded: Decoded) -> Tensor:
        """Resize, crop and normalise; sizes follow from the unscaled picture."""
        size = self.resized_size(decoded.height, decoded.width)
        crop, canvas = size if self.crop is None else self.crop, None
        top, left = (self._offset(have, want) for have, want in zip(size, crop, strict=True))
        if size[0] < crop[0] or size[1] < crop[1]:
            canvas = self._canvas(crop)
        inner = min(size[0], crop[0]), min(size[1], crop[1])
        pixels = resize(
            decoded.pixels,
            size=size,
            crop=(max(top, 0), max(left, 0), *inner),
            filter=self.filter,
            table=torch.from_numpy(self.table),
        )
        if canvas is None:
            return pixels
        y, x = max(-top, 0), max(-left, 0)
        canvas[:, y : y + inner[0], x : x + inner[1]] = pixels.numpy()
        return torch.from_numpy(canvas)

    def resized_size(self, height: int, width: int) -> Size:
        """Height and width of the resized image of a picture."""
        if self.sizing == "none":
            return height, width
        if self.sizing == "exact":
            return self.size
        if self.sizing == "shortest":
            side = self.size[0]
            if width <= height:
                return int(side * height / width), side
            return side, int(side * width / height)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) * self.longest + min(ratios) * (1.0 - self.longest)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _offset(self, have: int, want: int) -> int:
        """First kept row of an axis; negative: rows of padding before it."""
        if have < want:
            # transformers puts the larger half before, torchvision behind
            return -((want - have + (self.crop_rounding == "down")) // 2)
        gap = have - want
        return gap // 2 if self.crop_rounding == "down" else int(round(gap / 2.0))

    def _canvas(self, crop: Size) -> np.ndarray[Any, Any]:
        return np.repeat(self.table[:, self.fill], crop[0] * crop[1]).reshape(3, *crop)

    def with_options(self, **options: Any) -> "Preprocess":
        """The same with another mode, table or limits."""
        return replace(self, **options)


def from_transform(transform: Callable[..., Any], **options: Any) -> Preprocess:
    """Preprocess of a torchvision Compose, as open_clip builds it for inference.

    Args:
      transform: Compose of at most one resize, then a centre crop, conversions, Normalize.
      options: mode, limits.
    Raises: ValueError that names a step which is not known, or is at another place.
    """
    steps = list(getattr(transform, "transforms", ()))
    if not steps:
        raise ValueError(f"preprocess: transform must be a Compose, got {_name(transform)}")
    rules: dict[str, Any] = {
        "sizing": "none", "size": (1, 1), "filter": "bicubic", "crop": None,
    }  # fmt: skip
    stage = 0
    has_tensor = False
    for step in steps:
        kind = _name(step)
        order, read = _STEPS.get(kind, (0, None))
        if read is None:
            known = ", ".join(sorted(_STEPS))
            raise ValueError(f"preprocess: steps must be of {known}; got {kind}")
        if order < stage or (order == stage and order != 3):
            raise ValueError(
                f"preprocess: steps must be resize, crop, tensor, normalize; {kind} is late"
            )
        stage = order
        has_tensor = has_tensor or order == 4
        rules |= read(step)
    if not has_tensor or "table" not in rules:
        raise ValueError("preprocess: transform must end with ToTensor and Normalize")
    return Preprocess(**rules, **options)


def _name(step: object) -> str:
    return getattr(step, "__name__", type(step).__name__)


def _filter_of(step: Any) -> Filter:
    name = str(getattr(step.interpolation, "value", step.interpolation))
    if name not in get_args(Filter):
        raise ValueError(f"preprocess: interpolation must be one of {get_args(Filter)}, got {name}")
    return name  # type: ignore[return-value]


def _pair(size: int | Sequence[int]) -> Size:
    sides = (size,) if isinstance(size, int) else tuple(size)
    return int(sides[0]), int(sides[-1])


def _resize(step: Any) -> dict[str, Any]:
    if getattr(step, "max_size", None) is not None:
        raise ValueError(f"preprocess: Resize must have no max_size, got {step.max_size}")
    is_shortest = isinstance(step.size, int) or len(step.size) == 1
    sizing = "shortest" if is_shortest else "exact"
    return {"sizing": sizing, "size": _pair(step.size), "filter": _filter_of(step)}


def _resize_keep_ratio(step: Any) -> dict[str, Any]:
    if getattr(step, "random_scale_prob", 0) or getattr(step, "random_aspect_prob", 0):
        raise ValueError(
            "preprocess: ResizeKeepRatio must not be random; use the inference transform"
        )
    rules = {"sizing": "keep_ratio", "longest": float(step.longest)}
    return rules | {"size": _pair(step.size), "filter": _filter_of(step)}


def _center_crop(step: Any) -> dict[str, Any]:
    fill = getattr(step, "fill", 0)
    if not isinstance(fill, int) or not 0 <= fill <= 255:
        raise ValueError(f"preprocess: fill must be one level of 0 to 255, got {fill}")
    return {"crop": _pair(step.size), "fill": fill}


def _normalize(step: Any) -> dict[str, Any]:
    return {"table": normalization_table(tuple(step.mean), tuple(step.std))}


def _nothing(step: Any) -> dict[str, Any]:
    return {}


_STEPS: dict[str, tuple[int, Callable[[Any], dict[str, Any]]]] = {
    "Resize": (1, _resize),
    "ResizeKeepRatio": (1, _resize_keep_ratio),
    "CenterCrop": (2, _center_crop),
    "CenterCropOrPad": (2, _center_crop),
    "MaybeConvertMode": (3, _nothing),
    "_convert_to_rgb": (3, _nothing),
    "ToTensor": (4, _nothing),
    "MaybeToTensor": (4, _nothing),
    "Normalize": (5, _normalize),
}
"""Steps by class or function name: their place in the order, and how their rules are read."""


def from_settings(settings: Mapping[str, Any], **options: Any) -> Preprocess:
    """Preprocess of a transformers image processor, of its settings as in preprocessor_config.json.

    Args:
      settings: of CLIP, SigLIP, BiT or ViT processors (the Pillow ones; those of torchvision
        round otherwise): do_resize, size, resample, do_center_crop, crop_size, do_rescale,
        rescale_factor, do_normalize, image_mean, image_std.
      options: mode, limits.
    Raises: ValueError that names a step or processor which is not known.
    """
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "CLIP")))
    family = next(
        (name for name in ("CLIP", "Siglip", "Bit", "ViT") if kind.startswith(name)), None
    )
    if family is None or "Siglip2" in kind:
        raise ValueError(f"preprocess: processor must be CLIP, Siglip, Bit or ViT, got {kind}")
    for name in _unknown_steps(settings):
        raise ValueError(f"preprocess: processor must have no step {name}")
    is_square = family in ("Siglip", "ViT")
    rules: dict[str, Any] = {"sizing": "none", "size": (1, 1), "filter": "bicubic", "crop": None}
    if settings.get("do_resize", True):
        number = int(settings.get("resample", 2 if family == "ViT" else 3))
        if number not in _FILTER_NUMBERS:
            raise ValueError(f"preprocess: resample must be 1 to 5, got {number}")
        sizing, size = _size_of(settings.get("size", 224), is_square)
        rules |= {"sizing": sizing, "size": size, "filter": _FILTER_NUMBERS[number]}
    if settings.get("do_center_crop", not is_square):
        rules["crop"] = _size_of(settings.get("crop_size", 224), True)[1]
    return Preprocess(
        **rules, crop_rounding="down", table=_transformers_table(settings, family), **options
    )


def _unknown_steps(settings: Mapping[str, Any]) -> Iterator[str]:
    known = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
    yield from (
        name for name, value in settings.items() if name.startswith("do_") and value is True
        and name not in known
    )  # fmt: skip


def _size_of(size: Any, is_square: bool) -> tuple[Sizing, Size]:
    if isinstance(size, int):
        return ("exact" if is_square else "shortest"), (size, size)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return "shortest", _pair(int(size["shortest_edge"]))
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return "exact", (int(size["height"]), int(size["width"]))
    raise ValueError(f"preprocess: size must have shortest_edge or height and width, got {size}")


def _transformers_table(settings: Mapping[str, Any], family: str) -> Table:
    """table[c, v] = (float32(v * rescale_factor) - mean[c]) / std[c], as transformers rounds."""
    levels: Table = np.arange(256, dtype=np.float32)
    if settings.get("do_rescale", True):
        factor = float(settings.get("rescale_factor", 1 / 255))
        levels = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
    if not settings.get("do_normalize", True):
        return np.repeat(levels[None], 3, axis=0)
    if "image_mean" not in settings or "image_std" not in settings:
        raise ValueError(f"preprocess: {family} settings must hold image_mean and image_std")
    mean = np.asarray(settings["image_mean"], np.float32)
    std = np.asarray(settings["image_std"], np.float32)
    normalization_table(mean.tolist(), std.tolist())  # checks both
    return (levels - mean[:, None]) / std[:, None]
