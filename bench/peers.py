"""Image towers side by side with the INT8 of others: same weights and images, one process.

    python -m bench.peers --tower ViT-B-32 --batch 1 --batch 8 --batch 32 --out results/peers.json
    python -m bench.peers --tower ViT-B-16-SigLIP-224 --tower timm:vit_base_patch14_dinov2@224
    python -m bench.peers --tower hf:clip-vit-base-patch32 --beside ViT-B-32 --batch 1
    python -m bench.peers --tower ViT-B-32 --streams 2 --request 16 --batch 64

Each peer is set up as its own documentation advises (the builders below say how). Variants take
turns round by round; a time is the median with its 20th and 80th percentile, a ratio the median of
the ratios of each round. Beside each time stands agreement with float32 over smooth random images:
a fast wrong answer does not count. A peer that cannot be set up is named with its reason. With
`--streams` a round is a batch of images in asynchronous requests to OpenVINO, in its throughput
mode; the others, which have no such mode, take the same requests one after the other. Needs the
extra `peers`.
"""

import copy
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from bench.environment import describe
from bench.peer_towers import accelerated, image_size, load_tower, photo_like_images
from lraee.data.sources import first_line
from lraee.measurement.timing import Timing, interleaved
from lraee.model.fidelity import compare
from lraee.storage.json import write_json

SCHEMA = "lraee.peers/1"
Encode = Callable[[Tensor], Tensor]
"""Images float32 [B, 3, H, W] -> embeddings [B, E]."""
Build = Callable[[nn.Module, Tensor], Encode]
"""The float tower and calibration images -> what a user of this peer would call."""


@dataclass(frozen=True)
class Throughput:
    """How a round is cut into requests.

    Args:
      streams: requests that run at a time, of a peer that can.
      request: images of each.
    """

    streams: int
    request: int


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


def _openvino_async(model: Any, precision: str, mode: Throughput) -> Encode:
    """Throughput mode: requests of a fixed size, so many at a time, without waiting for each."""
    import openvino

    model.reshape([mode.request, *model.input(0).partial_shape[1:]])
    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": str(mode.streams),
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    queue = openvino.AsyncInferQueue(compiled, mode.streams)
    results: dict[int, Tensor] = {}

    def keep(request: Any, place: int) -> None:
        results[place] = torch.from_numpy(request.get_output_tensor(0).data.copy())

    queue.set_callback(keep)

    def encode(x: Tensor) -> Tensor:
        parts = x.split(mode.request)
        for place, part in enumerate(parts):
            queue.start_async({0: part.numpy()}, place)
        queue.wait_all()
        return torch.cat([results.pop(place) for place in range(len(parts))])

    return encode


def _converted(tower: nn.Module, images: Tensor) -> Any:
    import openvino

    return openvino.convert_model(tower, example_input=images[:1], input=[-1, *images.shape[1:]])


def _nncf_int8(tower: nn.Module, images: Tensor) -> Any:
    """INT8 by NNCF post-training quantization with ModelType.TRANSFORMER."""
    import nncf

    dataset = nncf.Dataset([image[None].numpy() for image in images])
    return nncf.quantize(
        _converted(tower, images), dataset,
        model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images),
    )  # fmt: skip


OPENVINO: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "openvino bfloat16": (_converted, "bf16"),
    "openvino int8 (nncf)": (_nncf_int8, "bf16"),
    "openvino int8 (nncf), f32 rest": (_nncf_int8, "f32"),
}
"""The model, and the type of what stays float: bfloat16 is the plugin's own default where the CPU
has it, float32 is ours."""


def lraee_int8(tower: nn.Module, images: Tensor) -> Encode:
    """lraee.accelerate with nothing set."""
    return accelerated(tower)


def lraee_int8_patches(tower: nn.Module, images: Tensor) -> Encode:
    """The patch embedding in int8 as well, as NNCF has it."""
    return accelerated(tower, "int8-patches")


PEERS: dict[str, Build] = {
    "lraee int8": lraee_int8,
    "lraee int8-patches": lraee_int8_patches,
    "torch float32": torch_float32,
    "torch bfloat16": torch_bfloat16,
    "torch quantize_dynamic": torch_quantize_dynamic,
    "torchao int8 + compile": torchao_int8,
    "onnxruntime int8": onnxruntime_int8,
}


def build(name: str, tower: nn.Module, images: Tensor, mode: Throughput | None) -> Encode:
    """One peer: what to call with images."""
    if name in OPENVINO:
        convert, precision = OPENVINO[name]
        model = convert(tower, images)
        return (
            _openvino(model, precision) if mode is None else _openvino_async(model, precision, mode)
        )
    encode = PEERS[name](tower, images)
    if mode is None:
        return encode
    return lambda x: torch.cat([encode(part) for part in x.split(mode.request)])


def build_all(
    names: Sequence[str], tower: nn.Module, images: Tensor, mode: Throughput | None = None
) -> dict[str, Encode | str]:
    """Each peer by name: what to call, or the reason why it cannot be set up here."""
    built: dict[str, Encode | str] = {}
    for name in names:
        try:
            encode = built[name] = build(name, tower, images, mode)
            encode(images[: 2 if mode is None else mode.request])  # compiles
        except Exception as error:  # any failure of a peer is its reason, printed and in the JSON
            built[name] = f"{type(error).__name__}: {first_line(error)}"
        typer.echo(
            f"  set up {name}" + (f": {built[name]}" if isinstance(built[name], str) else "")
        )
    return built


def measure(
    runs: dict[str, Encode],
    images: Tensor,
    batch: int,
    budget_s: float,
    expected_of: Mapping[str, Tensor],
    untimed: Collection[str] = (),
) -> list[Any]:
    """Rows of one batch size: time, images per second, times the first variant, agreement.

    Args:
      runs: by name.
      images: to measure agreement on.
      batch: images of a round.
      budget_s: of all rounds.
      expected_of: float embeddings of runs that are not of the tower of "torch float32".
      untimed: runs that take no turns.
    """
    photos = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    expected = runs["torch float32"](images)

    def call(encode: Encode) -> Callable[[], Tensor]:
        return lambda: encode(photos)

    timed = {n: call(e) for n, e in runs.items() if n not in untimed}
    seconds = interleaved(timed, budget_s=budget_s, warm_s=2.0)
    ours = seconds["lraee int8"]
    rows = []
    for name, each in seconds.items():
        timing = Timing.of(each)
        ratio = statistics.median(theirs / own for theirs, own in zip(each, ours, strict=True))
        agreement = vars(compare(expected_of.get(name, expected), runs[name](images)))
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


def _require_whole_requests(mode: Throughput, counts: Iterable[tuple[str, int]]) -> None:
    for option, count in counts:
        if mode.request < 1 or count % mode.request:
            raise typer.BadParameter(
                f"{option} must be a multiple of --request {mode.request}, got {count}"
            )


def main(
    tower: Annotated[
        list[str], typer.Option(help="open_clip or zoo names, timm:NAME[@SIZE], hf:NAME")
    ] = ["ViT-B-32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="images per call, or per round")] = [1, 8, 32],  # noqa: B006
    peer: Annotated[list[str] | None, typer.Option(help="names; all by default")] = None,
    beside: Annotated[
        list[str], typer.Option(help="more towers, whose int8 runs in the same rounds")
    ] = [],  # noqa: B006
    streams: Annotated[
        int, typer.Option(help="OpenVINO's throughput mode with so many streams; 0: latency mode")
    ] = 0,
    request: Annotated[int, typer.Option(help="images per request, with --streams")] = 16,
    budget_s: Annotated[float, typer.Option(help="seconds per tower and batch size")] = 60.0,
    samples: Annotated[
        int, typer.Option(help="images that calibrate, and that agreement is measured on")
    ] = 32,
    threads: Annotated[int, typer.Option(help="threads of every peer")] = 2,
    time_float: Annotated[
        bool, typer.Option(help="a row of torch float32, which else is only what agreement is with")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time every peer on the same towers, interleaved, with agreement beside each time."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    mode = Throughput(streams, request) if streams else None
    if mode is not None:
        counts = [("--batch", size) for size in batch]
        _require_whole_requests(mode, [*counts, ("--samples", samples)])
    names = list(dict.fromkeys(["lraee int8", "torch float32", *(peer or [*PEERS, *OPENVINO])]))
    header = describe()
    rows, failures = [], {}
    with torch.inference_mode(False), torch.no_grad():
        for name in tower:
            floats = load_tower(name)
            images = photo_like_images(samples, image_size(floats))
            built = build_all(names, floats, images, mode)
            failures[name] = {n: b for n, b in built.items() if isinstance(b, str)}
            runs = {n: b for n, b in built.items() if not isinstance(b, str)}
            expected = {}
            for other in beside:
                each = load_tower(other)
                label = f"lraee int8 of {other}"
                runs[label] = build("lraee int8", each, images, mode)
                expected[label] = each(images)
            for size in batch:
                untimed = () if time_float else ("torch float32",)
                for row in measure(runs, images, size, budget_s, expected, untimed):
                    rows.append({"tower": name, **(asdict(mode) if mode else {}), **row})
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
