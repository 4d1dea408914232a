"""Fit the tables of csrc/cpu/numerics/gates.h; prints them.

The root G(-t)^(1/2^s) of a gate gets the polynomial whose activation error is smallest at its worst
point (Remez exchange, in float64, then rounded to float32). The bound of each table is the largest
error seen on a dense grid with every step rounded to float32, and a margin of 10 %.

  python bench/fit_activations.py
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.polynomial import chebyshev

Array = np.ndarray
Function = Callable[[Array], Array]


def gelu_gate(t: Array) -> Array:
    """Phi(-t)."""
    return 0.5 * np.vectorize(math.erfc)(t / math.sqrt(2.0))


def gelu_tanh_gate(t: Array) -> Array:
    """sigmoid(-2 sqrt(2 / pi) (t + 0.044715 t^3))."""
    return 1.0 / (1.0 + np.exp(2.0 * math.sqrt(2.0 / math.pi) * (t + 0.044715 * t**3)))


def quick_gelu_gate(t: Array) -> Array:
    """sigmoid(-1.702 t)."""
    return 1.0 / (1.0 + np.exp(1.702 * t))


TABLES: dict[str, tuple[Function, int, int, float]] = {
    "Gelu": (gelu_gate, 7, 3, 5.5),
    "GeluTanh": (gelu_tanh_gate, 8, 3, 5.5),
    "QuickGelu": (quick_gelu_gate, 10, 4, 9.0),
}
"""Gate, degree, squarings, clamp."""


def fit_root(gate: Function, degree: int, squarings: int, clamp: float) -> Array:
    """Power coefficients, lowest first, of the weighted minimax polynomial of the gate's root."""
    power = 2**squarings
    grid = (np.cos(np.linspace(0, np.pi, 20_001)) + 1) * clamp / 2
    truth = gate(grid) ** (1 / power)
    weight = (grid + 1e-9) * power * gate(grid) ** (1 - 1 / power)
    basis = chebyshev.chebvander(2 * grid / clamp - 1, degree)
    nodes = np.round(np.linspace(0, len(grid) - 1, degree + 2)).astype(int)
    best, smallest = np.zeros(degree + 1), math.inf
    for _ in range(60):
        level = (-1.0) ** np.arange(degree + 2) / np.maximum(weight[nodes], 1e-12)
        solution = np.linalg.solve(np.column_stack([basis[nodes], level]), truth[nodes])
        error = weight * (truth - basis @ solution[:-1])
        if np.abs(error).max() < smallest:
            smallest, best = np.abs(error).max(), solution[:-1]
        edges = np.flatnonzero(np.diff(np.sign(error))) + 1
        parts = np.split(np.arange(len(grid)), edges)
        peaks = [int(part[np.abs(error[part]).argmax()]) for part in parts]
        while len(peaks) > degree + 2:
            peaks.pop(0 if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else -1)
        if len(peaks) < degree + 2:
            break
        nodes = np.array(peaks)
    return chebyshev.Chebyshev(best, domain=[0, clamp]).convert(kind=np.polynomial.Polynomial).coef


def activation_error(gate: Function, coefficients: Array, squarings: int, clamp: float) -> float:
    """Largest error of the activation on a dense grid, each operation rounded to float32."""
    t = np.linspace(0, 2 * clamp, 400_001).astype(np.float32)
    s = np.minimum(t, np.float32(clamp))
    root = np.full_like(s, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        root = (root.astype(np.float64) * s + float(coefficient)).astype(np.float32)
    for _ in range(squarings):
        root = root * root
    exact = t.astype(np.float64) * gate(t.astype(np.float64))
    return float(np.abs(s.astype(np.float64) * root - exact).max())


def main() -> None:
    """Print each table as C++."""
    for name, (gate, degree, squarings, clamp) in TABLES.items():
        coefficients = fit_root(gate, degree, squarings, clamp).astype(np.float32)
        error = activation_error(gate, coefficients, squarings, clamp)
        numbers = ", ".join(f"{float(c).hex()}f" for c in coefficients)
        print(f"// |error| < {1.1 * error:.2g}")
        print(
            f"inline constexpr Gate<{degree}, {squarings}> k{name}Gate{{{clamp}f, {{{numbers}}}}};"
        )


if __name__ == "__main__":
    main()
