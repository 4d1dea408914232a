"""Rotary position embeddings in the one layout that int8_attention takes."""

import torch
from torch import Tensor


def interleaved_to_half(w: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered from pairs (0, 1), (2, 3), … to halves: evens, then odds.

    Of the weight and bias of queries and of keys; their products do not change but for the order of
    channels. Values keep theirs. The table of angles is reordered along its channels likewise, see
    `rope_operand`.

    Args:
      w: [heads * d, …], d even.
      heads: number of heads.
    Returns: the same rows in another order.
    Raises: ValueError where heads do not divide the rows into heads of even size.
    """
    if w.shape[0] % (2 * heads):
        raise ValueError(
            f"interleaved_to_half: w must have rows of {heads} heads of even size,"
            f" got {list(w.shape)}"
        )
    d = w.shape[0] // heads
    pairs = w.reshape(heads, d // 2, 2, *w.shape[1:])
    return pairs.transpose(1, 2).reshape(w.shape)


def rope_operand(cos: Tensor, sin: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """cos and sin [R, d] of the rotated tokens as float32 [2, R, d], in halves."""
    table = torch.stack([cos.float(), sin.float()])
    if is_interleaved:
        R, d = cos.shape
        table = table.view(2, R, d // 2, 2).transpose(2, 3).reshape(2, R, d)
    return table.contiguous()
