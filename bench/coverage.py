"""Every model of the libraries through lraee.accelerate: what is supported, and how near it is.

    python -m bench.coverage                        # docs/models.md and docs/models.json
    python -m bench.coverage --only EVA02-L --depth 0 --out /tmp/eva.json
    python -m bench.coverage --calibrated --out /tmp/calibrated.json  # never worse than int8?

Each model of bench.coverage_cases is built with random weights and a few blocks of full width,
accelerated and run on three images. It counts as supported if its class stays, an image has the
same bits alone and in the batch, a NaN stays in its image, `lraee.restore` gives the float model
bit for bit, and the embedding is near the float one's.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import lraee
from bench.coverage_cases import LIBRARIES, Case, pictures
from lraee.storage.json import write_json
from lraee.towers.families import encode_image

SCHEMA = "lraee.models/1"
MOST_ERROR = 0.1
"""Relative error of an embedding above which a model counts as broken."""
CALIBRATION = 64
CHECKS = ("class", "batch", "nan", "restore", "error")


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Args:
      library, family, name, tags: of the case.
      reason: why it is not supported, or None.
      error: |int8 - float| / |float| of the embeddings of three images, or None.
    """

    library: str
    family: str
    name: str
    tags: tuple[str, ...]
    reason: str | None
    error: float | None


@torch.no_grad()
def examine(case: Case, depth: int | None, is_calibrated: bool = False) -> Row:
    """Builds, accelerates and checks one model; or compares it calibrated with int8."""
    model = case.build(depth)
    if is_calibrated:
        return _compare_calibrated(case, model)
    try:
        fast = lraee.accelerate(model)
    except (NotImplementedError, TypeError) as refused:
        return _row(case, _short(str(refused)), None)
    x = pictures(3, case.image_size)
    expected = _embedding(model, x)
    y = _embedding(fast, x)
    error = float((y - expected).norm() / expected.norm())
    failed = [name for name, passes in _checks(model, fast, x, y) if not passes]
    failed += [] if error < MOST_ERROR else ["error"]
    return _row(case, f"fails {', '.join(failed)}" if failed else None, round(error, 4))


def _compare_calibrated(case: Case, model: nn.Module) -> Row:
    """Calibrated on 64 images; the row's error is that over int8's on three others."""
    images = pictures(CALIBRATION + 3, case.image_size)
    given = lraee.Calibration(images[:-3], memory_mb=32768, progress=False)
    try:
        plain, fast = lraee.accelerate(model), lraee.accelerate(model, calibration=given)
    except (NotImplementedError, TypeError) as refused:
        return _row(case, _short(str(refused)), None)
    expected = _embedding(model, images[-3:])
    errors = [float((_embedding(m, images[-3:]) - expected).norm()) for m in (plain, fast)]
    reason = None if errors[1] <= errors[0] else "fails calibrated: worse than int8"
    return _row(case, reason, round(errors[1] / errors[0], 4))


def _row(case: Case, reason: str | None, error: float | None) -> Row:
    return Row(case.library, case.family, case.name, case.tags, reason, error)


def _checks(model: nn.Module, fast: nn.Module, x: Tensor, y: Tensor) -> Iterable[tuple[str, bool]]:
    yield "class", isinstance(fast, type(model))
    yield "batch", torch.equal(_embedding(fast, x[1:2]), y[1:2])
    spoiled = x.clone()
    spoiled[1, 0, 5, 5] = float("nan")
    z = _embedding(fast, spoiled)
    is_apart = bool(z[1].isnan().any()) and torch.equal(z[[0, 2]], y[[0, 2]])
    yield "nan", is_apart
    back = lraee.restore(fast)
    kept = back.state_dict()
    is_same = all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    yield (
        "restore",
        is_same and [type(m) for m in back.modules()] == [type(m) for m in model.modules()],
    )


def _embedding(model: nn.Module, x: Tensor) -> Tensor:
    return encode_image(model, x).float()


def _short(line: str) -> str:
    """The reason in a refusal of find_tower, or the line."""
    reason = re.search(r", got ([^:]*): (.*?); use a supported model", line)
    return f"{reason[1]}: {reason[2]}" if reason else line.removeprefix("accelerate: ")


def run(
    cases: Iterable[Case],
    depth: int | None,
    say: Callable[[str], None],
    is_calibrated: bool = False,
) -> list[Row]:
    """Every case, in order; those with the same tower once."""
    rows: list[Row] = []
    known: dict[str, Row] = {}
    for case in cases:
        start = time.perf_counter()
        twin = known.get(case.same_as)
        try:
            row = (
                examine(case, depth, is_calibrated)
                if twin is None
                else _row(case, twin.reason, twin.error)
            )
        except Exception as error:  # any failure is this model's, and the table says so
            first = str(error).splitlines()[0] if str(error) else ""
            row = _row(case, f"{type(error).__name__}: {first}", None)
        if case.same_as:
            known[case.same_as] = row
        rows.append(row)
        state = row.reason or f"supported, error {row.error}"
        say(f"{case.library} {case.name}: {state} ({time.perf_counter() - start:.1f} s)")
    return rows


# The page


def counts(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Per library: models, supported ones, and the pretrained tags of each."""
    result: dict[str, dict[str, int]] = {}
    for row in rows:
        part = result.setdefault(
            row.library, {"models": 0, "supported": 0, "tags": 0, "supported_tags": 0}
        )
        part["models"] += 1
        part["tags"] += len(row.tags)
        part["supported"] += row.reason is None
        part["supported_tags"] += len(row.tags) if row.reason is None else 0
    return result


PAGE = """# Models

Written by `python -m bench.coverage`: each model with random weights of gain 1 and {depth} blocks
of full width, accelerated in `int8` and run on three images. A model is supported if the result is
of its own class, an image has the same bits alone and in the batch, a NaN stays in its image,
`lraee.restore` gives the float model bit for bit, and the relative error of the embedding,
|int8 - float| / |float|, is below {most}. The error grows with depth; real weights are on
[accuracy.md](accuracy.md). Text towers are on [text.md](text.md).

{counts}

| library | family | models | state | error |
|---|---|---|---|---|
{rows}

## Limits

- Models of transformers compute every token of the last block; open_clip's towers that embed a
  class token compute that one alone, 6 % of a ViT-B/32. `last_hidden_state` is part of what
  CLIPVisionModel, CLIPVisionModelWithProjection and `get_image_features` (transformers 5) return.
  To compute it when it is read is not sound: code unpacks, indexes, copies and pickles outputs, an
  output would hold the tokens of the block before, and weights may have changed by then.
- A key mask together with rotary positions is refused: no model here needs both (SigLIP 2 NaFlex,
  which has masks, has learned positions).
- Towers with gated MLPs err more at full depth than others: [numerics](notes/numerics.md).
"""


def page(rows: list[Row], depth: int | None) -> str:
    """docs/models.md."""
    groups: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.library, row.family, row.reason), []).append(row)
    lines = []
    for (library, family, reason), members in groups.items():
        names = ", ".join(f"`{row.name}`" for row in members)
        errors = [row.error for row in members if row.error is not None]
        error = f"{min(errors):.3f} to {max(errors):.3f}" if errors else ""
        lines.append(f"| {library} | {family} | {names} | {reason or 'supported'} | {error} |")
    said = []
    for library, n in counts(rows).items():
        tags = f", {n['supported_tags']} of {n['tags']} pretrained tags" if n["tags"] else ""
        said.append(f"{library}: {n['supported']} of {n['models']} models{tags}.")
    return PAGE.format(
        depth=depth or "all", most=MOST_ERROR, counts="\n".join(said), rows="\n".join(lines)
    )


def earlier(path: Path, depth: int) -> list[Row]:
    """Rows of the file as it is, if it was made at this depth."""
    if not path.exists():
        return []
    held = json.loads(path.read_text())
    if (held["schema"], held["depth"]) != (SCHEMA, depth):
        return []
    return [Row(**{**row, "tags": tuple(row["tags"])}) for row in held["rows"]]


def joined(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """The rows, and earlier ones of other models, in order of libraries."""
    new = {(row.library, row.name) for row in rows}
    kept = [row for row in before if (row.library, row.name) not in new]
    key = {name: place for place, name in enumerate(LIBRARIES)}
    return sorted((*rows, *kept), key=lambda row: (key.get(row.library, len(key)), row.family))


def main(
    library: Annotated[list[str] | None, typer.Option(help="Of LIBRARIES; all by default.")] = None,
    only: Annotated[str, typer.Option(help="Models whose names match.")] = "",
    depth: Annotated[int, typer.Option(help="Blocks to keep; 0 keeps all.")] = 2,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="int8-calibrated over int8's error; needs --out.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The JSON; with it no page is written.")] = None,
) -> None:
    """Writes docs/models.md and docs/models.json, or the JSON alone.

    Rows of models that are not run stay as they are in the file.
    """
    if calibrated and out is None:
        raise typer.BadParameter("--calibrated needs --out: the page is about int8")
    names = library or list(LIBRARIES)
    cases = [case for name in names for case in LIBRARIES[name]() if re.search(only, case.name)]
    rows = run(cases, depth or None, lambda line: typer.echo(line, err=True), calibrated)
    docs = Path(__file__).parents[1] / "docs"
    path = out or docs / "models.json"
    if out is None:
        rows = joined(rows, earlier(path, depth))
        (docs / "models.md").write_text(page(rows, depth or None))
    fields = [asdict(row) for row in rows]
    write_json({"schema": SCHEMA, "depth": depth, "counts": counts(rows), "rows": fields}, path)
    for part, n in counts(rows).items():
        typer.echo(f"{part}: {n}")
    broken = [row.name for row in rows if (row.reason or "").startswith("fails")]
    sys.exit(f"bench.coverage: failing: {', '.join(broken)}" if broken else 0)


if __name__ == "__main__":
    typer.run(main)
