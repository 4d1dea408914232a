"""The patch embedding in int8: the convolution's numbers within rounding, row by row."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.layers.int8_patch_embedding import Int8PatchEmbedding
from lraee.model.acceleration import acceleration_of
from lraee.model.checkpoint import FORMAT
from lraee.ops import PackedLinear, reference
from lraee.towers import flops
from lraee.towers.families import find_tower
from tests.clip_models import VARIANTS, make_images, make_model, make_texts
from tests.sealed_files import resealed
from tests.support import TEXT_BOUND, assert_same, assert_within

NAMES = ("plain", "custom_text", "pool_avg")


def accelerated(model: nn.Module, **options: object) -> nn.Module:
    return lraee.accelerate(model, scheme="int8-patches", **options)


def embedding_of(model: nn.Module) -> Int8PatchEmbedding:
    result = find_tower(model).get_submodule("conv1")
    assert isinstance(result, Int8PatchEmbedding)
    return result


def largest_error(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Bound of |int8 - float| for each patch and channel, [B, D, rows, columns].

    With steps s of a patch and t of a channel, x = s x_q + a, w = t w_q + b and |a| <= s / 2 (a
    hair more where the zero point is rounded as well: s), |b| <= t / 2:
    |x w - s x_q t w_q| <= |a| |w| + |s x_q| |b|, summed over K values.
    """
    height, width = conv.kernel_size
    patches = nn.functional.unfold(images, (height, width), stride=(height, width)).double()
    low, high = patches.amin(1).clamp(max=0), patches.amax(1).clamp(min=0)
    s = (high - low) / 255
    w = conv.weight.flatten(1).double()
    t = w.abs().amax(1) / 127
    x_sum = patches.abs().sum(1) + s * patches.shape[1]
    bound = s[:, None] * w.abs().sum(1)[:, None] + x_sum[:, None] * t[:, None] / 2
    rounding = torch.finfo(torch.float32).eps * w.shape[1] * bound
    side = images.shape[2] // height
    return (bound + rounding).view(len(images), -1, side, side)


def test_is_the_convolution_within_the_rounding_of_int8() -> None:
    model = make_model()
    conv, images = model.visual.conv1, make_images(5)
    with torch.no_grad():
        result, expected = embedding_of(accelerated(model))(images), conv(images)
    assert result.shape == expected.shape
    error = (result.double() - expected.double()).abs()
    assert (error <= largest_error(conv, images)).all()
    assert error.mean() < 0.02 * expected.abs().mean()


def test_is_the_reference_of_its_rows_bit_for_bit() -> None:
    model = make_model()
    fast, images = accelerated(model), make_images(3)
    embedding = embedding_of(fast)
    height, width = embedding.kernel_size
    rows = nn.functional.unfold(images, (height, width), stride=(height, width)).transpose(1, 2)
    quantized = reference.quantize_rows(rows.reshape(-1, rows.shape[2]), False)
    w, w_sum = reference.pack_weight(embedding.w_q)
    y = reference.int8_linear(*quantized, PackedLinear(w, embedding.w_scale, w_sum, embedding.bias))
    with torch.no_grad():
        result = embedding(images)
    assert_same(result.flatten(2).transpose(1, 2).reshape(y.shape).contiguous(), y)


def test_cuts_off_what_fills_no_patch() -> None:
    embedding = embedding_of(accelerated(make_model()))
    height, width = embedding.kernel_size
    images = torch.randn(2, 3, 2 * height + 1, 3 * width + 2)
    with torch.no_grad():
        result = embedding(images)
        assert_same(result, embedding(images[:, :, : 2 * height, : 3 * width]))
    assert result.shape[2:] == (2, 3)


@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
def test_a_batch_of_no_image(scheme: str) -> None:
    model = make_model()
    fast, images = lraee.accelerate(model, scheme=scheme), make_images(2)[:0]
    with torch.no_grad():
        assert fast.visual.conv1(images).shape == model.visual.conv1(images).shape


@pytest.mark.parametrize("variant", NAMES)
def test_same_bits_alone_and_in_any_batch(variant: str) -> None:
    fast, images = accelerated(make_model(**VARIANTS[variant])), make_images(7)
    with torch.no_grad():
        together = fast.encode_image(images)
        for i in range(7):
            assert_same(fast.encode_image(images[i : i + 1])[0], together[i])


def test_a_bad_image_stays_alone() -> None:
    fast, images = accelerated(make_model()), make_images(4)
    with torch.no_grad():
        expected = fast.encode_image(images)
        images[2, 1, 5, 5] = math.nan
        result = fast.encode_image(images)
    assert result[2].isnan().all()
    for i in (0, 1, 3):
        assert_same(result[i], expected[i])


@pytest.mark.parametrize("variant", NAMES)
def test_saved_and_loaded(tmp_path: Path, variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    fast = accelerated(model)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    images = make_images(3)
    with torch.no_grad():
        expected = fast.encode_image(images)
        for other in (loaded, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert isinstance(other.visual.conv1, Int8PatchEmbedding)
            assert_same(other.encode_image(images), expected)
    assert list(loaded.state_dict()) == list(fast.state_dict())


def test_files_from_before_it_load_as_float(tmp_path: Path) -> None:
    model = make_model()
    fast = lraee.accelerate(model)
    lraee.save(fast, tmp_path)
    config = tmp_path / FORMAT.config_name
    fields = json.loads(config.read_text())
    assert fields["scheme"].pop("patch_embedding") == "float"
    config.write_bytes(resealed(fields))
    built = acceleration_of(lraee.load(tmp_path, model))
    assert built is not None and built.scheme == lraee.Scheme()


@pytest.mark.parametrize("inplace", [False, True])
def test_restored(inplace: bool) -> None:
    model = make_model()
    kept = copy.deepcopy(model)
    recorded: list[torch.Size] = []
    model.visual.conv1.register_forward_hook(lambda module, args, y: recorded.append(y.shape))
    fast = accelerated(model, inplace=inplace)
    with torch.no_grad():
        fast.encode_image(make_images(2))
    assert len(recorded) == 1
    back = lraee.restore(fast, base=kept)
    assert type(back.visual.conv1) is nn.Conv2d and acceleration_of(back) is None
    for name, tensor in kept.state_dict().items():
        assert_same(back.state_dict()[name], tensor, name=name)
    images = make_images(2)
    with torch.no_grad():
        assert_same(back.encode_image(images), kept.encode_image(images))
    assert len(recorded) == 2
    back.train()


def test_a_failed_check_in_place_leaves_the_float_model() -> None:
    model = make_model()
    kept = copy.deepcopy(model)
    images = make_images(2)
    images[0] = math.inf
    with pytest.raises(lraee.FidelityError):
        accelerated(model, inplace=True, check=images)
    assert type(model.visual.conv1) is nn.Conv2d
    images = make_images(2)
    with torch.no_grad():
        assert_same(model.encode_image(images), kept.encode_image(images))


def test_counts_as_int8() -> None:
    model = make_model()
    plain, patches = (
        flops.count_macs(lraee.accelerate(model, scheme=scheme).visual)
        for scheme in ("int8", "int8-patches")
    )
    assert patches.total == plain.total == flops.count_macs(model.visual).total
    embed = flops.PartFlops.of(model.visual).embed
    assert 2 * (patches.linear - plain.linear) == embed > 0
    assert flops.PartFlops.of(accelerated(model).visual) == flops.PartFlops.of(model.visual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    fast, images = accelerated(make_model()), make_images(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast.visual.conv1(images).dtype == torch.bfloat16
    fast = fast.to(dtype)
    with torch.no_grad():
        y = fast.visual.conv1(images.to(dtype))
    assert y.dtype == dtype and fast.visual.conv1.weight.dtype == dtype
    assert fast.visual.conv1.weight.dim() == 4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape \[B, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), r"shape \[B, 3, H, W\], got \[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 1, 32), "at least .* pixels, got 1 x 32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float16), "torch.float32, got torch.float16"),
    ],
)
def test_refuses_images(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedding_of(accelerated(make_model()))(images)


def test_refuses_overlapping_patches() -> None:
    model = make_model()
    conv = model.visual.conv1
    model.visual.conv1 = nn.Conv2d(3, conv.out_channels, conv.kernel_size, stride=1, bias=False)
    with pytest.raises(NotImplementedError, match="patch_embedding must be 'float'"):
        accelerated(model)


def test_refuses_an_unknown_type() -> None:
    with pytest.raises(ValueError, match="patch_embedding must be one of float, int8, got 'half'"):
        lraee.Scheme(patch_embedding="half")  # type: ignore[arg-type]


def test_text_stays_as_it_is() -> None:
    model, texts = make_model(), make_texts()
    with torch.no_grad():
        assert_within(accelerated(model).encode_text(texts), model.encode_text(texts), TEXT_BOUND)
