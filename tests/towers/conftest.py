"""Fixtures of several files."""

import pytest

from tests.towers.graph_stand_in import StandIn, install


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Graphs without CUDA."""
    return install(monkeypatch)
