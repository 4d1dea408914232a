"""Which table of tilings each GPU reads, and for which towers float16 is faster there."""

from importlib import metadata
from typing import Any

import torch

from lraee.kernels import user_cache
from lraee.kernels.archs import ARCHS
from lraee.kernels.measured import MEASURED
from lraee.measurement import float16

NAMES = {
    "L=50 D=768 blocks=12": "ViT-B/32",
    "L=197 D=768 blocks=12": "ViT-B/16",
    "L=257 D=1024 blocks=24": "ViT-L/14",
}


def tiling_lines() -> list[str]:
    """One line a CUDA device: the user's table, the one that was measured here, or the model."""
    return [_tiling_line(i) for i in range(_device_count())]


def _device_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _tiling_line(index: int) -> str:
    gpu = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    capability, table = 10 * major + minor, user_cache.read("tilings")
    if table is not None and (reason := _why_not_used(table, gpu)) is None:
        rows = table["rows"]
        return f"cuda:{index} of `lraee tune`, {len(rows)} rows, {str(table.get('date'))[:10]}"
    own = "" if table is None else f"; the table of `lraee tune` is {reason}"
    if capability in MEASURED:
        return f"cuda:{index} measured on one {ARCHS[capability].part} (kernels/measured.py){own}"
    return f"cuda:{index} chosen by a cost model; `lraee tune` measures them here{own}"


def _why_not_used(table: dict[str, Any], gpu: str) -> str | None:
    """Why a table in the user's cache does not hold here, or None."""
    if table.get("gpu") != gpu:
        return f"of another GPU ({str(table.get('gpu'))[:80]})"
    if table.get("triton") != metadata.version("triton"):
        return f"of another Triton ({str(table.get('triton'))[:20]})"
    return None if isinstance(table.get("rows"), list) else "damaged"


def float_lines() -> list[str]:
    """One line for each tower of which float16 was measured to be faster on the first GPU."""
    if not _device_count():
        return []
    gpu = torch.cuda.get_device_name(0)
    lines = {key: float16.faster_line(gpu, key) for key in float16.tower_keys(gpu)}
    return [f"{NAMES.get(key, key)}: {line}" for key, line in lines.items() if line is not None]
