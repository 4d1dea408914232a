"""The noise profile against its formulas, and which exits it drops."""

import pytest
import torch
from torch import Tensor

from lraee.calibration.noise import BlockNoise, NoiseMeter, as_rows, pathological
from tests.support import generator

BLOCKS, N, L, D = 3, 11, 5, 8


def tokens(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Float tokens before the first block and after each, and int8 tokens after each."""
    source = generator(seed)
    z = [torch.randn(N, L, D, generator=source) * (i + 1) + 3 for i in range(BLOCKS + 1)]
    return z, [each + 0.1 * torch.randn(N, L, D, generator=source) + 0.05 for each in z[1:]]


def naive(z: list[Tensor], noisy: list[Tensor]) -> list[BlockNoise]:
    """Image by image, by the formulas of BlockNoise."""
    rows = []
    for before, after, other in zip(z, z[1:], noisy, strict=False):
        images = list(zip(before.double(), after.double(), other.double(), strict=True))
        step = sum(float((b - a).norm()) for a, b, _ in images) / len(images)
        error = sum(float((c - b).norm()) for _, b, c in images) / len(images)
        noise = torch.stack([c - b for _, b, c in images])
        dots = [float((b * c).sum() / (b.norm() * c.norm())) for _, b, c in images]
        mean = torch.stack([b for _, b, _ in images]).mean(0)
        rows.append(
            BlockNoise(
                natural_step=step,
                quantization_error=error,
                nsr=error / step,
                mse=float((noise**2).mean()),
                cosine=sum(dots) / len(dots),
                max_abs=max(float(b.abs().max()) for _, b, _ in images),
                inr=float((mean**2).sum() / noise.var(0, correction=0).sum()),
            )
        )
    return rows


def assert_equal(found: list[BlockNoise], expected: list[BlockNoise]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert vars(row) == pytest.approx(vars(wanted), rel=1e-9)


@pytest.mark.parametrize("batches", [[N], [4, 4, 3], [1] * N])
def test_meter_against_the_formulas(batches: list[int]) -> None:
    z, noisy = tokens(0)
    meter = NoiseMeter(BLOCKS)
    parts = zip(*(each.split(batches) for each in (*z, *noisy)), strict=True)
    for part in parts:
        meter.add(part[0], part[1 : BLOCKS + 1], part[BLOCKS + 1 :])
    assert_equal(meter.result(), naive(z, noisy))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_as_if_absent(value: float) -> None:
    """Spoilt in float or in int8 from some block on; also a whole batch of such images."""
    z, noisy = tokens(1)
    kept = torch.ones(N, dtype=torch.bool)
    for image, where in ((2, [*z, *noisy]), (5, noisy), (9, noisy[2:]), (10, [*z, *noisy])):
        kept[image] = False
        for each in where:
            each[image] = value
    meter = NoiseMeter(BLOCKS)
    for rows in (slice(0, 4), slice(4, 9), slice(9, 11)):
        meter.add(z[0][rows], [each[rows] for each in z[1:]], [each[rows] for each in noisy])
    assert_equal(meter.result(), naive([each[kept] for each in z], [each[kept] for each in noisy]))


def test_half_types_are_added_in_float64() -> None:
    z, noisy = ([each.bfloat16() for each in part] for part in tokens(2))
    meter = NoiseMeter(BLOCKS)
    meter.add(z[0], z[1:], noisy)
    assert_equal(meter.result(), naive(z, noisy))


def test_noise_by_hand() -> None:
    """Two images of one token [2]; the int8 tower adds (1, 0) to one and (-1, 0) to the other."""
    before = torch.zeros(2, 1, 2)
    after = torch.tensor([[[3.0, 4.0]], [[3.0, -4.0]]])
    meter = NoiseMeter(1)
    meter.add(before, [after], [after + torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])])
    (row,) = meter.result()
    assert (row.natural_step, row.quantization_error, row.nsr) == (5.0, 1.0, 0.2)
    assert (row.mse, row.max_abs) == (0.5, 4.0)
    # |mean z|^2 = |(3, 0)|^2 = 9; the variance is 1 in the first value, 0 in the second
    assert row.inr == pytest.approx(9.0)
    # (4, 4) and (2, -4) with (3, 4) and (3, -4)
    cosines = 28 / (32**0.5 * 5), 22 / (20**0.5 * 5)
    assert row.cosine == pytest.approx(sum(cosines) / 2)


def test_without_noise() -> None:
    z, _ = tokens(3)
    meter = NoiseMeter(BLOCKS)
    meter.add(z[0], z[1:], z[1:])
    for row in meter.result():
        assert row.quantization_error == row.nsr == row.mse == 0.0
        assert row.cosine == pytest.approx(1.0) and row.inr > 1e30


def test_no_finite_image_is_one_line() -> None:
    meter = NoiseMeter(1)
    nothing = torch.full((2, 1, 2), torch.nan)
    meter.add(nothing, [nothing], [nothing])
    with pytest.raises(ValueError, match="^calibrate: images must be finite, got none"):
        meter.result()


def test_pathological_by_hand() -> None:
    """The mean is 4: below 2 at kappa 0.5, below 4 at kappa 1."""
    inr = {8: 10.0, 9: 2.0, 10: 1.9, 11: 2.1}
    assert pathological(inr, 0.5) == [10]
    assert pathological(inr, 1.0) == [9, 10, 11]
    assert pathological(inr, 0.0) == [] and pathological({}, 0.5) == []


def test_profile_as_json() -> None:
    rows = as_rows([BlockNoise(*map(float, range(7))), BlockNoise(*map(float, range(7, 14)))])
    assert [row["block"] for row in rows] == [1, 2]
    assert rows[1]["natural_step"] == 7.0 and rows[1]["inr"] == 13.0
