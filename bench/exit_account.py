"""PREDICTION of what exits on the device cost where no image takes them: launches, bytes, time.

    python -m bench.exit_account

Launches and bytes are those of the launchers, recorded without a GPU; rates are those of
bench.gpu_account, of which the gap between two launches (2.2 us) was fitted to one H200. What no
GPU has run: probes, decisions and branches of a graph. Before a block an exit adds its launches and
their gaps to the chain. Beside a block it adds the branch's end, the launch that moves tokens, and
the share of the GPU that its programs hold meanwhile; the probe's own chain is hidden, as a block
takes longer. Once a call, exit_merge puts the embeddings in order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import gpu_parts as constants
from bench.block_launches import bytes_of, probe_launches
from bench.gpu_account import FLOAT, PERSISTENT, int8_us
from bench.gpu_parts import GPUS, Gpu
from bench.launches import Launch, launches_of, meta
from bench.shapes import B16, B32, L14, Tower
from lraee.kernels import live_rows
from lraee.kernels.exit_decide import exit_decide, exit_merge, exit_move
from lraee.kernels.exit_state import ExitState
from lraee.towers.cuda_graphs import bucket_of
from lraee.towers.device_exits import is_beside

BATCHES = (1, 2, 4, 8, 16, 32, 128)
NOTHING_US = 1.0
"""A launch that reads a count and returns."""
PROBE_SHARE_OF_SM = {1: 0.33, 16: 0.77}
"""Registers of an SM that a program of exit_probe takes, by images of its blocks (sm_90)."""


@dataclass(frozen=True)
class ExitCost:
    """One exit that no image takes, and its call.

    Args:
      launches: names, in order; exit_merge, once a call, is the last.
      bytes: read and written by the probe and the decision.
      is_beside: whether the probe runs beside the next block.
      exit_us: what each exit adds.
      merge_us: what a call adds beside them.
    """

    launches: tuple[str, ...]
    bytes: int
    is_beside: bool
    exit_us: float
    merge_us: float

    @property
    def us(self) -> float:
        """One exit and the call's end."""
        return self.exit_us + self.merge_us


def exit_launches(tower: Tower, batch: int) -> list[Launch]:
    """What one exit of a learned gate launches where no image exits, and the end of the call."""
    live = live_rows.LiveRows(meta(1, dtype=torch.int32), batch)
    with live_rows.using(live):
        probe = probe_launches(tower, batch, has_class_token=True)
    z = meta(batch, tower.L, tower.D, dtype=torch.float16)
    result, numbers = meta(batch, tower.E, dtype=torch.float16), meta(1, 4)
    state = ExitState.allocate(live.images, numbers, result, compares=False)

    def decide() -> None:
        part: Tensor = meta(batch)
        embedding, top1 = meta(batch, tower.E), meta(batch, dtype=torch.int64)
        exit_decide(state, 0, (embedding, top1, part, part, part, part), "given", 6)
        exit_move(state, 0, embedding, z)
        exit_merge(state, result, tower.layers)

    return probe + launches_of(decide)


def exit_cost(gpu: Gpu, tower: Tower, batch: int) -> ExitCost:
    """The account of one exit in a graph of this batch's bucket."""
    batch = bucket_of(batch)
    launches = exit_launches(tower, batch)
    probe, decide = launches[:2]
    gap, is_late = constants.GRAPH_GAP_US, is_beside(batch, tower.L)
    read = bytes_of(probe)
    probe_us = constants.ROW_START_US + constants.PROBE_CHAIN_US + read / gpu.bytes_per_us
    moves = any(launch.name == "exit_move" for launch in launches)
    move_us = NOTHING_US + gap if moves else 0.0
    if is_late:
        share = PROBE_SHARE_OF_SM[1 if batch == 1 else 16]
        waves = min(1.0, probe.programs * share / gpu.sms)
        exit_us = gap + move_us + waves * probe_us
    else:
        exit_us = probe_us + gap + constants.DECIDE_US + gap + move_us
    return ExitCost(
        tuple(launch.name for launch in launches), read + bytes_of(decide), is_late, exit_us,
        NOTHING_US + gap,
    )  # fmt: skip


def main() -> None:
    """Command line."""
    print("PREDICTION, one exit that no image takes: us, and share of the tower in its two forms")
    for gpu in GPUS:
        for tower in (B32, B16, L14):
            for batch in BATCHES:
                cost = exit_cost(gpu, tower, batch)
                forms = (int8_us(gpu, tower, batch, form) for form in (FLOAT, PERSISTENT))
                shares = " / ".join(f"{cost.us / us:.1%}" for us in forms)
                print(
                    f"{gpu.name:6}{tower.name:10}batch {batch:4}"
                    f" {'beside' if cost.is_beside else 'before':7}{len(cost.launches)} launches"
                    f" {math.ceil(cost.bytes / 1e3):7} KB {cost.us:5.1f} us {shares}"
                )


if __name__ == "__main__":
    main()
