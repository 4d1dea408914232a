"""Finding, reading and refusing towers; their work counted."""

import open_clip
import pytest
import torch
from torch import nn

import lraee
from lraee.layers.build import build_block
from lraee.layers.int8_attention import Int8Attention, Int8MultiheadAttention
from lraee.layers.int8_block import Int8Block
from lraee.layers.int8_linear import Int8Linear
from lraee.layers.scheme import INT8, Scheme
from lraee.towers import flops
from lraee.towers.families import find_tower, image_size, linear_shapes
from lraee.towers.open_clip import read_block
from lraee.towers.state import tower_hash
from tests.clip_models import VISION, make_images, make_model
from tests.support import assert_same


def test_find_tower():
    model = make_model()
    assert find_tower(model) is model.visual
    assert find_tower(model.visual) is model.visual


def test_the_bare_tower_works_too():
    model = make_model()
    fast = lraee.accelerate(model.visual)
    assert isinstance(fast, type(model.visual))
    images = make_images()
    assert_same(fast(images), lraee.accelerate(model).encode_image(images))
    assert_same(lraee.restore(fast)(images), model.encode_image(images))


def test_non_clip_objects_are_refused():
    for thing in ("ViT-B-32", None, {}):
        with pytest.raises(TypeError, match="model must be a torch module of one of open_clip"):
            lraee.accelerate(thing)
    with pytest.raises(TypeError, match=r"must have an image tower at `.visual`.*, got Linear"):
        lraee.accelerate(nn.Linear(2, 2))


def test_resnet_is_refused():
    model = make_model(vision={"layers": [1, 1, 1, 1], "width": 16, "patch_size": None})
    with pytest.raises(
        NotImplementedError, match=r"VisionTransformer.*, got ModifiedResNet: it is convolutional"
    ):
        lraee.accelerate(model)


def test_convolutions_are_refused():
    visual = open_clip.timm_model.TimmModel("convnext_atto", embed_dim=8, pretrained=False)
    model = make_model()
    model.visual = visual.eval()
    with pytest.raises(NotImplementedError, match=r"got TimmModel \(timm ConvNeXt.*convolutional"):
        lraee.accelerate(model)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"qk_norm": True}, r"attn.ln_k.bias \(option qk_norm\)"),
        ({"scaled_cosine_attn": True}, r"attn.logit_scale \(option scaled_cosine_attn\)"),
        ({"scale_heads": True}, r"attn.head_scale \(option scale_heads\)"),
        ({"scale_attn_inner": True}, r"attn.ln_inner.bias \(option scale_attn_inner\)"),
        ({"scale_attn": True}, r"ln_attn.bias \(option scale_attn\)"),
        ({"scale_fc": True}, r"mlp.ln.bias \(option scale_fc\)"),
    ],
)
def test_options_without_kernels_are_refused(option, part):
    with pytest.raises(
        NotImplementedError, match=rf"visual.transformer.resblocks.0 has {part}, for which INT8"
    ):
        lraee.accelerate(make_model(vision=option))


def _edit(change):
    model = make_model()
    change(model.visual.transformer.resblocks[1])
    return model


def _set(name, module):
    def change(block):
        parent, _, child = name.rpartition(".")
        setattr(block.get_submodule(parent), child, module)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("mlp.gelu", nn.ReLU()), "has ReLU as mlp.gelu, and INT8 knows GELU and QuickGELU"),
        (_set("ln_1", nn.RMSNorm(64)), "has a RMSNorm as ln_1, and INT8 knows LayerNorm"),
        (_set("ln_1_kv", nn.LayerNorm(64)), r"has ln_1_kv.bias \(option cross attention\)"),
        (_set("attn.bias_k", nn.Parameter(torch.ones(1, 1, 64))), "has attn.bias_k, for which"),
        (_set("attn.add_zero_attn", True), "has an attn without num_heads or with add_zero_attn"),
        (_set("drop_path", nn.Sigmoid()), "has drop_path, for which INT8 has no kernel"),
        (_set("ln_2", nn.Identity()), "lacks ln_2.weight, without which INT8 cannot read"),
        (lambda b: b.double(), "has weights of torch.float64"),
        (lambda b: b.mlp.c_fc.weight.data[0, 0].fill_(torch.nan), "has NaN or Inf in mlp.c_fc"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_without_kernels_are_refused_and_left_alone(change, message, inplace):
    model = _edit(change)
    before = [id(m) for m in model.modules()]
    with pytest.raises((NotImplementedError,), match=f"transformer.resblocks.1 {message}"):
        lraee.accelerate(model, inplace=inplace)
    assert before == [id(m) for m in model.modules()]


class MainBranchAttention(nn.Module):
    """A stand-in for attention classes to come: same parameters, sequence first, Dropout inside."""

    def __init__(self, D, H):
        super().__init__()
        self.num_heads = H
        self.batch_first = False
        self.in_proj_weight = nn.Parameter(torch.randn(3 * D, D) / 8)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * D))
        self.attn_drop = nn.Dropout(0.1)
        self.out_proj = nn.Linear(D, D)
        self.q_norm = nn.Identity()


def _int8_block(block: nn.Module) -> Int8Block:
    return build_block(
        block, read_block(block), "resblocks.0",
        scheme=INT8, backend="reference", take=lambda part: part,
    )  # fmt: skip


@torch.no_grad()
def test_blocks_are_read_by_parameters_not_by_class():
    block = make_model(vision={"block_type": "custom"}).visual.transformer.resblocks[0]
    reference_block = _int8_block(block)
    x = torch.randn(2, 5, 64)
    expected = reference_block(x)
    stand_in = MainBranchAttention(64, 4)
    stand_in.load_state_dict(block.attn.state_dict())
    block.attn = stand_in
    result = _int8_block(block)
    assert type(result.attn) is Int8Attention
    assert_same(result(x.transpose(0, 1)).transpose(0, 1), expected)


def test_both_open_clip_layouts_become_the_right_class():
    plain, raw = make_model(), make_model(vision={"block_type": "custom"})
    kinds = [
        type(b.attn) for m in (plain, raw) for b in lraee.accelerate(m).visual.transformer.resblocks
    ]
    assert kinds == [Int8MultiheadAttention] * 3 + [Int8Attention] * 3


def test_child_names_are_kept():
    for vision in ({}, {"block_type": "custom", "ls_init_value": 0.1}):
        model = make_model(vision=vision)
        names = {name for name, _ in model.named_modules()}
        result = {name for name, _ in lraee.accelerate(model).named_modules()}
        added = {f"visual.transformer.resblocks.{i}.attn.in_proj" for i in range(3)}
        dropped = {
            n
            for n in names
            if n.rpartition(".")[2] in ("ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop")
        }
        assert result == (names - dropped) | added


@pytest.mark.parametrize("size", [32, (32, 24), [32, 24]])
def test_image_size(size):
    model = make_model()
    model.visual.image_size = size
    assert image_size(model) == ((32, 32) if isinstance(size, int) else (32, 24))


# Layers kept float


@torch.no_grad()
def test_keep_float():
    model = make_model(vision={"ls_init_value": 0.5})
    kept = ("resblocks.0.attn.in_proj", "resblocks.1.mlp.c_fc", "resblocks.2.attn.out_proj")
    fast = lraee.accelerate(model, scheme=Scheme(keep_float=kept))
    transformer = fast.visual.transformer
    for name in kept:
        assert isinstance(transformer.get_submodule(name), nn.Linear)
    assert sum(isinstance(m, Int8Linear) for m in transformer.modules()) == 12 - 3
    block, original = transformer.resblocks[1], model.visual.transformer.resblocks[1]
    assert_same(block.mlp.c_fc.weight, original.mlp.c_fc.weight)
    assert block.mlp.c_fc.weight is not original.mlp.c_fc.weight
    all_kept = linear_shapes(model.visual)
    x = make_images()
    scheme = Scheme(keep_float=tuple(all_kept), attention="float")
    float_again = lraee.accelerate(model, scheme=scheme)
    torch.testing.assert_close(float_again.encode_image(x), model.encode_image(x))


def test_keep_float_must_exist():
    with pytest.raises(
        ValueError, match="keep_float must name linears such as .*, got 'resblocks.9"
    ):
        lraee.accelerate(make_model(), scheme=Scheme(keep_float=("resblocks.9.mlp.c_fc",)))


# Work


def test_share_of_vit_b_32():
    """97 % in int8 operators; the rest is the patch embedding. 8.8176 GFLOP in all."""
    with torch.device("meta"):
        tower = open_clip.create_model("ViT-B-32", device="meta").visual
    blocks = 12 * 50 * 12 * 768 * 768
    attention = 12 * 2 * 50 * 50 * 768
    macs = flops.count_macs(tower)
    assert (macs.linear, macs.attention) == (0, 0)
    assert macs.total == blocks + attention + 49 * 768 * 3072 + 768 * 512
    assert round(2 * macs.total / 1e9, 4) == 8.8176
    assert (blocks + attention) / macs.total > 0.97


@pytest.mark.parametrize(
    "vision",
    [{}, {"attentional_pool": True}, {"attentional_pool": "cascade"}, {"pool_type": "none"}],
)
def test_macs_of_an_accelerated_tower(vision):
    model = make_model(vision=vision)
    L, D = 17, VISION["width"]
    linear = 3 * L * 12 * D * D
    attention = 3 * 2 * L * L * D
    macs = flops.count_macs(lraee.accelerate(model).visual)
    assert (macs.linear, macs.attention) == (linear, attention)
    assert macs.total == flops.count_macs(model.visual).total
    assert macs.share == (linear + attention) / macs.total
    assert macs.integer_share == (linear + attention / 2) / macs.total


@torch.no_grad()
def test_macs_agree_with_torch():
    from torch.utils.flop_counter import FlopCounterMode

    for vision in ({}, {"pool_type": "none"}):
        # custom: nn.MultiheadAttention has a fast path that torch does not count
        model = make_model(vision={"block_type": "custom", **vision})
        with FlopCounterMode(display=False) as counter:
            model.visual(make_images(1))
        assert counter.get_total_flops() == 2 * flops.count_macs(model.visual).total


# Hash


def test_hash_sees_every_bit_name_type_and_shape():
    state = {"a": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    before = tower_hash(state)
    assert before == tower_hash(dict(reversed(state.items())))
    changes = [
        {**state, "a": torch.ones(2, 3).nextafter(torch.tensor(2.0))},
        {**state, "a": torch.ones(3, 2)},
        {**state, "a": torch.ones(2, 3).to(torch.int32).view(torch.float32)},
        {**state, "b": torch.zeros(3, dtype=torch.float16)},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
    ]
    assert len({before, *(tower_hash(s) for s in changes)}) == 1 + len(changes)
