"""Scores at calibration are the scores at run time; losses, plans and weights against loops."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration.collect import Pair
from lraee.calibration.gate_fitting import fit_logistic, fit_weights
from lraee.calibration.scoring import (
    NO_WEIGHTS,
    Costs,
    ExitTable,
    exit_scores,
    run_plan,
    score_table,
)
from lraee.calibration.targets import judge
from lraee.calibration.thresholds import NEVER, exit_at
from lraee.exits.bundle import Exits
from lraee.exits.gate import Gate, GateKind, steady_sigmoid, unit
from lraee.exits.plan import Plan
from lraee.exits.router import Compaction
from lraee.towers.flops import PartFlops, probe_flops
from tests.calibration.exit_tables import FULL, make_costs, make_table
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.support import EPS32, assert_same, assert_within

BLOCKS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return make_model(vision={"layers": 5})


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    pictures = make_images(37) * torch.linspace(0.1, 2, 37)[:, None, None, None]
    pictures[11] = math.nan
    return pictures


def at_calibration(model: nn.Module, exits: Exits, images: Tensor, batch: int) -> ExitTable:
    """What calibration knows of these images."""
    pair = Pair(model, lraee.accelerate(model), images, batch=batch, progress=False)
    classes = exits.router().classes
    rows = torch.ones(len(images), dtype=torch.bool)
    probes = pair.probed(dict(exits.heads), rows, classes=classes, logit_scale=exits.logit_scale)
    return judge(probes, pair.embeddings(), classes=classes, labels=None)


def spread_exits(model: nn.Module, kind: GateKind, images: Tensor) -> Exits:
    """Exits that images take at several depths; for patience heads must change their mind."""
    exits = make_exits(model, kind=kind, blocks=BLOCKS)
    if kind != "patience":
        return exits
    embedding = at_calibration(model, exits, images, batch=37).embedding[:10]
    directions = (embedding - embedding.mean(0)).flatten(0, 1)
    return replace(exits, classes=nn.functional.normalize(directions[:6], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("kind", get_args(GateKind))
def test_scores_at_calibration_are_those_at_run_time(
    model: nn.Module, images: Tensor, kind: GateKind
) -> None:
    """Bit for bit, in other batches, with other neighbours; so are the exits that images take."""
    exits = spread_exits(model, kind, images)
    result = at_calibration(model, exits, images, batch=37)
    subset = tuple(range(len(exits.plan.blocks)))
    gate = exits.plan.gate
    expected = exit_scores(kind, result, subset, gate.weights)
    # All exits closed: every image comes to each of them
    closed = Plan(exits.plan.blocks, replace(gate, thresholds=(NEVER,) * len(subset)))
    fast = lraee.accelerate(model, exits=replace(exits, plans={kind: closed}))
    with lraee.trace(fast) as t:
        for part in images.split(10):
            fast.encode_image(part)
    actual = t.scores
    assert_same(t.features, result.features[:, : len(subset)])
    if kind == "learned":
        # exit_probe's own sigmoid: three roundings, beside torch's two
        assert_within(actual, torch.from_numpy(expected), 4 * EPS32)
    else:
        assert_same(actual, torch.from_numpy(expected))
    # Exits open: the same decisions
    fast = lraee.accelerate(model, exits=exits)
    with lraee.trace(fast) as t:
        for part in images.split(16):
            fast.encode_image(part)
    depths = np.array([*exits.plan.blocks, 5])
    leaves = exit_at(expected, gate.thresholds)
    assert t.exit_block.tolist() == depths[leaves].tolist()
    assert len(set(leaves.tolist())) >= (1 if kind == "static" else 3), "no test of decisions"


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(model: nn.Module, images: Tensor) -> None:
    exits = make_exits(model, kind="learned", blocks=BLOCKS)
    whole, parts = (at_calibration(model, exits, images, batch) for batch in (37, 5))
    for name in ("embedding", "top1", "features"):
        assert_same(getattr(parts, name), getattr(whole, name), name=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", get_args(GateKind))
def test_a_plan_does_at_run_time_what_it_was_said_to_do(
    model: nn.Module, images: Tensor, kind: GateKind
) -> None:
    """run_plan against a trace: where images leave, and what that saves."""
    exits = replace(spread_exits(model, kind, images), compaction=Compaction(0.0))
    result = at_calibration(model, exits, images, batch=37)
    fast = lraee.accelerate(model, exits=exits)
    parts, probes = PartFlops.as_run(fast.visual), probe_flops(fast.visual.exits)
    blocks = list(exits.heads)

    def when_leaving(subset: object) -> list[int]:
        places = list(subset)  # type: ignore[call-overload]
        return parts.when_leaving([blocks[e] for e in places], [probes[e] for e in places])

    ran = run_plan(exits.plan, blocks, result, Costs(when_leaving, parts.total))
    with lraee.trace(fast) as t:
        fast.encode_image(images)
    assert t.exit_block.tolist() == [[*blocks, 5][e] for e in ran.at]
    assert t.flops_saved == pytest.approx(ran.flops_saved, abs=1e-12)
    gains = [result.gain[i, e] for i, e in enumerate(ran.at)]
    assert ran.gain == pytest.approx(sum(gains) / len(gains))


# Made-up tables


def test_losses_against_a_loop() -> None:
    result = make_table(50, 4, 0, nan_rows=2)
    subset, weights = (0, 2, 3), ((1.0, 2.0, -0.01, 0.1),) * 3
    table = score_table("learned", result, subset, weights, make_costs(4))
    choices = [(NEVER, NEVER, NEVER), (0.75, NEVER, 0.625), (0.5, 0.5, 0.5), (-NEVER, 0.0, 0.0)]
    losses = result.losses(table, subset, choices)
    assert losses.shape == (50, 4) and losses.dtype == np.float64
    for j, thresholds in enumerate(choices):
        for i in range(50):
            left = 4
            for place, e in enumerate(subset):
                if table.scores[i, place] >= thresholds[place]:
                    left = e
                    break
            assert losses[i, j] == result.loss[i, left], (i, j)
    assert losses[:, 0].tolist() == result.loss[:, -1].tolist()


def test_score_table_by_hand() -> None:
    result, costs = make_table(20, 3, 1), make_costs(3, probe=2.0)
    table = score_table("confidence", result, (0, 2), (NO_WEIGHTS,) * 2, costs)
    assert_same(torch.from_numpy(table.scores), result.features[:, [0, 2], 0])
    assert table.gains.tolist() == result.gain[:, [0, 2, 3]].tolist()
    assert table.costs.tolist() == [FULL / 4 + 2, 3 * FULL / 4 + 4, FULL + 4]


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_weights_are_fitted_exit_by_exit(kind: GateKind) -> None:
    result = make_table(80, 4, 2, nan_rows=3)
    subset = (1,) if kind == "static" else (0, 1, 3)
    weights = fit_weights(kind, result, subset)
    assert len(weights) == len(subset)
    for place, e in enumerate(subset):
        right = result.is_correct[:, e]
        if kind == "learned":
            w, b = fit_logistic(result.features[:, e], right)
            assert weights[place] == (*w.tolist(), b)
        elif kind == "agreement" and place:
            now, before = result.embedding[:, e], result.embedding[:, subset[place - 1]]
            cosine = (unit(now) * unit(before)).sum(1)
            w, b = fit_logistic(torch.stack([cosine, result.features[:, e, 2]], 1), right)
            # The cosine is summed in another order here
            assert weights[place] == pytest.approx((float(w[0]), 0.0, float(w[1]), b), rel=1e-2)
            scores = exit_scores(kind, result, subset, weights)[:, place]
            p = torch.sigmoid(cosine.double() * w[0] + result.features[:, e, 2].double() * w[1] + b)
            assert_within(torch.from_numpy(scores), p, 1e-4)
        else:
            assert weights[place] == NO_WEIGHTS


def test_a_probe_is_what_the_features_say() -> None:
    result = make_table(30, 2, 3, nan_rows=1)
    embedding, top1, confidence, margin, variance, learned = result.probe(1, (2.0, -1.0, 0.01, 0.5))
    assert_same(embedding, result.embedding[:, 1])
    assert_same(top1, result.top1[:, 1])
    assert_same(torch.stack([confidence, margin, variance], 1), result.features[:, 1])
    logit = 2.0 * confidence.double() - margin.double() + 0.01 * variance.double() + 0.5
    assert_within(learned, torch.sigmoid(logit), 8 * EPS32)
    assert_same(learned, steady_sigmoid(((2.0 * confidence - margin) + 0.01 * variance) + 0.5))


def test_a_plan_without_exits_saves_nothing() -> None:
    result = make_table(10, 3, 4)
    ran = run_plan(Plan((), Gate("learned", (), ())), [1, 2, 3], result, make_costs(3))
    assert ran.at.tolist() == [3] * 10 and ran.flops_saved == 0.0
    assert ran.gain == pytest.approx(float(result.gain[:, -1].mean()))


def test_plans_name_depths_and_tables_candidates() -> None:
    """Blocks 5 and 11 are candidates 0 and 2."""
    result, costs = make_table(40, 3, 5), make_costs(3)
    gate = Gate("confidence", (NO_WEIGHTS,) * 2, (0.5, 0.25))
    ran = run_plan(Plan((5, 11), gate), [5, 8, 11], result, costs)
    for i, at in enumerate(ran.at):
        first, last = result.features[i, 0, 0] >= 0.5, result.features[i, 2, 0] >= 0.25
        assert at == (0 if first else 2 if last else 3), i
    spent = [dict(zip((0, 2, 3), costs.when_leaving((0, 2)), strict=True))[at] for at in ran.at]
    assert ran.flops_saved == pytest.approx(1 - sum(spent) / 40 / FULL)
