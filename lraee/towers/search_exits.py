"""Exits after which the class token runs on alone: which towers have them, and their blocks."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from lraee.exits.class_token import ClassTokenHead
from lraee.exits.router import Router
from lraee.layers.int8_block import Int8Block
from lraee.ops.reference import Probe
from lraee.towers.calls import embedding_size
from lraee.towers.families import blocks_of, tower_spec


def require_class_token(tower: nn.Module) -> None:
    """Raises NotImplementedError unless the embedding is the class token's and all blocks are norm
    first.
    """
    spec = tower_spec(tower)
    if spec.pooling.kind != "class":
        raise NotImplementedError(
            "exits: tower must embed its class token alone for exits for search, got pooling"
            f" {spec.pooling.kind!r}; calibrate for classes"
        )
    blocks = [block for block in blocks_of(tower) if isinstance(block, Int8Block)]
    if any(block.block_spec.order != "pre" or not block.can_fuse for block in blocks):
        raise NotImplementedError(
            "exits: blocks must be norm first, with one scale per token, for exits for search; take"
            " the scheme int8"
        )


def fits(tower: nn.Module, block: int, head: nn.Module) -> bool:
    """Whether this is such an exit, and fits the tower; False for any other head.

    Raises: NotImplementedError on the tower, ValueError on projections that are not its own.
    """
    if not isinstance(head, ClassTokenHead):
        return False
    require_class_token(tower)
    w, D = head.weights.w, tower_spec(tower).width
    expected = [len(blocks_of(tower)) - block - 1, 2 * D, D]
    if list(w.shape) != expected or head.weights.embedding_size != embedding_size(tower):
        raise ValueError(
            f"accelerate: exits must have keys and values {expected} after block {block}, got"
            f" {list(w.shape)}"
        )
    return True


def attach(tower: nn.Module, router: Router) -> None:
    """Gives each such exit of the router the blocks of its accelerated tower."""
    spec, blocks = tower_spec(tower), blocks_of(tower)
    for block, head in zip(router.blocks, router.heads, strict=True):
        if isinstance(head, ClassTokenHead):
            after: Sequence[nn.Module] = list(blocks)[block:]
            head.attach(after, tokens=spec.tokens, macs_after=spec.macs_after_blocks)


def probe(tower: Any, router: Router, e: int, z: Tensor) -> Probe:
    """What exit e of the router measures on tokens [B, L, D] of its tower."""
    head = router.heads[e]
    if isinstance(head, ClassTokenHead):
        return run(tower, head, z, router.blocks[e])
    return router.probe(e, z)


def run(tower: Any, head: ClassTokenHead, z: Tensor, depth: int) -> Probe:
    """Tokens [B, L, D] after `depth` blocks of an accelerated tower -> what the exit gives."""
    return cast(Probe, head(z, tower._block_list()[depth:], tower._rope(), tower._finish))
