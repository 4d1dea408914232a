"""The launches that a block and a probe would make, recorded without a GPU, and what each moves."""

import math
from unittest import mock

import torch
from torch import Tensor

from bench.launches import Launch, launches_of, meta, meta_linear
from bench.shapes import Tower
from lraee.kernels import device
from lraee.kernels.archs import Arch
from lraee.kernels.exit_probe import exit_probe
from lraee.kernels.int8_block import int8_block
from lraee.kernels.operands import BlockOperands, Norm, ProbeHead

CLASSES = 1000
HIDDEN = 512
"""Hidden values of a head that sees the class token beside the patch mean."""


def block_launches(
    tower: Tower, batch: int, arch: Arch, *, attention: str = "int8"
) -> list[Launch]:
    """The launches of one INT8 block in float16, as int8_block makes them on this architecture."""
    D = tower.D
    norm = Norm(meta(D), meta(D))
    linears = [meta_linear(linear.N, linear.K) for linear in tower.linears]
    block = BlockOperands(
        norm, linears[0], linears[1], norm, *linears[2:], num_heads=tower.num_heads
    )
    if attention != "int8":
        block = block._replace(attention=attention)  # type: ignore[arg-type, call-arg]
    x = meta(batch, tower.L, D, dtype=torch.float16)
    with mock.patch.object(device, "arch", lambda of: arch):
        return launches_of(lambda: int8_block(x, block))


def probe_launches(tower: Tower, batch: int, *, has_class_token: bool = False) -> list[Launch]:
    """The launch of one exit probe: the paper's head D -> D -> E, or 2 D -> 512 -> E."""
    D, E = tower.D, tower.E
    P, H = (2 * D, HIDDEN) if has_class_token else (D, D)
    z, norm = meta(batch, tower.L, D, dtype=torch.float16), Norm(meta(P), meta(P))
    classes = meta(CLASSES, E, dtype=torch.float16)
    return launches_of(
        lambda: exit_probe(
            z, ProbeHead(norm, meta_linear(H, P), meta_linear(E, H), classes, 100.0, meta(4))
        )
    )


def bytes_of(launch: Launch) -> int:
    """Every tensor argument read or written once; a workspace is not counted.

    An absent argument is replaced by one that is there (kernels), so each storage counts once.
    """
    recorded: dict[int, int] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor) and name not in ("partial_ptr", "ticket_ptr"):
            recorded[id(value)] = value.numel() * value.element_size()
    return sum(recorded.values())


def number(launch: Launch, name: str) -> int:
    """An integer argument or constant."""
    value = launch.arguments[name] if name in launch.arguments else launch.constants[name]
    assert isinstance(value, int), name
    return value


def products_of(launch: Launch) -> int:
    """Operations (two per multiply-add) that a launch gives to tensor cores."""
    if launch.name.startswith("int8_linear"):
        return 2 * math.prod(number(launch, name) for name in "MNK")
    if launch.name in ("int8_attention", "float_attention"):
        return 4 * math.prod(number(launch, name) for name in ("B", "H", "num_queries", "L", "d"))
    if launch.name == "exit_probe":
        P, H, E = (number(launch, name) for name in "PHE")
        blocks = math.ceil(number(launch, "B") / number(launch, "ROWS"))
        return 2 * 16 * blocks * H * (P + E)
    return 0
