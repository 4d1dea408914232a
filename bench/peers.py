"""Image towers side by side with the INT8 of others: same weights and images, one process.

    python -m bench.peers --tower ViT-B-32 --batch 1 --batch 8 --batch 32 --out results/peers.json
    python -m bench.peers --tower ViT-B-16-SigLIP-224 --tower ViT-SO400M-14-SigLIP-384

Each peer is set up as its own documentation advises (the builders below say how). Variants take
turns round by round; a time is the median with its 20th and 80th percentile, a ratio the median of
the ratios of each round. Beside each time stands agreement with float32 over smooth random images:
a fast wrong answer does not count. A peer that cannot be set up is named with its reason. Needs the
extra `peers`.
"""

import copy
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import typer
from torch import Tensor, nn

import lraee
from bench.environment import describe
from lraee import zoo
from lraee.data.sources import first_line
from lraee.measurement.timing import Timing, interleaved
from lraee.model.fidelity import compare
from lraee.storage.json import write_json
from lraee.towers.families import tower_spec

SCHEMA = "lraee.peers/1"
Encode = Callable[[Tensor], Tensor]
"""Images float32 [B, 3, H, W] -> embeddings [B, E]."""
Build = Callable[[nn.Module, Tensor], Encode]
"""The float tower and calibration images -> what a user of this peer would call."""


def torch_float32(tower: nn.Module, images: Tensor) -> Encode:
    """The tower as it is."""
    return tower


def torch_bfloat16(tower: nn.Module, images: Tensor) -> Encode:
    """Weights and activations in bfloat16."""
    half = copy.deepcopy(tower).bfloat16()
    return lambda x: half(x.bfloat16()).float()


def torch_quantize_dynamic(tower: nn.Module, images: Tensor) -> Encode:
    """torch.ao.quantization.quantize_dynamic on nn.Linear, as its tutorial has it."""
    module = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(tower), {nn.Linear}, dtype=torch.qint8
    )
    return module


def torchao_int8(tower: nn.Module, images: Tensor) -> Encode:
    """torchao Int8DynamicActivationInt8Weight, then torch.compile (inductor)."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = copy.deepcopy(tower)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(module)  # type: ignore[no-any-return]


def onnxruntime_int8(tower: nn.Module, images: Tensor) -> Encode:
    """ONNX Runtime dynamic quantization, int8 weights per channel."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, int8 = (str(Path(folder, f"{n}.onnx")) for n in ("a", "b", "c"))
        torch.backends.mha.set_fastpath_enabled(False)  # an operator that ONNX does not know
        try:
            torch.onnx.export(
                tower, (images[:2],), exported, input_names=["x"], output_names=["y"],
                dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}}, opset_version=17, dynamo=False,
            )  # fmt: skip
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, int8, per_channel=True, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _openvino(model: Any, precision: str) -> Encode:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0]))


def _converted(tower: nn.Module, images: Tensor) -> Any:
    import openvino

    return openvino.convert_model(tower, example_input=images[:1], input=[-1, *images.shape[1:]])


def openvino_bfloat16(tower: nn.Module, images: Tensor) -> Encode:
    """OpenVINO with bfloat16 as inference precision."""
    return _openvino(_converted(tower, images), "bf16")


def _nncf_int8(tower: nn.Module, images: Tensor) -> Any:
    import nncf

    dataset = nncf.Dataset([image[None].numpy() for image in images])
    return nncf.quantize(
        _converted(tower, images), dataset,
        model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images),
    )  # fmt: skip


def openvino_int8(tower: nn.Module, images: Tensor) -> Encode:
    """OpenVINO, INT8 by NNCF post-training quantization with ModelType.TRANSFORMER."""
    # bfloat16 for what stays float is the plugin's own default where the CPU has it
    return _openvino(_nncf_int8(tower, images), "bf16")


def openvino_int8_float32(tower: nn.Module, images: Tensor) -> Encode:
    """The same, what stays float in float32, as ours does."""
    return _openvino(_nncf_int8(tower, images), "f32")


def lraee_int8(tower: nn.Module, images: Tensor) -> Encode:
    """lraee.accelerate with nothing set."""
    return lraee.accelerate(tower)


def lraee_int8_patches(tower: nn.Module, images: Tensor) -> Encode:
    """The patch embedding in int8 as well, as NNCF has it."""
    return lraee.accelerate(tower, scheme="int8-patches")


PEERS: dict[str, Build] = {
    "lraee int8": lraee_int8,
    "lraee int8-patches": lraee_int8_patches,
    "torch float32": torch_float32,
    "torch bfloat16": torch_bfloat16,
    "torch quantize_dynamic": torch_quantize_dynamic,
    "torchao int8 + compile": torchao_int8,
    "onnxruntime int8": onnxruntime_int8,
    "openvino bfloat16": openvino_bfloat16,
    "openvino int8 (nncf)": openvino_int8,
    "openvino int8 (nncf), f32 rest": openvino_int8_float32,
}


def load_tower(name: str) -> nn.Module:
    """The image tower of a zoo model, or of an open_clip architecture with random weights."""
    if name in zoo.names():
        return zoo.load(name)[0].visual  # type: ignore[return-value]
    torch.manual_seed(0)
    # open_clip names the size of its SigLIP models where it is not 224
    tower: nn.Module = open_clip.create_model(name.removesuffix("-224")).visual
    return tower.eval().requires_grad_(False)


def photo_like_images(count: int, image_px: int) -> Tensor:
    """Smooth random images: noise at several scales, so that neighbouring patches agree."""
    source = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, image_px, image_px)
    for cells in (2, 4, 8, 16, 32):
        noise = torch.randn(count, 3, cells, cells, generator=source)
        images += nn.functional.interpolate(noise, size=image_px, mode="bicubic") / cells**0.5
    return images


def build_all(names: Sequence[str], tower: nn.Module, images: Tensor) -> dict[str, Encode | str]:
    """Each peer by name: what to call, or the reason why it cannot be set up here."""
    built: dict[str, Encode | str] = {}
    for name in names:
        try:
            built[name] = PEERS[name](tower, images)
            built[name](images[:2])  # type: ignore[operator]  # compiles
        except Exception as error:  # any failure of a peer is its reason, printed and in the JSON
            built[name] = f"{type(error).__name__}: {first_line(error)}"
        typer.echo(
            f"  set up {name}" + (f": {built[name]}" if isinstance(built[name], str) else "")
        )
    return built


def measure(runs: dict[str, Encode], images: Tensor, batch: int, budget_s: float) -> list[Any]:
    """Rows of one batch size: time, images per second, times the first variant, agreement."""
    photos = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    expected = runs["torch float32"](images)

    def call(encode: Encode) -> Callable[[], Tensor]:
        return lambda: encode(photos)

    seconds = interleaved({n: call(e) for n, e in runs.items()}, budget_s=budget_s, warm_s=2.0)
    ours = seconds["lraee int8"]
    rows = []
    for name, each in seconds.items():
        timing = Timing.of(each)
        ratio = statistics.median(theirs / own for theirs, own in zip(each, ours, strict=True))
        agreement = vars(compare(expected, runs[name](images)))
        rows.append(
            {
                "peer": name,
                "batch": batch,
                **vars(timing),
                "lraee_speedup": ratio,
                "images_per_s": 1e3 * batch / timing.median_ms,
                "agreement": agreement,
            }
        )
    return rows


def main(
    tower: Annotated[list[str], typer.Option(help="open_clip or zoo names")] = ["ViT-B-32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="images per call")] = [1, 8, 32],  # noqa: B006
    peer: Annotated[list[str] | None, typer.Option(help="names; all by default")] = None,
    budget_s: Annotated[float, typer.Option(help="seconds per tower and batch size")] = 60.0,
    threads: Annotated[int, typer.Option(help="threads of every peer")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time every peer on the same towers, interleaved, with agreement beside each time."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    names = ["lraee int8", "torch float32"] + (peer or list(PEERS))
    header = describe()
    rows, failures = [], {}
    with torch.inference_mode(False), torch.no_grad():
        for name in tower:
            floats = load_tower(name)
            images = photo_like_images(32, tower_spec(floats).image_size[0])
            built = build_all(list(dict.fromkeys(names)), floats, images)
            failures[name] = {n: b for n, b in built.items() if isinstance(b, str)}
            runs = {n: b for n, b in built.items() if not isinstance(b, str)}
            for size in batch:
                for row in measure(runs, images, size, budget_s):
                    rows.append({"tower": name, **row})
                    typer.echo(_line(rows[-1]))
    if out is not None:
        write_json({"schema": SCHEMA, **header, "rows": rows, "not_set_up": failures}, out)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['tower']:12} b{row['batch']:<3} {row['peer']:31} {row['median_ms']:9.1f} ms"
        f" ({row['p20_ms']:.1f}-{row['p80_ms']:.1f}) {row['images_per_s']:8.1f} img/s"
        f"  lraee is {row['lraee_speedup']:5.2f}x  centred cosine {row['agreement']['centred']:.4f}"
        f"  ranking {row['agreement']['ranking']:.4f}"
    )


if __name__ == "__main__":
    typer.run(main)
