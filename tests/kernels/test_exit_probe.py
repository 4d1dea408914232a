"""exit_probe in the interpreter: the decision of the definition, in three launches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lraee import reference
from lraee.kernels import exit_probe as module
from lraee.kernels import exit_probe_pool, int8_linear, launch
from lraee.kernels.configs import ProbeConfig
from lraee.kernels.exit_probe import classes_per_program, exit_probe
from tests.kernels.guard import guarded_outputs, poisoned, poisoned_all
from tests.support import EPS32, assert_same, assert_within, generator

Arguments = list[Any]
NAMES = ("embedding", "top1", "confidence", "margin", "variance", "score")


def arguments(
    B: int, L: int, D: int, H: int | None, E: int, K: int, seed: int, has_class_token: bool = False
) -> Arguments:
    """Arguments of exit_probe; H None: a head of one layer. Each bias in half of the seeds."""
    source = generator(seed)
    P = 2 * D if has_class_token else D

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    def layer(N: int, K: int, has_bias: bool) -> Arguments:
        w = torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8)
        scale = torch.rand(N, generator=source) * 0.01 + 1e-4
        return [w, scale, w.sum(1, dtype=torch.int32), normal(N) if has_bias else None]

    z = (normal(B, L, D) * 3 + 10 * normal(D)).to((torch.float32, torch.float16, torch.bfloat16)[seed % 3])  # fmt: skip  # noqa: E501
    first = layer(E if H is None else H, P, seed % 2 == 0)
    second: Arguments = [None] * 4 if H is None else layer(E, H, seed % 4 < 2)
    classes = F.normalize(normal(K, E), dim=1)
    gate = torch.tensor([2.0, 1.5, 1e-3, -1.0])
    return [z, normal(P), normal(P), 1e-5, *first, *second, classes, 20.0, gate]


def embedding_bound(given: Arguments) -> Tensor | float:
    """Largest error of the embedding against the definition, 0 where no gelu is before it.

    erf of both errs by some units of float32 of max(|h|, 1), so the step of the hidden row may
    differ by that much, and a hidden value next to a tie may fall to the other side: with 32 units
    in each of 130 values of step 0.03 two such values in a row are all that can be expected.
    """
    if given[8] is None:
        return 0.0
    z, gamma, beta, eps, w1, w1_scale, w1_sum, b1, w2, w2_scale, w2_sum, b2 = given[:12]
    pooled, _ = reference._pool(z, gamma.shape[0])
    x = reference.layer_norm_quantize(pooled, gamma, beta, eps, False)
    hidden = reference.int8_linear(*x, w1, w1_scale, w1_sum, b1, activation="gelu")
    flips = 2 * 128 * reference.quantize_rows(hidden, False)[1][:, None] * w2_scale
    size = hidden.abs() @ (w2.float().abs() * w2_scale[:, None]).t()
    return (flips + 64 * EPS32 * (size + (0.0 if b2 is None else b2.abs()))).double()


def decision(embedding: Tensor, variance: Tensor, given: Arguments) -> dict[str, Tensor]:
    """What the definition decides from this embedding."""
    classes, logit_scale, gate = given[12:]
    length = reference.lane_sum(embedding * embedding).double().sqrt().float().clamp(min=1e-12)
    cosine = reference.lane_sum(embedding[:, None, :] * classes) / length[:, None]
    confidence, margin, top1 = reference._top_two(cosine * logit_scale)
    weighted = gate[0] * confidence + gate[1] * margin
    score = torch.sigmoid((weighted + gate[2] * variance) + gate[3])
    return {"top1": top1, "confidence": confidence, "margin": margin, "score": score}


def check_probe(given: Arguments, seed: int, **parameters: object) -> None:
    """variance bit for bit, the embedding too where no gelu is before it, and from it top1.

    Logits of one embedding are the same bits (same order of sums). exp errs by 4 units of float32
    here and there and the sum of K of them by K units, relative to a confidence of at most 1; the
    gate multiplies that by at most 3.5.
    """
    expected = dict(zip(NAMES, reference.exit_probe(*given), strict=True))
    K = given[12].shape[0]
    with guarded_outputs():
        results = exit_probe(poisoned(given[0], row_pad=seed % 3), *poisoned_all(given[1:]))
    actual = dict(zip(NAMES, results, strict=True))
    parameters |= {"seed": seed}
    assert_same(actual["variance"], expected["variance"], name="variance", **parameters)
    assert_within(actual["embedding"], expected["embedding"], embedding_bound(given), **parameters)
    wanted = decision(actual["embedding"], actual["variance"], given)
    assert_same(actual["top1"], wanted["top1"], **parameters)
    bound = 2 * (K + 16) * EPS32
    for name, factor in (("confidence", 1.0), ("margin", 2.0), ("score", 4.0)):
        assert_within(actual[name], wanted[name], factor * bound, name=name, **parameters)


WIDTHS = ((64, None, 16), (65, None, 64), (33, 48, 20), (96, 64, 65), (128, 130, 64), (7, 5, 3))
SHAPES = [
    (B, L, D, H, E, K)
    for B in (1, 2, 5)
    for L in (2, 3, 10, 18)
    for D, H, E in WIDTHS
    for K in (1, 7, 70)
] + [
    (1, 50, 64, 64, 64, 40),
    (1, 197, 64, None, 64, 8),
    (1, 257, 64, 32, 32, 8),
    (17, 4, 64, 32, 32, 9),
]


both_inputs = pytest.mark.parametrize("has_class_token", [False, True])


@both_inputs
def test_exit_probe(has_class_token: bool) -> None:
    assert len(SHAPES) >= 200
    for seed, shape in enumerate(SHAPES):
        if seed % 10 == 0 or seed >= len(SHAPES) - 4:
            check_probe(arguments(*shape, seed, has_class_token), seed, shape=shape)


@pytest.mark.slow
@both_inputs
def test_exit_probe_every_shape(has_class_token: bool) -> None:
    for seed, shape in enumerate(SHAPES, start=1):
        check_probe(arguments(*shape, seed, has_class_token), seed, shape=shape)


def test_classes_of_many_programs() -> None:
    """300 classes are dealt to five programs; the best two lie in different ones."""
    given = arguments(3, 4, 64, None, 32, 300, 1)
    assert classes_per_program(300) == 64
    check_probe(given, 1)
    embedding = reference.exit_probe(*given)[0]
    given[12][290] = F.normalize(embedding[0], dim=0)
    given[12][10] = F.normalize(embedding[0] + 0.1 * torch.randn(32), dim=0)
    check_probe(given, 1)
    assert exit_probe(*given)[1][0] == 290


def test_lowest_index_of_a_tie_wins() -> None:
    given = arguments(2, 3, 64, None, 32, 200, 0)
    given[12] = given[12][:1].expand(200, 32).contiguous()
    _, top1, confidence, margin, *_ = exit_probe(*given)
    assert_same(top1, torch.zeros(2, dtype=torch.int64))
    assert_same(margin, torch.zeros(2))
    assert_within(confidence, torch.full((2,), 1 / 200), 200 * EPS32)


@pytest.mark.parametrize(("has_class_token", "token"), [(False, 3), (True, 3), (True, 0)])
def test_a_broken_image_spoils_no_other(has_class_token: bool, token: int) -> None:
    """And not its variance where the class token alone is broken."""
    given = arguments(5, 6, 64, 48, 32, 20, 0, has_class_token)
    whole = exit_probe(*given)
    given[0][2, token, 5] = float("nan")
    broken = exit_probe(*given)
    for name, before, after in zip(NAMES, whole, broken, strict=True):
        others = [0, 1, 3, 4]
        assert_same(after[others], before[others], name=name)
        if name == "top1":
            assert after[2] == 0
        elif name == "variance" and token == 0:
            assert_same(after, before)
        else:
            assert after[2].isnan().all(), name


def test_a_head_of_the_mean_does_not_read_the_class_token() -> None:
    given = arguments(2, 6, 64, None, 32, 20, 0)
    expected = exit_probe(*given)
    given[0][:, 0] = float("nan")
    for name, value, wanted in zip(NAMES, exit_probe(*given), expected, strict=True):
        assert_same(value, wanted, name=name)


@both_inputs
def test_an_image_has_the_same_bits_in_any_batch(has_class_token: bool) -> None:
    given = arguments(18, 5, 64, 48, 32, 80, 0, has_class_token)
    whole = exit_probe(*given)
    for first, last in ((0, 1), (17, 18), (3, 9)):
        part = exit_probe(given[0][first:last], *given[1:])
        for name, value, expected in zip(NAMES, part, whole, strict=True):
            assert_same(value, expected[first:last], name=name)


def test_variance_survives_a_large_mean() -> None:
    """E[x^2] - E[x]^2 in float32 would lose all of it: mean 3e4, variance 1e-4 per channel."""
    given = arguments(1, 50, 64, None, 16, 3, 0)
    noise = torch.randn(1, 50, 64) * 0.01
    given[0] = noise + 3e4
    exact = given[0].double()[:, 1:].var(1, correction=0).sum(1)
    variance = exit_probe(*given)[4]
    assert_within(variance.double(), exact, 1e-4 * exact)


@both_inputs
def test_three_launches(monkeypatch: pytest.MonkeyPatch, has_class_token: bool) -> None:
    started = []
    start = launch.start

    def count(kernel: Any, *arguments: Any, **constants: Any) -> None:
        started.append(kernel)
        start(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "start", count)
    exit_probe(*arguments(2, 5, 64, 48, 32, 20, 0, has_class_token))
    assert started == [
        exit_probe_pool._pool_kernel, int8_linear._int8_linear_kernel, module._score_kernel,
    ]  # fmt: skip


@both_inputs
def test_no_images(has_class_token: bool) -> None:
    given = arguments(2, 5, 64, 48, 32, 20, 0, has_class_token)
    given[0] = given[0][:0]
    embedding, *rest = exit_probe(*given)
    assert embedding.shape == (0, 32)
    assert all(value.shape == (0,) for value in rest)


@both_inputs
def test_config_is_obeyed(has_class_token: bool) -> None:
    given = arguments(3, 40, 96, 70, 32, 20, 0, has_class_token)
    expected = exit_probe(*given)
    config = ProbeConfig(rows=1, block_d=32, unroll=4, block_h=64)
    for name, value, wanted in zip(NAMES, exit_probe(*given, config=config), expected, strict=True):
        assert_same(value, wanted, name=name)
