"""Int8Block against the operators written out by hand; masks; hooks; running child by child."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lraee.layers.build import build_block
from lraee.layers.int8_attention import Int8Attention, Int8MultiheadAttention, is_causal
from lraee.layers.scheme import INT8, PAPER, Scheme, quantize_weight
from lraee.ops import PackedLinear, reference
from lraee.towers.families import blocks_of
from lraee.towers.open_clip import read_block
from tests.clip_models import VARIANTS, make_model
from tests.support import assert_same, assert_within

BLOCKS = ["plain", "quick_gelu", "gelu_tanh", "raw_in_proj", "layer_scale", "norm_eps", "mlp_ratio"]


def float_block(variant="plain"):
    return blocks_of(make_model(**VARIANTS[variant]).visual)[1]


def int8_block(block, scheme=INT8, backend="reference"):
    return build_block(
        block, read_block(block), "resblocks.1",
        scheme=scheme, backend=backend, take=lambda part: part,
    )  # fmt: skip


def block_by_hand(block, x, *, symmetric=(), causal=False):
    """The fused block, written out on the float block's own parameters."""
    B, L, D = x.shape
    own = dict(block.named_parameters())
    gelu = block.mlp.gelu
    activation = "quick_gelu" if not isinstance(gelu, nn.GELU) else "gelu"
    if isinstance(gelu, nn.GELU) and gelu.approximate == "tanh":
        activation = "gelu_tanh"

    def norm(name, rows, site):
        gamma, beta = own[f"{name}.weight"].float(), own[f"{name}.bias"].float()
        eps = block.get_submodule(name).eps
        return reference.layer_norm_quantize(rows, gamma, beta, eps, site in symmetric)

    def linear(name, x_quantized, layer_scale=None, **epilogue):
        bias = own.get(f"{name}bias")
        w_q, w_scale = quantize_weight(own[f"{name}weight"], INT8)
        bias = None if bias is None else bias.float()
        w_sum = w_q.sum(1, dtype=torch.int32)
        packed = PackedLinear(w_q, w_scale, w_sum, bias, layer_scale)
        return reference.int8_linear(*x_quantized, packed, out_dtype=x.dtype, **epilogue)

    def rows_of(y, site):
        return reference.quantize_rows(y.reshape(B * L, -1), site in symmetric)

    gamma_1 = own["ls_1.gamma"].float() if "ls_1.gamma" in own else None
    gamma_2 = own["ls_2.gamma"].float() if "ls_2.gamma" in own else None
    rows = x.reshape(B * L, D)
    qkv = linear("attn.in_proj_", norm("ln_1", rows, "in_proj"))
    y = reference.int8_attention(qkv.view(B, L, 3 * D), block.attn.num_heads, causal)
    rows = linear(
        "attn.out_proj.", rows_of(y, "out_proj"), residual=rows, layer_scale=gamma_1
    )  # fmt: skip
    y = linear("mlp.c_fc.", norm("ln_2", rows, "c_fc"), activation=activation)
    rows = linear("mlp.c_proj.", rows_of(y, "c_proj"), residual=rows, layer_scale=gamma_2)
    return rows.view(B, L, D)


@pytest.mark.parametrize("variant", BLOCKS)
@torch.no_grad()
def test_fused_block_by_hand(variant):
    block = float_block(variant)
    x = torch.randn(2, 17, 64)
    expected = block_by_hand(block, x)
    assert_same(int8_block(block)(x), expected)
    assert F.cosine_similarity(block(x).flatten(1), expected.flatten(1)).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fused_block_by_hand_in_half_types(dtype):
    block = float_block("layer_scale").to(dtype)
    x = torch.randn(2, 17, 64).to(dtype)
    assert_same(int8_block(block)(x), block_by_hand(block, x))


@torch.no_grad()
def test_fused_block_without_biases():
    block = float_block()
    block.attn.in_proj_bias = block.attn.out_proj.bias = None
    block.mlp.c_fc.bias = block.mlp.c_proj.bias = None
    x = torch.randn(1, 5, 64)
    assert_same(int8_block(block)(x), block_by_hand(block, x))


@torch.no_grad()
def test_symmetric_sites():
    block = float_block()
    x = torch.randn(1, 5, 64)
    for symmetric in (("in_proj",), ("out_proj", "c_fc"), ("c_proj",)):
        scheme = Scheme(symmetric=symmetric)
        assert_same(int8_block(block, scheme)(x), block_by_hand(block, x, symmetric=symmetric))


@pytest.mark.parametrize("variant", ["plain", "raw_in_proj"])
@torch.no_grad()
def test_causal_mask(variant):
    block = float_block(variant)
    x = torch.randn(2, 9, 64)
    mask = torch.full((9, 9), -torch.inf).triu(1)
    expected = block_by_hand(block, x, causal=True)
    assert_same(int8_block(block)(x, attn_mask=mask), expected)
    assert_same(int8_block(block)(x, attn_mask=mask < 0), expected)
    assert (
        F.cosine_similarity(block(x, attn_mask=mask).flatten(1), expected.flatten(1)).min() > 0.999
    )


@torch.no_grad()
def test_sequence_first():
    block = float_block()
    x = torch.randn(2, 9, 64)
    expected = block_by_hand(block, x)
    block.attn.batch_first = False
    fast = int8_block(block)
    assert_same(fast(x.transpose(0, 1)), expected.transpose(0, 1))
    fast.ln_1.register_forward_hook(lambda *_: None)
    result = fast(x.transpose(0, 1)).transpose(0, 1)
    assert_within(result, expected, _step_bound(expected))


def _step_bound(y):
    """The two ways differ by float rounding before a quantizer, which moves a value by one step of
    its row at most: one of about 255 steps over the range, through weights of order 1."""
    return float(y.abs().max()) / 100


@pytest.mark.parametrize("variant", BLOCKS)
@torch.no_grad()
def test_child_by_child_agrees_within_rounding(variant):
    fast = int8_block(float_block(variant))
    x = torch.randn(3, 17, 64)
    fused = fast(x)
    handle = fast.mlp.c_fc.register_forward_hook(lambda *_: None)
    by_child = fast(x)
    assert_within(by_child, fused, _step_bound(fused))
    assert F.cosine_similarity(by_child.flatten(1), fused.flatten(1)).min() > 0.99999
    handle.remove()
    assert_same(fast(x), fused)


@pytest.mark.parametrize("variant", ["plain", "raw_layer_scale"])
@torch.no_grad()
def test_hooks_see_what_they_saw(variant):
    """Each module that open_clip itself calls is called, once, with close inputs and outputs."""
    block = float_block(variant)
    x = torch.randn(2, 17, 64)
    recorded: dict[str, list[torch.Tensor]] = {}

    def watch(root):
        for name, module in root.named_modules():
            module.register_forward_hook(
                lambda _m, args, y, name=name: recorded.setdefault(name, []).extend(
                    [args[0], y[0] if isinstance(y, tuple) else y]
                )
            )

    fast = int8_block(copy.deepcopy(block))
    watch(block)
    block(x)
    float_seen, recorded = recorded, {}
    watch(fast)
    fast(x)
    inside = {f"attn.{part}" for part in ("ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop")}
    for name, tensors in float_seen.items():
        if name in inside:  # identities in eval mode; the int8 attention has none
            continue
        assert len(recorded[name]) == len(tensors) == 2, name
        for actual, expected in zip(recorded[name], tensors, strict=True):
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            assert F.cosine_similarity(actual.flatten(), expected.flatten(), 0) > 0.999, name


@torch.no_grad()
def test_pre_hook_may_change_the_input():
    fast = int8_block(float_block())
    x = torch.randn(1, 5, 64)
    after_attention = x + fast.attn(fast.ln_1(x))[0]
    expected = after_attention + fast.mlp(fast.ln_2(0 * x))
    fast.ln_2.register_forward_pre_hook(lambda _m, args: (args[0] * 0,))
    assert_same(fast(x), expected)


@torch.no_grad()
def test_children_answer_as_open_clip_calls_them():
    multihead, raw = (int8_block(float_block(v)).attn for v in ("plain", "raw_in_proj"))
    assert type(multihead) is Int8MultiheadAttention and type(raw) is Int8Attention
    x = torch.randn(2, 5, 64)
    y, weights = multihead(x, x, x, need_weights=False, attn_mask=None)
    assert weights is None and y.shape == x.shape
    assert_same(Int8Attention.forward(multihead, x), y)
    assert raw(x, attn_mask=None).shape == x.shape


def test_other_attention_is_refused():
    fast = int8_block(float_block())
    x = torch.randn(1, 5, 64)
    for arguments in ({"key": x + 1}, {"key_padding_mask": x}, {"need_weights": True}):
        with pytest.raises(NotImplementedError, match="only self-attention without padding mask"):
            fast.attn(x, **arguments)
    with pytest.raises(NotImplementedError, match="k_x must be None"):
        fast(x, x)


@pytest.mark.parametrize(
    "mask", [torch.zeros(5, 5), torch.full((4, 4), -torch.inf).triu(1), torch.ones(5, 5).bool()]
)
def test_other_masks_are_refused(mask):
    with pytest.raises(NotImplementedError, match=r"attn_mask must be None or the causal mask \[L"):
        int8_block(float_block())(torch.randn(1, 5, 64), attn_mask=mask)


@torch.no_grad()
def test_a_block_reads_what_its_children_hold_now():
    """What was looked up at the first call is where things lie, not what lay there."""
    fast, x = int8_block(float_block("layer_scale")), torch.randn(2, 5, 64)
    fast(x)
    held = [(m, n) for m in fast.modules() for n in (*m._parameters, *m._buffers)]
    held = [(m, n) for m, n in held if getattr(m, n) is not None and n not in ("w", "like")]
    assert len(held) >= 18
    for module, name in held:
        before, old = fast(x), getattr(module, name)
        changed = (2 * old).to(old.dtype)
        setattr(module, name, nn.Parameter(changed) if name in module._parameters else changed)
        assert not torch.equal(fast(x), before), (type(module), name)
        setattr(module, name, old)
        assert_same(fast(x), before)
    fast.ln_1.eps, before = 10.0, fast(x)
    assert not torch.equal(fast(x), before)


@torch.no_grad()
def test_a_block_sees_other_children():
    fast, other, x = int8_block(float_block()), int8_block(float_block()), torch.randn(2, 5, 64)
    before = fast(x)
    other.mlp.c_fc.w_scale *= 2
    fast.mlp.c_fc = other.mlp.c_fc
    changed = fast(x)
    assert not torch.equal(changed, before)
    assert_same(copy.deepcopy(fast)(x), changed)
    fast.ln_2 = nn.LayerNorm(64, eps=10.0)
    assert not torch.equal(fast(x), changed)


@torch.no_grad()
def test_copies_of_a_block_are_on_their_own():
    fast, x = int8_block(float_block()), torch.randn(2, 5, 64)
    before = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(twin(x), before)
        twin.ln_1.bias += 1
        assert not torch.equal(twin(x), before)
        assert_same(fast(x), before)
        seen = []
        twin.mlp.c_proj.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        fast(x)
        assert not seen
        twin(x)
        assert seen


@pytest.mark.parametrize("variant", BLOCKS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@torch.no_grad()
def test_first_token_has_the_bits_of_a_call(variant, backend):
    for is_batch_first in (True, False):
        block = float_block(variant)
        block.attn.batch_first = is_batch_first
        fast = int8_block(block, backend=backend)
        x = torch.randn(3, 17, 64)
        whole = fast(x) if is_batch_first else fast(x.transpose(0, 1)).transpose(0, 1)
        assert fast.gives_first_alone()
        assert_same(fast.first_token(x), whole[:, :1])


def test_first_token_stands_for_no_call_that_a_hook_would_see():
    for name in ("", "ln_1", "attn", "attn.out_proj", "mlp.c_proj"):
        fast = int8_block(float_block())
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            hook = getattr(fast.get_submodule(name), register)(lambda *_: None)
            assert not fast.gives_first_alone(), (name, register)
            hook.remove()
            assert fast.gives_first_alone()
    assert not int8_block(float_block(), PAPER).gives_first_alone()


def test_is_causal():
    assert not is_causal(None, 3)
    assert is_causal(torch.full((3, 3), -torch.inf).triu(1), 3)


@torch.no_grad()
def test_paper_block_is_linears_with_torch_numerics():
    """Float modules around four linears; no fused operator."""
    block = float_block("layer_scale")
    fast = int8_block(block, PAPER)
    x = torch.randn(2, 17, 64)
    y = block.ln_1(x)
    qkv = fast.attn.in_proj(y).view(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(2, 17, 64)
    y = x + block.ls_1(fast.attn.out_proj(y))
    expected = y + block.ls_2(fast.mlp.c_proj(block.mlp.gelu(fast.mlp.c_fc(block.ln_2(y)))))
    assert_same(fast(x), expected)
    assert {m.granularity for m in fast.modules() if hasattr(m, "granularity")} == {"batch_7bit"}


def test_train_is_refused():
    fast = int8_block(float_block())
    with pytest.raises(RuntimeError, match="train: an accelerated tower has int8 weights"):
        fast.train()
    assert not any(m.training for m in fast.modules())
    assert fast.eval() is fast


def test_weight_dtype():
    fast = int8_block(float_block())
    assert fast.get_weight_dtype() == torch.float32
    assert fast.bfloat16().get_weight_dtype() == torch.bfloat16
