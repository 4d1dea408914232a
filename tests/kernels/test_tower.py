"""A whole small tower through the Triton launchers in the interpreter, each call held to the
definition on the same inputs, and the result to the plain-torch tower.
"""

import importlib
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lraee
from lraee.kernels import register
from lraee.ops import backend, reference
from lraee.ops import error_bounds as bounds
from lraee.ops.reference import block
from tests.clip_models import make_images, make_model
from tests.support import EPS32, HALF_STEP, assert_same, assert_within

NO_KERNEL = ("pack_weight", "unpack_weight")
ONE_BY_ONE = [name for name in register.LAUNCHERS if name != "int8_block"]


def bound_of(name: str, dtype: torch.dtype, expected: Tensor, options: dict[str, Any]) -> float:
    """int8_linear without activation: the same bits. Else 128 units of float32 and one rounding.

    Outputs of these small layers are sums of fewer than 128 terms, so neither exp, erf nor the
    order of P @ V errs by more units than that of the largest of them.
    """
    if name == "int8_linear" and options.get("activation", "none") == "none":
        return 0.0
    step = 0.0 if dtype == torch.float32 else 2 * HALF_STEP[dtype]
    return (128 * EPS32 + step) * (1.0 + float(expected.abs().max()))


def checked(name: str, calls: Counter[str]) -> Any:
    """The launcher of this name, which also asks the definition and compares."""
    definition = getattr(reference, name)
    launcher = register.implementation(name, definition)

    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        actual = launcher(*arguments, **options)
        expected = definition(*arguments, **options)
        if isinstance(actual, Tensor):
            bound: float | Tensor = bound_of(name, actual.dtype, expected, options)
            if name == "float_linear":
                bound = bounds.of_float_linear(*arguments)
            assert_within(actual, expected, bound, name=name, call=calls[name])
        else:
            for value, wanted in zip(actual, expected, strict=True):
                assert_same(value, wanted, name=name, call=calls[name])
        return actual

    return call


@pytest.mark.parametrize(
    "options",
    [
        {"quick_gelu": True},
        {"vision": {"ls_init_value": 0.3}},
        {"vision": {"act_kwargs": {"approximate": "tanh"}}},
        {"quick_gelu": True, "attention": "float_attention"},
    ],
    ids=["quick_gelu", "gelu_layer_scale", "gelu_tanh", "as_on_a_gpu"],
)
def test_tower(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {"layers": 2, **options.pop("vision", {})}
    attention = options.pop("attention", "int8_attention")
    if attention == "float_attention":
        name = "lraee.layers.int8_attention.attention_on"
        monkeypatch.setattr(name, lambda kind, device: "float")
    model = make_model(vision=vision, **options)
    fast: Any = lraee.accelerate(model, backend="reference")
    images = make_images(1)
    expected = fast.encode_image(images)

    calls: Counter[str] = Counter()
    launchers = SimpleNamespace(
        **{name: checked(name, calls) for name in ONE_BY_ONE},
        **{name: getattr(reference, name) for name in NO_KERNEL},
    )
    launchers.int8_block = partial(block.int8_block, operators=launchers)
    for module in (
        "layers.int8_linear",
        "layers.int8_block",
        "layers.scheme",
        "layers.batch_invariant",
    ):
        name = f"lraee.{module}"
        monkeypatch.setattr(importlib.import_module(name), "operators", lambda backend: launchers)
    assert backend.operators("reference") is not launchers  # only the callers were turned
    actual = fast.encode_image(images)

    # Per block: two norms, four linears, one attention, and the inputs of out and fc2
    assert calls == {
        "layer_norm_quantize": 4,
        "int8_linear": 8,
        attention: 2,
        "quantize_rows": 4,
        "float_linear": 2,  # patch embedding and projection
    }
    # One value next to a tie may fall to the other side after an activation: a step of 1 in 255
    cosine = torch.nn.functional.cosine_similarity(actual, expected)
    assert (cosine > 1 - 1e-4).all(), cosine
