"""The guard's measures by hand, and three broken quantizers that it must catch."""

import math

import pytest
import torch

import lraee
from lraee.layers.int8_linear import Int8Linear
from lraee.model.fidelity import BOUND, Fidelity, compare, require_fidelity
from lraee.towers.families import blocks_of
from tests.clip_models import make_lraee_tiny
from tests.photos import photo_crops

PERFECT = Fidelity(1.0, 1.0, 1.0, 1.0)


def test_compare_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    y = torch.tensor([[2.0, 0.0], [1.0, 1.0], [3.0, 4.0]])
    result = compare(x, y)
    root = math.sqrt(0.5)
    assert math.isclose(result.cosine_min, root) and math.isclose(
        result.cosine_mean, (2 + root) / 3
    )
    # Pairs (01, 02, 12): 0, 0.6, 0.8 against 0.707, 0.6, 0.99: ranks 0 1 2 against 1 0 2
    assert math.isclose(result.ranking, 0.5)
    # Less the centre (4/3, 5/3), times 3: (-1, -5), (-4, -2), (5, 7); (2, -5), (-1, -2), (5, 7)
    cosines = [23 / math.sqrt(26 * 29), 8 / math.sqrt(20 * 5), 1.0]
    assert math.isclose(result.centred, sum(cosines) / 3)


def test_compare_of_few_images():
    x = torch.randn(1, 8)
    assert compare(x, x).cosine_min == pytest.approx(1.0)
    assert compare(x, -x).cosine_min == pytest.approx(-1.0)
    assert compare(torch.randn(2, 8), torch.randn(2, 8)).ranking == 1.0


@pytest.mark.parametrize("name", vars(PERFECT))
@pytest.mark.parametrize("value", [0.5, math.nan])
def test_each_measure_has_a_bound(name, value):
    require_fidelity(PERFECT)
    with pytest.raises(lraee.FidelityError, match=f"{name} must be at least .* got {value:.4f}"):
        require_fidelity(Fidelity(**{**vars(PERFECT), name: value}))


@torch.no_grad()
def test_nan_is_a_disagreement():
    x = torch.randn(4, 8)
    broken = x.clone()
    broken[2, 3] = math.nan
    with pytest.raises(lraee.FidelityError):
        require_fidelity(compare(x, broken))


# Broken quantizers


def scales_off_by_one_channel(linear):
    linear.w_scale = linear.w_scale.roll(1)


def weights_of_four_bits(linear):
    step = 127 / 7
    w_q = (torch.round(linear.w_q / step) * step).round().to(torch.int8)
    linear.load_state_dict({**linear.state_dict(), "w_q": w_q})


def no_zero_point(linear):
    linear.w_sum = torch.zeros_like(linear.w_sum)


BROKEN = [scales_off_by_one_channel, weights_of_four_bits, no_zero_point]


@pytest.fixture(scope="module")
def model():
    return make_lraee_tiny()


@pytest.fixture(scope="module")
def photos():
    return photo_crops(24)


def measure(model, photos, *, broken=None):
    """Agreement of an accelerated model, each of its linears broken."""
    fast = lraee.accelerate(model)
    for module in blocks_of(fast.visual).modules():
        if broken is not None and isinstance(module, Int8Linear):
            broken(module)
    with torch.no_grad():
        return compare(model.encode_image(photos), fast.encode_image(photos))


def test_a_healthy_model_passes_with_room(model, photos):
    result = measure(model, photos)
    require_fidelity(result)
    for name, least in vars(BOUND).items():
        assert 1 - getattr(result, name) < (1 - least) / 3, (name, result)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_quantizer_is_caught(model, photos, broken):
    with pytest.raises(lraee.FidelityError):
        require_fidelity(measure(model, photos, broken=broken))
