"""Training of exit heads: what they learn and refuse, and the same bits on a rerun."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.calibration.head_training import (
    BEST_HEAD,
    PAPER_HEAD,
    HeadOptions,
    augmented,
    centred,
    train_head,
)
from tests.support import assert_same, generator

P, E, K = 24, 12, 20
AFFINE = HeadOptions(
    kind="affine", steps=300, batch=64, learning_rate=2e-2, weight_decay=0.0, views=0
)
MLP = replace(AFFINE, kind="mlp", hidden=48, learning_rate=1e-2)


def rows(n: int, seed: int) -> Tensor:
    """Rows that a LayerNorm leaves as they are, so that a linear map of them can be learned."""
    return F.layer_norm(torch.randn(n, P, generator=generator(seed)), (P,))


def linear_teacher(x: Tensor) -> Tensor:
    """A fixed linear map, its outputs about 5 long."""
    return x @ torch.randn(P, E, generator=generator(99)) * 5 / (P * E) ** 0.5


def unit_classes() -> Tensor:
    return F.normalize(torch.randn(K, E, generator=generator(7)), dim=1)


@pytest.mark.parametrize(("options", "least"), [(AFFINE, 0.999), (MLP, 0.98)])
def test_distillation_recovers_a_linear_map(options: HeadOptions, least: float) -> None:
    x = rows(2_000, 0)
    head = train_head(x.half(), linear_teacher(x), options=options, seed=1)
    held_out = rows(500, 1)
    cosine = F.cosine_similarity(head(held_out), linear_teacher(held_out))
    assert cosine.mean() > least
    assert {tensor.dtype for tensor in head.tensors().values()} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in head.tensors().values())


def test_lengths_are_the_teachers() -> None:
    x = rows(1_000, 0)
    head = train_head(x, 40 * linear_teacher(x), options=AFFINE, seed=1)
    length, wanted = head(x).norm(dim=1).mean(), (40 * linear_teacher(x)).norm(dim=1).mean()
    # Both are means over the same 1,000 rows; scaling rounds each weight once.
    assert abs(length / wanted - 1) < 1e-5


def agreement(options: HeadOptions, *, x: Tensor, teacher: Tensor, classes: Tensor) -> float:
    head = train_head(x, teacher, options=options, seed=3, classes=classes, logit_scale=30.0)
    y = F.normalize(head(x), dim=1) @ classes.T
    return float((y.argmax(1) == (teacher @ classes.T).argmax(1)).double().mean())


def test_distribution_weight_spends_a_small_head_on_what_tells_classes_apart() -> None:
    """Classes differ in two directions of small variance; 4 hidden values cannot follow all."""
    x = rows(2_000, 0)
    teacher = linear_teacher(x) * torch.tensor([0.3, 0.3] + [1.0] * (E - 2))
    angle = torch.arange(K) * (2 * torch.pi / K)
    classes = F.normalize(torch.stack([angle.cos(), angle.sin()], 1), dim=1)
    classes = F.pad(classes, (0, E - 2))
    narrow = replace(MLP, hidden=4)
    direction = agreement(narrow, x=x, teacher=teacher, classes=classes)
    distribution = agreement(
        replace(narrow, distribution_weight=1.0), x=x, teacher=teacher, classes=classes
    )
    assert distribution > direction + 0.2, (distribution, direction)


def right_where_hidden(training: str, *, teacher_seed: int) -> float:
    """Share of right answers on rows whose labels were not shown; chance is 0.05."""
    x, classes = rows(2_000, 0), unit_classes()
    labels = (x @ torch.randn(P, E, generator=generator(5)) @ classes.T).argmax(1)
    shown = torch.where(torch.arange(len(x)) % 4 == 0, -1, labels)
    teacher = x @ torch.randn(P, E, generator=generator(teacher_seed))
    options = replace(AFFINE, training=training)  # type: ignore[arg-type]
    head = train_head(
        x, teacher, options=options, seed=1, classes=classes, labels=shown, logit_scale=30.0
    )
    answers = (F.normalize(head(x), dim=1) @ classes.T).argmax(1)
    return float((answers == labels)[::4].double().mean())


def test_labels_are_learned_where_they_are_known() -> None:
    by_labels = right_where_hidden("labels", teacher_seed=99)
    assert by_labels > 0.75
    assert right_where_hidden("labels", teacher_seed=98) == by_labels  # the teacher has no say
    both, distilled = (right_where_hidden(t, teacher_seed=99) for t in ("both", "distill"))
    assert distilled < 0.2 < both


@pytest.mark.parametrize("options", [AFFINE, MLP, replace(PAPER_HEAD, training="distill")])
def test_same_seed_same_bits(options: HeadOptions) -> None:
    x = rows(300, 0)
    a, b, c = (train_head(x, linear_teacher(x), options=options, seed=s) for s in (5, 5, 6))
    for name, tensor in a.tensors().items():
        assert_same(b.tensors()[name], tensor, name=name)
        assert not torch.equal(c.tensors()[name], tensor), name


def test_training_under_inference_mode_changes_no_mode_and_no_bit() -> None:
    x, classes = rows(300, 0), unit_classes()
    options = replace(MLP, steps=20, distribution_weight=0.5)
    expected = train_head(x, linear_teacher(x), options=options, seed=2, classes=classes)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode():
        x, classes = rows(300, 0), unit_classes()
        head = train_head(x, linear_teacher(x), options=options, seed=2, classes=classes)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert_same(torch.get_rng_state(), before)
    for name, tensor in expected.tensors().items():
        assert_same(head.tensors()[name], tensor, name=name)


def test_rows_that_are_not_finite_are_as_if_absent(caplog: pytest.LogCaptureFixture) -> None:
    x = rows(300, 0)
    teacher = linear_teacher(x)
    options = replace(AFFINE, steps=20)
    expected = train_head(x, teacher, options=options, seed=2)
    bad_x, bad_teacher = rows(4, 3), linear_teacher(rows(4, 3))
    bad_x[0, 3], bad_x[1, 0], bad_teacher[2, 1] = torch.nan, torch.inf, torch.nan
    bad_teacher[3] = 0.0
    with caplog.at_level(logging.WARNING, logger="lraee"):
        head = train_head(
            torch.cat([x, bad_x]), torch.cat([teacher, bad_teacher]), options=options, seed=2
        )
    assert "4 of 304 rows" in caplog.text
    for name, tensor in expected.tensors().items():
        assert_same(head.tensors()[name], tensor, name=name)
    with pytest.raises(ValueError, match="^train_head: pooled must have a usable row, got 4$"):
        train_head(bad_x.fill_(torch.nan), bad_teacher, options=options, seed=2)


def test_the_papers_recipe() -> None:
    """Adam 5e-4, batch 64, 3 epochs; D -> D -> E on the patch mean; cross-entropy and cosine."""
    assert (
        HeadOptions(
            kind="mlp",
            hidden=None,
            has_class_token=False,
            training="both",
            epochs=3,
            batch=64,
            learning_rate=5e-4,
            schedule="constant",
            weight_decay=0.0,
            distribution_weight=0.0,
            views=0,
        )
        == PAPER_HEAD
    )
    x = rows(70, 0)
    head = train_head(x, linear_teacher(x), options=replace(PAPER_HEAD, training="distill"), seed=0)
    assert head.w1.shape == (P, P)
    assert head.w2 is not None and head.w2.shape == (E, P)


def test_epochs_are_passes_over_all_rows() -> None:
    """3 epochs of 70 rows at batch 64 are 6 steps."""
    x = rows(70, 0)
    paper = replace(PAPER_HEAD, training="distill")
    by_epochs = train_head(x, linear_teacher(x), options=paper, seed=0)
    same = replace(paper, epochs=None, steps=6)
    by_steps = train_head(x, linear_teacher(x), options=same, seed=0)
    assert_same(by_epochs.w1, by_steps.w1)


def test_the_best_recipe_needs_no_labels() -> None:
    assert BEST_HEAD.training == "distill"
    assert BEST_HEAD.has_class_token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "low"}, "kind must be one of 'affine', 'mlp', got 'low'"),
        ({"training": "hard"}, "training must be one of 'distill', 'labels', 'both', got 'hard'"),
        ({"schedule": "step"}, "schedule must be one of 'constant', 'cosine', got 'step'"),
        ({"epochs": 1}, "steps must be given where epochs is not, and only there, got 300"),
        ({"steps": None}, "steps must be given where epochs is not, and only there, got None"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"hidden": 1.5}, "hidden must be a whole number of at least 1, got 1.5"),
        ({"batch": True}, "batch must be a whole number of at least 1, got True"),
        ({"views": -1}, "views must be a whole number of at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number of at least 0"),
        ({"distribution_weight": -1}, "distribution_weight must be a finite number of at least 0"),
    ],
)
def test_options_that_cannot_be_trained(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(AFFINE, **changes)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"HeadOptions: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": torch.ones(8)}, "pooled must have shape [n, P], got [8]"),
        ({"pooled": torch.ones(8, 5)}, "pooled must hold mean and class token, 2 D values, got 5"),
        ({"teacher": torch.ones(7, E)}, "teacher must have shape [n, E] with n = 8, got [7, 12]"),
        ({"classes": torch.ones(K, 3)}, "classes must have shape [K, 12], got [20, 3]"),
        ({"classes": None}, "classes must be given for training 'both', got None"),
        ({"labels": None}, "labels must be given for training 'both', got None"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "labels must have shape [8], got [9]"),
        ({"labels": torch.zeros(8)}, "labels must be int64, got torch.float32"),
        ({"labels": torch.full((8,), K)}, "labels must be -1 to 19, got 20"),
        ({"labels": torch.full((8,), -2)}, "labels must be -1 to 19, got -2"),
    ],
)
def test_inputs_that_do_not_fit(changes: dict[str, Tensor | None], message: str) -> None:
    arguments = {
        "pooled": torch.ones(8, P),
        "teacher": torch.ones(8, E),
        "classes": unit_classes(),
        "labels": torch.zeros(8, dtype=torch.int64),
    }
    with pytest.raises(ValueError) as caught:
        train_head(**(arguments | changes), options=replace(AFFINE, training="both"), seed=0)  # type: ignore[arg-type]
    assert str(caught.value) == f"train_head: {message}"


def ramp(B: int, H: int, W: int) -> Tensor:
    """Channel 0 is the column, channel 1 the row, channel 2 a constant."""
    column, row = torch.arange(W).expand(H, W), torch.arange(H)[:, None].expand(H, W)
    return torch.stack([column, row, torch.full((H, W), 3)]).float().expand(B, 3, H, W)


def test_crops_are_straight_windows_inside_the_image() -> None:
    """On a ramp a crop reads the coordinates it saw: steps are even and give the crop's extent."""
    B, H, W, size = 200, 64, 80, 32
    y = augmented(ramp(B, H, W), size=(size, size), generator=generator(0))
    assert y.shape == (B, 3, size, size)
    inner = y[:, :, 4:-4, 4:-4]  # within two pixels of an edge the cubic reads reflected values
    column, row = inner[:, 0, 0], inner[:, 1, :, 0]
    assert (inner[:, 0] - column[:, None]).abs().max() < 1e-3
    assert (inner[:, 1] - row[:, :, None]).abs().max() < 1e-3
    step_x, step_y = ((line[:, -1] - line[:, 0]) / (line.shape[1] - 1) for line in (column, row))
    # torch's cubic (a = -0.75) bends a ramp by up to 0.12 pixels, and a slope so by 0.01
    assert (column.diff(dim=1) - step_x[:, None]).abs().max() < 0.3
    assert (row.diff(dim=1) - step_y[:, None]).abs().max() < 0.3
    width, height = step_x * size / W, step_y * size / H
    area = width.abs() * height
    assert 0.35 < area.min() < 0.45
    assert 0.85 < area.max() <= 1.001
    assert 0.35 < (width < 0).double().mean() < 0.65  # flipped, standard error 0.035
    # The window's own edges, half a step beyond the outermost samples, lie inside the image.
    for line, step, extent in ((column, step_x, W), (row, step_y, H)):
        first, last = line.amin(1) - 4.5 * step.abs(), line.amax(1) + 4.5 * step.abs()
        assert first.min() > -0.5 - 0.2
        assert last.max() < extent - 0.5 + 0.2
    assert (y[:, 2] - 3).abs().max() == 0


def test_crops_are_seeded_and_keep_values_in_range() -> None:
    images = torch.randn(6, 3, 20, 20, generator=generator(1))
    a, b, c = (augmented(images, size=(16, 16), generator=generator(s)) for s in (1, 1, 2))
    assert_same(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a[0] - a[1], torch.zeros_like(a[0]))
    low, high = images.flatten(2).aminmax(dim=2)
    assert ((a >= low[..., None, None]) & (a <= high[..., None, None])).all()
    assert augmented(images.half(), size=(16, 8), generator=generator(1)).dtype == torch.float16
    assert augmented(images[:0], size=(16, 8), generator=generator(1)).shape == (0, 3, 16, 8)


def test_centred_is_the_middle_or_the_image_itself() -> None:
    images = ramp(2, 64, 64)
    assert_same(centred(images, (56, 56)), images[..., 4:60, 4:60])
    assert centred(images, (64, 64)).data_ptr() == images.data_ptr()
    with pytest.raises(
        ValueError, match="^centred: images must be at least 65 x 64, got '64 x 64'"
    ):
        centred(images, (65, 64))
