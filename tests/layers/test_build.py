"""Blocks of other structures than open_clip's, built from a BlockSpec alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.layers.build import build_block
from lraee.layers.int8_attention import rotated
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import INT8, Scheme, channel_copies, find_scheme
from lraee.layers.spec import Attention, BlockSpec, Call, Linear, Mlp, Norm, Rope, Rows
from tests.support import assert_same

B, L, D, H = 3, 11, 64, 4
PREFIX = 2
MASKED = Call(("x", "mask", "rope"), mask="mask", rope="rope")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class RotaryAttention(nn.Module):
    """One qkv weight with biases apart and none for keys, norms per head, rotary patches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.q_norm, self.k_norm = nn.LayerNorm(D // H), nn.LayerNorm(D // H)
        self.norm, self.proj = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros(D), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(*x.shape[:2], 3, H, D // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.turn(q, rope), self.turn(k, rope)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.norm(y))

    def turn(self, x: Tensor, rope: Tensor) -> Tensor:
        """Channels 2 i and 2 i + 1 as a complex number times cos + i sin."""
        sin, cos = rope.chunk(2, -1)
        pairs = torch.view_as_complex(x[:, :, PREFIX:].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.complex(cos[:, ::2], sin[:, ::2])).flatten(-2)
        return torch.cat([x[:, :, :PREFIX], turned], dim=2)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, 96, bias=False), nn.Linear(D, 96)
        self.norm, self.down = nn.LayerNorm(96), nn.Linear(96, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class RotaryBlock(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.norm1, self.attn = nn.RMSNorm(D, eps=1e-6), RotaryAttention()
        self.norm2, self.mlp = nn.RMSNorm(D, eps=1e-6), Gated()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.rand(D) + 0.2) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        if self.order == "post":
            x = x + self.gamma_1 * self.norm1(self.attn(x, rope=rope))
            return x + self.gamma_2 * self.norm2(self.mlp(x))
        x = x + self.gamma_1 * self.attn(self.norm1(x), rope=rope)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


def spec(order: Any) -> BlockSpec:
    def linear(path: str, site: Any, bias: bool = True) -> Linear:
        return Linear(path, site, (Rows(f"{path}.weight", f"{path}.bias" if bias else None),))

    qkv = tuple(
        Rows("attn.qkv.weight", bias, (i * D, (i + 1) * D))
        for i, bias in enumerate(("attn.q_bias", None, "attn.v_bias"))
    )
    return BlockSpec(
        Attention(
            "attn", H, D // H, Linear("attn.qkv", "in_proj", qkv), linear("attn.proj", "out_proj"),
            call=Call(("x", "rope"), rope="rope"), rope=Rope(PREFIX, "interleaved"),
            q_norm="attn.q_norm", k_norm="attn.k_norm", inner_norm="attn.norm",
        ),
        Mlp(
            linear("mlp.up", "c_fc"), linear("mlp.down", "c_proj"), "silu",
            is_gated=True, gate=linear("mlp.gate", "c_fc", bias=False), inner_norm="mlp.norm",
        ),
        Norm("norm1", "rms"), Norm("norm2", "rms"), scale_1="gamma_1", scale_2="gamma_2",
        call=Call(("x", "rope"), rope="rope"), order=order,
    )  # fmt: skip


def tables() -> Tensor:
    """Sines and cosines of the patches, each twice, as timm gives them: [L - PREFIX, 2 d]."""
    angles = torch.rand(L - PREFIX, D // H // 2).repeat_interleave(2, -1) * 6
    return torch.cat([angles.sin(), angles.cos()], -1)


def build(block: nn.Module, block_spec: BlockSpec, scheme: Scheme = INT8) -> Int8Block:
    return build_block(
        block, block_spec, "blocks.0", scheme=scheme, backend="auto", take=lambda part: part
    )


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("has_rope", [False, True])
def test_a_block_kept_float_is_the_float_block(order: str, has_rope: bool) -> None:
    """The structure is right: with nothing quantized the numbers are those of the float block."""
    block, block_spec, x = RotaryBlock(order).eval(), spec(order), torch.randn(B, L, D)
    rope = tables() if has_rope else None
    kept = tuple(f"blocks.0.{linear.path}" for linear in block_spec.linears)
    assert len(kept) == 5
    expected = block(x, rope=rope)
    fast = build(block, block_spec, Scheme(attention="float", keep_float=kept))
    torch.testing.assert_close(fast(x, rope=rope), expected)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_it_is_near_in_int8_and_the_same_in_any_batch(order: str) -> None:
    block, block_spec, x, rope = (
        RotaryBlock(order).eval(),
        spec(order),
        torch.randn(B, L, D),
        tables(),
    )
    fast = build(block, block_spec)
    assert isinstance(fast, RotaryBlock) and fast.can_fuse and fast.is_by_row
    y = fast(x, rope=rope)
    assert_same(fast.first_token(x, rope), y[:, :1])
    assert F.cosine_similarity(y.flatten(1), block(x, rope=rope).flatten(1)).min() > 0.99
    assert_same(fast(x[1:2], rope=rope), y[1:2])
    assert not torch.equal(fast(x), y)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_operators_one_by_one_are_near_the_children_that_a_hook_sees(order: str) -> None:
    """float32 rounds the same sums at other places; a step of int8 may then fall elsewhere."""
    fast, x, rope = build(RotaryBlock(order).eval(), spec(order)), torch.randn(B, L, D), tables()
    y = fast(x, rope=rope)
    handle = fast.norm2.register_forward_hook(lambda *args: None)
    by_child = fast(x, rope=rope)
    handle.remove()
    assert (y - by_child).norm() < 2e-3 * y.norm()
    assert_same(fast(x, rope=rope), y)


def test_linears_of_several_parts_are_stacked() -> None:
    block, block_spec = RotaryBlock("pre"), spec("pre")
    in_proj = block_spec.attention.in_proj
    assert in_proj.shape(block) == (3 * D, D)
    assert_same(in_proj.weight(block), block.attn.qkv.weight)
    bias = in_proj.bias(block)
    assert bias is not None
    assert_same(bias, torch.cat([block.attn.q_bias, torch.zeros(D), block.attn.v_bias]))
    assert block_spec.mlp.gate is not None and block_spec.mlp.gate.bias(block) is None


def test_both_layouts_of_rotary_pairs_turn_alike() -> None:
    """Channels in another order: half of them first, half after."""
    x, rope, d = torch.randn(B, L, H, D // H), tables(), D // H
    order = torch.cat([torch.arange(0, d, 2), torch.arange(1, d, 2)])
    sin, cos = rope.chunk(2, -1)
    interleaved = rotated(x, rope, Rope(PREFIX, "interleaved"))
    half = rotated(x[..., order], (cos[:, order], sin[:, order]), Rope(PREFIX, "half"))
    assert_same(half, interleaved[..., order])
    assert_same(interleaved[:, :PREFIX], x[:, :PREFIX])


def test_missing_tensors_are_named() -> None:
    with pytest.raises(AttributeError, match=r"RotaryBlock has no tensor attn.k_bias"):
        Linear("a", "c_fc", (Rows("attn.k_bias"),)).weight(RotaryBlock("pre"))


def loud(gated: bool) -> tuple[RotaryBlock, BlockSpec]:
    """A block and its spec; both norms have a channel 32 times the others."""
    block, block_spec = RotaryBlock("pre").eval(), spec("pre")
    for norm in (block.norm1, block.norm2):
        norm.weight[3] = 32
    if not gated:
        mlp = replace(block_spec.mlp, activation="gelu", is_gated=False, gate=None, inner_norm=None)
        block_spec = replace(block_spec, mlp=mlp)
    return block, block_spec


@pytest.mark.parametrize("scheme", ["int8", "paper"])
@pytest.mark.parametrize("gated", [True, False])
def test_what_is_finer_where_the_mlp_is_gated(gated: bool, scheme: str) -> None:
    """Loud channels cut behind norms; values and out_proj with a second term of the weight."""
    block, block_spec = loud(gated)
    fast = build(block, block_spec, find_scheme(scheme))
    paths = {linear.path for linear in block_spec.linears}
    linears = {path: m for path, m in fast.named_modules() if path in paths}
    assert all(isinstance(m, Int8Linear) for m in linears.values())
    cut = {path: m.copies for path, m in linears.items() if m.copies is not None}
    is_on = gated and scheme == "int8"
    assert set(cut) == ({"attn.qkv", "mlp.gate", "mlp.up"} if is_on else set())
    expected = channel_copies(block.norm1.weight, None)
    for copies in cut.values():
        assert_same(copies[3:4], expected[3:4])
    rests = {path: m.rest.out_features for path, m in linears.items() if m.rest is not None}
    assert rests == ({"attn.qkv": D, "attn.proj": D} if is_on else {})
    two = {path for path, m in linears.items() if m.has_two_terms}
    assert two == (
        {"attn.proj"} | ({"mlp.down"} if gated else set()) if scheme == "int8" else set()
    )


def test_cutting_lowers_the_error_of_a_loud_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    block, block_spec = loud(True)
    x, rope = torch.randn(B, L, D), tables()
    expected = block(x, rope=rope)
    error = (build(block, block_spec)(x, rope=rope) - expected).norm()
    monkeypatch.setattr("lraee.layers.build.channel_copies", lambda gamma, beta: torch.ones(D))
    uncut = build(block, block_spec)
    assert not uncut.get_submodule("mlp.up").is_cut
    assert error < 0.8 * (uncut(x, rope=rope) - expected).norm()


def test_a_key_mask_with_rotary_positions_is_refused_in_one_line() -> None:
    fast = build(RotaryBlock("pre").eval(), replace(spec("pre"), call=MASKED))
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, L - 2 :] = False
    line = (
        r"^Int8Block: attention_mask must be None with rotary positions, got one; use the float"
        r" model \(lraee.restore\)$"
    )
    with pytest.raises(NotImplementedError, match=line):
        fast(torch.randn(B, L, D), mask=mask[:, None, None], rope=tables())
