"""`lraee calibrate` and `lraee evaluate --exits`: from photos to a report, or one line."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lraee.calibration.pipeline import BEST
from lraee.cli import common
from lraee.cli import main as cli
from lraee.exits.bundle import Exits
from lraee.exits.gate import CLASS_FREE
from tests.image_files import folder

COUNT = 51
QUICK = replace(
    BEST,
    head=replace(BEST.head, kind="affine", hidden=None, steps=20, batch=64, views=0),
    candidates=(6, 9, 11),
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result: Result, exit_code: int) -> str:
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lraee: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """102 photos in two classes with a file that is none, and their classes JSON."""
    root = tmp_path_factory.mktemp("cli")
    photos = folder(root / "photos", count=COUNT)
    (photos / "n01" / "broken.jpg").write_bytes(b"nothing")
    classes = root / "classes.json"
    classes.write_text(json.dumps({"wnids": ["n01", "n02"], "names": ["goldfish", "teapot"]}))
    return photos, classes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short training; and a terminal wide enough for seven forms side by side."""
    recipes = importlib.import_module("lraee.calibration.calibrate")._RECIPES
    monkeypatch.setitem(recipes, "best", QUICK)
    monkeypatch.setattr(common.console, "_width", 250)


def calibrate(data: tuple[Path, Path], out: Path, *options: object) -> Result:
    quiet = ("--no-progress", "--no-timed")
    return run("calibrate", "--data", data[0], "--out", out, *quiet, *options)


def test_exits_for_search_take_photos_alone(data: tuple[Path, Path], tmp_path: Path) -> None:
    photos, classes = data
    out, report = tmp_path / "exits", tmp_path / "report.json"
    result = calibrate(data, out, "--for", "search")
    assert result.exit_code == 0, result.output
    assert "51 for heads, 51 for thresholds" in result.stdout
    assert "static (chosen)" in result.stdout and "at most 88 % of full" in result.stdout
    assert "nearest photo as at full depth, %" in result.stdout
    assert Exits.load(out).plan.blocks == (9,)
    options = ("--no-progress", "--exits", out, "--retrieval", "--limit", 24, "--out", report)
    result = run("evaluate", "--data", photos, "--classes", classes, "--scheme", "int8", *options)
    assert result.exit_code == 0, result.output
    rows = {row["scheme"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["exits static"]["flops_saved"] == pytest.approx(13.15, abs=0.1)
    refused = calibrate(data, tmp_path / "no", "--for", "search", "--classes", classes)
    assert "--for search takes no --classes" in refused.stderr


def test_from_photos_to_a_report(data: tuple[Path, Path], tmp_path: Path) -> None:
    photos, classes = data
    out, report = tmp_path / "new" / "exits", tmp_path / "report.json"
    result = calibrate(data, out, "--classes", classes, "--budget", 0.9, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "102; skipped 1 file: n01/broken.jpg is not a whole image" in result.stdout
    assert "lraee-tiny, int8, 2 classes" in result.stdout
    assert "71 for heads, 10 for gate, 21 for thresholds" in result.stdout
    assert "at most 90 % of full depth's FLOPs" in result.stdout
    assert "learned (chosen)" in result.stdout and not (out / "unfinished").exists()
    exits = Exits.load(out)
    assert exits.chosen == "learned" and exits.card["seed"] == 3
    assert list(exits.heads) == [6, 9, 11]

    options = ("--no-progress", "--exits", out, "--retrieval", "--limit", 24, "--out", report)
    result = run("evaluate", "--data", photos, "--classes", classes, "--scheme", "int8", *options)
    assert result.exit_code == 0, result.output
    actual = json.loads(report.read_text())
    forms = ["float", "int8", *(f"exits {name}" for name in exits.names)]
    assert [row["scheme"] for row in actual["rows"]] == forms
    assert [row["scheme"] for row in actual["retrieval"]] == forms
    assert list(actual["exits"]) == forms[2:]
    assert actual["card"]["plans"] == json.loads(json.dumps(dict(exits.card["plans"])))
    for row in actual["rows"]:
        stats = actual["exits"].get(row["scheme"])
        if stats is None:
            assert row["flops_saved"] is None
            continue
        assert stats["images"] == actual["photos"] == 24 - actual["skipped"]
        assert sum(stats["share"]) == pytest.approx(1.0)
        assert row["flops_saved"] == pytest.approx(
            100 * (1 - stats["run_flops"] / stats["full_flops"])
        )
    assert actual["retrieval"][0]["recall_1"] == 100.0
    assert "float's first in first 1, %" in result.stdout and "FLOPs saved, %" in result.stdout


def test_rows_of_an_int8_text_tower(data: tuple[Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--no-progress", "--scheme", "int8", "--limit", 6, "--out", report)
    result = run("evaluate", "--data", data[0], "--classes", data[1], "--text", "int8", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["rows"]
    forms = ["float", "int8", "float, text int8", "int8, text int8"]
    assert [row["scheme"] for row in rows] == forms
    assert rows[2]["cosine_mean"] == rows[0]["cosine_mean"] and rows[2]["agreement"] >= 80


def test_class_free(data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "exits"
    result = calibrate(data, out, "--class-free", "--budget", 0.9, "--batch", 20)
    assert result.exit_code == 0, result.output
    assert "lraee-tiny, int8, no classes" in result.stdout and "agreement (chosen)" in result.stdout
    exits = Exits.load(out)
    assert exits.classes is None and exits.names == CLASS_FREE
    assert exits.chosen == "agreement"


def test_labels_and_epsilon(data: tuple[Path, Path], tmp_path: Path) -> None:
    """21 photos prove no loss below 1 %: every image runs to the end, and that is said."""
    options = ("--classes", data[1], "--labels", "--training", "both", "--gate", "static")
    result = calibrate(data, tmp_path / "exits", *options, "--epsilon", 0.01)
    assert result.exit_code == 0, result.output
    assert "loss of at most 0.01 with probability 0.95" in result.stdout
    assert "static: too few images for this loss" in result.stdout
    exits = Exits.load(tmp_path / "exits")
    assert exits.card["labels"] is True and exits.card["recipe"]["head"]["training"] == "both"
    assert exits.plan.blocks == ()


def test_an_interrupted_run_resumes_after_the_stages_that_it_kept(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run trains the heads that the first did not, and removes what the first kept."""
    calibration = importlib.import_module("lraee.calibration.pipeline")
    original, calls = calibration.train_head, []

    def train_head(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(calibration, "train_head", train_head)
    out = tmp_path / "exits"
    options = ("--classes", data[1], "--budget", 0.9, "--exits", 2)
    assert calibrate(data, out, *options).exit_code != 0 and len(calls) == 2
    kept = {path.name for path in (out / "unfinished").iterdir()}
    assert kept == {"run", "embeddings.safetensors", "view 0.safetensors", "head 6.safetensors"}
    result = calibrate(data, out, *options)
    assert result.exit_code == 0, result.output
    assert len(calls) == 2 + 2, "two of three heads: one was kept, one was interrupted"
    assert not (out / "unfinished").exists() and list(Exits.load(out).heads) == [6, 9, 11]
    # After so short a training the gate scores may be alike: then all images exit at the first
    # exit, and one that no image reaches is no part of a plan
    assert Exits.load(out).plans["learned"].blocks in ((6,), (9,), (6, 9), (6, 11), (9, 11))


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels",), "--labels needs --classes"),
        (("--gate", "magic"), "magic"),
        (("--training", "hard"), "hard"),
        (("--batch", 0), "batch"),
        (("--data", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_usage(
    data: tuple[Path, Path], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = calibrate(data, tmp_path / "exits", *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", 0.5, "--epsilon", 0.1), "budget or epsilon must be given, one of the two"),
        (("--exits", 6), "num_exits must be 1 to 5, got 6"),
        (("--budget", 1.5), "budget must be in (0, 1), got 1.5"),
        (("--epsilon", 0.1, "--delta", 2), "delta must be in (0, 1), got 2.0"),
        (("--recipe", "worst"), "recipe must be one of best, paper or a Recipe, got 'worst'"),
        (("--recipe", "paper"), "labels must be given for training 'both', got None"),
        (("--class-free", "--gate", "learned"), "classes must be given for a learned gate"),
        (("--scheme", "int4"), "scheme must be one of int8, int8-patches, int8-calibrated, paper"),
        (("--limit", 20), "images must be at least 100, got"),
    ],
)
def test_what_calibrate_refuses_is_one_line(
    data: tuple[Path, Path], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    few = () if "--limit" in options else ("--limit", 4)
    classes = () if "--class-free" in options else ("--classes", data[1])
    result = calibrate(data, tmp_path / "exits", *few, *classes, *options)
    assert message in one_line(result, exit_code=2)
    assert not (tmp_path / "exits" / "exits.json").exists()


def test_no_photo_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"nothing")
    result = calibrate((tmp_path / "photos", tmp_path), tmp_path / "exits", "--class-free")
    assert "images must be one at least, got none" in one_line(result, exit_code=2)


def test_what_is_no_exits_is_one_line(data: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--data", data[0], "--classes", data[1], "--no-progress", "--scheme", "int8")
    (tmp_path / "empty").mkdir()
    message = one_line(run("evaluate", *options, "--exits", tmp_path / "empty"), exit_code=1)
    assert "exits.json" in message
    (tmp_path / "empty" / "exits.json").write_text("{")
    assert "must be" in one_line(
        run("evaluate", *options, "--exits", tmp_path / "empty"), exit_code=1
    )
    missing = run("evaluate", *options, "--exits", tmp_path / "nowhere")
    assert missing.exit_code == 2 and "Traceback" not in missing.output


def test_exits_of_another_model_are_one_line(data: tuple[Path, Path], tmp_path: Path) -> None:
    from tests.clip_models import make_model
    from tests.exits.random_exits import make_exits

    make_exits(make_model(), kind="confidence").save(tmp_path)
    options = ("--data", data[0], "--no-progress", "--scheme", "int8", "--limit", 4)
    result = run("evaluate", *options, "--classes", data[1], "--exits", tmp_path)
    assert "exits must be made for this tower's weights" in one_line(result, exit_code=2)


def test_too_few_photos_for_a_search(data: tuple[Path, Path]) -> None:
    options = ("--classes", data[1], "--no-progress", "--scheme", "int8", "--limit", 8)
    result = run("evaluate", "--data", data[0], *options, "--retrieval")
    assert "retrieval: photos must be more than 10, got" in one_line(result, exit_code=2)
