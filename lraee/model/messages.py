"""What accelerate says in the log: what runs in int8, and where float16 would be faster."""

import functools
import logging

import torch
from torch import nn

from lraee.measurement import float16
from lraee.towers.families import block_specs, blocks_of, int8_linears, tower_spec
from lraee.towers.flops import count_macs

_log = logging.getLogger("lraee")


def log_result(tower: nn.Module | None, name: str) -> None:
    """How much of an accelerated tower is int8, and which implementation runs it."""
    if tower is None:
        _log.info("accelerate: the text tower's blocks in int8, implementation %s", name)
        return
    total = sum(len(spec.linears) for spec in block_specs(tower))
    count = len(int8_linears(tower))
    macs = count_macs(tower)
    _log.info(
        "accelerate: %d of %d linears in int8, %.1f %% of the tower's multiply-adds in int8"
        " operators, implementation %s",
        count,
        total,
        100 * macs.share,
        name,
    )


def warn_of_float16(tower: nn.Module | None, device: torch.device) -> None:
    """Says once where such a tower was measured to be faster in float16 on this GPU."""
    if tower is None or device.type != "cuda":
        return
    spec = tower_spec(tower)
    key = float16.tower_key(spec.tokens, spec.width, len(blocks_of(tower)))
    line = float16.faster_line(torch.cuda.get_device_name(device), key)
    if line is not None:
        _warn_once(line)


@functools.cache
def _warn_once(line: str) -> None:
    _log.warning("accelerate: %s", line)
