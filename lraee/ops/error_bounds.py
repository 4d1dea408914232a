"""How far a kernel may be from the definition, and where it first is further.

Whatever is made of integers and of +, -, *, / and sqrt is compared bit for bit (bound 0). The other
bounds follow from the formats and the number of terms; each says how. Tensors lie on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from lraee.kernels.operands import ProbeHead
from lraee.ops import reference

EPS32 = 2.0**-24
"""Largest relative error of one float32 rounding."""

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding to each type."""


def first_difference(actual: Tensor, expected: Tensor, bound: Tensor | float = 0.0) -> str | None:
    """How many elements are further than bound from expected, and the first; None where none is.

    NaN is expected where expected is NaN, and nowhere else.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        result, wanted = (f"{t.dtype} {list(t.shape)}" for t in (actual, expected))
        return f"{result} instead of {wanted}"
    is_wrong = actual != expected
    if actual.is_floating_point():
        error = (actual.double() - expected.double()).abs()
        is_wrong &= ~(error <= bound) & ~(actual.isnan() & expected.isnan())
    if not is_wrong.any():
        return None
    where = tuple(is_wrong.nonzero()[0].tolist())
    allowed = float(bound[where]) if isinstance(bound, Tensor) and bound.dim() else float(bound)
    text = f"{int(is_wrong.sum())} of {actual.numel()} differ, first at {list(where)}:"
    text += f" {actual[where].item()!r} instead of {expected[where].item()!r}"
    return f"{text}, allowed {allowed:.3g}" if allowed else text


def of_linear(given: dict[str, Any], activation: str) -> Tensor:
    """Largest error of int8_linear with these arguments of the definition.

    Both compute y from the same float32 before the activation. exp, erf and the division of the
    kernel err by less than 16 units in the last place of a value of size max(|y|, 1), the
    definition by no more; layer_scale multiplies it, and the result is rounded to out_dtype.
    """
    if activation == "none":
        return torch.zeros(())
    layer_scale = given["linear"].layer_scale
    linear = given["linear"]._replace(layer_scale=None)
    plain = dict(given, linear=linear, residual=None, out_dtype=torch.float32)
    y = reference.int8_linear(**plain).double().abs()
    scale = 1.0 if layer_scale is None else layer_scale.double().abs()
    error = 32 * EPS32 * (y + 1) * scale
    result = reference.int8_linear(**given, activation=activation).double().abs()
    return error + 2 * HALF_STEP[given["out_dtype"]] * (result + error) + 2.0**-24


def of_attention(qkv: Tensor, expected: Tensor, num_heads: int) -> Tensor:
    """Largest error of int8_attention, per output.

    Scores are the same bits. p = exp(.) / sum: both implementations err by less than 8 units of
    float32 and (L + 8) units through the sum; p may then round to the other neighbour in its type,
    and P @ V adds L terms of size at most max|v| with weights that sum to 1. Where the definition
    is in fixed point an implementation may keep P @ V in float: half a step of each p, and of V.
    """
    B, L, D3 = qkv.shape
    v = qkv.view(B, L, 3, num_heads, -1)[:, :, 2].double().abs().amax(1)
    step = HALF_STEP[qkv.dtype]
    fixed = 0.0
    if L in reference.FIXED_POINT_KEYS:
        fixed = 0.5 * L / reference.LARGEST_WEIGHT + 0.6 / reference.LARGEST_VALUE
    error = (2 * (2 * L + 16) * EPS32 + 2 * step + fixed) * v.reshape(B, 1, D3 // 3)
    return error + 2 * step * expected.double().abs()


def of_float_attention(
    qkv: Tensor, expected: Tensor, num_heads: int, rope: Tensor | None = None
) -> Tensor:
    """Largest error of float_attention against its definition, per output.

    A score is a sum of d products in float32; tensor cores may cut bits off where they align terms,
    2 units for each, and float32 values are cut to 21 bits before. The logit, in units of log2, is
    rounded twice more. An error of e in the logits moves p by 2 e at most. p is rounded to the type
    of V (below float16's smallest normal number by 2^-25), its sum in float32 over L terms, and
    P @ V adds L terms of size at most max|v| with weights that sum to 1. Rotation rounds three
    times in float32: that may move a rotated value to the other neighbour in its type.
    """
    B, L, D3 = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, -1).double().unbind(2)
    d, step = q.shape[-1], HALF_STEP[qkv.dtype]
    is_float32 = qkv.dtype is torch.float32
    product = 3 * 2.0**-21 if is_float32 else 0.0
    size = q.norm(dim=-1).amax(1) * k.norm(dim=-1).amax(1) / d**0.5  # rotation keeps it
    logit = (2 * (d + 2) * EPS32 + product + (0.0 if rope is None else 4 * step)) * size
    underflow = L * 2.0**-25 if qkv.dtype is torch.float16 else 0.0
    relative = 2 * logit + step + product + 4 * (L + 16) * EPS32 + underflow
    error: Tensor = relative[:, :, None] * v.abs().amax(1)
    return error.reshape(B, 1, D3 // 3) + 2 * step * expected.double().abs()


def of_embedding(z: Tensor, head: ProbeHead) -> Tensor | float:
    """Largest error of exit_probe's embedding, 0 where no gelu is before it.

    erf of both errs by some units of float32 of max(|h|, 1), so the scale of the hidden row may
    differ by that much, and a hidden value next to a tie may fall to the other side: with 32 units
    in each of 130 values of step 0.03 two such values in a row are all that can be expected.
    """
    norm, first, second = head[:3]
    if second is None:
        return 0.0
    pooled, _ = reference.pool(z, norm.gamma.shape[0])
    x = reference.layer_norm_quantize(pooled, norm.gamma, norm.beta, norm.eps, False)
    hidden = reference.int8_linear(*x, first, activation="gelu")
    w2, w2_scale, _, b2, _ = second
    flips = 2 * 128 * reference.quantize_rows(hidden, False)[1][:, None] * w2_scale
    size = hidden.abs() @ (w2.float().abs() * w2_scale[:, None]).t()
    bound: Tensor = flips + 64 * EPS32 * (size + (0.0 if b2 is None else b2.abs()))
    return bound.double()


def of_decision(K: int) -> dict[str, float]:
    """Largest error of what exit_probe decides from an embedding, with K classes.

    Logits of one embedding are the same bits (same order of sums). exp errs by 4 units of float32
    here and there and the sum of K of them by K units, relative to a confidence of at most 1; the
    gate of these tests multiplies that by at most 3.5.
    """
    bound = 2 * (K + 16) * EPS32
    return {"top1": 0.0, "confidence": bound, "margin": 2 * bound, "score": 4 * bound}


def decision(embedding: Tensor, variance: Tensor, head: ProbeHead) -> dict[str, Tensor]:
    """What the definition of exit_probe decides from this embedding."""
    classes, logit_scale, gate = head[3:]
    length = reference.lane_sum(embedding * embedding).double().sqrt().float().clamp(min=1e-12)
    cosine = reference.lane_sum(embedding[:, None, :] * classes) / length[:, None]
    confidence, margin, top1 = reference.top_two(cosine * logit_scale)
    weighted = gate[0] * confidence + gate[1] * margin
    score = torch.sigmoid((weighted + gate[2] * variance) + gate[3])
    return {"top1": top1, "confidence": confidence, "margin": margin, "score": score}


def of_float_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Largest error of float_linear on tensor cores, per output.

    Products of float16 or bfloat16 are exact in float32. A float32 is multiplied as three products
    of its two leading parts of 11 bits each; what is left out, low times low and what neither part
    holds, is below 3 * 2^-21 of a product. A tensor core may cut off a sum where the definition
    rounds it: 2^-23 of the sum of magnitudes for each of K additions and of the segments, and
    2^-24 for each of the definition. The sum is then rounded to the type of x.
    """
    K = x.shape[1]
    b = torch.zeros(()).double() if bias is None else bias.double()
    size = x.double().abs() @ w.double().abs().t() + b.abs()
    error = size * (K + 8) * 3 * EPS32
    if x.dtype is torch.float32:
        error += size * 3 * 2.0**-21
    result = (x.double() @ w.double().t() + b).abs()
    return error + 2 * HALF_STEP[x.dtype] * (result + error) + 2.0**-24
