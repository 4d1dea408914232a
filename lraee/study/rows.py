"""Rows of the report's tables from what systems did, seed by seed."""

from collections.abc import Sequence
from statistics import mean, stdev

from torch import Tensor

from lraee.study import schema
from lraee.study.schema import FrontierPoint, MainRow, Shares, Spread
from lraee.study.trials import Backbone, Outcome

NOTHING: Spread = {"mean": 0.0, "std": 0.0}


def spread(shares: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of shares in 0 to 1, in percent; 0 of one seed.

    Raises: ValueError on none.
    """
    if not shares:
        raise ValueError("spread: shares must be one at least, got none")
    deviation = stdev(shares) if len(shares) > 1 else 0.0
    return {"mean": 100.0 * mean(shares), "std": 100.0 * deviation}


def share_of(marks: Tensor) -> float:
    """Share of a bool tensor that is true."""
    return float(marks.double().mean())


def row_of_outcomes(
    name: str, backbone: str, outcomes: Sequence[Outcome], note: str = ""
) -> MainRow:
    """One system over its seeds."""
    return {
        "name": name,
        "backbone": backbone,
        "top1": spread([share_of(each.right) for each in outcomes]),
        "agreement": spread([each.agreement for each in outcomes]),
        "flops_saved": spread([each.flops_saved for each in outcomes]),
        "seeds": len(outcomes),
        "note": note,
    }


def row_of_full_depth(name: str, backbone: str, form: Backbone, note: str = "") -> MainRow:
    """The whole tower; nothing is random in it."""
    return {
        "name": name,
        "backbone": backbone,
        "top1": spread([share_of(form.full_top1 == form.report_labels)]),
        "agreement": spread([share_of(form.full_top1 == form.float_top1)]),
        "flops_saved": NOTHING,
        "seeds": 1,
        "note": note,
    }


def frontier_point(
    name: str, backbone: str, budget: float, outcomes: Sequence[Outcome]
) -> FrontierPoint:
    """One system at one budget over its seeds."""
    return {
        "name": name,
        "backbone": backbone,
        "budget": budget,
        "flops_saved": spread([each.flops_saved for each in outcomes]),
        "top1": spread([share_of(each.right) for each in outcomes]),
        "agreement": spread([each.agreement for each in outcomes]),
    }


def shares_of(backbone: str, recipe: str, outcomes: Sequence[Outcome]) -> Shares:
    """Where photos exit; a depth where none exits in any seed is left out.

    `top1` is over the seeds in which some exited there.
    """
    depths = sorted({int(depth) for each in outcomes for depth in each.exit_block.tolist()})
    rows: list[schema.ExitShare] = []
    for depth in depths:
        here = [each.exit_block == depth for each in outcomes]
        right = [
            share_of(each.right[mask]) for each, mask in zip(outcomes, here, strict=True)
            if mask.any()
        ]  # fmt: skip
        share = spread([share_of(mask) for mask in here])
        rows.append({"block": depth, "share": share, "top1": spread(right)})
    return {"backbone": backbone, "recipe": recipe, "exits": rows}
