import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lraee.cli import main as cli
from lraee.evaluation import demo
from lraee.ops import registry
from tests.image_files import folder

COMMANDS = ("doctor", "demo", "calibrate", "evaluate", "bench")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """The error of a failed run: exit code 1, one line, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lraee: error: ")
    return lines[0]


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of four photos in two classes, and its classes JSON."""
    root = folder(tmp_path / "photos", count=2)
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"wnids": ["n01", "n02"], "names": ["goldfish", "teapot"]}))
    return root, classes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"lraee {command}" in result.stdout
    assert "Example:" in result.stdout


def test_no_command_lists_the_commands() -> None:
    result = run()
    assert result.exit_code == 2 and all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate",),
        ("evaluate", "--data", "/nowhere"),
        ("demo", "--data", "/nowhere"),
        ("calibrate", "--data", "."),
        ("bench", "--batch", "0"),
        ("demo", "--limit", "many"),
        ("fly",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_an_unknown_scheme_is_wrong_usage(data: tuple[Path, Path]) -> None:
    result = run("evaluate", "--data", data[0], "--classes", data[1], "--scheme", "int4")
    assert result.exit_code == 2 and "int4" in result.stderr
    result = run("evaluate", "--data", data[0], "--classes", data[1], "--text", "int4")
    assert result.exit_code == 2 and "int4" in result.stderr


def test_user_mistakes_are_one_line(data: tuple[Path, Path], tmp_path: Path) -> None:
    root, classes = data
    assert "name must be lraee-tiny or" in one_line(run("bench", "--model", "ViT-B-33"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "must be JSON" in one_line(run("evaluate", "--data", root, "--classes", broken))
    assert "must be a ZIP file" in one_line(run("demo", "--data", broken))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold photos, got none" in one_line(run("demo", "--data", empty))
    (empty / "a.jpg").write_bytes(b"nothing")
    message = one_line(run("demo", "--data", empty, "--no-progress"))
    assert "got none (skipped 1 file: a.jpg is not a whole image" in message


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "OPERATORS", None)
    result = run("doctor")
    assert isinstance(result.exception, TypeError)


def test_a_wrong_environment_variable_is_wrong_usage(tmp_path: Path) -> None:
    pytest.importorskip("lraee._C", reason="the C++ extension is not built here")
    command = [sys.executable, "-m", "lraee", "bench", "--batch", "1"]
    environment = os.environ | {"LRAEE_ISA": "mmx"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("lraee: error: LRAEE_ISA must name")
    assert len(run.stderr.splitlines()) == 1


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for word in ("machine", "isa avx512_vnni", "on cpu tensors: ", "on cuda tensors: "):
        assert word in result.stdout
    as_json = run("doctor", "--json")
    actual = json.loads(as_json.stdout)
    assert actual["schema"] == "lraee.doctor/1"
    assert {row["operator"] for row in actual["operators"]} == set(registry.OPERATORS)


def test_demo_on_a_folder(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = replace(demo.RECIPE.head, steps=20, hidden=64)
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, head=head, candidates=(6, 9)))
    monkeypatch.setattr(demo, "CROPS", 200)
    out = tmp_path / "new" / "demo.json"
    (data[0] / "bad.png").write_bytes(b"nothing")
    result = run("demo", "--data", data[0], "--no-progress", "--limit", 10, "--out", out)
    assert result.exit_code == 0, result.output
    actual = json.loads(out.read_text())
    assert actual["photos"] == 4 and len(actual["answers"]) == 4 and actual["skipped"] == 1
    assert "4; skipped 1 file: bad.png is not a whole image" in result.stdout
    for row in actual["answers"]:
        assert row["photo"] in result.stdout and row["float_name"] in result.stdout


def test_evaluate(data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "evaluate.json"
    options = ("--no-progress", "--batch", 3, "--out", out)
    result = run("evaluate", "--data", data[0], "--classes", data[1], *options)
    assert result.exit_code == 0, result.output
    actual = json.loads(out.read_text())
    assert (actual["photos"], actual["labelled"], actual["skipped"]) == (4, 4, 0)
    assert [row["scheme"] for row in actual["rows"]] == ["float", "int8", "paper"]
    base, fast, paper = actual["rows"]
    assert base["agreement"] == base["neighbours"] == base["top5"] == 100.0
    assert fast["cosine_mean"] > paper["cosine_mean"]
    assert f"{base['top1']:.2f}" in result.stdout and "paper" in result.stdout
    assert actual["settings"] == {"batch": 3, "limit": None, "classes": 2, "templates": 8}


def test_evaluate_says_when_no_folder_is_a_class(data: tuple[Path, Path], tmp_path: Path) -> None:
    root = folder(tmp_path / "other", classes=("x",))
    options = ("--scheme", "int8", "--no-progress")
    result = run("evaluate", "--data", root, "--classes", data[1], *options)
    assert result.exit_code == 0 and "no folder is named by a wnid" in result.stderr
    assert "paper" not in result.stdout


def test_bench(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = run("bench", "--batch", 1, "--batch", 2, "--seconds", 0.1, "--out", out)
    assert result.exit_code == 0, result.output
    actual = json.loads(out.read_text())
    variants = ["float32", "bfloat16", "int8"]
    assert [row["variant"] for row in actual["rows"]] == variants * 2
    assert [row["batch"] for row in actual["rows"]] == [1, 1, 1, 2, 2, 2]
    assert all(row["timing"]["median_ms"] > 0 for row in actual["rows"])
