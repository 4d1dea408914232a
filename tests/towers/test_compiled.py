"""A compiled tower gives the bits of the tower as it stands, in any batch."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lraee
from tests.clip_models import make_images, make_model
from tests.exits.random_exits import make_exits
from tests.small_calibration import small_clip
from tests.support import assert_same


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return make_model()


def _assert_same_in_any_batch(compiled: nn.Module, fast: nn.Module) -> None:
    images = make_images(7)
    expected = fast.encode_image(images)
    for start, stop in ((0, 1), (0, 2), (2, 7), (3, 4), (0, 7)):
        assert_same(compiled(images[start:stop]), expected[start:stop], images=(start, stop))


@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
@torch.no_grad()
def test_same_bits_in_any_batch(model: nn.Module, scheme: str) -> None:
    fast = lraee.accelerate(model, scheme=scheme)
    compiled = torch.compile(fast.encode_image, fullgraph=True, backend="aot_eager")
    _assert_same_in_any_batch(compiled, fast)


@torch.no_grad()
def test_a_scheme_with_scales_of_the_batch(model: nn.Module) -> None:
    fast = lraee.accelerate(model, scheme="paper")
    compiled = torch.compile(fast.visual, fullgraph=True, backend="aot_eager")
    for images in (make_images(2), make_images(5)):
        assert_same(compiled(images), fast.visual(images))


@pytest.mark.slow
@torch.no_grad()
def test_same_bits_by_inductor(model: nn.Module) -> None:
    fast = lraee.accelerate(model)
    _assert_same_in_any_batch(torch.compile(fast.encode_image, fullgraph=True), fast)
    _assert_same_in_any_batch(torch.compile(fast.visual, fullgraph=True, dynamic=True), fast)


@torch.no_grad()
def test_exits_need_no_break() -> None:
    model = small_clip()
    fast = lraee.accelerate(model, exits=make_exits(model, blocks=(1, 3)))
    compiled = torch.compile(fast.encode_image, fullgraph=True, backend="aot_eager")
    _assert_same_in_any_batch(compiled, fast)
    images = make_images(7)
    with lraee.trace(fast) as expected:
        fast.encode_image(images)
    with lraee.trace(fast) as t:
        compiled(images)
    assert_same(t.exit_block, expected.exit_block)
    with lraee.full_depth(fast):
        assert_same(compiled(images), lraee.accelerate(model).encode_image(images))


@torch.no_grad()
def test_copies_run_their_own_weights(model: nn.Module) -> None:
    fast = lraee.accelerate(model)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        other.visual.ln_post.weight.data.mul_(2)
        _assert_same_in_any_batch(
            torch.compile(other.visual, fullgraph=True, backend="aot_eager"), other
        )
        assert not other.encode_image(make_images(2)).equal(fast.encode_image(make_images(2)))


def test_a_gradient_is_refused_when_it_is_wanted(model: nn.Module) -> None:
    fast = lraee.accelerate(model)
    compiled = torch.compile(fast.visual, backend="aot_eager")
    images = make_images(2).requires_grad_()
    result = compiled(images)
    assert_same(result.detach(), fast.encode_image(images).detach())
    with pytest.raises(RuntimeError, match="an accelerated tower has int8 weights and no gradien"):
        result.sum().backward()


@torch.no_grad()
def test_the_type_of_autocast_is_kept(model: nn.Module) -> None:
    fast, images = lraee.accelerate(model), make_images(2)
    compiled = torch.compile(fast.visual, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected: Tensor = fast.visual(images)
        assert compiled(images).dtype == expected.dtype
