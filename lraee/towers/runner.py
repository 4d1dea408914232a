"""An accelerated tower: fixed sums in the float layers around its blocks, and early exits."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lraee.exits.head import Int8Head
from lraee.exits.record import is_switched_off
from lraee.exits.router import Router
from lraee.layers.batch_invariant import Rowwise, RowwiseConv2d, RowwiseLinear, rowwise_linear
from lraee.layers.gradients import without_gradient
from lraee.layers.int8_block import Int8Block
from lraee.layers.modules import Adapter, is_hooked
from lraee.layers.pooling import RowwiseAttention
from lraee.ops.backend import Backend, implementation
from lraee.ops.reference import Probe
from lraee.towers import compiled, search_exits
from lraee.towers import cuda_graphs as graphs
from lraee.towers.calls import embedding_size, require_numbers, require_plain_call
from lraee.towers.executor import EagerExecutor, Executor, GraphExecutor
from lraee.towers.families import blocks_of, family_of, tower_spec
from lraee.towers.segments import Segments, TowerParts
from lraee.towers.spec import TowerSpec

Block = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """Keeps torch.compile out: where images exit depends on their numbers."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class RowwiseTower(Rowwise):
    """A float tower's class, with the same bits in any batch and early exits (see attach_exits).

    A family subclasses it: `_finish` always, `forward` where a call is more than
    images in and embeddings out, the rest where the family differs. The class of an accelerated
    tower is `subclass(adapter, float class)`.
    """

    own_attributes = ("rowwise_backend", "tower_spec", "segments", "cuda_graphs")
    tower_spec: TowerSpec
    segments: Segments
    cuda_graphs: bool = True
    """Whether calls on a GPU that ask for no more than numbers are CUDA graphs."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        compiled.register(self)  # a copy, or unpickled: a tower of its own

    # What a family gives

    def _finish(self, z: Tensor) -> Tensor:
        """Tokens after the last block [B, L, D], or [B, 1, D] where `_ends_with_class_token`, ->
        embeddings [B, …].
        """
        raise NotImplementedError

    def _runs_blocks(self, z: Tensor, rope: Any) -> Tensor:
        """Tokens [B, L, D] through all blocks, as the float tower runs them: hooks see it."""
        for block in self._blocks_by_image(rope):
            z = block(z)
        return z

    def _rope(self) -> Any:
        """Rotary positions that every block is called with in this call, or None."""
        return None

    def _is_rope_lasting(self) -> bool:
        """Whether these positions outlive the call, so that a CUDA graph may read them."""
        return True

    def _ends_with_class_token(self) -> bool:
        """Whether nothing but the class token is read after the last block."""
        spec = self.tower_spec
        norm = None if spec.final_norm is None else self.get_submodule(spec.final_norm)
        return spec.pooling.kind == "class" and (norm is None or not is_hooked(norm))

    def _extra_output(self) -> str | None:
        """The option by which calls return more than embeddings now, or None."""
        return self.tower_spec.extra_output

    # What is the same for all

    def _embeds(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
        return family_of(self).embed(self, x)

    def forward(self, x: Tensor) -> Any:
        """Images [B, 3, H, W] -> embeddings [B, …]."""
        return self.embed_images(x)

    def embed_images(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, …]: all blocks, or as far as the exits say."""
        require_plain_call()
        return without_gradient(compiled.embed(self, x), chain((x,), self.parameters()))

    def run_images(self, x: Tensor) -> Tensor:
        """See embed_images; autograd takes the result for a constant."""
        if x.dim() == 4 and x.shape[0] == 0:  # which libraries' own reshapes cannot tell
            one = x.new_zeros(1, *x.shape[1:])
            return self._run(None, one, EagerExecutor(self))[:0]
        router = self._active_router(x)
        if self._is_for_graphs(x):
            with graphs.of(self, x.device) as held:
                scale = None if router is None else router.logit_scale
                return self._run(router, x, GraphExecutor(self, held, scale))
        executor = EagerExecutor(self)
        results = [self._run(router, part, executor) for part in _parts(self, x)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _run(self, router: Router | None, x: Tensor, executor: Executor) -> Tensor:
        """Images -> embeddings, with the exits of this router or at full depth."""
        if router is not None:
            return route(self, self.segments, router, x, executor)
        (y,) = executor.run(self.segments.whole, x)
        return y.clone() if executor.is_static else y

    def _active_router(self, x: Tensor) -> Router | None:
        """The exits of this call, if it has some."""
        router = exits_of(self)
        if router is not None and is_switched_off(router):
            router.note_full_depth(x.shape[0], len(self._block_list()))
            return None
        if router is not None:
            require_no_tokens(self)
            require_numbers(x)
        return router

    # Parts of segments

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
        return self._embeds(images)

    def run_blocks(self, z: Tensor, first: int, last: int) -> Tensor:
        """Tokens [B, L, D] after blocks first to last - 1, in whichever order the tower calls them;
        after the last block the class token alone, [B, 1, D], where it is enough.
        """
        rope = self._rope()
        blocks = self._blocks_by_image(rope)
        alone = _last_for_class_token(self) if last == len(blocks) else None
        if alone is None and last - first == len(blocks):
            return self._runs_blocks(z, rope)
        for block in blocks[first : last if alone is None else last - 1]:
            z = block(z)
        return z if alone is None else alone.first_token(z, rope)

    def probe(self, e: int, z: Tensor) -> Probe:
        """What exit e measures on tokens [B, L, D]."""
        return search_exits.probe(self, cast(Router, exits_of(self)), e, z)

    def finish(self, z: Tensor) -> Tensor:
        """Tokens after the last block -> embeddings [B, E]."""
        return self._finish(z)

    def may_overwrite(self, last: int) -> bool:
        """Whether the tokens after block last - 1 are held by no hook."""
        block = self._blocks_by_image()[last - 1]
        return isinstance(block, nn.Module) and not block._forward_hooks

    def _is_for_graphs(self, x: Tensor) -> bool:
        """Whether graphs may be made of this call; a tower that was refused runs without them."""
        return (
            not torch.compiler.is_compiling()
            and x.is_cuda
            and self.cuda_graphs
            and implementation(self.rowwise_backend, x.device) == "triton"
            and graphs.is_plain_call(x)
            and self._is_rope_lasting()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowwiseTower":
        """Moved or cast, its numbers lie elsewhere: graphs of where they were are dropped."""
        graphs.drop(self)
        return cast(RowwiseTower, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _blocks_by_image(self, rope: Any = None) -> list[Block]:
        return [_by_image(block, rope) for block in self._block_list()]

    def _block_list(self) -> list[nn.Module]:
        # not families.blocks_of, which reads the whole spec anew: 30 us a call
        return list(self.get_submodule(self.tower_spec.blocks).children())

    def _project(self, pooled: Tensor) -> Tensor:
        """The projection of the spec, if there is one: [..., K] -> [..., N]."""
        projection = self.tower_spec.projection
        if projection is None:
            return pooled
        parent, _, leaf = projection.weight.rpartition(".")
        weight = self.get_submodule(parent)._parameters[leaf]
        if weight is None:  # taken off since
            return pooled
        bias = None if projection.bias is None else self.get_parameter(projection.bias)
        w = weight.t() if projection.is_transposed else weight
        return rowwise_linear(pooled, w, bias, self.rowwise_backend)


def _by_image(block: nn.Module, rope: Any) -> Block:
    """The block on [B, L, D], tokens in and out: itself where that is how it is called."""
    if not isinstance(block, Int8Block):
        return block
    call = block.block_spec.call
    if call.outputs is None and not call.is_sequence_first and rope is None:
        return block
    named = {} if rope is None or call.rope is None else {call.rope: rope}
    return lambda z: call.unwrap(block(call.by_image(z).contiguous(), **named))


_BYTES_PER_THREAD = 3 * 2**20
"""Bytes of tokens that each thread of a CPU takes through all blocks at once.

What is beyond the cache that threads share, the weights of a block among it, goes to memory after
every block and comes back. ViT-L/14 at batch 32 (34 MB of tokens) in parts of 16, 8, 4 and 2
images: 6,970, 6,860, 6,785 and 6,928 ms; ViT-B/16 at 32 and ViT-B/32 at 128 are within 1 % at 3,
4.5 and 9 MB a thread (Zen 4, two threads, 32 MB of L3).
"""


def _parts(tower: RowwiseTower, x: Tensor) -> tuple[Tensor, ...]:
    """The images, or parts of a batch too large for the caches of a CPU: the same bits.

    Parts are even, and whole rounds of images for all threads. A batch stays whole where a hook
    would see several calls instead of one, and where a step is the batch's.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (x,)
    threads = torch.get_num_threads()
    if len(x) <= threads:
        return (x,)
    spec = tower.tower_spec
    bytes_of_one = spec.tokens * spec.width * x.element_size()
    most = threads * max(1, _BYTES_PER_THREAD // bytes_of_one)
    if len(x) <= most or any(is_hooked(m) for m in tower.modules() if m is not tower):
        return (x,)
    is_by_row = all(isinstance(b, Int8Block) and b.is_by_row for b in tower._block_list())
    rounds = math.ceil(len(x) / math.ceil(len(x) / most) / threads)
    return torch.split(x, rounds * threads) if is_by_row else (x,)


def _last_for_class_token(tower: RowwiseTower) -> Int8Block | None:
    """The last block, where it can give the class token alone and no more is read of it."""
    spec = tower.tower_spec
    last = tower._block_list()[-1]
    is_enough = tower._ends_with_class_token() and not _are_parents_hooked(tower, spec)
    return last if is_enough and isinstance(last, Int8Block) and last.gives_first_alone() else None


def _are_parents_hooked(tower: nn.Module, spec: TowerSpec) -> bool:
    """Whether a hook sees the modules between the tower and its blocks."""
    return any(is_hooked(tower.get_submodule(path)) for path in spec.block_parents)


def ends_with_class_token(tower: nn.Module) -> bool:
    """Whether the last block computes the class token alone, hooks and options as they are."""
    if not isinstance(tower, RowwiseTower) or tower._extra_output() is not None:
        return False
    return _last_for_class_token(tower) is not None


def make_rowwise(tower: nn.Module, backend: Backend) -> None:
    """Gives the float layers around the blocks one fixed order of summation."""
    spec = tower_spec(tower)
    for part, kind in _rowwise_parts(tower, spec):
        kind.adopt(part, rowwise_backend=backend)
    if type(tower) is spec.float_class:
        adapter, segments = family_of(tower).adapter, Segments.of(len(blocks_of(tower)))
        adapter.adopt(tower, rowwise_backend=backend, tower_spec=spec, segments=segments)
    compiled.register(tower)


def unmake_rowwise(tower: nn.Module) -> None:
    """The way back from make_rowwise."""
    for part, kind in reversed(_rowwise_parts(tower, tower_spec(tower))):
        kind.release(part)
    if isinstance(tower, RowwiseTower):
        graphs.drop(tower)
        RowwiseTower.release(tower)


def _rowwise_parts(tower: nn.Module, spec: TowerSpec) -> list[tuple[nn.Module, type[Adapter]]]:
    """Each float part that sums, and what it becomes if it fits; one part may become two things."""
    patches, projection = tower.get_submodule(spec.patch_embedding.path), _projection(tower, spec)
    return [
        (patches, RowwiseConv2d),
        (patches, RowwiseLinear),
        *((tower.get_submodule(path), RowwiseAttention) for path in spec.pooling.attention),
        (projection, RowwiseLinear),
        *((tower.get_submodule(path), kind) for path, kind in spec.adapters),
    ]


def _projection(tower: nn.Module, spec: TowerSpec) -> nn.Module:
    """The module that holds the last product: a linear, or where it is no module its owner."""
    name = "" if spec.projection is None else spec.projection.weight
    return tower.get_submodule(name.rpartition(".")[0])


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
    router.prefix_tokens = tower_spec(tower).prefix_tokens
    search_exits.attach(tower, router)
    tower.exits = router
    cast(RowwiseTower, tower).segments = Segments.of(len(blocks_of(tower)), router.blocks)


def detach_exits(tower: nn.Module) -> None:
    """The way back from attach_exits; nothing where there are none."""
    graphs.drop(tower)
    tower._modules.pop("exits", None)
    if isinstance(tower, RowwiseTower):
        tower.segments = Segments.of(len(tower._block_list()))


def require_no_tokens(tower: nn.Module) -> None:
    """Raises NotImplementedError where images that exit early cannot give what is returned."""
    if isinstance(tower, RowwiseTower):
        spec, extra = tower.tower_spec, tower._extra_output()
    else:
        spec = tower_spec(tower)
        extra = spec.extra_output
    if extra is not None:
        raise NotImplementedError(
            f"exits: {extra} must be False, got True: an image that exits early has no tokens of"
            " the last block; use lraee.full_depth"
        )
    if _are_parents_hooked(tower, spec):
        raise NotImplementedError(
            f"exits: {family_of(tower).name_of(spec.block_parents[0])} must have no hooks, got"
            " some: images pass its blocks at different depths; hook the blocks, or use"
            " lraee.full_depth"
        )


def require_exits_fit(tower: nn.Module, router: Router) -> None:
    """Raises unless images can exit this tower, float or accelerated, where the router says.

    Raises: NotImplementedError on the tower, ValueError on heads outside it or of other widths.
    """
    require_no_tokens(tower)
    spec, E = tower_spec(tower), embedding_size(tower)
    widths = (spec.width, 2 * spec.width) if spec.prefix_tokens else (spec.width,)
    L = len(blocks_of(tower))
    if router.blocks and router.blocks[-1] >= L:
        raise ValueError(
            f"accelerate: exits must stand before the last of {L} blocks, got {router.blocks[-1]}"
        )
    for block, module in zip(router.blocks, router.heads, strict=True):
        if search_exits.fits(tower, block, module):
            continue
        head = cast(Int8Head, module)
        shape = head.gamma.shape[0], head.embedding_size
        if shape[0] not in widths or shape[1] != E:
            raise ValueError(
                f"accelerate: exits must have heads [{' or '.join(map(str, widths))}] -> [{E}], got"
                f" [{shape[0]}] -> [{shape[1]}] after block {block}"
            )
