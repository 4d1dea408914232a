"""`lraee selftest` in the interpreter: what it compares, reports and refuses, and how it times."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from lraee.cli import main as cli
from lraee.cli import tables
from lraee.diagnostics import guarded_memory as poison
from lraee.diagnostics import (
    interpreter,
    selftest,
    selftest_cases,
    selftest_results,
    selftest_sizes,
)
from lraee.diagnostics import selftest_timing as selftest_time
from lraee.diagnostics.interpreter import Device
from lraee.diagnostics.selftest_sizes import FULL, QUICK, TINY, Sizes, Target
from lraee.kernels import configs, int8_linear, register
from lraee.kernels.archs import ARCHS
from lraee.kernels.measured import MEASURED
from lraee.ops import error_bounds as bounds
from tests.clip_models import make_model

CPU = torch.device("cpu")
TARGET = Target(CPU, ARCHS[90])
FEW = Sizes(
    rows=(3,), layers=((20, 40),), widths=(9,), attention=((1, 5, 1, 8),),
    probes=((2, 4, 16, 8, 12, 5),),
)  # fmt: skip
SMALL = selftest_time.Tower("tiny", L=20, D=64, H=2, layers=1, E=16, K=20)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["selftest", *map(str, arguments)])


def one_line(result: Result) -> str:
    """The error of a run that could not be done: exit code 1, one line, no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lraee: error: ")
    return lines[0]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_sizes, "TINY", FEW)


def test_every_case_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "new" / "selftest.json"
    result = run("--device", "interpreter", "--json-out", out, "--no-progress")
    assert result.exit_code == 0, result.output
    actual = json.loads(out.read_text())
    assert actual["schema"] == "lraee.selftest/1" and actual["is_ok"] and actual["times"] == []
    assert {"machine", "versions", "command", "device", "gpu"} <= actual.keys()
    assert [row for row in actual["rows"] if row["difference"] is not None] == []
    cases = list(selftest_cases.cases(Target(CPU, ARCHS[80]), TINY))
    assert [(r["kernel"], r["config"], r["shape"]) for r in actual["rows"]] == [
        (case.kernel, case.config, case.shape) for case in cases
    ]
    assert "no timings" in result.stdout and str(out) in result.stdout.replace("\n", "")
    assert "first difference" not in result.stdout


@pytest.mark.parametrize("capability", ARCHS)
@pytest.mark.parametrize("sizes", [FULL, QUICK], ids=["full", "quick"])
def test_every_config_and_every_part_of_the_epilogue_has_a_case(
    capability: int, sizes: Sizes
) -> None:
    cases = list(selftest_cases.cases(Target(CPU, ARCHS[capability]), sizes))
    of_kernel = Counter(case.kernel for case in cases)
    extra = {"int8_linear_quantized"}
    assert {*register.LAUNCHERS, *extra} <= of_kernel.keys()
    assert len(cases) == len({(case.kernel, case.config, case.shape) for case in cases})
    linears = [case for case in cases if case.kernel == "int8_linear"]
    labels = {selftest_results.label(row) for b in configs.TABLE[capability] for row in b}
    for rows in MEASURED.get(capability, {}).values():
        labels |= {selftest_results.label(configs.Config(*numbers)) for _, numbers in rows}
    assert labels == {case.config for case in linears}
    parts = {part for case in linears for part in case.shape.split()[3:]}
    names = {"x_zero", "bias", "layer_scale", "residual"}
    assert parts == names | {*selftest_cases.ACTIVATIONS, "float32", "bfloat16", "float16"}
    for name in names:
        assert any(name not in case.shape for case in linears)
    shapes = " / ".join(case.shape for case in cases)
    for text in (
        "causal",
        "class token",
        "one layer",
        "H=",
        "rope",
        " symmetric",
        "asymmetric",
    ):
        assert text in shapes


def test_a_kernel_that_differs_is_reported(
    few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = int8_linear.int8_linear

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        y: Tensor = right(*arguments, **options)
        y[-1, 3] += 1
        return y

    monkeypatch.setattr(int8_linear, "int8_linear", wrong)
    out = tmp_path / "selftest.json"
    result = run("--device", "interpreter", "--json-out", out, "--no-progress")
    assert result.exit_code == 1 and "first difference" in result.stdout
    actual = json.loads(out.read_text())
    assert not actual["is_ok"]
    # A block has its own hold of the right one, and no longer gives what its operators give
    differ = {row["kernel"] for row in actual["rows"] if row["difference"]}
    assert differ == {"int8_linear", "int8_block"}
    assert all(
        row["difference"].startswith("y: 1 of 60 differ, first at [2, 3]: ")
        for row in actual["rows"]
        if row["kernel"] == "int8_linear"
    )


def test_a_kernel_that_raises_is_reported_and_the_rest_runs(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of resources:\n  shared memory")

    monkeypatch.setattr(int8_linear, "int8_linear_quantized", fails)
    rows = list(selftest.run(TARGET, FEW))
    failed = [row for row in rows if row.difference is not None]
    assert {row.kernel for row in failed} == {"int8_linear_quantized"}
    assert failed[0].difference == "RuntimeError: out of resources: shared memory"
    assert rows[-1].kernel == "exit_probe" and rows[-1].difference is None


def test_nothing_runs_on_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "int8_linear", lambda *_, **__: torch.zeros(3, 20))
    monkeypatch.setattr(selftest, "_is_lost", lambda device: True)
    differences = [row.difference for row in selftest.run(TARGET, FEW)]
    first = next(i for i, result in enumerate(differences) if result is not None)
    assert set(differences[first + 1 :]) == {"not run: the device failed before"}


def test_a_store_out_of_bounds_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    right = int8_linear.int8_linear

    def strays(*arguments: Any, **options: Any) -> Tensor:
        y: Tensor = right(*arguments, **options)
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
        return y

    monkeypatch.setattr(int8_linear, "int8_linear", strays)
    rows = [row for row in selftest.run(TARGET, FEW) if row.kernel == "int8_linear"]
    assert {row.difference for row in rows} == {"AssertionError: stored out of bounds"}


def test_a_workspace_that_is_left_dirty_is_a_difference() -> None:
    config = configs.Config(16, 32, 32, num_warps=4, num_stages=2, split_k=2)
    space = selftest_cases._space(3, 20, config, CPU)
    assert space is not None and space.partials.shape == (2 * 16 * 32,)
    assert selftest_cases._space_difference(space) is None
    space.tickets[0] = 1
    assert "tickets are not zero" in str(selftest_cases._space_difference(space))
    space.partials.as_strided((1,), (1,), poison.PAD - 1).zero_()
    assert selftest_cases._space_difference(space) == "workspace: stored out of bounds"


def test_first_difference() -> None:
    nan = float("nan")
    x = torch.tensor([1.0, nan, 3.0])
    assert bounds.first_difference(x, x.clone()) is None
    assert bounds.first_difference(x, torch.tensor([1.0, nan, 3.5]), 0.5) is None
    assert bounds.first_difference(x, torch.tensor([1.0, nan, 3.5]), torch.tensor(0.4)) == (
        "1 of 3 differ, first at [2]: 3.0 instead of 3.5, allowed 0.4"
    )
    assert bounds.first_difference(x, torch.tensor([1.0, 2.0, 3.0]), 9.0) == (
        "1 of 3 differ, first at [1]: nan instead of 2.0, allowed 9"
    )
    assert bounds.first_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == (
        "1 of 2 differ, first at [1]: 2 instead of 3"
    )
    assert bounds.first_difference(x, x.double()) == (
        "torch.float32 [3] instead of torch.float64 [3]"
    )


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "selftest: no CUDA device" in one_line(run())


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "triton issue 9349"), ((10, 3), "fp16 is faster there"), ((13, 0), "not in the")],
)
def test_parts_without_an_int8_path_are_one_line(
    capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    line = one_line(run("--device", "cuda"))
    assert f"sm_{capability[0]}{capability[1]}" in line and reason in line


def test_the_wrong_mode_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "TRITON_INTERPRET must not be set with --device cuda" in one_line(run())
    monkeypatch.setattr(register, "is_interpreted", lambda: False)
    line = one_line(run("--device", "interpreter"))
    assert "must be set before triton is imported" in line


def test_an_unknown_device_is_wrong_usage() -> None:
    assert run("--device", "tpu").exit_code == 2


def test_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0 and "lraee selftest --device cuda" in result.stdout


def test_the_command_chooses_the_interpreter_by_itself(tmp_path: Path) -> None:
    code = (
        "from lraee.cli import main as cli\n"
        "run = cli.app\n"
        "def with_tiny_sizes():\n"
        "    from lraee.diagnostics import selftest_cases as c\n"
        "    c.TINY = c.Sizes((3,), ((20, 40),), (9,), ((1, 5, 1, 8),), ((2, 4, 16, 8, 12, 5),))\n"
        "    run()\n"
        "cli.app = with_tiny_sizes\n"
        "cli.main()"
    )
    environment = {name: v for name, v in os.environ.items() if name != interpreter.VARIABLE}
    command = [sys.executable, "-c", code, "selftest", "--device", "interpreter", "--no-progress"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Triton's interpreter, configs of sm_80" in result.stdout and result.stderr == ""


def test_an_installation_without_triton_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "unavailable_reason", lambda: "triton cannot be imported: no")
    devices: tuple[Device, ...] = ("cuda", "interpreter")
    for device in devices:
        assert "selftest: triton cannot be imported: no" in one_line(run("--device", device))


# Times, by the CPU's clock


def small_contests() -> list[selftest_time.Contest]:
    tower = selftest_time.tower_contest(
        CPU, lambda: make_model().get_submodule("visual").half(), 2, compiled=lambda module: module
    )
    return [
        selftest_time.linear_contest(CPU, SMALL, "attn.out", 20, 64, 64),
        selftest_time.attention_contest(CPU, SMALL, 1),
        selftest_time.probe_contest(CPU, SMALL, 1),
        tower,
    ]


def test_every_contest_is_held() -> None:
    variants = {
        "int8_linear": ["lraee int8", "torch float16", "torch._int_mm"],
        "int8_attention": ["lraee int8", "torch SDPA float16"],
        "exit_probe": ["lraee int8", "torch float16"],
        "tower": [
            "lraee int8", "torch float16", "torch float16, compiled",
            "lraee int8, graph", "torch float16, graph",
        ],
    }  # fmt: skip
    for contest in small_contests():
        rows = selftest_time.hold(contest, selftest_time.cpu_interleaved)
        assert [row.error for row in rows] == [None] * len(rows)
        assert [row.variant for row in rows] == variants[contest.kernel]
        assert rows[0].speedup == 1.0 and all(row.timing is not None for row in rows)


def test_variants_of_a_contest_agree() -> None:
    """What is timed side by side computes the same thing, in int8 and in float16."""
    linear, attention, probe, tower = small_contests()
    with torch.inference_mode():
        calls = attention.make()
        ours, theirs = (calls[name]() for name in calls)
        assert torch.allclose(ours, theirs, atol=0.05)
        calls = probe.make()
        ours, theirs = (calls[name]() for name in calls)
        cosine = torch.cosine_similarity(ours[0], theirs[0].float(), dim=1)  # type: ignore[index]
        assert (cosine > 0.99).all()
        calls = tower.make()
        y = [calls[name]().float() for name in calls]  # type: ignore[attr-defined]
        for other in y[1:]:
            assert (torch.cosine_similarity(y[0], other, dim=1) > 0.99).all()


def test_a_contest_that_fails_is_a_row() -> None:
    def make() -> dict[str, selftest_time.Call]:
        raise RuntimeError("no memory")

    broken = selftest_time.Contest("tower", "batch 1", 1, make)
    (row,) = selftest_time.hold(broken, selftest_time.cpu_interleaved)
    assert row.error == "RuntimeError: no memory" and row.timing is None


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_time, "contests", lambda device, tower: iter(small_contests()))
    monkeypatch.setattr(
        selftest_time, "cuda_interleaved",
        lambda variants, device, budget_s: selftest_time.cpu_interleaved(variants),
    )  # fmt: skip
    rows = selftest_time.measure(CPU, {"int8_linear"}, progress=False)
    refused = {row.kernel for row in rows if row.error is not None}
    assert refused == {"int8_linear", "tower"}
    table = tables.of_selftest({"rows": [], "times": [selftest.asdict(row) for row in rows]})
    assert next(table).row_count == 0 and next(table).row_count == len(rows)


def test_contests_of_the_real_tower() -> None:
    """Building the list runs nothing."""
    contests = list(selftest_time.contests(CPU, selftest_time.B32))
    shapes = [contest.shape for contest in contests if contest.kernel == "int8_linear"]
    assert shapes[0] == "ViT-B-32 attn.qkv M=50 N=2304 K=768"
    assert shapes[-1] == "ViT-B-32 mlp.fc2 M=1600 N=768 K=3072"
    assert [contest.calls for contest in contests[:4]] == [48, 144, 36, 36]
    assert Counter(contest.kernel for contest in contests) == {
        "int8_linear": 8, "int8_attention": 2, "exit_probe": 2, "tower": 3,
    }  # fmt: skip
