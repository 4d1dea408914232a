"""exit_probe in the interpreter: the decision of the definition, in one launch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.launches import launches_of
from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned, poisoned_all
from lraee.diagnostics.selftest_inputs import probe
from lraee.kernels import live_rows
from lraee.kernels.configs import ProbeConfig
from lraee.kernels.exit_probe import exit_probe
from lraee.kernels.exit_probe_score import classes_per_program
from lraee.kernels.live_rows import LiveRows
from lraee.kernels.operands import ProbeHead
from lraee.kernels.workspace import Workspace
from lraee.ops import error_bounds as bounds
from lraee.ops import reference
from tests.support import EPS32, assert_same, assert_within

NAMES = ("embedding", "top1", "confidence", "margin", "variance", "score")


def check_probe(z: Tensor, head: ProbeHead, seed: int, **parameters: object) -> None:
    """Variance bit for bit, the embedding too where no gelu is before it, and from it top1."""
    expected = dict(zip(NAMES, reference.exit_probe(z, head), strict=True))
    K = head.classes.shape[0]
    with guarded_outputs():
        results = exit_probe(poisoned(z, row_pad=seed % 3), *poisoned_all([head]))
    actual = dict(zip(NAMES, results, strict=True))
    parameters |= {"seed": seed}
    assert_same(actual["variance"], expected["variance"], name="variance", **parameters)
    bound = bounds.of_embedding(z, head)
    assert_within(actual["embedding"], expected["embedding"], bound, **parameters)
    wanted = bounds.decision(actual["embedding"], actual["variance"], head)
    for name, bound in bounds.of_decision(K).items():
        assert actual[name].dtype == wanted[name].dtype
        assert_within(actual[name], wanted[name], bound, name=name, **parameters)


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
            check_probe(*probe(*shape, seed, has_class_token), seed, shape=shape)


@pytest.mark.slow
@both_inputs
def test_exit_probe_every_shape(has_class_token: bool) -> None:
    for seed, shape in enumerate(SHAPES, start=1):
        check_probe(*probe(*shape, seed, has_class_token), seed, shape=shape)


def test_classes_of_many_programs() -> None:
    """300 classes are dealt to five programs; the best two lie in different ones."""
    given = probe(3, 4, 64, None, 32, 300, 1)
    assert classes_per_program(300) == 64
    check_probe(*given, 1)
    embedding = reference.exit_probe(*given)[0]
    given[1].classes[290] = F.normalize(embedding[0], dim=0)
    given[1].classes[10] = F.normalize(embedding[0] + 0.1 * torch.randn(32), dim=0)
    check_probe(*given, 1)
    assert exit_probe(*given)[1][0] == 290


def test_lowest_index_of_a_tie_wins() -> None:
    given = probe(2, 3, 64, None, 32, 200, 0)
    z, head = given
    head = head._replace(classes=head.classes[:1].expand(200, 32).contiguous())
    _, top1, confidence, margin, *_ = exit_probe(z, head)
    assert_same(top1, torch.zeros(2, dtype=torch.int64))
    assert_same(margin, torch.zeros(2))
    assert_within(confidence, torch.full((2,), 1 / 200), 200 * EPS32)


@pytest.mark.parametrize(("has_class_token", "token"), [(False, 3), (True, 3), (True, 0)])
def test_a_broken_image_spoils_no_other(has_class_token: bool, token: int) -> None:
    """And not its variance where the class token alone is broken."""
    given = probe(5, 6, 64, 48, 32, 20, 0, has_class_token)
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
    given = probe(2, 6, 64, None, 32, 20, 0)
    expected = exit_probe(*given)
    given[0][:, 0] = float("nan")
    for name, value, wanted in zip(NAMES, exit_probe(*given), expected, strict=True):
        assert_same(value, wanted, name=name)


@both_inputs
def test_an_image_has_the_same_bits_in_any_batch(has_class_token: bool) -> None:
    given = probe(18, 5, 64, 48, 32, 80, 0, has_class_token)
    whole = exit_probe(*given)
    for first, last in ((0, 1), (17, 18), (3, 9)):
        part = exit_probe(given[0][first:last], given[1])
        for name, value, expected in zip(NAMES, part, whole, strict=True):
            assert_same(value, expected[first:last], name=name)


def test_variance_survives_a_large_mean() -> None:
    """E[x^2] - E[x]^2 in float32 would lose all of it: mean 3e4, variance 1e-4 per channel."""
    given = probe(1, 50, 64, None, 16, 3, 0)
    noise = torch.randn(1, 50, 64) * 0.01
    z = noise + 3e4
    exact = z.double()[:, 1:].var(1, correction=0).sum(1)
    variance = exit_probe(z, given[1])[4]
    assert_within(variance.double(), exact, 1e-4 * exact)


@pytest.mark.parametrize("H", [48, None])
def test_rows_of_images_that_exited(H: int | None) -> None:
    """The live rows have the bits they have alone; others are neither read nor written, whichever
    of them are counted in a block of 16, and tickets are zero again.
    """
    B = 18
    z, head = probe(B, 3, 32, H, 16, 20, 0, True)
    whole = exit_probe(z, head)
    for count in (0, 3, 16, 17):
        rest = z.clone()
        rest[count:] = math.nan
        space = Workspace(*(torch.zeros(1 << 10, dtype=torch.int32) for _ in range(2)))
        images = torch.tensor([count], dtype=torch.int32)
        with live_rows.using(LiveRows(images, B)), guarded_outputs():
            actual = exit_probe(rest, head, space=space)
        assert not space.tickets.any()
        for name, value, expected in zip(NAMES, actual, whole, strict=True):
            assert_same(value[:count], expected[:count], name=name, count=count)
    with live_rows.using(LiveRows(images, B + 1)), pytest.raises(AssertionError, match="18 images"):
        exit_probe(z, head)


@both_inputs
def test_one_launch(has_class_token: bool) -> None:
    for H in (48, None):
        given = probe(2, 5, 64, H, 32, 20, 0, has_class_token)
        launches = launches_of(lambda given=given: exit_probe(*given))
        assert [launch.name for launch in launches] == ["exit_probe"]


@both_inputs
def test_no_images(has_class_token: bool) -> None:
    given = probe(2, 5, 64, 48, 32, 20, 0, has_class_token)
    embedding, *rest = exit_probe(given[0][:0], given[1])
    assert embedding.shape == (0, 32)
    assert all(value.shape == (0,) for value in rest)


@both_inputs
def test_config_is_obeyed(has_class_token: bool) -> None:
    given = probe(3, 40, 96, 70, 32, 20, 0, has_class_token)
    expected = exit_probe(*given)
    config = ProbeConfig(rows=1, block_d=32, unroll=4, block_k=64, block_h=32)
    for name, value, wanted in zip(NAMES, exit_probe(*given, config=config), expected, strict=True):
        assert_same(value, wanted, name=name)
