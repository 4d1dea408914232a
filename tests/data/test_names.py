import random

import pytest

from lraee.data.names import (
    from_stored,
    printable,
    reason_counts,
    refused_file,
    refused_folder,
    refused_member,
    to_bytes,
    to_stored,
    to_text,
)

ODD = [
    b"plain.jpg",
    "Screenshot at 3.04.05\u202fPM.png".encode(),
    "a\u00a0b\u200dc\ufeff.jpg".encode(),
    "e\u0301.jpg".encode(),  # decomposed
    "\u00e9.jpg".encode(),  # composed
    b"latin-\xe9.jpg",
    b"\xff\xfe\x80",
    b"a\nb\\x\x1b[31m.jpg",
    "\U0001f468\u200d\U0001f469.png".encode(),
]


@pytest.mark.parametrize("name", ODD)
def test_names_keep_their_bytes(name: bytes) -> None:
    text = to_text(name)
    assert to_bytes(text) == name
    stored = to_stored(text)
    assert from_stored(stored.encode().decode()) == text  # as UTF-8 and back
    shown = printable(text)
    assert shown.isprintable() and shown.encode()


def test_random_names_keep_their_bytes() -> None:
    rng = random.Random(0)
    stored = set()
    names = {bytes(rng.randrange(1, 256) for _ in range(rng.randint(1, 6))) for _ in range(2000)}
    for name in names:
        stored.add(to_stored(to_text(name)))
        assert to_bytes(from_stored(to_stored(to_text(name)))) == name
    assert len(stored) == len(names)


def test_a_name_in_utf8_is_stored_as_it_is() -> None:
    assert to_stored("a\u202f\u00e9\\x.jpg") == "a\u202f\u00e9\\x.jpg"
    assert to_stored(to_text(b"a\xe9.jpg")) == "a\0e9.jpg"


def test_printable_escapes_only_what_cannot_be_seen() -> None:
    assert printable("\u0646\u0627\u0645\u0647 a.png") == "\u0646\u0627\u0645\u0647 a.png"
    assert printable("a\u200cb\x1b.png") == "a\\u200cb\\x1b.png"
    assert len(printable("\u200c" * 500)) == 200


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".a.jpg", "is a hidden file"),
        ("a.txt", "has no photo's suffix"),
        ("a", "has no photo's suffix"),
        ("A.JPG", None),
    ],
)
def test_refused_files(name: str, reason: str | None) -> None:
    assert refused_file(name) == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".thumbnails", "is a hidden folder"),
        (".Trash-1000", "is a hidden folder"),
        ("@eaDir", "is a system folder"),
        ("#recycle", "is a system folder"),
        ("$RECYCLE.BIN", "is a system folder"),
        ("System Volume Information", "is a system folder"),
        ("__MACOSX", "is a system folder"),
        ("lost+found", "is a system folder"),
        ("2026", None),
    ],
)
def test_refused_folders(name: str, reason: str | None) -> None:
    assert refused_folder(name) == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a.jpg", "has an unsafe name"),
        ("/a.jpg", "has an unsafe name"),
        ("a\\b.jpg", "has an unsafe name"),
        ("a\x07.jpg", "has an unsafe name"),
        ("@eaDir/a.jpg", "lies in a system folder"),
        ("x/.thumbnails/a.jpg", "lies in a hidden folder"),
        ("x/._a.jpg", "is a hidden file"),
        ("./x/a\u202f\u200d.jpg", None),
    ],
)
def test_refused_members(name: str, reason: str | None) -> None:
    assert refused_member(name) == reason


def test_reasons_are_counted_without_their_figures() -> None:
    reasons = ["has 12 bytes, more than 9", "has 4 bytes, more than 9", "cannot be read: a", "b"]
    assert reason_counts(reasons) == {"has N bytes, more than N": 2, "b": 1, "cannot be read": 1}
