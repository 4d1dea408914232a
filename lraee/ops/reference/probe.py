"""Definition of exit_probe."""

import math

import torch
from torch import Tensor

from lraee.kernels.operands import ProbeHead
from lraee.ops.reference.linear import int8_linear
from lraee.ops.reference.rows import (
    divide,
    lane_sum,
    layer_norm_quantize,
    quantize_rows,
    square_root,
    steady_sigmoid,
)

Probe = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    per_channel = divide(s2 - divide(s1 * s1, N), N).clamp(min=0.0)
    return shift + divide(s1, N), lane_sum(per_channel)


def pool(z: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """What a head sees of z, float32 [B, P], and the spatial variance of its patches [B].

    P = D: the mean over the patch tokens. P = 2 D: behind it the class token.
    """
    mean, variance = _pool_patches(z)
    return (mean if z.shape[2] == P else torch.cat([mean, z[:, 0].float()], 1)), variance


def exit_probe(z: Tensor, head: ProbeHead) -> Probe:
    """Exit head and gate of one depth: embedding, its best class, and the score of leaving here.

    mean, variance = pool of the patch tokens z[:, 1:]
    h = LayerNorm(mean), or LayerNorm(concat(mean, z[:, 0])), one row of 2 D, for gamma of 2 D
    embedding = int8 head of h: W2 gelu(W1 h + b1) + b2, or W1 h + b1 where there is no second
    p = softmax(logit_scale * cosine(embedding, classes));  c = p_(1), m = p_(1) - p_(2)
    score = sigmoid(g0 c + g1 m + g2 variance + g3)

    Args:
      z: float32, bfloat16 or float16 [B, L, D], class token first, L >= 2.
      head: see ProbeHead; weights in the plain layout.
    Returns: embedding float32 [B, E] (not normalised), top1 int64 [B] (the lowest index of a tie),
      confidence c, margin m (= c where K = 1), variance, score: float32 [B].
    Source: arXiv 2605.26415 (SSA head, confidence, margin, spatial activation variance, gate).
    """
    norm, first, second, classes, logit_scale, gate = head
    pooled, variance = pool(z, norm.gamma.shape[0])
    quantized = layer_norm_quantize(pooled, norm.gamma, norm.beta, norm.eps, False)
    embedding = int8_linear(*quantized, first, activation="none" if second is None else "gelu")
    if second is not None:
        embedding = int8_linear(*quantize_rows(embedding, False), second)
    length = square_root(lane_sum(embedding * embedding)).clamp(min=1e-12)
    cosine = lane_sum(embedding[:, None, :] * classes.float()) / length[:, None]
    logits = cosine * torch.tensor(logit_scale, dtype=torch.float32, device=z.device)
    confidence, margin, top1 = top_two(logits)
    g0, g1, g2, g3 = gate.unbind()
    score = steady_sigmoid(((g0 * confidence + g1 * margin) + g2 * variance) + g3)
    return embedding, top1, confidence, margin, variance, score


def top_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest probability, its distance to the second, and its class (0 in a row with NaN)."""
    best = logits.amax(1)
    confidence = 1.0 / torch.exp(logits - best[:, None]).sum(1)
    is_best = logits == best[:, None]
    top1 = is_best.to(torch.uint8).argmax(1)
    if logits.shape[1] == 1:
        return confidence, confidence, top1
    second = logits.scatter(1, top1[:, None], -math.inf).amax(1)
    return confidence, confidence * (1.0 - torch.exp(second - best)), top1
