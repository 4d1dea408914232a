"""Cases of `lraee selftest` for exits on the device: decision, compaction, results, agreement."""

from collections.abc import Iterator

import torch

from lraee.diagnostics import selftest_inputs
from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned
from lraee.diagnostics.selftest_results import first_of
from lraee.diagnostics.selftest_sizes import Case, Difference, Sizes, Target
from lraee.kernels import exit_decide as kernels
from lraee.kernels.exit_state import MOST_IMAGES, ExitState
from lraee.ops import reference

SHARES = (0.0, 0.3, 1.0)
"""Of the images that exit."""


def exit_cases(target: Target, sizes: Sizes) -> Iterator[Case]:
    """None, some and all of the images of full and of padded buckets exit."""
    batches = sorted({min(rows, MOST_IMAGES) for rows in sizes.rows} | {2})
    for seed, B in enumerate(batches):
        for width in sizes.widths:
            for share in SHARES:
                text = f"B={B} of {min(B + seed % 2, MOST_IMAGES)} E={width} {share:.0%} exit"
                find = _exit_difference(target, B, width, share, seed)
                yield Case("exit_decide", "given", text, find)
    for seed, width in enumerate(sizes.widths):
        find = _agreement_difference(target, width, seed)
        yield Case("exit_agreement", "two exits", f"B=5 E={width}", find)


def _exit_difference(target: Target, B: int, E: int, share: float, seed: int) -> Difference:
    def find() -> str | None:
        source = selftest_inputs.generator(seed)
        capacity = min(B + seed % 2, MOST_IMAGES)
        score = torch.rand(capacity, generator=source)
        embedding = torch.randn(capacity, E, generator=source)
        z, y = torch.randn(2, capacity, 3, E, generator=source).half()
        z[0, 0, 0] = embedding[0, 0] = torch.nan
        threshold = 2.0 if share == 0.0 else 1.0 - share
        exits, survivors = reference.exit_decide(score[:B], threshold)
        kept, device = len(survivors), target.device
        there = [poisoned(x, 0, device) for x in (score, embedding, z, y[:, 0])]
        part = there[0]
        probe = there[1], torch.zeros(capacity, dtype=torch.int64, device=device), *[part] * 4
        with guarded_outputs():
            result = torch.empty((capacity, E), dtype=torch.float16, device=device)
            images = torch.tensor([B], dtype=torch.int32, device=device)
            numbers = torch.tensor([[threshold, 0.0, 0.0, 0.0]], device=device)
            state = ExitState.allocate(images, numbers, result, compares=False)
            kernels.exit_decide(state, 0, probe, "given", 3)
            kernels.exit_move(state, 0, there[1], there[2])
            kernels.exit_merge(state, there[3], 9)
        merged, depth = y[:B, 0].clone(), torch.full((B,), 9, dtype=torch.int32)
        merged[survivors] = y[:kept, 0]
        merged[exits], depth[exits] = embedding[exits].half(), 3
        return first_of([
            ("kept", state.images[1], torch.tensor([kept], dtype=torch.int32), 0.0),
            ("tokens", there[2][:kept], z[survivors], 0.0),
            ("result", result[:B], merged, 0.0),
            ("depth", state.depth[:B], depth, 0.0),
        ])  # fmt: skip

    return find


def _agreement_difference(target: Target, E: int, seed: int) -> Difference:
    """The score of the agreement gate, of an image that moved from row 4 to row 0 and others."""

    def find() -> str | None:
        source, device = selftest_inputs.generator(seed), target.device
        first, second = torch.randn(2, 5, E, generator=source)
        variance = torch.rand(5, generator=source)
        order = torch.tensor([4, 1, 2, 3])
        numbers = torch.tensor([[0.0, 3.0, 0.01, -1.0]] * 2)
        there = [poisoned(x, 0, device) for x in (numbers, first, second, variance)]
        with guarded_outputs():
            result = torch.empty((5, E), dtype=torch.float32, device=device)
            images = torch.tensor([5], dtype=torch.int32, device=device)
            state = ExitState.allocate(images, there[0], result, compares=True)
            kernels.agreement_score(state, 0, there[1], there[3])
            state.images[1].fill_(4)
            state.places[0][:4].copy_(order)
            score = kernels.agreement_score(state, 1, there[2], there[3])
        lengths = [reference.rows.square_root(reference.lane_sum(x * x)) for x in (first, second)]
        before, now = first / lengths[0][:, None], second / lengths[1][:, None]
        cosine = reference.lane_sum(now[:4] * before[order])
        logit = (numbers[1, 1] * cosine + numbers[1, 2] * variance[:4]) + numbers[1, 3]
        return first_of([("score", score[:4], reference.steady_sigmoid(logit), 0.0)])

    return find
