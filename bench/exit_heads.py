"""What makes a good exit head, and a good gate, for lraee-tiny: the tables of docs/notes/exits.md.

Features of the int8 tower are collected once: centre crops, and `--views` random crops of every
photo, each with the float tower's embedding of the same crop. Eight tenths train heads; one tenth
compares them and fits gates and thresholds; on the last tenth gates are reported. No figure of the
package may be measured on any of these photos.

    python -m bench.exit_heads tiny-imagenet-train20k.zip --classes tiny-imagenet-classes.json
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm

import lraee
from lraee import zoo
from lraee.calibration.gate_fitting import fit_logistic
from lraee.calibration.head_training import (
    BEST_HEAD,
    PAPER_HEAD,
    HeadOptions,
    augmented,
    centred,
    train_head,
)
from lraee.calibration.thresholds import ScoreTable, evaluate, quantile_grid, search
from lraee.data.classes import read_classes
from lraee.data.photos import Photos
from lraee.exits.head import HeadWeights, pool
from lraee.measurement import machine
from lraee.towers.families import blocks_of, find_tower
from lraee.towers.flops import PartFlops
from lraee.towers.prompts import class_features

MODEL, SIZE, PHOTO = "lraee-tiny", (56, 56), 64
Blocks = tuple[int, ...]

HEADS: dict[str, HeadOptions] = {
    "paper": PAPER_HEAD,
    "paper, labels only": replace(PAPER_HEAD, training="labels"),
    "paper, distilled": replace(PAPER_HEAD, training="distill"),
    "best": BEST_HEAD,
    "best, patch mean alone": replace(BEST_HEAD, has_class_token=False),
    **{f"best, {n} augmented views": replace(BEST_HEAD, views=n) for n in (0, 1)},
    "best, a quarter of the steps": replace(BEST_HEAD, steps=(BEST_HEAD.steps or 0) // 4),
    "best, weight decay 1e-4": replace(BEST_HEAD, weight_decay=1e-4),
    **{f"best, KL {w}": replace(BEST_HEAD, distribution_weight=w) for w in (0.03, 0.3)},
    "best, labels beside": replace(BEST_HEAD, training="both"),
    "best, labels only": replace(BEST_HEAD, training="labels"),
    "best, affine": replace(BEST_HEAD, kind="affine", hidden=None),
    **{f"best, hidden {H}": replace(BEST_HEAD, hidden=H) for H in (128, 256, 512)},
}
GATES = {"confidence": 1, "and margin": 2, "and variance": 3}  # how many features
SAVED = (0.10, 0.15, 0.20, 0.25, 0.30, 0.35)


class View(NamedTuple):
    """One crop of every photo: pooled [n, blocks, 2 D], variance [n, blocks], embeddings."""

    pooled: Tensor
    variance: Tensor
    teacher: Tensor
    full: Tensor


@dataclass(frozen=True)
class Data:
    """All views, centre crops first; labels, class texts, and the rows of each split."""

    blocks: Blocks
    views: list[View]
    labels: Tensor
    classes: Tensor
    logit_scale: float
    splits: tuple[Tensor, ...]

    def inputs(self, view: int, block: int, rows: Tensor, options: HeadOptions) -> Tensor:
        """What a head of these options sees."""
        both = self.views[view].pooled[rows, self.blocks.index(block)]
        return both if options.has_class_token else both[:, : both.shape[1] // 2]

    def best_class(self, embedding: Tensor) -> Tensor:
        return (embedding @ self.classes.T).argmax(1)


def read_photos(path: Path, wnids: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    """All photos at 64 px, normalised, float16 [n, 3, 64, 64]; labels int64 [n]."""
    photos = Photos(path, classes=read_classes(wnids), limit=limit)
    cubic = transforms.InterpolationMode.BICUBIC
    normalize = transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    square = [transforms.Resize(PHOTO, interpolation=cubic), transforms.CenterCrop(PHOTO)]
    preprocess = transforms.Compose([*square, transforms.ToTensor(), normalize])
    batches = list(photos.batches(preprocess, size=256))
    labels = [-1 if label is None else label for batch in batches for label in batch.labels]
    return torch.cat([batch.images.half() for batch in batches]), torch.tensor(labels)


@torch.inference_mode()
def look(model: nn.Module, fast: nn.Module, blocks: Blocks, crops: Iterable[Tensor]) -> View:
    """One view of every photo through both towers."""
    tokens: list[Tensor] = []
    blocks_of_tower = blocks_of(find_tower(fast))
    hooks = [
        blocks_of_tower[block - 1].register_forward_hook(lambda module, inputs, z: tokens.append(z))
        for block in blocks
    ]
    parts: list[tuple[Tensor, ...]] = []
    for images in crops:
        tokens.clear()
        full = fast.encode_image(images)  # type: ignore[operator]
        pooled = torch.stack([pool(z, has_class_token=True).half() for z in tokens], 1)
        variance = torch.stack([z[:, 1:].var(1, correction=0).sum(1) for z in tokens], 1)
        parts.append((pooled, variance, model.encode_image(images), full))  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return View(*(torch.cat(part) for part in zip(*parts, strict=True)))


def collect(photos: Path, wnids: Path, blocks: Blocks, views: int, limit: int | None) -> Data:
    images, labels = read_photos(photos, wnids, limit)
    model, _, tokenizer = zoo.load(MODEL)
    fast = lraee.accelerate(model)
    source = torch.Generator().manual_seed(0)
    view_list: list[View] = []
    for view in range(views + 1):
        parts = tqdm(torch.split(images, 64), desc=f"view {view}", leave=False)
        crops = (
            augmented(part, size=SIZE, generator=source) if view else centred(part, SIZE)
            for part in map(torch.Tensor.float, parts)
        )
        view_list.append(look(model, fast, blocks, crops))
    classes = class_features(model, tokenizer, read_classes(wnids).names, progress=False)
    tenth = len(images) // 10
    order = torch.randperm(len(images), generator=source)
    splits = torch.split(order, [len(images) - 2 * tenth, tenth, tenth])
    return Data(blocks, view_list, labels, classes, float(model.logit_scale.detach().exp()), splits)  # type: ignore[union-attr,operator]


def train(data: Data, block: int, options: HeadOptions) -> HeadWeights:
    rows, used = data.splits[0], range(min(options.views, len(data.views) - 1) + 1)
    pooled = torch.cat([data.inputs(view, block, rows, options) for view in used])
    teacher = torch.cat([data.views[view].teacher[rows] for view in used])
    return train_head(
        pooled, teacher, options=options, seed=0, classes=data.classes,
        labels=data.labels[rows].repeat(len(used)), logit_scale=data.logit_scale,
    )  # fmt: skip


def compare_heads(data: Data, block: int) -> None:
    """One line per variant after one block: top-1 / agreement with float / cosine, validation."""
    rows = data.splits[1]
    teacher, labels = data.views[0].teacher[rows], data.labels[rows]
    answers = data.best_class(teacher)
    print(f"block {block}; float tower: top-1 {_percent(answers == labels)}, {len(rows)} photos")
    for name, options in HEADS.items():
        start = time.perf_counter()
        head = train(data, block, options)
        seconds = time.perf_counter() - start
        y = F.normalize(head(data.inputs(0, block, rows, options).float()), dim=1)
        own, cosine = data.best_class(y), F.cosine_similarity(y, teacher).mean()
        gains = f"{_percent(own == labels)} / {_percent(own == answers)} / {cosine:.3f}"
        print(f"| {name} | {head.macs:,} | {gains} | {seconds:.0f} s |", flush=True)


class Observed(NamedTuple):
    """What heads say of some photos: features [n, m, 3], answers [n, m]; full depth's answers."""

    features: Tensor
    answers: Tensor
    full: Tensor
    teacher: Tensor
    labels: Tensor


def ask(data: Data, heads: dict[int, HeadWeights], rows: Tensor, view: int) -> Observed:
    features, answers = [], []
    for place, (block, head) in enumerate(heads.items()):
        y = F.normalize(head(data.inputs(view, block, rows, BEST_HEAD).float()), dim=1)
        best, index = (data.logit_scale * y @ data.classes.T).softmax(1).topk(2)
        variance = data.views[view].variance[rows, place]
        features.append(torch.stack([best[:, 0], best[:, 0] - best[:, 1], variance], 1))
        answers.append(index[:, 0])
    recorded = data.views[view]
    full, teacher = data.best_class(recorded.full[rows]), data.best_class(recorded.teacher[rows])
    return Observed(
        torch.stack(features, 1), torch.stack(answers, 1), full, teacher, data.labels[rows]
    )


def compare_gates(data: Data, exits: Blocks) -> None:
    """Frontier of each gate: top-1 / agreement at each share of FLOPs saved, on the last split."""
    heads = {block: train(data, block, BEST_HEAD) for block in exits}
    views = [ask(data, heads, data.splits[1], view) for view in range(len(data.views))]
    fitted = Observed(*(torch.cat(parts) for parts in zip(*views, strict=True)))
    recorded = ask(data, heads, data.splits[2], 0)
    labels, teacher = recorded.labels, recorded.teacher
    agreeing = f"{_percent(recorded.full == labels)} / {_percent(recorded.full == teacher)}"
    print(f"exits {exits}; int8 full depth: top-1 / agreement {agreeing} %")
    for i, block in enumerate(exits):
        right = _percent(recorded.answers[:, i] == recorded.labels)
        print(f"block {block}: {right} / {_percent(recorded.answers[:, i] == recorded.teacher)}")
    parts = PartFlops.of(find_tower(zoo.load(MODEL)[0]))
    probes = [2 * (head.macs + data.classes.numel()) for head in heads.values()]
    costs = np.array(parts.when_leaving(exits, probes)) / parts.total
    for name, used in GATES.items():
        scores = [np.empty((len(part.full), len(exits)), np.float32) for part in (fitted, recorded)]
        for i in range(len(exits)):
            is_right = fitted.answers[:, i] == fitted.teacher
            w, b = fit_logistic(fitted.features[:, i, :used], is_right)
            for part, column in zip((fitted, recorded), scores, strict=True):
                column[:, i] = (part.features[:, i, :used].double() @ w + b).numpy()
        table = ScoreTable(scores[0], _gains(fitted, fitted.teacher), costs)
        top1 = ScoreTable(scores[1], _gains(recorded, recorded.labels), costs)
        same = ScoreTable(scores[1], _gains(recorded, recorded.teacher), costs)
        grids = [quantile_grid(scores[0][:, i]) for i in range(len(exits))]
        cells = []
        for saved in SAVED:
            taken = search(table, max_cost=1 - saved, grids=grids).thresholds
            result = evaluate(top1, taken)
            gains = f"{100 * result.gain:.2f} / {100 * evaluate(same, taken).gain:.2f}"
            cells.append(f"{gains} @ {100 * (1 - result.cost):.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _gains(observed: Observed, truth: Tensor) -> NDArray[np.float64]:
    every = torch.cat([observed.answers, observed.full[:, None]], 1)
    return (every == truth[:, None]).double().numpy()


def _percent(holds: Tensor) -> str:
    return f"{100 * holds.double().mean():.2f}"


def main(
    photos: Path,
    classes: Annotated[Path, typer.Option(help="JSON of wnids and names")],
    exits: Annotated[str, typer.Option(help="after which blocks")] = "5,8,10",
    views: Annotated[int, typer.Option(help="augmented views of each photo")] = BEST_HEAD.views,
    limit: Annotated[int | None, typer.Option(help="photos, spread evenly")] = None,
) -> None:
    """Print the tables of heads and gates."""
    torch.set_num_threads(1)
    print(*machine.describe().items(), sep="\n")
    blocks = tuple(sorted(int(block) for block in exits.split(",")))
    data = collect(photos, classes, blocks, views, limit)
    compare_heads(data, blocks[len(blocks) // 2])
    compare_gates(data, blocks)


if __name__ == "__main__":
    typer.run(main)
