"""Kernel families that are used on a GPU only after a check there has passed.

[NOTE: first use] What no GPU of this kind has run may hang, crash or be wrong. So a child process
computes small products with the family and with the simple kernel, PATIENCE_S at most, and its
verdict is kept in the file "first_use" of user_cache, for this GPU, this Triton and these kernels.

The check starts in the background when a process launches its first product outside a capture, and
blocks nothing. That process goes on with the simple kernel: verdicts are read once, at its first
pick, so that no kernel changes under a running program. Processes after it use the family where the
verdict is good. A check that never ends in a verdict, since its process ended too soon, is begun
MOST_ATTEMPTS times. `check` does the same at once, for commands.
"""

import functools
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from lraee.kernels import user_cache

NAME = "first_use"
FAMILIES = ("persistent",)
CAPABILITY = 90
"""Of the GPUs on which a pick takes the families, unmeasured, once their check has passed."""
PATIENCE_S = 120
"""Importing torch and compiling some kernels takes 10 to 30 s on a busy machine."""
MOST_ATTEMPTS = 3
PASSED = "passed"
"""The last line that a child prints where all bits were those of the simple kernel."""


@dataclass(frozen=True)
class Verdict:
    """Of one family on one GPU. reason: why the simple kernel serves; empty where it passed."""

    passed: bool
    reason: str
    attempts: int = 1


def _content() -> dict[str, Any]:
    content = user_cache.read(NAME) or {}
    is_ours = content.get("triton") == triton.__version__
    verdicts = content.get("verdicts") if is_ours else None
    return verdicts if isinstance(verdicts, dict) else {}


def _key(family: str, gpu: str) -> str:
    return f"{family} on {gpu}"


def stored(family: str, gpu: str) -> Verdict | None:
    """The verdict in the file, None where there is none that we wrote."""
    value = _content().get(_key(family, gpu))
    if not isinstance(value, dict):
        return None
    fields: list[Any] = [value.get(name) for name in ("passed", "reason", "attempts")]
    passed, reason, attempts = fields
    is_ours = isinstance(passed, bool) and isinstance(reason, str) and type(attempts) is int
    return Verdict(passed, reason[:500], attempts) if is_ours else None


def _store(family: str, gpu: str, verdict: Verdict) -> None:
    verdicts = _content() | {_key(family, gpu): asdict(verdict)}
    user_cache.write(NAME, {"triton": triton.__version__, "verdicts": verdicts})


@functools.cache
def _read_once(family: str, gpu: str) -> Verdict:
    verdict = stored(family, gpu)
    return verdict or Verdict(False, "not checked on this GPU yet; a check runs at first use", 0)


def has_passed(family: str, gpu: str) -> bool:
    """Whether this process may use the family: as the file was when it first asked."""
    return _read_once(family, gpu).passed


def reason(family: str, gpu: str) -> str | None:
    """Why the simple kernel serves instead of the family, or None where it may be used."""
    verdict = _read_once(family, gpu)
    return None if verdict.passed else f"{family} products: {verdict.reason}"


def _command(family: str, index: int) -> list[str]:
    return [sys.executable, "-m", "lraee.kernels.first_use_child", family, str(index)]


def _verdict_of(command: Sequence[str], patience_s: float) -> Verdict:
    """Runs a child to its end, or kills it when its time is over."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=patience_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the check did not end in {patience_s:g} s")
    except OSError as error:
        return Verdict(False, f"the check could not be started: {error}")
    lines = result.stdout.strip().splitlines() or [""]
    if result.returncode == 0 and lines[-1] == PASSED:
        return Verdict(True, "")
    if result.returncode == 0:
        return Verdict(False, f"the check ended with {lines[-1][:300]!r}")
    last = (result.stderr.strip().splitlines() or ["nothing said"])[-1]
    return Verdict(False, f"the check ended with exit code {result.returncode}: {last[:300]}")


def check(
    family: str,
    gpu: str,
    index: int = 0,
    *,
    command: Sequence[str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Verdict:
    """Runs the check of a family now, in a child process, and stores its verdict.

    Args:
      gpu, index: name and index of the GPU.
      command: the child; prints PASSED last where all is right.
    A folder that cannot be written makes no error: the verdict is then returned and not kept.
    """
    before = stored(family, gpu)
    attempts = 1 + (before.attempts if before is not None else 0)
    try:
        _store(family, gpu, Verdict(False, "a check was begun and has not ended", attempts))
        verdict = _verdict_of(command or _command(family, index), patience_s)
        _store(family, gpu, Verdict(verdict.passed, verdict.reason, MOST_ATTEMPTS))
    except OSError as error:
        return Verdict(False, f"the verdict cannot be kept: {error}")
    return verdict


_begun: set[torch.device] = set()
_lock = threading.Lock()


def _is_due(family: str, gpu: str) -> bool:
    verdict = stored(family, gpu)
    return verdict is None or (not verdict.passed and verdict.attempts < MOST_ATTEMPTS)


def begin(device: torch.device, gpu: str) -> None:
    """Starts the checks that are due on this GPU in the background, once in a process.

    Does nothing while a graph is captured: a child beside a capture is no error, yet a product that
    is launched outside one starts it soon enough.
    """
    if device in _begun or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if device in _begun:
            return
        _begun.add(device)
    families = [family for family in FAMILIES if _is_due(family, gpu)]
    for family in FAMILIES:
        has_passed(family, gpu)  # as the file is now, before a check ends
    if families:
        threading.Thread(
            target=lambda: [check(family, gpu, device.index or 0) for family in families],
            name="lraee first use", daemon=True,
        ).start()  # fmt: skip
