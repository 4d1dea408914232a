"""calibrate: early exits for an accelerated model, learned from images."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor, nn

from lraee.calibration.collect import Images, Pair
from lraee.calibration.gate_fitting import require_scikit_learn
from lraee.calibration.head_training import Training
from lraee.calibration.pipeline import BEST, PAPER, Calibration, Recipe, Task, digest
from lraee.calibration.plans import Goal
from lraee.calibration.search import BUDGET, calibrate_search
from lraee.calibration.thresholds import MAX_EXITS
from lraee.exits.bundle import Exits
from lraee.exits.gate import CLASS_FREE, GateKind
from lraee.exits.kinds import Target
from lraee.model.accelerate import accelerate
from lraee.model.acceleration import Acceleration, acceleration_of
from lraee.model.set_classes import unit_classes
from lraee.storage.stages import Stages
from lraee.towers.calls import embedding_size
from lraee.towers.families import find_tower, tower_spec
from lraee.towers.runner import RowwiseTower, require_no_tokens
from lraee.towers.state import tower_hash

_RECIPES = {"best": BEST, "paper": PAPER}


def calibrate(
    model: nn.Module,
    images: Images,
    *,
    target: Target = "classes",
    classes: Tensor | None = None,
    labels: Tensor | None = None,
    gate: GateKind | None = None,
    recipe: str | Recipe = "best",
    training: Training | None = None,
    budget: float | None = None,
    epsilon: float | None = None,
    delta: float = 0.05,
    num_exits: int | None = None,
    teacher: nn.Module | None = None,
    batch: int = 64,
    seed: int = 0,
    is_timed: bool = True,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Exits:
    """Early exits for an accelerated model, learned from images; by default without labels.

        exits = lraee.calibrate(fast, images, classes=text_features)
        fast = lraee.accelerate(model, exits=exits)

    Heads learn the float model's embedding at full depth. A gate learns when a head's answer is the
    float model's (with labels: the right one). Thresholds are chosen for the best agreement within
    a budget of FLOPs, or proven to lose at most epsilon. Beside the plan of `gate`, the result
    holds one for each baseline (Exits.using), from the same heads for the same goal.

        exits = lraee.calibrate(fast, images, target="search")

    keeps the nearest photo: all images leave after one block, and their class token runs on alone
    through the rest of the tower, see lraee.exits.class_token. Nothing is trained or timed. It
    takes a tower that embeds its class token.

    Args:
      model: from lraee.accelerate; or a float model, which is then accelerated in `int8`.
      images: preprocessed [n, 3, H, W], n >= 100, or an iterable of such batches that can be
        iterated again; larger than the tower's input if crops may use what lies around the centre.
      target: what the answers are that exits are to keep: classes, or what a search finds.
      classes: text embeddings [K, E] for the gates; without them gates are class-free.
      labels: int64 [n], index of the right class, -1 unknown; needs classes. With them gates learn
        what is right.
      gate: learned, confidence, patience, agreement or static; by default learned with classes,
        agreement without.
      recipe: "best", "paper" (arXiv 2605.26415, needs labels) or a Recipe.
      training: of the heads: distill, labels or both; None takes the recipe's.
      budget: mean FLOPs over those of full depth, at most; where epsilon is not given 0.8, and for
        search 0.88. FLOPs are those that the accelerated tower runs: of the last block the class
        token's alone.
      epsilon: instead of budget: top-1 disagreement with the int8 model at full depth (with labels:
        loss of accuracy; for search and without classes: another nearest image), at most so much
        with probability 1 - delta for images drawn as these.
      delta: see epsilon.
      num_exits: fixes how many exits are chosen, whatever their probes cost in time; 1 to 5, at
        least 2 for agreement. None chooses the number, within 2 % of the tower's time.
      teacher: the float model; None takes the one that `model` was accelerated from.
      batch: images per call, where `images` is one tensor.
      seed: of splits, crops and heads; the same seed and machine give the same heads.
      is_timed: measure on this machine how many probes are worth their time, and when copying
        survivors pays; else take stated defaults.
      folder: keeps what is done there, so that a run cut off goes on; removed at the end.
      progress: show bars.
    Raises: ValueError, TypeError on arguments that do not fit, LookupError if the float model was
      freed, ImportError without scikit-learn.
    """
    if target == "search":
        _require_none(
            classes=classes, labels=labels, gate=gate, training=training, num_exits=num_exits,
            recipe=None if recipe == "best" else recipe,
        )  # fmt: skip
    elif target != "classes":
        raise ValueError(f"calibrate: target must be classes or search, got {target!r}")
    recipe = _find_recipe(recipe, training, num_exits)
    default = BUDGET if target == "search" else 0.8
    goal = Goal(default if budget is None and epsilon is None else budget, epsilon, delta)
    fast = model if acceleration_of(model) is not None else accelerate(model)
    acceleration = cast(Acceleration, acceleration_of(fast))

    def opened() -> Pair:
        float_model = _find_teacher(acceleration, model, teacher)
        return Pair(float_model, fast, images, batch=batch, progress=progress)

    if target == "search":
        return _for_search(opened(), acceleration, goal, images, seed=seed, folder=folder)
    tower = cast(RowwiseTower, find_tower(fast))
    if not tower_spec(tower).prefix_tokens:
        recipe = replace(recipe, head=replace(recipe.head, has_class_token=False))
    E = embedding_size(tower)
    require_no_tokens(tower)
    if classes is not None:
        classes = unit_classes("calibrate", classes, E).cpu()
    kind: GateKind = gate or ("agreement" if classes is None else "learned")
    if kind not in get_args(GateKind):
        kinds = ", ".join(get_args(GateKind))
        raise ValueError(f"calibrate: gate must be one of {kinds}, got {kind!r}")
    if kind in ("learned", "agreement"):
        require_scikit_learn()
    labels = _checked_labels(labels, classes, images)
    if kind == "agreement" and num_exits == 1:
        raise ValueError("calibrate: num_exits must be at least 2 for an agreement gate, got 1")
    _require_enough(kind, recipe, classes, labels)
    task = Task(recipe, goal, kind, classes, labels, _logit_scale(fast), seed, is_timed)
    pair = opened()
    settings = {
        "recipe": asdict(recipe), "seed": seed, "base": acceleration.base_hash,
        "scheme": acceleration.scheme.fields, "classes": digest(classes), "labels": digest(labels),
        "logit_scale": task.logit_scale, "images": _digest_images(images, pair),
    }  # fmt: skip
    stages = Stages(None if folder is None else Path(folder), settings)
    exits = Calibration(pair, acceleration, task, stages.get).run()
    stages.clear()
    return exits


def _for_search(
    pair: Pair,
    acceleration: Acceleration,
    goal: Goal,
    images: Images,
    *,
    seed: int,
    folder: str | os.PathLike[str] | None,
) -> Exits:
    """The exits for search; a run cut off goes on in the folder, whatever its goal."""
    require_no_tokens(find_tower(pair.fast))
    settings = {
        "target": "search", "seed": seed, "base": acceleration.base_hash,
        "scheme": acceleration.scheme.fields, "images": _digest_images(images, pair),
    }  # fmt: skip
    stages = Stages(None if folder is None else Path(folder), settings)
    exits = calibrate_search(pair, acceleration, goal, seed=seed, keep=stages.get)
    stages.clear()
    return exits


def _require_none(**given: object) -> None:
    """Raises ValueError on the first argument that exits for search have no use for."""
    for name, value in given.items():
        if value is not None:
            got = f"{type(value).__name__}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"calibrate: {name} must not be given with target 'search', got {got}; photos that"
                " search each other are all that it takes"
            )


def _find_recipe(recipe: str | Recipe, training: Training | None, num_exits: int | None) -> Recipe:
    if isinstance(recipe, str):
        if recipe not in _RECIPES:
            names = ", ".join(_RECIPES)
            raise ValueError(
                f"calibrate: recipe must be one of {names} or a Recipe, got {recipe!r}"
            )
        recipe = _RECIPES[recipe]
    if num_exits is not None:
        if not 1 <= num_exits <= MAX_EXITS:
            raise ValueError(f"calibrate: num_exits must be 1 to {MAX_EXITS}, got {num_exits}")
        recipe = replace(recipe, rules=replace(recipe.rules, num_exits=num_exits))
    if training is None:
        return recipe
    return replace(recipe, head=replace(recipe.head, training=training))


def _checked_labels(labels: Tensor | None, classes: Tensor | None, images: Images) -> Tensor | None:
    """Labels as int64 on the CPU.

    Raises: ValueError, TypeError.
    """
    if labels is None:
        return None
    if classes is None:
        raise ValueError("calibrate: classes must be given with labels, got None")
    is_tensor = isinstance(labels, Tensor)
    if not is_tensor or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if is_tensor else type(labels).__name__
        raise TypeError(f"calibrate: labels must be an int64 tensor [n], got {got}")
    n = len(images) if isinstance(images, Tensor) else labels.numel()
    if labels.shape != (n,):
        raise ValueError(f"calibrate: labels must have shape [n] = [{n}], got {list(labels.shape)}")
    labels, K = labels.long().cpu(), len(classes)
    if len(labels) and not (-1 <= int(labels.min()) and int(labels.max()) < K):
        worst = int(labels.max()) if int(labels.max()) >= K else int(labels.min())
        raise ValueError(f"calibrate: labels must be -1 to {K - 1}, got {worst}")
    return labels


def _require_enough(
    kind: GateKind, recipe: Recipe, classes: Tensor | None, labels: Tensor | None
) -> None:
    """Raises ValueError where classes or labels that the gate or the training needs are missing."""
    if classes is None and kind not in CLASS_FREE:
        free = ", ".join(CLASS_FREE)
        raise ValueError(f"calibrate: classes must be given for a {kind} gate; {free} need none")
    if recipe.head.training != "distill" and labels is None:
        raise ValueError(
            f"calibrate: labels must be given for training {recipe.head.training!r}, got None"
        )


def _find_teacher(
    acceleration: Acceleration, model: nn.Module, teacher: nn.Module | None
) -> nn.Module:
    """The float model whose embeddings the heads learn.

    Raises: LookupError if it was freed, ValueError if it is another one.
    """
    if teacher is None and acceleration_of(model) is None:
        return model
    if teacher is None and acceleration.original is not None:
        teacher = acceleration.original()
    if teacher is None:
        raise LookupError(
            "calibrate: the float model was freed, and the fast one holds no float weights; give"
            " teacher=<the float model>"
        )
    base_hash = tower_hash(find_tower(teacher).state_dict())
    if base_hash != acceleration.base_hash:
        raise ValueError(
            "calibrate: teacher must be the model that was accelerated (sha256"
            f" {acceleration.base_hash[:12]}), got {base_hash[:12]}"
        )
    return teacher


def _logit_scale(model: nn.Module) -> float:
    """Factor of the cosine of a CLIP model; 100, as in CLIP, of a bare tower."""
    log_scale = getattr(model, "logit_scale", None)
    return 100.0 if log_scale is None else float(cast(Tensor, log_scale).detach().exp())


def _digest_images(images: Images, pair: Pair) -> str:
    """Of one tensor all of it; of an iterable its first batch."""
    return digest(images if isinstance(images, Tensor) else next(pair.batches("images"), None))
