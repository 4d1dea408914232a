"""CLIP_benchmark with the model types `lraee` and `lraee-int8-patches`, on any of its data sets.

    python -m lraee.evaluation.clip_benchmark eval --model_type lraee --no_amp \
      --model ViT-B-32 --pretrained openai --dataset wds/FOLDER --dataset_root FOLDER

`--no_amp`, since autocast would compute the text tower in another type. `--pretrained none` for a
model that brings its own weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lraee.model.accelerate import accelerate
from lraee.towers.hub import Preprocess
from lraee.zoo.opening import open_model

Loaded = tuple[nn.Module, Preprocess, Callable[[list[str]], Tensor]]


def load_lraee(
    model_name: str,
    pretrained: str = "none",
    cache_dir: str | None = None,
    device: Any = "cpu",
    *,
    scheme: str = "int8",
) -> Loaded:
    """Model in INT8, transform and tokenizer, as CLIP_benchmark's TYPE2FUNC wants them."""
    opened = open_model(model_name, None if pretrained in ("", "none") else pretrained)
    fast = accelerate(opened.model.to(device), scheme=scheme, inplace=True)
    return fast, opened.preprocess, opened.tokenizer


def register() -> None:
    """Make the model types known to CLIP_benchmark in this process."""
    from clip_benchmark import models

    for scheme, name in (("int8", "lraee"), ("int8-patches", "lraee-int8-patches")):
        models.TYPE2FUNC[name] = partial(load_lraee, scheme=scheme)
        if name not in models.MODEL_TYPES:
            models.MODEL_TYPES.append(name)


if __name__ == "__main__":
    register()
    from clip_benchmark.cli import main

    main()
