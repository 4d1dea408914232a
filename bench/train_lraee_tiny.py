"""Train a small CLIP like lraee-tiny from labelled photos, on a CPU, by its card's recipe.

    python -m bench.train_lraee_tiny PHOTOS OUT --classes classes.json --steps 3000
    python -m bench.train_lraee_tiny PHOTOS OUT --classes classes.json --steps 3000 \\
        --teacher lraee-tiny --width 128 --seed 1

PHOTOS is a folder or ZIP with one folder per class. Stage 1 trains the image tower against a
learned unit vector per class; stage 2 teaches the text tower to say those vectors from prompts.
With a teacher the image tower learns the teacher's embedding of every crop instead, without labels,
and takes over its text tower: a second model of the same space where photos are few.
Every tenth photo of each class is held out, and the zero-shot figure is measured on those.
OUT gets NAME.json (open_clip's model config), open_clip_model.safetensors (float16), train.json
(settings, curve, figures) and, while it runs, state.pt, from which the same command resumes.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import open_clip
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import transforms
from torchvision.transforms.v2.functional import resized_crop
from tqdm import tqdm

from lraee.data.classes import Classes, read_classes
from lraee.data.photos import Photos
from lraee.towers.prompts import class_features
from lraee.zoo.opening import open_model

STORED = 64  # photos are kept as uint8 [3, 64, 64]
CROP = 56


def config_of(width: int) -> dict[str, Any]:
    """open_clip's model config; `width` is the image tower's, heads have 64."""
    vision = {"image_size": CROP, "layers": 12, "width": width, "head_width": 64, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4}
    return {"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}


@dataclass(frozen=True)
class Recipe:
    """What decides the result, besides the photos."""

    steps: int
    text_steps: int
    batch: int = 128
    lr: float = 6e-4
    text_lr: float = 6e-4
    weight_decay: float = 0.05
    warmup: int = 200
    scale: float = 16.0  # of the cosine softmax
    drop: float = 0.5  # share of patches left out ...
    drop_until: float = 0.6  # ... up to this share of the steps
    final_logit_scale: float = 30.0
    seed: int = 0
    width: int = 192
    teacher: str | None = None  # whose embeddings of the same crops the image tower learns


@dataclass
class Data:
    """Photos uint8 [n, 3, 64, 64] with labels int64 [n], for training and held out."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def load_data(path: Path, classes: Classes, hold_out: int) -> Data:
    """Decode every labelled photo once; every `hold_out`-th of each class is kept apart."""
    photos = Photos(path, classes=classes)
    to_bytes = transforms.Compose(
        [
            transforms.Resize(STORED, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(STORED),
            transforms.PILToTensor(),
        ]
    )
    images, labels = [], []
    for batch in photos.batches(to_bytes, size=256, description="decode"):
        known = [i for i, label in enumerate(batch.labels) if label is not None]
        images.append(batch.images[known])
        labels += [batch.labels[i] for i in known]
    all_images, all_labels = torch.cat(images), torch.tensor(labels)
    held = torch.zeros(len(all_labels), dtype=torch.bool)
    for k in range(len(classes.wnids)):
        held[(all_labels == k).nonzero().flatten()[::hold_out]] = True
    return Data(all_images[~held], all_labels[~held], all_images[held], all_labels[held])


def normalize(images: Tensor) -> Tensor:
    """Bring uint8 or [0, 255] photos to CLIP's mean and standard deviation."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random resized crop (area 0.3 to 1), flip and brightness +-20 %, drawn from rng."""
    out = torch.empty(len(images), 3, CROP, CROP)
    draws = torch.rand(len(images), 6, generator=rng).tolist()
    for i, (area, shape, down, right, flip, bright) in enumerate(draws):
        side = STORED * math.sqrt(0.3 + 0.7 * area)
        stretch = math.exp((2 * shape - 1) * math.log(4 / 3) / 2)
        height = min(STORED, max(8, round(side * stretch)))
        width = min(STORED, max(8, round(side / stretch)))
        top, left = int(down * (STORED - height + 1)), int(right * (STORED - width + 1))
        crop = resized_crop(images[i], top, left, height, width, [CROP, CROP])
        crop = crop.flip(-1) if flip < 0.5 else crop
        out[i] = crop.float() * (0.8 + 0.4 * bright)
    return normalize(out.clamp_(0, 255))


def learning_rate(step: int, steps: int, recipe: Recipe, peak: float) -> float:
    """Linear warm-up, then cosine decay to zero."""
    warmup = min(recipe.warmup, steps // 4)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_for(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


class Trainer:
    """Both stages over one model; its whole state is a step number, tensors and the curve."""

    def __init__(self, out: Path, data: Data, classes: Classes, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.out, self.data, self.classes, self.recipe = out, data, classes, recipe
        config = config_of(recipe.width)
        config["vision_cfg"]["patch_dropout"] = recipe.drop
        self.model = open_clip.CLIP(**config)
        self.patch_dropout = self.model.visual.patch_dropout
        self.vectors = nn.Parameter(F.normalize(torch.randn(len(classes.wnids), 256), dim=-1))
        visual = [*self.model.visual.parameters(), self.vectors]
        text = [
            p for n, p in self.model.named_parameters() if not n.startswith(("visual", "logit"))
        ]
        self.optimizers = (optimizer_for(visual, recipe), optimizer_for(text, recipe))
        self.step = 0
        self.curve: list[dict[str, float]] = []
        tokenizer = open_clip.SimpleTokenizer(context_length=24)
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
        self.tokenizer = tokenizer
        self.prompts = torch.stack(
            [tokenizer([t(name) for t in templates]) for name in classes.names]
        )
        self.teacher: nn.Module | None = None
        if recipe.teacher is not None:
            self._learn_from(open_model(recipe.teacher).model.eval())

    def _learn_from(self, teacher: nn.Module) -> None:
        """Takes over the teacher's text tower, and its word for each class as class vector."""
        kept = {k: v for k, v in teacher.state_dict().items() if not k.startswith("visual.")}
        missing = self.model.load_state_dict(kept, strict=False)
        wrong = [key for key in missing.missing_keys if not key.startswith("visual.")]
        if wrong or missing.unexpected_keys:
            raise ValueError(f"train: teacher must have the same text tower, {wrong[:3]} differ")
        self.teacher = teacher
        rows = class_features(teacher, self.tokenizer, self.classes.names, progress=False)
        self.vectors.data.copy_(F.normalize(rows, dim=-1))

    def run(self) -> None:
        """Train from wherever the state stands to the end, saving every 100 steps."""
        self._resume()
        total = self.recipe.steps + self.recipe.text_steps
        bar = tqdm(total=total, initial=self.step, desc="train", mininterval=10)
        start = time.perf_counter()
        while self.step < total:
            in_text = self.step >= self.recipe.steps
            loss = self.advance()
            bar.update()
            if self.step % 100 == 0 or self.step in (self.recipe.steps, total):
                self._note(loss, in_text, time.perf_counter() - start)
                self._save()
                bar.set_postfix_str(" ".join(f"{k}={v:.3g}" for k, v in self.curve[-1].items()))
        bar.close()

    def advance(self) -> float:
        """Take one step of whichever stage it belongs to; return its loss."""
        in_text = self.step >= self.recipe.steps
        # Plain attention: at 25 to 50 tokens the fused backward is 1.3x slower on one core.
        with sdpa_kernel(SDPBackend.MATH):
            loss = self._text_step() if in_text else self._image_step()
        self.step += 1
        return loss

    def _image_step(self) -> float:
        recipe, step = self.recipe, self.step
        # Order and augmentation depend on the seed and the step alone: a resumed run is the same.
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        per_epoch = max(1, len(self.data.labels) // recipe.batch)
        order = torch.Generator().manual_seed(recipe.seed * 7919 + step // per_epoch)
        at = (step % per_epoch) * recipe.batch
        rows = torch.randperm(len(self.data.labels), generator=order)[at : at + recipe.batch]
        dropping = step < recipe.drop_until * recipe.steps
        self.model.visual.patch_dropout = self.patch_dropout if dropping else nn.Identity()
        self.model.train()
        images = augment(self.data.images[rows], rng)
        with torch.autocast("cpu", torch.bfloat16):
            embedding = self.model.encode_image(images)
            target = None if self.teacher is None else self._taught(images)
        y = F.normalize(embedding.float(), dim=-1)
        if target is not None:
            loss = 1 - (y * F.normalize(target.float(), dim=-1)).sum(dim=-1).mean()
        else:
            cosine = y @ F.normalize(self.vectors, dim=-1).T
            loss = F.cross_entropy(recipe.scale * cosine, self.data.labels[rows])
        return self._update(0, loss, learning_rate(step, recipe.steps, recipe, recipe.lr))

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """The teacher's embeddings of the same crops."""
        return cast(open_clip.CLIP, self.teacher).encode_image(images)

    def _text_step(self) -> float:
        recipe, step = self.recipe, self.step - self.recipe.steps
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        K, T = self.prompts.shape[:2]
        labels = torch.randint(K, (recipe.batch,), generator=rng)
        tokens = self.prompts[labels, torch.randint(T, (recipe.batch,), generator=rng)]
        targets = F.normalize(self.vectors.detach(), dim=-1)
        with torch.autocast("cpu", torch.bfloat16):
            embedding = self.model.encode_text(tokens)
        cosine = F.normalize(embedding.float(), dim=-1) @ targets.T
        own = cosine.gather(1, labels[:, None]).mean()
        loss = 1 - own + 0.2 * F.cross_entropy(recipe.scale * cosine, labels)
        return self._update(1, loss, learning_rate(step, recipe.text_steps, recipe, recipe.text_lr))

    def _update(self, stage: int, loss: Tensor, lr: float) -> float:
        optimizer = self.optimizers[stage]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        if not math.isfinite(value := loss.item()):
            raise RuntimeError(f"train: loss must be finite, got {value} at step {self.step}")
        return value

    def _note(self, loss: float, in_text: bool, seconds: float) -> None:
        row = {"step": float(self.step), "loss": loss, "seconds": seconds}
        if not in_text and (self.step % 500 == 0 or self.step == self.recipe.steps):
            row["held_top1"] = self.accuracy(F.normalize(self.vectors.detach(), dim=-1))
        self.curve.append(row)

    @torch.inference_mode()
    def embed_held(self) -> Tensor:
        """Unit image embeddings of the held-out photos, float32, all patches."""
        self.model.eval()
        side = (STORED - CROP) // 2
        images = self.data.held_images[:, :, side : side + CROP, side : side + CROP]
        return torch.cat(
            [
                self.model.encode_image(normalize(chunk), normalize=True)
                for chunk in torch.split(images, 128)
            ]
        )

    def accuracy(self, class_rows: Tensor) -> float:
        """Top-1 of the held-out photos against unit class rows [K, E], in percent."""
        guess = (self.embed_held() @ class_rows.T).argmax(dim=1)
        return 100 * (guess == self.data.held_labels).float().mean().item()

    def finish(self) -> dict[str, float]:
        """Set the logit scale, write the config, weights and figures; return the figures."""
        self.model.logit_scale.data.fill_(math.log(self.recipe.final_logit_scale))
        self.model.eval()
        # Rows of the token table that no prompt uses are noise: zero them, so that they compress.
        unused = torch.ones(len(self.model.token_embedding.weight), dtype=torch.bool)
        unused[torch.unique(self.prompts)] = False
        self.model.token_embedding.weight.data[unused] = 0
        text_rows = class_features(self.model, self.tokenizer, self.classes.names, progress=False)
        figures = {
            "held_out_photos": float(len(self.data.held_labels)),
            "chance_top1": 100 / len(self.classes.wnids),
            "class_vector_top1": self.accuracy(F.normalize(self.vectors.detach(), dim=-1)),
            "zero_shot_top1": self.accuracy(text_rows),
        }
        name = self.out.name
        (self.out / f"{name}.json").write_text(
            json.dumps(config_of(self.recipe.width), indent=2) + "\n"
        )
        weights = {k: v.half().contiguous() for k, v in self.model.state_dict().items()}
        save_file(weights, self.out / "open_clip_model.safetensors")
        report = {"recipe": asdict(self.recipe), "figures": figures, "curve": self.curve}
        (self.out / "train.json").write_text(json.dumps(report, indent=2) + "\n")
        return figures

    def _save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "vectors": self.vectors.data,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise typer.BadParameter(f"{path} is of another recipe; use another OUT, or delete it")
        self.step, self.curve = state["step"], state["curve"]
        self.model.load_state_dict(state["model"])
        self.vectors.data.copy_(state["vectors"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def main(
    photos: Path,
    out: Path,
    classes: Annotated[Path, typer.Option(help='JSON with "wnids" and "names"')],
    steps: Annotated[int, typer.Option(help="of the image tower; 7,500 for 100,000 photos")] = 7500,
    text_steps: Annotated[int, typer.Option(help="of the text tower")] = 1500,
    batch: int = 128,
    hold_out: Annotated[int, typer.Option(help="every n-th photo of a class")] = 10,
    threads: int = 0,
    seed: int = 0,
    width: Annotated[int, typer.Option(help="of the image tower, a multiple of 64")] = 192,
    teacher: Annotated[str | None, typer.Option(help="model whose embeddings to learn")] = None,
) -> None:
    """Train, or resume; print the figures on the held-out photos."""
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    known = read_classes(classes)
    data = load_data(photos, known, hold_out)
    recipe = Recipe(
        steps=steps, text_steps=0 if teacher else text_steps, batch=batch, seed=seed, width=width,
        teacher=teacher,
    )  # fmt: skip
    trainer = Trainer(out, data, known, recipe)
    trainer.run()
    typer.echo(json.dumps(trainer.finish(), indent=2))


if __name__ == "__main__":
    typer.run(main)
