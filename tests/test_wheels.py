"""The wheel that `make wheels` built, in fresh environments: the bits of the source build.

Each environment takes gigabytes, and minutes to install: `make test-wheels`. It names the wheel in
LRAEE_WHEEL, and in LRAEE_WHEEL_PYTHONS the interpreters to install it for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HASHES = ROOT / "tests" / "operator_hashes.py"
WHEEL = os.environ.get("LRAEE_WHEEL")
PYTHONS = os.environ.get("LRAEE_WHEEL_PYTHONS", sys.executable).split()
ENVIRONMENTS = Path(os.environ.get("LRAEE_WHEEL_ENVIRONMENTS", Path(sys.prefix) / "wheels"))
TORCHES = {"oldest": "torch==2.10.*", "newest": "torch"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHEEL is None, reason="installs gigabytes: `make test-wheels`"),
]

# OpenMP's pool of threads: torch's alone, after an operator has run on two threads
ONE_OPENMP = """
import torch, lraee.ops
torch.set_num_threads(2)
torch.ops.lraee.quantize_rows(torch.ones(4096, 512), False)
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
pools = [path for path in libraries if "libgomp" in path or "libomp" in path]
assert len(pools) == 1 and "/torch" in pools[0], pools
"""


def _run(*command: object, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def source_hashes() -> dict[str, str]:
    """Digests of the operators of this checkout's own build."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.operator_hashes"], cwd=ROOT, check=True, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=PYTHONS)
def python(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module", params=TORCHES)
def environment(
    request: pytest.FixtureRequest, python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The Python of an environment with that torch and the wheel; kept, but for the wheel."""
    folder = ENVIRONMENTS / f"{request.param}-{python.name}"
    inside, outside = folder / "bin" / "python", tmp_path_factory.mktemp("outside")
    if not (folder / ".complete").exists():
        _run(python, "-m", "venv", "--clear", folder, folder=outside)
        _run(
            inside, "-m", "pip", "install", "--quiet", TORCHES[request.param], f"{WHEEL}[demo]",
            folder=outside,
        )  # fmt: skip
        (folder / ".complete").touch()
    _run(
        inside, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", WHEEL,
        folder=outside,
    )  # fmt: skip
    return inside


def test_bits_are_those_of_the_source_build(
    environment: Path, source_hashes: dict[str, str], tmp_path: Path
) -> None:
    outside = tmp_path / HASHES.name
    outside.write_text(HASHES.read_text())
    hashes = json.loads(_run(environment, outside, folder=tmp_path))
    assert hashes == source_hashes
    assert len(hashes) >= 12


def test_threads_are_those_of_torch(environment: Path, tmp_path: Path) -> None:
    _run(environment, "-c", ONE_OPENMP, folder=tmp_path)


def test_a_refusal_is_a_value_error(environment: Path, tmp_path: Path) -> None:
    """The exception must be one that this torch lets through; see csrc/errors.h."""
    script = (
        "import torch, lraee.ops\n"
        "for error, x in ((ValueError, torch.ones(3)), (TypeError, torch.ones(3, 4).int())):\n"
        "    try: torch.ops.lraee.quantize_rows(x, False)\n"
        "    except error as e: print(type(e).__name__, e)\n"
    )
    assert _run(environment, "-c", script, folder=tmp_path) == (
        "ValueError quantize_rows: x must have shape [M, K], got [3]\n"
        "TypeError quantize_rows: x must be float32, bfloat16 or float16, got int32\n"
    )


def test_the_demo_runs(environment: Path, tmp_path: Path) -> None:
    _run(environment.parent / "lraee", "demo", folder=tmp_path)
    assert "lraee-tiny" in (tmp_path / "results" / "demo.json").read_text()
