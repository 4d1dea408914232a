"""The dose study on a small model: whole, resumed, on several threads, and from the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lraee.cli.main import app
from lraee.storage.stages import Stages
from lraee.study import command
from lraee.study.dose import schema, study
from lraee.study.dose.command import dose_study
from lraee.study.dose.protocol import Doses, parse_doses
from lraee.study.dose.schema import DoseReport
from lraee.study.page import read_doses, write_doses
from lraee.study.protocol import Protocol
from lraee.zoo.opening import Opened
from tests import dose_cells
from tests.small_calibration import small_clip
from tests.study.test_study import CLASSES, preprocess, tokenize, write_photos
from tests.support import assert_same

QUICK = Protocol(frontier_budgets=(0.9,), views=0, steps=10, lens_steps=3, sweep_points=4)
DOSES = Doses((1.0, 24.0), (0,))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "a", 50, 1)
    write_photos(folder / "b", 34, 2)
    return folder


def run(photos: Path, work: Path, doses: Doses = DOSES) -> DoseReport:
    opened = Opened("small", small_clip(), preprocess, preprocess, tokenize, CLASSES.names)
    sides = command.sides(photos / "a", photos / "b", CLASSES, limit=None)
    return dose_study(
        opened, CLASSES, sides, work=work, protocol=QUICK, doses=doses, prompts=1, progress=False
    )


def figures(report: DoseReport) -> dict[str, Any]:
    return {key: report[key] for key in ("kept", "noise", "systems", "rescue", "claims")}  # type: ignore[literal-required]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DoseReport, Path]:
    work = tmp_path_factory.mktemp("dose") / "work"
    return run(photos, work), work


def test_every_backbone_at_every_dose(whole: tuple[DoseReport, Path], tmp_path: Path) -> None:
    report, work = whole
    keys = {(row["backbone"], row["dose"]) for row in report["rescue"]}
    assert keys == {("float", 1.0), *((n, d) for n in schema.QUANTIZED for d in DOSES.scales)}
    assert len(list(work.glob("cell *"))) == 1 + 2 * 3
    assert [(kept["dose"], kept["seed"]) for kept in report["kept"]] == [(24.0, 0)]
    for kept in report["kept"]:
        assert kept["same_answers"] == kept["photos"] == 102 and kept["largest_error"] < 1e-5
    assert report["learned_from"] == 150 and report["reported_on"] == 102
    assert read_doses(write_doses(report, tmp_path)[0]) == report


def test_noise_grows_with_the_dose_alone(whole: tuple[DoseReport, Path]) -> None:
    nsr = {(n["backbone"], n["dose"]): n["blocks"][-1]["nsr"] for n in whole[0]["noise"]}
    assert nsr["paper", 24.0] > 2.0 * nsr["paper", 1.0]
    assert nsr["int8-calibrated", 24.0] < nsr["paper", 24.0]


class Counted:
    """Stands in for the measurement of cells, and may be cut off in one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut_off_in: int | None = None) -> None:
        self.forms: list[tuple[str, float, int]] = []
        self.cells: list[tuple[str, float, int]] = []
        self._cut_off_in = cut_off_in
        monkeypatch.setattr(study.DoseStudy, "_form", lambda _, part: self.form(part))
        monkeypatch.setattr(study, "measure", self.measure)

    def form(self, part: Any) -> Any:
        self.forms.append((part.name, part.dose, part.channels_seed))
        return part

    def measure(self, part: Any, protocol: Protocol, seed: int) -> dict[str, torch.Tensor]:
        self.cells.append((part.name, part.dose, seed))
        if len(self.cells) == self._cut_off_in:
            raise KeyboardInterrupt
        return dose_cells.cell(part.name, part.dose, seed)


MANY = Doses((1.0, 8.0, 24.0), (0, 1))


def test_a_run_cut_off_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run measures what is missing and nothing else."""
    first = Counted(monkeypatch, cut_off_in=5)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "work", MANY)
    kept = len(list((tmp_path / "work").glob("cell *")))
    assert 4 <= kept == len(first.cells) - 1
    second = Counted(monkeypatch)
    report = run(photos, tmp_path / "work", MANY)
    assert len(second.cells) == 2 + 2 * 3 * 3 - kept
    again = Counted(monkeypatch)
    assert figures(run(photos, tmp_path / "work", MANY)) == figures(report)
    assert not again.forms and not again.cells
    fewer = run(photos, tmp_path / "work", Doses((24.0,), (1,)))
    assert fewer["seeds"] == [1] and not again.cells


def test_seeds_share_the_forms_that_do_not_depend_on_channels(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    run(photos, tmp_path / "work", MANY)
    assert sorted(counted.forms) == sorted(
        [(name, 1.0, 0) for name in ("float", *schema.QUANTIZED)]
        + [(n, dose, seed) for n in schema.QUANTIZED for dose in (8.0, 24.0) for seed in (0, 1)]
    )


def test_threads_do_not_change_bits(
    whole: tuple[DoseReport, Path], photos: Path, tmp_path: Path
) -> None:
    threads, doses = torch.get_num_threads(), Doses((24.0,), (0,))
    torch.set_num_threads(2)
    try:
        run(photos, tmp_path / "work", doses)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for path in (tmp_path / "work").glob("cell *"):
        cells = [Stages.get(_stages(folder), path.stem, dict) for folder in (path.parent, whole[1])]
        for name in cells[0].keys() - {"seconds"}:
            assert_same(cells[0][name], cells[1][name], name=name)


def _stages(folder: Path) -> Stages:
    stages = Stages(None, None)
    stages._folder = folder
    return stages


def test_doses_are_parsed_strictly() -> None:
    assert parse_doses("8,1, 24,8") == (1.0, 8.0, 24.0)
    for text in ("", "1,,2", "0.5", "nan", "inf", "a"):
        with pytest.raises(ValueError, match="dose must be finite numbers of at least 1"):
            parse_doses(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--reduced",), "--reduced must come with"), (("--dose", "1,x"), "dose must be finite")],
)
def test_the_command_refuses(photos: Path, options: tuple[str, ...], message: str) -> None:
    classes = photos / "classes.json"
    classes.write_text('{"wnids": ["n1", "n2", "n3"], "names": ["cat", "dog", "owl"]}')
    given = ("--data", str(photos / "a"), "--classes", str(classes), *options)
    result = CliRunner().invoke(app, ["report", *given], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and message in result.output
