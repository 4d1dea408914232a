"""Which table of tilings each GPU reads, and for which towers float16 is faster there."""

import torch

from lraee.kernels import first_use, tuned, user_cache
from lraee.kernels.archs import ARCHS
from lraee.kernels.families import gluon_unavailable_reason
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
    table, capability = tuned.table(gpu), 10 * major + minor
    count = sum(map(len, table.rows.values()))
    reason = "" if table.reason is None else f"; {table.reason}"
    if count:
        date = (user_cache.read(tuned.NAME) or {}).get("date")
        when = f" of {date[:10]}" if isinstance(date, str) else ""
        return f"cuda:{index} the table of `lraee tune`{when}, {count} rows{reason}"
    if capability in MEASURED:
        part = ARCHS[capability].part
        return f"cuda:{index} measured on one {part} (kernels/measured.py){reason}"
    return f"cuda:{index} chosen by a cost model{reason}"


def family_lines() -> list[str]:
    """One line for each kernel family that a GPU could use and does not, with the reason."""
    lines = []
    for index in range(_device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor == first_use.CAPABILITY:
            gpu = torch.cuda.get_device_name(index)
            reasons = (first_use.reason("persistent", gpu), gluon_unavailable_reason())
            lines += [f"cuda:{index} {reason}" for reason in reasons if reason is not None]
    return lines


def float_lines() -> list[str]:
    """One line for each tower of which float16 was measured to be faster on the first GPU."""
    if not _device_count():
        return []
    gpu = torch.cuda.get_device_name(0)
    lines = {key: float16.faster_line(gpu, key) for key in float16.tower_keys(gpu)}
    return [f"{NAMES.get(key, key)}: {line}" for key, line in lines.items() if line is not None]
