"""The image tower around its blocks: fixed sums in its float layers, and early exits."""

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from lraee.exits.head import Int8Head
from lraee.exits.record import is_switched_off
from lraee.exits.router import Router
from lraee.layers.batch_invariant import RowwiseAttention, RowwiseConv2d, rowwise_linear
from lraee.layers.int8_block import Int8Block, is_hooked
from lraee.ops.backend import Backend, implementation
from lraee.ops.reference import Probe
from lraee.towers import cuda_graphs as graphs
from lraee.towers.executor import EagerExecutor, Executor, GraphExecutor
from lraee.towers.open_clip import blocks_of
from lraee.towers.segments import Segments, TowerParts

F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """Keeps torch.compile out: where images exit depends on their numbers."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class RowwiseTower(VisionTransformer):  # type: ignore[misc]
    """open_clip's VisionTransformer whose last projection has the same bits in any batch.

    With a submodule `exits` each image may exit between two blocks (see attach_exits).
    """

    rowwise_backend: Backend
    segments: Segments
    cuda_graphs: bool = True
    """Whether calls on a GPU that ask for no more than numbers are CUDA graphs (lraee.graphs)."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> pooled [B, E], or (pooled, tokens) with `output_tokens`."""
        router = exits_of(self)
        if router is not None and is_switched_off(router):
            router.note_full_depth(x.shape[0], len(blocks_of(self)))
            router = None
        if router is not None:
            require_no_tokens(self)
        if self._is_for_graphs(x):
            with graphs.of(self, x.device) as held:
                scale = None if router is None else router.logit_scale
                return self._run(router, x, GraphExecutor(self, held, scale))
        if self.output_tokens:
            pooled, tokens = self._pool(self.transformer(self.embed(x)))
            return self._project(pooled), tokens
        executor = EagerExecutor(self)
        parts = [self._run(router, part, executor) for part in _parts(self, x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, router: Router | None, x: Tensor, executor: Executor) -> Tensor:
        """Images -> embeddings, with the exits of this router or at full depth."""
        if router is not None:
            return route(self, self.segments, router, x, executor)
        (y,) = executor.run(self.segments.whole, x)
        return y.clone() if executor.is_static else y

    # Parts of segments

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
        return cast(Tensor, self._embeds(images))

    def run_blocks(self, z: Tensor, first: int, last: int) -> Tensor:
        """Tokens [B, L, D] after blocks first to last - 1, whichever order the transformer runs
        them in; after the last block the class token alone, [B, 1, D], where it is enough.
        """
        blocks = list(blocks_of(self))
        alone = _last_for_class_token(self) if last == len(blocks) else None
        if alone is None and last - first == len(blocks):
            return cast(Tensor, self.transformer(z))
        is_batch_first = self.transformer.batch_first
        z = z if is_batch_first else z.transpose(0, 1).contiguous()
        for block in blocks[first : last if alone is None else last - 1]:
            z = block(z)
        z = z if is_batch_first else z.transpose(0, 1)
        return z if alone is None else alone.first_token(z)

    def probe(self, e: int, z: Tensor) -> Probe:
        """What exit e measures on tokens [B, L, D]."""
        return cast(Router, exits_of(self)).probe(e, z)

    def finish(self, z: Tensor) -> Tensor:
        """What follows the last block, where other tokens are not asked for: [B, E]."""
        if _embeds_class_token(self):
            return self._project(self.ln_post(z[:, 0]))  # one token in fifty, the same bits
        return self._project(self._pool(z)[0])

    def may_overwrite(self, last: int) -> bool:
        """Whether the tokens after block last - 1 are held by no hook."""
        block = blocks_of(self)[last - 1]
        return bool(self.transformer.batch_first) and not block._forward_hooks

    def _is_for_graphs(self, x: Tensor) -> bool:
        """Whether graphs may be made of this call; a tower that was refused runs without them."""
        return (
            not torch.compiler.is_compiling()
            and x.is_cuda
            and self.cuda_graphs
            and not self.output_tokens
            and implementation(self.rowwise_backend, x.device) == "triton"
            and graphs.is_plain_call(x)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowwiseTower":
        """Moved or cast, its numbers lie elsewhere: graphs of where they were are let go."""
        graphs.drop(self)
        return cast(RowwiseTower, super()._apply(fn, recurse))

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> dict[str, Any]:
        """As open_clip's; `image_features` are those of forward."""
        unprojected = copy.copy(self)  # shares all modules; only its own proj is absent
        unprojected._parameters = {**self._parameters, "proj": None}
        output = VisionTransformer.forward_intermediates(unprojected, x, *args, **options)
        features = output.get("image_features")
        return output if features is None else {**output, "image_features": self._project(features)}

    def _project(self, pooled: Tensor) -> Tensor:
        w = None if self.proj is None else self.proj.t()
        return pooled if w is None else rowwise_linear(pooled, w, None, self.rowwise_backend)


_BYTES_PER_THREAD = 3 * 2**20
"""Bytes of tokens that each thread of a CPU takes through all blocks at once.

What is beyond the cache that threads share, the weights of a block among it, goes to memory after
every block and comes back. ViT-L/14 at batch 32 (34 MB of tokens) in parts of 16, 8, 4 and 2
images: 6,970, 6,860, 6,785 and 6,928 ms; ViT-B/16 at 32 and ViT-B/32 at 128 are within 1 % at 3,
4.5 and 9 MB a thread (Zen 4, two threads, 32 MB of L3).
"""


def _parts(tower: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The images, or parts of a batch too large for the caches of a CPU: the same bits.

    Parts are even, and whole rounds of images for all threads. A batch stays whole where a hook
    would see several calls instead of one, and where a step is the batch's.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (x,)
    threads = torch.get_num_threads()
    if len(x) <= threads:
        return (x,)
    bytes_of_one = cast(Tensor, tower.positional_embedding).numel() * x.element_size()
    most = threads * max(1, _BYTES_PER_THREAD // bytes_of_one)
    if len(x) <= most or any(is_hooked(m) for m in tower.modules() if m is not tower):
        return (x,)
    is_by_row = all(isinstance(b, Int8Block) and b.can_fuse for b in blocks_of(tower))
    rounds = math.ceil(len(x) / math.ceil(len(x) / most) / threads)
    return torch.split(x, rounds * threads) if is_by_row else (x,)


def _embeds_class_token(tower: nn.Module) -> bool:
    """Whether nothing but the class token is looked at after the last block."""
    is_alone = tower.pool_type == "tok" and tower.attn_pool is None
    return is_alone and not is_hooked(tower.get_submodule("ln_post"))


def _last_for_class_token(tower: nn.Module) -> Int8Block | None:
    """The last block, where it can give the class token alone and no hook or option needs more."""
    last = blocks_of(tower)[-1]
    is_enough = _embeds_class_token(tower) and not is_hooked(tower.get_submodule("transformer"))
    return last if is_enough and isinstance(last, Int8Block) and last.gives_first_alone() else None


def ends_with_class_token(tower: nn.Module) -> bool:
    """Whether the last block computes the class token alone, hooks and options as they are."""
    is_own = isinstance(tower, RowwiseTower) and not tower.output_tokens
    return is_own and _last_for_class_token(tower) is not None


def _poolers(tower: nn.Module) -> list[nn.Module]:
    """The attentional poolers of the tower: none, one, or two."""
    found = (tower._modules.get(name) for name in ("attn_pool", "attn_pool_contrastive"))
    return [pooler for pooler in found if pooler is not None]


def make_rowwise(tower: nn.Module, backend: Backend) -> None:
    """Gives the float layers around the blocks one fixed order of summation (see lraee.rowwise)."""
    RowwiseConv2d.adopt(tower.get_submodule("conv1"), backend)
    for pooler in _poolers(tower):
        RowwiseAttention.adopt(pooler.get_submodule("attn"), backend)
    if type(tower) is VisionTransformer:
        tower.__class__ = RowwiseTower
        cast(RowwiseTower, tower).rowwise_backend = backend
        cast(RowwiseTower, tower).segments = Segments.of(len(blocks_of(tower)))


def unmake_rowwise(tower: nn.Module) -> None:
    """The way back from make_rowwise."""
    RowwiseConv2d.release(tower.get_submodule("conv1"))
    for pooler in _poolers(tower):
        RowwiseAttention.release(pooler.get_submodule("attn"))
    if isinstance(tower, RowwiseTower):
        graphs.drop(tower)
        tower.__class__ = VisionTransformer
        del tower.rowwise_backend, tower.segments
        tower.__dict__.pop("cuda_graphs", None)


# Exits


@_eager
def route(
    tower: TowerParts, segments: Segments, router: Router, x: Tensor, executor: Executor
) -> Tensor:
    """Images [B, …] -> embeddings [B, E], segment by segment; in between the router decides which
    images exit, and compacts the others.
    """
    z = x
    routing = router.start(len(x), segments.whole.last, is_static=executor.is_static)
    for e, segment in enumerate(segments.to_exits):
        z, *probe = executor.run(segment, z)
        if not routing.decide(e, cast(Probe, probe), z):
            continue
        if routing.is_done:
            return cast(Tensor, routing.result)
        z = routing.compact(z, is_own=tower.may_overwrite(segment.last))
    (z,) = executor.run(segments.end, z)
    (y,) = executor.run(segments.finish, routing.compact_all(z))
    return routing.merge(y)


def exits_of(tower: nn.Module) -> Router | None:
    """The router of a tower with early exits, or None."""
    return cast(Router | None, tower._modules.get("exits"))


def attach_exits(tower: nn.Module, router: Router) -> None:
    """Lets images exit the accelerated tower where the router says; it joins its state_dict.

    Raises: NotImplementedError, ValueError on a tower or exits that do not go together.
    """
    require_exits_fit(tower, router)
    graphs.drop(tower)
    tower.exits = router
    cast(RowwiseTower, tower).segments = Segments.of(len(blocks_of(tower)), router.blocks)


def detach_exits(tower: nn.Module) -> None:
    """The way back from attach_exits; nothing where there are none."""
    graphs.drop(tower)
    tower._modules.pop("exits", None)
    if isinstance(tower, RowwiseTower):
        tower.segments = Segments.of(len(blocks_of(tower)))


def require_no_tokens(tower: nn.Module) -> None:
    """Raises NotImplementedError where a hook or option needs more than early exits can give."""
    if tower.output_tokens:
        raise NotImplementedError(
            "exits: output_tokens must be False, got True: an image that exits early has no"
            " tokens of the last block; use lraee.full_depth"
        )
    if is_hooked(tower.get_submodule("transformer")):
        raise NotImplementedError(
            "exits: visual.transformer must have no hooks, got some: images pass its blocks at"
            " different depths; hook the blocks, or use lraee.full_depth"
        )


def embedding_size(tower: nn.Module) -> int:
    """E of a tower that projects one vector per image.

    Raises: NotImplementedError on another one.
    """
    is_own = type(tower) in (VisionTransformer, RowwiseTower)
    if not is_own or tower.proj is None or tower.pool_type == "none":
        raise NotImplementedError(
            "exits: the tower must be open_clip's own VisionTransformer with one projected vector"
            f" per image, got {type(tower).__name__} with pool_type"
            f" {getattr(tower, 'pool_type', None)!r}"
        )
    return int(cast(Tensor, tower.proj).shape[1])


def require_exits_fit(tower: nn.Module, router: Router) -> None:
    """Raises unless images can exit this tower, float or accelerated, where the router says.

    Raises: NotImplementedError on the tower, ValueError on heads outside it or of other widths.
    """
    require_no_tokens(tower)
    D, E = cast(nn.Conv2d, tower.conv1).out_channels, embedding_size(tower)
    L = len(blocks_of(tower))
    if router.blocks and router.blocks[-1] >= L:
        raise ValueError(
            f"accelerate: exits must stand before the last of {L} blocks, got {router.blocks[-1]}"
        )
    for block, module in zip(router.blocks, router.heads, strict=True):
        head = cast(Int8Head, module)
        widths = head.gamma.shape[0], head.embedding_size
        if widths not in ((D, E), (2 * D, E)):
            raise ValueError(
                f"accelerate: exits must have heads [{D} or {2 * D}] -> [{E}], got"
                f" [{widths[0]}] -> [{widths[1]}] after block {block}"
            )
