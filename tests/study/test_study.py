"""The whole study on a small random model and small pictures: every part filled, and consistent."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from typer.testing import CliRunner

from lraee.cli.main import app
from lraee.data.classes import Classes
from lraee.data.sources import DataError
from lraee.storage.json import write_json
from lraee.study import command, schema
from lraee.study.page import read_report
from lraee.study.protocol import Protocol
from lraee.study.schema import Report
from lraee.zoo.opening import Opened
from tests.small_calibration import pictures, small_clip

CLASSES = Classes(("n1", "n2", "n3"), ("cat", "dog", "owl"))
QUICK = Protocol(
    seeds=(0,), frontier_budgets=(0.9, 0.8), views=1, steps=20, lens_steps=5, policy_steps=2,
    policy_images=40, sweep_points=5, timing_s=0.1,
)  # fmt: skip


def preprocess(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float() / 64 - 2


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[sum(map(ord, text)) % 60 + i for i in range(8)] for text in texts]) % 64


def write_photos(folder: Path, each: int, seed: int) -> Path:
    values = (pictures(3 * each, seed=seed).clamp(-2, 1.98) + 2) * 64
    for i, value in enumerate(values.to(torch.uint8)):
        path = folder / CLASSES.wnids[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("photos")
    learn, other = write_photos(folder / "a", 60, 1), write_photos(folder / "b", 40, 2)
    opened = Opened("small", small_clip(), preprocess, preprocess, tokenize, CLASSES.names)
    return command.study(
        opened, CLASSES, command.sides(learn, other, CLASSES, limit=None), work=folder / "work",
        protocol=QUICK, prompts=2, progress=False,
    )  # fmt: skip


def test_every_system_is_there_and_the_file_is_valid(report: Report, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json")["model"] == "small"
    names = {(row["name"], row["backbone"]) for row in report["main"]}
    for backbone in schema.BACKBONES:
        for name in (schema.FULL_DEPTH, schema.PUBLISHED, schema.BEST, schema.CLASS_TOKEN,
                     schema.ADAPTIVE):  # fmt: skip
            assert (name, backbone) in names
    for backbone in ("int8", "paper"):
        assert {(schema.SMOOTHED, backbone), (schema.SMOOTHED_EXITS, backbone)} <= names
        rows = [row["name"] for row in report["factorial"] if row["backbone"] == backbone]
        assert [row.split()[0] for row in rows] == ["(i)", "(ii)", "(iii)", "(iv)", "(v)"]
        assert [row["block"] for row in report["noise"][backbone]] == [1, 2, 3, 4, 5, 6]
    assert len(report["owed"]) == 4 and len(report["quadrants"]) == 6
    assert {row["backbone"] for row in report["pruned"]} == {"int8", "paper"}
    assert report["findings"]


def test_parts_agree_with_each_other(report: Report) -> None:
    main = {(row["name"], row["backbone"]): row for row in report["main"]}
    for part in report["quadrants"]:
        row = main[part["recipe"], part["backbone"]]
        full = main[schema.FULL_DEPTH, part["backbone"]]
        n = part["both"] + part["rescue"] + part["loss"] + part["neither"]
        assert n == 120
        assert row["top1"]["mean"] == pytest.approx(100 * (part["both"] + part["rescue"]) / n)
        assert full["top1"]["mean"] == pytest.approx(100 * (part["both"] + part["loss"]) / n)
        gap = row["top1"]["mean"] - full["top1"]["mean"]
        assert part["margin"]["mean"] == pytest.approx(gap)
    for part in report["shares"]:
        assert sum(each["share"]["mean"] for each in part["exits"]) == pytest.approx(100)
    for name, rows in report["lens"].items():
        full = main[schema.FULL_DEPTH, name]
        assert rows[-1]["early_projection"] == pytest.approx(full["top1"]["mean"])
    assert main[schema.FULL_DEPTH, "float"]["agreement"] == {"mean": 100.0, "std": 0.0}


def test_a_sweep_goes_from_all_to_none(report: Report) -> None:
    full = next(r for r in report["main"] if r["name"] == schema.FULL_DEPTH)["top1"]["mean"]
    for sweep in report["sweeps"]:
        for kind in ("learned", "confidence"):
            points = sweep[kind]  # type: ignore[literal-required]
            saved = [point["flops_saved"] for point in points]
            assert saved == sorted(saved, reverse=True)
            assert saved[0] > saved[-1]
    assert 0 <= full <= 100


def test_noise_names_what_the_rule_drops(report: Report) -> None:
    for backbone, rows in report["noise"].items():
        candidates = [row for row in rows if row["is_candidate"]]
        mean = sum(row["inr"] for row in candidates) / len(candidates)
        for row in candidates:
            assert row["is_dropped"] == (row["inr"] < 0.5 * mean)
        lowest = min(candidates, key=lambda row: row["inr"])["block"]
        assert next(p for p in report["pruned"] if p["backbone"] == backbone)["block"] == lowest


def test_without_report_photos_a_fifth_is_held_out(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "a", 40, 1)
    sides = command.sides(folder, None, CLASSES, limit=None)
    assert len(sides.learn) == 96 and len(sides.report) == 24
    assert [sides.report.labels.count(label) for label in range(3)] == [8, 8, 8]
    assert not set(sides.learn.names) & set(sides.report.names)
    many = Classes(tuple(f"n{i}" for i in range(40)), ("x",) * 40)
    for i in range(120):
        path = tmp_path / "few" / f"n{i % 40}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(DataError, match="5 photos of a class at least, got 3"):
        command.sides(tmp_path / "few", None, many, limit=None)
    with pytest.raises(DataError, match="at least 100 photos"):
        command.sides(folder, None, Classes(("x",), ("cat",)), limit=None)


def test_the_page_can_be_made_again(report: Report, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")
    result = CliRunner().invoke(app, ["report", "--from", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    assert "small" in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "report.json").write_text(json.dumps({"schema": "other"}))
    assert CliRunner().invoke(app, ["report", "--from", str(tmp_path / "report.json")]).exit_code


def test_photos_must_be_named() -> None:
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 2 and "--data" in result.output
