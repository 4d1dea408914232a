"""The checks, fakes and FLOP formulas of every operator, as the dispatcher runs them here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lraee import ops
from lraee.ops import BlockOperands, Norm, PackedLinear, ProbeHead, registry
from tests.support import assert_same, generator, quantized_linear

Call = Callable[..., Any]


def _linear_arguments(M: int = 5, N: int = 18, K: int = 30) -> tuple[list[Any], dict[str, Any]]:
    case = quantized_linear(M, N, K)
    w, w_sum = ops.pack_weight(case["w_q"])
    linear = PackedLinear(w, case["w_scale"], w_sum, case["bias"], case["layer_scale"])
    positional = [case["x_q"], case["x_scale"], case["x_zero"], linear]
    options = {"residual": case["residual"], "activation": "gelu", "out_dtype": torch.float32}
    return positional, options


def _linear(N: int, K: int, source: torch.Generator, scale: Tensor | None = None) -> PackedLinear:
    w_q = torch.randint(-127, 128, (N, K), generator=source, dtype=torch.int8)
    w, w_sum = ops.pack_weight(w_q)
    w_scale, bias = (torch.rand(N, generator=source) * 0.01 for _ in range(2))
    return PackedLinear(w, w_scale, w_sum, bias, scale)


def _probe_arguments(two_layers: bool = True, has_class_token: bool = False) -> list[Any]:
    source = generator(7)
    B, L, D, H, E, K = 3, 6, 20, 16, 12, 5
    P = 2 * D if has_class_token else D
    first = _linear(H if two_layers else E, P, source)
    second = _linear(E, H, source) if two_layers else None
    classes = F.normalize(torch.randn(K, E, generator=source), dim=1)
    norm = Norm(torch.ones(P), torch.zeros(P))
    head = ProbeHead(norm, first, second, classes, 10.0, torch.ones(4))
    return [torch.randn(B, L, D, generator=source), head]


def _block_arguments() -> list[Any]:
    source = generator(8)
    B, L, D, hidden = 2, 5, 32, 48
    norm = Norm(torch.ones(D), torch.zeros(D))
    scale = torch.rand(D, generator=source)
    block = BlockOperands(
        norm, _linear(3 * D, D, source), _linear(D, D, source, scale),
        norm, _linear(hidden, D, source), _linear(D, hidden, source), num_heads=2,
    )  # fmt: skip
    return [torch.randn(B, L, D, generator=source), block]


def _masked_arguments() -> list[Any]:
    """RMSNorm and a key mask."""
    x, block = _block_arguments()
    norm = Norm(torch.ones(32), None)
    return [x, block._replace(norm_1=norm, key_mask=x[:, :, 0] > -1)]


def _cases() -> dict[str, tuple[Call, list[Any], dict[str, Any]]]:
    source = generator(6)
    x = torch.randn(5, 30, generator=source)
    qkv = torch.randn(2, 7, 48, generator=source)
    w_q = torch.randint(-127, 128, (18, 30), generator=source, dtype=torch.int8)
    rope = torch.randn(2, 6, 8, generator=source)
    return {
        "quantize_rows": (ops.quantize_rows, [x], {"symmetric": False}),
        "quantize_rows_strided": (ops.quantize_rows, [x.T], {"symmetric": True}),
        "quantize_rows_empty": (ops.quantize_rows, [x[:0]], {"symmetric": True}),
        "layer_norm_quantize": (
            ops.layer_norm_quantize, [x.bfloat16(), torch.ones(30), x[0]], {"symmetric": False},
        ),
        "pack_weight": (ops.pack_weight, [w_q], {}),
        "unpack_weight": (ops.unpack_weight, [ops.pack_weight(w_q)[0], 18, 30], {}),
        "int8_linear": (ops.int8_linear, *_linear_arguments()),
        "int8_block": (ops.int8_block, _block_arguments(), {}),
        "int8_linear_empty": (ops.int8_linear, *_linear_arguments(M=0)),
        "float_linear": (ops.float_linear, [x, x, x[:, 0]], {}),
        "float_linear_column_major": (ops.float_linear, [x, x.T.contiguous().T], {}),
        "int8_attention": (ops.int8_attention, [qkv], {"num_heads": 2}),
        "int8_attention_causal": (ops.int8_attention, [qkv], {"num_heads": 2, "causal": True}),
        "int8_attention_rope": (
            ops.int8_attention, [qkv], {"num_heads": 2, "rope": rope, "key_mask": qkv[:, :, 0] > 0},
        ),
        "float_attention": (ops.float_attention, [qkv], {"num_heads": 2}),
        "float_attention_rope": (
            ops.float_attention, [qkv],
            {"num_heads": 2, "causal": True, "rope": rope, "key_mask": qkv[:, :, 0] > 0},
        ),
        "layer_norm_quantize_rms": (
            ops.layer_norm_quantize, [x, torch.ones(30), None], {"symmetric": True},
        ),
        "gated_quantize": (ops.gated_quantize, [x], {}),
        "gated_quantize_norm": (
            ops.gated_quantize, [x.half()],
            {"activation": "gelu", "norm": Norm(torch.ones(15), None, 1e-6)},
        ),
        "int8_block_masked": (ops.int8_block, _masked_arguments(), {}),
        "exit_probe": (ops.exit_probe, _probe_arguments(), {}),
        "exit_probe_affine": (ops.exit_probe, _probe_arguments(two_layers=False), {}),
        "exit_probe_class_token": (ops.exit_probe, _probe_arguments(has_class_token=True), {}),
        "exit_probe_affine_class_token": (ops.exit_probe, _probe_arguments(False, True), {}),
    }  # fmt: skip


CASES = _cases()


def test_every_operator_has_a_case() -> None:
    assert {name for name in registry.OPERATORS if name in CASES} == set(registry.OPERATORS)


def _operator_calls(call: Call, arguments: list[Any], options: dict[str, Any]) -> Any:
    """The arguments with which a public function calls its operator."""
    calls = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__module__", "").startswith("torch._ops"):
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        call(*arguments, **options)
    ((operator, args, kwargs),) = calls
    return getattr(operator, "default", operator), args, kwargs


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    operator, args, kwargs = _operator_calls(*CASES[name])
    outcome = torch.library.opcheck(operator, args, kwargs)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_to_the_same_bits(name: str, dynamic: bool) -> None:
    call, arguments, options = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager, again = call(*arguments, **options), compiled(*arguments, **options)
    if isinstance(eager, Tensor):
        eager, again = (eager,), (again,)
    for expected, actual in zip(eager, again, strict=True):
        assert_same(actual, expected, name=name)


@pytest.mark.parametrize("name", CASES)
def test_fake_agrees_with_the_result(name: str) -> None:
    operator, args, kwargs = _operator_calls(*CASES[name])
    outputs = operator(*args, **kwargs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_options = dict(zip(kwargs, _faked(mode, kwargs.values()), strict=True))
        fakes = operator(*_faked(mode, args), **fake_options)
    outputs, fakes = ((o,) if isinstance(o, Tensor) else o for o in (outputs, fakes))
    for output, fake in zip(outputs, fakes, strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (output.shape, output.dtype, output.device)
        assert fake.stride() == output.stride()


def _faked(mode: Any, values: Any) -> list[Any]:
    return [tree_map_only(Tensor, mode.from_tensor, value) for value in values]


def test_pack_and_unpack_are_inverse() -> None:
    for N, K in ((1, 1), (16, 4), (17, 5), (33, 130), (5, 0), (0, 5)):
        w_q = torch.randint(-128, 128, (N, K), generator=generator(8), dtype=torch.int8)
        w, w_sum = ops.pack_weight(w_q)
        assert_same(ops.unpack_weight(w, N, K), w_q, N=N, K=K)
        assert_same(w_sum, w_q.sum(1, dtype=torch.int32), N=N, K=K)


def test_flops_are_two_for_each_multiply_add() -> None:
    expected = {
        "int8_linear": 2 * 5 * 18 * 30,
        "int8_attention": 2 * 2 * (2 * 7 * 7 * 16),
        "int8_block": 2 * 2 * 5 * 32 * (4 * 32 + 2 * 48) + 2 * 2 * (2 * 5 * 5 * 32),
        "int8_attention_rope": 2 * 2 * (2 * 7 * 7 * 16),
        "float_attention": 2 * 2 * (2 * 7 * 7 * 16),
        "gated_quantize": 0,
        "exit_probe": 2 * 3 * (20 * 16 + 16 * 12 + 5 * 12),
        "exit_probe_affine": 2 * 3 * (20 * 12 + 5 * 12),
        "exit_probe_class_token": 2 * 3 * (40 * 16 + 16 * 12 + 5 * 12),
        "exit_probe_affine_class_token": 2 * 3 * (40 * 12 + 5 * 12),
        "float_linear": 2 * 5 * 5 * 30,
        "quantize_rows": 0,
    }
    for name, flops in expected.items():
        call, arguments, options = CASES[name]
        with FlopCounterMode(display=False) as counter:
            call(*arguments, **options)
        assert counter.get_total_flops() == flops, name


def _errors() -> list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]]:
    """Operator, replaced positional arguments by index, replaced options, error, its message."""
    linear, block, head = (
        CASES[name][1][at]
        for name, at in (("int8_linear", 3), ("int8_block", 1), ("exit_probe", 1))
    )
    foreign = torch.zeros(7, 7, dtype=torch.int8)

    def norm(*sizes: int) -> dict[str, Norm]:
        return {"norm": Norm(*(torch.ones(size) for size in sizes))}

    return [
        ("quantize_rows", {0: torch.zeros(3)}, {}, ValueError, r"quantize_rows: x must have 2 dim"),
        ("quantize_rows", {0: torch.zeros(3, 3, dtype=torch.int32)}, {}, TypeError,
         r"quantize_rows: x must be float32 or bfloat16 or float16, got int32"),
        ("layer_norm_quantize", {1: torch.ones(29)}, {}, ValueError,
         r"layer_norm_quantize: gamma must have shape \[30\], got \[29\]"),
        ("layer_norm_quantize", {2: torch.ones(30).double()}, {}, TypeError,
         r"layer_norm_quantize: beta must be float32, got float64"),
        ("pack_weight", {0: torch.zeros(3, 3)}, {}, TypeError, r"pack_weight: w_q must be int8"),
        ("pack_weight", {0: torch.zeros(3, dtype=torch.int8)}, {}, ValueError,
         r"pack_weight: w_q must have shape \[N, K\], got \[3\]"),
        ("pack_weight", {0: torch.zeros(1, 65_794, dtype=torch.int8)}, {}, ValueError,
         r"pack_weight: K must be at most 65793"),
        ("unpack_weight", {1: 40}, {}, ValueError, r"unpack_weight: w must have the cpu layout"),
        ("int8_linear", {1: torch.ones(1)}, {}, ValueError,
         r"int8_linear: x_scale must have shape \[5\], got \[1\]"),
        ("int8_linear", {0: torch.zeros(5, 30)}, {}, TypeError, r"int8_linear: x_q must be int8"),
        ("int8_linear", {0: torch.zeros(30, 5, dtype=torch.int8).T}, {}, ValueError,
         r"int8_linear: x_q must have contiguous rows"),
        ("int8_linear", {2: torch.zeros(5)}, {}, TypeError, r"int8_linear: x_zero must be int32"),
        ("int8_linear", {3: linear._replace(w=foreign)}, {}, ValueError,
         r"int8_linear: w must have the cpu layout .* of \[N, K\] = \[18, 30\], got \[7, 7\]"),
        ("int8_linear", {3: linear._replace(w_scale=torch.ones(18, 1))}, {}, ValueError,
         r"int8_linear: w_scale must have"),
        ("int8_linear", {3: linear._replace(bias=torch.ones(17))}, {}, ValueError,
         r"int8_linear: bias must have shape"),
        ("int8_linear", {}, {"residual": torch.zeros(5, 17)}, ValueError, r"residual must have"),
        ("int8_linear", {}, {"residual": torch.zeros(5, 18).half()}, TypeError,
         r"int8_linear: residual must be float32, got float16"),
        ("int8_linear", {}, {"activation": "relu"}, ValueError,
         r"activation must be one of none, gelu, gelu_tanh, quick_gelu, got 'relu'"),
        ("int8_linear", {}, {"out_dtype": torch.float64}, TypeError, r"out_dtype must be float32"),
        ("int8_linear", {3: linear._replace(w_scale=torch.ones(18, device="meta"))}, {}, ValueError,
         r"int8_linear: w_scale must be on cpu like the input, got meta"),
        ("float_linear", {0: torch.zeros(5, 30).half()}, {}, TypeError, r"x must be float32"),
        ("float_linear", {1: torch.zeros(5, 29)}, {}, ValueError,
         r"float_linear: w must have shape \[5, 30\], got \[5, 29\]"),
        ("float_linear", {0: torch.zeros(5)}, {}, ValueError, r"x and w must have shapes"),
        ("float_linear", {2: torch.ones(4)}, {}, ValueError,
         r"float_linear: bias must have shape \[5\], got \[4\]"),
        ("int8_attention", {0: torch.zeros(2, 7, 50)}, {}, ValueError,
         r"int8_attention: qkv must have a last size of 3 \* num_heads \* d"),
        ("int8_attention", {}, {"num_heads": 0}, ValueError, r"num_heads = 0"),
        ("float_attention", {}, {"num_heads": 3}, ValueError, r"float_attention: .* num_heads = 3"),
        ("int8_attention", {0: torch.zeros(2, 0, 48)}, {}, ValueError, r"at least one token"),
        ("int8_block", {1: block._replace(num_heads=3)}, {}, ValueError,
         r"num_heads = 3, got \[2, 5, 32\]"),
        ("int8_block", {1: block._replace(norm_1=Norm(torch.ones(31), torch.ones(32)))}, {},
         ValueError, r"int8_block: norm_1.gamma must have shape \[32\], got \[31\]"),
        ("int8_block", {1: block._replace(attention="fp8")}, {}, ValueError,
         "int8_block: attention must be int8 or float, got 'fp8'"),
        ("int8_block", {1: block._replace(c_proj=block.in_proj)}, {}, ValueError,
         r"int8_block: c_proj.w_scale must have shape \[32\], got \[96\]"),
        ("int8_block", {1: block._replace(in_proj=block.in_proj._replace(w=foreign))}, {},
         ValueError, r"int8_block: in_proj.w must have the cpu layout"),
        ("int8_block", {1: block._replace(activation="relu")}, {}, ValueError,
         r"activation must be one of none"),
        ("int8_block", {1: block._replace(symmetric=(True,))}, {}, ValueError,
         r"symmetric must have 4 values, got 1"),
        ("int8_attention", {}, {"rope": torch.zeros(2, 8, 8)}, ValueError,
         r"rope must rotate an even number of channels of at most L = 7 tokens"),
        ("int8_attention", {}, {"rope": torch.zeros(2, 6, 6)}, ValueError,
         r"int8_attention: rope must have shape \[2, 6, 8\], got \[2, 6, 6\]"),
        ("int8_attention", {}, {"rope": torch.zeros(2, 6, 8).half()}, TypeError,
         r"rope must be float32"),
        ("int8_attention", {}, {"key_mask": torch.ones(2, 7)}, TypeError, r"key_mask must be bool"),
        ("int8_attention", {}, {"key_mask": torch.ones(2, 6).bool()}, ValueError,
         r"key_mask must have shape \[2, 7\], got \[2, 6\]"),
        ("gated_quantize", {0: torch.zeros(3, 5)}, {}, ValueError, r"x must have shape \[M, 2 H\]"),
        ("gated_quantize", {}, {"activation": "relu"}, ValueError,
         r"gated_quantize: activation must be one of none, silu, gelu"),
        ("gated_quantize", {}, norm(30, 30), ValueError,
         r"gated_quantize: norm.gamma must have shape \[15\], got \[30\]"),
        ("int8_block", {1: block._replace(activation="silu")}, {}, ValueError,
         r"activation must be one of none, gelu, gelu_tanh, quick_gelu, got 'silu'"),
        ("exit_probe", {0: torch.zeros(3, 1, 20)}, {}, ValueError, r"a class token and a patch"),
        ("exit_probe", {1: head._replace(classes=torch.zeros(0, 12))}, {}, ValueError,
         r"classes must have shape"),
        ("exit_probe", {1: head._replace(gate=torch.ones(3))}, {}, ValueError,
         r"gate must have shape \[4\]"),
        ("exit_probe", {1: head._replace(first=head.first._replace(w=foreign))}, {}, ValueError,
         r"exit_probe: first.w must have the cpu layout"),
        ("exit_probe", {1: head._replace(**norm(30, 20))}, {}, ValueError,
         r"exit_probe: gamma must have shape \[D\] or \[2 D\] = \[20\] or \[40\], got \[30\]"),
        ("exit_probe", {1: head._replace(norm=Norm(torch.ones(20, 1), torch.ones(20)))}, {},
         ValueError, r"exit_probe: gamma must have shape .*, got \[20, 1\]"),
        ("exit_probe", {1: head._replace(norm=Norm(torch.ones(20).half(), torch.ones(20)))}, {},
         TypeError, r"exit_probe: gamma must be float32, got float16"),
        ("exit_probe", {1: head._replace(**norm(40, 20))}, {}, ValueError,
         r"exit_probe: beta must have shape \[40\], got \[20\]"),
        ("exit_probe", {1: head._replace(**norm(40, 40))}, {}, ValueError,
         r"exit_probe: first.w must have the cpu layout .* of \[N, K\] = \[16, 40\]"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "replaced", "options", "error", "message"), _errors())
def test_an_error_names_the_argument_the_rule_and_the_value(
    name: str, replaced: dict[int, Any], options: dict[str, Any], error: Any, message: str
) -> None:
    call, arguments, usual = CASES[name]
    arguments = [replaced.get(i, argument) for i, argument in enumerate(arguments)]
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **{**usual, **options})
    assert "\n" not in str(caught.value)
