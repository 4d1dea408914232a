"""SmoothQuant: the float function stays, ranges are evened out, outliers cost less."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee import accelerate
from lraee.model.fidelity import compare
from lraee.study.smooth import best_alpha, smoothed, smoothing_scale
from tests.clip_models import VARIANTS, blocks_of, make_images, make_model
from tests.support import assert_same, assert_within

OUTLIERS = {3: 40.0, 17: 25.0}


@torch.no_grad()
def with_outliers(model: nn.Module) -> nn.Module:
    """The same function, with some channels of each norm enlarged and their weights shrunk."""
    for block in blocks_of(model):
        for norm, weight in pairs(block):
            for channel, factor in OUTLIERS.items():
                norm.weight[channel] *= factor
                norm.bias[channel] *= factor
                weight[:, channel] /= factor
    return model


def pairs(block: nn.Module) -> list[tuple[nn.LayerNorm, Tensor]]:
    names = (("ln_1", "attn.in_proj_weight"), ("ln_2", "mlp.c_fc.weight"))
    return [(block.get_submodule(n), block.get_parameter(w)) for n, w in names]  # type: ignore[misc]


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    return F.normalize(model.encode_image(images), dim=1)  # type: ignore[operator]


def test_scale_by_hand() -> None:
    x_max = torch.tensor([16.0, 4.0, 0.0, 1.0])
    w_max = torch.tensor([4.0, 1.0, 2.0, 0.0])
    assert_same(smoothing_scale(x_max, w_max, 0.5), torch.tensor([2.0, 2.0, 1.0, 1.0]))
    assert_same(smoothing_scale(x_max, w_max, 1.0), torch.tensor([16.0, 4.0, 1.0, 1.0]))
    assert_same(smoothing_scale(x_max, w_max, 0.0), torch.tensor([0.25, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["plain", "raw_in_proj", "layer_scale", "quick_gelu"])
def test_the_float_function_stays(variant: str, alpha: float) -> None:
    model, images = with_outliers(make_model(**VARIANTS[variant])), make_images()
    built = smoothed(model, images, alpha=alpha)
    # Two more roundings of weight and activation per product, averaged over 64 channels
    assert_within(embed(built, images), embed(model, images), 2e-5, variant=variant)
    differs = pairs(blocks_of(built)[0])[0][1] != pairs(blocks_of(model)[0])[0][1]
    assert differs.float().mean() > 0.5


def test_half_evens_out_activations_and_weights() -> None:
    """At alpha = 1/2 channel j has max|X_j| = max|W_j| = sqrt of the product of what they were."""
    model, images = with_outliers(make_model()), make_images()
    built = smoothed(model, images)
    for block in blocks_of(built):
        for norm, weight in pairs(block):
            seen: list[Tensor] = []
            handle = norm.register_forward_hook(lambda _, args, y, seen=seen: seen.append(y))
            embed(built, images)
            handle.remove()
            x_max = seen[0].flatten(0, 1).abs().amax(0)
            assert_within(x_max, weight.detach().abs().amax(0), 1e-4)


def test_the_model_itself_stays() -> None:
    model, images = make_model(), make_images()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    smoothed(model, images)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name], name=name)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_channel_without_range_stays() -> None:
    model, images = make_model(), make_images()
    with torch.no_grad():
        norm, weight = pairs(blocks_of(model)[1])[1]
        norm.weight[5] = norm.bias[5] = 0.0
        weight[:, 9] = 0.0
    built = smoothed(model, images)
    new_norm, new_weight = pairs(blocks_of(built)[1])[1]
    assert_same(new_weight[:, 5].detach(), weight[:, 5].detach())
    assert_same(new_norm.weight[9].detach(), norm.weight[9].detach())


def test_outliers_cost_less() -> None:
    """Planted outliers ruin steps that a whole tensor shares; smoothing takes most of it back."""
    model, images = with_outliers(make_model()), make_images(12)
    expected = embed(model, images)
    result = {
        name: 1 - compare(expected, embed(accelerate(each, scheme="paper"), images)).centred
        for name, each in {"as it is": model, "smoothed": smoothed(model, images)}.items()
    }
    assert result["smoothed"] < result["as it is"] / 4


def test_best_alpha_is_the_nearest() -> None:
    model, images = with_outliers(make_model()), make_images(12)
    expected, alphas = embed(model, images), (0.0, 0.5, 1.0)
    errors = []
    for alpha in alphas:
        fast = accelerate(smoothed(model, images, alpha=alpha), scheme="paper")
        errors.append(1 - compare(expected, embed(fast, images)).centred)
    best = best_alpha(model, images, alphas=alphas, scheme="paper")
    assert errors[alphas.index(best)] == min(errors)
    assert min(errors) < max(errors)


def test_bad_input_is_refused() -> None:
    model, images = make_model(), make_images(2)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        smoothed(model, images, alpha=1.5)
    with pytest.raises(ValueError, match=r"images must be \[n, 3, H, W\], n >= 1, got \[0, 3"):
        smoothed(model, images[:0])
    with pytest.raises(ValueError, match="alphas must be one at least"):
        best_alpha(model, images, alphas=(), scheme="int8")
    with pytest.raises(NotImplementedError, match="attn"):
        smoothed(make_model(vision={"block_type": "custom", "qk_norm": True}), images)
