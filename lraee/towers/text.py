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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.spec import BlockSpec
from lraee.ops.backend import Backend
from lraee.towers.families import supported_linears

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
