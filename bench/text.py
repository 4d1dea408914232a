"""Text towers side by side: time per prompt, and what int8 costs in zero-shot answers.

    python -m bench.text time --model ViT-B-32 --batch 1 --batch 8 --batch 64
    python -m bench.text time --model transformers-clip --model open_clip-bert
    python -m bench.text accuracy tiny-imagenet-val.zip --classes tiny-imagenet-classes.json

Times: prompts of CLIP's templates, all variants in turn, median with its 20th and 80th percentile.
"torch float32" runs what the library's users run: the whole context in open_clip, the longest text
of the batch in transformers; "lraee float32" is open_clip's, cut at the end of the text. OpenVINO
needs the extra `peers`; a peer that cannot be set up is named with its reason.
Accuracy: photos are embedded once, by the float image tower; class texts by both text towers.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import lraee
from bench.environment import describe
from bench.text_towers import Encode, Tower, open_tower, prompts
from lraee.data.classes import read_classes
from lraee.data.photos import Photos
from lraee.data.sources import first_line
from lraee.evaluation import evaluate
from lraee.measurement.timing import Timing, interleaved
from lraee.storage.json import write_json
from lraee.towers.families import encode_text
from lraee.towers.prompts import class_features
from lraee.zoo.opening import open_model

SCHEMA = "lraee.text/2"

app = typer.Typer(no_args_is_help=True)


class _Text(nn.Module):
    """The text half of a model alone, as converters take it."""

    def __init__(self, model: nn.Module, tower: Tower) -> None:
        super().__init__()
        self.model, self._encode = model, tower.encode

    def forward(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, E]."""
        return self._encode(self.model, text)


def torch_float32(tower: Tower) -> Encode:
    """As the library has it."""
    return _Text(tower.model, tower)


def torch_bfloat16(tower: Tower) -> Encode:
    """Weights and activations in bfloat16."""
    half = _Text(copy.deepcopy(tower.model).bfloat16(), tower)
    return lambda x: half(x).float()


def lraee_float32(tower: Tower) -> Encode:
    """Cut after the last end of a text in the batch."""
    return _Text(lraee.accelerate(tower.model), tower)


def lraee_int8(tower: Tower) -> Encode:
    """In int8; encode_text cuts each text at its own end."""
    return _Text(lraee.accelerate(tower.model, text="int8"), tower)


def openvino_int8(tower: Tower) -> Encode:
    """OpenVINO, INT8 by NNCF post-training quantization with ModelType.TRANSFORMER."""
    import nncf
    import openvino

    texts = tower.texts
    L = -1 if tower.padding_id is not None else texts.shape[1]
    converted = openvino.convert_model(
        _Text(tower.model, tower), example_input=texts[:1], input=([-1, L], openvino.Type.i64)
    )
    quantized = nncf.quantize(
        converted, nncf.Dataset([text[None].numpy() for text in texts]),
        model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts),
    )  # fmt: skip
    threads = str(torch.get_num_threads())
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(quantized, "CPU", options)
    return lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0]))


VARIANTS: dict[str, Callable[[Tower], Encode]] = {
    "lraee int8": lraee_int8,
    "lraee float32": lraee_float32,
    "torch float32": torch_float32,
    "torch bfloat16": torch_bfloat16,
    "openvino int8 (nncf)": openvino_int8,
}


def build_all(tower: Tower) -> tuple[dict[str, Encode], dict[str, str]]:
    """Each variant by name, and the reasons of those that cannot be set up here."""
    built, reasons = {}, {}
    for name, build in VARIANTS.items():
        try:
            run = build(tower)
            run(tower.batch(2))  # compiles
            built[name] = run
        except Exception as error:  # any failure of a peer is its reason, printed and in the JSON
            reasons[name] = f"{type(error).__name__}: {first_line(error)}"
            typer.echo(f"  not set up: {name}: {reasons[name]}")
    return built, reasons


def rows_of(runs: dict[str, Encode], tower: Tower, batch: int, budget_s: float) -> list[Any]:
    """Rows of one batch size: time per prompt, times the int8 of lraee, cosine with float32."""
    own, texts = tower.batch(batch), tower.batch(len(tower.texts))

    def call(encode: Encode) -> Callable[[], Tensor]:
        return lambda: encode(own)

    seconds = interleaved({n: call(e) for n, e in runs.items()}, budget_s=budget_s, warm_s=2.0)
    expected, ours = runs["torch float32"](texts), seconds["lraee int8"]
    rows = []
    for name, each in seconds.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(each, ours, strict=True))
        cosine = nn.functional.cosine_similarity(runs[name](texts), expected).min().item()
        timing = Timing.of([s / batch for s in each])
        rows.append(
            {"variant": name, "batch": batch, **vars(timing), "ratio": ratio, "cosine_min": cosine}
        )
    return rows


@app.command(name="time")
def time_prompts(
    model: Annotated[
        list[str], typer.Option(help="open_clip or zoo name, transformers-clip, open_clip-bert")
    ] = ["ViT-B-32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="prompts per call")] = [1, 8, 64],  # noqa: B006
    budget_s: Annotated[float, typer.Option(help="seconds per batch size")] = 60.0,
    threads: Annotated[int, typer.Option(help="threads of every variant")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time per prompt of every variant, interleaved."""
    torch.set_num_threads(threads)
    results = []
    for name in model:
        tower = open_tower(name, max(64, *batch))
        typer.echo(name)
        with torch.no_grad():
            runs, reasons = build_all(tower)
            rows = []
            for size in batch:
                rows += (measured := rows_of(runs, tower, size, budget_s))
                typer.echo("\n".join(map(_line, measured)))
        results.append({"model": name, "rows": rows, "not_set_up": reasons})
    if out is not None:
        write_json({"schema": SCHEMA, **describe(), "models": results}, out)


def _line(row: dict[str, Any]) -> str:
    return (
        f"b{row['batch']:<3} {row['variant']:22} {row['median_ms']:8.3f} ms a prompt"
        f" ({row['p20_ms']:.3f}-{row['p80_ms']:.3f})  {row['ratio']:5.2f} times lraee int8"
        f"  cosine at least {row['cosine_min']:.5f}"
    )


@app.command()
def accuracy(
    data: Annotated[Path, typer.Argument(exists=True, help="folder or ZIP, a folder per class")],
    classes: Annotated[Path, typer.Option(exists=True, help="JSON of wnids and names")],
    model: Annotated[str, typer.Option(help="open_clip or zoo name")] = "lraee-tiny",
    limit: Annotated[int | None, typer.Option(help="at most so many photos")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Zero-shot answers with float and with int8 class texts over the same photo embeddings."""
    opened, known = open_model(model), read_classes(classes)
    photos = Photos(data, classes=known, limit=limit)
    models = {evaluate.FLOAT: opened.model}
    embedded = evaluate.embed(models, photos, opened.preprocess)
    rows = class_features(opened.model, opened.tokenizer, known.names)
    fast = lraee.accelerate(opened.model, text="int8")
    int8_rows = class_features(fast, opened.tokenizer, known.names)
    texts = {"text int8": (evaluate.FLOAT, int8_rows)}
    table = evaluate.compare(embedded, models, rows, texts)
    for row in table:
        typer.echo(f"{row.scheme:10} top-1 {row.top1:.2f} %  as float {row.agreement:.2f} %")
    single = opened.tokenizer(prompts(64))
    with torch.no_grad():
        pair = encode_text(opened.model, single), encode_text(fast, single)
    cosine = nn.functional.cosine_similarity(*pair).min().item()
    typer.echo(f"64 prompts: cosine with float at least {cosine:.5f}")
    if out is not None:
        result = {"schema": SCHEMA, **describe(), "model": model, "photos": len(embedded.names)}
        write_json({**result, "rows": [asdict(row) for row in table], "cosine_min": cosine}, out)


if __name__ == "__main__":
    app()
