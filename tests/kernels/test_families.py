"""Families of products: what is legal for Gluon, and where Triton has none."""

import builtins
import sys
from typing import Any

import pytest
import torch

from lraee.kernels import families
from lraee.kernels.archs import ARCHS
from lraee.kernels.configs import Config, Shape, legal, tuned_config
from lraee.kernels.families import gluon_config, gluon_unavailable_reason
from lraee.kernels.int8_linear import int8_linear

FC1 = Shape(6304, 3072, 768)
needs_gluon = pytest.mark.skipif(
    gluon_unavailable_reason() is not None, reason=str(gluon_unavailable_reason())
)


@needs_gluon
def test_what_is_legal_in_gluon() -> None:
    assert legal(gluon_config(FC1), FC1, ARCHS[90])
    assert legal(gluon_config(Shape(6304, 3072, 1024)), Shape(6304, 3072, 1024), ARCHS[90])
    assert not legal(gluon_config(FC1), FC1, ARCHS[100])
    for shape in (Shape(6304, 768, 3072), Shape(6304, 768, 588), Shape(6304, 1001, 768)):
        assert not legal(gluon_config(shape), shape, ARCHS[90]), shape
    for change in ({"block_m": 64}, {"num_warps": 8}, {"num_stages": 8}, {"num_stages": 1}):
        assert not legal(Config(**vars(gluon_config(FC1)) | change), FC1, ARCHS[90]), change


def test_a_triton_without_gluon_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("triton.experimental"):
            raise ImportError("No module named 'triton.experimental.gluon'")
        return import_(name, *rest)

    monkeypatch.delitem(sys.modules, "lraee.kernels.int8_linear_gluon", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    gluon_unavailable_reason.cache_clear()
    try:
        assert "has no Gluon" in str(gluon_unavailable_reason())
        assert not legal(gluon_config(FC1), FC1, ARCHS[90])
    finally:
        gluon_unavailable_reason.cache_clear()


def test_gluon_is_never_picked_for_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    row = families.Config(128, 128, 128, 4, 3, family="gluon")
    numbers = (row.block_m, row.block_n, row.block_k, row.num_warps, row.num_stages, 1)
    from lraee.kernels import configs, tuned

    row_of_table = tuned.Row(3072, 768, 1 << 31, "gelu", "gluon", numbers)
    monkeypatch.setattr(tuned, "row_of", lambda *_: row_of_table)
    monkeypatch.setattr(configs, "legal", lambda *_: True)
    for epilogue in ("none+residual", "gelu+quantized", "none+layer_scale", "gelu+float32"):
        assert tuned_config(FC1, ARCHS[90], epilogue, "NVIDIA H200") is None
    assert tuned_config(FC1, ARCHS[90], "gelu", "NVIDIA H200") == row


def test_a_residual_in_gluon_is_refused() -> None:
    from lraee.diagnostics.selftest_inputs import linear

    given = linear(16, 128, 128, 15)
    assert given["residual"] is not None and torch.is_tensor(given["x_q"])
    with pytest.raises(AssertionError, match="gluon adds no residual"):
        int8_linear(**given, config=gluon_config(Shape(16, 128, 128)))
