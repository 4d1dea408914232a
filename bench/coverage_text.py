"""Which text towers run in int8: every architecture of open_clip's configs and of transformers.

    python -m bench.coverage_text           # prints the table of docs/text.md
    python -m bench.coverage_text --depth 0 --only SigLIP

Each tower has random weights of gain 1 and its own width; towers that differ in size alone are one
row. A row is supported if a text has the same bits alone, in a batch and with more padding,
`lraee.restore` gives the float model bit for bit, and the error |int8 - float| / |float| of the
embeddings is below 0.1.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import open_clip
import torch
import typer
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

import lraee
from bench.text_towers import with_gain
from lraee.towers.families import encode_text
from lraee.towers.text import find_text

MOST_ERROR = 0.1
LENGTHS = (6, 11, 16, 9)
_VISION: dict[str, Any] = {
    "image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16,
}  # fmt: skip
_HF_VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
_HF_TEXT: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 1000,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3,
    "max_position_embeddings": 77,
}  # fmt: skip
_SIZES = ("width", "heads", "layers", "vocab_size", "context_length", "hf_tokenizer_name",
          "tokenizer_kwargs")  # fmt: skip
_DUAL = ("CLIP", "MetaClip2", "CLIPSeg", "OwlViT", "Owlv2", "Siglip", "Siglip2", "ChineseCLIP",
         "AltCLIP", "Blip", "Aimv2")  # fmt: skip
_DEPTH = 12

Build = Callable[[int], nn.Module]
"""How many blocks -> the float model in eval mode."""


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
      library: for the table.
      tower: what tells it from others.
      models: that have it.
      build: makes a model with such a tower.
      padding_id: what its texts are padded with.
    """

    library: str
    tower: str
    models: tuple[str, ...]
    build: Build
    padding_id: int = 0


def open_clip_cases() -> Iterator[Case]:
    """One case for all configs that differ in size alone."""
    groups: dict[str, list[str]] = {}
    for name in open_clip.list_models():
        text = open_clip.get_model_config(name)["text_cfg"]
        about = {k: v for k, v in text.items() if k not in _SIZES and k != "mlp_ratio"}
        groups.setdefault(json.dumps(about, sort_keys=True), []).append(name)
    for key, names in groups.items():
        about = json.loads(key)
        if "hf_model_name" in about:
            yield _hf_case(about, tuple(names))
            continue
        text = copy.deepcopy(open_clip.get_model_config(names[0])["text_cfg"])
        options = ", ".join(f"{k} {v}" for k, v in about.items()) or "causal"
        yield Case("open_clip", f"TextTransformer: {options}", tuple(names), _builds(text))


def _builds(text: dict[str, Any]) -> Build:
    def build(depth: int) -> nn.Module:
        own = {**text, "layers": depth, "vocab_size": 1000}
        return CustomTextCLIP(512, _VISION, own)

    return build


_TINY: dict[str, Any] = {"vocab_size": 1000, "d_model": 64}
_HF_CONFIGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("xlm-roberta", "XLMRobertaConfig", {"vocab_size": 1000}),
    ("roberta", "RobertaConfig", {"vocab_size": 1000}),
    ("mt5", "MT5Config", {**_TINY, "d_ff": 64, "num_layers": 1}),
    ("nllb", "M2M100Config", {**_TINY, "encoder_layers": 1, "decoder_layers": 1}),
)
"""Part of a name on the hub, its config class, and options: the hub's own configs are not here."""


def _hf_case(about: dict[str, Any], models: tuple[str, ...]) -> Case:
    """A tower of transformers in open_clip, at the default size of its config class."""
    name = about["hf_model_name"]
    config_name, options = next((kind, own) for part, kind, own in _HF_CONFIGS if part in name)

    def build(depth: int) -> nn.Module:
        import transformers
        from open_clip.hf_model import HFTextEncoder

        is_bert = config_name.endswith("RobertaConfig")
        own = {**options, "num_hidden_layers": depth} if is_bert else options
        model = CustomTextCLIP(512, _VISION, _TINY_TEXT)
        model.text = HFTextEncoder(
            "", 512, config=getattr(transformers, config_name)(**own),
            pooler_type=about.get("hf_pooler_type"), proj_type=about.get("hf_proj_type", "mlp"),
        )  # fmt: skip
        return model

    return Case("open_clip", f"HFTextEncoder: {name}", models, build, padding_id=1)


_TINY_TEXT = {"context_length": 16, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}


def hugging_face_cases() -> Iterator[Case]:
    """The models of transformers with a text model."""
    for name in _DUAL:

        def build(depth: int, name: str = name) -> nn.Module:
            import transformers

            kind = getattr(transformers, f"{name}Model")
            vision = _HF_VISION | ({"num_patches": 4} if name == "Siglip2" else {})
            text = {**_HF_TEXT, "num_hidden_layers": depth}
            config = kind.config_class(vision_config=vision, text_config=text, projection_dim=512)
            return kind(config)  # type: ignore[no-any-return]

        yield Case("transformers", f"{name}Model", (f"{name}Model",), build)


def examine(case: Case, depth: int) -> tuple[str, float | None]:
    """The state of a case, and the error of its embeddings."""
    model = with_gain(case.build(depth))
    try:
        fast = lraee.accelerate(model, text="int8")
    except NotImplementedError as refused:
        return str(refused).partition("got 'int8': ")[2] or str(refused), None
    ids = _ids(model, case.padding_id)
    y, expected = encode_text(fast, ids), encode_text(model, ids)
    error = float((y - expected).norm() / expected.norm())
    failed = [name for name, passes in _checks(case, model, fast, ids, y) if not passes]
    failed += [] if error < MOST_ERROR else ["error"]
    return (f"fails {', '.join(failed)}" if failed else "supported"), error


def _ids(model: nn.Module, padding_id: int) -> Tensor:
    """Texts of LENGTHS tokens in the model's context, the highest id at their ends."""
    tower = find_text(model)
    L = 77 if tower is None else min(77, tower.spec.tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((len(LENGTHS), L), padding_id)
    for row, n in zip(ids, LENGTHS, strict=True):
        row[:n] = torch.randint(4, 900, (n,), generator=generator)
        row[n - 1] = 999
    return ids


def _checks(
    case: Case, model: nn.Module, fast: nn.Module, ids: Tensor, y: Tensor
) -> Iterator[tuple[str, bool]]:
    alone = torch.cat([encode_text(fast, row[None]) for row in ids])
    yield "batch", torch.equal(alone, y)
    yield "order", torch.equal(encode_text(fast, ids.flip(0)), y.flip(0))
    kept = lraee.restore(fast).state_dict()
    yield "restore", all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())


def main(
    only: Annotated[str, typer.Option(help="Towers whose names hold this.")] = "",
    depth: Annotated[int, typer.Option(help="Blocks; 0: 12.")] = 2,
) -> None:
    """Prints the table."""
    typer.echo("| library | text tower | models | state | error |\n|---|---|---|---|---|")
    with torch.no_grad():
        for case in (*open_clip_cases(), *hugging_face_cases()):
            if only not in case.tower:
                continue
            state, error = examine(case, depth or _DEPTH)
            shown = "" if error is None else f"{error:.3f}"
            models = case.models[0] + (f" and {n}" if (n := len(case.models) - 1) else "")
            models += " more" if n else ""
            typer.echo(f"| {case.library} | {case.tower} | {models} | {state} | {shown} |")


if __name__ == "__main__":
    typer.run(main)
