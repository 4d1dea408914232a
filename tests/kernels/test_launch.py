"""Where a kernel is started."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lraee.kernels import launch


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_starts_on_the_gpu_of_its_tensors(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]
    started: list[tuple[Any, ...]] = []

    class Switched:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: started.append((current[-1], grid, options))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Switched)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    launch.start(Kernel(), (3,), x, 5, SIZE=7)
    assert started == [(index, (3,), {"enable_fp_fusion": False, "SIZE": 7})]
    assert current == [0]
