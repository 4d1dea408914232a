"""What calibration collects: tokens, pooled views, probes and noise, each against a direct run."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.calibration.collect import Images, Pair, tapped
from lraee.calibration.head_training import augmented
from lraee.calibration.noise import NoiseMeter
from lraee.exits.head import pool
from tests.clip_models import blocks_of, make_images, make_model
from tests.exits.random_exits import make_exits, make_head
from tests.support import assert_same, generator

N, SIZE = 11, 32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return make_model()


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> nn.Module:
    return lraee.accelerate(model)


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(1)
    return make_images(N)


def make_pair(model: nn.Module, fast: nn.Module, images: Images, batch: int = 4) -> Pair:
    return Pair(model, fast, images, batch=batch, progress=False)


def every(n: int = N) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


def with_margin(images: Tensor) -> Tensor:
    """The same images in the middle of larger ones: 3 rows and columns before, 4 behind."""
    large = torch.randn(len(images), 3, SIZE + 7, SIZE + 7, generator=generator(2))
    large[..., 3 : 3 + SIZE, 3 : 3 + SIZE] = images
    return large


@torch.no_grad()
def walked(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Tokens before the first block and after each, block by block."""
    tower = model.visual
    result = [tower._embeds(images)]
    for block in blocks_of(model):
        result.append(block(result[-1]))
    return result


# Taps


@torch.no_grad()
def test_taps_give_the_tokens_of_the_last_call(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    for each in (model, fast):
        with tapped(each.visual) as z:
            each.encode_image(images[:2])
            each.encode_image(images)
            for result, expected in zip(z, walked(each, images), strict=True):
                assert_same(result, expected)
        assert not any(block._forward_hooks for block in blocks_of(each))
        assert not blocks_of(each)[0]._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("is_fast", [False, True])
def test_taps_turn_sequence_first_towers(images: Tensor, is_fast: bool) -> None:
    torch.manual_seed(3)
    model = make_model()
    expected = walked(lraee.accelerate(model) if is_fast else model, images)
    for module in model.visual.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = False
    turned = lraee.accelerate(model) if is_fast else model
    with tapped(turned.visual) as z:
        turned.encode_image(images)
        for result, wanted in zip(z, expected, strict=True):
            assert result.shape == wanted.shape
            if is_fast:
                assert_same(result, wanted)
            else:  # torch's attention sums in another order
                assert torch.allclose(result, wanted, atol=1e-5)


@torch.no_grad()
def test_taps_come_off_after_an_error(fast: nn.Module, images: Tensor) -> None:
    with pytest.raises(RuntimeError), tapped(fast.visual):
        fast.encode_image(images[:, :2])
    assert not any(block._forward_hooks for block in blocks_of(fast))


# Passes


@torch.no_grad()
def test_embeddings_are_those_of_both_models(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    result = make_pair(model, fast, images).embeddings()
    assert_same(result["full"], fast.encode_image(images))
    parts = [model.encode_image(part) for part in images.split(4)]
    assert_same(result["teacher"], torch.cat(parts))


@torch.no_grad()
def test_exits_of_the_fast_model_are_passed_by(model: nn.Module, images: Tensor) -> None:
    with_exits = lraee.accelerate(model, exits=make_exits(model, kind="patience"))
    plain = make_pair(model, lraee.accelerate(model), images)
    pair = make_pair(model, with_exits, images)
    assert_same(pair.embeddings()["full"], plain.embeddings()["full"])
    expected = plain.pooled([1, 3], every(), view_seed=None)
    assert_same(pair.pooled([1, 3], every(), view_seed=None)["pooled"], expected["pooled"])
    assert pair.noise(N) == plain.noise(N)


@torch.no_grad()
def test_pooled_is_what_a_head_sees(model: nn.Module, fast: nn.Module, images: Tensor) -> None:
    rows = every()
    rows[[2, 4, 5, 6, 7]] = False  # the whole second batch among them
    result = make_pair(model, fast, images).pooled([3, 1], rows, view_seed=None)
    tokens = walked(fast, images[rows])
    expected = torch.stack([pool(tokens[block], has_class_token=True) for block in (3, 1)], dim=1)
    assert_same(result["pooled"], expected.half())
    alone = [pool(tokens[3], has_class_token=False), tokens[3][:, 0]]
    assert_same(result["pooled"][:, 0], torch.cat(alone, dim=1).half())
    assert torch.allclose(result["teacher"], model.encode_image(images[rows]), atol=1e-5)


@torch.no_grad()
def test_views_are_seeded_crops(model: nn.Module, fast: nn.Module, images: Tensor) -> None:
    """One source of crops for all batches of a view; images that are not marked draw none."""
    large, rows = with_margin(images), every()
    rows[3] = False
    pair = make_pair(model, fast, large, batch=N)
    result = pair.pooled([2], rows, view_seed=5)
    crops = augmented(large[rows], size=(SIZE, SIZE), generator=generator(5))
    expected = pool(walked(fast, crops)[2], has_class_token=True)
    assert_same(result["pooled"][:, 0], expected.half())
    assert_same(result["teacher"], model.encode_image(crops))
    again, other = (pair.pooled([2], rows, view_seed=seed)["pooled"] for seed in (5, 6))
    assert_same(again, result["pooled"])
    assert not torch.equal(other, result["pooled"])


@torch.no_grad()
def test_larger_images_are_cropped_to_the_centre(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    small, large = (make_pair(model, fast, each) for each in (images, with_margin(images)))
    head = {2: make_head(64, 24, hidden=None, has_class_token=True, seed=0)}
    classes = torch.eye(24)[:5]
    passes: list[Callable[[Pair], dict[str, Tensor]]] = [
        Pair.embeddings,
        lambda pair: pair.pooled([1, 2], every(), view_seed=None),
        lambda pair: pair.probed(head, every(), classes=classes, logit_scale=10.0),
    ]
    for each in passes:
        result, expected = each(large), each(small)
        for name, tensor in expected.items():
            assert_same(result[name], tensor, name=name)
    assert large.noise(N) == small.noise(N)


@torch.no_grad()
def test_probes_are_those_of_a_router(model: nn.Module, fast: nn.Module, images: Tensor) -> None:
    exits = make_exits(model, kind="confidence", blocks=(1, 2))
    rows = every()
    rows[[0, 8]] = False
    result = make_pair(model, fast, images).probed(
        dict(exits.heads), rows, classes=exits.router().classes, logit_scale=exits.logit_scale
    )
    routed = lraee.accelerate(model, exits=exits)
    with lraee.trace(routed) as t:
        left = routed.encode_image(images[rows])
    reached = ~t.features.isnan()
    assert_same(t.features[reached], result["features"][reached])
    places = {1: 0, 2: 1}
    early = [i for i, depth in enumerate(t.exit_block.tolist()) if depth in places]
    assert len(early) >= 2
    for i in early:
        assert_same(left[i], result["embedding"][i, places[int(t.exit_block[i])]], image=i)
    cosine = nn.functional.normalize(result["embedding"], dim=2) @ exits.router().classes.T
    assert_same(result["top1"], cosine.argmax(2))


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 4, 6, N, 100])
def test_noise_is_of_the_first_images(
    model: nn.Module, fast: nn.Module, images: Tensor, most: int
) -> None:
    meter = NoiseMeter(3)
    z, noisy = walked(model, images[:most]), walked(fast, images[:most])
    meter.add(z[0], z[1:], noisy[1:])
    result = make_pair(model, fast, images).noise(most)
    for row, expected in zip(result, meter.result(), strict=True):
        # torch's float blocks sum in another order in another batch
        assert vars(row) == pytest.approx(vars(expected), rel=1e-3)


# Images


class Batches:
    """Batches of these sizes, anew each time; counts how often."""

    def __init__(self, images: Tensor, sizes: list[int]) -> None:
        self.parts, self.passes = images.split(sizes), 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from self.parts


def test_batches_of_any_size_give_the_same(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    batches = Batches(images, [1, 0, 5, 2, 3])
    pair, whole = make_pair(model, fast, batches), make_pair(model, fast, images)
    assert_same(pair.embeddings()["full"], whole.embeddings()["full"])
    rows = every()
    rows[[0, 6, 7]] = False  # the first and the third batch whole
    result, expected = (each.pooled([2], rows, view_seed=None) for each in (pair, whole))
    assert_same(result["pooled"], expected["pooled"])
    assert batches.passes == 2
    # Crops are drawn batch by batch: those of equal batches are the same
    equal = make_pair(model, fast, Batches(images, [4, 4, 3]))
    result, expected = (each.pooled([2], rows, view_seed=3) for each in (equal, whole))
    assert_same(result["pooled"], expected["pooled"])
    one_by_one = make_pair(model, fast, [image[None] for image in images])
    assert_same(one_by_one.embeddings()["full"], whole.embeddings()["full"])


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (iter([torch.zeros(1, 3, SIZE, SIZE)]), "got list_iterator"),
        ((part for part in [torch.zeros(1, 3, SIZE, SIZE)]), "got generator"),
        (7, "got int"),
    ],
)
def test_images_that_cannot_be_gone_through_again(
    model: nn.Module, fast: nn.Module, wrong: Images, got: str
) -> None:
    with pytest.raises(TypeError, match=f"^calibrate: images must be float .* {got}"):
        make_pair(model, fast, wrong)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.zeros(3, SIZE, SIZE), r"got torch.float32 \[3, 32, 32\]"),
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), r"got torch.uint8 \[2, 3, 32, 32\]"),
        ([(torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2))], "got tuple"),
        (["a.jpg"], "got str"),
    ],
)
def test_batches_that_are_none(model: nn.Module, fast: nn.Module, wrong: Images, got: str) -> None:
    with pytest.raises(TypeError, match=f"^calibrate: images must be float .* {got}"):
        make_pair(model, fast, wrong).embeddings()


def test_no_images_at_all(model: nn.Module, fast: nn.Module) -> None:
    for nothing in ([], torch.zeros(0, 3, SIZE, SIZE)):
        with pytest.raises(ValueError, match="^calibrate: images must be one at least, got none"):
            make_pair(model, fast, nothing).embeddings()


def test_images_that_change_between_passes(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    """A loader that shuffles, and a folder in which a file is gone."""
    batches = Batches(images, [4, 7])
    pair = make_pair(model, fast, batches)
    pair.embeddings()
    batches.parts = images.flip(0).split(4)
    with pytest.raises(ValueError, match="must come in the same order in each pass"):
        pair.pooled([1], every(), view_seed=None)
    batches.parts = images[:-1].split(4)
    with pytest.raises(ValueError, match="must be the same in each pass, got 10 after 11"):
        make_pair(model, fast, batches).pooled([1], every(), view_seed=None)


def test_a_first_image_of_nan_is_the_same_in_each_pass(
    model: nn.Module, fast: nn.Module, images: Tensor
) -> None:
    broken = images.clone()
    broken[0] = torch.nan
    pair = make_pair(model, fast, broken)
    assert pair.embeddings()["full"][0].isnan().all()
    assert pair.embeddings()["full"][1:].isfinite().all()
