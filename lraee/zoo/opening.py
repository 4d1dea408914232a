"""A model by name: from the zoo, or any tag that open_clip can fetch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from torch import Tensor, nn

from lraee import zoo
from lraee.data.sources import first_line
from lraee.towers import hub


class ModelError(ValueError):
    """No such model, or its weights cannot be had; the message is one line."""


@dataclass(frozen=True)
class Opened:
    """A model with what feeds it; `class_names` are the words it was trained on.

    `with_margin` is `preprocess` with what its centre crop cuts off, where there is such a thing.
    """

    title: str
    model: nn.Module
    preprocess: Callable[[Image], Tensor]
    with_margin: Callable[[Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    class_names: tuple[str, ...]


def open_model(name: str, pretrained: str | None = None, *, may_be_random: bool = False) -> Opened:
    """Open a model of the zoo, or one of open_clip with the weights of a tag or file.

    Args:
      name: a zoo name, an open_clip model name, or a folder that bench/train_lraee_tiny.py made:
        NAME.json, named as the folder, and open_clip_model.safetensors.
      pretrained: a tag of that model or a weights file; the zoo's models bring their own.
      may_be_random: without `pretrained`, take random weights (seed 0) and not an error.
    Raises: ModelError, one line, on an unknown name or tag or weights that cannot be fetched.
    """
    if name in zoo.names() and pretrained is None:
        try:
            model, preprocess, tokenizer = zoo.load(name)
        except RuntimeError as error:
            raise ModelError(str(error)) from error
        with_margin = zoo.preprocess_with_margin(name)
        return Opened(name, model, preprocess, with_margin, tokenizer, zoo.class_names(name))
    if Path(name).is_dir() and pretrained is None:
        return _open_folder(Path(name))
    _check_name(name, pretrained, may_be_random)
    try:
        with _quiet():
            opened = hub.create(name, pretrained)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ModelError(
            f"model: {name} {pretrained or ''} cannot be had (no network, no such tag?); "
            f"{', '.join(zoo.names())} needs no download. {first_line(error)}"
        ) from error
    title = f"{name} {pretrained or 'random weights'}"
    return Opened(
        title, opened.model, opened.preprocess, opened.preprocess, opened.tokenizer,
        hub.IMAGENET_CLASS_NAMES,
    )  # fmt: skip


def _open_folder(folder: Path) -> Opened:
    """A model of the zoo's kind: its words, and its resize of 64 px for a crop of 56."""
    name = folder.resolve().name
    config, weights = folder / f"{name}.json", folder / hub.WEIGHTS_NAME
    for path in (config, weights):
        if not path.is_file():
            raise ModelError(f"model: {folder} must hold {path.name}, got no such file")
    hub.add_config(config)
    try:
        with _quiet():
            model = hub.create_model(name, str(weights))
            tokenizer = hub.tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"model: {folder} cannot be read: {first_line(error)}") from error
    crop = hub.config_image_size(name)
    entry = zoo.Entry(sha256="", resize=round(crop * 64 / 56), crop=crop)
    return Opened(
        name, model, entry.preprocess(), entry.preprocess(has_margin=True), tokenizer,
        zoo.class_names("lraee-tiny"),
    )  # fmt: skip


def _check_name(name: str, pretrained: str | None, may_be_random: bool) -> None:
    if ":" in name:  # hf-hub: or local-dir:, which bring their own weights
        return
    if name not in hub.model_names():
        known = ", ".join(zoo.names())
        raise ModelError(f"model: name must be {known} or one of {hub.LIBRARY}'s, got {name!r}")
    if pretrained is None and not may_be_random:
        tags = ", ".join(hub.tags(name)) or "a weights file"
        raise ModelError(f"model: pretrained must be given for {name}, one of: {tags}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's retries and open_clip's root log out of a one-line answer."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", None)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
