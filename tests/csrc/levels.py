"""Running one call at each instruction-set level and with several thread counts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lraee import _C
from tests.support import assert_same

LEVELS = _C.isa_levels()
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def at_level(level: str, call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The result of the call with this level forced."""
    _C.set_isa(level)
    try:
        return call()
    finally:
        _C.set_isa("")


def assert_same_everywhere(call: Callable[[], Sequence[Tensor]], **parameters: object) -> None:
    """All levels give the bits of the best one, and so do 1 and 2 threads."""
    expected = call()
    for level in LEVELS:
        for name, (actual, value) in enumerate(zip(at_level(level, call), expected, strict=True)):
            assert_same(actual, value, level=level, output=name, **parameters)
    num_threads = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = call()
        torch.set_num_threads(num_threads)
        for name, (actual, value) in enumerate(zip(results, expected, strict=True)):
            assert_same(actual, value, threads=threads, output=name, **parameters)
