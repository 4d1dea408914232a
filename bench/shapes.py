"""Shapes of real towers: the one table that every benchmark reads."""

from collections.abc import Iterator
from dataclasses import dataclass

BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Linear:
    """One Linear of a block: N outputs, K inputs."""

    name: str
    N: int
    K: int


@dataclass(frozen=True)
class Tower:
    """An image tower: `layers` blocks of width D over L tokens (class token included)."""

    name: str
    open_clip: str
    L: int
    D: int
    num_heads: int
    layers: int
    E: int
    image_px: int
    patch_px: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four Linears of a block, in the order in which it runs them."""
        D = self.D
        return (
            Linear("attn.qkv", 3 * D, D),
            Linear("attn.out", D, D),
            Linear("mlp.fc1", 4 * D, D),
            Linear("mlp.fc2", D, 4 * D),
        )

    @property
    def weights(self) -> int:
        """Number of weights in all Linears of all blocks."""
        return self.layers * sum(linear.N * linear.K for linear in self.linears)

    @property
    def flops(self) -> int:
        """FLOPs of one image, two for each multiply-add: patches, blocks, projection."""
        L, D = self.L, self.D
        patches = 2 * (L - 1) * 3 * self.patch_px**2 * D
        return patches + 2 * L * self.weights + self.layers * 4 * L * L * D + 2 * D * self.E


B32 = Tower(
    "ViT-B/32",
    "ViT-B-32",
    L=50,
    D=768,
    num_heads=12,
    layers=12,
    E=512,
    image_px=224,
    patch_px=32,
)
B16 = Tower(
    "ViT-B/16",
    "ViT-B-16",
    L=197,
    D=768,
    num_heads=12,
    layers=12,
    E=512,
    image_px=224,
    patch_px=16,
)
L14 = Tower(
    "ViT-L/14",
    "ViT-L-14",
    L=257,
    D=1024,
    num_heads=16,
    layers=24,
    E=768,
    image_px=224,
    patch_px=14,
)
TINY = Tower(
    "lraee-tiny",
    "lraee-tiny",
    L=50,
    D=192,
    num_heads=3,
    layers=12,
    E=256,
    image_px=56,
    patch_px=8,
)
TOWERS = (B32, B16, L14, TINY)


def tower_batches() -> Iterator[tuple[Tower, int]]:
    """Every tower at every batch size."""
    for tower in TOWERS:
        for batch in BATCHES:
            yield tower, batch


def linear_batches() -> Iterator[tuple[Tower, Linear, int]]:
    """Every Linear of every tower at batch 1 and 32."""
    for tower in TOWERS:
        for linear in tower.linears:
            for batch in (1, 32):
                yield tower, linear, batch
