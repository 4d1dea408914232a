"""Plans on report photos, worked through photo by photo."""

from functools import cache

import torch

from lraee import accelerate, trace
from lraee.exits.gate import Gate
from lraee.exits.plan import Plan
from lraee.study.trials import Outcome, Trial
from lraee.towers.flops import PartFlops, probe_flops
from tests.small_calibration import QUICK, pictures
from tests.study.small_study import small_form, small_model


@cache
def trial() -> Trial:
    return Trial(small_form("int8"), QUICK, 0, has_labels=False)


def outcome_at(threshold: float) -> Outcome:
    gate = Gate("confidence", ((0.0,) * 4,) * 2, (threshold, threshold))
    return trial().outcome(Plan((3, 5), gate))


def test_no_image_exits() -> None:
    outcome, form = outcome_at(2.0), small_form("int8")
    assert (outcome.exit_block == 6).all() and (outcome.taken == 2).all()
    assert torch.equal(outcome.right, form.full_top1 == form.report_labels)
    assert outcome.flops_saved < 0  # the probes
    assert outcome.scores.isfinite().all()


def test_all_images_exit_at_once() -> None:
    outcome, form = outcome_at(0.0), small_form("int8")
    assert (outcome.exit_block == 3).all() and (outcome.taken == 0).all()
    assert torch.equal(outcome.right, outcome.top1_at_exit[:, 0] == form.report_labels)
    assert outcome.scores[:, 1].isnan().all()
    assert torch.equal(outcome.scores[:, 0], outcome.confidence_at_exit[:, 0])


def test_an_outcome_is_what_the_model_does() -> None:
    plan = trial().plan("learned", 0.8)
    assert plan is not None and plan.blocks
    outcome, model = trial().outcome(plan), small_model()
    fast = accelerate(model.clip, exits=trial().exits(plan))
    with torch.inference_mode(), trace(fast) as t:
        y = fast.encode_image(pictures(120, seed=7), normalize=True)
    # Probes see tokens rounded to float16: a score next to a threshold may fall on its other side
    assert float((t.exit_block == outcome.exit_block).double().mean()) > 0.97
    right = (y @ model.classes.T).argmax(1) == small_form("int8").report_labels
    assert float((right == outcome.right).double().mean()) > 0.97
    parts, probes = PartFlops.of(fast.visual), probe_flops(fast.visual.exits)  # as the paper counts
    costs = dict(
        zip((*plan.blocks, model.depth), parts.when_leaving(plan.blocks, probes), strict=True)
    )
    spent = sum(costs[depth] for depth in t.exit_block.tolist()) / (120 * parts.total)
    assert abs(spent - (1 - outcome.flops_saved)) < 0.02
    assert 0.0 < trial().probe_share(plan) < 1.0


def test_an_open_plan_has_every_exit() -> None:
    plan = trial().open_plan()
    assert plan.blocks == (3, 4, 5) and set(plan.gate.thresholds) == {0.20000000298023224}
