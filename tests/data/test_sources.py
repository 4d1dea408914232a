import os
import subprocess
import sys
from pathlib import Path

import pytest

from lraee.data.names import to_bytes
from lraee.data.photos import Photos
from lraee.data.sources import Skipped, walk
from tests.image_files import encoded


def tree(root: Path, *names: str | bytes) -> Path:
    """Empty files of these paths."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass
    return root


def walked(root: Path) -> tuple[list[str], dict[str, str]]:
    rows = list(walk(root))
    names = [row for row in rows if not isinstance(row, Skipped)]
    skipped = [row for row in rows if isinstance(row, Skipped)]
    assert len({row.name for row in skipped}) == len(skipped)
    return names, {row.name: row.reason for row in skipped}


def test_names_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "a/z.jpg",
        "a-b/c.jpg",
        "a/b/c.jpg",
        "B.jpg",
        "\u00e9.jpg",
        "e\u0301.jpg",
        "z.jpg",
    ]
    result, _ = walked(tree(tmp_path, *names, b"\xff.jpg"))
    assert len(result) == 9
    assert result == sorted(result, key=to_bytes)


def test_order_and_names_are_the_same_in_every_locale(tmp_path: Path) -> None:
    tree(tmp_path, "\u00e9.jpg", "z.jpg", "Z/a.jpg", "\u202f.jpg", b"\xe9.jpg")
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "import importlib.util as u, types;"
        "[sys.modules.setdefault(n, types.ModuleType(n)) for n in ('lraee', 'lraee.data')];"
        "load = lambda n: (lambda s: (lambda m: (sys.modules.__setitem__(s.name, m),"
        " s.loader.exec_module(m), m)[-1])(u.module_from_spec(s)))"
        "(u.spec_from_file_location('lraee.data.' + n, sys.argv[2] + '/lraee/data/' + n + '.py'));"
        "load('names'); print(ascii(list(load('sources').walk(sys.argv[1]))))"
    )
    outputs = set()
    for locale, is_utf8 in (("C", "0"), ("C", "1"), ("C.UTF-8", "0"), ("POSIX", "0")):
        command = [
            sys.executable,
            "-X",
            f"utf8={is_utf8}",
            "-c",
            script,
            str(tmp_path),
            os.getcwd(),
        ]
        environment = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"}
        outputs.add(
            subprocess.run(command, capture_output=True, check=True, env=environment).stdout
        )
    assert len(outputs) == 1 and b"udce9" in outputs.pop()


def test_hidden_and_system_folders_are_skipped_and_counted(tmp_path: Path) -> None:
    folders = (".Trash-1000/files", ".thumbnails", "@eaDir/a.jpg", "x/#recycle", "lost+found")
    tree(tmp_path, "a.jpg", ".b.jpg", "notes.txt", *(f"{folder}/c.jpg" for folder in folders))
    names, skipped = walked(tmp_path)
    assert names == ["a.jpg"]
    assert skipped == {
        ".Trash-1000": "is a hidden folder", ".thumbnails": "is a hidden folder",
        "@eaDir": "is a system folder", "x/#recycle": "is a system folder",
        "lost+found": "is a system folder", ".b.jpg": "is a hidden file",
        "notes.txt": "has no photo's suffix",
    }  # fmt: skip


def test_a_hidden_root_is_walked(tmp_path: Path) -> None:
    assert walked(tree(tmp_path / ".photos", "a.jpg"))[0] == ["a.jpg"]


def test_a_linked_folder_is_followed_once(tmp_path: Path) -> None:
    tree(tmp_path, "disk/2020/a.jpg", "album/b.jpg", "disk/2020/in/c.jpg")
    os.symlink(tmp_path / "disk" / "2020", tmp_path / "album" / "2020")
    os.symlink(tmp_path / "disk" / "2020", tmp_path / "album" / "again")
    names, skipped = walked(tmp_path / "album")
    assert names == ["2020/a.jpg", "2020/in/c.jpg", "b.jpg"]
    assert skipped == {"again": "is a folder that was listed before"}


def test_a_folder_keeps_its_own_name_beside_links_to_it(tmp_path: Path) -> None:
    tree(tmp_path, "n01/a.jpg", ".cache/b.jpg")
    os.symlink("n01", tmp_path / "alias")
    os.symlink(".cache", tmp_path / "cache")
    names, skipped = walked(tmp_path)
    assert names == ["cache/b.jpg", "n01/a.jpg"]
    assert skipped["alias"] == "is a link to a folder that is listed by its own name"


def test_loops_end(tmp_path: Path) -> None:
    tree(tmp_path, "x/y/a.jpg", "outer/b.jpg")
    os.symlink("..", tmp_path / "x" / "y" / "up")
    os.symlink(tmp_path / "x", tmp_path / "outer" / "x")
    os.symlink(tmp_path / "outer", tmp_path / "x" / "back")
    os.symlink("self", tmp_path / "x" / "self")
    names, skipped = walked(tmp_path / "x")
    assert names == ["back/b.jpg", "y/a.jpg"]
    assert skipped["y/up"] == "is a link to a folder around it"
    assert skipped["back/x"] == "is a link to a folder that is listed by its own name"
    assert skipped["self"] == "has no photo's suffix"


def test_a_folder_that_cannot_be_listed_is_a_skip(tmp_path: Path) -> None:
    names, skipped = walked(tmp_path / "missing")
    assert names == [] and skipped == {".": "cannot be listed: No such file or directory"}


def test_photos_use_names_with_odd_characters(tmp_path: Path) -> None:
    names = ["at 3\u202fPM.jpg", "v\u00a013.jpg", "\U0001f468\u200d\U0001f469.jpg", "a\nb.jpg"]
    for name in [*map(os.fsencode, names), b"\xe9.jpg"]:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(encoded(1))
    photos = Photos(tmp_path)
    assert len(photos) == 5 and photos.skipped == []
    assert all(photos.image(i).size == (80, 64) for i in range(5))


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    for k in range(10):
        (tmp_path / str(k)).mkdir()
        for i in range(10_000):
            (tmp_path / str(k) / f"{i}.jpg").touch()
    names, skipped = walked(tmp_path)
    assert len(names) == 100_000 and skipped == {} and names == sorted(names)
