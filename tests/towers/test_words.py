"""What a library calls its parts stands in lraee/towers alone; identifiers name things."""

import ast
import re
from collections.abc import Iterator
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


# Identifiers name things (docs/glossary.md), no part of a story

STORY = {
    "asked", "found", "gone", "known", "looks", "made", "mine", "missed", "nobody", "seen", "stays",
    "think", "told", "wanted",
}  # fmt: skip
LOCALS = STORY - {"known", "wanted"}  # adjectives that a line beside them explains
FIELDS = {("lraee/study/schema.py", "made")}
"""What the format of a report calls a field."""
SOURCES = sorted(
    path
    for folder in ("lraee", "kernels", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).parts[:2] != ("lraee", "kernels")
)


def introduced_names(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Each name that the code introduces, and whether it is a local one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, False
            if isinstance(node, ast.ClassDef):
                for each in node.body:
                    if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                        yield each.target.id, False
        elif isinstance(node, ast.arg):
            yield node.arg, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, False
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, True


def words_of(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name)}


def stories(path: str, text: str) -> set[str]:
    """Identifiers with a word of a story in them; names of tests are sentences."""
    return {
        name
        for name, is_local in introduced_names(ast.parse(text))
        if words_of(name) & (LOCALS if is_local else STORY)
        and not name.startswith("test_")
        and (path, name) not in FIELDS
    }


def test_no_identifier_tells_a_story() -> None:
    wrong = {str(path.relative_to(ROOT)): stories(str(path.relative_to(ROOT)), path.read_text())
             for path in SOURCES}  # fmt: skip
    assert not {path: names for path, names in wrong.items() if names}
    assert len(SOURCES) > 200


def test_stories_are_looked_for_in_every_kind_of_name() -> None:
    text = (
        "class Seen:\n    gone: int\n    def found(self, asked, *made, told):\n"
        "        self.is_known = 1\n        known = mine = 2\n"
    )
    names = {"Seen", "gone", "found", "asked", "made", "told", "is_known", "mine"}
    assert stories("x.py", text) == names


def test_no_identifier_of_the_extension_tells_a_story() -> None:
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        code = re.sub(r"//.*|\"[^\"]*\"", "", path.read_text())
        names = set(re.findall(r"[A-Za-z_]\w*", code))
        assert not {name for name in names if words_of(name) & STORY}, path
