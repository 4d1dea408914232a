"""What a library calls its parts stands in lraee/towers alone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = (
    "conv1", "positional_embedding", "attn_pool", "pool_type", "batch_first", "resblocks",
    "ln_post",
)  # fmt: skip
OUTSIDE = [
    path
    for folder in ("lraee", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.relative_to(ROOT).parts[:2] != ("lraee", "towers")
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_towers_name_the_parts_of_a_library(path: Path) -> None:
    text = path.read_text()
    assert not [word for word in WORDS if re.search(word, text)]


def test_the_words_are_looked_for_where_they_are() -> None:
    text = (ROOT / "lraee" / "towers" / "open_clip.py").read_text()
    assert all(re.search(word, text) for word in WORDS)
    assert len(OUTSIDE) > 100
