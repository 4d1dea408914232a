"""Interleaved rotary positions are those of halves, with the rows of q and k reordered."""

import pytest
import torch
from torch import Tensor

from lraee import ops
from lraee.layers.rope import interleaved_to_half, rope_operand
from tests.support import assert_same, generator


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """timm's apply_rot_embed_cat without rotate_half, on [L, H, d]."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos[:, None] + turned * sin[:, None]


def _halves(x: Tensor, rope: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * rope[0][:, None] + torch.cat([-x2, x1], -1) * rope[1][:, None]


@pytest.mark.parametrize(("heads", "d"), [(2, 8), (3, 6), (1, 64)])
def test_reordered_rows_give_the_same_bits(heads: int, d: int) -> None:
    source = generator(1)
    L, D = 7, heads * d
    w, b = torch.randn(D, D, generator=source), torch.randn(D, generator=source)
    x, angle = torch.randn(L, D, generator=source), torch.rand(L, d // 2, generator=source) * 6
    cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
    rows = ops.float_linear(x, w, b).view(L, heads, d)
    expected = _interleaved(rows, cos, sin)
    other = ops.float_linear(x, interleaved_to_half(w, heads), interleaved_to_half(b, heads))
    turned = _halves(other.view(L, heads, d), rope_operand(cos, sin, is_interleaved=True))
    for head in range(heads):
        assert_same(turned[:, head], interleaved_to_half(expected[:, head].t(), 1).t(), head=head)


def test_attention_sees_no_order_of_channels() -> None:
    """Q and K reordered alike: int8 products, scales and so y are the same bits."""
    L, H, d = 9, 2, 16
    qkv = torch.randn(1, L, 3 * H * d, generator=generator(2))
    q, k, v = qkv[0].t().chunk(3)
    halves = torch.cat([interleaved_to_half(q, H), interleaved_to_half(k, H), v]).t()[None]
    angle = torch.rand(L, d // 2, generator=generator(3)) * 6
    cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
    turned = qkv.clone().view(L, 3, H, d)
    for part in (0, 1):
        turned[:, part] = _interleaved(turned[:, part].clone(), cos, sin)
    expected = ops.int8_attention(turned.view(1, L, -1), num_heads=H)
    rope = rope_operand(cos, sin, is_interleaved=True)
    assert_same(ops.int8_attention(halves.contiguous(), num_heads=H, rope=rope), expected)


def test_a_table_in_halves_stays() -> None:
    cos, sin = torch.randn(2, 5, 8).unbind()
    assert_same(rope_operand(cos, sin), torch.stack([cos, sin]))


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="2 heads of even size, got"):
        interleaved_to_half(torch.zeros(6, 3), 2)
