"""make reproduce: its split lists, and the one line where something is missing."""

from pathlib import Path

from typer.testing import CliRunner

from bench import reproduce


def run(*args: str) -> tuple[int, list[str]]:
    app = reproduce.typer.Typer()
    app.command()(reproduce.main)
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.output.strip().splitlines()


def test_splits_are_disjoint_and_even() -> None:
    names = [f"train/n{c}/{i:04d}.JPEG" for c in range(20) for i in range(1300)]
    heads, held_out = reproduce.split_train(names)
    assert len(heads) == 2600 and len(held_out) == 10_000
    assert not set(heads) & set(held_out)
    assert {sum(f"/n{c}/" in name for name in held_out) for c in range(20)} == {500}
    few = reproduce.split_train(names[:100])
    assert [len(part) for part in few] == [10, 90]


def test_one_line_says_what_to_give(tmp_path: Path) -> None:
    code, lines = run()
    assert code == 1 and lines == [reproduce.NOTHING_GIVEN]
    code, lines = run("--imagenet", str(tmp_path))
    assert code == 1 and len(lines) == 1 and "must hold a folder train" in lines[0]
