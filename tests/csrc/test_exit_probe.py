"""exit_probe on the CPU: each level against the definition, bit for bit up to exp and erf."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.ops import Norm, PackedLinear, ProbeHead, reference
from lraee.ops.backend import operators
from tests.csrc.levels import LEVELS, TYPES, assert_same_everywhere, at_level
from tests.support import EPS32, assert_same, assert_within, generator

NAMES = ("embedding", "top1", "confidence", "margin", "variance", "score")


def _linear(N: int, K: int, source: torch.Generator) -> PackedLinear:
    w_q = torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8)
    scale = torch.rand(N, generator=source) * 1e-3 + 1e-4
    return PackedLinear(w_q, scale, w_q.sum(1, dtype=torch.int32))


def _biased(linear: PackedLinear, source: torch.Generator) -> PackedLinear:
    return linear._replace(bias=torch.randn(linear.N, generator=source) * 0.1)


def _head(
    D: int, E: int, K: int, hidden: int | None = None, has_class_token: bool = False
) -> ProbeHead:
    """Weights unpacked."""
    source = generator(0)
    first = E if hidden is None else hidden
    P = 2 * D if has_class_token else D
    norm = Norm(torch.rand(P, generator=source) + 0.5, torch.randn(P, generator=source) * 0.1)
    w1 = _biased(_linear(first, P, source), source)
    classes = torch.nn.functional.normalize(torch.randn(K, E, generator=source))
    w2 = None if hidden is None else _biased(_linear(E, hidden, source), source)
    return ProbeHead(norm, w1, w2, classes, 100.0, torch.tensor([2.0, -1.0, 0.001, -0.5]))


def _packed(head: ProbeHead) -> ProbeHead:
    def packed(linear: PackedLinear) -> PackedLinear:
        return linear._replace(w=ops.pack_weight(linear.w)[0])

    second = None if head.second is None else packed(head.second)
    return head._replace(first=packed(head.first), second=second)


def _probe(z: Tensor, head: ProbeHead) -> tuple[Tensor, ...]:
    return ops.exit_probe(z, _packed(head))


def _patches(B: int, L: int, D: int, seed: int = 1) -> Tensor:
    source = generator(seed)
    return torch.randn(B, L, D, generator=source) * 2 + torch.randn(B, 1, D, generator=source) * 5


def _assert_gate(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], head: ProbeHead, **where: object
) -> None:
    """Bounds on what goes through exp; the logits themselves have the same bits.

    c = 1 / sum exp(x), x <= 0: exp within 2 float32 roundings here and in torch, the sum of K terms
    7 + K / 64 roundings here and at most K there, the quotient 1, and 3 for each merge of chunks.
    """
    K = head.classes.shape[0]
    c_bound = (8 + 2 * K + K // 16) * EPS32
    gate = head.gate.double().abs()
    largest = float(gate[0] + gate[1] + gate[3] + gate[2] * expected[4].abs().max())
    s_bound = float(gate[0] + 3 * gate[1]) * c_bound + 8 * EPS32 * (1 + largest)
    assert_same(actual[1], expected[1], **where)
    assert_within(actual[2], expected[2], c_bound, name="confidence", **where)
    assert_within(actual[3], expected[3], 3 * c_bound, name="margin", **where)
    assert_same(actual[4], expected[4], name="variance", **where)
    assert_within(actual[5], expected[5], s_bound, name="score", **where)


both_inputs = pytest.mark.parametrize("has_class_token", [False, True])

CASES = [
    # B, L, D, E, K
    (1, 2, 16, 8, 1), (2, 50, 768, 512, 1000), (3, 17, 70, 33, 64), (5, 10, 64, 64, 65),
    (4, 5, 100, 130, 2), (9, 12, 48, 20, 129),
]  # fmt: skip


@both_inputs
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES)
def test_affine_head_has_the_bits_of_the_definition(
    level: str, case: tuple[int, ...], has_class_token: bool
) -> None:
    B, L, D, E, K = case
    head = _head(D, E, K, has_class_token=has_class_token)
    pairs = [(dtype, dtype) for dtype in TYPES] + [(torch.float32, torch.float16)]
    for dtype, class_dtype in pairs:
        z, given = _patches(B, L, D).to(dtype), head._replace(classes=head.classes.to(class_dtype))
        actual = at_level(level, partial(_probe, z, given))
        expected = reference.exit_probe(z, given)
        where = {"level": level, "dtype": dtype, "class_dtype": class_dtype}
        assert_same(actual[0], expected[0], name="embedding", **where)
        _assert_gate(tuple(actual), expected, given, **where)


@both_inputs
@pytest.mark.parametrize("level", LEVELS)
def test_two_layer_head_is_its_operators_in_a_row(level: str, has_class_token: bool) -> None:
    """The embedding bit for bit from the single operators, the rest from that embedding."""
    z, head = _patches(3, 20, 96), _head(96, 40, 100, 72, has_class_token)
    packed = _packed(head)
    actual = at_level(level, lambda: _probe(z, head))
    pooled, _ = reference.pool(z, head.norm.gamma.numel())

    def embed() -> list[Tensor]:
        h = ops.layer_norm_quantize(pooled, head.norm.gamma, head.norm.beta, symmetric=False)
        hidden = ops.int8_linear(*h, packed.first, activation="gelu")
        assert packed.second is not None
        return [ops.int8_linear(*ops.quantize_rows(hidden, symmetric=False), packed.second)]

    assert_same(actual[0], at_level(level, embed)[0])
    length = (actual[0].double() ** 2).sum(1, keepdim=True).sqrt()
    logits = 100 * (actual[0].double() / length) @ head.classes.double().T
    p = torch.softmax(logits, 1).topk(2)
    # A logit of at most 100 is off by some 10 roundings: 100 * 10 * 2^-24.
    assert_within(actual[2], p.values[:, 0], 1e-4)
    assert_within(actual[3], p.values[:, 0] - p.values[:, 1], 2e-4)
    assert_same(actual[1], p.indices[:, 0])


@both_inputs
def test_close_to_the_definition_with_two_layers(has_class_token: bool) -> None:
    """Gelu differs in its last bits, so a hidden value can fall on the other side of a step."""
    z, head = _patches(16, 50, 768), _head(768, 512, 1000, 256, has_class_token)
    actual, expected = _probe(z, head), reference.exit_probe(z, head)
    _, scale, _ = reference.quantize_rows(expected[0], False)
    assert head.second is not None
    w2 = head.second.w.double().abs() * head.second.w_scale.double()[:, None]
    # Each hidden value may move by one step of its row, bounded by its range / 255; few do.
    bound = w2.amax(1) * 8 * 0.05
    assert_within(actual[0], expected[0], bound[None].expand_as(actual[0]))
    assert_same(actual[4], expected[4])


@both_inputs
@pytest.mark.parametrize("hidden", [None, 40])
def test_all_levels_and_thread_counts_agree(hidden: int | None, has_class_token: bool) -> None:
    for (B, L, D, E, K), dtype in itertools.product(CASES, TYPES):
        z, head = _patches(B, L, D).to(dtype), _head(D, E, K, hidden, has_class_token)
        assert_same_everywhere(partial(_probe, z, head), B=B, L=L, D=D, E=E, K=K)


@both_inputs
def test_an_image_has_the_same_bits_in_any_batch(has_class_token: bool) -> None:
    z, head = _patches(11, 50, 128), _head(128, 64, 200, 32, has_class_token)
    whole = _probe(z, head)
    for b in range(11):
        for name, alone, all_of in zip(NAMES, _probe(z[b : b + 1], head), whole, strict=True):
            assert_same(alone[0], all_of[b], b=b, name=name)


@pytest.mark.parametrize(("has_class_token", "token"), [(False, 5), (True, 5), (True, 0)])
def test_nan_stays_in_its_image(has_class_token: bool, token: int) -> None:
    """And out of the variance where it is in the class token alone."""
    head = _head(64, 24, 70, has_class_token=has_class_token)
    clean = _probe(_patches(6, 9, 64), head)
    for poison in (math.nan, math.inf, -math.inf):
        z = _patches(6, 9, 64)
        z[2, token, 7] = poison
        for level in LEVELS:
            actual = at_level(level, partial(_probe, z, head))
            for name, left, right in zip(NAMES, actual, clean, strict=True):
                others = [0, 1, 3, 4, 5]
                assert_same(left[others], right[others], name=name, level=level)
                if name == "top1":
                    assert left[2] == 0
                elif name == "variance" and token == 0:
                    assert_same(left, right, level=level)
                else:
                    assert left[2].isnan().all(), (name, level, poison)


def test_a_head_of_the_mean_does_not_read_the_class_token() -> None:
    z, head = _patches(2, 9, 64), _head(64, 24, 70)
    expected = _probe(z, head)
    z[:, 0] = math.nan
    for left, right in zip(_probe(z, head), expected, strict=True):
        assert_same(left, right)


def test_ties_go_to_the_lowest_class() -> None:
    z, head = _patches(3, 9, 64), _head(64, 24, 200)
    best = _probe(z, head)[1]
    for b, other in itertools.product(range(3), (5, 63, 64, 190)):
        tied = head.classes.clone()
        tied[other] = tied[best[b]]
        for level in LEVELS:
            _, top1, confidence, margin, *_ = at_level(
                level, partial(_probe, z, head._replace(classes=tied))
            )
            assert top1[b] == min(other, int(best[b]))
            assert margin[b] == 0 or other == best[b]
            assert confidence[b] <= 0.5 or other == best[b]


def test_a_large_common_offset_does_not_cancel() -> None:
    """E[x^2] - E[x]^2 in float32 would lose all of a variance of 1 beside a mean of 1e4."""
    z = torch.randn(2, 198, 64, generator=generator(7)) + 1e4
    variance = _probe(z, _head(64, 24, 70))[4]
    truth = z[:, 1:].double().var(1, correction=0).sum(1)
    # Differences to the first patch are exact here; then 2 * 197 sums of one rounding each.
    assert_within(variance, truth, 400 * EPS32 * 2 * truth)


@both_inputs
def test_reads_any_strides_and_empty_batches(has_class_token: bool) -> None:
    head = _head(32, 24, 70, has_class_token=has_class_token)
    base = _patches(4, 12, 32)
    wide = torch.randn(4, 12, 50, generator=generator(3))
    for z in (base[::2], base[:, ::2], base.transpose(0, 1), wide[:, :, 7:39], wide[:, :, :32]):
        expected = _probe(z.contiguous(), head)
        for name, left, right in zip(NAMES, _probe(z, head), expected, strict=True):
            assert_same(left, right, name=name)
    assert [list(t.shape) for t in _probe(base[:0], head)] == [[0, 24], *[[0]] * 5]


def test_other_lengths_of_gamma_are_refused_by_the_implementation_too() -> None:
    """The operator would read past the pooled row."""
    z, head = _patches(2, 5, 32), _packed(_head(32, 24, 70))
    for length in (31, 33, 63, 65, 96):
        norm = Norm(torch.ones(length), torch.ones(length))
        with pytest.raises(ValueError, match=rf"\[2 D\] = \[32\] or \[64\], got \[{length}\]"):
            operators("cpu").exit_probe(z, head._replace(norm=norm))
