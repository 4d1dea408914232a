"""FLOPs by formula against torch's counter, to the integer, and against the golden numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import lraee
from lraee.towers import flops

SIZES: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"patch_size": 32, "width": 768, "layers": 12, "heads": 12, "output_dim": 512},
    "ViT-B-16": {"patch_size": 16, "width": 768, "layers": 12, "heads": 12, "output_dim": 512},
    "ViT-L-14": {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "output_dim": 768},
}
GOLDEN = {"ViT-B-32": 8_817_623_040, "ViT-B-16": 35_126_906_880, "ViT-L-14": 162_025_537_536}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "avg": {"pool_type": "avg", "final_ln_after_pool": True},
    "none": {"pool_type": "none"},
    "tokens": {"output_tokens": True, "no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.1, "act_layer": nn.SiLU},
    "own attention": {"block_type": "custom"},
    "pooler": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2},
    "pooler, all queries": {
        "attentional_pool": True,
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 2,
        "pool_type": "none",
    },
    "two poolers": {
        "attentional_pool": "parallel",
        "output_dim": 48,  # open_clip's ln_post comes before these pools, and has their width
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 2,
    },
    "two poolers in a row": {
        "attentional_pool": "cascade",
        "output_dim": 48,
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 2,
    },
    "other ratio": {"mlp_ratio": 2.5, "output_dim": 24},
}


def small_tower(**options: Any) -> nn.Module:
    sizes = {
        "image_size": 40, "patch_size": 8, "width": 48, "layers": 3, "heads": 3,
        "mlp_ratio": 4.0, "output_dim": 32,
    }  # fmt: skip
    tower: nn.Module = VisionTransformer(**{**sizes, **options}).eval()
    return tower


def counted(run: Callable[[Tensor], object], images: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(images)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tower_costs_what_torch_counts(name: str) -> None:
    with torch.device("meta"):
        tower = VisionTransformer(image_size=224, mlp_ratio=4.0, **SIZES[name]).eval()
        images = torch.empty(1, 3, 224, 224)
    assert flops.tower_flops(tower) == GOLDEN[name] == counted(tower, images)


def test_golden_numbers_are_those_of_the_literature() -> None:
    assert [round(n / 1e9, 4) for n in GOLDEN.values()] == [8.8176, 35.1269, 162.0255]


def test_block_by_hand() -> None:
    # ViT-B/32: 50 tokens, QKV 3 D^2, out D^2, fc1 and fc2 4 D^2 each; Q K^T and P V L^2 D each
    with torch.device("meta"):
        tower = VisionTransformer(image_size=224, mlp_ratio=4.0, **SIZES["ViT-B-32"])
    assert flops.block_flops(tower) == [2 * (50 * 12 * 768 * 768 + 2 * 50 * 50 * 768)] * 12
    rest = 2 * (49 * 3 * 32 * 32 * 768 + 768 * 512)
    assert flops.tower_flops(tower) == sum(flops.block_flops(tower)) + rest


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_a_tower(options: dict[str, Any]) -> None:
    tower = small_tower(**options)
    for batch in (1, 3):
        images = torch.zeros(batch, 3, 40, 40)
        assert counted(tower, images) == batch * flops.tower_flops(tower)
        meta = tower.to("meta") if batch == 3 else None
    assert meta is not None
    assert counted(meta, torch.zeros(3, 3, 40, 40, device="meta")) == 3 * flops.tower_flops(tower)


def test_counter_sees_both_attentions_of_the_cpu() -> None:
    tower, images = small_tower(), torch.zeros(2, 3, 40, 40)
    # With gradients torch runs its flash attention, without them the fused fast path
    with FlopCounterMode(display=False) as counter:
        tower(images)
    assert counter.get_total_flops() == 2 * flops.tower_flops(tower) == counted(tower, images)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "scheme",
    ["int8", "paper", lraee.Scheme(keep_float=("resblocks.1.mlp.c_proj",), attention="float")],
    ids=["int8", "paper", "kept float"],
)
def test_int8_tower_costs_the_same(scheme: str | lraee.Scheme, backend: Any) -> None:
    tower = small_tower()
    fast = lraee.accelerate(tower, scheme=scheme, backend=backend)
    assert flops.tower_flops(fast) == flops.tower_flops(tower)
    assert flops.block_flops(fast) == flops.block_flops(tower)
    as_run = flops.PartFlops.as_run(fast)
    assert (as_run == flops.PartFlops.of(tower)) == (scheme != "int8")
    if backend == "auto":
        images = torch.zeros(2, 3, 40, 40)
        assert counted(fast, images) == 2 * as_run.total
        fast.transformer.register_forward_hook(lambda *_: None)
        assert counted(fast, images) == 2 * flops.tower_flops(fast)
        block = flops.block_flops(fast)[0]
        z = torch.zeros(2, 26, 48)
        assert counted(fast.transformer.resblocks[0], z) == 2 * block


def test_formulas_are_registered_once() -> None:
    operator = torch.ops.aten._native_multi_head_attention
    first = flop_registry[operator]
    flops._teach("_native_multi_head_attention", lambda *_, **__: 0)
    assert flop_registry[operator] is first
    flops._teach("no_such_operator_of_aten", lambda *_, **__: 0)
