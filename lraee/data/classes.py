"""Class names: read from a JSON, turned into text features by prompts."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import open_clip
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lraee.data.sources import DataError, first_line

_MAX_CLASSES_BYTES = 64 << 20


@dataclass(frozen=True)
class Classes:
    """Label i is the folder name `wnids[i]` and, in prompts, the word `names[i]`."""

    wnids: tuple[str, ...]
    names: tuple[str, ...]


def read_classes(path: str | os.PathLike[str]) -> Classes:
    """Read `{"wnids": [...], "names": [...]}`: folder names and prompt words, in label order.

    Raises: DataError, one line, on an unreadable file, other keys, or lists that do not fit.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_CLASSES_BYTES:
            raise DataError(f"data: {path} must be at most {_MAX_CLASSES_BYTES} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise DataError(f"data: {path} must be a readable JSON: {first_line(error)}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"data: {path} must be JSON: {first_line(error)}") from error
    if not isinstance(found, dict) or not {"wnids", "names"} <= found.keys():
        got = (
            ", ".join(map(str, list(found)[:5]))
            if isinstance(found, dict)
            else type(found).__name__
        )
        raise DataError(f'data: {path} must have the keys "wnids" and "names", got {got}')
    wnids, names = found["wnids"], found["names"]
    for key, rows in (("wnids", wnids), ("names", names)):
        if not isinstance(rows, list) or not rows or not all(_is_word(row) for row in rows):
            raise DataError(f'data: {path} must have a list of words under "{key}"')
    if len(wnids) != len(names):
        raise DataError(
            f"data: {path} must name each class once, got {len(wnids)} wnids, {len(names)} names"
        )
    if len(set(wnids)) != len(wnids):
        raise DataError(f"data: {path} must not repeat a wnid")
    return Classes(tuple(wnids), tuple(names))


# The zero-shot figures of lraee-tiny use every tenth of CLIP's 80 templates: 8 of them.
Template = Callable[[str], str]
TEMPLATES: tuple[Template, ...] = tuple(open_clip.OPENAI_IMAGENET_TEMPLATES[::10])


def templates(count: int) -> tuple[Template, ...]:
    """So many of CLIP's 80 templates, spread evenly; 8 give TEMPLATES.

    Raises: DataError unless 1 <= count <= 80.
    """
    every = open_clip.OPENAI_IMAGENET_TEMPLATES
    if not 1 <= count <= len(every):
        raise DataError(f"data: templates must be 1 to {len(every)}, got {count}")
    return tuple(every[i * len(every) // count] for i in range(count))


class _Clip(Protocol):
    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor: ...


@torch.inference_mode()
def class_features(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    names: Sequence[str],
    *,
    templates: Sequence[Template] = TEMPLATES,
    batch: int = 32,
    progress: bool = True,
) -> Tensor:
    """Text features of class names: mean over templates of unit embeddings, a unit row again.

    Returns: float32 [K, E] on the model's device.
    """
    clip = cast(_Clip, model)
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    for start in tqdm(range(0, len(names), batch), desc="texts", disable=not progress, leave=False):
        chunk = names[start : start + batch]
        texts = tokenizer([template(name) for name in chunk for template in templates]).to(device)
        features = clip.encode_text(texts, normalize=True).float()
        rows.append(features.reshape(len(chunk), len(templates), -1).mean(dim=1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def _is_word(row: object) -> bool:
    return isinstance(row, str) and bool(row.strip())
