"""An accelerated tower: fixed sums in the float layers around its blocks, and early exits."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lraee.exits.head import Int8Head
from lraee.exits.router import EAGER, Block, Router, Runner
from lraee.layers.batch_invariant import RowwiseConv2d, RowwiseLinear, rowwise_linear
from lraee.layers.int8_block import Int8Block
from lraee.layers.modules import Adapter, adopt, is_hooked, release
from lraee.layers.pooling import RowwiseAttention
from lraee.ops.backend import Backend, implementation
from lraee.towers import cuda_graphs as graphs
from lraee.towers.families import blocks_of, family_of, tower_spec
from lraee.towers.spec import Projection, TowerSpec


class RowwiseTower(Adapter):
    """A float tower's class, with the same bits in any batch and early exits (see attach_exits).

    A family subclasses it: `_finish` always, `forward` where a call is more than
    images in and embeddings out, the rest where the family differs. The class of an accelerated
    tower is `subclass(adapter, float class)`.
    """

    adapter_prefix: ClassVar[str] = "Rowwise"
    tower_spec: TowerSpec
    rowwise_backend: Backend
    cuda_graphs: bool = True
    """Whether calls on a GPU that ask for no more than numbers are CUDA graphs."""

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

    def _rope(self, x: Tensor) -> Any:
        """Rotary positions that every block is called with for these images, or None."""
        return None

    def _is_rope_lasting(self) -> bool:
        """Whether these positions outlive the call, so that a CUDA graph may read them."""
        return True

    def _ends_with_class_token(self) -> bool:
        """Whether nothing but the class token is read after the last block."""
        spec = self.tower_spec
        norm = None if spec.final_norm is None else self.get_submodule(spec.final_norm)
        return spec.pooling.kind == "class" and (norm is None or not is_hooked(norm))

    # What is the same for all

    def _embeds(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, L, D] before the first block."""
        return family_of(self).embed(self, x)

    def forward(self, x: Tensor) -> Any:
        """Images [B, 3, H, W] -> embeddings [B, …]."""
        return self.embed_images(x)

    def embed_images(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, …]: all blocks, or as far as the exits say."""
        router = self._active_router(x)
        if self._is_for_graphs(x):
            with graphs.of(self, x.device) as run:
                if router is not None:
                    return self._route(router, x, run)
                (pooled,) = run("tower", lambda x: (self._finish(self._tokens(x)),), x)
                return run.own(pooled)
        parts = _parts(self, x)
        if router is not None:
            results = [self._route(router, part, EAGER) for part in parts]
        else:
            results = [self._finish(self._tokens(part)) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _active_router(self, x: Tensor) -> Router | None:
        """The exits of this call, if it has some."""
        router = exits_of(self)
        if router is not None and router.is_off:
            router.note_full_depth(x.shape[0], len(blocks_of(self)))
            return None
        if router is not None:
            require_no_tokens(self)
        return router

    def _tokens(self, x: Tensor) -> Tensor:
        """Images -> tokens after the last block, or the class token alone where it is enough."""
        z, rope, last = self._embeds(x), self._rope(x), _last_for_class_token(self)
        if last is None:
            return self._runs_blocks(z, rope)
        for block in self._blocks_by_image(rope)[:-1]:
            z = block(z)
        return last.first_token(z, rope)

    def _route(self, router: Router, x: Tensor, run: Runner) -> Tensor:
        blocks = self._blocks(self._rope(x))
        return cast(Tensor, router(blocks, x, self._finish, embed=self._embeds, run=run))

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

    def _blocks(self, rope: Any) -> list[Block]:
        """The blocks on [B, L, D], in whichever order the tower calls them."""
        blocks, last = self._blocks_by_image(rope), _last_for_class_token(self)
        if last is None:
            return blocks
        first = last.first_token if rope is None else lambda z: last.first_token(z, rope)
        return [*blocks[:-1], first]

    def _blocks_by_image(self, rope: Any) -> list[Block]:
        blocks = self.get_submodule(self.tower_spec.blocks).children()
        return [_by_image(block, rope) for block in blocks]

    def _project(self, pooled: Tensor) -> Tensor:
        """The projection of the spec, if there is one: [..., K] -> [..., N]."""
        projection = tower_spec(self).projection
        return pooled if projection is None else self._multiply(pooled, projection)

    def _multiply(self, pooled: Tensor, projection: Projection) -> Tensor:
        weight = self.get_parameter(projection.weight)
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
    spec = cast(RowwiseTower, tower).tower_spec
    bytes_of_one = spec.tokens * spec.width * x.element_size()
    most = threads * max(1, _BYTES_PER_THREAD // bytes_of_one)
    if len(x) <= most or any(is_hooked(m) for m in tower.modules() if m is not tower):
        return (x,)
    is_by_row = all(isinstance(b, Int8Block) and b.is_by_row for b in blocks_of(tower))
    rounds = math.ceil(len(x) / math.ceil(len(x) / most) / threads)
    return torch.split(x, rounds * threads) if is_by_row else (x,)


def _last_for_class_token(tower: RowwiseTower) -> Int8Block | None:
    """The last block, where it can give the class token alone and no more is read of it."""
    spec = tower.tower_spec
    last = list(tower.get_submodule(spec.blocks).children())[-1]
    is_enough = tower._ends_with_class_token() and not _are_parents_hooked(tower, spec)
    return last if is_enough and isinstance(last, Int8Block) and last.gives_first_alone() else None


def _are_parents_hooked(tower: nn.Module, spec: TowerSpec) -> bool:
    """Whether a hook sees the modules between the tower and its blocks."""
    return any(is_hooked(tower.get_submodule(path)) for path in spec.block_parents)


def ends_with_class_token(tower: nn.Module) -> bool:
    """Whether the last block computes the class token alone, hooks and options as they are."""
    if not isinstance(tower, RowwiseTower) or tower_spec(tower).extra_output is not None:
        return False
    return _last_for_class_token(tower) is not None


def make_rowwise(tower: nn.Module, backend: Backend) -> None:
    """Gives the float layers around the blocks one fixed order of summation."""
    spec, adapter = tower_spec(tower), family_of(tower).adapter
    patches = tower.get_submodule(spec.patch_embedding.path)
    RowwiseConv2d.adopt(patches, backend)
    RowwiseLinear.adopt(patches, backend)
    for path in spec.pooling.attention:
        RowwiseAttention.adopt(tower.get_submodule(path), backend)
    RowwiseLinear.adopt(_projection(tower, spec), backend)
    for path, kind in spec.adapters:
        cast(Any, adopt(tower.get_submodule(path), kind)).rowwise_backend = backend
    if type(tower) is spec.float_class:
        rowwise = cast(RowwiseTower, adopt(tower, adapter))
        rowwise.rowwise_backend, rowwise.tower_spec = backend, spec


def unmake_rowwise(tower: nn.Module) -> None:
    """The way back from make_rowwise."""
    spec = tower_spec(tower)
    patches = tower.get_submodule(spec.patch_embedding.path)
    RowwiseConv2d.release(patches)
    RowwiseLinear.release(patches)
    for path in spec.pooling.attention:
        RowwiseAttention.release(tower.get_submodule(path))
    RowwiseLinear.release(_projection(tower, spec))
    for path, _ in spec.adapters:
        part = tower.get_submodule(path)
        release(part)
        part.__dict__.pop("rowwise_backend", None)
    if isinstance(tower, RowwiseTower):
        graphs.drop(tower)
        release(tower)
        for name in ("rowwise_backend", "tower_spec", "cuda_graphs"):
            tower.__dict__.pop(name, None)


def _projection(tower: nn.Module, spec: TowerSpec) -> nn.Module:
    """The module that holds the last product: a linear, or where it is no module its owner."""
    name = "" if spec.projection is None else spec.projection.weight
    return tower.get_submodule(name.rpartition(".")[0])


# Exits


def exits_of(tower: nn.Module) -> Router | None:
    """The router of a tower with early exits, or None."""
    return cast(Router | None, tower._modules.get("exits"))


def attach_exits(tower: nn.Module, router: Router) -> None:
    """Lets images leave the accelerated tower where the router says; it joins its state_dict.

    Raises: NotImplementedError, ValueError on a tower or exits that do not go together.
    """
    require_exits_fit(tower, router)
    graphs.drop(tower)
    tower.exits = router


def detach_exits(tower: nn.Module) -> None:
    """The way back from attach_exits; nothing where there are none."""
    graphs.drop(tower)
    tower._modules.pop("exits", None)


def require_no_tokens(tower: nn.Module) -> None:
    """Raises NotImplementedError where images that leave early could not give what is returned."""
    spec = tower_spec(tower)
    if spec.extra_output is not None:
        raise NotImplementedError(
            f"exits: {spec.extra_output} must be False, got True: an image that leaves early has no"
            " tokens of the last block; use lraee.full_depth"
        )
    if _are_parents_hooked(tower, spec):
        raise NotImplementedError(
            f"exits: {family_of(tower).name_of(spec.block_parents[0])} must have no hooks, got"
            " some: images pass its blocks at different depths; hook the blocks, or use"
            " lraee.full_depth"
        )


def embedding_size(tower: nn.Module) -> int:
    """E of a tower that projects one vector per image.

    Raises: NotImplementedError on another one.
    """
    spec = tower_spec(tower)
    if spec.embedding_size is None:
        raise NotImplementedError(
            f"exits: the tower must be {spec.family}'s own {spec.float_class.__name__} with one"
            f" projected vector per image, got {type(tower).__name__} with pooling"
            f" {spec.pooling.kind!r}"
        )
    return spec.embedding_size


def require_exits_fit(tower: nn.Module, router: Router) -> None:
    """Raises unless images can leave this tower, float or accelerated, where the router says.

    Raises: NotImplementedError on the tower, ValueError on heads outside it or of other widths.
    """
    require_no_tokens(tower)
    D, E = tower_spec(tower).width, embedding_size(tower)
    L = len(blocks_of(tower))
    if router.blocks and router.blocks[-1] >= L:
        raise ValueError(
            f"accelerate: exits must stand before the last of {L} blocks, got {router.blocks[-1]}"
        )
    for block, module in zip(router.blocks, router.heads, strict=True):
        head = cast(Int8Head, module)
        shape = head.gamma.shape[0], head.embedding_size
        if shape not in ((D, E), (2 * D, E)):
            raise ValueError(
                f"accelerate: exits must have heads [{D} or {2 * D}] -> [{E}], got"
                f" [{shape[0]}] -> [{shape[1]}] after block {block}"
            )
