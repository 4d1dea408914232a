"""Whole towers: nearer to float than int8, the same bits each time, kept, resumed and refused."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lraee
from lraee.layers.int8_linear import Int8Linear
from lraee.quantization.calibrated import others_of
from lraee.quantization.plain_block import PlainBlock
from lraee.towers.families import blocks_of, encode_image, find_tower, int8_linears
from tests.clip_models import VARIANTS, make_images, make_model, make_texts
from tests.exits.random_exits import make_exits
from tests.sealed_files import resealed
from tests.small_calibration import pictures, small_clip
from tests.support import assert_same

HELD_OUT = 9  # seed of images that no calibration sees


def calibrated(model: nn.Module, images: Any = None, **options: Any) -> nn.Module:
    given = lraee.Calibration(pictures(64) if images is None else images, progress=False)
    return lraee.accelerate(model, calibration=given, **options)


@torch.no_grad()
def error(fast: nn.Module, model: nn.Module, images: Tensor | None = None) -> float:
    images = pictures(60, HELD_OUT) if images is None else images
    expected = encode_image(model, images)
    return float((encode_image(fast, images) - expected).norm() / expected.norm())


def assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert_same(tensor, states[1][name], name=name)
    with torch.no_grad():
        images = make_images(3)
        assert_same(encode_image(actual, images), encode_image(expected, images))


@pytest.mark.parametrize(
    "variant", ["plain", "raw_in_proj", "layer_scale", "quick_gelu", "attentional_pool"]
)
def test_it_is_nearer_to_float_on_images_it_did_not_see(variant: str) -> None:
    torch.manual_seed(0)
    model = make_model(**VARIANTS[variant])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = calibrated(model)
    assert error(fast, model) < 0.8 * error(lraee.accelerate(model), model)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name], name=name)


@pytest.mark.parametrize("family", ["eva02", "pe_core", "aimv2", "vitamin", "dinov3"])
def test_towers_that_are_not_plain(family: str) -> None:
    """Linear by linear; their norms stay."""
    timm_models = pytest.importorskip("tests.towers.timm_models", reason="timm is not installed")
    model = timm_models.make_trunk(family)
    fast = calibrated(model, timm_models.images(64, 3))
    held_out = timm_models.images(60, HELD_OUT)
    assert error(fast, model, held_out) < error(lraee.accelerate(model), model, held_out)
    names = others_of(fast, fast.lraee.scheme)
    assert all(name.endswith(".bias") and "norm" not in name for name in names)


def test_the_same_operators_on_the_same_operands() -> None:
    """What costs time is as in int8: modules, shapes, types, layouts. Numbers alone differ; c_fc
    multiplies its result by a vector.
    """
    model = make_model()
    plain, fast = lraee.accelerate(model), calibrated(model)
    pairs = zip(plain.named_modules(), fast.named_modules(), strict=True)
    for (name, module), (other_name, other) in pairs:
        assert name == other_name and type(module) is type(other)
    for block, other in zip(*(blocks_of(find_tower(m)) for m in (plain, fast)), strict=True):
        operands, others = (b._wired()._operands(False, None, "int8") for b in (block, other))
        assert operands.c_fc.layer_scale is None
        assert others.c_fc.layer_scale.shape == (others.c_fc.N,)
        c_fc = others.c_fc._replace(layer_scale=None)
        assert _form(operands) == _form(others._replace(c_fc=c_fc))


def _form(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.dtype, tuple(part.shape), part.stride()
    return [_form(each) for each in part] if isinstance(part, tuple | list) else part


def test_the_same_images_give_the_same_bits() -> None:
    model, images = make_model(), pictures(64)
    first = calibrated(model, images)
    assert_same_model(calibrated(model, images.split(10)), first)
    assert_same_model(calibrated(copy.deepcopy(model), images, inplace=True), first)
    scheme = first.visual.lraee.scheme
    assert len(scheme.calibration) == 64
    other = calibrated(model, pictures(64, 2)).visual.lraee.scheme
    assert other.calibration != scheme.calibration


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    fast, images = calibrated(small_clip()), pictures(7, HELD_OUT)
    with torch.no_grad():
        whole = fast.encode_image(images)
        for i in range(7):
            assert_same(fast.encode_image(images[i : i + 1])[0], whole[i])


# Kept and brought back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(vision={"layers": 2}).to(dtype)
    fast = calibrated(model)
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    images = make_images(3).to(dtype)
    with torch.no_grad():
        expected = fast.encode_image(images)
        for other in (loaded, pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
            assert_same(other.encode_image(images), expected)
    assert loaded.visual.lraee.scheme == fast.visual.lraee.scheme
    for back in (lraee.restore(fast), lraee.restore(loaded, model)):
        for name, tensor in model.state_dict().items():
            assert_same(back.state_dict()[name], tensor, name=name)


def test_a_text_tower_in_int8_beside_it(tmp_path: Path) -> None:
    model = make_model()
    fast = calibrated(model, text="int8")
    lraee.save(fast, tmp_path)
    loaded = lraee.load(tmp_path, model)
    assert_same_model(loaded, fast)
    with torch.no_grad():
        texts = make_texts()
        expected = lraee.accelerate(model, text="int8").encode_text(texts)
        assert_same(loaded.encode_text(texts), expected)


def test_a_layer_kept_float(tmp_path: Path) -> None:
    model = make_model()
    kept = "resblocks.1.mlp.c_fc"
    fast = calibrated(model, scheme=lraee.Scheme(keep_float=(kept,)))
    assert kept not in int8_linears(fast.visual)
    assert error(fast, model) < error(lraee.accelerate(model), model)
    lraee.save(fast, tmp_path)
    assert_same_model(lraee.load(tmp_path, model), fast)


def test_numbers_of_another_calibration_are_refused(tmp_path: Path) -> None:
    model = make_model()
    lraee.save(calibrated(model), tmp_path)
    path = tmp_path / "lraee.json"
    config = json.loads(path.read_text())
    config["scheme"]["calibration"] = "0" * 64
    path.write_bytes(resealed(config))
    with pytest.raises(lraee.CheckpointError, match="scheme.calibration must be the sha256 of"):
        lraee.load(tmp_path, model)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, value: float) -> None:
    fast = calibrated(make_model(vision={"layers": 1}))
    fast.visual.transformer.resblocks[0].mlp.c_proj.in_scale[3] = value
    with pytest.raises(ValueError, match=r"c_proj\.in_scale\[3\] must be finite and above 0"):
        lraee.save(fast, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_other_schemes_are_saved_as_older_versions_read_them(tmp_path: Path) -> None:
    """Those refuse a calibrated one: its scheme has a key that they do not know."""
    model = make_model()
    lraee.save(lraee.accelerate(model), tmp_path / "int8")
    lraee.save(calibrated(model), tmp_path / "calibrated")
    schemes = [
        json.loads((tmp_path / name / "lraee.json").read_text())["scheme"]
        for name in ("int8", "calibrated")
    ]
    assert set(schemes[1]) - set(schemes[0]) == {"calibration"}


# Exits on top


def test_exits_on_top(tmp_path: Path) -> None:
    model = make_model(vision={"layers": 4})
    fast = calibrated(model)
    about = fast.visual.lraee
    exits = make_exits(model, kind="confidence")
    with pytest.raises(ValueError, match="must be made for this scheme"):
        lraee.save(fast, tmp_path)
        lraee.load(tmp_path, model, exits=exits)
    own = type(exits)(**{**vars(exits), "scheme": about.scheme})
    with_exits = lraee.load(tmp_path, model, exits=own)
    images = make_images(9)
    with torch.no_grad(), lraee.trace(with_exits) as t:
        with_exits.encode_image(images)
    assert t.exit_block.numel() == 9
    with torch.no_grad(), lraee.full_depth(with_exits):
        assert_same(with_exits.encode_image(images), fast.encode_image(images))
    lraee.save(with_exits, tmp_path / "both")
    again = lraee.load(tmp_path / "both", model)
    with torch.no_grad():
        assert_same(again.encode_image(images), with_exits.encode_image(images))
    with pytest.raises(ValueError, match="int8-calibrated must come with calibration="):
        lraee.accelerate(model, scheme=own.scheme, exits=own)


# Resources


def test_a_run_cut_off_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL after its second block; the blocks before are not calibrated again."""
    folder, out = tmp_path / "unfinished", tmp_path / "out"
    script = f"""
import os, signal, torch
import lraee
from lraee.quantization.plain_block import PlainBlock
from tests.small_calibration import pictures, small_clip
torch.set_num_threads(1)
calls, calibrate = [], PlainBlock.calibrate
def counted(self):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return calibrate(self)
PlainBlock.calibrate = counted
given = lraee.Calibration(pictures(64), folder={str(folder)!r}, progress=False)
lraee.accelerate(small_clip(), calibration=given)
"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert sorted(path.name for path in folder.glob("block*")) == [
        "block-0.safetensors", "block-1.safetensors",
    ]  # fmt: skip
    torch.set_num_threads(1)
    expected = calibrated(small_clip())
    calls: list[int] = []
    calibrate = PlainBlock.calibrate
    monkeypatch.setattr(
        PlainBlock,
        "calibrate",
        lambda self: calls.append(1) or calibrate(self),  # type: ignore[func-returns-value]
    )
    given = lraee.Calibration(pictures(64), folder=folder, progress=False)
    resumed = lraee.accelerate(small_clip(), calibration=given)
    assert len(calls) == 4  # of six
    assert_same_model(resumed, expected)
    assert not folder.exists() and not out.exists()


def test_memory_stays_within_the_limit(tmp_path: Path) -> None:
    """The peak of the process beside what it had before: model, images, libraries."""
    script = """
import resource, sys, torch
import lraee
from tests.clip_models import make_model
torch.set_num_threads(1)
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(limit, n):
    torch.manual_seed(0)
    vision = {"image_size": 112, "patch_size": 8, "width": 128, "layers": 1, "head_width": 64}
    model = make_model(vision=vision)
    small = torch.randn(n, 3, 8, 8)
    images = torch.nn.functional.interpolate(small, size=112, mode="bicubic")
    lraee.accelerate(model).encode_image(images[:8])  # what any use of the model takes
    before = peak_mb()
    given = lraee.Calibration(images, memory_mb=limit, progress=False)
    lraee.accelerate(model, calibration=given)
    return peak_mb() - before
with torch.no_grad():
    print(run(int(sys.argv[1]), 64))
"""
    root = Path(__file__).parents[2]
    limit = 128
    run = subprocess.run(
        [sys.executable, "-c", script, str(limit)], cwd=root, capture_output=True, text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < limit


def test_linears_are_the_devices_own_layout() -> None:
    """The packed weight is that of w_q: nothing was left from before calibration."""
    fast = calibrated(make_model(vision={"layers": 1}))
    for module in fast.modules():
        if isinstance(module, Int8Linear):
            assert_same(module.w_sum, module.w_q.sum(1, dtype=torch.int32))
