"""Fuzz the decoder with atheris: `python -m bench.fuzz_decoding [seconds] [corpus folder]`.

Not part of the tests: `pip install atheris` first. Any exception but DecodeError, a picture of
another shape, more than 1 GiB or 30 s for one file ends it; the file is left in the working folder.
"""

import argparse
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "tests" / "data" / "corpus"


def main() -> None:
    """Run atheris on the decoder and on the header readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=int, default=60)
    parser.add_argument("corpus", nargs="?", type=Path, default=CORPUS)
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError as error:
        sys.exit(f"fuzz_decoding: atheris must be installed, got {error}; pip install atheris")

    with atheris.instrument_imports(include=["lraee.data.decoding", "lraee.data.headers"]):
        from lraee.data import decoding

    limits = decoding.Limits(max_pixels=1 << 22, max_seconds=5.0)

    def one(data: bytes) -> None:
        for mode in ("exact", "fast"):
            try:
                pixels = decoding.decode(data, limits=limits, target=24, mode=mode).pixels
            except decoding.DecodeError as error:
                assert "\n" not in str(error)
            else:
                assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == "uint8"

    options = [f"-max_total_time={arguments.seconds}", "-timeout=30", "-rss_limit_mb=1024"]
    # New inputs go to the first folder; the corpus is only read.
    new_inputs = tempfile.mkdtemp(prefix="lraee-fuzz-")
    atheris.Setup([sys.argv[0], *options, new_inputs, str(arguments.corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
