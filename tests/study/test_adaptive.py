"""The adaptive rival: skipping is removal, FLOPs are those of what runs, training does its work."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee import accelerate
from lraee.study import adaptive
from lraee.study.adaptive import Policy, run_policy, train_policy
from lraee.towers.flops import PartFlops
from tests.clip_models import VARIANTS, blocks_of, make_images, make_model
from tests.support import assert_same, assert_within

DEPTH, D, L = 3, 64, 17
POLICY_FLOPS = DEPTH * 2 * (2 * D + (L - 1) * D)
"""Two logits of the class token and one of each patch, where no patch is gone."""

ROUNDING = 2e-5
"""Sums of at most 256 float32 products in another order, three blocks deep, on unit embeddings."""


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    return F.normalize(model.encode_image(images), dim=1)  # type: ignore[operator]


def trained(model: nn.Module, images: Tensor, **changes: Any) -> Policy:
    arguments: dict[str, Any] = {
        "classes": F.normalize(torch.randn(10, 24), dim=1), "keep": 0.7, "steps": 3, "seed": 0,
        "progress": False,
    }  # fmt: skip
    return train_policy(model, images, **(arguments | changes))


def all_run() -> Policy:
    return Policy(DEPTH, D)


@torch.no_grad()
def varied() -> Policy:
    """Decisions that differ from image to image and from patch to patch."""
    policy = Policy(DEPTH, D)
    for linear in policy.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=0.3)
            nn.init.constant_(linear.bias, 0.5)
    return policy


@pytest.mark.parametrize("variant", ["plain", "raw_in_proj", "layer_scale", "quick_gelu"])
def test_all_decisions_on_is_the_full_tower(variant: str) -> None:
    model, images = make_model(**VARIANTS[variant]), make_images()
    y, saved = run_policy(model, all_run(), images)
    assert_within(F.normalize(y, dim=1), embed(model, images), ROUNDING)
    total = PartFlops.of(model.get_submodule("visual")).total
    assert saved == pytest.approx(-POLICY_FLOPS / total)


def test_a_skipped_block_is_as_if_it_were_not_there() -> None:
    model, images, policy = make_model(), make_images(), all_run()
    nn.init.constant_(policy.get_parameter("blocks.1.parts.bias"), -1.0)
    y, saved = run_policy(model, policy, images)
    parts = PartFlops.of(model.get_submodule("visual"))
    assert saved * parts.total == pytest.approx(parts.blocks[1] - POLICY_FLOPS)
    blocks_of(model)[1].forward = lambda z, **_: z  # type: ignore[method-assign]
    assert_within(F.normalize(y, dim=1), embed(model, images), ROUNDING)


def test_attention_and_mlp_are_skipped_apart() -> None:
    model, images, policy = make_model(), make_images(), all_run()
    with torch.no_grad():
        policy.get_parameter("blocks.0.parts.bias")[0] = -1.0
        policy.get_parameter("blocks.2.parts.bias")[1] = -1.0
    y, saved = run_policy(model, policy, images)
    total = PartFlops.of(model.get_submodule("visual")).total
    attention, mlp = L * 4 * D * D + 2 * L * L * D, L * 8 * D * D
    assert saved * total == pytest.approx(2 * (attention + mlp) - POLICY_FLOPS)
    with torch.no_grad():
        for name in ("0.attn.out_proj", "2.mlp.c_proj"):
            for parameter in blocks_of(model).get_submodule(name).parameters():
                parameter.zero_()
    assert_within(F.normalize(y, dim=1), embed(model, images), ROUNDING)


def test_dropped_patches_are_gone_from_then_on() -> None:
    model, images, policy = make_model(), make_images(), all_run()
    nn.init.constant_(policy.get_parameter("blocks.1.patches.bias"), -1.0)
    _, saved = run_policy(model, policy, images)
    alone = 12 * D * D + 2 * D  # the class token, with itself
    whole = L * 12 * D * D + 2 * L * L * D
    policy_flops = 2 * D * ((2 + L - 1) * 2 + 2)  # the last policy sees the class token alone
    total = PartFlops.of(model.get_submodule("visual")).total
    assert saved * total == pytest.approx(2 * 2 * (whole - alone) - policy_flops)


@torch.no_grad()
def test_masking_in_training_is_removal() -> None:
    """What training computes of hard decisions is what each image alone computes, FLOPs too."""
    model, images, policy = make_model(), make_images(8), varied()
    tower = model.get_submodule("visual")
    costs = adaptive._Costs.of(tower)
    z = adaptive.embed_tokens(tower, images)
    y, flops = adaptive._masked(tower, policy, z, lambda logits: (logits > 0).float(), costs)
    alone, saved = run_policy(model, policy, images)
    assert_within(F.normalize(y, dim=1), F.normalize(alone, dim=1), ROUNDING)
    assert saved == pytest.approx(1 - float(flops.mean()) / costs.total, abs=1e-5)
    assert len(flops.unique()) > 4  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("scheme", [None, "int8", "paper"])
def test_an_image_alone_and_in_a_batch_has_the_same_bits(scheme: str | None) -> None:
    model, images, policy = make_model(), make_images(), varied()
    model = model if scheme is None else accelerate(model, scheme=scheme)
    together, saved = run_policy(model, policy, images)
    alone = [run_policy(model, policy, image[None]) for image in images]
    assert_same(together, torch.cat([y for y, _ in alone]))
    assert saved == pytest.approx(sum(s for _, s in alone) / len(images))


def test_int8_runs_as_the_int8_tower_does() -> None:
    model, images = make_model(), make_images()
    fast = accelerate(model)
    y, _ = run_policy(fast, all_run(), images)
    # The fused block norms in float32 in another order: an input may round to the next of 255 steps
    assert_within(F.normalize(y, dim=1), embed(fast, images), 4e-3)
    assert not torch.equal(y, run_policy(model, all_run(), images)[0])


def test_training_finds_the_block_that_adds_nothing() -> None:
    """Of three blocks one adds nothing: told to keep two thirds, the policy leaves it out."""
    model, images = make_model(), make_images(16)
    with torch.no_grad():
        for name in ("1.attn.out_proj", "1.mlp.c_proj"):
            for parameter in blocks_of(model).get_submodule(name).parameters():
                parameter.zero_()
    policy = trained(model, images, keep=0.69, steps=100)
    assert sum(policy.losses[-10:]) < sum(policy.losses[:10]) / 10
    y, saved = run_policy(model, policy, images)
    assert F.cosine_similarity(y, embed(model, images)).min() > 0.999
    assert saved == pytest.approx(0.31, abs=0.02)


def test_to_keep_all_is_the_full_tower() -> None:
    model, images = make_model(), make_images(32)
    y, saved = run_policy(model, trained(model, images, keep=1.0, steps=20), images)
    assert_within(F.normalize(y, dim=1), embed(model, images), ROUNDING)
    assert saved < 0.0


def test_the_tower_stays_frozen_and_the_seed_decides() -> None:
    model, images = make_model(), make_images(8)
    classes = F.normalize(torch.randn(10, 24), dim=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    policies = [trained(model, images, classes=classes, seed=seed) for seed in (0, 0, 1)]
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name], name=name)
    assert all(p.grad is None for p in model.parameters())
    assert policies[0].losses == policies[1].losses != policies[2].losses


def test_larger_images_are_cropped() -> None:
    model, images, policy = make_model(), make_images(), varied()
    framed = F.pad(images, (3, 3, 2, 2))
    assert_same(run_policy(model, policy, framed)[0], run_policy(model, policy, images)[0])


def test_bad_input_is_refused() -> None:
    model, images = make_model(), make_images(2)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        trained(model, images, keep=0.0)
    with pytest.raises(ValueError, match=r"train_policy: images must be .* got \[0, 3"):
        trained(model, images[:0])
    with pytest.raises(ValueError, match="run_policy: images must be one at least"):
        run_policy(model, all_run(), images[:0])
    with pytest.raises(ValueError, match="policy must be for 3 blocks, got 2"):
        run_policy(model, Policy(2, D), images)
    with pytest.raises(NotImplementedError, match="by its class token.* pooling 'mean'"):
        run_policy(make_model(**VARIANTS["pool_avg"]), all_run(), images)
