"""The kernels that may compute a linear, as rows of data: their name, their configs, their check.

A new family is a row here. Every family gives the same bits: sums are int32, and the epilogue is
shared.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

from lraee.diagnostics.selftest_sizes import Target
from lraee.kernels import device, first_use
from lraee.kernels.archs import Arch
from lraee.kernels.configs import legal, pick, predicted_us
from lraee.kernels.families import gluon_config, persistent_config
from lraee.kernels.tiling import Config, Shape

Space = Callable[[Shape, Arch], Iterator[Config]]


@dataclass(frozen=True)
class ProductFamily:
    """One kernel of int8_linear.

    Args:
      name: in tables and results.
      space: its legal configs for a shape.
      cost: predicted microseconds, by which configs are tried in order.
      is_proven: it runs on GPUs already; else a check in a process of its own comes first.
      adds: it has layer scales and residuals.
    """

    name: str
    space: Space
    cost: Callable[[Config, Shape, Arch], float]
    is_proven: bool = False
    adds: bool = True

    def candidates(
        self, shape: Shape, arch: Arch, most: int | None = None, *, adds: bool
    ) -> list[Config]:
        """Its legal configs, those that should be fastest first; at most so many.

        adds: whether the product is followed by a layer scale or a residual.
        """
        if adds and not self.adds:
            return []
        configs = self.space(shape, arch)
        return sorted(configs, key=lambda one: self.cost(one, shape, arch))[:most]


def simple_space(shape: Shape, arch: Arch) -> Iterator[Config]:
    """Every legal config of the simple kernel that is worth a try for this shape."""
    for m, n, k, warps, stages, split in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256), (4, 8), (3, 4), (1, 2, 4)
    ):
        config = Config(m, n, k, warps, stages, split)
        is_wasteful = m >= 32 and m >= 2 * shape.M
        if not is_wasteful and legal(config, shape, arch):
            yield config


def persistent_space(shape: Shape, arch: Arch) -> Iterator[Config]:
    """Every legal config of the persistent kernel."""
    for m, n, k, warps, stages in itertools.product(
        (64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4)
    ):
        config = Config(m, n, k, warps, stages, family="persistent")
        if legal(config, shape, arch):
            yield config


def gluon_space(shape: Shape, arch: Arch) -> Iterator[Config]:
    """The one config of products in Gluon."""
    config = gluon_config(shape)
    if legal(config, shape, arch):
        yield config


def persistent_cost(config: Config, shape: Shape, arch: Arch) -> float:
    """The simple kernel's, but the configs that a pick takes come first: these are known to fit."""
    defaults = [persistent_config(arch, has_residual=has) for has in (False, True)]
    return 0.0 if config in defaults else predicted_us(config, shape, arch)


FAMILIES: tuple[ProductFamily, ...] = (
    ProductFamily("simple", simple_space, predicted_us, is_proven=True),
    ProductFamily("persistent", persistent_space, persistent_cost),
    ProductFamily("gluon", gluon_space, predicted_us, adds=False),
)


def failure(family: ProductFamily, target: Target) -> str | None:
    """Why a family must not be launched there, or None: its check at first use, made now if due.

    The interpreter needs none: a kernel cannot hang it.
    """
    gpu = device.gpu_name(target.device)
    if family.is_proven or gpu is None:
        return None
    verdict = first_use.stored(family.name, gpu)
    if verdict is None or not verdict.passed:
        verdict = first_use.check(family.name, gpu, target.device.index or 0)
    return None if verdict.passed else verdict.reason


def numbers(config: Config) -> list[int]:
    """The config as a table holds it: its numbers, the grouping of tiles left out."""
    return [*astuple(config)][:6]


def present_pick(shape: Shape, target: Target, epilogue: str) -> Config:
    """What runs now for this shape, by the user's table where there is one."""
    return pick(shape, target.arch, epilogue, device.gpu_name(target.device))
