"""Runs the text tower of an accelerated model: cut at the end of the texts, and int8 on request."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lraee.layers.int8_block import Int8Block
from lraee.layers.modules import Adapter, is_hooked, library_class
from lraee.ops.backend import Backend
from lraee.towers.text import FAMILIES, TextFamily, TextSpec, TextSteps, find_text

_STEP = 8
"""Lengths of int8 texts are multiples: prompts of 6 to 16 tokens make 2 calls instead of 11."""


class TextEncoder:
    """`encode_text` of an accelerated model, or what `forward` of its text tower calls (CutText).

    An attribute of the instance, since a model keeps its own class. It holds its module weakly,
    so that an accelerated model is freed as soon as a float one, and the module's parts strongly,
    so that `accelerate(model).encode_text(ids)` works, whose model is freed before the call.

    Args:
      owner: the module that holds the tower's parts.
      spec: of the tower.
      backend: of a tower in int8; None: a float tower.
      parts: the dicts of the owner's parameters, buffers, submodules and plain attributes, where
        they are not in the owner yet (a copy on its way).
    """

    def __init__(
        self,
        owner: nn.Module,
        spec: TextSpec,
        backend: Backend | None,
        parts: dict[str, Any] | None = None,
    ) -> None:
        """See the class."""
        self.owner, self._kind = weakref.ref(owner), type(owner)
        self.spec = spec
        self.backend: Backend | None = backend
        self._parts = _parts(owner) if parts is None else parts

    def _module(self) -> nn.Module:
        """The owner, or where it was freed a module of its class with its parts."""
        owner = self.owner()
        if owner is None:
            owner = object.__new__(self._kind)
            nn.Module.__init__(owner)
            owner.__dict__.update(self._parts)
        return owner

    def __call__(self, text: Tensor, *args: Any, **named: Any) -> Any:
        """Token ids [B, L] -> embeddings [B, E]; `normalize` where the method has it."""
        owner = self._module()
        family, is_normalized = _family(self.spec), _normalize(self.spec, args, named)
        if is_normalized is None or not family.is_plain(owner) or not self._fits(text):
            return self._as_before(owner, text, args, named)
        if family.steps is None:
            if torch.compiler.is_compiling() or _is_watched(owner, self.spec):
                return self._as_before(owner, text, args, named)
            y = _encode_cut(owner, self.spec, family, text, self.backend is not None)
        elif self.backend is not None:
            y = _encode_int8(owner, self.spec, family.steps, text, self.backend)
        elif torch.compiler.is_compiling() or _is_watched(owner, self.spec):
            return self._as_before(owner, text, args, named)
        else:
            steps, positions = family.steps, self.spec.positions(text)
            z = steps.embed(owner, text[:, : int(positions.max()) + 1])
            pooled = _at(steps.run_blocks(owner, z, True), positions)
            y = steps.project(owner, steps.norm(owner, pooled), None)
        return nn.functional.normalize(y, dim=-1) if is_normalized else y

    def _as_before(self, owner: nn.Module, text: Tensor, args: Any, named: Any) -> Any:
        if self.spec.method == "none":
            return _family(self.spec).encode(owner, text)
        return getattr(library_class(owner), self.spec.method)(owner, text, *args, **named)

    def _fits(self, text: Any) -> bool:
        """Whether these are token ids that the tower takes; the library says what else is wrong.

        Raises: ValueError on texts shorter than the context of a causal tower in int8, whose blocks
          look at no mask that the library would compare them with.
        """
        is_ids = isinstance(text, Tensor) and text.dim() == 2 and not text.is_floating_point()
        if not is_ids or 0 in text.shape or text.shape[1] > self.spec.tokens:
            return False
        takes_short = self.spec.mask != "causal" or _family(self.spec).steps is None
        is_short = text.shape[1] < self.spec.tokens and not takes_short
        if is_short and self.backend is not None:
            raise ValueError(
                f"{self.spec.method}: text must have shape [B, {self.spec.tokens}], got"
                f" {list(text.shape)}; pad it as the model's tokenizer does"
            )
        return not is_short

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextEncoder":
        parts = copy.deepcopy(self._parts, memo)  # the dicts of the copy, by the memo
        return TextEncoder(memo[id(self.owner())], self.spec, self.backend, parts)

    def __reduce__(self) -> tuple[type["TextEncoder"], tuple[Any, ...]]:
        return TextEncoder, (self.owner(), self.spec, self.backend, self._parts)


_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _parts(owner: nn.Module) -> dict[str, Any]:
    """The tables of a module themselves, and its plain attributes."""
    plain = (bool, int, float, str, tuple, type(None))
    own = {name: value for name, value in owner.__dict__.items() if isinstance(value, plain)}
    return own | {name: owner.__dict__[name] for name in _TABLES}


def _family(spec: TextSpec) -> TextFamily:
    return next(family for family in FAMILIES if family.name == spec.family)


def _normalize(spec: TextSpec, args: tuple[Any, ...], named: dict[str, Any]) -> bool | None:
    """Whether rows of length 1 are wanted; None on arguments that the method does not know."""
    if spec.method != "encode_text":
        return None if args or named else False
    if len(args) + len(named) > 1 or set(named) - {"normalize"}:
        return None
    return bool((*args, *named.values(), False)[0])


def _at(z: Tensor, positions: Tensor) -> Tensor:
    """[B, L, D] -> the token of each text at its position: [B, D]."""
    return z[torch.arange(len(z), device=z.device), positions]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _encode_int8(
    owner: nn.Module, spec: TextSpec, steps: TextSteps, text: Tensor, backend: Backend
) -> Tensor:
    """Token ids [B, L] -> embeddings [B, …]; each text has the same bits in any batch."""
    if not spec.is_cut or not _is_by_row(owner, spec) or _is_watched(owner, spec):
        z = steps.norm(owner, steps.run_blocks(owner, steps.embed(owner, text), False))
        pooled = z if spec.pooling == "none" else _at(z, spec.positions(text))
        return steps.project(owner, pooled, backend)
    positions = spec.positions(text)
    text, lengths = _filled(text, positions)

    def pooled_of(rows: Tensor) -> Tensor:
        tokens = steps.embed(owner, text[rows, : int(lengths[rows[0]])])
        return _at(steps.run_blocks(owner, tokens, False), positions[rows])

    return steps.project(owner, steps.norm(owner, _by_length(lengths, pooled_of)), backend)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _encode_cut(
    owner: nn.Module, spec: TextSpec, family: TextFamily, text: Tensor, is_int8: bool
) -> Tensor:
    """Token ids [B, L] -> embeddings [B, E] by the library's call on shorter texts: in int8 those
    of one length together, else all at the longest.
    """
    lengths = spec.lengths(text) if spec.is_cut else None
    if lengths is None or (is_int8 and not _is_by_row(owner, spec)):
        return family.encode(owner, text)
    if not is_int8:
        return family.encode(owner, text[:, : int(lengths.max())])
    if spec.mask == "causal":
        text, lengths = _filled(text, lengths - 1)
    return _by_length(
        lengths, lambda rows: family.encode(owner, text[rows, : int(lengths[rows[0]])])
    )


def _is_by_row(owner: nn.Module, spec: TextSpec) -> bool:
    """Whether no scale of the blocks is the batch's."""
    blocks = owner.get_submodule(spec.blocks).children()
    return all(isinstance(block, Int8Block) and block.is_by_row for block in blocks)


def _filled(text: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Texts whose tokens after these positions are copies of those there, and multiples of _STEP
    that hold what comes before.
    """
    is_after = torch.arange(text.shape[1], device=text.device) > positions[:, None]
    filled = torch.where(is_after, text.gather(1, positions[:, None]), text)
    return filled, (positions // _STEP + 1).mul(_STEP).clamp(max=text.shape[1])


def _by_length(lengths: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows [B, …], those of one length at a time: `run` takes their indices."""
    order = lengths.argsort(stable=True)
    counts = torch.unique(lengths, return_counts=True)[1].tolist()
    return torch.cat([run(rows) for rows in torch.split(order, counts)])[order.argsort()]


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
    own_attributes: ClassVar[tuple[str, ...]] = ("text_encoder",)
    text_encoder: TextEncoder

    def forward(self, *args: Any, **named: Any) -> Any:
        """Token ids [B, L] -> embeddings [B, E]."""
        return self.text_encoder(*args, **named)


def encode(model: nn.Module, text: Tensor) -> Tensor | None:
    """Token ids [B, L] -> embeddings [B, E] of a model, cut where it is accelerated; None where
    no family knows its text tower.
    """
    tower = find_text(model)
    if tower is None:
        return None
    encoder = tower.owner.__dict__.get("text_encoder")
    if encoder is None:
        return tower.family.encode(tower.owner, text)
    return cast(Tensor, encoder(text))


def attach(model: nn.Module, backend: Backend | None) -> None:
    """Gives an accelerated model its TextEncoder, where that does more than the model's own, and
    an int8 tower float layers that work row by row.
    """
    tower = find_text(model)
    if tower is None or (backend is None and not tower.spec.is_cut):
        return
    owner, encoder = tower.owner, TextEncoder(tower.owner, tower.spec, backend)
    if backend is not None:
        for path, kind in tower.spec.adapters:
            kind.adopt(owner.get_submodule(path), rowwise_backend=backend)
        tower.family.settle(model)
    if tower.spec.method == "encode_text":
        owner.__dict__["encode_text"] = encoder
    elif tower.spec.method == "none":
        owner.__dict__["text_encoder"] = encoder
    elif not isinstance(owner, CutText):
        CutText.adopt(owner, text_encoder=encoder)


def detach(model: nn.Module) -> None:
    """The way back from attach; nothing where there is none."""
    tower = find_text(model)
    if tower is None:
        return
    owner = tower.owner
    tower.family.settle(model)
    for path, kind in tower.spec.adapters:
        kind.release(owner.get_submodule(path))
    CutText.release(owner)
    owner.__dict__.pop("text_encoder", None)
    if isinstance(owner.__dict__.get("encode_text"), TextEncoder):
        del owner.__dict__["encode_text"]
