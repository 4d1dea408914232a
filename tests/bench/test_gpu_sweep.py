"""The sweep of a GPU: its lines, its clock, every step without a GPU, and what is folded."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_sweep import __main__ as command
from bench.gpu_sweep import (
    compile_variants,
    equality_steps,
    fold,
    kernel_steps,
    lines,
    machine_steps,
    tower_steps,
)
from bench.gpu_sweep.lines import Results, kernels_hash, read_lines
from bench.gpu_sweep.run import Context, Item, Outcome, Step, Values, sweep
from bench.launches import Launch
from lraee.diagnostics.selftest_sizes import Target
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, pick
from lraee.kernels.measured import ANY_M, MEASURED

ROOT = Path(__file__).parents[2]
DRY = Context(Target(torch.device("cpu"), ARCHS[80]), has_compile=True)
IN_CHILDREN = ("programs", "family alone")
HEADER = ("k", "3.6.0", "a GPU")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and Inf


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "lines.jsonl", *HEADER)


def again(tmp_path: Path, *header: str) -> Results:
    return Results(tmp_path / "lines.jsonl", *(header or HEADER))


# Lines


def test_a_line_is_known_for_what_it_holds_for(results: Results, tmp_path: Path) -> None:
    results.write("step", "M=1", "a", {"us": 1.5})
    (line,) = read_lines(tmp_path / "lines.jsonl")
    assert line["us"] == 1.5 and lines.key_of(line) == (*HEADER, "step", "M=1", "a")
    assert again(tmp_path).has("step", "M=1", "a")
    assert not again(tmp_path).has("step", "M=1", "b")
    for other in (("x", *HEADER[1:]), ("k", "3.8.0", "a GPU"), ("k", "3.6.0", "another")):
        assert not again(tmp_path, *other).has("step", "M=1", "a")


def test_lines_that_are_none_are_left_out(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    results.write("step", "", "", {})
    whole = path.read_bytes()
    path.write_bytes(b'\xff\n[1]\n{}\n{"step": 3}\n' + b"[" * 10_000 + b"\n" + whole + whole[:20])
    assert len(list(read_lines(path))) == 1 and again(tmp_path).has("step", "", "")
    assert list(read_lines(tmp_path / "absent")) == []


def test_what_failed_is_tried_again(results: Results, tmp_path: Path) -> None:
    results.write("step", "", "", {"error": "x"})
    assert not results.has("step", "", "") and not again(tmp_path).has("step", "", "")
    with pytest.raises(ValueError, match="JSON"):
        results.write("step", "", "", {"us": float("nan")})


def test_measured_data_is_no_part_of_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "KERNELS", tmp_path)
    (tmp_path / "kernel.py").write_text("1")
    first = kernels_hash()
    (tmp_path / "measured.py").write_text("2")
    assert kernels_hash() == first
    (tmp_path / "kernel.py").write_text("3")
    assert kernels_hash() != first


# The loop


def run(step: Step, results: Results, seconds: float, costs: Iterator[float]) -> Outcome:
    """The loop by a clock that goes on by the next cost with each item."""
    now = [0.0]

    def clock() -> float:
        return now[0]

    def items(context: Context) -> Iterator[Item]:
        for item in step.items(context):

            def measure(item: Item = item) -> Mapping[str, Values]:
                now[0] += next(costs)
                return item.run()

            yield Item(item.shape, measure, item.variants)

    return sweep([Step(step.name, items, step.estimate_s)], DRY, results, seconds, clock)


def test_an_item_is_begun_only_if_it_fits(results: Results) -> None:
    """The longest so far is what the next is taken to need."""
    step = Step("step", lambda context: (Item(str(i), lambda: {"": {}}) for i in range(5)), 2.0)
    outcome = run(step, results, 10.0, iter([1.0, 5.0, 1.0, 1.0, 1.0]))
    assert outcome.measured == ["step 0", "step 1"]
    assert outcome.no_time == ["step 2", "step 3", "step 4"]
    outcome = run(step, results, 10.0, iter([1.0] * 3))
    assert outcome.present == ["step 0", "step 1"] and len(outcome.measured) == 3


def test_an_item_that_fails_ends_itself_alone(results: Results, tmp_path: Path) -> None:
    def broken() -> Mapping[str, Values]:
        raise RuntimeError("x\n" * 1000)

    step = Step(
        "step", lambda context: (Item("a", broken, ("u", "v")), Item("b", lambda: {"": {}}))
    )
    outcome = run(step, results, 100.0, iter([1.0, 1.0]))
    assert outcome.failed == ["step a"] and outcome.measured == ["step b"]
    errors = [line for line in read_lines(tmp_path / "lines.jsonl") if "error" in line]
    assert [line["variant"] for line in errors] == ["u", "v"]
    assert all(len(line["error"]) <= 300 for line in errors)


# Every step without a GPU

STEPS = (
    *machine_steps.STEPS, *equality_steps.STEPS, *kernel_steps.STEPS, *tower_steps.STEPS,
)  # fmt: skip


def test_every_step_runs_without_a_gpu(results: Results, tmp_path: Path) -> None:
    steps = [step for step in STEPS if step.name not in IN_CHILDREN]
    outcome = sweep(steps, DRY, results, float("inf"))
    written = list(read_lines(tmp_path / "lines.jsonl"))
    assert not outcome.failed, [line for line in written if "error" in line]
    assert {line["step"] for line in written} == {step.name for step in steps}
    for line in written:
        assert line.get("equal", True) is True and line.get("same_bits", True) is True, line
        assert line.get("same_bits_alone", True) is True, line
    compiled = [line for line in written if line["variant"] == "torch.compile"]
    assert len(compiled) == 1
    # What was measured is known to the next run, whose items are all there by their variants
    again = sweep(steps, DRY, results, float("inf"))
    assert again.measured == [] and len(again.present) == len(outcome.measured)


@pytest.mark.slow
def test_the_command_runs_whole(tmp_path: Path) -> None:
    """With the steps that start processes: compiling, tests, the first launch of each family."""
    words = [sys.executable, "-m", "bench.gpu_sweep", "--dry", "--out", str(tmp_path)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    written = list(read_lines(tmp_path / "gpu_results.jsonl"))
    assert {line["step"] for line in written} == {step.name for step in STEPS}
    (line,) = [line for line in written if line["variant"] == "compile"]
    assert line["compiled"] == 1 and line["failing"] == 0


def test_without_a_gpu_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_sweep", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        command.main()
    assert str(error.value).startswith("gpu_sweep: no CUDA device")
    assert str(error.value).endswith("--dry runs every step without a GPU")


def test_a_child_that_fails_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_steps, "TIMEOUT_S", 0.0)
    hangs = machine_steps._start(["-c", "import time; print('x'); time.sleep(60)"], {})
    fails = machine_steps._start(["-c", "print('y'); raise SystemExit(3)"], {})
    fails.process.wait()
    assert "no end within" in str(machine_steps._ended(hangs, 0.0)["error"])
    line = machine_steps._ended(fails, 0.0)
    assert line["error"] == "exit code 3" and line["tail"] == "y\n"


def test_variants_are_compiled_once() -> None:
    launches = list(compile_variants.variants(ARCHS[90], 1))
    distinct = list(compile_variants.distinct(launches))
    assert 20 < len(distinct) < 0.7 * len(launches)
    assert all(isinstance(launch, Launch) for launch in distinct)
    names = {launch.name for launch in distinct}
    assert {"int8_linear", "layer_norm_quantize", "exit_probe"} <= names


# Folding

SHAPE = Shape(6304, 768, 768)


def product(config: list[int], us: float, **changes: Any) -> dict[str, Any]:
    sizes = {"M": SHAPE.M, "N": SHAPE.N, "K": SHAPE.K}
    line = {
        "kernels": kernels_hash(), "triton": "3.6.0", "gpu": "NVIDIA H200", "step": "products",
        "shape": "s", "variant": str(config), "family": "simple", "config": config, "equal": True,
        "is_pick": False, "us": us, "p20_us": us - 0.5, "p80_us": us + 0.5, **sizes,
    }  # fmt: skip
    return line | changes


PICK = product([128, 128, 128, 8, 3, 1], 20.0, is_pick=True)
FAST, SLOW = [64, 256, 64, 8, 4, 1], [64, 64, 128, 4, 4, 1]


def won(*rows: dict[str, Any]) -> list[tuple[int, ...]]:
    timed = list(fold.timed_products([PICK, *rows], kernels_hash()))
    return [best.config for _, best in fold.winners(timed, 90).values()]


def test_the_fastest_by_more_than_the_spread_wins() -> None:
    assert won(product(FAST, 15.0), product(SLOW, 16.0)) == [tuple(FAST)]
    assert won(product(FAST, 19.5)) == []
    assert won(product([256, 256, 64, 8, 4, 1], 15.0)) == [], "it is not legal"


@pytest.mark.parametrize(
    "changes",
    [
        {"equal": False}, {"equal": 1}, {"kernels": "of others"}, {"family": "persistent"},
        {"step": "rows"}, {"us": "1"}, {"p80_us": float("inf")}, {"us": -1.0}, {"M": "6304"},
        {"M": True}, {"config": [64] * 5}, {"config": "111111"}, {"config": [64, 64, 64, 4, 4, 0]},
        {"refused": "other bits", "us": None},
    ],
)  # fmt: skip
def test_lines_that_are_not_folded(changes: dict[str, Any]) -> None:
    assert won(product(FAST, 15.0) | changes) == []


def write(path: Path, *rows: dict[str, Any]) -> Path:
    versions = {**PICK, "step": "versions", "capability": "sm_90"}
    path.write_text("\n".join([*(json.dumps(row) for row in (versions, *rows)), "{cut o"]))
    return path


def test_measured_is_rewritten_and_read_again(tmp_path: Path) -> None:
    target = tmp_path / "measured.py"
    source = fold.PATH.read_text()
    target.write_text(source)
    other = {"M": 50, "is_pick": True}
    path = write(
        tmp_path / "lines", PICK, product(FAST, 15.0), product([16, 32, 256, 4, 3, 1], 2.7, **other)
    )
    report = fold.fold_file(path, target)
    assert any("before" in row for row in report) and report[-1] == "1 of 2 shapes changed"
    scope: dict[str, Any] = {}
    exec(target.read_text(), scope)
    table = scope["MEASURED"][90]
    assert table[768, 768] == ((561, (16, 32, 256, 4, 3, 1)), (ANY_M, tuple(FAST)))
    rest = {key: rows for key, rows in MEASURED[90].items() if key != (768, 768)}
    assert {key: rows for key, rows in table.items() if key != (768, 768)} == rest
    assert target.read_text().startswith(source[:200]) and "ANY_M" in target.read_text()
    assert pick(SHAPE, ARCHS[90]) == Config(*MEASURED[90][768, 768][-1][1]), "nothing else changed"


def test_nothing_is_rewritten_where_nothing_won(tmp_path: Path) -> None:
    target = tmp_path / "measured.py"
    target.write_text("as it was")
    path = write(tmp_path / "lines", PICK, product(FAST, 19.9))
    assert fold.fold_file(path, target)[-1] == "0 of 1 shapes changed"
    assert target.read_text() == "as it was"
    with pytest.raises(SystemExit, match="no line of a product"):
        fold.fold_file(write(tmp_path / "lines", {**PICK, "kernels": "x"}), target)
    (tmp_path / "lines").write_text("")
    with pytest.raises(SystemExit, match="capability"):
        fold.fold_file(tmp_path / "lines", target)


def test_towers_stand_beside_the_account() -> None:
    line = {"step": "towers", "gpu": "NVIDIA H200", "shape": "ViT-B-16 batch 32", "ms": 3.5}
    rows = list(fold.beside_predictions([
        {**line, "variant": "lraee"}, {**line, "variant": "torch graph"},
        {**line, "variant": "torch"}, {**line, "shape": "x batch y", "variant": "lraee"},
        {**line, "gpu": "another", "variant": "lraee"},
        {**line, "ms": "x", "variant": "lraee"}, {**line, "shape": "ViT-B-16 batch x",
                                                  "variant": "lraee"},
    ]))  # fmt: skip
    assert len(rows) == 2 and all("(predicted)" in row and "| 3.5 |" in row for row in rows)
