"""An exit after which the class token runs on alone: early exits for search.

The later blocks compute the class token and nothing else: the other tokens stay as they are at the
exit, and are keys and values to it. What they would have become is nearly an affine function of
what they are, so each later block has a projection of its own to keys and values, fitted in closed
form: [W_kv M, b_kv + W_kv c], where M and c are the least-squares map from its norm of the tokens
at the exit to its norm of the tokens that it would have had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.exits.head import TypedBuffers
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import INT8, quantize_weight
from lraee.ops.reference import Probe

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ClassTokenWeights:
    """Keys and values of R blocks, the second after the exit and all that follow it.

    Args:
      w: float32 [R, 2 D, D], R >= 1, rows of keys, then of values.
      b: float32 [R, 2 D].
      embedding_size: E of the tower.
    """

    w: Tensor
    b: Tensor
    embedding_size: int

    def tensors(self) -> dict[str, Tensor]:
        """Its arrays by name."""
        return {"w": self.w, "b": self.b}


class ClassTokenHead(TypedBuffers):
    """The exit of one tower; attach_exits gives it the blocks that it runs.

    Args:
      weights: quantized in `attach`, one scale per output channel.
    """

    in_projs: nn.ModuleList

    def __init__(self, weights: ClassTokenWeights) -> None:
        """See the class."""
        super().__init__()
        self.weights = weights
        self.in_projs = nn.ModuleList()
        self.macs = 0
        self._shells: tuple[list[nn.Module], list[Int8Block]] | None = None

    def attach(self, blocks: Sequence[nn.Module], *, tokens: int, macs_after: int) -> None:
        """Makes the projections of the blocks after the exit: their own queries, new keys, values.

        Args:
          blocks: after the exit, R + 1 of them; each an Int8Block that gives its first token alone.
          tokens: L.
          macs_after: multiply-adds of one image after the last block.
        """
        int8_blocks = [cast(Int8Block, block) for block in blocks]
        weights = zip(self.weights.w, self.weights.b, strict=True)
        self.in_projs = nn.ModuleList(
            _in_proj(in_proj_of(block), w, b)
            for block, (w, b) in zip(int8_blocks[1:], weights, strict=True)
        )
        self._shells = None
        self.macs = macs_after + sum(_macs(block, tokens) for block in int8_blocks)

    def forward(
        self, z: Tensor, blocks: Sequence[nn.Module], rope: Any, finish: Callable[[Tensor], Tensor]
    ) -> Probe:
        """Tokens [B, L, D] after the exit's block -> a Probe whose embedding alone means something.

        Args:
          blocks: those of `attach`, or of the tower that this is a copy of.
          rope: rotary positions of the call, or None.
          finish: the class token after the last block [B, 1, D] -> embeddings [B, E].
        """
        z = z.clone()  # the router may let some images go on
        runs = self._runs(list(blocks))
        for block in runs[:-1]:
            z[:, :1] = block.first_token(z, rope)
        embedding = finish(runs[-1].first_token(z, rope)).float()
        nothing = embedding.new_zeros(len(z))
        return embedding, nothing.long(), nothing, nothing, nothing, nothing

    def _runs(self, blocks: list[nn.Module]) -> list[Int8Block]:
        """The tower's blocks, from the second on with the projections of this exit."""
        if self._shells is None or any(
            a is not b for a, b in zip(self._shells[0], blocks, strict=True)
        ):
            own = [cast(Int8Block, block) for block in blocks]
            changed = [
                _with_module(block, _in_proj_path(block), in_proj)
                for block, in_proj in zip(own[1:], self.in_projs, strict=True)
            ]
            self._shells = blocks, [own[0], *changed]
        return self._shells[1]

    def __getstate__(self) -> dict[str, Any]:
        """All but what is made again in the copy, of the copy's own tower."""
        return {**self.__dict__, "_shells": None}


def in_proj_of(block: Int8Block) -> Int8Linear:
    """The linear of queries, keys and values."""
    return cast(Int8Linear, block.get_submodule(_in_proj_path(block)))


def _in_proj_path(block: Int8Block) -> str:
    return block.block_spec.attention.in_proj.path


def _in_proj(own: Int8Linear, w: Tensor, b: Tensor) -> Int8Linear:
    """The block's own queries, and these keys and values [2 D, D], quantized."""
    w, b = w.to(own.w_scale.device), b.to(own.w_scale.device)
    queries = own.out_features - len(w)
    folded = w if own.in_scale is None else w * own.in_scale
    w_q, w_scale = quantize_weight(folded, INT8, own.backend)
    bias = b.new_zeros(queries) if own.bias is None else own.bias[:queries]
    return Int8Linear(
        torch.cat([own.w_q[:queries], w_q]), torch.cat([own.w_scale[:queries], w_scale]),
        torch.cat([bias, b]), dtype=own.dtype, granularity=own.granularity, in_scale=own.in_scale,
        backend=own.backend,
    )  # fmt: skip


def _macs(block: Int8Block, tokens: int) -> int:
    """Multiply-adds of the class token in a block to which the other tokens are keys and values."""
    in_proj = in_proj_of(block)
    linears = (m for m in block.modules() if isinstance(m, Int8Linear))
    weights = sum(m.in_features * m.out_features for m in linears)
    weights += sum(p.numel() for p in block.parameters() if p.dim() == 2)
    own = in_proj.in_features * in_proj.out_features
    return weights + (tokens - 1) * own + 2 * tokens * in_proj.in_features


def _with_module(root: Module, path: str, module: nn.Module) -> Module:
    """The module with another one at this path; all others are shared, hooks of `root` are not."""
    result: Any = _shallow(root)
    parent = result
    *names, last = path.split(".")
    for name in names:
        child = _shallow(parent._modules[name])
        parent._modules[name] = child
        parent = child
    parent._modules[last] = module
    return cast(Module, result)


def _shallow(module: Any) -> Any:
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__["_modules"] = dict(module._modules)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        other.__dict__[name] = type(module.__dict__[name])()
    if isinstance(other, Int8Block):
        other._wiring = None
    return other
