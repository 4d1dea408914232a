"""`lraee tune` in the interpreter: layers, epilogues, checks before times, who wins, the table."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from lraee.cli import main as cli
from lraee.diagnostics import product_families as families
from lraee.diagnostics import tune_run, tuning
from lraee.diagnostics.selftest_sizes import Target
from lraee.diagnostics.tuned_layers import Epilogue, Operands, TunedLayer, tuned_tower
from lraee.diagnostics.tuning import Effort, TimedConfig, Tuned, tune
from lraee.kernels import first_use, user_cache
from lraee.kernels import tuned as tuned_table
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, legal, pick
from lraee.measurement.timing import Timing
from lraee.towers.families import find_tower
from lraee.zoo.opening import open_model
from tests.clip_models import make_model

CPU = torch.device("cpu")
TARGET = Target(CPU, ARCHS[80])
LAYER = TunedLayer(40, 96, Epilogue("gelu", has_residual=True, has_layer_scale=True))
FEW = Effort(batches=(1,), copies=2, most=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    tuned_table.table.cache_clear()
    pick.cache_clear()
    return tmp_path


def clock(
    ms_of: Callable[[str], float], spread: float = 0.0
) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, list[float]]]:
    """Rounds that call each variant once and give it the time of its name, five times."""

    def rounds(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {
            name: [1e-3 * ms_of(name) * (1 + spread * i) for i in (-2, -1, 0, 1, 2)]
            for name in calls
        }

    return rounds


def tuned(rounds: Any, **options: Any) -> list[Tuned]:
    return list(tune([LAYER], 5, TARGET, rounds, effort=FEW, **options))


def a_rival() -> Any:
    """A candidate that is tried and is not the pick."""
    shape = Shape(5, 40, 96)
    some = families.FAMILIES[0].candidates(shape, TARGET.arch, FEW.most, adds=False)
    return next(config for config in some if config != pick(shape, TARGET.arch))


def test_layers_of_a_tower_have_its_epilogues() -> None:
    tower = tuned_tower(find_tower(make_model()))
    names = [layer.epilogue.name for layer in tower.layers]
    assert names == ["none", "none+residual", "gelu", "none+residual"]
    assert {layer.count for layer in tower.layers} == {tower.depth}
    first = tower.layers[0]
    assert (first.N, first.K) == (3 * tower.D, tower.D)
    assert Epilogue("gelu", True, True).name == "gelu+layer_scale+residual"
    key = tuned_tower(find_tower(open_model("lraee-tiny").model)).key
    assert key == "L=50 D=192 blocks=12"


def test_operands_have_every_part_of_the_epilogue() -> None:
    given = Operands.of(LAYER, 5, 2, torch.float16, CPU)
    assert given.options["residual"].shape == (5, 40)
    assert given.options["out_dtype"] == torch.float16
    for linear in given.linears:
        assert linear.bias is not None and linear.layer_scale is not None
    assert given.x[2].unique().numel() > 1 and len(given.linears) == 2


def test_the_pick_stays_where_all_take_the_same_time() -> None:
    (one,) = tuned(clock(lambda name: 8.0))
    chosen = pick(Shape(5, 40, 96), TARGET.arch)
    assert one.best is one.pick and not one.is_faster
    assert one.pick.config == families.numbers(chosen)
    assert one.pick.timing is not None and one.pick.timing.median_ms == pytest.approx(4.0)


def test_a_faster_config_wins_by_more_than_the_spread() -> None:
    rival = a_rival()

    def ms(name: str) -> float:
        return 6.0 if name == str(rival) else 8.0

    (one,) = tuned(clock(ms))
    assert one.is_faster and one.best.config == families.numbers(rival)
    (noisy,) = tuned(clock(ms, spread=0.2))
    assert not noisy.is_faster


def test_other_bits_are_refused_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    product, wrong = tuning.product, a_rival()
    timed: list[str] = []

    def wrong_product(given: Operands, config: Any) -> Tensor:
        y = product(given, config)
        return y + 1 if config == wrong else y

    def rounds(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        timed.extend(calls)
        return clock(lambda name: 1.0)(calls)

    monkeypatch.setattr(tuning, "product", wrong_product)
    (one,) = tuned(rounds)
    (refused,) = [each for each in one.tried if each.error is not None]
    assert refused.config == families.numbers(wrong) and refused.timing is None
    assert refused.error == "other bits than the kernel that runs now"
    assert str(wrong) not in timed


def test_what_runs_now_must_be_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    product = tuning.product
    monkeypatch.setattr(tuning, "product", lambda given, config: product(given, config) + 1)
    with pytest.raises(AssertionError, match="Shape"):
        tuned(clock(lambda name: 1.0))


def test_a_shape_that_does_not_fit_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def rounds(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        raise torch.cuda.OutOfMemoryError("x")

    assert tuned(rounds) == []
    assert caplog.messages == ["tune: M=5 N=40 K=96 needs more memory than is free"]


def test_no_budget_no_work() -> None:
    assert tuned(clock(lambda name: 1.0), budget_s=0.0) == []


def fresh_space(shape: Shape, arch: Any) -> Any:
    return (replace(config, family="fresh") for config in families.simple_space(shape, arch))


def test_a_new_family_is_launched_elsewhere_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails there is refused with the reason, and what runs now stays."""
    simple = families.FAMILIES[0]
    fresh = replace(simple, name="fresh", is_proven=False, space=fresh_space)
    monkeypatch.setattr(families, "FAMILIES", (simple, fresh))
    reasons = {"fresh": "no end within 90 s"}
    monkeypatch.setattr(families, "failure", lambda family, target: reasons.get(family.name))
    (one,) = tuned(clock(lambda name: 1.0))
    refused = [each for each in one.tried if each.family == "fresh"]
    assert refused and all(each.error == "no end within 90 s" for each in refused)


def test_a_check_is_made_once_where_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(family: str, gpu: str, index: int) -> Any:
        checked.append((family, gpu, index))
        return first_use.Verdict(False, "no end")

    monkeypatch.setattr(families.device, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(first_use, "check", check)
    simple, persistent, _ = families.FAMILIES
    assert families.failure(simple, TARGET) is None and not checked
    assert families.failure(persistent, TARGET) == "no end" and len(checked) == 1
    monkeypatch.setattr(first_use, "stored", lambda *key: first_use.Verdict(True, ""))
    assert families.failure(persistent, TARGET) is None and len(checked) == 1


def test_space_holds_legal_configs_and_what_pick_would_choose() -> None:
    for shape in (Shape(50, 768, 768), Shape(1600, 3072, 768)):
        configs = list(families.simple_space(shape, TARGET.arch))
        assert len(configs) > 50
        assert all(legal(config, shape, TARGET.arch) for config in configs)
        assert pick(shape, TARGET.arch) in configs


def timed(us: float, config: Config) -> TimedConfig:
    return TimedConfig("simple", families.numbers(config), Timing(us / 1e3, us / 1e3, us / 1e3))


def test_rows_of_the_table_reach_half_way_to_the_next() -> None:
    some, other = Config(16, 64, 128, 4, 4), Config(64, 32, 128, 4, 4, split_k=2)
    shapes = [
        Tuned(LAYER, M, timed(us + 1, other), timed(us, some), ())
        for M, us in ((1600, 9.0), (50, 3.0))
    ]
    rows = tuning.table_rows(shapes)
    assert [row["most_m"] for row in rows] == [282, tuning.ANY_M]
    assert [row["us"] for row in rows] == [3.0, 9.0]
    assert rows[0]["config"] == [16, 64, 128, 4, 4, 1] and rows[0]["N"] == 40
    assert rows[0]["epilogue"] == "gelu+layer_scale+residual"
    assert Config(*rows[0]["config"]) == some


def test_the_table_keeps_other_shapes_of_this_gpu_alone(cache: Path) -> None:
    one = Tuned(LAYER, 50, timed(1, Config(16, 64, 128, 4, 4)), timed(1, Config(16, 64, 128, 4, 4)), ())  # fmt: skip  # noqa: E501
    other = replace(one, layer=replace(LAYER, N=64))
    tune_run._store_tilings("a GPU", (one,))
    tune_run._store_tilings("a GPU", (other,))
    tune_run._store_tilings("a GPU", (one,))
    table = user_cache.read("tilings")
    assert table is not None and [row["N"] for row in table["rows"]] == [64, 40]
    tune_run._store_tilings("another GPU", (one,))
    table = user_cache.read("tilings")
    assert table is not None and [row["N"] for row in table["rows"]] == [40]
    assert table["gpu"] == "another GPU" and table["triton"]


def test_pick_reads_what_tune_writes() -> None:
    gpu, other = "a GPU", Config(32, 32, 64, 4, 3)
    tune_run._store_tilings(gpu, (Tuned(LAYER, 50, timed(2, other), timed(1, other), ()),))
    assert pick(Shape(77, 40, 96), TARGET.arch, LAYER.epilogue.name, gpu) == other
    assert pick(Shape(77, 40, 96), TARGET.arch, "none", gpu) != other
    assert tuned_table.reason(gpu) is None


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])


def test_the_command_runs_every_step_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    result = run("--model", "lraee-tiny", "--device", "interpreter", "--json-out", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert [shape["epilogue"] for shape in report["shapes"]].count("none+residual") == 2
    assert [row["batch"] for row in report["towers"]] == [1]
    assert "no time of the interpreter means anything" in result.stdout
    assert not (tmp_path / "kernels").exists(), "nothing is stored"


def test_without_a_gpu_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--model", "lraee-tiny")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("lraee: error: tune: no CUDA device")


def test_help_has_an_example() -> None:
    assert "Example: lraee tune" in run("--help").stdout.replace("`", "")
