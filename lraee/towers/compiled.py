"""An accelerated tower in torch.compile: one operator, which runs the tower as it stands.

What a compiler made of the float layers around the blocks could sum in another order for another
batch size. As one operator the tower keeps its bits, its early exits (where an image exits depends
on its numbers) and, on a GPU, its CUDA graphs; a function that calls it compiles without a break.
"""

from typing import Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.library import Library, register_fake

from lraee.towers.spec import TowerSpec

_library = Library("lraee", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("tower(Tensor x, int identity, int embedding_size) -> Tensor")  # type: ignore[no-untyped-call]

_towers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""Every accelerated tower by its id: a compiled call is guarded by it."""


class RunsImages(Protocol):
    """A tower."""

    tower_spec: TowerSpec

    def run_images(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, E]."""


def register(tower: nn.Module) -> None:
    """Lets compiled code run this tower, for as long as it lives."""
    _towers[id(tower)] = tower


def embed(tower: RunsImages, x: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> embeddings [B, …]: as the operator where torch.compile records.

    Not so in an export, which must hold the layers themselves, nor where the size or, by autocast,
    the type of the result is not known.
    """
    if (
        not torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.is_autocast_enabled(x.device.type)
        or x.dim() != 4
        or (embedding_size := tower.tower_spec.embedding_size) is None
    ):
        return tower.run_images(x)
    return cast(Tensor, torch.ops.lraee.tower(x.detach(), id(tower), embedding_size))


def _run(x: Tensor, identity: int, embedding_size: int) -> Tensor:
    y = cast(RunsImages, _towers[identity]).run_images(x)
    if y.dtype != x.dtype or y.shape != (len(x), embedding_size):
        raise TypeError(
            f"encode_image: a compiled tower must give [{len(x)}, {embedding_size}] in the type of"
            f" its images, {x.dtype}, got {list(y.shape)} {y.dtype}; cast the images, or call it"
            " without torch.compile"
        )
    return y


_library.impl("tower", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@register_fake("lraee::tower", lib=_library)  # type: ignore[untyped-decorator]
def _fake(x: Tensor, identity: int, embedding_size: int) -> Tensor:
    return x.new_empty(x.shape[0], embedding_size)
