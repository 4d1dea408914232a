"""A model of lraee's for MTEB's image and text tasks.

mteb.evaluate(model_meta("ViT-B-32", "openai"), mteb.get_tasks(modalities=["image"]))
"""

from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from lraee.model.accelerate import accelerate
from lraee.zoo.opening import open_model

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta


def model_meta(name: str, pretrained: str | None = None, *, scheme: str = "int8") -> "ModelMeta":
    """MTEB's ModelMeta of a model that `open_model` opens, in INT8.

    Args:
      name, pretrained: as in `open_model`.
      scheme: as in `accelerate`; part of the model's name in MTEB's results.
    """
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    return ModelMeta(
        loader=partial(_load, name, pretrained, scheme),
        name=f"lraee/{name}-{pretrained}-{scheme}" if pretrained else f"lraee/{name}-{scheme}",
        revision=version("lraee"),
        modalities=["image", "text"],
        similarity_fn_name=ScoringFunction.COSINE,
        framework=["PyTorch"],
        languages=["eng-Latn"],
        **dict.fromkeys(
            (
                "release_date", "n_parameters", "memory_usage_mb", "max_tokens", "embed_dim",
                "license", "open_weights", "public_training_code", "public_training_data",
                "use_instructions", "training_datasets",
            )
        ),
    )  # fmt: skip


def _load(
    name: str, pretrained: str | None, scheme: str, *_: Any, device: str | None = None, **__: Any
) -> Any:
    """The encoder; MTEB gives the loader its own name and revision of the model too."""
    from mteb.models.abs_encoder import AbsEncoder

    opened = open_model(name, pretrained)
    model: Any = accelerate(opened.model.to(device or "cpu"), scheme=scheme, inplace=True)

    class Encoder(AbsEncoder):  # type: ignore[misc]
        """Unit embeddings of photos, of texts, or their sum where a row holds both."""

        @torch.inference_mode()
        def encode(self, inputs: Any, **_: Any) -> Any:
            """MTEB's batches -> float32 [n, E]."""
            rows = []
            for batch in inputs:
                parts = []
                if "image" in batch:
                    images = [opened.preprocess(image.convert("RGB")) for image in batch["image"]]
                    stacked = torch.stack(images).to(device or "cpu")
                    parts.append(model.encode_image(stacked, normalize=True))
                if "text" in batch:
                    tokens = opened.tokenizer(list(batch["text"])).to(device or "cpu")
                    parts.append(model.encode_text(tokens, normalize=True))
                rows.append(torch.stack(parts).sum(dim=0).float().cpu())
            return torch.cat(rows).numpy()

    return Encoder()
