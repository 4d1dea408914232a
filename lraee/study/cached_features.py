"""Features of one pass of a backbone over photos, cached: all heads and gates learn from them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lraee.calibration.collect import Pair, joined, tapped
from lraee.calibration.head_training import augmented, centred
from lraee.calibration.noise import BlockNoise
from lraee.exits.head import HeadWeights, Int8Head, contrasts, pool
from lraee.model.trace import full_depth
from lraee.ops.reference import Probe
from lraee.storage.stages import Stages
from lraee.towers.families import blocks_of, encode, find_tower

Leads = Literal["mean", "class token"]
"""Which half of the pooled tokens a head of one half takes."""

_PROBED_AT_ONCE = 512


class CachedFeatures:
    """A FeatureSource that runs each of its models once per view, and answers from the cache.

    Probes run on three tokens that have the class token, the mean and the variance of the real
    ones, rounded to float16: see tokens_like.

    Args:
      pair: runs the models.
      name: of the fast model and the images together; stages of other names are not mixed up.
      teacher_name: the same of the teacher.
      stages: where passes are kept.
      leads: "class token" shows that to heads of one half, as if it were the patch mean.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        name: str,
        teacher_name: str,
        stages: Stages,
        leads: Leads = "mean",
    ) -> None:
        """See the class."""
        self.pair, self.name, self.leads = pair, name, leads
        self._teacher_name, self._stages = teacher_name, stages
        self._views: dict[int, dict[str, Tensor]] = {}
        self._noise: dict[int, list[BlockNoise]] = {}

    @property
    def fast(self) -> nn.Module:
        """The accelerated model."""
        return self.pair.fast

    @property
    def teacher(self) -> nn.Module:
        """The float model."""
        return self.pair.teacher

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a crop."""
        return self.pair.size

    @property
    def progress(self) -> bool:
        """Whether to show bars."""
        return self.pair.progress

    def leading(self, leads: Leads) -> "CachedFeatures":
        """The same source, its cache shared, with the other half in the lead."""
        other = CachedFeatures(
            self.pair, name=self.name, teacher_name=self._teacher_name, stages=self._stages,
            leads=leads,
        )  # fmt: skip
        other._views, other._noise = self._views, self._noise
        return other

    def view(self, number: int) -> dict[str, Tensor]:
        """One view of all images; 0 is the centre crop, each other number a random crop.

        Returns: `pooled` float16 [n, depth, 2 D] after each block, mean and class token; `variance`
          float32 [n, depth] of the patch tokens; `full` and `teacher` float32 [n, E].
        """
        if number not in self._views:
            tokens = self._stages.get(f"{self.name} view {number}", lambda: self._pass(number))
            self._views[number] = tokens | self.teach(number)
        return self._views[number]

    def teach(self, number: int) -> dict[str, Tensor]:
        """`teacher` of one view alone: the same for every fast model."""
        return self._stages.get(f"{self._teacher_name} view {number}", lambda: self._teach(number))

    @torch.inference_mode()
    def _pass(self, view: int) -> dict[str, Tensor]:
        tower = find_tower(self.fast)
        depth = len(blocks_of(tower))
        parts: dict[str, list[Tensor]] = {"pooled": [], "variance": [], "full": []}
        with full_depth(self.fast), tapped(tower) as z:
            for x in self._crops(view, self.name):
                parts["full"].append(encode(self.fast, x))
                tokens = z[1 : depth + 1]
                pooled = torch.stack([pool(each, has_class_token=True) for each in tokens], 1)
                parts["pooled"].append(pooled.half().cpu())
                parts["variance"].append(torch.stack([spread(each) for each in tokens], 1).cpu())
        return {name: torch.cat(each) for name, each in parts.items()}

    @torch.inference_mode()
    def _teach(self, view: int) -> dict[str, Tensor]:
        embeddings = [encode(self.teacher, x) for x in self._crops(view, self._teacher_name)]
        return {"teacher": torch.cat(embeddings)}

    def _crops(self, view: int, description: str) -> Iterator[Tensor]:
        """The crops of one view, batch by batch."""
        source = torch.Generator().manual_seed(view)
        for images in self.pair.batches(description):
            if view:
                yield augmented(images, size=self.size, generator=source)
            else:
                yield centred(images, self.size)

    # FeatureSource

    def embeddings(self) -> dict[str, Tensor]:
        """See FeatureSource."""
        view = self.view(0)
        return {name: view[name] for name in ("teacher", "full")}

    def noise(self, most: int) -> list[BlockNoise]:
        """See FeatureSource; of images spread evenly, as photos mostly come class by class."""
        if most not in self._noise:
            n = len(self.view(0)["full"])
            marks = torch.zeros(n, dtype=torch.bool)
            marks[torch.arange(min(most, n)) * n // min(most, n)] = True
            self._noise[most] = self.pair.marked(marks).noise(most)
        return self._noise[most]

    def pooled(
        self, blocks: Sequence[int], rows: Tensor, *, view_seed: int | None
    ) -> dict[str, Tensor]:
        """See FeatureSource; the crops of a view are the same for every seed of a calibration."""
        view = self.view(0 if view_seed is None else view_seed % 1000)
        places = [block - 1 for block in blocks]
        pooled = view["pooled"][rows][:, places]
        return {"pooled": self._led(pooled), "teacher": view["teacher"][rows]}

    def _led(self, pooled: Tensor) -> Tensor:
        D = pooled.shape[-1] // 2
        return pooled if self.leads == "mean" else pooled.roll(D, dims=-1)

    @torch.inference_mode()
    def probed(
        self,
        heads: Mapping[int, HeadWeights],
        rows: Tensor,
        *,
        classes: Tensor,
        logit_scale: float,
    ) -> dict[str, Tensor]:
        """See FeatureSource; heads may stand after the last block here."""
        view, gate = self.view(0), torch.zeros(4)
        classes = contrasts(classes)
        modules = {block: Int8Head(head, gate) for block, head in heads.items()}

        def batches() -> Iterator[list[Probe]]:
            for some in torch.split(rows.nonzero()[:, 0], _PROBED_AT_ONCE):
                yield [
                    head(
                        tokens_like(
                            self._led(view["pooled"][some, block - 1].float()),
                            view["variance"][some, block - 1],
                        ),
                        classes,
                        logit_scale,
                    )
                    for block, head in modules.items()
                ]

        return joined(batches(), int(rows.sum()))

    def class_tokens(self) -> Tensor:
        """After each block, float32 [n, depth, D]."""
        pooled = self.view(0)["pooled"]
        return pooled[..., pooled.shape[-1] // 2 :].float()


def spread(z: Tensor) -> Tensor:
    """Spatial variance, mean over the patch tokens of ||z_i - mean||^2: [B, L, D] -> [B]."""
    patches = z[:, 1:].float()
    return (patches - patches.mean(1, keepdim=True)).square().sum(2).mean(1)


def tokens_like(pooled: Tensor, variance: Tensor) -> Tensor:
    """Three tokens that give a probe the same inputs as the real ones: [B, 2 D], [B] -> [B, 3, D].

    A probe reads the class token, the mean and the variance of the patch tokens alone; two patches
    at mean +- d with ||d||^2 = variance have these.
    """
    mean, class_token = pooled.chunk(2, dim=1)
    d = (variance / mean.shape[1]).sqrt()[:, None]
    return torch.stack([class_token, mean + d, mean - d], dim=1)
