"""Text towers: what is read of them, the cut at the end of a text, and the call of a fast model.

A causal tower that pools at the end-of-text token gives the same numbers without the tokens after
it: no token before them sees them. Two rules say where a batch is cut:

- float: once, after the last end of the batch. The shape of a matrix product may change its bits,
  so the numbers agree with those of the whole within 1e-5.
- int8: each text after its own end, filled up to a multiple of 8 tokens with copies of the last;
  texts of one length run together. int8_attention centres K on its mean over all tokens, so a
  text's bits depend on how many and which they are: here on the text alone, neither on what its
  tokenizer put after the end nor on the texts beside it.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.modules import Adapter, is_hooked, subclass
from lraee.layers.spec import BlockSpec
from lraee.ops.backend import Backend
from lraee.towers.families import supported_linears

_STEP = 8
"""Lengths of int8 texts are multiples: prompts of 6 to 16 tokens make 2 calls instead of 11."""

TextPooling = Literal["argmax", "end", "first", "last", "none"]
TextMask = Literal["causal", "none", "other"]


@dataclass(frozen=True)
class TextSpec:
    """A text tower, float or in int8, as its family's reader describes it.

    Args:
      family: name of its TextFamily.
      path: in the model, of the module that holds the tower's parts; "" is the model itself.
      method: of that module, that takes token ids: "encode_text" or "forward".
      blocks: path of the block list in that module.
      parts: names of that module's children that belong to the text tower.
      tokens: L, the tokens that the tower takes.
      mask: "causal": token i sees tokens 0..i only; "none": every token; "other" ones have no int8
        kernel.
      pooling: the token that is projected: "argmax": of the highest id; "end": the first of
        `end_id`, else the first token; "first"; "last"; "none": every token.
      end_id: see pooling.
    """

    family: str
    path: str
    method: Literal["encode_text", "forward"]
    blocks: str
    parts: tuple[str, ...]
    tokens: int
    mask: TextMask
    pooling: TextPooling
    end_id: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether tokens after the pooled one change nothing."""
        return self.mask == "causal" and self.pooling in ("argmax", "end", "first")

    def block_path(self, i: int) -> str:
        """Of block i, in the module that holds the parts."""
        return f"{self.blocks}.{i}"

    def block_name(self, i: int) -> str:
        """Of block i, in `keep_float` and checkpoints, such as "text.resblocks.3"."""
        return f"text.{self.blocks.rpartition('.')[2]}.{i}"

    def positions(self, text: Tensor) -> Tensor:
        """Index of the token that is pooled, int64 [B], of ids [B, L]; of one pooled token."""
        if self.pooling == "argmax":
            return text.argmax(dim=-1)
        if self.pooling == "end":
            is_end = cast(Tensor, text == self.end_id)
            return is_end.int().argmax(dim=-1)
        return text.new_full(text.shape[:1], 0 if self.pooling == "first" else text.shape[1] - 1)


@dataclass(frozen=True)
class TextFamily:
    """How one library's text towers are found, read and run; `owner` holds the tower's parts.

    Args:
      name: for messages.
      find: path of the owner in a model, "" for the model itself; None where there is none.
      read: the spec of the tower of an owner at this path.
      read_block: the spec of a float block; raises UnsupportedBlockError, `has …, for which INT8
        has no kernel`.
      embed: owner, ids [B, L] -> tokens [B, L, D] before the first block.
      run_blocks: owner, tokens [B, L, D], whether masks are passed (int8 blocks know theirs)
        -> the same.
      norm: owner, tokens [..., D] -> the same, after the last block.
      project: owner, pooled [..., D], backend or None for torch's product -> [..., E].
      is_plain: whether a call of the owner returns embeddings alone now.
      refusal: for a text tower that this family knows by sight and cannot run: the reason.
    """

    name: str
    find: Callable[[nn.Module], str | None]
    read: Callable[[nn.Module, str], TextSpec]
    read_block: Callable[[nn.Module, TextSpec], BlockSpec]
    embed: Callable[[nn.Module, Tensor], Tensor]
    run_blocks: Callable[[nn.Module, Tensor, bool], Tensor]
    norm: Callable[[nn.Module, Tensor], Tensor]
    project: Callable[[nn.Module, Tensor, Backend | None], Tensor]
    is_plain: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None] = lambda model: None


FAMILIES: list[TextFamily] = []
"""In the order in which they are tried."""


def register(family: TextFamily) -> None:
    """Adds a family to those that are known."""
    FAMILIES.append(family)


@dataclass(frozen=True)
class TextTower:
    """The text tower of a model."""

    owner: nn.Module
    spec: TextSpec
    family: TextFamily

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return cast(nn.ModuleList, self.owner.get_submodule(self.spec.blocks))

    @property
    def guarded(self) -> list[nn.Module]:
        """The owner and every module between it and the blocks."""
        words = self.spec.blocks.split(".")
        paths = (".".join(words[: i + 1]) for i in range(len(words)))
        return [self.owner, *(self.owner.get_submodule(path) for path in paths)]

    def read_block(self, block: nn.Module) -> BlockSpec:
        """The spec of one float block.

        Raises: UnsupportedBlockError.
        """
        return self.family.read_block(block, self.spec)

    def block_specs(self) -> list[BlockSpec]:
        """The spec of each block, float or int8.

        Raises: UnsupportedBlockError.
        """
        return [
            block.block_spec if isinstance(block, Int8Block) else self.read_block(block)
            for block in self.blocks
        ]


def find_text(model: nn.Module) -> TextTower | None:
    """The text tower that a known family runs, or None."""
    for family in FAMILIES:
        path = family.find(model)
        if path is not None:
            owner = model.get_submodule(path)
            return TextTower(owner, family.read(owner, path), family)
    return None


def text_refusal(model: nn.Module) -> str:
    """Why find_text finds none."""
    reasons = (family.refusal(model) for family in FAMILIES)
    return next((reason for reason in reasons if reason), "it has no text tower that INT8 knows")


class TextEncoder:
    """`encode_text` of an accelerated model, or what `forward` of its text tower calls (CutText).

    An attribute of the instance, since a model keeps its own class. It holds its module weakly,
    so that an accelerated model is freed as soon as a float one.

    Args:
      owner: the module that holds the tower's parts.
      spec: of the tower.
      backend: of a tower in int8; None: a float tower.
    """

    def __init__(self, owner: nn.Module, spec: TextSpec, backend: Backend | None) -> None:
        """See the class."""
        self.owner = weakref.ref(owner)
        self.spec = spec
        self.backend: Backend | None = backend

    def __call__(self, text: Tensor, *args: Any, **named: Any) -> Any:
        """Token ids [B, L] -> embeddings [B, E]; `normalize` where the method has it."""
        owner = self.owner()
        assert owner is not None
        family, is_normalized = _family(self.spec), _normalize(self.spec, args, named)
        if is_normalized is None or not family.is_plain(owner) or not self._fits(text):
            return self._as_before(owner, text, args, named)
        if self.backend is not None:
            y = _encode_int8(owner, self.spec, family, text, self.backend)
        elif torch.compiler.is_compiling() or _is_watched(owner, self.spec):
            return self._as_before(owner, text, args, named)
        else:
            positions = self.spec.positions(text)
            z = family.embed(owner, text[:, : int(positions.max()) + 1])
            pooled = _at(family.run_blocks(owner, z, True), positions)
            y = family.project(owner, family.norm(owner, pooled), None)
        return nn.functional.normalize(y, dim=-1) if is_normalized else y

    def _as_before(self, owner: nn.Module, text: Tensor, args: Any, named: Any) -> Any:
        return getattr(class_of(owner), self.spec.method)(owner, text, *args, **named)

    def _fits(self, text: Any) -> bool:
        """Whether these are token ids that the tower takes; the library says what else is wrong.

        Raises: ValueError on texts shorter than the context of a causal tower in int8, whose blocks
          look at no mask that the library would compare them with.
        """
        is_ids = isinstance(text, Tensor) and text.dim() == 2 and not text.is_floating_point()
        if not is_ids or 0 in text.shape or text.shape[1] > self.spec.tokens:
            return False
        is_short = self.spec.mask == "causal" and text.shape[1] < self.spec.tokens
        if is_short and self.backend is not None:
            raise ValueError(
                f"{self.spec.method}: text must have shape [B, {self.spec.tokens}], got"
                f" {list(text.shape)}; pad it as the model's tokenizer does"
            )
        return not is_short

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextEncoder":
        return TextEncoder(memo[id(self.owner())], self.spec, self.backend)

    def __reduce__(self) -> tuple[type["TextEncoder"], tuple[Any, ...]]:
        return TextEncoder, (self.owner(), self.spec, self.backend)


def _family(spec: TextSpec) -> TextFamily:
    return next(family for family in FAMILIES if family.name == spec.family)


def _normalize(spec: TextSpec, args: tuple[Any, ...], named: dict[str, Any]) -> bool | None:
    """Whether rows of length 1 are wanted; None on arguments that the method does not know."""
    if spec.method == "forward":
        return None if args or named else False
    if len(args) + len(named) > 1 or set(named) - {"normalize"}:
        return None
    return bool((*args, *named.values(), False)[0])


def _at(z: Tensor, positions: Tensor) -> Tensor:
    """[B, L, D] -> the token of each text at its position: [B, D]."""
    return z[torch.arange(len(z), device=z.device), positions]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _encode_int8(
    owner: nn.Module, spec: TextSpec, family: TextFamily, text: Tensor, backend: Backend
) -> Tensor:
    """Token ids [B, L] -> embeddings [B, …]; each text has the same bits in any batch."""
    blocks = owner.get_submodule(spec.blocks)
    is_by_row = all(isinstance(block, Int8Block) and block.is_by_row for block in blocks.children())
    if not spec.is_cut or not is_by_row or _is_watched(owner, spec):
        z = family.norm(owner, family.run_blocks(owner, family.embed(owner, text), False))
        pooled = z if spec.pooling == "none" else _at(z, spec.positions(text))
        return family.project(owner, pooled, backend)
    positions = spec.positions(text)
    is_after = torch.arange(text.shape[1], device=text.device) > positions[:, None]
    text = torch.where(is_after, text.gather(1, positions[:, None]), text)
    lengths = (positions // _STEP + 1).mul(_STEP).clamp(max=text.shape[1])
    order = lengths.argsort(stable=True)
    counts = torch.unique(lengths, return_counts=True)[1].tolist()
    parts = []
    for part in torch.split(order, counts):
        tokens = family.embed(owner, text[part, : int(lengths[part[0]])])
        parts.append(_at(family.run_blocks(owner, tokens, False), positions[part]))
    pooled = torch.cat(parts)[order.argsort()]
    return family.project(owner, family.norm(owner, pooled), backend)


def _is_watched(owner: nn.Module, spec: TextSpec) -> bool:
    """Whether a hook sees a module of the text tower: it is given whole texts, as before."""
    return any(_is_hooked_inside(owner._modules.get(name)) for name in spec.parts)


def _is_hooked_inside(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return is_hooked(module) or any(map(_is_hooked_inside, module._modules.values()))


class CutText(Adapter):
    """A text tower's class, whose forward is that of its TextEncoder.

    A class, and no attribute of the instance: torch.compile looks at no other forward.
    """

    adapter_prefix: ClassVar[str] = "Cut"
    text_encoder: TextEncoder

    def forward(self, *args: Any, **named: Any) -> Any:
        """Token ids [B, L] -> embeddings [B, E]."""
        return self.text_encoder(*args, **named)


def class_of(owner: nn.Module) -> type[nn.Module]:
    """The library's class of a module that holds a text tower's parts, float or accelerated."""
    return owner._classes[1] if isinstance(owner, CutText) else type(owner)


def attach(model: nn.Module, backend: Backend | None) -> None:
    """Gives an accelerated model its TextEncoder, where that does more than the model's own."""
    tower = find_text(model)
    if tower is None or (backend is None and not tower.spec.is_cut):
        return
    owner, encoder = tower.owner, TextEncoder(tower.owner, tower.spec, backend)
    if tower.spec.method == "encode_text":
        owner.__dict__["encode_text"] = encoder
    elif not isinstance(owner, CutText):
        owner.__class__ = subclass(CutText, type(owner))
        owner.__dict__["text_encoder"] = encoder


def detach(model: nn.Module) -> None:
    """The way back from attach; nothing where there is none."""
    tower = find_text(model)
    if tower is None:
        return
    owner = tower.owner
    if isinstance(owner, CutText):
        owner.__class__ = class_of(owner)  # type: ignore[assignment]
        del owner.__dict__["text_encoder"]
    elif isinstance(owner.__dict__.get("encode_text"), TextEncoder):
        del owner.__dict__["encode_text"]


# What the scheme quantizes


def require_text(model: nn.Module) -> TextTower:
    """The float text tower of a model, each block with its int8 kernels.

    Raises: NotImplementedError.
    """
    tower = find_text(model)
    if tower is None:
        reason = text_refusal(model)
    elif not tower.family.is_plain(tower.owner):
        reason = "it masks tokens besides later ones, or returns more than embeddings"
    elif tower.spec.mask == "other":
        reason = "its attn_mask is neither None nor causal, and INT8 has no kernel for that"
    else:
        linear_shapes(tower)
        return tower
    raise NotImplementedError(
        f"accelerate: text must be None for {type(model).__name__}, got 'int8': {reason}"
    )


def linear_shapes(tower: TextTower) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear of a float tower's blocks, by the name it has in the fast one.

    Raises: NotImplementedError on a block without int8 kernels.
    """
    shapes = {}
    for i, block in enumerate(tower.blocks):
        path = ".".join(filter(None, (tower.spec.path, tower.spec.block_path(i))))
        for linear in supported_linears(block, tower.read_block, path):
            shapes[f"{tower.spec.block_name(i)}.{linear.path}"] = linear.shape(block)
    return shapes


def int8_linears(tower: TextTower) -> dict[str, Int8Linear]:
    """The int8 linears of a fast tower, by the names that linear_shapes gives them."""
    return {
        f"{tower.spec.block_name(i)}.{path}": module
        for i, block in enumerate(tower.blocks)
        for path, module in block.named_modules()
        if isinstance(module, Int8Linear)
    }
