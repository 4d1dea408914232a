"""The shape of a product, and one tiling of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """y[M, N] = x[M, K] @ w[N, K].T."""

    M: int
    N: int
    K: int


@dataclass(frozen=True)
class Config:
    """One tiling of int8_linear, and the family of kernels that it is for.

    family: simple: a program a tile. persistent: a program an SM (int8_linear_persistent).
    gluon: that on sm_90 in Gluon (int8_linear_gluon).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8
    family: str = "simple"


def shared_bytes(config: Config) -> int:
    """Shared memory of the pipelined tiles of x and w."""
    return (config.block_m + config.block_n) * config.block_k * config.num_stages


def accumulators_per_thread(config: Config) -> int:
    """int32 accumulators each thread holds."""
    return config.block_m * config.block_n // (32 * config.num_warps)
