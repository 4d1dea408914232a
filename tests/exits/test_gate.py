"""Gates: scores against image-by-image code, and what is refused."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from lraee.exits.gate import CLASS_FREE, Gate, GateKind, Memory, score, steady_sigmoid
from lraee.ops.reference import Probe
from tests.support import EPS32, assert_same, assert_within, generator

E = 10
NONE = (0.0, 0.0, 0.0, 0.0)
WEIGHTS = ((1.5, 0.0, -0.25, 0.5), (-2.0, 0.0, 0.5, -0.125), (3.0, 0.0, 0.0, 0.25))


def make_probe(B: int, seed: int, *, nan_rows: tuple[int, ...] = ()) -> Probe:
    """What exit_probe could give: of a NaN image top1 is 0 and all else NaN."""
    source = generator(seed)
    probe = [
        torch.randn(B, E, generator=source),
        torch.randint(0, 2, (B,), generator=source),
        *(torch.rand(B, generator=source) for _ in range(4)),
    ]
    for each in probe:
        each[list(nan_rows)] = 0 if each.dtype == torch.int64 else math.nan
    return tuple(probe)


def scored(gate: Gate, probes: list[Probe]) -> list[list[float]]:
    """Scores by image, then exit."""
    memory, columns = None, []
    for e, probe in enumerate(probes):
        column, memory = score(gate, e, probe, memory)
        columns.append(column)
    return torch.stack(columns, dim=1).tolist()


def naive_patience(classes: list[int]) -> list[float]:
    return [
        float(next((k for k in range(e) if classes[e - k - 1] != classes[e]), e))
        for e in range(len(classes))
    ]


def naive_agreement(gate: Gate, e: int, probes: list[Probe], image: int) -> float:
    if e == 0:
        return math.nan
    now, before = (probes[i][0][image].double().tolist() for i in (e, e - 1))
    dot = sum(a * b for a, b in zip(now, before, strict=True))
    cosine = dot / math.sqrt(sum(a * a for a in now) * sum(b * b for b in before))
    w1, _, w3, constant = gate.weights[e]
    return 1 / (1 + math.exp(-(w1 * cosine + w3 * float(probes[e][4][image]) + constant)))


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_scores_image_by_image(kind: GateKind) -> None:
    B, bad = 40, 7
    probes = [make_probe(B, seed, nan_rows=(bad,)) for seed in range(3)]
    count = 1 if kind == "static" else 3
    weights = WEIGHTS if kind == "agreement" else (NONE,) * 3
    gate = Gate(kind, weights[:count], (0.5,) * count)
    result = scored(gate, probes[:count])
    for i, row in enumerate(result):
        for e, actual in enumerate(row):
            confidence, learned = probes[e][2][i].item(), probes[e][5][i].item()
            if kind == "static":
                assert actual == 0.0
            elif i == bad or (kind == "agreement" and e == 0):
                assert math.isnan(actual), (i, e)
            elif kind == "patience":
                assert actual == naive_patience([int(p[1][i]) for p in probes])[e]
            elif kind == "agreement":
                # The cosine is off by some roundings of sums of 10, the rest by one each
                assert abs(actual - naive_agreement(gate, e, probes, i)) < 64 * EPS32
            else:
                assert actual == (learned if kind == "learned" else confidence)


def test_patience_by_hand() -> None:
    gate = Gate("patience", (NONE,) * 5, (1.0,) * 5)
    classes = [[4, 4, 4, 2, 2], [0, 1, 0, 1, 1], [3, 3, 3, 3, 3]]
    sure = torch.ones(3)
    probes = [
        (torch.ones(3, E), torch.tensor(column), sure, sure, sure, sure)
        for column in zip(*classes, strict=True)
    ]
    assert scored(gate, probes) == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 1], [0, 1, 2, 3, 4]]


def test_agreement_by_hand() -> None:
    """Angles of 60 and 90 degrees, whatever the lengths; variance 2 at weight 0.5 adds 1."""
    gate = Gate("agreement", (NONE, (4.0, 0.0, 0.5, -3.0)), (0.5, 0.5))
    before = torch.tensor([[2.0, 0.0], [0.5, 0.0]])
    now = torch.tensor([[3.0, 3 * 3**0.5], [0.0, 7.0]])
    nothing, variance = torch.zeros(2), torch.full((2,), 2.0)
    probes = [
        (embedding, nothing.long(), nothing, nothing, variance, nothing)
        for embedding in (before, now)
    ]
    (_, first), (_, second) = scored(gate, probes)
    assert first == pytest.approx(0.5, abs=1e-6)  # 4 cos 60° + 1 - 3 = 0
    assert second == pytest.approx(1 / (1 + math.exp(2)), abs=1e-6)


@pytest.mark.parametrize("kind", ["patience", "agreement"])
def test_memory_follows_the_survivors(kind: GateKind) -> None:
    """Rows that are dropped between two exits change no other score."""
    gate = Gate(kind, WEIGHTS, (0.5,) * 3)
    probes = [make_probe(20, seed) for seed in range(3)]
    expected = torch.tensor(scored(gate, probes))
    memory: Memory | None = None
    left = torch.arange(20)
    for e, probe in enumerate(probes):
        column, memory = score(gate, e, tuple(part[left] for part in probe), memory)
        assert_same(column, expected[left, e], kind=kind, exit=e)
        keep = torch.arange(0, len(left), 2)
        assert memory is not None
        left, memory = left[keep], memory.rows(keep)


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_scores_do_not_depend_on_the_place_in_a_batch(kind: GateKind) -> None:
    """Among any neighbours, at any place of any length: torch's own sigmoid fails here."""
    count = 1 if kind == "static" else 2
    gate = Gate(kind, WEIGHTS[:count], (0.5,) * count)
    probes = [make_probe(64, seed) for seed in range(count)]

    def rows(start: int, stop: int) -> Tensor:
        return torch.tensor(scored(gate, [tuple(p[start:stop] for p in probe) for probe in probes]))

    alone = torch.cat([rows(i, i + 1) for i in range(64)])
    for start, stop in ((0, 64), (1, 64), (3, 20), (50, 63)):
        assert_same(rows(start, stop), alone[start:stop], kind=kind, start=start, stop=stop)


def test_steady_sigmoid() -> None:
    x = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([math.inf, -math.inf, math.nan])])
    y = steady_sigmoid(x)
    expected = torch.tensor([1 / (1 + math.exp(-v)) for v in x[:4001].tolist()]).double()
    assert_within(y[:4001], expected, EPS32 * expected + 2.0**-149)
    assert y[4001:4003].tolist() == [1.0, 0.0] and y[4003].isnan()
    alone = torch.cat([steady_sigmoid(x[i : i + 1]) for i in range(len(x))])
    assert_same(y, alone)
    assert (y[1:4001] >= y[:4000]).all()


# What is refused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "magic"}, "Gate: kind must be one of learned, confidence, .* got 'magic'"),
    ({"weights": (NONE,)}, "weights and thresholds must have one row per exit, got 1 and 2"),
    ({"kind": "static"}, "a static gate must have one exit at most, got 2"),
    ({"weights": (NONE, (0.0, math.nan, 0.0, 0.0))}, "weights must be finite in float32"),
    ({"weights": (NONE, (1e39, 0.0, 0.0, 0.0))}, "weights must be finite in float32"),
    ({"thresholds": (0.5, 0.1)}, "thresholds must be exact in float32, got 0.1"),
    ({"thresholds": (0.5, math.nan)}, "thresholds must be exact in float32, got nan"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_gates_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments = {"kind": "learned", "weights": (NONE, NONE), "thresholds": (0.5, 0.5)}
    with pytest.raises(ValueError, match=message):
        Gate(**{**arguments, **changes})


def test_gates_that_fit() -> None:
    assert not Gate("static", (), ()).remembers
    gate = Gate("learned", ((0.1, 1e-30, -3.0, 7.0),), (-math.inf,))
    assert_same(gate.vector(0), torch.tensor([0.1, 1e-30, -3.0, 7.0]))
    assert Gate("agreement", (NONE,), (math.inf,)).remembers
    assert Gate("patience", (NONE,), (float(np.float32(0.1)),)).remembers
    assert CLASS_FREE == ("agreement", "static")
