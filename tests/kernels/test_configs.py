"""Configs: every row of the tables is legal somewhere, and pick always has an answer."""

import dataclasses

import pytest

from lraee.kernels.archs import ARCHS, Arch
from lraee.kernels.configs import (
    BUCKETS,
    TABLE,
    Config,
    PieceConfig,
    Shape,
    bucket,
    candidates,
    legal,
    measured,
    pick,
    piece_config,
    predicted_us,
    shared_bytes,
)
from lraee.kernels.measured import ANY_M, MEASURED

SHAPES = [
    Shape(M, N, K)
    for M in (1, 16, 17, 50, 64, 65, 197, 256, 257, 1600, 8224)
    for N, K in ((768, 768), (3072, 768), (768, 3072), (1, 1), (33, 97), (5120, 1280))
]


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: f"sm_{arch.capability}")
def test_pick_is_legal_and_the_cheapest_candidate(arch: Arch) -> None:
    for shape in SHAPES:
        config = pick(shape, arch)
        assert legal(config, shape, arch)
        assert shared_bytes(config) <= arch.shared_per_block
        if measured(shape, arch) is None:
            cheapest = min(predicted_us(row, shape, arch) for row in candidates(shape, arch))
            assert predicted_us(config, shape, arch) == cheapest


def test_what_was_measured_is_chosen() -> None:
    arch = ARCHS[90]
    for (N, K), rows in MEASURED[90].items():
        first = 1
        for most, row in rows:
            for M in (first, most):
                result = measured(Shape(M, N, K), arch)
                # A split of many rows may not fit its workspace; then the model chooses
                assert result == Config(*row) or not legal(Config(*row), Shape(M, N, K), arch)
                assert result is None or pick(Shape(M, N, K), arch) == result
            assert legal(Config(*row), Shape(first, N, K), arch), (N, K, row)
            first = most + 1
        assert rows[-1][0] == ANY_M
    assert measured(Shape(50, 768, 768), ARCHS[80]) is None


def test_every_row_of_the_tables_is_legal_for_some_layer() -> None:
    for capability, buckets in TABLE.items():
        for M, rows in zip((1, 50, 197, 1600), buckets, strict=True):
            for row in rows:
                assert legal(row, Shape(M, 768, 3072), ARCHS[capability]), (capability, row)


def test_rows_that_are_not_legal() -> None:
    arch, shape = ARCHS[80], Shape(50, 768, 768)
    good = Config(64, 64, 128, num_warps=4, num_stages=4)
    assert legal(good, shape, arch)
    for change in (
        {"block_m": 48},
        {"block_n": 8},
        {"block_k": 16},
        {"num_warps": 3},
        {"num_stages": 0},
        {"num_stages": 12},  # shared memory
        {"block_m": 128, "block_n": 256, "num_stages": 2},  # accumulators: 256 a thread
        {"split_k": 7},  # K = 768 has six blocks
    ):
        assert not legal(dataclasses.replace(good, **change), shape, arch), change
    # 4 MiB of partial sums
    assert not legal(dataclasses.replace(good, split_k=2), Shape(8224, 3072, 768), arch)


def test_batch_sizes_share_a_bucket() -> None:
    """M is bucketed, so that a batch size more does not mean another kernel."""
    assert [bucket(M) for M in (1, *BUCKETS)] == [0, 0, 1, 2]
    assert [bucket(M + 1) for M in BUCKETS] == [1, 2, 3]
    assert bucket(51) == bucket(64) and bucket(1600) == bucket(100_000)


def test_pieces_of_rows() -> None:
    """A row each while there are few; then what a program holds at once, inside one row block."""
    assert piece_config(50, 3072, num_warps=4, group=64) == PieceConfig(1, 4096)
    assert piece_config(1600, 3072, num_warps=8, group=128) == PieceConfig(4, 4096)
    assert piece_config(1600, 768, num_warps=8, group=128) == PieceConfig(16, 1024)
    assert piece_config(4000, 768, num_warps=4, group=1) == PieceConfig(1, 1024)
    assert piece_config(4000, 100_000, num_warps=4, group=64) == PieceConfig(1, 8192)
    for group in (1, 2, 16, 64):
        assert group % piece_config(4000, 32, num_warps=8, group=group).rows == 0


def test_more_work_is_never_predicted_faster() -> None:
    config = Config(64, 64, 128, num_warps=4, num_stages=4)
    for arch in ARCHS.values():
        times = [predicted_us(config, Shape(M, 768, 768), arch) for M in (50, 400, 1600, 6400)]
        assert times == sorted(times)
