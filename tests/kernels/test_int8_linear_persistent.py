"""int8_linear by persistent programs, in the interpreter: the bits of the simple kernel."""

import pytest
import torch
from torch import Tensor

from lraee.diagnostics.guarded_memory import guarded_outputs, poisoned_all
from lraee.diagnostics.selftest_inputs import linear
from lraee.kernels import device, live_rows
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, legal
from lraee.kernels.families import persistent_programs
from lraee.kernels.int8_linear import int8_linear
from lraee.kernels.live_rows import LiveRows
from lraee.ops import reference
from tests.support import assert_same

TINY = Config(16, 32, 32, num_warps=4, num_stages=3, group_m=2, family="persistent")
WIDE = Config(64, 64, 64, num_warps=4, num_stages=3, family="persistent")
SHAPES = [(1, 8, 16), (17, 40, 48), (50, 72, 112), (65, 136, 64), (33, 16, 208), (70, 64, 80)]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs, so that each has several tiles."""
    arch = device.arch(torch.device("cpu"))
    few = type(arch)(**vars(arch) | {"sms": 3})
    monkeypatch.setattr(device, "arch", lambda _: few)


@pytest.mark.usefixtures("few_programs")
def test_bits_of_the_definition() -> None:
    """Each optional operand with and without, each type, ragged M, N and K, rows apart."""
    for seed, (M, N, K) in enumerate(SHAPES * 3):
        config = WIDE if seed % 4 == 3 else TINY
        given = linear(M, N, K, seed)
        expected = reference.int8_linear(**given)
        guarded = poisoned_all(given, row_pad=(0, 16, 3)[seed % 3])
        with guarded_outputs():
            actual = int8_linear(**guarded, config=config)
        assert_same(actual, expected, M=M, N=N, K=K, seed=seed)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activations_have_the_bits_of_the_simple_kernel(activation: str) -> None:
    simple = Config(16, 32, 32, num_warps=4, num_stages=3)
    for seed, (M, N, K) in enumerate(SHAPES[1:4], start=12):
        given = linear(M, N, K, seed) | {"activation": activation}
        expected = int8_linear(**given, config=simple)
        assert_same(int8_linear(**given, config=TINY), expected, M=M, N=N, K=K, seed=seed)


@pytest.mark.usefixtures("few_programs")
def test_rows_of_live_images_keep_their_bits() -> None:
    for seed, (capacity, length) in enumerate([(1, 1), (3, 5), (3, 23)]):
        given = linear(capacity * length, 40, 48, seed + 8) | {"config": TINY}
        whole = int8_linear(**given)
        for images in range(capacity + 1):
            live = LiveRows(torch.tensor([images], dtype=torch.int32), capacity)
            with guarded_outputs(), live_rows.using(live):
                part: Tensor = int8_linear(**given)
            rows = images * length
            assert_same(part[:rows], whole[:rows], seed=seed, images=images)
            assert part[rows:].isnan().all()


def test_what_descriptors_cannot_describe_is_not_legal() -> None:
    arch = ARCHS[90]
    config = Config(256, 128, 128, num_warps=4, num_stages=3, family="persistent")
    assert legal(config, Shape(6304, 2304, 768), arch)
    assert not legal(config, Shape(6304, 2304, 588), arch)
    assert not legal(config, Shape(6304, 1001, 768), arch)
    for change in ({"split_k": 2}, {"num_stages": 4}, {"block_n": 256}, {"block_m": 32}):
        assert not legal(Config(**vars(config) | change), Shape(6304, 2304, 768), arch), change
    assert not legal(config, Shape(6304, 2304, 768), ARCHS[80])  # shared memory
    other = Config(128, 128, 128, num_warps=8, num_stages=3, family="persistent")
    assert legal(other, Shape(6304, 2304, 768), ARCHS[80])


def test_programs_of_a_launch() -> None:
    config = Config(256, 128, 128, num_warps=4, num_stages=3, family="persistent")
    assert persistent_programs(config, Shape(6304, 2304, 768), ARCHS[90]) == 132
    assert persistent_programs(config, Shape(500, 768, 768), ARCHS[90]) == 12
