"""Recall of image search: by hand, and against a plain loop."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.evaluation.evaluate import Embedded
from lraee.evaluation.retrieval import DEPTHS, search_all
from lraee.measurement.neighbours import other_neighbours
from tests.support import generator


def embedded_of(forms: dict[str, Tensor], labels: list[int | None] | None = None) -> Embedded:
    n = len(forms["float"])
    return Embedded(
        forms, {name: [0.001] for name in forms}, labels or [None] * n, [str(i) for i in range(n)]
    )


def on_a_circle(degrees: list[float]) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_by_hand() -> None:
    """Twelve photos on a circle: each one's nearest is its neighbour on the closer side."""
    degrees = [0.0, 10, 30, 60, 100, 150, 180, 215, 255, 290, 320, 345]
    turned = degrees.copy()
    turned[1] = 170.0  # photo 1 is now between 5 and 6
    labels: list[int | None] = [0, 0, 0, 1, 1, None, 2, 2, 1, 0, None, 0]
    base, fast = search_all(
        embedded_of({"float": on_a_circle(degrees), "int8": on_a_circle(turned)}, labels)
    )
    assert (base.scheme, fast.scheme) == ("float", "int8")
    assert base.recall_1 == base.recall_5 == base.recall_10 == 100.0
    # Float's first:  0-1  1-0  2-1  3-2  4-3  5-6  6-5  7-6  8-9  9-10  10-11  11-0
    # Photo 1 at 170: 0-11 1-6  2-0  3-2  4-3  5-1  6-1  7-6  8-9  9-10  10-11  11-0
    # Lost at 1: photos 0, 1, 2, 5, 6
    assert fast.recall_1 == pytest.approx(100 * 7 / 12)
    # Within five: 5 and 6 find each other again; 0 does not find 1 (170 away), nor 1 finds 0
    # (nearest to 170: 6 5 7 4 8), nor 2 finds 1 (140 away; nearest 0 3 11 4 10)
    assert fast.recall_5 == pytest.approx(100 * 9 / 12)
    # Within ten of eleven others: only the farthest is missed. Of 0 that is 6 (180), of 1 it is 11
    # (175) and of 2 it is 7 (175): all three find theirs
    assert fast.recall_10 == 100.0
    # Own class at 1, of ten labelled: float: 0-1 y 1-0 y 2-1 y 3-2 n 4-3 y 6-5 n 7-6 y 8-9 n 9-10 n
    # 11-0 y; with photo 1 at 170: 0-11 y 1-6 n 2-0 y 3-2 n 4-3 y 6-1 n 7-6 y 8-9 n 9-10 n 11-0 y
    assert base.class_1 == pytest.approx(60.0) and fast.class_1 == pytest.approx(50.0)


def naive(forms: dict[str, Tensor], labels: list[int | None]) -> dict[str, dict[str, float | None]]:
    """Photo by photo, over sorted lists."""

    def order(rows: Tensor, query: int) -> list[int]:
        others = [i for i in range(len(rows)) if i != query]
        return sorted(others, key=lambda i: -float(rows[i] @ rows[query]))

    n = len(labels)
    wanted = [order(forms["float"], i)[0] for i in range(n)]
    result: dict[str, dict[str, float | None]] = {}
    for name, rows in forms.items():
        lists = [order(rows, i) for i in range(n)]
        row: dict[str, float | None] = {}
        for k in DEPTHS:
            row[f"recall_{k}"] = 100 * sum(wanted[i] in lists[i][:k] for i in range(n)) / n
            known = [i for i in range(n) if labels[i] is not None]
            hits = sum(labels[i] in [labels[j] for j in lists[i][:k]] for i in known)
            row[f"class_{k}"] = 100 * hits / len(known) if known else None
        result[name] = row
    return result


@pytest.mark.parametrize("n", [11, 12, 60])
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_against_a_plain_loop(n: int, share: float) -> None:
    base = torch.randn(n, 8, generator=generator(n))
    forms = {
        name: F.normalize(base + noise * torch.randn(n, 8, generator=generator(n + 1)), dim=1)
        for name, noise in (("float", 0.0), ("int8", 0.3), ("exits learned", 1.0))
    }
    is_known = torch.rand(n, generator=generator(n + 2)) < share
    labels = [int(i % 9) if known else None for i, known in enumerate(is_known.tolist())]
    rows = search_all(embedded_of(forms, labels))
    expected = naive(forms, labels)
    assert [row.scheme for row in rows] == list(forms)
    for row in rows:
        figures = asdict(row)
        for key, value in expected[row.scheme].items():
            assert (
                figures[key] == pytest.approx(value, rel=1e-5)
                if value is not None
                else figures[key] is None
            )  # noqa: E501


def test_photos_that_are_not_finite_find_nothing() -> None:
    """And do not stand in the way of others, in either form."""
    base = F.normalize(torch.randn(14, 8, generator=generator(1)), dim=1)
    broken = base.clone()
    broken[3] = torch.nan
    labels: list[int | None] = [0] * 14
    row = search_all(embedded_of({"float": base, "int8": broken}, labels))[1]
    lost = {i for i in range(14) if i == 3 or int(other_neighbours(base, 1)[i]) == 3}
    assert row.recall_1 == pytest.approx(100 * (14 - len(lost)) / 14)
    assert row.class_1 == pytest.approx(100 * 13 / 14)
    first, second = search_all(embedded_of({"float": broken, "int8": broken}, labels))
    for each in (first, second):
        assert each.recall_1 == each.recall_10 == pytest.approx(100 * 13 / 14)


def test_too_few_photos() -> None:
    rows = F.normalize(torch.randn(10, 8, generator=generator(2)), dim=1)
    with pytest.raises(ValueError, match="^retrieval: photos must be more than 10, got 10"):
        search_all(embedded_of({"float": rows}))
