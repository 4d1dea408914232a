"""What a measurement says of where it ran."""

import subprocess
import sys
from pathlib import Path

from lraee.measurement import machine

PRINTS = "from lraee.measurement import machine; print(machine.describe()['command'])"


def command_of(*words: str, cwd: Path) -> str:
    ran = subprocess.run([sys.executable, *words], cwd=cwd, check=True, text=True, stdout=-1)
    return ran.stdout.strip()


def test_the_command_names_module_or_script_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "measure.py").write_text(PRINTS)
    photos = str(tmp_path / "photos.zip")
    assert command_of("-m", "measure", photos, "--fast", cwd=tmp_path) == (
        "python -m measure photos.zip --fast"
    )
    assert command_of(str(tmp_path / "measure.py"), photos, cwd=tmp_path) == "measure.py photos.zip"


def test_what_is_described_is_in_words() -> None:
    facts = machine.describe()
    assert set(facts) == {"machine", "operators", "threads", "versions", "command"}
    assert all(facts.values())
