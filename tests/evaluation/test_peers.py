"""Peers beside which a scheme is measured."""

import pytest
import torch

from lraee.evaluation import forms, peers
from lraee.evaluation.evaluate import tower_bytes
from tests.clip_models import make_model
from tests.small_calibration import pictures


def test_bfloat16_is_a_copy() -> None:
    model = make_model()
    half = forms.of_peer(model, "bfloat16", None)
    assert half.visual.conv1.weight.dtype == torch.bfloat16
    assert model.visual.conv1.weight.dtype == torch.float32
    assert tower_bytes(half) * 2 == tower_bytes(model)


@torch.no_grad()
def test_openvino_answers_as_the_model() -> None:
    pytest.importorskip("openvino", reason="openvino is missing: pip install 'lraee[peers]'")
    pytest.importorskip("nncf", reason="nncf is missing: pip install 'lraee[peers]'")
    model = make_model(vision={"layers": 1})
    images = pictures(8)
    peer = peers.openvino_int8(model, images)
    expected = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
    actual = peer.encode_image(images, normalize=True)
    assert (actual * expected).sum(1).min() > 0.98
    assert 0 < tower_bytes(peer) < tower_bytes(model)


def test_forms_that_lack_photos_or_a_name() -> None:
    forms.require_forms(["int8", "paper"], ["bfloat16"], has_photos=False)
    forms.require_forms(["int8-calibrated"], ["openvino"], has_photos=True)
    with pytest.raises(ValueError, match="--calibration must be given for int8-calibrated, got"):
        forms.require_forms(["int8-calibrated"], [], has_photos=False)
    with pytest.raises(ValueError, match="peer must be one of bfloat16, openvino, got 'tflite'"):
        forms.require_forms([], ["tflite"], has_photos=True)
