"""Both bounds of each dependency are declared, and the lock of CI keeps them."""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
USERS = ("calibrate", "report", "embed", "serve", "search")
"""What `make test-oldest` runs with, beside the dependencies of all."""

NO_UPPER_BOUND = {"pyarrow", "setuptools"}
"""A major version every few months, of which none broke what is used here."""

WITH_TORCH = {"torch", "triton"}
"""Built for each other: test-oldest takes those of the environment."""


def _requirements(rows: Iterable[str]) -> Iterator[Requirement]:
    """The rows, and those of the extras that they name."""
    for requirement in map(Requirement, rows):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                yield from _requirements(EXTRAS[extra])
        else:
            yield requirement


def _pins(name: str) -> dict[str, list[Requirement]]:
    """The pins of a file of requirements/; several where they differ by the Python version."""
    pins: dict[str, list[Requirement]] = {}
    for row in (ROOT / "requirements" / name).read_text().splitlines():
        pin = Requirement(row)
        assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), row
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


def _of_users() -> list[Requirement]:
    rows = [*PROJECT["dependencies"], *(row for name in USERS for row in EXTRAS[name])]
    return list(_requirements(rows))


def _bound(requirement: Requirement, operator: str) -> str | None:
    return next((s.version for s in requirement.specifier if s.operator == operator), None)


@pytest.mark.parametrize("extra", ["", "dev"])
def test_the_lock_satisfies_what_is_declared(extra: str) -> None:
    lock = _pins("ci.txt")
    rows = EXTRAS[extra] if extra else PROJECT["dependencies"]
    for requirement in _requirements(rows):
        pins = lock.get(canonicalize_name(requirement.name))
        assert pins, f"{requirement} must be in requirements/ci.txt: make lock"
        for pin in pins:
            (locked,) = pin.specifier
            assert locked.version in requirement.specifier, f"{pin}, {requirement}: make lock"


def test_each_dependency_of_users_has_both_bounds() -> None:
    for requirement in _of_users():
        assert _bound(requirement, ">="), requirement
        name = canonicalize_name(requirement.name)
        assert _bound(requirement, "<") or name in NO_UPPER_BOUND, requirement


def test_the_oldest_releases_are_the_lower_bounds() -> None:
    bounds = {
        canonicalize_name(each.name): f"=={_bound(each, '>=')}" for each in _of_users()
    }  # fmt: skip
    pins = {name: str(pin.specifier) for name, (pin,) in _pins("oldest.txt").items()}
    expected = {name: pin for name, pin in bounds.items() if name not in WITH_TORCH}
    assert {name: _padded(pin) for name, pin in pins.items()} == {
        name: _padded(pin) for name, pin in expected.items()
    }


def _padded(pin: str) -> str:
    """3.0 is 3.0.0."""
    return pin + ".0" * (2 - pin.count("."))


def test_the_installed_releases_are_within_the_bounds() -> None:
    for requirement in _of_users():
        if requirement.marker is None or requirement.marker.evaluate():
            assert version(requirement.name) in requirement.specifier, requirement


def test_the_oldest_job_imports_the_oldest_releases() -> None:
    if not any(Path(folder).name == "oldest" for folder in sys.path):
        pytest.skip("runs in `make test-oldest`")
    for name, (pin,) in _pins("oldest.txt").items():
        assert version(name) in pin.specifier, name
