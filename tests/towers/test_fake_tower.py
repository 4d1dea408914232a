"""A tower of no library, known by its specs alone: accelerated, calibrated, saved and restored."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lraee
from lraee.layers.int8_attention import Int8Attention
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.towers import families
from lraee.towers.families import Family, find_tower
from lraee.towers.flops import count_macs
from lraee.towers.runner import RowwiseTower, ends_with_class_token
from lraee.towers.spec import (
    Attention,
    BlockSpec,
    Call,
    Linear,
    Mlp,
    Norm,
    PatchEmbedding,
    Pooling,
    Projection,
    Rows,
    TowerSpec,
)
from tests.support import assert_same

D, H, E, DEPTH, PATCHES = 32, 2, 16, 4, 16


class FakeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        q, k, v = (
            p(states).unflatten(2, (H, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), None


class FakeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = D
        self.before, self.attention = nn.LayerNorm(D, eps=1e-6), FakeAttention()
        self.scale = nn.Parameter(torch.rand(D) + 0.5)
        self.after, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 48), nn.Linear(48, D)

    def forward(self, states: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor]:
        assert self.width == states.shape[-1]
        states = states + self.scale * self.attention(self.before(states), mask=mask)[0]
        return (states + self.down(F.gelu(self.up(self.after(states)))),)


class FakeTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, D, 8, 8)
        self.token, self.places = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(17, D))
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*(FakeLayer() for _ in range(DEPTH)))
        self.last, self.head = nn.LayerNorm(D), nn.Linear(D, E)

    def embed(self, images: Tensor) -> Tensor:
        z = self.pixels(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(z), 1, D), z], 1) + self.places

    def forward(self, images: Tensor) -> Tensor:
        z = self.embed(images)
        for layer in self.encoder.layers:
            z = layer(z, mask=None, output_attentions=False)[0]
        return self.head(self.last(z[:, 0]))


class FakeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eyes = FakeTower()


# Its family: a reader, an adapter, a record


def read_block(layer: nn.Module) -> BlockSpec:
    def linear(path: str, site: Any) -> Linear:
        return Linear(path, site, (Rows(f"{path}.weight", f"{path}.bias"),))

    q, v = (Rows(f"attention.{part}.weight", f"attention.{part}.bias") for part in "qv")
    qkv = (q, Rows("attention.k.weight"), v)
    return BlockSpec(
        Attention(
            "attention", H, D // H, Linear("attention.qkv", "in_proj", qkv),
            linear("attention.out", "out_proj"),
            call=Call(("states", "mask"), mask="mask", outputs=2),
        ),
        Mlp(linear("up", "c_fc"), linear("down", "c_proj"), "gelu"),
        Norm("before"),
        Norm("after"),
        scale_1="scale",
        call=Call(("states", "mask"), mask="mask", outputs=1),
    )  # fmt: skip


def read_tower(tower: nn.Module) -> TowerSpec:
    return TowerSpec(
        family="fake",
        float_class=FakeTower,
        blocks="encoder.layers",
        patch_embedding=PatchEmbedding("pixels", (8, 8), PATCHES * D * 192),
        pooling=Pooling("class"),
        projection=Projection("head.weight", False, (E, D), "head.bias"),
        image_size=(32, 32),
        tokens=PATCHES + 1,
        width=D,
        prefix_tokens=1,
        final_norm="last",
        embedding_size=E,
    )


class FakeRunner(RowwiseTower):
    def _finish(self, z: Tensor) -> Tensor:
        return self._project(self.get_submodule("last")(z[:, 0]))


FAKE = Family(
    name="fake tower",
    paths=("eyes",),
    is_tower=lambda module: isinstance(module, FakeTower),
    read_tower=read_tower,
    read_block=read_block,
    embed=FakeTower.embed,
    adapter=FakeRunner,
    encode_image=lambda model, images: getattr(model, "eyes", model)(images),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, FAKE])
    with torch.no_grad():
        yield


def make() -> FakeModel:
    torch.manual_seed(0)
    return FakeModel().eval()


def pictures(n: int, size: int = 32) -> Tensor:
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(n))
    return F.interpolate(coarse, size=size, mode="bicubic")


@pytest.mark.parametrize("scheme", ["int8", "int8-patches"])
def test_it_accelerates_and_answers_alike_in_any_batch(scheme: str) -> None:
    model, images = make(), pictures(7)
    expected = model.eyes(images)
    fast = lraee.accelerate(model, scheme=scheme, check=images)
    assert isinstance(fast.eyes, FakeTower) and isinstance(fast.eyes, FakeRunner)
    y = fast.eyes(images)
    assert F.cosine_similarity(y, expected).min() > 0.99
    for i in range(7):
        assert_same(fast.eyes(images[i : i + 1]), y[i : i + 1])
    nan = images.clone()
    nan[3, 0, 0, 0] = torch.nan
    others = [0, 1, 2, 4, 5, 6]
    assert_same(fast.eyes(nan)[others], y[others])
    assert ends_with_class_token(fast.eyes)
    assert count_macs(fast.eyes).share > (0.99 if scheme == "int8-patches" else 0.5)
    assert_same(model.eyes(images), expected)


def test_its_blocks_are_of_its_own_class_and_fused() -> None:
    fast = lraee.accelerate(make())
    for layer in fast.eyes.encoder.layers:
        assert isinstance(layer, FakeLayer) and isinstance(layer, Int8Block) and layer.can_fuse
        assert isinstance(layer.attention, Int8Attention)
        assert not isinstance(layer.attention, FakeAttention)
        assert {name for name, m in layer.named_modules() if isinstance(m, Int8Linear)} == {
            "attention.qkv", "attention.out", "up", "down",
        }  # fmt: skip
        assert layer.scale.requires_grad


def test_a_block_is_called_as_the_library_calls_it() -> None:
    model, z = make(), torch.randn(2, 17, D)
    fast = lraee.accelerate(model).eyes.encoder.layers[1]
    (y,) = fast(z)
    (named,) = fast(states=z, mask=None, output_attentions=False)
    assert_same(named, y)
    assert (
        F.cosine_similarity(y.flatten(1), model.eyes.encoder.layers[1](z)[0].flatten(1)).min()
        > 0.99
    )
    (attended, weights) = fast.attention(fast.before(z), mask=None)
    assert attended.shape == z.shape and weights is None
    with pytest.raises(NotImplementedError, match="output_attentions must be None, got True"):
        fast(z, output_attentions=True)
    with pytest.raises(TypeError, match="Int8Block: states must be a tensor, got NoneType"):
        fast(mask=None)


def test_hooks_see_inner_modules_and_hidden_states() -> None:
    fast, images = lraee.accelerate(make()), pictures(2)
    expected = fast.eyes(images)
    states: list[Tensor] = []
    for layer in fast.eyes.encoder.layers:
        layer.register_forward_hook(lambda _m, _args, y: states.append(y[0]))
    assert_same(fast.eyes(images), expected)
    inner: list[Tensor] = []
    hook = fast.eyes.encoder.layers[2].up.register_forward_hook(
        lambda _m, _args, y: inner.append(y)
    )
    torch.testing.assert_close(fast.eyes(images), expected, rtol=0.05, atol=0.05)
    assert len(inner) == 1 and inner[0].shape == (2, 17, 48)
    assert len(states) == 2 * DEPTH and states[0].shape == (2, 17, D)
    hook.remove()
    assert_same(fast.eyes(images), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_it_is_restored_bit_for_bit(inplace: bool) -> None:
    model, images = make(), pictures(3)
    expected, state = model.eyes(images), copy.deepcopy(model.state_dict())
    fast = lraee.accelerate(model, inplace=inplace)
    again = lraee.restore(fast, base=state)
    assert type(again.eyes) is FakeTower
    assert {type(layer) for layer in again.eyes.encoder.layers} == {FakeLayer}
    assert_same(again.eyes(images), expected)
    assert again.state_dict().keys() == state.keys()


def test_copies_and_pickles_answer_with_the_same_bits() -> None:
    fast, images = lraee.accelerate(make(), scheme="int8-patches"), pictures(3)
    expected = fast.eyes(images)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin.eyes) is type(fast.eyes)
        assert type(twin.eyes.encoder.layers[0]) is type(fast.eyes.encoder.layers[0])
        assert_same(twin.eyes(images), expected)


def test_linears_are_named_by_the_spec() -> None:
    kept = ("layers.0.attention.qkv", "layers.3.down")
    fast = lraee.accelerate(make(), scheme=lraee.Scheme(keep_float=kept))
    for name in kept:
        assert isinstance(fast.eyes.encoder.get_submodule(name), nn.Linear)
    with pytest.raises(
        ValueError, match="keep_float must name linears such as 'layers.0.attention"
    ):
        lraee.accelerate(make(), scheme=lraee.Scheme(keep_float=("layers.0.fc1",)))


@pytest.mark.parametrize("scheme", ["int8", "int8-patches", "paper"])
def test_a_checkpoint_comes_back(scheme: str, tmp_path: Path) -> None:
    model, images = make(), pictures(3)
    fast = lraee.accelerate(model, scheme=scheme)
    lraee.save(fast, tmp_path)
    assert_same(lraee.load(tmp_path, model).eyes(images), fast.eyes(images))


def test_exits_are_calibrated_and_saved(tmp_path: Path) -> None:
    model, images = make(), pictures(160)
    with torch.enable_grad():
        exits = lraee.calibrate(
            model, images, gate="static", budget=0.8, is_timed=False, progress=False
        )
    fast = lraee.accelerate(model, exits=exits)
    with lraee.trace(fast) as t:
        y = fast.eyes(images[:40])
    assert t.exit_block.min() < DEPTH
    assert_same(fast.eyes(images[7:8]), y[7:8])
    with lraee.full_depth(fast):
        assert_same(fast.eyes(images), lraee.accelerate(model).eyes(images))
    lraee.save(fast, tmp_path)
    assert_same(lraee.load(tmp_path, model).eyes(images[:40]), y)


def test_unknown_towers_are_refused_with_the_known_families() -> None:
    model = nn.Module()
    model.eyes = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="one of open_clip .*, fake tower, got Linear"):
        find_tower(model)
