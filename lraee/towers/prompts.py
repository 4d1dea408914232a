"""Prompts: class names to text features."""

from collections.abc import Callable, Sequence

import open_clip
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lraee.data.sources import DataError
from lraee.towers.families import device_of, encode_text

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
    device = device_of(model)
    rows: list[Tensor] = []
    for start in tqdm(range(0, len(names), batch), desc="texts", disable=not progress, leave=False):
        chunk = names[start : start + batch]
        texts = tokenizer([template(name) for name in chunk for template in templates]).to(device)
        features = encode_text(model, texts).float()
        rows.append(features.reshape(len(chunk), len(templates), -1).mean(dim=1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)
