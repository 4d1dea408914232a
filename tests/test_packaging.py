"""Set-up says what is missing before it downloads; sdist and wheel hold what they must."""

import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"

SMOKE = """
import pathlib, sys
import torch, lraee, lraee.kernels
from lraee.ops import registry
from lraee import zoo
home = pathlib.Path(sys.argv[1])
assert home in pathlib.Path(lraee.__file__).parents, lraee.__file__
assert home in pathlib.Path(lraee.kernels.__file__).parents, lraee.kernels.__file__
assert registry.CPU_EXTENSION_ERROR is None, registry.CPU_EXTENSION_ERROR
model, preprocess, tokenizer = zoo.load("lraee-tiny")
fast = lraee.accelerate(model)
images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    one, other = (m.encode_image(images, normalize=True) for m in (model, fast))
cosine = (one * other).sum(1).min().item()
assert cosine > 0.99, cosine
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
pools = [path for path in libraries if "libgomp" in path or "libomp" in path]
assert len(pools) == 1 and "/torch" in pools[0], pools
print("smoke ok")
"""


def _door(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(FIND_PYTHON)], env=os.environ | environment, capture_output=True, text=True
    )


def _refusal(**environment: str) -> str:
    """The one line with which the door refuses."""
    run = _door(**environment)
    assert run.returncode == 1 and run.stdout == "", run
    assert run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def _fake(folder: Path, name: str, body: str) -> str:
    """An executable shell script; returns its path."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


def test_door_names_the_python() -> None:
    run = _door(PYTHON=sys.executable)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{sys.executable}\n", "")


def test_door_refuses_old_python(tmp_path: Path) -> None:
    old = _fake(tmp_path, "python3", 'case "$2" in *version_info*) exit 1;; *) echo 3.10.4;; esac')
    assert "Python must be 3.11 or newer, got 3.10.4" in _refusal(PYTHON=old)


def test_door_refuses_no_python() -> None:
    assert "Python must be 3.11 or newer, got none" in _refusal(PYTHON="no-such-python")


def test_door_refuses_no_compiler() -> None:
    refusal = _refusal(PYTHON=sys.executable, CXX="no-such-compiler")
    assert "a C++20 compiler must be installed, got none that works as 'no-such-comp" in refusal


def test_door_refuses_a_compiler_that_fails(tmp_path: Path) -> None:
    refusal = _refusal(PYTHON=sys.executable, CXX=_fake(tmp_path, "c++", "exit 1"))
    assert "a C++20 compiler must be installed" in refusal


def test_door_refuses_python_without_venv(tmp_path: Path) -> None:
    body = f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
    bare = _fake(tmp_path, "python3", body)
    assert "must have the venv and ensurepip modules" in _refusal(PYTHON=bare)


def test_door_refuses_python_without_headers(tmp_path: Path) -> None:
    body = f'case "$2" in *Python.h*) exit 1;; *) exec {sys.executable} "$@";; esac'
    bare = _fake(tmp_path, "python3", body)
    assert "must have its C headers, got no Python.h" in _refusal(PYTHON=bare)


def test_door_needs_no_compiler_without_extension() -> None:
    run = _door(PYTHON=sys.executable, CXX="no-such-compiler", LRAEE_BUILD_EXT="0")
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("target", ["demo", "test", "setup"])
def test_make_stops_at_the_door(tmp_path: Path, target: str) -> None:
    """Without a compiler no environment is made and nothing is downloaded."""
    venv = tmp_path / "venv"
    run = subprocess.run(
        ["make", "-C", str(ROOT), target, f"VENV={venv}"],
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and not venv.exists()
    assert "lraee: a C++20 compiler must be installed" in run.stderr
    assert "installing" not in run.stdout


def _setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    result: list[dict[str, Any]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: result.append(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return result[0]


def test_extension_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAEE_BUILD_EXT", "0")
    assert "ext_modules" not in _setup_arguments(monkeypatch)
    monkeypatch.delenv("LRAEE_BUILD_EXT")
    (extension,) = _setup_arguments(monkeypatch)["ext_modules"]
    assert extension.name == "lraee._C"
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert set(extension.sources) == sources
    assert extension.py_limited_api


def test_only_the_binding_knows_torch_and_python() -> None:
    """Any other header of torch or of pybind11 would tie the build to one version of them."""
    includes: dict[str, set[str]] = {}
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r"#include <([\w./]+)>", path.read_text()):
            if header.split("/")[0] in {"torch", "ATen", "c10", "pybind11", "Python.h", "omp.h"}:
                includes.setdefault(str(path.relative_to(ROOT / "csrc")), set()).add(header)
    assert includes == {
        "tensor.h": {"torch/csrc/stable/c/shim.h"},
        "errors.h": {"Python.h"},
        "register.cpp": {"Python.h"},
    }


def test_a_build_in_place_removes_what_python_would_prefer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """_C.cpython-311-x86_64-linux-gnu.so, of before the limited API, comes before _C.abi3.so."""
    arguments = _setup_arguments(monkeypatch)
    assert arguments["options"] == {"bdist_wheel": {"py_limited_api": "cp311"}}
    command = arguments["cmdclass"]["build_ext"]
    stale, kept = tmp_path / "lraee" / "_C.cpython-311-x86_64-linux-gnu.so", tmp_path / "lraee"
    kept.mkdir()
    stale.touch()
    (kept / "_C.abi3.so").touch()
    monkeypatch.setattr(command.__mro__[1], "run", lambda self: None)
    monkeypatch.setitem(command.run.__globals__, "ROOT", tmp_path)
    build = command(setuptools.Distribution())
    build.inplace = True
    build.run()
    assert [path.name for path in kept.iterdir()] == ["_C.abi3.so"]


def _settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]  # type: ignore[no-any-return]


def test_every_package_is_listed() -> None:
    """Without this an installed lraee would miss a folder that the editable one has."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lraee").rglob("__init__.py")}
    kernels = {path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    names |= {".".join(("lraee", *folder.parts)) for folder in kernels}
    assert set(_settings()["packages"]) == names


def test_every_data_file_is_matched() -> None:
    matched = {
        path
        for package, patterns in _settings()["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    generated = {".py", ".pyc", ".so"}
    data = {p for p in (ROOT / "lraee").rglob("*") if p.is_file() and p.suffix not in generated}
    assert data == matched


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the audited wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    tools = Path(sys.prefix) / "wheel-tools"
    run = subprocess.run(
        ["sh", str(ROOT / "scripts" / "build_wheels.sh"), sys.executable, str(tools), str(folder)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_sdist_holds_the_sources(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {"/".join(Path(name).parts[1:]) for name in tar.getnames()}
    for room in ("csrc", "kernels", "lraee", "bench", "tests", "scripts"):
        files = [p for p in (ROOT / room).rglob("*.*") if p.is_file() and p.suffix != ".so"]
        wanted = {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
        assert wanted and wanted <= names, wanted - names
    assert {"LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_works_from_another_folder(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"lraee"}
    assert {"lraee/kernels/__init__.py", "lraee/py.typed", "lraee/_C.pyi"} <= names
    assert wheel.name.endswith("-cp311-abi3-manylinux_2_28_x86_64.whl")
    assert [name for name in names if ".so" in name] == ["lraee/_C.abi3.so"]
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
    smoke = subprocess.run(
        [sys.executable, "-c", SMOKE, str(target)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert smoke.returncode == 0 and "smoke ok" in smoke.stdout, smoke.stderr[-4000:]
