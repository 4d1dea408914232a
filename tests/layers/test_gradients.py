"""A gradient through an accelerated tower is never silently absent."""

import pytest
import torch

import lraee
from lraee.layers.gradients import NO_GRADIENT
from tests.clip_models import make_images, make_model


@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
def test_backward_raises_one_line(scheme: str) -> None:
    fast = lraee.accelerate(make_model(), scheme=scheme)
    image = make_images(2).requires_grad_()
    result = fast.encode_image(image)
    assert result.requires_grad and "\n" not in NO_GRADIENT
    with pytest.raises(RuntimeError, match="backward: an accelerated tower has int8 weights"):
        result.sum().backward()
    assert image.grad is None


def test_parameters_alone_count_and_frozen_ones_do_not() -> None:
    fast, images = lraee.accelerate(make_model()), make_images(2)
    with pytest.raises(RuntimeError, match="no gradients"):
        fast.encode_image(images).sum().backward()
    fast.visual.requires_grad_(False)
    assert not fast.encode_image(images).requires_grad
    with torch.no_grad():
        assert not fast.requires_grad_().encode_image(images).requires_grad


def test_a_block_alone_refuses_too() -> None:
    block = lraee.accelerate(make_model()).visual.transformer.resblocks[0]
    z = torch.randn(1, 17, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        block(z).sum().backward()
    handle = block.mlp.register_forward_hook(lambda *_: None)  # by child, the residual a path
    with pytest.raises(RuntimeError, match="no gradients"):
        block(z).sum().backward()
    handle.remove()


def test_numbers_are_those_without_autograd() -> None:
    fast, images = lraee.accelerate(make_model()), make_images(2)
    with torch.no_grad():
        expected = fast.encode_image(images)
    assert torch.equal(fast.encode_image(images).detach(), expected)
    assert torch.equal(fast.encode_image(images.requires_grad_()).detach(), expected)
