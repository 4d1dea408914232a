"""What one call of a tower with early exits keeps on its device, so that no host decides."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lraee.kernels.live_rows import LiveRows

MOST_IMAGES = 128
"""Images of a call: one program decides over all of them, a row a thread."""

MOVED_FROM, MOVED_TO, MOVED_PLACE, EXIT_ROW, EXIT_PLACE, SIZES = range(6)
"""Rows of ExitState.moves; of the last one, the number of moves and the number of exits."""


@dataclass(frozen=True)
class ExitState:
    """Tables of m exits for up to `capacity` images; `row` counts live images, `place` input rows.

    images: int32 [1] each. images[0] the images of the call, images[e + 1] those that stay after
      exit e; padding rows never count.
    places: int32 [capacity] each. places[e]: input row of each image that stays after exit e;
      before the first exit each image stands in its own.
    moves: int32 [6, MOST_IMAGES]: what the exit that ran last moves, see the names of its rows.
    numbers: float32 [m, 4]: threshold of each exit, and its gate's factors of the cosine, the
      variance and 1.
    result: [capacity, E] by place, in the type of the tokens.
    depth: int32 [capacity] by place: after how many blocks the image exited.
    trace: float32 [capacity, m, 4] by place: score, confidence, margin and variance at the exits
      that the image came to; any content at the others.
    top1, streak: int32 [capacity] by place: class at the exit before, and for how many exits.
    direction: float32 [capacity, E] by place: unit embedding of the exit before; [1, 1] where the
      gate compares none.
    """

    images: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    moves: Tensor
    numbers: Tensor
    result: Tensor
    depth: Tensor
    trace: Tensor
    top1: Tensor
    streak: Tensor
    direction: Tensor

    @property
    def capacity(self) -> int:
        """Images that there is room for."""
        return self.result.shape[0]

    def live(self, exits: int) -> LiveRows:
        """The images that are in the tower after so many exits."""
        return LiveRows(self.images[exits], self.capacity)

    @classmethod
    def allocate(
        cls, images: Tensor, numbers: Tensor, result: Tensor, *, compares: bool
    ) -> "ExitState":
        """Tables beside those given, on their device, any content.

        Args:
          images: int32 [1], of the call.
          numbers: see the class.
          result: its memory.
          compares: whether the gate compares embeddings of consecutive exits.
        """
        (m, _), (capacity, E), device = numbers.shape, result.shape, result.device
        if capacity > MOST_IMAGES:
            raise ValueError(
                f"ExitState: result must have at most {MOST_IMAGES} rows, got {capacity}"
            )

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        single = torch.float32
        return cls(
            images=(images, *(table(1) for _ in range(m))),
            places=tuple(table(capacity) for _ in range(m)),
            moves=table(6, MOST_IMAGES),
            numbers=numbers,
            result=result,
            depth=table(capacity),
            trace=table(capacity, m, 4, dtype=single),
            top1=table(capacity),
            streak=table(capacity),
            direction=table(*((capacity, E) if compares else (1, 1)), dtype=single),
        )
