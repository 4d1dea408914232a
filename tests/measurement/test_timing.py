import pytest
import torch
from torch import Tensor, nn

from lraee.measurement import timing
from lraee.measurement.timing import Timing


def test_variants_take_turns_in_rotating_order() -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.interleaved(variants, budget_s=0.0, warm_s=0.0)
    assert "".join(calls) == "abc" * 2 + "abc" + "bca" + "cab" + "abc" + "bca"
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys("abc", 5)


def test_timing_by_hand() -> None:
    assert Timing.of([0.001, 0.002, 0.003, 0.004, 0.010]) == Timing(
        3.0, pytest.approx(1.8), pytest.approx(5.2)
    )
    assert Timing.of([0.002]) == Timing(2.0, 2.0, 2.0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        self.seen.append((tuple(image.shape), image.dtype))
        return image


def test_each_form_gets_photos_of_its_type_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_S", 0.0)
    forms = timing.float_and_bfloat16(Encoder())
    rows = timing.time_tower(
        forms, (5, 7), [1, 3], 0.0, as_input=lambda model, photos: photos.to(model.weight.dtype)
    )
    assert [(row.variant, row.batch) for row in rows] == [
        ("float32", 1),
        ("bfloat16", 1),
        ("float32", 3),
        ("bfloat16", 3),
    ]
    assert set(forms["bfloat16"].seen) == {
        ((1, 3, 5, 7), torch.bfloat16),
        ((3, 3, 5, 7), torch.bfloat16),
    }
    for row in rows:
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.timing.median_ms)
        assert row.variant != "float32" or row.speedup == 1.0
