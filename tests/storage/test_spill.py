"""Tensors on disk: the same numbers, in memory of no more than the limit, and no file left."""

import tempfile
from pathlib import Path

import pytest
import torch

from lraee.storage import spill
from lraee.storage.spill import Rows, empty
from lraee.storage.stages import Stages
from tests.support import assert_same, generator


def is_on_disk(tensor: torch.Tensor) -> bool:
    """Whether Linux maps its memory from a file without a name."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(limit, 16) for limit in line.split(maxsplit=1)[0].split("-"))
        if first <= address < last:
            return line.endswith("(deleted)")
    return False


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_a_tensor_above_the_limit_lies_on_disk(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    size = 6 * dtype.itemsize
    small, large = (empty(3, 2, dtype=dtype, in_memory_bytes=n) for n in (size, size - 1))
    assert not is_on_disk(small) and is_on_disk(large)
    expected = torch.arange(6).view(3, 2).to(dtype)
    large.copy_(expected)
    assert_same(large, expected)
    assert list(tmp_path.iterdir()) == []  # nothing is left, whatever ends the process
    assert empty(0, 5, dtype=dtype, in_memory_bytes=0).shape == (0, 5)


def test_rows_come_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, 3, 2, generator=generator(0))
    for limit in (0, 1 << 20):
        monkeypatch.setattr(spill, "IN_MEMORY_BYTES", limit)
        rows = Rows(10)
        for part in x.split(4):
            rows.add(part)
        assert_same(rows.result(), x)
        assert is_on_disk(rows.result()) == (limit == 0)
        with pytest.raises(ValueError, match="rows must be 10, got 11"):
            rows.add(x[:1])
    with pytest.raises(ValueError, match="one at least"):
        Rows(3).result()


def test_a_stage_above_the_limit_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 7, generator=generator(1))
    tensors = {"x": x, "half": x.bfloat16(), "mask": x > 0, "none": torch.empty(0, 3)}
    for limit in (0, 1 << 20):
        monkeypatch.setattr(spill, "IN_MEMORY_BYTES", limit)
        stages = Stages(tmp_path / str(limit), {})
        for actual in (stages.get("a", lambda: tensors), stages.get("a", dict)):
            assert actual.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert_same(actual[name], tensor, name=name)
        kept = stages.get("a", dict)["x"]
        stages.clear()
        assert_same(kept, x)
