"""Tokens of the calibration images between two blocks, in float and in int8."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lraee.ops.reference import Quantized

SAMPLE_ROWS = 2048
"""Tokens that channel scales are searched on, in whole images."""
ROWS, ROWS_OF_NARROW, NARROW = 16384, 65536, 768
"""About so many rows make the sums of a linear, four times its inputs at least; in towers of width
768 and below, where they cost little, more."""


class Streams:
    """The residual streams of the float and of the int8 tower, and those inside the block.

    Args:
      tokens: float32 [n, L, D] before the first block.
      chunk: images that a layer runs on at once.
      has_class: whether the first token of an image is a class token.
    """

    def __init__(self, tokens: Tensor, chunk: int, *, has_class: bool) -> None:
        self.has_class = has_class
        self.exact, self.int8 = tokens, tokens.clone()
        self.exact_mid, self.int8_mid = torch.empty_like(tokens), torch.empty_like(tokens)
        self.n, self.L, self.D = tokens.shape
        self._chunk = chunk

    def chunks(self) -> Iterator[slice]:
        """Places of images, in order."""
        for start in range(0, self.n, self._chunk):
            yield slice(start, min(start + self._chunk, self.n))

    def sample(self, z: Tensor) -> Tensor:
        """Some images of one of the streams, evenly spread."""
        count = min(self.n, -(-SAMPLE_ROWS // self.L))
        return z[torch.arange(count) * self.n // count]

    def picked(self, where: slice, K: int) -> Tensor:
        """Which tokens of these images the sums of a linear take, bool [B, L]: the first token of
        each image and every so manieth of the others.
        """
        rows = ROWS_OF_NARROW if self.D <= NARROW else ROWS
        stride = max(1, self.n * self.L // max(rows, 4 * K))
        images = torch.arange(where.start, where.stop)[:, None]
        tokens = torch.arange(self.L)[None]
        return ((images + tokens) % stride == 0) | (tokens == 0)


def numbers(x: Quantized) -> Tensor:
    """(x_q - x_zero) * x_scale: float32 [M, K]."""
    x_q, x_scale, x_zero = x
    return (x_q.float() - x_zero[:, None]) * x_scale[:, None]
