"""What others have published of the same systems: ImageNet, ViT-B/32, for reading beside ours."""

from lraee.study import schema
from lraee.study.schema import MainRow

PAPER_SOURCE = "arXiv 2605.26415, ImageNet-1K zero-shot, ViT-B/32, INT8"

_PAPER: tuple[tuple[str, float, float, float, float], ...] = (
    # name, top-1 and its std, FLOPs saved and its std
    (schema.FULL_DEPTH, 58.72, 0.0, 0.0, 0.0),
    (f"{schema.PUBLISHED}, initial", 61.11, 0.0, 10.0, 0.0),
    (schema.PUBLISHED, 61.16, 0.06, 13.38, 0.11),
    (schema.SMOOTHED_EXITS, 62.41, 0.0, 13.4, 0.0),
    (schema.CLASS_TOKEN, 58.72, 0.0, 0.0, 0.0),
    (schema.PABEE, 61.82, 0.0, 3.64, 0.0),
    (schema.ADAPTIVE, 59.84, 0.0, 13.5, 0.0),
    (schema.CONFIDENCE, 60.28, 0.0, 4.7, 0.0),
    (schema.STATIC, 61.40, 0.0, 0.0, 0.0),
)

_INT8: tuple[tuple[str, float, float, str], ...] = (
    # name, float, INT8, source
    ("OpenVINO PTQ", 63.37, 61.92, "optimum-intel PR 1283"),
    ("RepQ-ViT", 63.4, 62.9, "RepQ-ViT"),
    ("QwT", 63.4, 63.0, "QwT"),
)


def published() -> list[MainRow]:
    """The rows, as published; agreement was not."""
    rows = [_row(*figures, PAPER_SOURCE + _REMARKS.get(figures[0], "")) for figures in _PAPER]
    rows += [
        _row(
            f"{schema.FULL_DEPTH}, {name}", int8, 0.0, 0.0, 0.0,
            f"{source}, ImageNet-1K zero-shot, CLIP ViT-B/32; float {in_float:.2f}",
        )
        for name, in_float, int8, source in _INT8
    ]  # fmt: skip
    return rows


_REMARKS = {schema.STATIC: "; after block 11, saving not given"}


def _row(
    name: str, top1: float, top1_std: float, saved: float, saved_std: float, note: str
) -> MainRow:
    return {
        "name": name,
        "backbone": "published",
        "top1": {"mean": top1, "std": top1_std},
        "agreement": None,
        "flops_saved": {"mean": saved, "std": saved_std},
        "seeds": 3 if top1_std else 1,
        "note": note,
    }
