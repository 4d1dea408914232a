"""The registry of tower families: which library's image towers are known, and how each is read.

A family is one file of this room with a Family record; the room's __init__ registers it. All other
code speaks to a tower through the functions here and the specs that they return.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import Scheme
from lraee.layers.spec import BlockSpec, Linear, tensor_at
from lraee.ops.rules import FLOAT_TYPES
from lraee.towers.spec import TowerSpec
from lraee.towers.wrappers import require_eager, unwrapped

if TYPE_CHECKING:
    from lraee.towers.runner import RowwiseTower


class UnsupportedBlockError(NotImplementedError):
    """A block without int8 kernels; the message goes on after the block's name."""


Encode = Callable[[nn.Module, Tensor], Tensor]
"""Model and images [B, 3, H, W] or token ids -> embeddings [B, …]."""


@dataclass(frozen=True)
class Family:
    """How one library's image towers are found, read and run.

    Args:
      name: for messages and doctor.
      paths: where a model may hold its tower, such as "visual".
      is_tower: whether a module is such a tower, float or accelerated.
      read_tower: the spec of such a tower, float or accelerated.
      read_block: the spec of a float block; raises UnsupportedBlockError, `has …, for which INT8
        has no kernel`.
      embed: tower, float or accelerated, and images [B, 3, H, W] -> tokens [B, L, D] before the
        first block.
      adapter: what runs an accelerated tower; its class becomes one of this and float_class.
      encode_image: of a model or tower without the method encode_image(images); None calls it with
        them.
      encode_text: to unit rows, of a model without encode_text(tokens, normalize=True).
      models: what people know such towers as, for doctor.
      refusal: for a tower that this family knows by sight and cannot run: the reason, else None.
      settle: called with a model whose layers were swapped, to drop what its library keeps of them.
    """

    name: str
    paths: tuple[str, ...]
    is_tower: Callable[[nn.Module], bool]
    read_tower: Callable[[nn.Module], TowerSpec]
    read_block: Callable[[nn.Module], BlockSpec]
    embed: Callable[[nn.Module, Tensor], Tensor]
    adapter: "type[RowwiseTower]"
    encode_image: Encode | None = None
    encode_text: Encode | None = None
    models: tuple[str, ...] = ()
    refusal: Callable[[nn.Module], str | None] = lambda tower: None
    settle: Callable[[nn.Module], None] = lambda model: None

    def name_of(self, path: str) -> str:
        """How messages name a module of a tower by its path there."""
        return f"{self.paths[0]}.{path}" if len(self.paths) == 1 else path


FAMILIES: list[Family] = []
"""In the order in which they are tried."""


def register(family: Family) -> None:
    """Adds a family to those that are known."""
    FAMILIES.append(family)


def family_names() -> tuple[str, ...]:
    """Every known family, in the order in which they are tried."""
    return tuple(family.name for family in FAMILIES)


def family_lines() -> tuple[str, ...]:
    """The same, each with the models that are built of it."""
    return tuple(
        family.name + (f": {', '.join(family.models)}" if family.models else "")
        for family in FAMILIES
    )


def _names() -> str:
    return ", ".join(family_names())


def _paths() -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for family in FAMILIES for path in family.paths))


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _inside(model: nn.Module) -> list[nn.Module]:
    """Modules at places where a family holds towers."""
    inner = (_submodule(model, path) for path in _paths())
    return [unwrapped(module) for module in inner if module is not None]


def find_tower(model: nn.Module) -> nn.Module:
    """The image tower: the model itself, or where its family holds it.

    Raises: TypeError if there is none, NotImplementedError if it is of an unknown kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model must be a torch module of one of {_names()}, got"
            f" {type(model).__name__}"
        )
    require_eager(model)
    model = unwrapped(model)
    if _family(model) is not None:
        return model
    inner = _inside(model)
    for tower in (*inner, *(deeper for outer in inner for deeper in _inside(outer))):
        if _family(tower) is not None:
            return tower
    refused = [(t, family.refusal(t)) for t in (*inner, model) for family in FAMILIES]
    refused = [(t, reason) for t, reason in refused if reason is not None]
    if not refused and not inner:
        where = ", ".join(f"`.{path}`" for path in _paths()[:3])
        raise TypeError(
            f"accelerate: model must have an image tower at {where} or the like, got"
            f" {type(model).__name__};"
            f" known are {_names()}"
        )
    tower, reason = refused[0] if refused else (inner[0], "INT8 has no kernels for it")
    raise NotImplementedError(
        f"accelerate: the image tower must be one of {_names()}, got {_kind(tower)}: {reason}; use"
        " a supported model, or serve this one in float"
    )


def _kind(tower: nn.Module) -> str:
    trunk = getattr(tower, "trunk", None)
    inside = (
        "" if trunk is None else f" ({type(trunk).__module__.split('.')[0]} {type(trunk).__name__})"
    )
    return type(tower).__name__ + inside


def _family(tower: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if family.is_tower(tower)), None)


def family_of(tower: nn.Module) -> Family:
    """The family of a tower from find_tower."""
    family = _family(tower)
    if family is None:
        raise TypeError(f"tower must be one of {_names()}, got {type(tower).__name__}")
    return family


def tower_spec(tower: nn.Module) -> TowerSpec:
    """The spec of a tower from find_tower, as it is now."""
    return family_of(tower).read_tower(tower)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The blocks of the tower, in order."""
    return cast(nn.ModuleList, tower.get_submodule(tower_spec(tower).blocks))


def block_specs(tower: nn.Module) -> list[BlockSpec]:
    """The spec of each block, float or int8.

    Raises: UnsupportedBlockError.
    """
    family = family_of(tower)
    return [
        block.block_spec if isinstance(block, Int8Block) else family.read_block(block)
        for block in blocks_of(tower)
    ]


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the images that the model's image tower takes."""
    return tower_spec(find_tower(model)).image_size


def embed_tokens(tower: nn.Module, images: Tensor) -> Tensor:
    """Tokens [B, L, D] before the first block of a tower, float or accelerated."""
    return family_of(tower).embed(tower, images)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's image tower, or of a model whose tower is not known."""
    return next(_tower_or(model).parameters()).device


def _tower_or(model: nn.Module) -> nn.Module:
    """The image tower, or the model itself where no family knows one: it only encodes."""
    try:
        return find_tower(model)
    except (TypeError, NotImplementedError):
        return model


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The float type that the model's image tower computes in: that of its patch embedding.

    Norms may have another one (open_clip keeps them float32 in "fp16" and "bf16"), so no other
    parameter tells it.
    """
    tower = _tower_or(model)
    is_known = _family(tower) is not None
    path = tower_spec(tower).patch_embedding.path if is_known else ""
    embedding = tower.get_submodule(path)
    if isinstance(embedding, Int8Linear):
        return embedding.dtype
    return next(p.dtype for p in embedding.parameters() if p.is_floating_point())


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the device and in the type that the model's image tower takes."""
    return images.to(device_of(model), compute_dtype(model))


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [B, …] of preprocessed images [B, 3, H, W], by the model or a bare tower."""
    model = unwrapped(model)
    encode = getattr(model, "encode_image", None)
    if encode is None:
        own = family_of(find_tower(model)).encode_image
        encode = model if own is None else partial(own, model)
    result = encode(images)
    return cast(Tensor, result[0] if isinstance(result, tuple) else result)


@torch.no_grad()
def encode(model: nn.Module, images: Tensor, *, batch: int | None = None) -> Tensor:
    """Embeddings float32 [n, …] on the CPU of images [n, 3, H, W] of any device and float type.

    Args:
      batch: images per call; None calls once with all.
    """
    parts = (images,) if batch is None else torch.split(images, batch)
    return torch.cat([encode_image(model, as_input(model, x)).float().cpu() for x in parts])


def can_encode_text(model: nn.Module) -> bool:
    """Whether encode_text may be called."""
    return hasattr(model, "encode_text") or family_of(find_tower(model)).encode_text is not None


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text embeddings [n, E] of token ids, by a model that can."""
    family = _family(_tower_or(model))
    encode = None if family is None else family.encode_text
    if encode is None:
        return cast(Any, model).encode_text(tokens, normalize=True)  # type: ignore[no-any-return]
    return encode(model, tokens)


# What the scheme quantizes


def require_supported(tower: nn.Module, scheme: Scheme, others: Iterable[str] = ()) -> None:
    """Raises one line unless each block has its int8 kernels and each kept layer exists.

    Args:
      tower: from find_tower, float.
      scheme: how it is to be quantized.
      others: names of linears outside the tower that the scheme may keep float.
    Raises: NotImplementedError, ValueError.
    """
    family, spec = family_of(tower), tower_spec(tower)
    known = set(others)
    for i, block in enumerate(blocks_of(tower)):
        path = f"{family.name_of(spec.blocks)}.{i}"
        linears = supported_linears(block, family.read_block, path)
        known |= {f"{spec.block_name(i)}.{linear.path}" for linear in linears}
    require_kept(scheme, known)


def require_kept(scheme: Scheme, names: Iterable[str]) -> None:
    """Raises ValueError where the scheme keeps a linear float that is none of these."""
    for kept in scheme.keep_float:
        if kept not in names:
            example = min(names, default="")
            raise ValueError(
                f"Scheme: keep_float must name linears such as {example!r}, got {kept!r}"
            )


def supported_linears(
    block: nn.Module, read_block: Callable[[nn.Module], BlockSpec], path: str
) -> tuple[Linear, ...]:
    """The linears of a float block whose int8 kernels there are.

    Args:
      block: the float block.
      read_block: as in Family.
      path: of the block in the model, for messages.
    Raises: NotImplementedError on a block without int8 kernels, or with NaN or Inf.
    """
    try:
        spec = read_block(block)
        _require_numbers(block, spec)
    except UnsupportedBlockError as error:
        raise NotImplementedError(
            f"accelerate: {path} {error}; use a model without it, or serve this one in float"
        ) from error
    return spec.linears


def _require_numbers(block: nn.Module, spec: BlockSpec) -> None:
    """Raises UnsupportedBlockError on weights of another type, or with NaN or Inf."""
    norms = (spec.norm_1, spec.norm_2)
    names = [part.weight for linear in spec.linears for part in linear.parts]
    for name in (*names, *(f"{norm.path}.weight" for norm in norms if norm.kind == "layer")):
        weight = tensor_at(block, name)
        if weight.dtype not in FLOAT_TYPES:
            raise UnsupportedBlockError(
                f"has weights of {weight.dtype}, and INT8 computes for float32, bfloat16 and"
                " float16"
            )
        if not all(torch.isfinite(end) for end in torch.aminmax(weight)):
            raise UnsupportedBlockError(f"has NaN or Inf in {name}")


def linear_shapes(tower: nn.Module) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear of a float tower's blocks, by the name it has in the fast one."""
    spec = tower_spec(tower)
    parts = zip(blocks_of(tower), block_specs(tower), strict=True)
    return {
        f"{spec.block_name(i)}.{linear.path}": linear.shape(block)
        for i, (block, block_spec) in enumerate(parts)
        for linear in block_spec.linears
    }


def int8_shapes(tower: nn.Module, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear that the scheme quantizes, of a float tower."""
    shapes = {
        name: shape for name, shape in linear_shapes(tower).items() if name not in scheme.keep_float
    }
    if scheme.patch_embedding == "int8":
        path = tower_spec(tower).patch_embedding.path
        weight = tower.get_parameter(f"{path}.weight")
        shapes[path] = weight.shape[0], weight[0].numel()
    return shapes


def int8_linears(tower: nn.Module) -> dict[str, Int8Linear]:
    """The int8 linears of an accelerated tower, by the names that int8_shapes gives them."""
    spec = tower_spec(tower)
    paths = [{linear.path for linear in each.linears} for each in block_specs(tower)]
    linears = {
        f"{spec.block_name(i)}.{path}": module
        for i, block in enumerate(blocks_of(tower))
        for path, module in block.named_modules()
        if isinstance(module, Int8Linear) and path in paths[i]
    }
    embedding = tower.get_submodule(spec.patch_embedding.path)
    own = {spec.patch_embedding.path: embedding} if isinstance(embedding, Int8Linear) else {}
    return linears | own
