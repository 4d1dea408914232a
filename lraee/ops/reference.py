"""Each operator in plain torch: the definition that every implementation is proven against.

Integers (x_q, x_zero, accumulators) and everything written with +, -, *, / and sqrt alone are
matched bit for bit by the C++ implementations; exp, erf, tanh and the P @ V product are matched
within a derived bound. Rounding is half to even, division is true division, and no product is
fused with a sum.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 64
"""Width of the fixed summation order of `lane_sum`: four AVX-512 registers."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A row whose step would be below the smallest normal float32 counts as a row of zeros."""

MAX_K = 65_793
"""Longest exact int32 sum: 255 * 128 * K < 2**31."""

Quantized = tuple[Tensor, Tensor, Tensor]
Probe = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def lane_sum(v: Tensor) -> Tensor:
    """Sum over the last axis in an order that does not depend on the vector width of the machine.

    Lane j adds v[j], v[j + 64], v[j + 128], … starting at +0.0; then the lanes are folded in half,
    64 -> 32 -> … -> 1, by lane[i] += lane[i + half].

    Args:
      v: float32 [..., D].
    Returns: float32 [...].
    """
    lanes = v.new_zeros((*v.shape[:-1], LANES))
    for start in range(0, v.shape[-1], LANES):
        chunk = v[..., start : start + LANES]
        lanes = lanes + F.pad(chunk, (0, LANES - chunk.shape[-1]))
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def _divide(v: Tensor, divisor: float) -> Tensor:
    """v / divisor, rounded once: of a Python number torch on CUDA multiplies by the reciprocal.

    Source: aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu, "may lose one bit of precision".
    """
    return v / torch.tensor(divisor, dtype=v.dtype, device=v.device)


def _square_root(v: Tensor) -> Tensor:
    """IEEE square root of float32: torch's own is one unit off in 16 % of values (MKL, seen here).

    Through float64, whose rounding cannot reach a tie of float32.
    """
    return torch.sqrt(v.double()).float()


def steady_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of float32 values, each with the same bits wherever it stands in x.

    torch's own computes the last values of a vector by another path, which is one unit off in 3 %
    of them: an image's score would depend on its batch. In float64 the paths are 1e-16 apart, which
    the rounding to float32 hides.
    """
    return torch.sigmoid(x.double()).float()


def quantize_rows(x: Tensor, symmetric: bool) -> Quantized:
    """x ~ (x_q - x_zero) * x_scale with one step and zero point per row.

    symmetric: x_scale = max|x| / 127, x_zero = 0, x_q = clamp(round(x / x_scale), -127, 127).
    asymmetric: lo = min(0, min x), hi = max(0, max x), x_scale = (hi - lo) / 255,
      x_zero = clamp(round(-128 - lo / x_scale), -128, 127),
      x_q = clamp(round(x / x_scale) + x_zero, -128, 127).
    A step below the smallest normal float32 (so also a row of zeros) becomes 1. A row that holds
    NaN or Inf, or whose step overflows, gets x_scale = NaN, x_zero = 0, x_q = 0: all that is
    computed from that row is NaN, and nothing else changes.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      symmetric: see above.
    Returns: x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M].
    """
    x = x.float()
    M, K = x.shape
    if K == 0:
        lo = hi = x.new_zeros(M)
    else:
        lo, hi = x.amin(1).clamp(max=0.0), x.amax(1).clamp(min=0.0)
    x_scale = _divide(torch.maximum(-lo, hi), 127) if symmetric else _divide(hi - lo, 255)
    x_scale = torch.where(x_scale < SMALLEST_SCALE, 1.0, x_scale)
    is_finite = torch.isfinite(x_scale)
    steps = torch.round(x / x_scale[:, None])
    if symmetric:
        x_zero = torch.zeros_like(x_scale)
        x_q = steps.clamp(-127, 127)
    else:
        x_zero = torch.round(-128.0 - lo / x_scale).clamp(-128, 127)
        x_q = (steps + x_zero[:, None]).clamp(-128, 127)
    x_q = torch.where(is_finite[:, None], x_q, 0.0).to(torch.int8).contiguous()
    x_zero = torch.where(is_finite, x_zero, 0.0).to(torch.int32)
    return x_q, torch.where(is_finite, x_scale, math.nan), x_zero


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """LayerNorm of float32 [M, D] in the fixed summation order, two passes."""
    D = x.shape[1]
    centred = x - _divide(lane_sum(x), D)[:, None]
    variance = _divide(lane_sum(centred * centred), D)
    rstd = 1.0 / _square_root(variance + torch.tensor(eps, dtype=torch.float32, device=x.device))
    return (centred * rstd[:, None]) * gamma + beta


def layer_norm_quantize(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, symmetric: bool
) -> Quantized:
    """quantize_rows(LayerNorm(x) * gamma + beta).

    mean = lane_sum(x) / D, var = lane_sum((x - mean)^2) / D, y = ((x - mean) * rstd) * gamma + beta
    with rstd = 1 / sqrt(var + eps), all in float32 and each step rounded.

    Args:
      x: float32, bfloat16 or float16 [M, D].
      gamma: float32 [D].
      beta: float32 [D].
      eps: added to the variance, rounded to float32.
      symmetric: as in quantize_rows.
    Returns: x_q int8 [M, D], x_scale float32 [M], x_zero int32 [M].
    """
    return quantize_rows(_layer_norm(x.float(), gamma, beta, eps), symmetric)


def pack_weight(w_q: Tensor) -> tuple[Tensor, Tensor]:
    """The plain layout: w = w_q itself [N, K], and w_sum[n] = sum_k w_q[n, k].

    Args:
      w_q: int8 [N, K].
    Returns: w int8 [N, K], w_sum int32 [N].
    """
    return w_q.clone(memory_format=torch.contiguous_format), w_q.sum(1, dtype=torch.int32)


def unpack_weight(w: Tensor, N: int, K: int) -> Tensor:
    """The inverse of pack_weight: int8 [N, K] from the plain layout."""
    _require_plain("unpack_weight", w, N, K)
    return w.clone(memory_format=torch.contiguous_format)


def _require_plain(op: str, w: Tensor, N: int, K: int) -> None:
    if w.shape != (N, K):
        raise ValueError(
            f"{op}: w must have the plain layout [N, K] = [{N}, {K}] that the reference reads,"
            f" got {list(w.shape)}; pack it with the implementation that reads it"
        )


def activate(y: Tensor, activation: str) -> Tensor:
    """none: y; gelu: y * Phi(y); gelu_tanh: its tanh form; quick_gelu: y * sigmoid(1.702 y)."""
    if activation == "none":
        return y
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    raise ValueError(
        "int8_linear: activation must be none, gelu, gelu_tanh or quick_gelu, got " + activation
    )


def _integer_product(x_q: Tensor, w_q: Tensor) -> Tensor:
    """x_q @ w_q^T as int32. Exact: float64 holds every partial sum of int8 products up to 2**53."""
    return (x_q.double() @ w_q.double().transpose(-1, -2)).to(torch.int32)


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = act((x_q @ w_q.T - x_zero * w_sum) * x_scale * w_scale + bias) * layer_scale + residual.

    Args:
      x_q: int8 [M, K].
      x_scale: float32 [M], real value of one step of x_q.
      x_zero: int32 [M], the step that stands for 0; None means 0 in every row.
      w: int8 [N, K] (plain layout).
      w_scale: float32 [N], real value of one step of w.
      w_sum: int32 [N], from pack_weight.
      bias: float32 [N] or None.
      residual: out_dtype [M, N] or None.
      layer_scale: float32 [N] or None.
      activation: none, gelu (erf), gelu_tanh or quick_gelu.
      out_dtype: float32, bfloat16 or float16.
    Returns: out_dtype [M, N].
    Accumulates in int32, exact for K <= 65_793. Epilogue in float32, each step rounded.
    """
    M, K = x_q.shape
    N = w_scale.shape[0]
    _require_plain("int8_linear", w, N, K)
    acc = _integer_product(x_q, w) if K else x_q.new_zeros((M, N), dtype=torch.int32)
    if x_zero is not None:
        acc = acc - x_zero[:, None] * w_sum
    y = acc.float() * (x_scale[:, None] * w_scale)
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    if layer_scale is not None:
        y = y * layer_scale
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype)


def float_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ w.T + bias with each output summed in one fixed order, k = 0, 1, 2, …

    The float layers around the blocks (patch embedding, projection) use it: a library's matrix
    product may choose another order for another batch size, and then an image's bits change.

    Args:
      x: float32 [M, K].
      w: float32 [N, K].
      bias: float32 [N] or None; the sum starts there.
    Returns: float32 [M, N]. Implementations may fuse each product with its addition.
    """
    M, N = x.shape[0], w.shape[0]
    y = x.new_zeros((M, N)) if bias is None else bias.expand(M, N)
    y = y.clone(memory_format=torch.contiguous_format)
    for k in range(x.shape[1]):
        y = y + x[:, k : k + 1] * w[:, k]
    return y


def int8_attention(qkv: Tensor, num_heads: int, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V with Q and K in int8, one step per token and head.

    K is first centred on its mean over tokens: that adds the same number to every score of a
    query, which softmax does not see, and it takes the large common part out of K's range
    (SageAttention, arXiv 2410.02367). score_ij = int32 sum; logit = score_ij * ((q_scale_i *
    d^-1/2) * k_scale_j) in float32; P is rounded to the type of qkv; P @ V adds in float32.

    Args:
      qkv: float32, bfloat16 or float16 [B, L, 3 D]: Q, K, V side by side, each head by head.
      num_heads: H, a divisor of D; d = D / H.
      causal: token i sees tokens 0..i only.
    Returns: [B, L, D] in the type of qkv. A NaN or Inf spoils its own image, no other.
    """
    B, L, D3 = qkv.shape
    D = D3 // 3
    d = D // num_heads
    q, k, v = qkv.view(B, L, 3, num_heads, d).permute(2, 0, 3, 1, 4).float()
    total = torch.zeros_like(k[:, :, 0])
    for token in range(L):
        total = total + k[:, :, token]
    k = k - _divide(total, L)[:, :, None]
    q_q, q_scale, _ = quantize_rows(q.reshape(-1, d), True)
    k_q, k_scale, _ = quantize_rows(k.reshape(-1, d), True)
    shape = (B, num_heads, L, d)
    score = _integer_product(q_q.view(shape), k_q.view(shape))
    root = torch.tensor(1.0 / math.sqrt(d), dtype=torch.float32, device=qkv.device)
    steps = (q_scale * root).view(B, num_heads, L, 1) * k_scale.view(B, num_heads, 1, L)
    logit = score.float() * steps
    if causal:
        hidden = torch.ones(L, L, dtype=torch.bool, device=qkv.device).triu(1)
        logit = logit.masked_fill(hidden, -math.inf)
    p = torch.softmax(logit, dim=-1).to(qkv.dtype)
    y = p.float() @ v
    return y.transpose(1, 2).reshape(B, L, D).to(qkv.dtype)  # type: ignore[no-any-return]


def _pool_patches(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the patch tokens [B, D] and spatial variance [B], from one reading of z.

    Sums are taken of differences to the first patch token, so that no large squares cancel.
    """
    patches = z.float()[:, 1:]
    N = patches.shape[1]
    shift = patches[:, 0]
    s1, s2 = torch.zeros_like(shift), torch.zeros_like(shift)
    for token in range(N):
        difference = patches[:, token] - shift
        s1 = s1 + difference
        s2 = s2 + difference * difference
    per_channel = _divide(s2 - _divide(s1 * s1, N), N).clamp(min=0.0)
    return shift + _divide(s1, N), lane_sum(per_channel)


def _pool(z: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """What a head sees of z, float32 [B, P], and the spatial variance of its patches [B].

    P = D: the mean over the patch tokens. P = 2 D: behind it the class token.
    """
    mean, variance = _pool_patches(z)
    return (mean if z.shape[2] == P else torch.cat([mean, z[:, 0].float()], 1)), variance


def exit_probe(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    w1: Tensor,
    w1_scale: Tensor,
    w1_sum: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    w2_scale: Tensor | None,
    w2_sum: Tensor | None,
    b2: Tensor | None,
    classes: Tensor,
    logit_scale: float,
    gate: Tensor,
) -> Probe:
    """Exit head and gate of one depth: embedding, its best class, and the score of leaving here.

    mean, variance = pool of the patch tokens z[:, 1:]
    h = LayerNorm(mean), or LayerNorm(concat(mean, z[:, 0])), one row of 2 D, for gamma of 2 D
    embedding = int8 head of h: W2 gelu(W1 h + b1) + b2, or W1 h + b1 where w2 is None
    p = softmax(logit_scale * cosine(embedding, classes));  c = p_(1), m = p_(1) - p_(2)
    score = sigmoid(g0 c + g1 m + g2 variance + g3)

    Args:
      z: float32, bfloat16 or float16 [B, L, D], class token first, L >= 2.
      gamma, beta: float32 [P], with eps the LayerNorm of the head. P = D: it sees the patch mean
        alone; P = 2 D: the class token beside it.
      w1, w1_scale, w1_sum: packed int8 weight [H, P] ([E, P] where w2 is None); b1 float32 or None.
      w2, w2_scale, w2_sum: packed int8 weight [E, H], or all None; b2 float32 [E] or None.
      classes: float32, bfloat16 or float16 [K, E], K >= 1: rows of length 1, or those less one
        vector common to all, which changes no output.
      logit_scale: factor of the cosine, already exponentiated.
      gate: float32 [4].
    Returns: embedding float32 [B, E] (not normalised), top1 int64 [B] (the lowest index of a tie),
      confidence c, margin m (= c where K = 1), variance, score: float32 [B].
    Source: arXiv 2605.26415 (SSA head, confidence, margin, spatial activation variance, gate).
    """
    pooled, variance = _pool(z, gamma.shape[0])
    x_q, x_scale, x_zero = layer_norm_quantize(pooled, gamma, beta, eps, False)
    hidden = int8_linear(
        x_q, x_scale, x_zero, w1, w1_scale, w1_sum, b1,
        activation="none" if w2 is None else "gelu",
    )  # fmt: skip
    if w2 is None:
        embedding = hidden
    else:
        assert w2_scale is not None and w2_sum is not None
        embedding = int8_linear(*quantize_rows(hidden, False), w2, w2_scale, w2_sum, b2)
    length = _square_root(lane_sum(embedding * embedding)).clamp(min=1e-12)
    cosine = lane_sum(embedding[:, None, :] * classes.float()) / length[:, None]
    logits = cosine * torch.tensor(logit_scale, dtype=torch.float32, device=z.device)
    confidence, margin, top1 = _top_two(logits)
    g0, g1, g2, g3 = gate.unbind()
    score = steady_sigmoid(((g0 * confidence + g1 * margin) + g2 * variance) + g3)
    return embedding, top1, confidence, margin, variance, score


def _top_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest probability, its distance to the second, and its class (0 in a row with NaN)."""
    best = logits.amax(1)
    confidence = 1.0 / torch.exp(logits - best[:, None]).sum(1)
    is_best = logits == best[:, None]
    top1 = is_best.to(torch.uint8).argmax(1)
    if logits.shape[1] == 1:
        return confidence, confidence, top1
    second = logits.scatter(1, top1[:, None], -math.inf).amax(1)
    return confidence, confidence * (1.0 - torch.exp(second - best)), top1
