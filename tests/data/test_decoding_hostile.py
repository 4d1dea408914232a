"""Hostile pictures: each decodes or is refused with a reason, in bounded time and memory.

Everything runs in processes of their own, so that a crash or a hang is a failed test.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.data.hostile_files import bombs, whole_files

_RUN = """
import json, resource, sys, time, warnings
from PIL import Image
from lraee.data.decoding import DecodeError, decode
from tests.data.hostile_files import bombs, mutated, whole_files
warnings.simplefilter("ignore")
source, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
files = bombs().items() if source == "bombs" else mutated(stop, seed=int(sys.argv[4]))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results, types = {}, []
for name, data in list(files)[start:stop]:
    begin = time.process_time()
    for mode in ("exact", "fast"):
        try:
            decoded = decode(data, target=24, mode=mode)
            shape = decoded.pixels.shape
            result = f"decoded {len(shape)} {shape[2]} {decoded.pixels.dtype}"
        except DecodeError as error:
            result = str(error)
        except BaseException as error:
            types.append(f"{name}: {type(error).__name__}: {error}")
    results[name] = [result, time.process_time() - begin]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"results": results, "other": types, "base": base, "peak": peak}))
"""
# Of one file, both modes: far above what any takes, far below a hang.
_SECONDS = 60
_PEAK_KIB = 1 << 20


def run(source: str, start: int, stop: int, seed: int = 0) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", _RUN, source, str(start), str(stop), str(seed)],
        capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert report["other"] == []
    assert report["peak"] < max(_PEAK_KIB, report["base"] + _PEAK_KIB // 2)
    for name, (reason, seconds) in report["results"].items():
        assert reason and "\n" not in reason and len(reason) < 400, name
        assert seconds < _SECONDS, (name, reason, seconds)
    return report["results"]  # type: ignore[no-any-return]


def test_mutated_files_decode_or_are_refused() -> None:
    results = run("mutated", 0, 156)
    assert len(results) == 156 and len({name.split("-")[0] for name in results}) == 12
    decoded = sum(reason == "decoded 3 3 uint8" for reason, _ in results.values())
    assert 20 < decoded < 130, decoded


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_mutated_files_decode_or_are_refused(seed: int) -> None:
    assert len(run("mutated", 0, 504, seed)) == 504


REASONS = {
    "png-dimensions": "60000 x 60000 pixels, more than",
    "png-negative": "4294967295 x 4294967295 pixels, more than",
    "png-empty": "0 x 10 pixels",
    "png-deep": "MiB to decode, more than",
    "png-pixels": "MiB to decode, more than",
    "png-acTL": "more than 10000 frames",
    "jpeg-dimensions": "65535 x 65535 pixels, more than",
    "jpeg-large": "bytes cannot hold 12000 x 12000",
    "jpeg-progressive": "bytes cannot hold 13000 x 13000",
    "jpeg-scans": "scans, more than 100",
    "gif-frames": "more than 10000 frames",
    "gif-screen": "65535 x 65535 pixels, more than",
    "webp-canvas": "16777216 x 16777216 pixels, more than",
    "bmp-dimensions": "60000 x 60000 pixels, more than",
    "tiff-tile": "MiB to decode, more than",
    "tiff-dimensions": "3600000000 pixels",
    "tiff-deflate": "MiB to decode, more than",
    "tiff-loop": "more than 10000 frames",
    "ppm-dimensions": "999999999 x 999999999 pixels, more than",
    "jpeg-exif-entries": "decoded 3 3 uint8",
    "jpeg-exif-offset": "decoded",
    "jpeg-exif-loop": "decoded",
    "jpeg-icc": "decoded",
    "jpeg-comments": "decoded",
    "nested": "decoded",
}
"""What each bomb must give; those not named may decode or be refused."""


def test_bombs_are_refused_or_harmless() -> None:
    results = run("bombs", 0, 30)
    assert results.keys() == bombs().keys() and len(results) == 30
    for name, reason in REASONS.items():
        assert reason in results[name][0], (name, results[name])


def test_the_whole_files_are_whole() -> None:
    from lraee.data.decoding import decode

    for name, data in whole_files().items():
        assert decode(data).pixels.shape in ((33, 40, 3), (40, 33, 3)), name
