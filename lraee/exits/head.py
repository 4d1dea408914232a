"""The exit head: from the tokens after a block to an embedding in the space of the full tower."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lraee.kernels.operands import Norm, ProbeHead
from lraee.layers.int8_linear import Int8Linear, uncast
from lraee.layers.scheme import INT8, quantize_weight
from lraee.ops.backend import Backend, operators
from lraee.ops.reference import Probe

EPS = 1e-5
"""Added to the variance of a head's LayerNorm."""


@dataclass(frozen=True)
class HeadWeights:
    """embedding = W2 gelu(W1 x + b1) + b2, or W1 x + b1; x = LayerNorm(pooled) * gamma + beta.

    `pooled` is the mean over the patch tokens [D], or that beside the class token [2 D].

    Args:
      gamma, beta: float32 [P], P = D or 2 D.
      w1, b1: float32 [H, P] and [H]; [E, P] and [E] where w2 is None.
      w2, b2: float32 [E, H] and [E], or None.
    """

    gamma: Tensor
    beta: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor | None = None
    b2: Tensor | None = None

    @property
    def embedding_size(self) -> int:
        """E."""
        return (self.w1 if self.w2 is None else self.w2).shape[0]

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.w1.numel() + (0 if self.w2 is None else self.w2.numel())

    def __call__(self, pooled: Tensor) -> Tensor:
        """The head in float: pooled [B, P] -> embedding [B, E], not normalised."""
        x = F.layer_norm(pooled, self.gamma.shape, self.gamma, self.beta, EPS)
        y = F.linear(x, self.w1, self.b1)
        return y if self.w2 is None else F.linear(F.gelu(y), self.w2, self.b2)

    def folded(self) -> "HeadWeights":
        """The same head with gamma and beta inside W1 and b1.

        W1 (gamma * x + beta) + b1 = (W1 * gamma) x + (W1 beta + b1): the gradients of gamma and
        beta then come from those of W1 and b1, without a product by W1 of their own.
        """
        return replace(
            self,
            gamma=torch.ones_like(self.gamma),
            beta=torch.zeros_like(self.beta),
            w1=self.w1 * self.gamma,
            b1=torch.addmv(self.b1, self.w1, self.beta),
        )

    def scaled(self, factor: float) -> "HeadWeights":
        """The head whose embedding is `factor` times as long."""
        if self.w2 is None or self.b2 is None:
            return replace(self, w1=self.w1 * factor, b1=self.b1 * factor)
        return replace(self, w2=self.w2 * factor, b2=self.b2 * factor)

    def tensors(self) -> dict[str, Tensor]:
        """Its arrays by name; those that are None are left out."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "HeadWeights":
        """The inverse of `tensors`."""
        return cls(**tensors)


def pool(z: Tensor, *, has_class_token: bool) -> Tensor:
    """The input of a head from the tokens z [B, L, D], class token first: float32 [B, P].

    The mean over the patch tokens, and behind it the class token where `has_class_token`.
    """
    z = z.float()
    mean = z[:, 1:].mean(1)
    return torch.cat([mean, z[:, 0]], dim=1) if has_class_token else mean


def probe_tokens(z: Tensor, prefix_tokens: int) -> Tensor:
    """The tokens that `pool` and exit_probe read: one, then the patches.

    The one is the class token, and register tokens go; without prefix tokens it is the first patch
    again, which heads of the patch mean alone do not see.

    Args:
      z: [B, L, D], prefix tokens first.
      prefix_tokens: 0, 1 or more, the class token the first of them.
    """
    return z if prefix_tokens == 1 else torch.cat([z[:, :1], z[:, prefix_tokens:]], dim=1)


class TypedBuffers(nn.Module):
    """A module whose own buffers follow `.to(device)` but keep their type under `.half()`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """See the class."""
        for child in self.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else uncast(fn, buffer)
        return self


class Int8Head(TypedBuffers):
    """One exit's head and gate, run by the operator exit_probe.

    Args:
      weights: float; quantized here, one scale per output channel.
      gate: float32 [4], factors of confidence, margin and variance, and a constant.
      backend: which implementation of exit_probe to run on.
    """

    gamma: Tensor
    beta: Tensor
    gate: Tensor

    def __init__(self, weights: HeadWeights, gate: Tensor, *, backend: Backend = "auto") -> None:
        """See the class."""
        super().__init__()
        self.backend: Backend = backend
        self.register_buffer("gamma", weights.gamma.float().clone())
        self.register_buffer("beta", weights.beta.float().clone())
        self.register_buffer("gate", gate.float().clone())
        self.first = _int8(weights.w1, weights.b1, backend)
        self.second = None if weights.w2 is None else _int8(weights.w2, weights.b2, backend)

    @property
    def embedding_size(self) -> int:
        """E."""
        return (self.first if self.second is None else self.second).out_features

    @property
    def macs(self) -> int:
        """Multiply-adds of one image, the classes left out."""
        layers = (self.first,) if self.second is None else (self.first, self.second)
        return sum(layer.in_features * layer.out_features for layer in layers)

    def forward(self, z: Tensor, classes: Tensor, logit_scale: float) -> Probe:
        """Tokens [B, L, D] -> embedding, top1, confidence, margin, variance, score.

        Args:
          classes: what `contrasts` makes of class embeddings.
        """
        second, held = self.second, cast(dict[str, Tensor], self._buffers)
        head = ProbeHead(
            Norm(held["gamma"], held["beta"], EPS), self.first.packed,
            None if second is None else second.packed, classes, logit_scale, held["gate"],
        )  # fmt: skip
        return cast(Probe, operators(self.backend).exit_probe(z, head))


def contrasts(classes: Tensor) -> Tensor:
    """The differences of classes: the unit rows float32 [K, E] less their mean, in float16.

    All logits lose the same number, which top-1, confidence and margin do not see, and with it go
    the few channels in which all texts of a CLIP are large. So half the bytes, of which a probe
    reads more than of its head, cost a logit logit_scale * 2^-11 * |class - mean| at most.
    """
    return (classes - classes.mean(0)).half()


def _int8(w: Tensor, b: Tensor | None, backend: Backend) -> Int8Linear:
    w_q, w_scale = quantize_weight(w, INT8, backend)
    return Int8Linear(w_q, w_scale, b, backend=backend)
