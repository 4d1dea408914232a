"""Figures as the page writes them."""

from lraee.study.schema import Spread

NOTHING = "\u2013"
BACKBONES = {
    "float": "float",
    "int8": "INT8 (lraee)",
    "int8-calibrated": "INT8 (calibrated)",
    "paper": "INT8 (paper)",
}


def figure(value: float | None, digits: int = 2) -> str:
    """A number with this many digits after the point, minus as typeset; a dash for None."""
    if value is None:
        return NOTHING
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{digits}f}".replace("-", "\u2212")


def spread(value: Spread | None, digits: int = 2) -> str:
    """Mean, and +- standard deviation where there is one."""
    if value is None:
        return NOTHING
    mean = figure(value["mean"], digits)
    return f"{mean} \u00b1 {figure(value['std'], digits)}" if value["std"] else mean


def interval(low: float, high: float) -> str:
    """As in -0.10 to 0.94."""
    return f"{figure(low)} to {figure(high)}"


def chance(p: float) -> str:
    """A p-value, two digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def backbone(name: str) -> str:
    """A backbone as tables and legends name it."""
    return BACKBONES.get(name, name)
