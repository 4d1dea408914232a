"""Runs the text tower of an accelerated model: cut at the end of the texts, and int8 on request."""

import copy
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lraee.layers.int8_block import Int8Block
from lraee.layers.modules import Adapter, is_hooked, library_class
from lraee.ops.backend import Backend
from lraee.towers.text import FAMILIES, TextFamily, TextSpec, find_text

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
        return getattr(library_class(owner), self.spec.method)(owner, text, *args, **named)

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
    own_attributes: ClassVar[tuple[str, ...]] = ("text_encoder",)
    text_encoder: TextEncoder

    def forward(self, *args: Any, **named: Any) -> Any:
        """Token ids [B, L] -> embeddings [B, E]."""
        return self.text_encoder(*args, **named)


def attach(model: nn.Module, backend: Backend | None) -> None:
    """Gives an accelerated model its TextEncoder, where that does more than the model's own."""
    tower = find_text(model)
    if tower is None or (backend is None and not tower.spec.is_cut):
        return
    owner, encoder = tower.owner, TextEncoder(tower.owner, tower.spec, backend)
    if tower.spec.method == "encode_text":
        owner.__dict__["encode_text"] = encoder
    elif not isinstance(owner, CutText):
        CutText.adopt(owner, text_encoder=encoder)


def detach(model: nn.Module) -> None:
    """The way back from attach; nothing where there is none."""
    tower = find_text(model)
    if tower is None:
        return
    owner = tower.owner
    CutText.release(owner)
    if isinstance(owner.__dict__.get("encode_text"), TextEncoder):
        del owner.__dict__["encode_text"]
