"""The router against a naive one, image by image; and what it promises on a real tower."""

import copy
import math
import pickle
import random
import threading

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.exits.gate import Gate, GateKind
from lraee.exits.router import Compaction, Router
from lraee.ops.reference import Probe
from lraee.towers import flops
from lraee.towers import runner as vision
from lraee.towers.executor import EagerExecutor
from lraee.towers.families import find_tower
from lraee.towers.segments import Segments
from tests.clip_models import make_images, make_lraee_tiny, make_model
from tests.exits.random_exits import make_exits
from tests.support import assert_same, generator

FIXED = (0.0, 0.0, 0.0, 0.0)


class TableHead(nn.Module):
    """A head whose score is written in the image: token 1, channel e."""

    macs = 0

    def __init__(self, e: int) -> None:
        super().__init__()
        self.e = e

    def forward(self, z: Tensor, classes: Tensor, logit_scale: float) -> tuple[Tensor, ...]:
        score = z[:, 1, self.e]
        embedding = torch.stack([z[:, 0, 0], torch.full_like(score, self.e)], dim=1)
        return embedding, torch.zeros(len(z), dtype=torch.int64), score, score, score, score


def table_router(exits: tuple[int, ...], thresholds: list[float], copy_share: float) -> Router:
    gate = Gate("confidence", (FIXED,) * len(exits), tuple(thresholds))
    router = Router(
        exits, [], gate, classes=torch.ones(1, 2), logit_scale=1.0,
        compaction=Compaction(copy_share),
    )  # fmt: skip
    router.heads = nn.ModuleList(TableHead(e) for e in range(len(exits)))
    return router


class TableTower:
    """Blocks that change nothing and note how many images they ran on."""

    def __init__(self, router: Router, blocks: int, last_column: float) -> None:
        self.router, self.depth, self.last_column = router, blocks, last_column
        self.rows: list[int] = []

    def embed(self, images: Tensor) -> Tensor:
        return images

    def run_blocks(self, z: Tensor, first: int, last: int) -> Tensor:
        self.rows += [len(z)] * (last - first)
        return z

    def probe(self, e: int, z: Tensor) -> Probe:
        return self.router.probe(e, z)

    def may_overwrite(self, last: int) -> bool:
        return False

    def finish(self, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0, 0], torch.full((len(z),), self.last_column)], dim=1)

    def __call__(self, z: Tensor) -> Tensor:
        segments = Segments.of(self.depth, self.router.blocks)
        return vision.route(self, segments, self.router, z, EagerExecutor(self))


def naive(scores: list[list[float]], thresholds: list[float]) -> list[int]:
    """Exit of each image, one by one; the number of exits at full depth."""
    result = []
    for row in scores:
        leaves = (e for e, (s, t) in enumerate(zip(row, thresholds, strict=True)) if s >= t)
        result.append(next(leaves, len(thresholds)))
    return result


@pytest.mark.parametrize("cases", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_tables_against_a_naive_router(cases: int) -> None:
    """Any scores (NaN and ties too), thresholds, batch size and compaction."""
    source = random.Random(0)
    values = [math.nan, math.inf, -math.inf, 0.0, 0.25, 0.5, 0.75, 1.0]
    for case in range(cases):
        m, B = source.randint(1, 4), source.choice([1, 1, 2, 3, 5, 8])
        blocks = m + source.randint(1, 2)
        exits = tuple(sorted(source.sample(range(1, blocks), m)))
        thresholds = [source.choice(values[1:]) for _ in range(m)]
        scores = [[source.choice(values) for _ in range(m)] for _ in range(B)]
        router = table_router(exits, thresholds, source.choice([0.0, 0.2, 1.0, 100.0]))
        z = torch.zeros(B, 2, max(m, 2))
        z[:, 1, :m] = torch.tensor(scores)
        z[:, 0, 0] = torch.arange(B)
        result = TableTower(router, blocks, float(m))(z)
        expected = [[float(i), float(e)] for i, e in enumerate(naive(scores, thresholds))]
        assert result.tolist() == expected, (case, exits, thresholds, scores)


def test_dropped_images_run_no_further() -> None:
    """Blocks run on survivors only; a copy that does not pay is not made."""
    z = torch.zeros(4, 2, 2)
    z[:, 0, 0] = torch.arange(4)
    z[:, 1, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    z[:, 1, 1] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    for copy_share, expected in ((0.0, [4, 3, 1]), (1.9, [4, 3, 1]), (2.0, [4, 4, 1])):
        tower = TableTower(table_router((1, 2), [0.5, 0.5], copy_share), 3, 7.0)
        assert tower(z).tolist() == [[0, 0], [1, 1], [2, 7], [3, 1]]
        assert tower.rows == expected, copy_share


# A real tower


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return make_lraee_tiny()


@pytest.fixture(scope="module", params=["learned", "confidence", "patience", "agreement"])
def fast(request: pytest.FixtureRequest, tiny: nn.Module) -> nn.Module:
    kind: GateKind = request.param
    return lraee.accelerate(tiny, exits=make_exits(tiny, kind=kind, blocks=(4, 7, 9)))


def pictures(n: int, seed: int = 0) -> Tensor:
    coarse = torch.randn(n, 3, 7, 7, generator=generator(seed))
    images = nn.functional.interpolate(coarse, size=56, mode="bicubic")
    return images * (torch.rand(n, 1, 1, 1, generator=generator(seed + 1)) * 2 + 0.05)


@torch.no_grad()
def test_same_bits_and_same_exit_in_any_batch(fast: nn.Module) -> None:
    """>= 500 pairs for each of four gates, neighbours with NaN and Inf among them."""
    torch.set_num_threads(1)
    images = pictures(24)
    alone, depth = [], []
    for image in images:
        with lraee.trace(fast) as t:
            alone.append(fast.encode_image(image[None])[0])
        depth.append(int(t.exit_block))
    assert len(set(depth)) >= 2, "images must leave at different depths for this to be a test"
    source, pairs = random.Random(0), 0
    for B in (2, 3, 5, 8, 13, 32, 33, 64, 100, 128, 128, 128):
        torch.set_num_threads(source.choice([1, 2]))
        picks = [source.randrange(len(images)) for _ in range(B)]
        batch = images[picks]
        for row in range(0, B, 5):
            if row % 10 == 5:
                picks[row], batch[row] = -1, math.nan
        with lraee.trace(fast) as t:
            result = fast.encode_image(batch)
        for row, pick in enumerate(picks):
            if pick < 0:
                assert t.exit_block[row] == 12 and result[row].isnan().all()
                continue
            assert_same(result[row], alone[pick], batch=B, row=row, image=pick)
            assert int(t.exit_block[row]) == depth[pick], (B, row, pick)
            pairs += 1
    assert pairs >= 500, pairs


@torch.no_grad()
def test_exits_off_is_plain_int8(tiny: nn.Module, fast: nn.Module) -> None:
    images = pictures(9)
    plain = lraee.accelerate(tiny).encode_image(images)
    with lraee.full_depth(fast):
        assert_same(fast.encode_image(images), plain)
        with lraee.trace(fast) as t:
            fast.encode_image(images)
    assert t.exit_block.tolist() == [12] * 9
    assert t.flops_saved == 0.0
    assert not fast.encode_image(images).equal(plain)


@torch.no_grad()
def test_full_depth_is_of_its_own_thread(fast: nn.Module) -> None:
    images = pictures(9)
    result: list[Tensor] = []
    with lraee.full_depth(fast), lraee.trace(fast) as t:
        thread = threading.Thread(target=lambda: result.append(fast.encode_image(images)))
        thread.start()
        thread.join()
    assert len(t.exit_block) == 0
    assert_same(result[0], fast.encode_image(images))


@torch.no_grad()
def test_flops_run_are_those_expected(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three counts of one thing: by exits, by rows that blocks ran on, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    images = pictures(33)
    monkeypatch.setattr(fast.visual.exits, "compaction", Compaction(0.0))
    with lraee.trace(fast) as t:
        fast.encode_image(images)
        fast.encode_image(images[:5])
    stats = t.stats
    assert stats.images == 38 and sum(stats.share) == pytest.approx(1.0)
    assert stats.expected_flops == stats.run_flops
    assert stats.full_flops == 38 * flops.PartFlops.as_run(find_tower(fast)).total
    assert t.flops_saved == 1 - stats.run_flops / stats.full_flops
    for copy_share in (0.0, 100.0):
        monkeypatch.setattr(fast.visual.exits, "compaction", Compaction(copy_share))
        with lraee.trace(fast) as once, FlopCounterMode(display=False) as counter:
            fast.encode_image(images)
        assert once.stats.run_flops == counter.get_total_flops()
    assert once.stats.run_flops > once.stats.expected_flops, "images that left were carried along"


@torch.no_grad()
def test_copies_run_the_same_way(fast: nn.Module) -> None:
    images = pictures(7)
    expected = fast.encode_image(images)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(other.encode_image(images), expected)
        other.set_classes(torch.randn(5, 256, generator=generator(1)))
        assert other.visual.exits.classes.shape == (5, 256)
    assert_same(fast.encode_image(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(tiny: nn.Module, dtype: torch.dtype) -> None:
    half = lraee.accelerate(tiny, exits=make_exits(tiny, kind="learned", blocks=(4, 9))).to(dtype)
    router = half.visual.exits
    assert router.classes.dtype == router.heads[0].gamma.dtype == torch.float32
    images = pictures(8).to(dtype)
    with lraee.trace(half) as t:
        y = half.encode_image(images)
    assert y.dtype == dtype and len(set(t.exit_block.tolist())) >= 2
    for i in range(8):
        assert_same(half.encode_image(images[i : i + 1])[0], y[i], image=i)


@torch.no_grad()
def test_empty_batch_and_normalize(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = fast.visual
    monkeypatch.setattr(type(tower), "embed", lambda tower, x: torch.zeros(len(x), 50, 192))
    nothing = tower(torch.zeros(0, 3, 56, 56))  # open_clip itself cannot embed 0 images
    monkeypatch.undo()
    assert nothing.shape == (0, 256)
    y = fast.encode_image(pictures(3), normalize=True)
    assert torch.allclose(y.norm(dim=1), torch.ones(3), atol=1e-5)


@torch.no_grad()
def test_sequence_first_blocks() -> None:
    """Towers that run [L, B, D] inside route the same images to the same exits."""
    model = make_model()
    exits = make_exits(model, kind="learned", blocks=(1, 2))
    images = make_images(8)
    fast = lraee.accelerate(model, exits=exits)
    expected = fast.encode_image(images)
    for module in fast.visual.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = False
    assert_same(fast.encode_image(images), expected)


@torch.no_grad()
def test_what_exits_cannot_give_is_refused(tiny: nn.Module) -> None:
    fast = lraee.accelerate(tiny, exits=make_exits(tiny, kind="learned", blocks=(4,)))
    fast.visual.output_tokens = True
    with pytest.raises(NotImplementedError, match="output_tokens must be False, got True"):
        fast.visual(pictures(2))
    with lraee.full_depth(fast):
        assert fast.visual(pictures(2))[1].shape == (2, 49, 192)
    fast.visual.output_tokens = False
    handle = fast.visual.transformer.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="must have no hooks"):
        fast.encode_image(pictures(2))
    handle.remove()
    recorded: list[int] = []
    fast.visual.transformer.resblocks[11].register_forward_hook(
        lambda module, args, y: recorded.append(len(y))
    )
    with lraee.trace(fast) as t:
        fast.encode_image(pictures(24))
    assert recorded == [int((t.exit_block == 12).sum())]
    with pytest.raises(ValueError, match="trace: model must have exits, got none"):
        with lraee.trace(lraee.accelerate(tiny)):
            pass
