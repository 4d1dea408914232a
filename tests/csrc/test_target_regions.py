"""Target regions of csrc: what is compiled for instruction sets that not every machine has."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.csrc.compiled import CSRC

FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h"))
SIMD = CSRC / "cpu" / "simd"
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"][^>"]+)[>"]', re.MULTILINE)
BEGIN = re.compile(r"^LRAEE_BEGIN_(\w+)$", re.MULTILINE)
END = re.compile(r"^LRAEE_END_TARGET$", re.MULTILINE)


def _name(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_each_target_string_stands_once() -> None:
    """In the header of its instruction set: a second copy would drift from it."""
    strings: Counter[str] = Counter()
    for path in FILES:
        targets = re.findall(r'\btarget\s*\(\s*\\?"([^"\\]*)', path.read_text())
        assert not targets or path.parent == SIMD, f"{_name(path)} must not name a target"
        strings.update(targets)
    assert len(strings) == 5, strings
    assert set(strings.values()) == {1}, strings


def _standard_headers(text: str, read: set[str]) -> list[str]:
    """The standard headers that a text reads first, itself or by headers of csrc not yet read."""
    headers = []
    for include in INCLUDE.findall(text):
        if include in read:
            continue
        read.add(include)
        if include.startswith("<"):
            headers.append(include[1:])
        else:
            headers += _standard_headers((CSRC / include[1:]).read_text(), read)
    return headers


REGIONS = [path for path in FILES if BEGIN.search(path.read_text())]


@pytest.mark.parametrize("path", REGIONS, ids=_name)
def test_region_is_one_and_reads_no_standard_header(path: Path) -> None:
    """An inline function of the standard library that is compiled for AVX512 in one file may be the
    copy that the linker keeps for all: it would be an illegal instruction on other machines.
    """
    text = path.read_text()
    (begin,), (end,) = BEGIN.finditer(text), END.finditer(text)
    isa = path.stem.upper()
    assert begin[1] == isa, f"{_name(path)} must open the region of {isa}, got {begin[1]}"
    read: set[str] = set()
    before = _standard_headers(text[: begin.start()], read)
    assert "immintrin.h" in before
    assert _standard_headers(text[begin.end() : end.start()], read) == []
    assert INCLUDE.findall(text[end.end() :]) == []


def test_regions_are_read() -> None:
    """The reading works: it meets the kernels, and reports a header that comes too late."""
    names = {_name(path) for path in REGIONS}
    assert {"cpu/int8_linear/amx.cpp", "cpu/simd/avx512_vnni.h"} <= names
    assert _standard_headers('#include "cpu/types.h"\n#include <cmath>', set()) == [
        "cstdint", "cmath",
    ]  # fmt: skip
