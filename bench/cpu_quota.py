"""A CPU quota for one process, as a container has it, through a cgroup; needs root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PERIOD_US = 100_000
_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def quota(cores: float) -> Iterator[Path]:
    """A cgroup (v1 or v2) of so many cores; a process joins by its id in `cgroup.procs` there.

    Raises: OSError where no cgroup can be made.
    """
    limit_us = round(cores * _PERIOD_US)
    is_v1 = (_ROOT / "cpu" / "cpu.cfs_quota_us").exists()
    group = (_ROOT / "cpu" if is_v1 else _ROOT) / f"lraee-{os.getpid()}"
    group.mkdir()
    try:
        if is_v1:
            (group / "cpu.cfs_quota_us").write_text(str(limit_us))
        else:
            (group / "cpu.max").write_text(f"{limit_us} {_PERIOD_US}")
        yield group
    finally:
        group.rmdir()


def throttled(group: Path) -> tuple[int, int]:
    """Periods of 100 ms in which the group ran, and those in which it was stopped for the rest."""
    rows = dict(row.split() for row in (group / "cpu.stat").read_text().splitlines())
    return int(rows["nr_periods"]), int(rows["nr_throttled"])
