"""A made-up but complete report: 12 blocks, three seeds; its figures are formulas, not results."""

import base64
import io
from typing import Any

from PIL import Image

from lraee.study import schema
from lraee.study.findings import findings
from lraee.study.schema import Example, FrontierPoint, MainRow, Quadrants, Report, Spread

BLOCKS, EXITS = 12, (8, 9, 10, 11)
LOST_TO = {"float": 0.0, "int8": 0.1, "paper": 3.2}


def spread(mean: float, std: float = 0.0) -> Spread:
    return {"mean": mean, "std": std}


def row(
    name: str, backbone: str, top1: float, saved: float = 0.0, agreement: float | None = 99.0,
    std: float = 0.0,
) -> MainRow:  # fmt: skip
    return {
        "name": name,
        "backbone": backbone,
        "top1": spread(top1, std),
        "agreement": None if agreement is None else spread(agreement, std),
        "flops_saved": spread(saved, std),
        "seeds": 3 if std else 1,
        "note": "made up",
    }


def main_rows() -> list[MainRow]:
    rows = []
    for name, lost in LOST_TO.items():
        full = 62.0 - lost
        rows += [
            row(schema.FULL_DEPTH, name, full, agreement=100.0 - 3 * lost),
            row(schema.PUBLISHED, name, full - 2.5, 13.4, 74.0, std=0.2),
            row(schema.BEST, name, full + 0.2, 19.0, 97.0, std=0.1),
        ]
    full = 62.0 - LOST_TO["int8"]
    return rows + [
        row(schema.CLASS_TOKEN, "int8", full - 9.0, 14.0, 60.0, std=0.4),
        row(schema.PABEE, "int8", full - 3.0, 12.0, 90.0, std=0.2),
        row(schema.CONFIDENCE, "int8", full + 0.1, 19.1, 97.0, std=0.1),
        row(schema.STATIC, "int8", full, 16.0, 96.0, std=0.1),
        row(schema.ADAPTIVE, "int8", full - 12.0, 14.5, 55.0, std=1.0),
        row(schema.SMOOTHED, "paper", 61.0, agreement=96.0),
        row(schema.SMOOTHED_EXITS, "paper", 59.9, 13.4, 78.0, std=0.2),
    ]


def noise(scale: float) -> list[schema.Noise]:
    return [
        {
            "block": block,
            "natural_step": 4.0 + block / 10,
            "quantization_error": scale * block * (4.0 + block / 10),
            "nsr": scale * block,
            "mse": scale * block / 100,
            "cosine": 1.0 - scale * block / 50,
            "max_abs": 2.0 * block,
            "inr": 90.0 if block == 9 else 400.0 / (scale * block + 1.0),
            "is_candidate": block in EXITS,
            "is_dropped": block == 9 and scale > 0.01,
        }
        for block in range(1, BLOCKS + 1)
    ]


def lens(lost: float) -> list[schema.Lens]:
    return [
        {
            "block": block,
            "class_token_head": spread(max(5.0 * block - 15.0 - lost, 0.6), 0.5),
            "ssa_head": spread(5.0 * block - lost, 0.3),
            "best_head": spread(5.1 * block - lost, 0.2),
            "early_projection": max(60.0 * (block - 9) / 3 - lost, 0.5),
        }
        for block in range(1, BLOCKS + 1)
    ]


def quadrants(backbone: str, recipe: str, rescue: int, loss: int) -> Quadrants:
    margin = 100.0 * (rescue - loss) / 15_000
    return {
        "backbone": backbone,
        "recipe": recipe,
        "images": 15_000,
        "both": 8_000,
        "rescue": rescue,
        "loss": loss,
        "neither": 15_000 - 8_000 - rescue - loss,
        "margin": spread(margin, 0.1),
        "interval": (margin - 0.6, margin + 0.6),
        "mcnemar_p": 0.0004 if abs(margin) > 0.6 else 0.4,
        "left_share": 62.0,
        "left_top1": 71.0,
        "stayed_top1": 43.0,
        "auroc": {"8": 0.86, "10": 0.84, "11": 0.83},
        "classes": [
            {"name": f"class {i}", "rescued": max(9 - i, 0), "lost": max(i - 9, 0)}
            for i in range(20)
        ],
    }


def picture(shade: int) -> str:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((128, 128)).point(lambda v: (v + shade) % 256).save(
        out, "JPEG", quality=60
    )
    return base64.b64encode(out.getvalue()).decode()


def example(kind: str, place: int) -> Example:
    is_rescue = kind == "rescued"
    return {
        "kind": kind,
        "backbone": "int8",
        "label": f"true class {place}",
        "jpeg": picture(30 * place),
        "answers": [
            {
                "block": block,
                "name": f"true class {place}" if is_rescue else "another",
                "probability": 0.3 + block / 40,
                "is_taken": block == 10,
            }
            for block in (8, 10, 11)
        ]
        + [
            {
                "block": BLOCKS,
                "name": "another" if is_rescue else f"true class {place}",
                "probability": 0.41,
                "is_taken": False,
            }
        ],
    }


def frontier() -> list[FrontierPoint]:
    slopes = {schema.BEST: 0.05, schema.PUBLISHED: 0.4, schema.PABEE: 0.3, schema.CONFIDENCE: 0.06}
    return [
        {
            "name": name,
            "backbone": "int8",
            "budget": 1.0 - saved / 100,
            "flops_saved": spread(saved, 0.2),
            "top1": spread(61.9 - slope * max(saved - 15.0, 0.0), 0.1),
            "agreement": spread(99.0 - slope * saved, 0.1),
        }
        for name, slope in {**slopes, schema.STATIC: 0.12}.items()
        for saved in (5.0, 10.0, 15.0, 20.0, 25.0, 30.0)
    ]


def sweep(backbone: str, recipe: str) -> schema.Sweep:
    def points(slope: float) -> list[schema.SweepPoint]:
        return [
            {
                "threshold": 0.95 - 0.03 * i,
                "flops_saved": 1.5 * i,
                "top1": 61.0 - slope * i,
                "agreement": 99.5 - 0.3 * i,
            }
            for i in range(25)
        ]

    return {
        "backbone": backbone,
        "recipe": recipe,
        "learned": points(0.05),
        "confidence": points(0.12),
    }


def drift(backbone: str, scale: float) -> schema.Drift:
    return {
        "backbone": backbone,
        "angle": [scale * block for block in range(1, BLOCKS + 1)],
        "flipped": 170,
        "margin_flipped": 0.002,
        "margin_kept": 0.031,
        "angle_flipped": 12.5 * scale,
        "angle_kept": 11.9 * scale,
        "correlation": 0.31,
        "by_margin": [
            {"margin": 0.004 * (i + 1), "angle": 12.0 * scale, "flipped": 20.0 / (i + 1)}
            for i in range(10)
        ],
    }


FACTORIAL = {
    "(i) class token, full depth": 58.7,
    "(ii) SSA head at the last block, labels": 59.2,
    "(iii) SSA head at the last block, distilled": 59.7,
    "(iv) exits, labels": 57.0,
    "(v) exits, distilled": 60.4,
}
EMPTY: dict[str, Any] = {
    "noise": {}, "lens": {}, "main": [], "published": [], "factorial": [], "sweeps": [],
    "pruned": [], "shares": [], "quadrants": [], "owed": [], "examples": [], "drift": [],
    "costs": [], "frontier": [], "findings": [],
}  # fmt: skip
"""A report in which no part was run."""


def report() -> Report:
    built: Report = {
        "schema": schema.SCHEMA,
        "made": "2026-11-24",
        "machine": {"cpu": "a made-up CPU", "threads": "2", "torch": "2.14.1"},
        "command": "lraee report --model made-up --data TRAIN.zip --out DIR",
        "model": "made-up",
        "blocks": BLOCKS,
        "seeds": [0, 1, 2],
        "num_classes": 20,
        "templates": 80,
        "learned_from": 20_000,
        "reported_on": 5_000,
        "minutes": 31.4,
        "protocol": {"heads": "half of the photos to learn from", "report": "looked at once"},
        "noise": {"int8": noise(0.005), "paper": noise(0.04)},
        "lens": {name: lens(lost) for name, lost in LOST_TO.items()},
        "main": main_rows(),
        "published": [row("INT8 full depth", "int8", 58.72, agreement=None)],
        "factorial": [
            {
                "name": name,
                "backbone": backbone,
                "top1": spread(top1, 0.0 if name.startswith("(i) ") else 0.3),
                "flops_saved": spread(13.4 if "exits" in name else 0.0),
            }
            for backbone in ("int8", "paper")
            for name, top1 in FACTORIAL.items()
        ],
        "sweeps": [sweep("paper", schema.PUBLISHED), sweep("int8", schema.BEST)],
        "pruned": [
            {
                "backbone": "paper",
                "block": 9,
                "inr_share_of_mean": 41.0,
                "is_dropped_by_rule": True,
                "kept": row(schema.PUBLISHED, "paper", 55.0, 15.0, 74.0, std=0.3),
                "left_out": row(schema.PUBLISHED, "paper", 58.1, 13.4, 76.0, std=0.2),
            }
        ],
        "shares": [
            {
                "backbone": "int8",
                "recipe": schema.BEST,
                "exits": [
                    {"block": block, "share": spread(25.0, 1.2), "top1": spread(50.0 + block, 0.4)}
                    for block in (8, 10, 11, 12)
                ],
            }
        ],
        "quadrants": [
            quadrants("int8", schema.BEST, 420, 400),
            quadrants("paper", schema.PUBLISHED, 300, 900),
            quadrants("float", schema.BEST, 410, 400),
        ],
        "owed": [
            {
                "backbone": "paper",
                "recipe": schema.PUBLISHED,
                "margin": -4.0,
                "float_margin": -4.2,
                "difference": 0.2,
                "interval": (-0.7, 1.1),
            }
        ],
        "examples": [example(kind, i) for kind in ("rescued", "lost") for i in range(4)],
        "drift": [drift("int8", 0.3), drift("paper", 1.4)],
        "costs": [
            {
                "name": schema.BEST,
                "backbone": "int8",
                "flops_saved": 19.0,
                "time_saved": 14.2,
                "head_share": 1.3,
            }
        ],
        "frontier": frontier(),
        "findings": [],
    }
    built["findings"] = findings(built)
    return built


def without_parts() -> Report:
    """The same study, in which no part was run."""
    bare = report() | EMPTY
    return bare | {"findings": findings(bare)}  # type: ignore[return-value,arg-type]
