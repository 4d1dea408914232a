"""The float control, the early projection, and candidates scaled to a tower."""

import pytest
import torch

from lraee.calibration.collect import tapped
from lraee.study.backbones import backbone, float_scheme, paper_candidates, projected
from tests.clip_models import make_images, make_model
from tests.small_calibration import LAYERS, pictures, small_clip


def test_the_float_control_is_the_float_model() -> None:
    clip, images = small_clip(), pictures(40)
    with torch.inference_mode():
        expected = clip.encode_image(images)
        result = backbone(clip, "float").encode_image(images)
        int8 = backbone(clip, "int8").encode_image(images)
    # float32 sums in another order: 1e-5 of the largest value; int8 is far outside of it
    largest = float(expected.abs().max())
    assert float((result - expected).abs().max()) < 1e-5 * largest
    assert float((int8 - expected).abs().max()) > 1e-3 * largest
    assert len(float_scheme(clip.visual).keep_float) == 4 * LAYERS


def test_the_last_projection_is_the_embedding() -> None:
    clip, images = small_clip(), pictures(20)
    with torch.inference_mode(), tapped(clip.visual) as z:
        expected = clip.encode_image(images)
        result = projected(clip.visual, z[-1][:, 0])
        earlier = projected(clip.visual, z[1][:, 0])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert float((earlier - expected).abs().max()) > 0.01


def test_a_tower_without_class_token_is_refused() -> None:
    tower = make_model(vision={"pool_type": "avg"}).visual
    with pytest.raises(NotImplementedError, match="pooling 'mean'"):
        projected(tower, make_images(1).flatten(1)[:, :64])


def test_paper_candidates() -> None:
    assert paper_candidates(12) == (8, 9, 10, 11)
    assert paper_candidates(24) == (16, 18, 20, 22)
    assert paper_candidates(3) == (2,)
