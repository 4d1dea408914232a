"""How the study is run: recipes, budgets and the length of trainings, for a tower of any depth."""

from dataclasses import dataclass, replace

from lraee.calibration.pipeline import BEST, PAPER, SPLITS, Recipe
from lraee.study.backbones import paper_candidates

PAPER_BUDGET = 0.866
"""FLOPs that the paper's router spends: it reports 13.38 % saved."""


@dataclass(frozen=True)
class Protocol:
    """What is trained and how long.

    Args:
      seeds: of splits, heads and policies.
      budget: of our recipe and the baselines that share its heads; FLOPs over those of full depth.
      frontier_budgets: of the frontier.
      views: random crops of each photo that our heads learn from, beside the centre crop.
      steps: mini-batches of each of our heads.
      lens_steps: of each head of the lens; all kinds the same.
      policy_steps: of the AdaViT-style policy.
      policy_images: photos it learns from, and SmoothQuant's scales are chosen on.
      sweep_points: thresholds of a sweep.
      timing_s: seconds spent on timing.
      shares: heads, gate and thresholds over all photos to learn from; see calibration.SPLITS.
      policy_report: the policy runs image by image: on so many report photos; None takes all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 0.8
    frontier_budgets: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
    views: int = 1
    steps: int = 1500
    lens_steps: int = 120
    policy_steps: int = 120
    policy_images: int = 2000
    sweep_points: int = 33
    timing_s: float = 20.0
    shares: tuple[float, float, float] = (SPLITS["heads"], SPLITS["gate"], SPLITS["thresholds"])
    policy_report: int | None = 2500

    @property
    def splits(self) -> dict[str, float]:
        """As calibration.SPLITS."""
        return dict(zip(SPLITS, self.shares, strict=True))

    def best(self) -> Recipe:
        """Our recipe with this study's length of training."""
        return replace(BEST, head=replace(BEST.head, steps=self.steps, views=self.views))

    def paper(self, depth: int, *, prunes: bool = True) -> Recipe:
        """LRA-EE as published, for a tower of so many blocks; the float control prunes nothing."""
        candidates = paper_candidates(depth)
        return replace(PAPER, candidates=candidates, kappa=PAPER.kappa if prunes else 0.0)


FAST = Protocol(
    frontier_budgets=(0.9, 0.8, 0.7), steps=200, lens_steps=60, policy_steps=30,
    policy_images=200, timing_s=3.0,
)  # fmt: skip
"""Everything, with trainings too short for figures worth keeping."""
