"""Stages of long work: kept, made again where damaged, and never at the cost of others' files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lraee.storage.stages import Stages
from tests.support import assert_same, generator

SETTINGS = {"seed": 0, "recipe": {"steps": 3}}


class Maker:
    """Makes a stage, and counts how often it had to."""

    def __init__(self, seed: int = 0) -> None:
        self.calls, self.seed = 0, seed

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        x = torch.randn(4, 6, generator=generator(self.seed))
        labels = torch.tensor([3, -1])
        return {"x": x.T, "half": x.bfloat16(), "labels": labels, "none": torch.empty(0, 5)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_stage(found: dict[str, Tensor], seed: int = 0) -> None:
    expected = Maker(seed)()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor, name=name)


def test_without_a_folder_everything_is_made_anew() -> None:
    make, stages = Maker(), Stages(None, SETTINGS)
    for _ in range(2):
        assert_stage(stages.get("a", make))
    stages.clear()
    assert make.calls == 2


def test_a_later_run_takes_what_an_earlier_one_made(tmp_path: Path) -> None:
    folder, make = tmp_path / "new" / "run", Maker()
    assert_stage(Stages(folder, SETTINGS).get("head 3", make))
    later = Stages(folder, dict(reversed(SETTINGS.items())))
    assert_stage(later.get("head 3", make))
    assert make.calls == 1
    assert_stage(later.get("head 4", Maker(7)), seed=7)
    later.clear()
    assert not folder.exists() and folder.parent.is_dir()
    later.clear()  # nothing is left to remove


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    Stages(tmp_path, SETTINGS).get("a", Maker())
    assert names(tmp_path) == ["a.safetensors", "run"]


@pytest.mark.parametrize("settings", [{**SETTINGS, "seed": 1}, {}, None])
def test_stages_of_other_settings_are_removed(tmp_path: Path, settings: object) -> None:
    Stages(tmp_path, SETTINGS).get("a", Maker())
    make = Maker(1)
    other = Stages(tmp_path, settings)
    assert names(tmp_path) == ["run"]
    assert_stage(other.get("a", make), seed=1)
    assert_stage(Stages(tmp_path, settings).get("a", make), seed=1)
    assert make.calls == 1


@pytest.mark.parametrize("damage", ["cut off", "flipped", "empty", "broken link", "link"])
def test_a_damaged_stage_is_made_again(tmp_path: Path, damage: str) -> None:
    """Under its name; the file that a link there points to is left alone."""
    make, stages = Maker(), Stages(tmp_path / "run", SETTINGS)
    stages.get("a", make)
    path, elsewhere = tmp_path / "run" / "a.safetensors", tmp_path / "elsewhere"
    data = path.read_bytes()
    damaged = {"cut off": data[:-1], "flipped": b"\xff" + data[1:]}.get(damage, b"")
    if "link" in damage:
        path.unlink()
        path.symlink_to(elsewhere)
    if damage == "link":
        elsewhere.write_bytes(damaged)
    elif damage != "broken link":
        path.write_bytes(damaged)
    assert_stage(stages.get("a", make))
    assert make.calls == 2 and path.read_bytes() == data and not path.is_symlink()
    assert elsewhere.exists() == (damage == "link")


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    stages = Stages(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        stages.get("a", fail)
    assert names(tmp_path) == ["run"]
    assert_stage(stages.get("a", Maker()))


# Folders of others


FOREIGN: dict[str, dict[str, str]] = {
    "photos": {"cat.jpg": "a photo"},
    "weights": {"model.safetensors": "weights of another program"},
    "hidden": {".bashrc": "alias"},
    "some mark": {"run": "#!/bin/sh\necho run\n", "model.safetensors": "weights"},
    "long mark": {"run": "0123456789abcdef" * 4 + "\n"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_of_others_is_refused_and_left_alone(tmp_path: Path, case: str) -> None:
    for name, text in FOREIGN[case].items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="^calibrate: folder must be new, empty, or left by a run"):
        Stages(tmp_path, SETTINGS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == FOREIGN[case]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(ValueError, match="^calibrate: folder must be a folder, got the file"):
        Stages(path, SETTINGS)
    assert path.read_text() == "text"


def test_files_that_were_put_beside_the_stages_stay(tmp_path: Path) -> None:
    """Both when other settings remove the stages and when the run is through."""
    folder = tmp_path / "run"
    Stages(folder, SETTINGS).get("a", Maker())
    (folder / "notes.txt").write_text("mine")
    (folder / "photos").mkdir()
    other = Stages(folder, {})
    assert names(folder) == ["notes.txt", "photos", "run"]
    other.get("a", Maker())
    other.clear()
    assert names(folder) == ["notes.txt", "photos"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_a_cut_off_write_left_is_removed(tmp_path: Path) -> None:
    """A run may have died before its mark was there, or in the middle of a stage."""
    (tmp_path / ".run.0123456789abcdef.tmp").write_text("")
    stages = Stages(tmp_path, SETTINGS)
    (tmp_path / ".a.safetensors.0123456789abcdef.tmp").write_text("half")
    stages.get("b", Maker())
    stages.clear()
    assert not tmp_path.exists()


def test_a_linked_folder_is_used_through_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    stages = Stages(tmp_path / "link", SETTINGS)
    stages.get("a", Maker())
    assert names(tmp_path / "disk") == ["a.safetensors", "run"]
    stages.clear()
    assert names(tmp_path / "disk") == []
