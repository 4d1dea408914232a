"""A baseline like AdaViT: each image picks, block by block, which parts and patches to run.

Source of the idea: Meng et al., arXiv 2111.15668. As there, a light policy before each block
decides, trained through a Gumbel-Softmax towards a share of the FLOPs; other than there, the tower
is frozen, as the paper that we reproduce compares, and attention is skipped whole, not by heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from lraee.calibration.head_training import centred
from lraee.layers.scheme import INT8
from lraee.layers.spec import BlockSpec, tensor_at
from lraee.towers.class_token import finish_class_token, require_class_token
from lraee.towers.families import (
    block_specs,
    blocks_of,
    embed_tokens,
    encode_image,
    find_tower,
    require_supported,
    tower_spec,
)
from lraee.towers.flops import PartFlops

_BATCH = 32
_LEARNING_RATE = 1e-2
_USAGE_WEIGHT = 20.0
_START_PARTS, _START_PATCHES = 3.0, 5.0
"""Logits before training: 12 blocks keep nearly everything even under noise."""

Amount = TypeVar("Amount", int, Tensor)
Decide = Callable[[Tensor], Tensor]
"""Logits to 1 or 0, of the same shape."""


class BlockPolicy(nn.Module):
    """What one block runs of an image: logits of attention and MLP, and of each patch.

    Linear functions of tokens after a LayerNorm without weights, which the linears fold in. They
    start at a constant.
    """

    def __init__(self, D: int) -> None:
        """For tokens of width D."""
        super().__init__()
        self.parts, self.patches = nn.Linear(D, 2), nn.Linear(D, 1)
        for linear, start in ((self.parts, _START_PARTS), (self.patches, _START_PATCHES)):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, start)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D], class token first -> [B, 2], [B, L - 1]; above 0 is to be run."""
        z = F.layer_norm(z.float(), z.shape[-1:])
        return self.parts(z[:, 0]), self.patches(z[:, 1:])[..., 0]


class Policy(nn.Module):
    """One BlockPolicy per block.

    Args:
      depth: blocks.
      D: their width.
    """

    def __init__(self, depth: int, D: int) -> None:
        """See the class."""
        super().__init__()
        self.blocks = nn.ModuleList(BlockPolicy(D) for _ in range(depth))
        self.losses: list[float] = []


@dataclass(frozen=True)
class _Costs:
    """FLOPs of a tower by what is run of it, policy included; see flops for what is counted."""

    around: int
    total: int
    D: int
    mlps: tuple[int, ...]

    @classmethod
    def of(cls, tower: nn.Module) -> "_Costs":
        """From flops.PartFlops; QKV and out are 4 D^2 of what each token is multiplied with."""
        parts = PartFlops.of(tower)
        spec = tower_spec(tower)
        L, D = spec.tokens, spec.width
        per_token = [(flops // 2 - 2 * L * L * D) // L for flops in parts.blocks]
        mlps = tuple(weights - 4 * D * D for weights in per_token)
        return cls(parts.embed + parts.finish, parts.total, D, mlps)

    def block(self, place: int, before: Amount, n: Amount, attends: Amount, mlps: Amount) -> Amount:
        """Of one block: its policy on the tokens before, then what it lets run on the n left."""
        policy = (before + 1) * self.D
        attention = attends * (n * 4 * self.D * self.D + n * n * 2 * self.D)
        return (policy + attention + mlps * n * self.mlps[place]) * 2


def train_policy(
    model: nn.Module,
    images: Tensor,
    *,
    classes: Tensor,
    keep: float,
    steps: int,
    seed: int,
    progress: bool,
) -> Policy:
    """A policy for a share of the FLOPs; the tower stays as it is, and no labels are used.

    loss = 1 - cos(y, teacher) + KL(p(teacher) | p(y)) + 20 (usage - keep)^2, the mean over 32
    images a step, where p is the distribution over classes. Decisions are hard, their gradient
    that of a sigmoid; the logistic noise on the logits (Gumbel-Softmax of two) fades to 0 over the
    steps, so that the last ones train what run_policy does.

    Args:
      model: a float CLIP model, frozen here, whose image embedding is its class token.
      images: [n, 3, H, W], n >= 1, at least as large as the tower takes; centre crops are used.
      classes: unit rows float [K, E].
      keep: share of the tower's FLOPs to use, in (0, 1].
      steps: of Adam.
      seed: of the order of images and the noise.
      progress: show a bar.
    Returns: the policy; `losses` has the loss of each step.
    Raises: ValueError on keep and images, NotImplementedError on another tower.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"train_policy: keep must be in (0, 1], got {keep}")
    if images.dim() != 4 or not len(images):
        raise ValueError(
            f"train_policy: images must be [n, 3, H, W], n >= 1, got {list(images.shape)}"
        )
    tower = _supported(model)
    require_supported(tower, INT8)
    costs, source = _Costs.of(tower), torch.Generator().manual_seed(seed)
    policy = Policy(len(blocks_of(tower)), costs.D)
    weights = list(policy.parameters())
    optimizer = torch.optim.Adam(weights, lr=_LEARNING_RATE)
    distance = _Distance(classes, float(model.get_parameter("logit_scale").detach().exp()))
    for step in trange(steps, desc="policy", disable=not progress, leave=False):
        picked = torch.randint(len(images), (min(_BATCH, len(images)),), generator=source)
        decide = _Noisy(source, 1.0 - step / steps)
        x = centred(images[picked], tower_spec(tower).image_size)
        with torch.no_grad():
            z = embed_tokens(tower, x)
            teacher = encode_image(model, x)
        y, flops = _masked(tower, policy, z, decide, costs)
        usage = flops.mean() / costs.total
        loss = distance(y, teacher) + _USAGE_WEIGHT * (usage - keep) ** 2
        optimizer.zero_grad()
        loss.backward(inputs=weights)  # type: ignore[no-untyped-call]
        optimizer.step()
        policy.losses.append(float(loss.detach()))
    return policy


@torch.inference_mode()
def run_policy(model: nn.Module, policy: Policy, images: Tensor) -> tuple[Tensor, float]:
    """Embeddings float32 [n, E] and the mean share of FLOPs saved, as each image alone is run.

    Attention and MLPs that an image skips are not run and its dropped patches are absent from then
    on, so each image goes through the tower by itself: its embedding does not depend on the
    others. The policy is charged; where it skips nothing, the share is a little below 0. A scheme
    with one scale per batch has one per image here.

    Args:
      model: the CLIP model of the policy, float or from lraee.accelerate; exits are not used.
      policy: from train_policy.
      images: [n, 3, H, W], n >= 1, at least as large as the tower takes.
    Raises: ValueError on images or a policy of another tower, NotImplementedError on a tower.
    """
    tower = _supported(model)
    if not len(images):
        raise ValueError("run_policy: images must be one at least, got none")
    if len(policy.blocks) != len(blocks_of(tower)):
        raise ValueError(
            f"run_policy: policy must be for {len(blocks_of(tower))} blocks,"
            f" got {len(policy.blocks)}"
        )
    costs, size = _Costs.of(tower), tower_spec(tower).image_size
    rows, saved = [], 0.0
    for image in images:
        y, flops = _run_alone(tower, policy, centred(image[None], size), costs)
        rows.append(y.float())
        saved += 1.0 - flops / costs.total
    return torch.cat(rows), saved / len(images)


def _run_alone(
    tower: nn.Module, policy: Policy, image: Tensor, costs: _Costs
) -> tuple[Tensor, int]:
    """Embedding [1, E] of an image [1, 3, H, W] and the FLOPs it took."""
    z, flops = embed_tokens(tower, image), costs.around
    for place, (block, spec) in enumerate(_blocks(tower)):
        parts, patches = policy.blocks[place](z)
        before = z.shape[1]
        z = z[:, F.pad(patches[0] > 0, (1, 0), value=True)]
        attends, mlps = (bool(part) for part in parts[0] > 0)
        flops += costs.block(place, before, z.shape[1], int(attends), int(mlps))
        if attends:
            z = z + _attention(block, spec, z)
        if mlps:
            z = z + _mlp(block, spec, z)
    return _finish(tower, z), flops


def _masked(
    tower: nn.Module, policy: Policy, z: Tensor, decide: Decide, costs: _Costs
) -> tuple[Tensor, Tensor]:
    """The same for tokens [B, L, D], all computed and multiplied by the decisions: with gradients.

    Returns: embeddings [B, E] and FLOPs [B].
    """
    there = z.new_ones(z.shape[:2])
    flops = z.new_full(z.shape[:1], float(costs.around))
    for place, (block, spec) in enumerate(_blocks(tower)):
        parts, patches = policy.blocks[place](z)
        before = there.sum(1)
        there = there * F.pad(decide(patches), (1, 0), value=1.0)
        attends, mlps = decide(parts).unbind(1)
        flops = flops + costs.block(place, before, there.sum(1), attends, mlps)
        z = z + attends[:, None, None] * _masked_attention(block, spec, z, there)
        z = z + mlps[:, None, None] * _mlp(block, spec, z)
    return _finish(tower, z), flops


class _Noisy:
    """Hard decisions with the gradient of a sigmoid, under logistic noise times `noise`."""

    def __init__(self, source: torch.Generator, noise: float) -> None:
        self._source, self._noise = source, noise

    def __call__(self, logits: Tensor) -> Tensor:
        u = torch.rand(logits.shape, generator=self._source).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid(logits + self._noise * u.logit())
        return (soft > 0.5).float() + soft - soft.detach()


class _Distance:
    """1 - cosine + KL divergence of the classes, from teacher [B, E] to y [B, E]: the mean."""

    def __init__(self, classes: Tensor, logit_scale: float) -> None:
        self._classes, self._scale = classes.float(), logit_scale

    def __call__(self, y: Tensor, teacher: Tensor) -> Tensor:
        y, teacher = F.normalize(y.float(), dim=1), F.normalize(teacher.float(), dim=1)
        log_p, log_t = (
            F.log_softmax(self._scale * each @ self._classes.T, dim=1) for each in (y, teacher)
        )
        divergence = F.kl_div(log_p, log_t, log_target=True, reduction="batchmean")
        return (1 - (y * teacher).sum(1)).mean() + divergence


# Parts of the tower


def _supported(model: nn.Module) -> nn.Module:
    """The tower; raises NotImplementedError unless its class token alone gives the embedding."""
    tower = find_tower(model)
    require_class_token(tower, "adaptive")
    if not all(spec.is_plain for _, spec in _blocks(tower)):
        raise NotImplementedError(
            "adaptive: blocks must be norm, attention, norm, MLP without rotary positions and"
            f" gates, got those of {type(tower).__name__}"
        )
    return tower


def _blocks(tower: nn.Module) -> list[tuple[nn.Module, BlockSpec]]:
    return list(zip(blocks_of(tower), block_specs(tower), strict=True))


def _finish(tower: nn.Module, z: Tensor) -> Tensor:
    """Embeddings [B, E] of tokens [B, L, D] after the last block."""
    return finish_class_token(tower, tower_spec(tower), z[:, 0])


def _attention(block: nn.Module, spec: BlockSpec, z: Tensor) -> Tensor:
    """What a block's attention adds to tokens [B, L, D]."""
    attention = block.get_submodule(spec.attention.path)
    y = spec.call.by_image(block.get_submodule(spec.norm_1.path)(z))
    y = attention(y, y, y, need_weights=False) if spec.attention.call is None else attention(y)
    y = spec.call.by_image(y[0] if isinstance(y, tuple) else y)
    return _scaled(block, spec.scale_1, y)


def _masked_attention(block: nn.Module, spec: BlockSpec, z: Tensor, there: Tensor) -> Tensor:
    """The same of a float block, from the tokens that are there; differentiable in `there`.

    A weight is exp(s_j) there_j / sum_k exp(s_k) there_k, as in DynamicViT (arXiv 2106.02034).
    """
    attention = spec.attention
    y = block.get_submodule(spec.norm_1.path)(z)
    B, L, _ = y.shape
    qkv = F.linear(y, attention.in_proj.weight(block), attention.in_proj.bias(block))
    heads = qkv.view(B, L, 3, attention.num_heads, attention.head_dim)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    s = q @ k.transpose(-1, -2) * attention.head_dim**-0.5
    is_there = there[:, None, None, :]
    peak = s.detach().masked_fill(is_there == 0, -torch.inf).amax(-1, keepdim=True)
    weights = (s - peak).clamp(max=0.0).exp() * is_there
    y = (weights / weights.sum(-1, keepdim=True)) @ v
    y = y.transpose(1, 2).reshape(B, L, -1)
    y = F.linear(y, attention.out_proj.weight(block), attention.out_proj.bias(block))
    return _scaled(block, spec.scale_1, y)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "none": lambda x: x,
}


def _mlp(block: nn.Module, spec: BlockSpec, z: Tensor) -> Tensor:
    """What a block's MLP adds to tokens [B, L, D]."""
    mlp = spec.mlp
    y = block.get_submodule(mlp.fc1.path)(block.get_submodule(spec.norm_2.path)(z))
    y = block.get_submodule(mlp.fc2.path)(_ACTIVATIONS[mlp.activation](y))
    return _scaled(block, spec.scale_2, y)


def _scaled(block: nn.Module, name: str | None, y: Tensor) -> Tensor:
    return y if name is None else y * tensor_at(block, name)
