"""What tools expect of a model: flat parameters, export, tracing, other processes, no images."""

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import lraee
from lraee.layers.batch_invariant import ByStep
from tests.clip_models import make_images
from tests.small_calibration import calibrated, classes_of, pictures, small_clip
from tests.support import assert_same


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def with_exits(model: nn.Module) -> nn.Module:
    images = pictures(120)
    return lraee.accelerate(
        model, exits=calibrated(model, images, classes=classes_of(model, images))
    )


def test_state_dict_is_contiguous_and_saves(tmp_path: Path, with_exits: nn.Module) -> None:
    state = with_exits.state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values())
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    for name, tensor in safetensors.torch.load_file(tmp_path / "state.safetensors").items():
        assert_same(tensor, state[name], name=name)
    flat = nn.utils.parameters_to_vector(with_exits.parameters())
    assert len(flat) == sum(p.numel() for p in with_exits.parameters())


@torch.no_grad()
def test_by_step_follows_the_weight() -> None:
    weight, by_step = nn.Parameter(torch.randn(8, 3, 4, 4)), ByStep()
    first = by_step(weight)
    assert by_step(weight) is first and first.stride() == (1, 8)
    assert_same(first.contiguous(), weight.flatten(1))
    weight.mul_(2)
    assert_same(by_step(weight).contiguous(), weight.flatten(1))
    weight.data = torch.randn(8, 3, 4, 4)
    assert_same(by_step(weight).contiguous(), weight.flatten(1))
    assert copy.deepcopy(by_step)._held is None


@torch.no_grad()
def test_weights_loaded_after_a_call_are_used(model: nn.Module) -> None:
    fast, images = lraee.accelerate(model), make_images(2)
    fast.encode_image(images)
    other = lraee.accelerate(small_clip(seed=1))
    fast.load_state_dict(other.state_dict())
    assert_same(fast.encode_image(images), other.encode_image(images))


def test_export_at_full_depth_and_refusal_with_exits(with_exits: nn.Module) -> None:
    images, tower = make_images(5), with_exits.visual
    with torch.no_grad(), pytest.raises(NotImplementedError, match="use lraee.full_depth"):
        torch.export.export(tower, (images,), strict=False)
    sizes = ({0: torch.export.Dim("B", min=2, max=64)},)
    with torch.no_grad(), lraee.full_depth(with_exits):
        program = torch.export.export(tower, (images,), dynamic_shapes=sizes, strict=False)
        assert_same(program.module()(images[:3]), tower(images[:3]))


def test_torchscript_and_onnx_say_what_to_do(with_exits: nn.Module, tmp_path: Path) -> None:
    images = make_images(2)
    tower, told = with_exits.visual, pytest.raises(NotImplementedError, match="torch.export inside")
    with torch.no_grad(), told:
        torch.jit.trace(tower, images)
    for module in (with_exits, tower, tower.transformer.resblocks[0]):
        with told:
            torch.jit.script(module)
    with torch.no_grad(), lraee.full_depth(with_exits), told:
        torch.onnx.export(tower, (images,), tmp_path / "a.onnx", dynamo=False)
    pytest.importorskip("onnxscript")
    with (
        torch.no_grad(), lraee.full_depth(with_exits),
        pytest.raises(Exception, match="torch.export inside"),
    ):  # fmt: skip
        torch.onnx.export(tower, (images,), tmp_path / "b.onnx", dynamo=True, verbose=False)


def test_transforms_of_functions_say_what_to_do(model: nn.Module) -> None:
    tower, images = lraee.accelerate(model).visual, make_images(2)
    told = pytest.raises(NotImplementedError, match="outside torch.func's transforms")
    with told:
        torch.func.vmap(lambda image: tower(image[None])[0])(images)
    with told:
        torch.func.grad(lambda x: tower(x).sum())(images)
    with told, forward_ad.dual_level():
        tower(forward_ad.make_dual(images, torch.ones_like(images)))


@torch.no_grad()
def test_no_images(model: nn.Module, with_exits: nn.Module) -> None:
    none = make_images(2)[:0]
    for fast in (lraee.accelerate(model), with_exits):
        assert fast.encode_image(none).shape == (0, fast.encode_image(make_images(1)).shape[1])
    with lraee.trace(with_exits) as t:
        with_exits.encode_image(none)
    assert t.stats.images == 0 and t.exit_block.shape == (0,)


def test_meta_device(model: nn.Module, with_exits: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"model must have weights, got .* on the meta device"):
        lraee.accelerate(copy.deepcopy(model).to("meta"))
    images = make_images(2).to("meta")
    empty = copy.deepcopy(with_exits).to("meta")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="use lraee.full_depth"):
        empty.encode_image(images)
    with torch.no_grad(), lraee.full_depth(empty):
        assert empty.encode_image(images).shape[0] == 2


def _encode_there(queue: torch.multiprocessing.Queue, fast: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        queue.put(fast.encode_image(images).tolist())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_model_is_the_argument_of_another_process(method: str, model: nn.Module) -> None:
    fast, images = lraee.accelerate(model, scheme="int8-patches"), make_images(2)
    context = torch.multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_encode_there, args=(queue, fast, images))
    process.start()
    actual = torch.tensor(queue.get(timeout=120))
    process.join()
    with torch.no_grad():
        assert_same(actual, fast.encode_image(images))
    assert process.exitcode == 0
