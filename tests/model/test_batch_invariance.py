"""The same image gives the same bits in any batch: size, position, neighbours, thread count."""

import itertools
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee import ops
from lraee.ops import registry
from tests.clip_models import VARIANTS, make_images, make_lraee_tiny, make_model
from tests.support import assert_same, generator, quantized_linear

ISA_LEVELS: list[str] = []
if registry.CPU_EXTENSION_ERROR is None:
    from lraee import _C

    ISA_LEVELS = list(_C.isa_levels())

SMALL_PARAMETERS = {"vision": {"layers": 1}}


@pytest.fixture(scope="module")
def fast() -> nn.Module:
    return lraee.accelerate(make_lraee_tiny())


@pytest.fixture(params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level of this machine, one after the other."""
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


def photos(n: int, size: int, seed: int = 0) -> Tensor:
    """Pictures of different brightness and contrast, one of them flat."""
    source = generator(seed)
    coarse = torch.randn(n, 3, 7, 7, generator=source)
    images = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    images = images * (torch.rand(n, 1, 1, 1, generator=source) * 2 + 0.05)
    images[0] = 0.25
    return images


def hostile(size: int) -> Tensor:
    """Neighbours that would change a shared scale, sum or maximum."""
    strange = torch.zeros(5, 3, size, size)
    strange[0] = math.nan
    strange[1] = 1e4
    strange[2, :, 3] = -1e4
    strange[3, 1, 2, 2] = math.inf
    strange[4] = torch.randn(3, size, size, generator=generator(9)) * 1e4
    return strange


def count_pairs(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    batch_sizes: tuple[int, ...],
    rounds: int,
    threads: tuple[int, ...] = (1, 2),
) -> int:
    """Compares each image's result in random batches with the one it has alone on one thread."""
    torch.set_num_threads(1)
    alone = [encode(image[None])[0] for image in images]
    neighbours = hostile(images.shape[-1])
    source = random.Random(0)
    pairs = 0
    for number, B, _ in itertools.product(threads, batch_sizes, range(rounds)):
        torch.set_num_threads(number)
        picks = [source.randrange(len(images)) for _ in range(B)]
        batch = images[picks]
        for position in range(B):
            if source.random() < 0.2:
                picks[position] = -1
                batch[position] = neighbours[source.randrange(len(neighbours))]
        result = encode(batch)
        for position, pick in enumerate(picks):
            if pick >= 0:
                where = {"threads": number, "batch": B, "position": position, "image": pick}
                assert_same(result[position], alone[pick], **where)
                pairs += 1
    return pairs


@torch.no_grad()
def test_encode_image_in_two_thousand_pairs(fast: nn.Module) -> None:
    def encode(x: Tensor) -> Tensor:
        return fast.encode_image(x, normalize=True)

    sizes = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 64, 100)
    assert count_pairs(encode, photos(24, 56), batch_sizes=sizes, rounds=4) >= 2000


@torch.no_grad()
def test_encode_image_at_each_level(isa: str) -> None:
    small = lraee.accelerate(make_model(**SMALL_PARAMETERS))
    pairs = count_pairs(small.encode_image, photos(8, 32), batch_sizes=(1, 2, 5, 9, 17), rounds=2)
    assert pairs >= 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types(dtype: torch.dtype) -> None:
    small = lraee.accelerate(make_model(**SMALL_PARAMETERS).to(dtype))
    images = photos(8, 32).to(dtype)
    assert count_pairs(small.encode_image, images, batch_sizes=(1, 3, 6, 17), rounds=2) >= 35


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_option_of_a_tower(variant: str) -> None:
    small = lraee.accelerate(make_model(**VARIANTS[variant]))

    def encode(x: Tensor) -> Tensor:
        features = small.encode_image(x)
        return features[0] if isinstance(features, tuple) else features

    assert count_pairs(encode, photos(6, 32), batch_sizes=(2, 6, 17), rounds=1) >= 30


@pytest.mark.parametrize(
    "scheme",
    [
        lraee.Scheme(attention="float"),
        lraee.Scheme(keep_float=("resblocks.0.mlp.c_fc", "resblocks.1.attn.in_proj")),
        lraee.Scheme(symmetric=("in_proj", "c_proj")),
    ],
    ids=["float attention", "kept float", "symmetric"],
)
@torch.no_grad()
def test_other_schemes(scheme: lraee.Scheme) -> None:
    small = lraee.accelerate(make_model(), scheme=scheme)
    assert count_pairs(small.encode_image, photos(6, 32), batch_sizes=(2, 6, 17), rounds=2) >= 60


@torch.no_grad()
def test_image_size_of_a_channels_last_batch(fast: nn.Module) -> None:
    images = photos(9, 56)
    expected = fast.encode_image(images)
    torch.set_num_threads(1)
    assert_same(fast.encode_image(images[2:4]), expected[2:4])
    strided = torch.stack([images, images + 1], dim=1)[:, 0]
    assert_same(fast.encode_image(strided), expected)


# Operators, row by row


def rows_of(outputs: object, row: int) -> list[Tensor]:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return [t[row] for t in tensors]


SHAPES = [(50, 64), (197, 96), (33, 257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_quantize_alone(isa: str, shape: tuple[int, int], symmetric: bool) -> None:
    M, K = shape
    x = torch.randn(M, K, generator=generator(1))
    x[3], x[5, 7], x[9] = math.nan, math.inf, 1e4
    gamma, beta = torch.rand(K, generator=generator(2)), torch.rand(K, generator=generator(3))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = ops.quantize_rows(x, symmetric=symmetric)
        normed = ops.layer_norm_quantize(x, gamma, beta, symmetric=symmetric)
        for row in range(0, M, 7):
            part = slice(row, row + 1 + row % 3)
            alone = ops.quantize_rows(x[part], symmetric=symmetric)
            alone_normed = ops.layer_norm_quantize(x[part], gamma, beta, symmetric=symmetric)
            for result, expected in zip(rows_of(alone, 0), rows_of(whole, row), strict=True):
                assert_same(result, expected, isa=isa, row=row)
            pairs = zip(rows_of(alone_normed, 0), rows_of(normed, row), strict=True)
            for result, expected in pairs:
                assert_same(result, expected, isa=isa, row=row)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
def test_rows_multiply_alone(isa: str, activation: ops.Activation) -> None:
    M, N, K = 61, 50, 67
    a = quantized_linear(M, N, K, seed=4)
    a["x_scale"][11] = math.nan
    w, w_sum = ops.pack_weight(a["w_q"])
    linear = ops.PackedLinear(w, a["w_scale"], w_sum, a["bias"], a["layer_scale"])

    def multiply(rows: slice) -> Tensor:
        return ops.int8_linear(
            a["x_q"][rows], a["x_scale"][rows], a["x_zero"][rows], linear,
            residual=a["residual"][rows], activation=activation,
        )  # fmt: skip

    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = multiply(slice(0, M))
        for begin, size in itertools.product(range(0, M, 5), (1, 2, 7, 16, 33)):
            end = min(M, begin + size)
            part = multiply(slice(begin, end))
            assert_same(part, whole[begin:end], isa=isa, begin=begin, size=size)


@pytest.mark.parametrize("L", [1, 2, 50, 77])
@pytest.mark.parametrize("causal", [False, True])
def test_images_attend_alone(isa: str, L: int, causal: bool) -> None:
    qkv = torch.randn(7, L, 3 * 48, generator=generator(5))
    qkv[2, 0, 5], qkv[4] = math.nan, 1e4
    torch.set_num_threads(1)
    alone = [ops.int8_attention(image[None], num_heads=3, causal=causal)[0] for image in qkv]
    for threads, shift in itertools.product((1, 2), range(7)):
        torch.set_num_threads(threads)
        result = ops.int8_attention(qkv.roll(shift, 0), num_heads=3, causal=causal)
        for i, expected in enumerate(alone):
            assert_same(result[(i + shift) % 7], expected, isa=isa, shift=shift, image=i)


def test_images_are_probed_alone(isa: str) -> None:
    D, E, K = 48, 16, 9
    source = generator(6)
    z = torch.randn(9, 12, D, generator=source)
    z[3, 2, 4], z[5] = math.nan, 1e4
    w_q = torch.randint(-127, 128, (E, D), generator=source, dtype=torch.int8)
    w, w_sum = ops.pack_weight(w_q)
    classes = nn.functional.normalize(torch.randn(K, E, generator=source), dim=1)

    norm = ops.Norm(torch.ones(D), torch.zeros(D))
    first = ops.PackedLinear(w, torch.full((E,), 0.01), w_sum)
    head = ops.ProbeHead(norm, first, None, classes, 30.0, torch.ones(4))

    def probe(images: Tensor) -> tuple[Tensor, ...]:
        return ops.exit_probe(images, head)

    torch.set_num_threads(1)
    alone = [probe(image[None]) for image in z]
    for threads, shift in itertools.product((1, 2), range(9)):
        torch.set_num_threads(threads)
        result = probe(z.roll(shift, 0))
        for i, expected in enumerate(alone):
            position = (i + shift) % 9
            for a, b in zip(rows_of(result, position), rows_of(expected, 0), strict=True):
                assert_same(a, b, isa=isa, shift=shift, image=i)


def test_images_of_this_file_are_not_all_alike() -> None:
    assert make_images(2)[0].ne(make_images(2)[1]).any()
    assert len({float(image.std()) for image in photos(24, 56)}) == 24
