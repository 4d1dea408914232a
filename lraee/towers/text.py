"""Text towers: what is read of them, the cut at the end of a text, and the call of a fast model.

A causal tower that pools at the end-of-text token gives the same numbers without the tokens after
it: no token before them sees them. So does a tower that masks padding, without the padding at the
end. Two rules say where a batch is cut:

- float: once, after the last end of the batch. The shape of a matrix product may change its bits,
  so the numbers agree with those of the whole within 1e-5.
- int8: each text after its own end, in a causal tower filled up to a multiple of 8 tokens with
  copies of the last; texts of one length run together. int8_attention centres K on its mean over
  all tokens, so a text's bits depend on how many and which they are: here on the text alone,
  neither on what its tokenizer put after the end nor on the texts beside it.

Only calls that give embeddings alone are cut: encode_text, and what this package asks for. Calls of
transformers' models return every token, and padding among them is what the float model gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lraee.layers.batch_invariant import Rowwise
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.spec import BlockSpec
from lraee.ops.backend import Backend
from lraee.towers.families import supported_linears
from lraee.towers.wrappers import unwrapped

TextPooling = Literal["argmax", "end", "first", "last", "none"]
TextMask = Literal["causal", "none", "other"]


@dataclass(frozen=True)
class TextSpec:
    """A text tower, float or in int8, as its family's reader describes it.

    Args:
      family: name of its TextFamily.
      path: in the model, of the module that holds the tower's parts; "" is the model itself.
      method: of that module, that takes token ids and is cut: "encode_text" or "forward"; "none":
        its calls return more than embeddings and stay whole.
      blocks: path of the block list in that module.
      parts: names of that module's children that belong to the text tower.
      tokens: L, the tokens that the tower takes.
      mask: "causal": token i sees tokens 0..i only; "none": every token; "other" ones have no int8
        kernel.
      pooling: the token that is projected: "argmax": of the highest id; "end": the first of
        `end_id`, else the first token; "first"; "last"; "none": every token.
      end_id: see pooling.
      padding_id: the id of tokens that the tower masks; None: it masks none by itself.
      is_alone: the model is nothing but a text tower.
      adapters: paths in the owner of float modules beside the blocks, and what their classes are
        mixed with where the blocks are int8, for the same bits in any batch.
    """

    family: str
    path: str
    method: Literal["encode_text", "forward", "none"]
    blocks: str
    parts: tuple[str, ...]
    tokens: int
    mask: TextMask
    pooling: TextPooling
    end_id: int | None = None
    padding_id: int | None = None
    is_alone: bool = False
    adapters: tuple[tuple[str, type[Rowwise]], ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether tokens after the end of a text change nothing."""
        return self._is_cut_at_pooled or self.padding_id is not None

    @property
    def _is_cut_at_pooled(self) -> bool:
        return self.mask == "causal" and self.pooling in ("argmax", "end", "first")

    def lengths(self, text: Tensor) -> Tensor | None:
        """Tokens of each text that change something, int64 [B], of ids [B, L]; None where padding
        stands before other tokens, or is all there is.
        """
        if self._is_cut_at_pooled:
            return self.positions(text) + 1
        is_token = cast(Tensor, text != self.padding_id)
        lengths, L = is_token.sum(1), text.shape[1]
        is_at_end = is_token.equal(torch.arange(L, device=text.device) < lengths[:, None])
        return lengths if is_at_end and bool(lengths.all()) else None

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
class TextSteps:
    """The steps of a tower whose library takes no texts shorter than its context.

    Args:
      embed: owner, ids [B, L] -> tokens [B, L, D] before the first block.
      run_blocks: owner, tokens [B, L, D], whether masks are passed (int8 blocks know theirs)
        -> the same.
      norm: owner, tokens [..., D] -> the same, after the last block.
      project: owner, pooled [..., D], backend or None for torch's product -> [..., E].
    """

    embed: Callable[[nn.Module, Tensor], Tensor]
    run_blocks: Callable[[nn.Module, Tensor, bool], Tensor]
    norm: Callable[[nn.Module, Tensor], Tensor]
    project: Callable[[nn.Module, Tensor, Backend | None], Tensor]


@dataclass(frozen=True)
class TextFamily:
    """How one library's text towers are found, read and run; `owner` holds the tower's parts.

    Args:
      name: for messages.
      find: path of the owner in a model, "" for the model itself; None where there is none.
      read: the spec of the tower of an owner at this path.
      read_block: the spec of a float block; raises UnsupportedBlockError, `has …, for which INT8
        has no kernel`.
      encode: owner, ids [B, L] -> embeddings, by the library's own call.
      steps: None: `encode` takes texts that were cut.
      is_plain: whether a call of the owner returns embeddings alone now.
      takes_others: int8 blocks serve calls that are not plain as well.
      refusal: for a text tower that this family knows by sight and cannot run: the reason.
      models: what people know such towers as, for doctor.
      settle: called with a model whose blocks were swapped, to drop what its library keeps of them.
    """

    name: str
    find: Callable[[nn.Module], str | None]
    read: Callable[[nn.Module, str], TextSpec]
    read_block: Callable[[nn.Module, TextSpec], BlockSpec]
    encode: Callable[[nn.Module, Tensor], Tensor]
    steps: TextSteps | None = None
    is_plain: Callable[[nn.Module], bool] = lambda owner: True
    takes_others: bool = False
    refusal: Callable[[nn.Module], str | None] = lambda model: None
    models: tuple[str, ...] = ()
    settle: Callable[[nn.Module], None] = lambda model: None


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
    """The text tower that a known family runs, or None; paths are those in the model without
    torch.compile's module and DataParallel.
    """
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):  # no family can be read through it
        return None
    for family in FAMILIES:
        path = family.find(model)
        if path is not None:
            owner = model.get_submodule(path)
            return TextTower(owner, family.read(owner, path), family)
    return None


def text_alone(model: nn.Module) -> TextTower | None:
    """The text tower of a model that is nothing else, or None."""
    tower = find_text(model) if isinstance(model, nn.Module) else None
    return tower if tower is not None and tower.spec.is_alone else None


def family_lines() -> tuple[str, ...]:
    """Every known family of text towers, each with the models that have one."""
    return tuple(f"{family.name}: {', '.join(family.models)}" for family in FAMILIES)


def text_refusal(model: nn.Module) -> str:
    """Why find_text finds none."""
    reasons = (family.refusal(unwrapped(model)) for family in FAMILIES)
    return next((reason for reason in reasons if reason), "it has no text tower that INT8 knows")


# What the scheme quantizes


def require_text(model: nn.Module) -> TextTower:
    """The float text tower of a model, each block with its int8 kernels.

    Raises: NotImplementedError.
    """
    tower = find_text(model)
    if tower is None:
        reason = text_refusal(model)
    elif not (tower.family.takes_others or tower.family.is_plain(tower.owner)):
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
