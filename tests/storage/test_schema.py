"""Kinds of JSON values and of tensors: what they take, what they make of it, what they say."""

import math
from typing import Any

import pytest
import torch

from lraee.layers.scheme import Scheme
from lraee.storage.files import Violation
from lraee.storage.schema import (
    MAX_FLOAT32,
    NAME,
    STRING,
    Items,
    Kind,
    Nullable,
    Record,
    Scalar,
    Spec,
    Table,
    check,
    check_tensors,
    choice,
    free,
    integer,
    options,
    real,
    sized,
)  # fmt: skip

THRESHOLD = Scalar("a number", lambda v: type(v) is float or v == "inf", build=float)
RIGHT: list[tuple[Kind, Any, Any]] = [
    (integer(1, 3), 3, 3),
    (real(), -MAX_FLOAT32, -MAX_FLOAT32),
    (real(0.0), 0.0, 0.0),
    (choice("a", "b"), "b", "b"),
    (NAME, "b = 0.5", "b = 0.5"),
    (THRESHOLD, "inf", math.inf),
    (Nullable(STRING), None, None),
    (Items(Items(integer(0, 9), 2, 2)), [[1, 2]], ((1, 2),)),
    (Items(STRING, build=list), ["a"], ["a"]),
    (Table(STRING), {"x": "y"}, {"x": "y"}),
    (Record({"a": STRING}, since={"a": "old"}), {}, {"a": "old"}),
    (Record({"re": real(), "im": real()}, lambda re, im: re + im), {"re": 1.0, "im": 2.0}, 3.0),
    (options(Scheme(), {"patch_embedding": "float"}), {
        "weights": "tensor", "activations": "batch", "attention": "float", "symmetric": ["c_fc"],
        "clip_weights": True, "keep_float": [],
    }, Scheme("tensor", "batch", "float", symmetric=("c_fc",), clip_weights=True)),
    (free(20, 2), {"x": [1]}, {"x": [1]}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(RIGHT)))
def test_right_values(case: int) -> None:
    kind, value, expected = RIGHT[case]
    result = check(kind, value, "field")
    assert result == expected and type(result) is type(expected)


WRONG: list[tuple[Kind, Any, str]] = [
    (integer(1, 3), True, "f must be an integer from 1 to 3, got True"),
    (integer(1, 3), 4, "f must be an integer from 1 to 3, got 4"),
    (real(), 1, "f must be a finite float32 number, got 1"),
    (real(), math.nan, "f must be a finite float32 number, got nan"),
    (real(0.0), -0.5, "f must be a finite float32 number of at least 0, got -0.5"),
    (real(above=0.0), 0.0, "f must be a finite float32 number above 0, got 0.0"),
    (choice("a", "b"), ["a"], "f must be one of a, b, got ['a']"),
    (Items(integer(0, 9), 1, 2), [0, -1], "f[1] must be an integer from 0 to 9, got -1"),
    (Table(STRING), {"a\n": ""}, "the name of one of f must be 1 to 64 printable ASCII"),
    (Table(Record({"a": STRING})), {"x": {"a": 1}}, "f.x.a must be a string, got 1"),
    (Record({"a": STRING}), {"b": 1}, "f must have the key a, got ['b']"),
    (Record({}, since={}), {"b": 1}, "f must have no key but its own, got ['b']"),
    (free(20, 2), {"x": [[1]]}, "f must be an object of at most 2 levels and 20 bytes"),
    (free(20, 2), {"x": "y" * 20}, "f must be an object of at most 2 levels and 20 bytes"),
    (options(Scheme(), {}), {**vars(Scheme()), "weights": "x"}, "f.symmetric must be a list"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_values_are_named(case: int) -> None:
    kind, value, message = WRONG[case]
    with pytest.raises(Violation) as caught:
        check(kind, value, "f")
    assert str(caught.value).startswith(message)


def test_tensors_are_declared_by_sizes_with_names() -> None:
    declared = {"w_q": Spec("I8", "NK"), "w_scale": Spec("F32", "N", "finite and above 0")}
    specs = sized("x.", declared, {"N": 2, "K": 3})
    assert specs["x.w_q"].shape == (2, 3) and specs["x.w_q"].size_bytes == 6
    assert specs["x.w_scale"].size_bytes == 8
    tensors = {"x.w_q": torch.zeros(2, 3, dtype=torch.int8), "x.w_scale": torch.ones(2)}
    check_tensors(specs, tensors)
    for name, tensor, message in (
        ("x.w_q", torch.zeros(2, 3), r"x.w_q must be I8 \[2, 3\], got 'torch.float32 \[2, 3\]'"),
        ("x.w_scale", -torch.ones(2), r"x.w_scale\[0\] must be finite and above 0, got -1"),
        ("y", torch.ones(1), r"tensors must be those that the settings imply, got \['y'\]"),
    ):  # fmt: skip
        with pytest.raises(Violation, match=f"^{message}"):
            check_tensors(specs, {**tensors, name: tensor})
