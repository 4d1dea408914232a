"""An encoder that a test can hold, slow down and break; its rows name their inputs."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lraee.serving.batching import Kind, Result


class FakeEncoder:
    """encode: [number] -> the row [number, 1, 1, 1]; "bad" raises, "die" ends the thread.

    Args:
      seconds: how long a call takes.
      text_limit: most texts of one call.
    """

    def __init__(self, seconds: float = 0.0, text_limit: int = 1) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self._seconds, self._text_limit = seconds, text_limit

    def batch_limit(self, kind: Kind) -> int:
        return 100 if kind == "image" else self._text_limit

    def encode(self, kind: Kind, payloads: Sequence[Any]) -> list[Result]:
        self.batches.append(list(payloads))
        self.started.set()
        self.gate.wait(20)
        time.sleep(self._seconds)
        if "die" in payloads:
            raise SystemExit
        if "bad" in payloads:
            raise ValueError("a secret of the inside")
        return [Result(np.array([_number(p), 1, 1, 1], np.float32)) for p in payloads]


def _number(payload: object) -> float:
    return float(payload) if isinstance(payload, int | float) else float("nan")
