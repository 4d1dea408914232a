"""What a transformer block is made of, whichever library it comes from.

A reader per family fills a BlockSpec from a float block. It holds names and numbers, no tensors:
parameters are named by their path in the block. So one spec serves to build the int8 block, to name
what a checkpoint and `keep_float` hold, and to find the parts again in the int8 block, whose
children have the names of the float block's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lraee.layers.scheme import Site
from lraee.ops.checked import Activation

ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True)
class Rows:
    """Some output rows of a linear: parameters of the float block.

    Args:
      weight: name of the weight [N, K].
      bias: name of the bias [n], a parameter or buffer; None stands for zeros.
      rows: first and last + 1 row of the weight; None takes all. The bias is not cut.
    """

    weight: str
    bias: str | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Linear:
    """One product: the rows of all parts, stacked.

    Args:
      path: of the linear in the int8 block; checkpoints and `keep_float` name it.
      site: which of the four linears it is to a Scheme.
      parts: one, or several such as queries, keys and values.
    """

    path: str
    site: Site
    parts: tuple[Rows, ...]

    def weight(self, block: nn.Module) -> Tensor:
        """[N, K] of the float block; the parameter itself where it is one part."""
        weights = [_rows(tensor_at(block, part.weight), part.rows) for part in self.parts]
        return weights[0] if len(weights) == 1 else torch.cat([w.detach() for w in weights])

    def bias(self, block: nn.Module) -> Tensor | None:
        """[N] of the float block, or None where no part has one."""
        if all(part.bias is None for part in self.parts):
            return None
        biases = [self._bias(block, part) for part in self.parts]
        return biases[0] if len(biases) == 1 else torch.cat([b.detach() for b in biases])

    def shape(self, block: nn.Module) -> tuple[int, int]:
        """N, K."""
        shapes = [_rows(tensor_at(block, part.weight), part.rows).shape for part in self.parts]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    @staticmethod
    def _bias(block: nn.Module, part: Rows) -> Tensor:
        if part.bias is not None:
            return tensor_at(block, part.bias)
        weight = _rows(tensor_at(block, part.weight), part.rows)
        return weight.detach().new_zeros(weight.shape[0])


def _rows(weight: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return weight if rows is None else weight[slice(*rows)]


def tensor_at(block: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name.

    Raises: AttributeError if there is none.
    """
    parent, _, leaf = name.rpartition(".")
    module = block.get_submodule(parent)
    tensor: Tensor | None = module._parameters.get(leaf)
    if tensor is None:
        tensor = module._buffers.get(leaf)
    if tensor is None:
        raise AttributeError(f"{type(block).__name__} has no tensor {name}")
    return tensor


@dataclass(frozen=True)
class Norm:
    """A norm over the channels of each token.

    Args:
      path: of its module, in the float block and in the int8 one.
      kind: "layer": an nn.LayerNorm, whose `weight`, `bias` and `eps` are read; "rms" or anything
        else that its module computes: called as it is.
    """

    path: str
    kind: Literal["layer", "rms"] = "layer"


@dataclass(frozen=True)
class Call:
    """How a module is called with tokens, and what it returns.

    Args:
      parameters: names of its positional arguments, in order; the first are the tokens.
      mask: the argument that is an attention mask, None or causal.
      rope: the argument that holds cosines and sines of rotary positions.
      ignored: arguments that change nothing. Every other one must be None or False.
      outputs: None returns the tokens; n a tuple of n, the tokens and None for the rest.
      is_sequence_first: tokens are [L, B, D]; else [B, L, D].
    """

    parameters: tuple[str, ...] = ("x",)
    mask: str | None = None
    rope: str | None = None
    ignored: frozenset[str] = frozenset()
    outputs: int | None = None
    is_sequence_first: bool = False

    def read(
        self, owner: str, args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Tokens, mask and rotary positions among the arguments of a call.

        Args:
          owner: class name that a message begins with.
          args, named: of the call.
        Raises: TypeError on missing or surplus tokens, NotImplementedError on an argument that INT8
          has no kernel for.
        """
        if len(args) == 1 and not named:
            return args[0], None, None
        if len(args) > len(self.parameters):
            raise TypeError(
                f"{owner}: arguments must be at most {len(self.parameters)}, got {len(args)}"
            )
        given = {**dict(zip(self.parameters, args, strict=False)), **named}
        tokens = given.pop(self.parameters[0], None)
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"{owner}: {self.parameters[0]} must be a tensor, got {type(tokens).__name__}"
            )
        mask = given.pop(self.mask, None) if self.mask else None
        rope = given.pop(self.rope, None) if self.rope else None
        for name, value in given.items():
            if value is not None and value is not False and name not in self.ignored:
                got = value if isinstance(value, bool | int | str) else type(value).__name__
                raise NotImplementedError(
                    f"{owner}: {name} must be None, got {got}; INT8 has no kernel for it, use the"
                    " float model (lraee.restore)"
                )
        return tokens, mask, rope

    def tokens(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        """Tokens [B, L, D] among the arguments of a call that the module accepts."""
        return self.by_image(args[0] if args else named[self.parameters[0]])

    def wrap(self, tokens: Tensor) -> Any:
        """What the module returns."""
        return tokens if self.outputs is None else (tokens, *(None,) * (self.outputs - 1))

    def unwrap(self, result: Any) -> Tensor:
        """Tokens [B, L, D] in what the module returned."""
        return self.by_image(result if self.outputs is None else result[0])

    def by_image(self, tokens: Tensor) -> Tensor:
        """[B, L, D] of tokens as the module takes them, or the way back."""
        return tokens.transpose(0, 1) if self.is_sequence_first else tokens


@dataclass(frozen=True)
class Rope:
    """Rotary positions of queries and keys.

    Args:
      prefix: tokens before the first that is rotated.
      layout: which channels of a head are a pair: "half": i and i + d / 2; "interleaved": 2 i and
        2 i + 1.
    """

    prefix: int
    layout: Literal["half", "interleaved"] = "half"


@dataclass(frozen=True)
class Attention:
    """Self-attention of a block.

    Args:
      path: of its module, in the float block and in the int8 one.
      num_heads, head_dim: H and d.
      in_proj: [D] -> [3 H d]: queries, keys, values.
      out_proj: [H d] -> [D]; a path outside the module's: the block applies it to its result.
      call: how the float block calls it; None: as torch's nn.MultiheadAttention, whose tokens have
        the order of the block's.
      is_causal: token i sees tokens 0..i whatever the mask says.
      masks_keys: a token that the mask hides is no key and a query all the same, as in text towers;
        else it is left out and stays as it is, as in images of several sizes.
      rope: rotary positions, or None.
      q_norm, k_norm: paths of norms over each head's channels, or None.
      inner_norm: path of a norm before out_proj, or None.
    """

    path: str
    num_heads: int
    head_dim: int
    in_proj: Linear
    out_proj: Linear
    call: Call | None = None
    is_causal: bool = False
    masks_keys: bool = False
    rope: Rope | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    inner_norm: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the operator int8_block computes it."""
        parts = (self.rope, self.q_norm, self.k_norm, self.inner_norm)
        return all(part is None for part in parts)

    @property
    def holds_out_proj(self) -> bool:
        """Whether out_proj is a child of the module."""
        return self.out_proj.path.startswith(f"{self.path}.")


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block: fc2(norm(act(fc1(x)))), or fc2(norm(act(gate(x)) * fc1(x))).

    Args:
      fc1, fc2: the linears; a gate and its fc1 that are one product are one linear, `fc1`.
      activation: its name: one of ACTIVATIONS, or "silu" where it is gated.
      is_gated: whether one half of the rows of fc1 gates the other.
      is_gate_last: the gate is the second half of those rows; else the first.
      gate: the linear of the gate, where it is one of its own.
      inner_norm: path of a norm before fc2, or None.
      input_norm: path of a norm before fc1, behind the block's own, or None.
    """

    fc1: Linear
    fc2: Linear
    activation: str
    is_gated: bool = False
    is_gate_last: bool = False
    gate: Linear | None = None
    inner_norm: str | None = None
    input_norm: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the operator int8_block computes it."""
        parts = (self.gate, self.inner_norm, self.input_norm)
        is_bare = not self.is_gated and all(part is None for part in parts)
        return is_bare and self.activation in ACTIVATIONS


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block.

    Args:
      attention, mlp: see there.
      norm_1, norm_2: before attention and MLP, or after them.
      scale_1, scale_2: names of the layer scales [D], or None.
      call: how the tower calls the block.
      order: "pre": x + scale_1 * attention(norm_1(x)); "post": x + scale_1 * norm_1(attention(x));
        "sum": norm_1(x + scale_1 * attention(x)), as in BERT; the MLP likewise.
    """

    attention: Attention
    mlp: Mlp
    norm_1: Norm
    norm_2: Norm
    scale_1: str | None = None
    scale_2: str | None = None
    call: Call = Call()
    order: Literal["pre", "post", "sum"] = "pre"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear, in the order of the forward pass."""
        gate = () if self.mlp.gate is None else (self.mlp.gate,)
        attention = self.attention
        return (attention.in_proj, attention.out_proj, *gate, self.mlp.fc1, self.mlp.fc2)

    @property
    def is_plain(self) -> bool:
        """Whether the operator int8_block computes it, as far as its structure goes."""
        norms = (self.norm_1, self.norm_2)
        is_layer = all(norm.kind == "layer" for norm in norms)
        return self.order == "pre" and is_layer and self.attention.is_plain and self.mlp.is_plain
