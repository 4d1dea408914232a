"""Reads a float block by the names of what it holds; what no reader names is refused."""

from collections.abc import Iterable, Mapping

from torch import nn

from lraee.layers.scheme import Site
from lraee.layers.spec import Linear, Norm, Rows
from lraee.towers.families import UnsupportedBlockError


class BlockReader:
    """One block while it is read: which of its tensors and modules have been named so far.

    Args:
      block: the float block.
      containers: paths of modules that only hold others.
      hints: beginning of a name -> what a part of that name is, for messages.
    """

    def __init__(
        self, block: nn.Module, containers: Iterable[str], hints: Mapping[str, str] | None = None
    ) -> None:
        """See the class."""
        self.block = block
        self.modules = dict(block.named_modules())
        self.held = {name for name, _ in [*block.named_parameters(), *block.named_buffers()]}
        self.named_tensors: set[str] = set()
        self.named_modules = {"", *containers}
        self.hints = hints or {}

    def has(self, path: str) -> bool:
        """Whether there is a module of this path that does something."""
        module = self.modules.get(path)
        return module is not None and not isinstance(module, nn.Identity)

    def rows(self, path: str, rows: tuple[int, int] | None = None) -> Rows:
        """The weight of a linear, and its bias if it has one."""
        self.named_modules.add(path)
        weight, bias = f"{path}.weight", f"{path}.bias"
        if weight not in self.held or not isinstance(self.modules[path], nn.Linear):
            raise UnsupportedBlockError(f"lacks {path} as a Linear, without which INT8 cannot read")
        self.named_tensors |= {weight, bias}
        return Rows(weight, bias if bias in self.held else None, rows)

    def linear(self, path: str, site: Site) -> Linear:
        """A linear that is one module."""
        return Linear(path, site, (self.rows(path),))

    def tensor(self, name: str) -> str | None:
        """The name, if the block holds it."""
        self.named_tensors.add(name)
        return name if name in self.held else None

    def norm(self, path: str) -> Norm:
        """A norm, of any kind; one that is no LayerNorm is called as it is."""
        self.named_modules.add(path)
        self.named_tensors |= {f"{path}.weight", f"{path}.bias"}
        module = self.modules[path]
        is_layer = isinstance(module, nn.LayerNorm) and module.weight is not None
        if not is_layer and "norm" not in type(module).__name__.lower():
            raise UnsupportedBlockError(f"has a {type(module).__name__} as {path}, no norm")
        return Norm(path, "layer" if is_layer else "rms")

    def inner_norm(self, path: str) -> str | None:
        """The path of a norm that may be absent."""
        return self.norm(path).path if self.has(path) else None

    def require_all_named(self) -> None:
        """Raises UnsupportedBlockError on a part that was not read."""
        idle = {name for name, m in self.modules.items() if _is_idle(m)}
        rest = sorted(self.held - self.named_tensors)
        rest += sorted(set(self.modules) - self.named_modules - idle)
        for name in rest:
            hint = next((h for part, h in self.hints.items() if name.startswith(part)), "")
            raise UnsupportedBlockError(f"has {name}{hint}, for which INT8 has no kernel")


def _is_idle(module: nn.Module) -> bool:
    """Whether the module changes nothing in eval mode."""
    return isinstance(module, nn.Identity | nn.Dropout) or "DropPath" in type(module).__name__
