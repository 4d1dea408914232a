"""What accelerate logs about float16 on a GPU that was measured."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from lraee.model import messages
from lraee.towers.families import find_tower
from tests.clip_models import make_model


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAEE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    messages._warn_once.cache_clear()


def warned(tower: nn.Module | None, device: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lraee"):
        messages.warn_of_float16(tower, torch.device(device))
    return caplog.messages


def test_it_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = find_tower(make_model())
    assert warned(tower, "cuda", caplog) == [], "no such tower was measured"
    monkeypatch.setattr(messages.float16, "tower_key", lambda *sizes: "L=257 D=1024 blocks=24")
    (line,) = warned(tower, "cuda", caplog)
    assert line.startswith("accelerate: float16 is 1.20x to 1.56x faster than int8 for this tower")
    assert warned(tower, "cuda", caplog) == []


def test_a_cpu_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(find_tower(make_model()), "cpu", caplog) == []
    assert warned(None, "cuda", caplog) == []
