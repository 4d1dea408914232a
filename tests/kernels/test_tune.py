"""The tuner, with an injected timer and kernels in the interpreter."""

import itertools

import torch

from bench.tune_int8_linear import COPIES, report, row, space, tune
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, legal, pick

ARCH = ARCHS[80]
CPU = torch.device("cpu")


def test_every_config_is_checked_then_timed() -> None:
    ticks = itertools.count(9, -1)
    called = []

    def timer(call: object) -> float:
        called.append(call)
        return float(next(ticks))

    shape = Shape(5, 40, 96)
    measured = tune(shape, CPU, ARCH, timer, most=4)
    assert len(called) == 4
    assert [one.us * COPIES for one in measured] == [6.0, 7.0, 8.0, 9.0]
    text = report(shape, measured, ARCH, "a made-up GPU")
    assert row(measured[0].config) in text and "a made-up GPU" in text and "0.5 us" in text


def test_rows_can_be_pasted() -> None:
    for config in (Config(16, 64, 128, 4, 3), Config(64, 32, 64, 8, 2, split_k=4)):
        assert Config(*eval(row(config))) == config


def test_space_holds_legal_configs_and_what_pick_would_choose() -> None:
    for shape in (Shape(50, 768, 768), Shape(1600, 3072, 768)):
        configs = list(space(shape, ARCH))
        assert len(configs) > 50
        assert all(legal(config, shape, ARCH) for config in configs)
        assert pick(shape, ARCH) in configs
