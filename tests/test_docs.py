"""README and docs: short, true, and every command in them runs or says why it is not run here."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
MAX_README_LINES = 150

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `reason` says why it is not run."""

    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [
        Block(match["language"], match["code"], match["reason"])
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """The Python blocks of a page are one program; each shell block is run by itself."""
    live = [block for block in blocks(page) if block.reason is None]
    python = "\n".join(block.code for block in live if block.language == "python")
    if python:
        run([sys.executable, "-c", python], tmp_path)
    for block in live:
        if block.language == "bash":
            run(["bash", "-euo", "pipefail", "-c", block.code], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_code_is_fenced_with_its_language(page: Path) -> None:
    """An indented or unnamed block would escape test_commands_run."""
    allowed = {"bash", "python", "json", "text", "nginx", "javascript", "toml", "yaml"}
    for block in blocks(page):
        assert block.language in allowed, f"{_name(page)}: {block.language!r} {block.code[:60]!r}"


def test_the_reader_sees_blocks() -> None:
    text = "<!-- not run: why -->\n```bash\na\n```\n\n```python\nb\n```\n"
    matches = [(m["language"], m["reason"]) for m in _BLOCK.finditer(text)]
    assert matches == [("bash", "why"), ("python", None)]


def test_readme_is_short() -> None:
    count = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert count <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


def test_study_figures_are_those_of_the_summary() -> None:
    module = [sys.executable, "-m", "bench.study_figures", "fill", "docs/study/summary.json"]
    run([*module, "docs/study.md", "--check"], ROOT)
    module = [sys.executable, "-m", "bench.study_figures", "dose", "docs/study/dose.json"]
    run([*module, "docs/study.md", "--check"], ROOT)
