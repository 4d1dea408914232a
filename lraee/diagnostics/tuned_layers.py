"""The linears of a tower as tuning sees them: shapes, and what follows each product there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lraee.kernels.configs import epilogue_name
from lraee.kernels.operands import PackedLinear
from lraee.layers.spec import BlockSpec
from lraee.measurement.float16 import tower_key
from lraee.towers.families import block_specs, blocks_of, tower_spec


@dataclass(frozen=True)
class Epilogue:
    """What follows the int32 sums of a linear besides scales, zero point and bias.

    Args:
      activation: as in int8_linear.
      has_residual, has_layer_scale: whether there is one.
    """

    activation: str = "none"
    has_residual: bool = False
    has_layer_scale: bool = False

    @property
    def adds(self) -> bool:
        """Whether there is a layer scale or a residual."""
        return self.has_residual or self.has_layer_scale

    @property
    def name(self) -> str:
        """As a table of tilings names it, such as "gelu" or "none+layer_scale+residual"."""
        name: str = epilogue_name(
            self.activation, has_layer_scale=self.has_layer_scale, has_residual=self.has_residual
        )
        return name


@dataclass(frozen=True)
class TunedLayer:
    """One linear: N outputs, K inputs, `count` of them in the tower."""

    N: int
    K: int
    epilogue: Epilogue
    count: int = 1


@dataclass(frozen=True)
class TunedTower:
    """A tower in a table of times: L tokens of width D in `depth` blocks, and its linears."""

    L: int
    D: int
    depth: int
    layers: tuple[TunedLayer, ...]

    @property
    def key(self) -> str:
        """The name under which times of such towers are kept."""
        return tower_key(self.L, self.D, self.depth)


def tuned_tower(tower: nn.Module) -> TunedTower:
    """The linears of a float image tower, each kind once."""
    spec = tower_spec(tower)
    counts: dict[tuple[int, int, Epilogue], int] = {}
    blocks = blocks_of(tower)
    for block, of_block in zip(blocks, block_specs(tower), strict=True):
        for N, K, epilogue in _linears(block, of_block):
            counts[N, K, epilogue] = counts.get((N, K, epilogue), 0) + 1
    layers = (TunedLayer(*kind, count) for kind, count in counts.items())
    return TunedTower(spec.tokens, spec.width, len(blocks), tuple(layers))


def _linears(block: nn.Module, spec: BlockSpec) -> Iterator[tuple[int, int, Epilogue]]:
    adds = spec.order != "post"
    by_path = {
        spec.attention.in_proj.path: Epilogue(),
        spec.attention.out_proj.path: Epilogue("none", adds, adds and spec.scale_1 is not None),
        spec.mlp.fc1.path: Epilogue("none" if spec.mlp.has_gate else spec.mlp.activation),
        spec.mlp.fc2.path: Epilogue("none", adds, adds and spec.scale_2 is not None),
    }
    for linear in spec.linears:
        yield *linear.shape(block), by_path.get(linear.path, Epilogue())


@dataclass(frozen=True)
class Operands:
    """Rows and `copies` weights of one layer on a device; every row has a zero point."""

    x: tuple[Tensor, Tensor, Tensor]
    linears: tuple[PackedLinear, ...]
    options: dict[str, Any]

    @staticmethod
    def of(
        layer: TunedLayer, M: int, copies: int, dtype: torch.dtype, device: torch.device
    ) -> "Operands":
        """Random ones, from a fixed seed."""
        source = torch.Generator(device).manual_seed(M)

        def integers(dtype: torch.dtype, *shape: int) -> Tensor:
            options: dict[str, Any] = {"generator": source, "dtype": dtype, "device": device}
            return torch.randint(-127, 128, shape, **options)

        def int8(rows: int) -> Tensor:
            return integers(torch.int8, rows, layer.K)

        def floats(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=source, device=device)

        zero = integers(torch.int32, M)
        vectors = (floats(layer.N) * 0.01, floats(layer.N) - 0.5, floats(layer.N))
        scale, bias, gain = vectors
        linears = [
            PackedLinear(
                w, scale, w.sum(1, dtype=torch.int32), bias,
                gain if layer.epilogue.has_layer_scale else None,
            )
            for w in (int8(layer.N) for _ in range(copies))
        ]  # fmt: skip
        options: dict[str, Any] = {"activation": layer.epilogue.activation, "out_dtype": dtype}
        if layer.epilogue.has_residual:
            options["residual"] = (floats(M, layer.N) - 0.5).to(dtype)
        return Operands((int8(M), floats(M) * 0.01, zero), tuple(linears), options)

    def one_row(self) -> "Operands":
        """The same with the first row alone."""
        x_q, x_scale, x_zero = self.x
        options = dict(self.options)
        if "residual" in options:
            options["residual"] = options["residual"][:1]
        return Operands((x_q[:1], x_scale[:1], x_zero[:1]), self.linears, options)

    def first_rows(self, rows: int) -> dict[str, Any]:
        """Arguments of the definition for the first rows and the last weight, on the CPU."""
        x_q, x_scale, x_zero = (each[:rows].cpu() for each in self.x)
        linear = PackedLinear(*(None if t is None else t.cpu() for t in self.linears[-1]))
        residual = self.options.get("residual")
        return {
            "x_q": x_q, "x_scale": x_scale, "x_zero": x_zero, "linear": linear,
            "residual": None if residual is None else residual[:rows].cpu(),
            "out_dtype": self.options["out_dtype"],
        }  # fmt: skip
