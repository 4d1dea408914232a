"""Exits for search: projections by least squares, the depth by budget or by proof, and the run."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration.collect import Pair
from lraee.calibration.search import Searches, _Moments, choose_candidates, continued, fit, heads_of
from lraee.exits.bundle import Exits
from lraee.exits.class_token import ClassTokenWeights, in_proj_of
from lraee.exits.gate import Gate
from lraee.exits.plan import Plan
from lraee.storage.files import CheckpointError
from lraee.towers.families import blocks_of, find_tower
from lraee.towers.flops import PartFlops
from tests.calibration.test_calibrate_refusals import N
from tests.small_calibration import LAYERS, assert_same_exits, classes_of, pictures, small_clip
from tests.support import assert_same, assert_within, generator
from tests.towers.timm_models import images as trunk_images
from tests.towers.timm_models import make_trunk

D = 32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures()


def calibrated(model: nn.Module, images: Any, **options: Any) -> Exits:
    fast = lraee.accelerate(model)
    return lraee.calibrate(fast, images, target="search", teacher=model, progress=False, **options)


@pytest.fixture(scope="module")
def exits(model: nn.Module, images: Tensor) -> Exits:
    return calibrated(model, images)


def own_projections(model: nn.Module, block: int) -> ClassTokenWeights:
    """The keys and values that the later blocks of the accelerated model have anyway."""
    later: list[Any] = list(blocks_of(find_tower(model)))[block + 1 :]
    linears = [in_proj_of(each) for each in later]
    w = torch.stack([linear.weight[D:] for linear in linears])
    b = torch.stack([linear.bias[D:] for linear in linears if linear.bias is not None])
    return ClassTokenWeights(w, b, 24)


def test_a_class_token_that_runs_on_alone_is_that_of_whole_blocks_over_tokens_kept_as_they_were(
    model: nn.Module, images: Tensor
) -> None:
    fast = lraee.accelerate(model)
    tower: Any = find_tower(fast)
    pair = Pair(model, fast, images[:9], batch=9, progress=False)
    rows = torch.ones(9, dtype=torch.bool)
    y = continued(pair, rows, {2: own_projections(fast, 2)})[:, 0]
    (kept,) = (z[2].clone() for z in pair.tokens(rows, ""))
    z = kept
    with torch.no_grad():
        for block in list(blocks_of(tower))[2:]:
            z = torch.cat([block(z)[:, :1], kept[:, 1:]], dim=1)
        assert_same(y, tower.finish(z[:, :1]))


def test_moments_solve_an_affine_map() -> None:
    x = torch.randn(200, 5, generator=generator(1))
    m, c = torch.randn(5, 5, generator=generator(2)), torch.arange(5.0)
    sums = _Moments(5, x.device)
    for part in x.split(64):
        sums.add(part, part @ m + c)
    solved, constant = sums.solution()
    assert_within(solved.float(), m, 1e-4)
    assert_within(constant.float(), c, 1e-4)


def test_projections_are_fitted_to_the_tokens_that_each_block_would_have_had(
    model: nn.Module, images: Tensor
) -> None:
    fast = lraee.accelerate(model)
    pair = Pair(model, fast, images, batch=64, progress=False)
    rows = torch.ones(len(images), dtype=torch.bool)
    weights = fit(pair, rows, [2, 3])
    assert {e: list(each.w.shape) for e, each in weights.items()} == {
        2: [3, 2 * D, D], 3: [2, 2 * D, D]
    }  # fmt: skip
    full = pair.embeddings()["full"]
    fitted, own = (
        nn.functional.cosine_similarity(continued(pair, rows, {2: each})[:, 0], full).mean()
        for each in (weights[2], own_projections(fast, 2))
    )
    assert fitted > own


def test_all_images_leave_at_one_depth_with_the_same_bits_in_any_batch(
    model: nn.Module, images: Tensor, exits: Exits, tmp_path: Path
) -> None:
    plain, fast = lraee.accelerate(model), lraee.accelerate(model, exits=exits)
    (block,) = exits.plan.blocks
    x = images[:12]
    with lraee.trace(fast) as trace:
        y = fast.encode_image(x)
    assert trace.exit_block.tolist() == [block] * 12
    (head,) = heads_of(find_tower(plain), exits.heads).values()
    parts = PartFlops.as_run(find_tower(plain))
    cost = parts.when_leaving([block], [2 * (head.macs + 24)])[0]
    assert trace.flops_saved == pytest.approx(1 - cost / parts.total)
    for rows in ([0], [3, 1], [8, 2, 11]):
        assert_same(fast.encode_image(x[rows]), y[rows], rows=rows)
    with lraee.full_depth(fast):
        assert_same(fast.encode_image(x), plain.encode_image(x))
    exits.save(tmp_path / "exits")
    assert_same_exits(Exits.load(tmp_path / "exits"), exits)
    lraee.save(fast, tmp_path / "model")
    others = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    for other in (*others, lraee.load(tmp_path / "model", model)):
        assert_same(other.encode_image(x), y)
    assert_same(lraee.restore(fast).encode_image(x), model.encode_image(x))


def test_macs_are_those_of_the_last_block_of_the_tower(model: nn.Module, exits: Exits) -> None:
    tower = find_tower(lraee.accelerate(model))
    parts = PartFlops.as_run(tower)
    for e, head in heads_of(tower, exits.heads).items():
        assert 2 * head.macs == (LAYERS - e) * parts.blocks[-1] + parts.finish


def test_nan_stays_in_its_image(model: nn.Module, images: Tensor, exits: Exits) -> None:
    fast = lraee.accelerate(model, exits=exits)
    x = images[:5].clone()
    y = fast.encode_image(x)
    x[2] = torch.nan
    rest = [0, 1, 3, 4]
    assert_same(fast.encode_image(x)[rest], y[rest])
    assert fast.encode_image(x)[2].isnan().all()


def test_of_the_depths_within_a_budget_the_latest(model: nn.Module, images: Tensor) -> None:
    card = calibrated(model, images).card
    saved = {row["block"]: row["flops_saved"] for row in card["depths"]}
    assert list(saved) == choose_candidates(LAYERS) == [3, 4]
    for budget, block in ((1 - saved[3], 3), (1 - saved[4], 4)):
        (chosen,) = calibrated(model, images, budget=budget + 1e-9).plan.blocks
        assert chosen == block
    with pytest.raises(ValueError, match="budget must be at least 0.* for search, .* got 0.1"):
        calibrated(model, images, budget=0.1)


def test_a_loss_that_cannot_be_proven_keeps_full_depth(model: nn.Module, images: Tensor) -> None:
    exits = calibrated(model, images, epsilon=0.001)
    assert exits.plan.blocks == ()
    assert exits.card["plans"]["static"]["is_certified"] is False
    fast = lraee.accelerate(model, exits=exits)
    assert_same(fast.encode_image(images[:4]), lraee.accelerate(model).encode_image(images[:4]))


def test_a_proof_takes_the_earliest_depth_that_passes(model: nn.Module, images: Tensor) -> None:
    exits = calibrated(model, images, epsilon=0.9, delta=0.1)
    figures, depths = exits.card["plans"]["static"], exits.card["depths"]
    (block,) = exits.plan.blocks
    (row,) = [each for each in depths if each["block"] == block]
    assert figures["is_certified"] and figures["loss"] == pytest.approx(1 - row["nearest"])
    assert block == depths[0]["block"]


def test_photos_search_among_others_at_their_own_depth() -> None:
    full = torch.eye(4)[[0, 1, 0, 1, 1]] + 0.1 * torch.eye(4)[[3, 3, 2, 2, 3]]
    places = torch.tensor([True, True, False, False, True])
    turned = full.clone()
    turned[3] = full[0]
    result = Searches.of({"teacher": full, "full": full}, torch.stack([full, turned], 1), places)
    assert result.first.tolist() == [[0, 0, 0], [1, 0, 1]]
    assert result.teacher.tolist() == [0, 1]
    assert result.loss.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert result.is_among.all()


def test_a_run_cut_off_goes_on(
    model: nn.Module, images: Tensor, exits: Exits, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "unfinished"
    with monkeypatch.context() as patch:
        patch.setattr("lraee.calibration.search.continued", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrated(model, images, folder=folder)
    with monkeypatch.context() as patch:
        patch.setattr("lraee.calibration.search.fit", lambda *_: 1 / 0)
        assert_same_exits(calibrated(model, images, folder=folder), exits)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["classes", "labels", "gate", "training", "num_exits", "recipe"])
def test_search_takes_photos_alone(model: nn.Module, images: Tensor, name: str) -> None:
    given = {
        "classes": classes_of(model, images), "labels": torch.zeros(N, dtype=torch.int64),
        "gate": "static", "training": "distill", "num_exits": 1, "recipe": "paper",
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^calibrate: {name} must not be given with target"):
        calibrated(model, images, **{name: given[name]})


def test_no_such_target(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match="target must be classes or search, got 'finding'"):
        lraee.calibrate(lraee.accelerate(model), images, target="finding")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["clip", "dinov2", "dinov2 giant", "eva01", "eva02"])
def test_towers_of_timm(family: str) -> None:
    trunk, x = make_trunk(family), trunk_images(120, seed=4)
    plain = lraee.accelerate(trunk)
    exits = lraee.calibrate(plain, x, target="search", budget=0.999, progress=False)
    (block,) = exits.plan.blocks
    fast = lraee.accelerate(trunk, exits=exits)
    y, full = fast(x[:6]), plain(x[:6])
    assert_same(fast(x[4:5]), y[4:5])
    assert nn.functional.cosine_similarity(y, full).min() > 0.9
    assert not torch.equal(y, full) and 1 <= block < len(trunk.blocks)


@pytest.mark.parametrize("family", ["siglip", "mean pool", "dinov3"])
def test_a_tower_that_embeds_more_than_its_class_token_is_refused(family: str) -> None:
    trunk = make_trunk(family)
    with pytest.raises(NotImplementedError, match="must embed its class token alone"):
        lraee.calibrate(trunk, trunk_images(120), target="search", progress=False)


def test_a_tower_of_norms_after_is_refused() -> None:
    trunk = make_trunk("eva02 post-norm")
    with pytest.raises(NotImplementedError, match="must be norm first"):
        lraee.calibrate(trunk, trunk_images(120), target="search", progress=False)


def test_scales_of_a_whole_tensor_are_refused(model: nn.Module, images: Tensor) -> None:
    paper = lraee.accelerate(model, scheme="paper")
    with pytest.raises(NotImplementedError, match="one scale per token"):
        lraee.calibrate(paper, images, target="search", teacher=model, progress=False)


def test_exits_of_another_shape_are_refused(model: nn.Module, exits: Exits) -> None:
    (block,) = exits.plan.blocks
    earlier = replace(
        exits,
        heads={block - 1: exits.heads[block]},
        plans={"static": Plan((block - 1,), exits.plan.gate)},
    )
    with pytest.raises(ValueError, match="must have keys and values"):
        lraee.accelerate(model, exits=earlier)


def test_only_a_static_gate_stands_at_such_an_exit(exits: Exits) -> None:
    (block,) = exits.plan.blocks
    gate = Gate("confidence", ((0.0,) * 4,), (0.5,))
    with pytest.raises(ValueError, match="must have a static gate .* got 'confidence'"):
        replace(exits, plans={"static": Plan((block,), gate)})


def test_a_damaged_file_is_refused(exits: Exits, tmp_path: Path) -> None:
    exits.save(tmp_path)
    path = tmp_path / "exits.json"
    path.write_text(path.read_text().replace('"projections": ', '"projections": 1'))
    with pytest.raises(CheckpointError):
        Exits.load(tmp_path)


def test_a_tower_of_two_blocks_has_no_such_exit() -> None:
    with pytest.raises(ValueError, match="3 blocks at least"):
        choose_candidates(2)


def test_a_half_model_gives_half(model: nn.Module, images: Tensor, exits: Exits) -> None:
    fast = lraee.accelerate(model, exits=exits)
    y = fast.encode_image(images[:3])
    low = fast.bfloat16().encode_image(images[:3].bfloat16())
    assert low.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(low.float(), y).min() > 0.99


def test_the_exit_is_run_by_its_tower(model: nn.Module, images: Tensor, exits: Exits) -> None:
    """Copies run the blocks of their own tower, not those of the tower that they are copies of."""
    fast = lraee.accelerate(model, exits=exits)
    fast.encode_image(images[:2])
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for name, p in find_tower(other).named_parameters():
            if name.endswith("ln_post.weight"):
                p.mul_(2)
    assert not torch.equal(other.encode_image(images[:2]), fast.encode_image(images[:2]))
