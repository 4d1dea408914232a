"""What a measurement says of where it ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lraee.measurement import machine

CORES = float(len(os.sched_getaffinity(0)))
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


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, CORES),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, CORES),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 0.1),
        ({"sys/fs/cgroup/cpu.max": "100000000 100000\n"}, CORES),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, CORES),
        # a group below another that has less: the process's own line names it
        (
            {
                "proc/self/cgroup": "0::/app/worker\n",
                "sys/fs/cgroup/app/cpu.max": "70000 100000\n",
                "sys/fs/cgroup/app/worker/cpu.max": "90000 100000\n",
            },
            0.7,
        ),
        # in a container the path is the host's and not mounted
        (
            {
                "proc/self/cgroup": "0::/docker/0123\n",
                "sys/fs/cgroup/cpu.max": "60000 100000\n",
            },
            0.6,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "80000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.8,
        ),
    ],
)
def test_cpus_of_a_quota(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert machine.available_cpus(write_files(tmp_path, files)) == expected


def test_cpus_here() -> None:
    assert 0.1 <= machine.available_cpus() <= CORES


@pytest.mark.parametrize(("cpus", "expected"), [(0.1, 1), (1.5, 1), (2.0, 2), (8.0, 3)])
def test_threads_follow_the_quota_and_never_rise(
    monkeypatch: pytest.MonkeyPatch, cpus: float, expected: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "available_cpus", lambda: cpus)
    torch.set_num_threads(3)  # as OMP_NUM_THREADS=3
    try:
        assert machine.limit_threads() == torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
