"""Exact search against a plain loop."""

import pytest
import torch
import torch.nn.functional as F

from lraee.measurement.neighbours import neighbours, other_neighbours
from tests.support import generator


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("k", [1, 4])
def test_other_neighbours_in_chunks(chunk: int, k: int) -> None:
    rows = F.normalize(torch.randn(30, 6, generator=generator(0)), dim=1)
    result = other_neighbours(rows, k, chunk=chunk)
    for i in range(30):
        others = sorted((j for j in range(30) if j != i), key=lambda j: -float(rows[i] @ rows[j]))
        assert result[i].tolist() == others[:k]


def test_neighbours_of_queries_without_the_excluded_rows() -> None:
    rows = torch.eye(3)
    queries = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    assert neighbours(queries, rows, 2).tolist() == [[0, 1], [1, 2]]
    assert neighbours(queries, rows, 1, torch.tensor([0, 1])).tolist() == [[1], [2]]


def test_the_first_of_equal_rows() -> None:
    assert neighbours(torch.ones(1, 2), torch.ones(5, 2), 1).tolist() == [[0]]
