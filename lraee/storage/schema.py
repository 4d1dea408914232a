"""File formats as data: kinds of JSON values, kinds of tensors, and the one validator of both."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lraee.storage.files import Violation, require
from lraee.storage.json import render

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_UNIT_ERROR = 1e-3
_HEX = frozenset("0123456789abcdef")

# Kinds of JSON values


@dataclass(frozen=True)
class Scalar:
    """One value: what it must be, in words and as a test, and what is made of it."""

    rule: str
    holds: Callable[[Any], bool]
    build: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Items:
    """A list of `least` to `most` values of one kind; checked, what `build` makes of them."""

    of: "Kind"
    least: int = 0
    most: int = 1 << 20
    build: Callable[..., Any] = tuple


@dataclass(frozen=True)
class Table:
    """An object of `least` to `most` values of one kind, its keys names of 1 to 64 characters."""

    of: "Kind"
    least: int = 0
    most: int = 1 << 20


@dataclass(frozen=True)
class Record:
    """An object with exactly these fields; checked, what `build` makes of them.

    Args:
      fields: kind of each field.
      build: called with the checked fields by name; its ValueError refuses the file.
      since: values of fields that older files lack.
    """

    fields: Mapping[str, "Kind"]
    build: Callable[..., Any] = dict
    since: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Nullable:
    """Null, or a value of this kind."""

    of: "Kind"


Kind = Scalar | Items | Table | Record | Nullable

STRING = Scalar("a string", lambda value: type(value) is str)
FLAG = Scalar("true or false", lambda value: type(value) is bool)
DIGEST = Scalar(
    "64 hexadecimal digits", lambda v: type(v) is str and len(v) == 64 and set(v) <= _HEX
)
NAME = Scalar(
    "1 to 64 printable ASCII characters",
    lambda v: type(v) is str and v.isascii() and v.isprintable() and 1 <= len(v) <= 64,
)


def integer(least: int, most: int) -> Scalar:
    """An integer in this range, no flag and no float."""
    rule = f"an integer from {least} to {most}"
    return Scalar(rule, lambda value: type(value) is int and least <= value <= most)


def real(least: float = -MAX_FLOAT32, *, above: float = -math.inf) -> Scalar:
    """A float that is finite in float32, at least `least` and above `above`; no integer."""
    bound = f" above {above:g}" if above > least else f" of at least {least:g}"
    rule = "a finite float32 number" + bound * (max(above, least) > -MAX_FLOAT32)
    return Scalar(rule, lambda v: type(v) is float and v > above and least <= v <= MAX_FLOAT32)


def choice(*choices: str) -> Scalar:
    """One of these strings."""
    rule = f"one of {', '.join(choices)}"
    return Scalar(rule, lambda value: type(value) is str and value in choices)


def free(size_bytes: int, levels: int) -> Scalar:
    """Any object of at most this size and depth, from which nothing is computed."""
    rule = f"an object of at most {levels} levels and {size_bytes} bytes"
    return Scalar(
        rule,
        lambda v: type(v) is dict and _is_flat(v, levels) and len(render(v)) <= size_bytes,
    )


def options(defaults: Any, since: Mapping[str, Any]) -> Record:
    """The record of a dataclass of strings, flags and tuples of strings."""
    kinds: dict[type, Kind] = {str: STRING, bool: FLAG, tuple: Items(STRING)}
    fields = {name: kinds[type(value)] for name, value in vars(defaults).items()}
    return Record(fields, type(defaults), since)


def check(kind: Kind, value: Any, where: str = "") -> Any:
    """The value, checked and built; `where` is its field.

    Raises: ValueError naming the field, the rule and the value.
    """
    match kind:
        case Scalar():
            require(kind.holds(value), f"{where} must be {kind.rule}", value)
            return kind.build(value)
        case Nullable(of):
            return None if value is None else check(of, value, where)
        case Items(of, least, most, build):
            is_right = type(value) is list and least <= len(value) <= most
            require(is_right, f"{where} must be a list of {least} to {most}", value)
            return build(check(of, each, f"{where}[{i}]") for i, each in enumerate(value))
        case Table(of, least, most):
            is_right = type(value) is dict and least <= len(value) <= most
            require(is_right, f"{where} must be an object of {least} to {most}", value)
            names = [check(NAME, name, f"the name of one of {where}") for name in value]
            return {name: check(of, value[name], f"{where}.{name}") for name in names}
    return _check_record(kind, value, where)


def _check_record(kind: Record, value: Any, where: str) -> Any:
    name, prefix = (where, f"{where}.") if where else ("the object", "")
    require(type(value) is dict, f"{name} must be an object", value)
    value = {**kind.since, **value}
    for key in kind.fields:
        require(key in value, f"{name} must have the key {key}", sorted(value))
    unknown = sorted(set(value) - set(kind.fields))
    require(not unknown, f"{name} must have no key but its own", unknown)
    fields = {key: check(of, value[key], prefix + key) for key, of in kind.fields.items()}
    try:
        return kind.build(**fields)
    except Violation:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_flat(value: Any, levels: int) -> bool:
    """Whether it nests at most so deep."""
    if type(value) not in (dict, list):
        return True
    inside = value.values() if type(value) is dict else value
    return levels > 0 and all(_is_flat(part, levels - 1) for part in inside)


# Tensors

DTYPES = {"I8": torch.int8, "F32": torch.float32}
"""By their names in safetensors."""

RULES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "finite": (lambda t: t, torch.isfinite),
    "finite and above 0": (lambda t: t, lambda t: (t > 0) & t.isfinite()),
    "rows of length 1": (lambda t: t.double().norm(dim=1), lambda n: (n - 1).abs() <= _UNIT_ERROR),
}
"""What is measured of a tensor, and where that is right."""


@dataclass(frozen=True)
class Spec:
    """A tensor: type, shape, and a rule on its values; a declaration gives its sizes by name."""

    dtype: str
    shape: Sequence[Any]
    rule: str = "finite"

    @property
    def size_bytes(self) -> int:
        """Of its numbers."""
        return DTYPES[self.dtype].itemsize * int(math.prod(self.shape))


Specs = dict[str, Spec]


def sized(prefix: str, declared: Specs, sizes: Mapping[str, int]) -> Specs:
    """The declared tensors under prefix + name, with numbers in the place of the sizes' names."""
    return {
        prefix + name: Spec(spec.dtype, tuple(sizes[size] for size in spec.shape), spec.rule)
        for name, spec in declared.items()
    }


def check_tensors(specs: Specs, tensors: Mapping[str, Tensor]) -> None:
    """Names, types, shapes and values.

    Raises: Violation naming the tensor, the rule and the value.
    """
    names = sorted(set(specs) ^ set(tensors))
    require(not names, "tensors must be those that the settings imply", names)
    for name, spec in specs.items():
        tensor = tensors[name]
        is_right = tensor.dtype == DTYPES[spec.dtype] and tensor.shape == tuple(spec.shape)
        stored = f"{tensor.dtype} {list(tensor.shape)}"
        require(is_right, f"{name} must be {spec.dtype} {list(spec.shape)}", stored)
        measure, holds = RULES[spec.rule]
        values = measure(tensor)
        wrong = (~holds(values)).nonzero()[:1].tolist()
        if wrong:
            raise Violation(f"{name}{wrong[0]} must be {spec.rule}", values[tuple(wrong[0])].item())
