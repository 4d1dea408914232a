"""What a call of a transformers vision model must be, and what that library keeps of models."""

import sys
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lraee.layers.modules import library_class
from lraee.towers.hugging_face_layouts import Vision, class_names

_CAPTURING = "transformers.utils.output_capturing"


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the library's forward."""
    code = _unwrapped(library_class(module).forward).__code__
    return cast(tuple[str, ...], code.co_varnames[1 : code.co_argcount])


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


_OPTIONS = frozenset({
    "output_hidden_states", "output_attentions", "return_dict", "interpolate_pos_encoding",
    "use_cache",
})  # fmt: skip
"""What a vision model may be called with besides its own arguments."""


def require_options(module: nn.Module, named: dict[str, Any]) -> None:
    """Raises TypeError on an argument that the model does not know: the library ignores some."""
    known = _OPTIONS.union(parameter_names(module))
    for name, value in named.items():
        if name not in known and value is not None:
            raise TypeError(
                f"{library_class(module).__name__}: arguments must be among"
                f" {', '.join(sorted(known))}, got {name}"
            )


def require_no_attentions(module: nn.Module, named: dict[str, Any]) -> None:
    """Raises NotImplementedError where a call or the config wants attention weights."""
    wanted = named.get("output_attentions")
    if wanted is None:
        wanted = getattr(module.config, "output_attentions", False)
    if wanted:
        raise NotImplementedError(
            f"{library_class(module).__name__}: output_attentions must be False, got True: INT8"
            " attention keeps no weights; use the float model (lraee.restore)"
        )


def require_images(vision: Vision, x: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raises TypeError or ValueError, one line, unless the images are such as the model takes."""
    owner = library_class(vision.module).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: pixel_values must be a tensor, got {type(x).__name__}")
    if vision.is_naflex:
        names = parameter_names(vision.module)
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


def register_recorders(module: nn.Module) -> None:
    """Lets hidden states be recorded: the library looks up what to record by the class's name.

    Once for each module and class of it in this process: to go through all modules takes 0.2 ms,
    2 % of a ViT-B/32 at batch 1.
    """
    if _registered.get(module) is type(module):
        return
    _registered[module] = type(module)
    for name in (_CAPTURING, "transformers.utils.generic"):
        registry = getattr(sys.modules.get(name), "_CAN_RECORD_REGISTRY", None)
        if registry is not None:
            for part in module.modules():
                known = getattr(part, "_can_record_outputs", None)
                if known and str(type(part)) not in registry:
                    dict.__setitem__(registry, str(type(part)), known)


_registered: WeakKeyDictionary[nn.Module, type] = WeakKeyDictionary()


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
