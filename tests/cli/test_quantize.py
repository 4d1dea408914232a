"""`lraee quantize`: a calibrated checkpoint, and the commands that take it."""

import json
from pathlib import Path

import pytest
import torch

import lraee
from lraee.cli.main import COMMANDS
from lraee.serving.embed_model import Choice, PhotoModel
from lraee.serving.encoder import ModelChoice
from tests.cli.test_main import run
from tests.image_files import folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photos") / "all", count=32)


@pytest.fixture(scope="module")
def checkpoint(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantize") / "checkpoint"
    result = run("quantize", "--data", photos, "--out", out, "--limit", 64, "--no-progress")
    assert result.exit_code == 0, result.output
    assert "lraee-tiny, int8-calibrated" in result.stdout and "64; nothing" in result.stdout
    return out


def test_the_checkpoint_is_a_calibrated_model(checkpoint: Path) -> None:
    assert sorted(p.suffix for p in checkpoint.iterdir()) == [".json", ".safetensors"]
    model = lraee.zoo.load("lraee-tiny")[0]
    fast = lraee.load(checkpoint, model)
    assert len(fast.visual.lraee.scheme.calibration) == 64


def test_evaluate_shows_it_beside_others(checkpoint: Path, tmp_path: Path) -> None:
    data, out = folder(tmp_path / "photos", count=7), tmp_path / "out.json"
    options = ("--checkpoint", checkpoint, "--peer", "bfloat16", "--scheme", "int8")
    result = run("evaluate", "--data", data, *options, "--no-progress", "--out", out)
    assert result.exit_code == 0, result.output
    rows = {row["scheme"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["float", "int8", "checkpoint", "bfloat16"]
    assert 0 < rows["checkpoint"]["error"] < rows["int8"]["error"]
    assert rows["int8"]["neighbours_10_95"][0] <= rows["int8"]["neighbours_10"]
    assert "relative" in result.stdout and "interval" in result.stdout


def test_embed_and_serve_take_it(checkpoint: Path) -> None:
    model = lraee.zoo.load("lraee-tiny")[0]
    expected = lraee.load(checkpoint, model)
    served = ModelChoice("lraee-tiny", checkpoint=checkpoint).open()
    embedding = PhotoModel(Choice("lraee-tiny", "0", checkpoint=checkpoint))
    image = torch.rand(1, 3, *served.image_size)
    with torch.no_grad():
        row = expected.encode_image(image, normalize=True)[0].numpy()
    assert (served.encode("image", [image[0]])[0].embedding == row).all()
    scheme = embedding.settings["scheme"]
    assert scheme["calibration"] == expected.visual.lraee.scheme.calibration
    assert len(embedding.settings["checkpoint"]) == 64
    plain = PhotoModel(Choice("lraee-tiny", "0")).settings
    assert "checkpoint" not in plain and "calibration" not in plain["scheme"]


@pytest.mark.parametrize("command", ["embed", "serve", "calibrate"])
def test_a_scheme_beside_a_checkpoint_or_without_one(
    command: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = {"embed": (checkpoint, "--out", tmp_path / "o")}.get(command, ())
    source = ("--data", checkpoint, "--out", tmp_path / "o") if command == "calibrate" else source
    both = run(command, *source, "--scheme", "int8", "--checkpoint", checkpoint)
    assert both.exit_code == 2 and "must be left out beside a checkpoint" in _flat(both.output)
    alone = run(command, *source, "--scheme", "int8-calibrated")
    assert alone.exit_code == 2 and "lraee quantize --data PHOTOS" in _flat(alone.output)


def _flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_evaluate_needs_photos_to_calibrate(photos: Path) -> None:
    result = run("evaluate", "--data", photos, "--scheme", "int8-calibrated")
    assert result.exit_code == 2 and "--calibration must be given" in _flat(result.output)


def test_too_few_photos(tmp_path: Path) -> None:
    result = run("quantize", "--data", folder(tmp_path / "p"), "--out", tmp_path / "o",
                 "--no-progress")  # fmt: skip
    assert result.exit_code == 2
    assert "calibration images must be 64 to 256, got 6; give 128" in _flat(result.output)


def test_it_is_a_command() -> None:
    assert "quantize" in COMMANDS
    help_text = run("quantize", "--help").stdout
    assert "Example:" in help_text and "int8-calibrated" in help_text
