"""Which answers are right, by the float model, by labels, and by search; by hand and by loops."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lraee.calibration.targets import Index, judge
from tests.support import generator

CLASSES = torch.eye(3)
TEACHER = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [3.0, 0.0, 1.0]])
FULL = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
"""The float model answers 0, 1, 2, 0; int8 at full depth 0, 1, 1, 0."""
TOP1 = torch.tensor([[0, 0], [2, 1], [2, 1], [1, 1]])


def probes_of(top1: Tensor, embedding: Tensor | None = None) -> dict[str, Tensor]:
    n, m = top1.shape
    embedding = torch.zeros(n, m, 3) if embedding is None else embedding
    return {"top1": top1, "embedding": embedding, "features": torch.zeros(n, m, 3)}


def test_right_is_what_the_float_model_says() -> None:
    result = judge(
        probes_of(TOP1), {"teacher": TEACHER, "full": FULL}, classes=CLASSES, labels=None
    )
    assert result.is_correct.int().tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert result.gain.tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]]
    # The loss is against int8 at full depth, which is wrong of image 2
    assert result.loss.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert not result.is_signed


def test_a_proof_is_of_the_answer_at_full_depth() -> None:
    result = judge(
        probes_of(TOP1), {"teacher": TEACHER, "full": FULL}, classes=CLASSES, labels=None,
        is_proof=True,
    )  # fmt: skip
    assert result.is_correct.int().tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert result.gain.tolist() == (1 - result.loss).tolist()


@pytest.mark.parametrize("is_proof", [False, True])
def test_right_is_the_label_where_there_are_labels(is_proof: bool) -> None:
    labels = torch.tensor([0, 2, 1, 1])
    result = judge(
        probes_of(TOP1), {"teacher": TEACHER, "full": FULL}, classes=CLASSES, labels=labels,
        is_proof=is_proof,
    )  # fmt: skip
    assert result.is_correct.int().tolist() == [[1, 1], [1, 0], [0, 1], [1, 1]]
    assert result.gain.tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]]
    # (right at full depth - right here + 1) / 2
    assert result.loss.tolist() == [
        [0.5, 0.5, 0.5], [0.0, 0.5, 0.5], [1.0, 0.5, 0.5], [0.0, 0.0, 0.5],
    ]  # fmt: skip
    assert result.is_signed


def test_an_index_without_those_that_search() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = torch.tensor([[2.0, 0.1], [0.2, 3.0], [5.0, 4.0]])
    index = Index({"full": rows})
    assert index.search(queries, "full").tolist() == [0, 1, 2]
    assert Index({"full": rows}, torch.arange(3)).search(queries, "full").tolist() == [2, 2, 0]


def naive_search(query: Tensor, rows: Tensor, itself: int) -> int:
    cosines = [float(F.cosine_similarity(query.double(), row, dim=0)) for row in rows.double()]
    return max((i for i in range(len(rows)) if i != itself), key=lambda i: cosines[i])


@pytest.mark.parametrize("has_index", [False, True])
def test_without_classes_right_is_what_float_finds(has_index: bool) -> None:
    """A search for the nearest other image: in int8 embeddings, against float in float ones."""
    n, m, N, E = 17, 2, 40, 5
    floats = torch.randn(N, E, generator=generator(0))
    int8 = floats + 0.2 * torch.randn(N, E, generator=generator(1))
    places = torch.randperm(N, generator=generator(2))[:n]
    embeddings = {"teacher": floats[places], "full": int8[places]}
    index = Index({"teacher": floats, "full": int8}, places)
    if not has_index:  # these images are all there is
        floats, int8, places = floats[places], int8[places], torch.arange(n)
    noise = torch.randn(n, m, E, generator=generator(3)) * torch.tensor([[1.0], [0.4]])
    embedding = 9 * (floats[places][:, None] + noise)
    probes = probes_of(torch.zeros(n, m, dtype=torch.int64), embedding)
    options: dict[str, Any] = {"classes": None, "labels": None}
    options["index"] = index if has_index else None
    result = judge(probes, embeddings, **options)
    proof = judge(probes, embeddings, **options, is_proof=True)
    for i, place in enumerate(places.tolist()):
        answers = [naive_search(each, int8, place) for each in (*embedding[i], int8[place])]
        truth = naive_search(floats[place], floats, place)
        right, same = [a == truth for a in answers], [a == answers[-1] for a in answers]
        assert result.is_correct[i].tolist() == right[:-1]
        assert result.gain[i].tolist() == right and result.loss[i].tolist() == [not s for s in same]
        assert proof.gain[i].tolist() == same and proof.loss[i].tolist() == result.loss[i].tolist()
    means = result.gain.mean(0)
    assert 0 < means[0] < means[1] < 1 and 0 < means[2] < 1


def test_the_same_image_twice_loses_nothing() -> None:
    """Else full depth would lose against itself wherever a photo is there twice."""
    once = torch.randn(6, 5, generator=generator(4))
    teacher = torch.cat([once, once[:3]])
    probes = probes_of(torch.zeros(9, 1, dtype=torch.int64), teacher[:, None])
    result = judge(probes, {"teacher": teacher, "full": teacher}, classes=None, labels=None)
    assert result.loss.sum() == 0.0 and result.gain.mean() == 1.0 and result.is_correct.all()
