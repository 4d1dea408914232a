"""The check at first use, with children that pass, hang, crash or are wrong."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from lraee.kernels import configs, first_use, tuned, user_cache
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, legal, measured, pick
from lraee.kernels.families import persistent_config
from lraee.kernels.first_use_child import SHAPES, configs_of, difference

GPU = "NVIDIA H200"
FAMILY = "persistent"
SHAPE = Shape(6304, 2304, 768)


def forget() -> None:
    """What a process remembers: the next call is like one of a new process."""
    first_use._read_once.cache_clear()
    first_use._begun.clear()
    tuned.table.cache_clear()
    configs.pick.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def child(source: str) -> list[str]:
    return [sys.executable, "-S", "-c", source]


def test_a_family_is_used_after_its_check_and_not_in_the_process_that_made_it() -> None:
    arch = ARCHS[90]
    assert pick(SHAPE, arch, "gelu", GPU) == measured(SHAPE, arch)
    assert "not checked on this GPU yet" in str(first_use.reason(FAMILY, GPU))
    assert first_use.check(FAMILY, GPU, command=child("print('passed')")).passed
    assert not first_use.has_passed(FAMILY, GPU)
    forget()
    assert first_use.reason(FAMILY, GPU) is None
    assert pick(SHAPE, arch, "gelu", GPU) == persistent_config(arch, has_residual=False)
    with_residual = persistent_config(arch, has_residual=True)
    assert pick(Shape(6304, 768, 3072), arch, "none+residual", GPU) == with_residual
    # Not for few tiles, what it cannot do, another GPU, or the interpreter
    for shape, epilogue, gpu in (
        (Shape(50, 768, 768), "none", GPU), (SHAPE, "gelu+quantized", GPU),
        (SHAPE, "none+float32", GPU), (Shape(6304, 2304, 588), "none", GPU),
        (SHAPE, "none", "NVIDIA H100"), (SHAPE, "none", None),
    ):  # fmt: skip
        assert pick(shape, arch, epilogue, gpu).family == "simple", (shape, epilogue, gpu)
    assert pick(SHAPE, ARCHS[80], "none", GPU).family == "simple"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import time; time.sleep(60)", "did not end in 0.5 s"),
        ("import os; os.abort()", "exit code -6"),
        ("raise RuntimeError('illegal address')", "exit code 1: RuntimeError: illegal address"),
        ("print('12 of 300 x 192 values have other bits')", "have other bits"),
        ("print('passed'); print('and more')", "ended with 'and more'"),
        ("import sys; print('passed'); sys.exit(3)", "exit code 3"),
        ("", "ended with ''"),
    ],
)
def test_a_check_that_fails_leaves_the_simple_kernel(source: str, reason: str) -> None:
    patience_s = 0.5 if "sleep" in source else 30
    verdict = first_use.check(FAMILY, GPU, command=child(source), patience_s=patience_s)
    assert not verdict.passed and reason in verdict.reason
    forget()
    assert reason in str(first_use.reason(FAMILY, GPU))
    assert pick(SHAPE, ARCHS[90], "gelu", GPU).family == "simple"
    assert not first_use._is_due(FAMILY, GPU)


def test_a_child_that_cannot_be_started() -> None:
    verdict = first_use.check(FAMILY, GPU, command=["/no/such/program"])
    assert not verdict.passed and "could not be started" in verdict.reason


def test_a_check_that_never_ends_is_begun_three_times() -> None:
    """Its process ended before the child: only that it was begun is stored."""
    unfinished = first_use.Verdict(False, "a check was begun and has not ended")
    for attempts in range(1, 5):
        first_use._store(FAMILY, GPU, first_use.Verdict(False, unfinished.reason, attempts))
        assert first_use._is_due(FAMILY, GPU) == (attempts < first_use.MOST_ATTEMPTS)
        assert not first_use._read_once(FAMILY, GPU).passed


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b'{"triton": "0", "verdicts": {}}', b'{"triton": "HERE", "verdicts": []}',
        b'{"triton": "HERE", "verdicts": {"persistent on NVIDIA H200": true}}',
        b'{"triton": "HERE", "verdicts": {"persistent on NVIDIA H200": {"passed": "yes"}}}',
        b'{"triton": "0", "verdicts": {"persistent on NVIDIA H200":'
        b' {"passed": true, "reason": "", "attempts": 1}}}',
    ],
)  # fmt: skip
def test_what_is_no_verdict_of_ours_is_none(content: bytes) -> None:
    path = user_cache.write(first_use.NAME, {})
    path.write_bytes(content.replace(b"HERE", triton.__version__.encode()))
    assert first_use.stored(FAMILY, GPU) is None and not first_use.has_passed(FAMILY, GPU)
    assert first_use.check(FAMILY, GPU, command=child("print('passed')")).passed
    assert json.loads(path.read_bytes())["verdicts"].keys() == {"persistent on NVIDIA H200"}


def test_verdicts_of_other_kernels_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    first_use.check(FAMILY, GPU, command=child("print('passed')"))
    monkeypatch.setattr(user_cache, "kernels_hash", lambda: "0" * 16)
    assert first_use.stored(FAMILY, GPU) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path / "file"))
    verdict = first_use.check(FAMILY, GPU, command=child("print('passed')"))
    assert not verdict.passed and "cannot be kept" in verdict.reason


def test_checks_begin_once_in_the_background_and_never_in_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = []
    done = threading.Event()

    def check(family: str, gpu: str, index: int) -> None:
        begun.append((family, gpu, index, threading.current_thread().daemon))
        done.set()

    capturing = True
    monkeypatch.setattr(first_use, "check", check)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 1)
    first_use.begin(device, GPU)
    assert begun == []
    capturing = False
    for _ in range(3):
        first_use.begin(device, GPU)
    assert done.wait(10) and begun == [(FAMILY, GPU, 1, True)]
    # What passed, or failed, is not checked again
    forget()
    first_use._store(FAMILY, GPU, first_use.Verdict(True, ""))
    first_use.begin(device, GPU)
    assert len(begun) == 1


def test_what_the_child_compares() -> None:
    """In the interpreter, on a small shape; a family with other bits is told of."""
    tile = Config(32, 32, 32, num_warps=4, num_stages=2, family="persistent")
    shapes = ((33, 40, 48),)
    cpu = torch.device("cpu")
    assert difference(lambda *_: tile, cpu, shapes, 1) is None
    with pytest.MonkeyPatch.context() as patch:
        other = "lraee.kernels.int8_linear.int8_linear_persistent"
        patch.setattr(other, lambda *x, **_: torch.zeros(33, 40, dtype=torch.float16))
        text = difference(lambda *_: tile, cpu, shapes, 1)
    assert "of 33 x 40 values at K = 48 (none) have other bits" in str(text)


def test_the_configs_that_a_family_is_checked_in() -> None:
    gluon, persistent = (configs_of(family, ARCHS[90]) for family in ("gluon", "persistent"))
    shapes = [Shape(*shape) for shape in SHAPES]
    assert all(legal(persistent(s, has), s, ARCHS[90]) for s in shapes for has in (False, True))
    assert all(gluon(shape, True) is None for shape in shapes)
    checked = [shape for shape in shapes if gluon(shape, False) is not None]
    assert [shape.K for shape in checked] == [768, 768]
    assert all(configs_of("gluon", ARCHS[80])(shape, False) is None for shape in shapes)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_child_is_a_module_that_can_be_run() -> None:
    assert first_use._command(FAMILY, 2)[1:] == [
        "-m", "lraee.kernels.first_use_child", "persistent", "2"
    ]  # fmt: skip
