"""File formats as data: kinds of JSON values, kinds of tensors, and the one validator of both."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lraee.storage.files import Violation, require
from lraee.storage.json import render

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_UNIT_ERROR = 1e-3
_MOST = 1 << 20

# Kinds of JSON values

Kind = Callable[[Any, str], Any]
"""A value and the name of its field -> what is built of it; a ValueError names field, rule, value.

The kinds below say what they take; `build` is called with what was checked.
"""


def scalar(
    rule: str, holds: Callable[[Any], bool], build: Callable[[Any], Any] = lambda value: value
) -> Kind:
    """One value: what it must be, in words and as a test."""

    def check(value: Any, where: str) -> Any:
        require(holds(value), f"{where} must be {rule}", value)
        return build(value)

    return check


def items(of: Kind, least: int = 0, most: int = _MOST, build: Callable[..., Any] = tuple) -> Kind:
    """A list of `least` to `most` values of one kind."""

    def check(value: Any, where: str) -> Any:
        _require_size(value, list, least, most, f"{where} must be a list")
        return build(of(each, f"{where}[{i}]") for i, each in enumerate(value))

    return check


def table(of: Kind, least: int = 0, most: int = _MOST) -> Kind:
    """An object of `least` to `most` values of one kind, its keys names of 1 to 64 characters."""

    def check(value: Any, where: str) -> Any:
        _require_size(value, dict, least, most, f"{where} must be an object")
        names = [NAME(name, f"the name of one of {where}") for name in value]
        return {name: of(value[name], f"{where}.{name}") for name in names}

    return check


def _require_size(value: Any, kind: type[Any], least: int, most: int, rule: str) -> None:
    is_right = type(value) is kind and least <= len(value) <= most
    require(is_right, f"{rule} of {least} to {most}", value)


def nullable(of: Kind) -> Kind:
    """Null, or a value of this kind."""
    return lambda value, where: None if value is None else of(value, where)


def record(
    fields: Mapping[str, Kind],
    build: Callable[..., Any] = dict,
    since: Mapping[str, Any] | None = None,
) -> Kind:
    """An object with exactly these fields, from which `build` is called by name.

    Args:
      fields: kind of each.
      build: its ValueError refuses the file.
      since: values of fields that older files lack.
    """

    def check(value: Any, where: str) -> Any:
        name, prefix = (where, f"{where}.") if where else ("the object", "")
        require(type(value) is dict, f"{name} must be an object", value)
        value = {**(since or {}), **value}
        for key in fields:
            require(key in value, f"{name} must have the key {key}", sorted(value))
        unknown = sorted(set(value) - set(fields))
        require(not unknown, f"{name} must have no key but its own", unknown)
        checked = {key: of(value[key], prefix + key) for key, of in fields.items()}
        try:
            return build(**checked)
        except Violation:
            raise
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return check


def integer(least: int, most: int) -> Kind:
    """An integer in this range, no flag and no float."""
    rule = f"an integer from {least} to {most}"
    return scalar(rule, lambda value: type(value) is int and least <= value <= most)


def real(least: float = -MAX_FLOAT32, *, above: float = -math.inf) -> Kind:
    """A float that is finite in float32, at least `least` and above `above`; no integer."""
    bound = f" above {above:g}" if above > least else f" of at least {least:g}"
    rule = "a finite float32 number" + bound * (max(above, least) > -MAX_FLOAT32)
    return scalar(rule, lambda v: type(v) is float and v > above and least <= v <= MAX_FLOAT32)


def choice(*choices: str) -> Kind:
    """One of these strings."""
    rule = f"one of {', '.join(choices)}"
    return scalar(rule, lambda value: type(value) is str and value in choices)


def free(size_bytes: int, levels: int) -> Kind:
    """Any object of at most this size and depth, from which nothing is computed."""
    return scalar(
        f"an object of at most {levels} levels and {size_bytes} bytes",
        lambda v: type(v) is dict and _is_flat(v, levels) and len(render(v)) <= size_bytes,
    )


def options(defaults: Any, since: Mapping[str, Any]) -> Kind:
    """The record of a dataclass of strings, flags and tuples of strings."""
    kinds: dict[type, Kind] = {str: STRING, bool: FLAG, tuple: items(STRING)}
    fields = {name: kinds[type(value)] for name, value in vars(defaults).items()}
    return record(fields, type(defaults), since)


def is_digest(value: object) -> bool:
    """Whether it is a sha256 in hexadecimal digits."""
    return type(value) is str and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_flat(value: Any, levels: int) -> bool:
    """Whether it nests at most so deep."""
    if type(value) not in (dict, list):
        return True
    inside = value.values() if type(value) is dict else value
    return levels > 0 and all(_is_flat(part, levels - 1) for part in inside)


STRING = scalar("a string", lambda value: type(value) is str)
FLAG = scalar("true or false", lambda value: type(value) is bool)
DIGEST = scalar("64 hexadecimal digits", is_digest)
NAME = scalar(
    "1 to 64 printable ASCII characters",
    lambda v: type(v) is str and v.isascii() and v.isprintable() and 1 <= len(v) <= 64,
)

# Tensors

DTYPES = {torch.int8: "I8", torch.float32: "F32"}
"""Their names in safetensors."""

RULES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "finite": (lambda t: t, torch.isfinite),
    "finite and above 0": (lambda t: t, lambda t: (t > 0) & t.isfinite()),
    "rows of length 1": (lambda t: t.double().norm(dim=1), lambda n: (n - 1).abs() <= _UNIT_ERROR),
}
"""What is measured of a tensor, and where that is right."""


class Spec(NamedTuple):
    """A tensor: type, shape, and a rule on its values; a declaration gives its sizes by name."""

    dtype: torch.dtype
    shape: Sequence[Any]
    rule: str = "finite"

    @property
    def size_bytes(self) -> int:
        """Of its numbers."""
        return self.dtype.itemsize * int(math.prod(self.shape))


Specs = dict[str, Spec]


def sized(prefix: str, declared: Specs, sizes: Mapping[str, int]) -> Specs:
    """The declared tensors under prefix + name, with numbers in the place of the sizes' names."""
    return {
        prefix + name: spec._replace(shape=tuple(sizes[size] for size in spec.shape))
        for name, spec in declared.items()
    }


def listed(tensors: Mapping[str, Spec | Tensor]) -> dict[str, Any]:
    """Type and shape of each, as a config lists them."""
    return {
        name: [DTYPES.get(each.dtype, str(each.dtype)), list(each.shape)]
        for name, each in tensors.items()
    }


def header(specs: Specs, names: Iterable[str]) -> dict[str, Any]:
    """What safetensors lists of these tensors, one behind the other in this order."""
    end, entries = 0, {}
    for name in names:
        start, end = end, end + specs[name].size_bytes
        dtype, shape = DTYPES[specs[name].dtype], list(specs[name].shape)
        entries[name] = {"data_offsets": [start, end], "dtype": dtype, "shape": shape}
    return entries


def require_same(where: str, value: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises Violation on the first name at which the two are not the same JSON."""
    for name in sorted({*value, *expected}):
        is_same = name in value and name in expected
        is_same = is_same and render(value[name]) == render(expected[name])
        own = expected.get(name, "absent")
        rule = f"{where} must be those of the model and the settings, {name} {own}"
        require(is_same, rule, value.get(name))


def check_tensors(specs: Specs, tensors: Mapping[str, Tensor]) -> None:
    """Names, types, shapes and values.

    Raises: Violation naming the tensor, the rule and the value.
    """
    require_same("tensors", listed(tensors), listed(specs))
    for name, spec in specs.items():
        measure, holds = RULES[spec.rule]
        values = measure(tensors[name])
        wrong = (~holds(values)).nonzero()[:1].tolist()
        if wrong:
            raise Violation(f"{name}{wrong[0]} must be {spec.rule}", values[tuple(wrong[0])].item())
