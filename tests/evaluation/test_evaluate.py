import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import lraee
from lraee.data.classes import Classes
from lraee.data.photos import Photos
from lraee.data.sources import DataError
from lraee.evaluation import evaluate
from lraee.evaluation.evaluate import Embedded, compare, embed, tower_bytes
from lraee.storage.json import write_json
from tests.clip_models import make_model
from tests.exits.random_exits import make_exits
from tests.image_files import folder
from tests.support import assert_same


class Encoder(nn.Module):
    """A tower whose embedding is a fixed linear map of the photo's mean colour; notes its calls."""

    def __init__(self, name: str, calls: list[tuple[str, int]], factor: float = 1.0) -> None:
        super().__init__()
        self.visual = nn.Linear(3, 4)
        self.name, self.calls, self.factor = name, calls, factor
        with torch.no_grad():
            self.visual.weight.copy_(torch.arange(12.0).reshape(4, 3).sin())
            self.visual.bias.zero_()

    def encode_image(self, image: Tensor) -> Tensor:
        self.calls.append((self.name, len(image)))
        return self.visual(self.factor * image.mean(dim=(2, 3)))


def linear_bytes(model: nn.Linear) -> int:
    return 4 * (model.in_features + 1) * model.out_features


def rows_of(vectors: list[list[float]]) -> Tensor:
    return nn.functional.normalize(torch.tensor(vectors), dim=-1)


def embedded_by_hand(float_rows: Tensor, int8_rows: Tensor, labels: list[int | None]) -> Embedded:
    return Embedded(
        {"float": float_rows, "int8": int8_rows},
        {"float": [0.004, 0.002, 0.003], "int8": [0.001]},
        labels,
        [str(i) for i in range(len(labels))],
    )


def models() -> dict[str, nn.Module]:
    calls: list[tuple[str, int]] = []
    return {"float": Encoder("float", calls), "int8": Encoder("int8", calls)}


def test_figures_by_hand() -> None:
    floats = rows_of([[1, 0.1], [0.1, 1], [1, 0.2], [-1, 0.1]])
    int8 = rows_of([[1, 0.1], [0.1, -1], [1, 0.25], [-1, 0.1]])
    classes = rows_of([[1.0, 0.0], [0.0, 1.0]])
    hand = embedded_by_hand(floats, int8, [0, 1, 1, None])
    base, fast = compare(hand, models(), classes)
    # float answers 0 1 0 1; labels 0 1 1: two of three right. int8 answers 0 0 0 1.
    assert base.top1 == pytest.approx(200 / 3) and base.agreement == 100
    assert fast.top1 == pytest.approx(100 / 3) and fast.agreement == 75
    assert base.top5 == fast.top5 == 100  # two classes are within five
    # nearest of float: 0-2, 1-2, 2-0, 3-1; of int8: 0-2, 1-0, 2-0, 3-1
    assert base.neighbours == 100 and fast.neighbours == 75
    # Wilson's interval of 3 of 4; ten neighbours need twelve photos
    assert fast.neighbours_95 == pytest.approx((30.06, 95.44), abs=0.01)
    assert fast.neighbours_10 is fast.neighbours_10_95 is None
    spread = (floats - floats.mean(0)).norm(dim=1)
    assert base.error == 0
    assert fast.error == pytest.approx(((int8 - floats).norm(dim=1) / spread).mean().item())
    cosines = (floats * int8).sum(dim=1)
    assert fast.cosine_mean == pytest.approx(cosines.mean().item())
    # 1st percentile of four: linear between the two smallest, at 3 * 0.01
    low = cosines.sort().values
    assert fast.cosine_p01 == pytest.approx((low[0] + 0.03 * (low[1] - low[0])).item())
    assert (base.time_ms, fast.time_ms) == (3.0, 1.0)
    assert base.weight_bytes == linear_bytes(nn.Linear(3, 4))
    assert base.not_finite == fast.not_finite == 0


def test_ten_neighbours_by_hand() -> None:
    """Photos on an arc: each has its ten nearest around it. Two photos change places in int8."""
    angles = torch.linspace(0, 1.5, 13)
    floats = torch.stack([angles.cos(), angles.sin()], 1)
    int8 = floats[[12, *range(1, 12), 0]]
    base, fast = compare(embedded_by_hand(floats, int8, [None] * 13), models(), None)
    assert base.neighbours_10 == 100 and base.neighbours_10_95 == (100, 100)

    def nearest(rows: Tensor) -> list[set[int]]:
        scores = rows @ rows.T
        scores.fill_diagonal_(-2)
        return [set(row.topk(10).indices.tolist()) for row in scores]

    shared = [len(a & b) / 10 for a, b in zip(nearest(floats), nearest(int8), strict=True)]
    assert fast.neighbours_10 == pytest.approx(100 * sum(shared) / 13) and min(shared) < 1
    low, high = fast.neighbours_10_95 or (0, 0)
    assert low < fast.neighbours_10 < high


def test_other_class_texts_are_rows_of_their_own() -> None:
    floats = rows_of([[1, 0.1], [0.1, 1], [1, 0.2], [-1, 0.1]])
    classes = rows_of([[1.0, 0.0], [0.0, 1.0]])
    hand = embedded_by_hand(floats, floats, [0, 1, 1, None])
    turned = rows_of([[1.0, 0.0], [0.0, -1.0]])  # float's second answer is lost
    texts = {"text": ("float", turned), "int8, text": ("int8", classes)}
    base, int8, other, same = compare(hand, models(), classes, texts)
    assert [row.scheme for row in (base, int8, other, same)] == [
        "float", "int8", "text", "int8, text",
    ]  # fmt: skip
    assert base.top1 == same.top1 == pytest.approx(200 / 3) and other.top1 == pytest.approx(100 / 3)
    assert other.agreement == 75 and same.agreement == 100
    assert (other.time_ms, same.time_ms) == (base.time_ms, int8.time_ms)


def test_nan_embeddings_agree_with_nothing() -> None:
    floats = rows_of([[1, 0.1], [1, 0.3], [0.1, 1]])
    broken = floats.clone()
    broken[0] = torch.nan
    hand = embedded_by_hand(floats, broken, [0, 0, 1])
    base, fast = compare(hand, models(), rows_of([[1.0, 0.0], [0.0, 1.0]]))
    assert base.top1 == 100 and fast.top1 == pytest.approx(200 / 3)
    assert fast.agreement == pytest.approx(200 / 3) and fast.not_finite == 1
    assert fast.neighbours is not None and fast.neighbours <= 200 / 3 + 1e-3
    assert fast.cosine_mean == pytest.approx(2 / 3)


def test_without_labels_or_classes_only_direction_is_measured() -> None:
    floats = rows_of([[1, 0.1], [1, 0.3]])
    base, fast = compare(embedded_by_hand(floats, floats, [None, None]), models(), None)
    for row in (base, fast):
        assert row.top1 is row.top5 is row.agreement is row.neighbours is None
        assert row.cosine_mean == pytest.approx(1.0)


def test_photos_are_decoded_once_and_models_take_turns(tmp_path: Path) -> None:
    photos = Photos(folder(tmp_path / "p"), classes=Classes(("n01", "n02"), ("a", "b")))
    calls: list[tuple[str, int]] = []
    decoded: list[object] = []
    built = {name: Encoder(name, calls) for name in ("float", "int8", "paper")}

    def preprocess(image: object) -> Tensor:
        decoded.append(image)
        return pil_to_tensor(image).float() / 255

    result = embed(built, photos, preprocess, batch=2, progress=False)
    assert len(decoded) == 6
    f, i, p = ("float", 2), ("int8", 2), ("paper", 2)
    assert calls == [f, i, p, f, i, p, i, p, f, p, f, i]  # the first three only warm up
    assert result.labels == [0, 0, 0, 1, 1, 1] and result.names == photos.names
    assert all(len(seconds) == 3 for seconds in result.seconds_per_photo.values())
    torch.testing.assert_close(result.embeddings["int8"], result.embeddings["float"])


def test_no_readable_photo_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="must hold one that can be read, got none"):
        embed(models(), Photos(tmp_path), pil_to_tensor, progress=False)


def test_shared_memory_counts_once() -> None:
    model = nn.Module()
    model.visual = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5))
    expected = 4 * (5 * 7 + 7 + 7 * 5 + 5)
    assert tower_bytes(model) == expected
    model.visual.register_buffer("view", model.visual[0].weight.detach()[1:])
    assert tower_bytes(model) == expected


def test_report_is_whole_json(tmp_path: Path) -> None:
    photos = Photos(folder(tmp_path / "p"), classes=Classes(("n01", "n02"), ("a", "b")))
    (tmp_path / "p" / "bad.jpg").write_bytes(b"nothing")
    photos = Photos(tmp_path / "p")
    built = models()
    result = embed(built, photos, lambda image: pil_to_tensor(image) / 255, progress=False)
    rows = compare(result, built, None)
    actual = evaluate.report(rows, photos, result, model="m", data="p", batch=32)
    path = tmp_path / "new" / "report.json"
    write_json(actual, path)
    read = json.loads(path.read_text())
    assert read["schema"] == "lraee.evaluate/3" and read["settings"] == {"batch": 32}
    assert (read["photos"], read["labelled"], read["skipped"]) == (6, 0, 1)
    assert read["skipped_first"][0]["name"] == "bad.jpg"
    assert [row["scheme"] for row in read["rows"]] == ["float", "int8"]
    assert {"machine", "versions", "threads", "operators", "command"} <= read.keys()
    with pytest.raises(ValueError):
        write_json({"x": float("nan")}, path)
    assert json.loads(path.read_text()) == read
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_where_photos_leave_is_noted_batch_by_batch(tmp_path: Path) -> None:
    """A form with exits beside others: depths per photo, FLOPs of all, and the embedding itself."""
    model = make_model()
    with_exits = lraee.accelerate(model, exits=make_exits(model, kind="confidence"))
    forms = {"float": model, "int8": lraee.accelerate(model), "exits confidence": with_exits}
    photos = Photos(folder(tmp_path / "p", count=7))

    def preprocess(image: Image) -> Tensor:
        return pil_to_tensor(image.resize((32, 32))).float() / 50 - 2.5

    result = embed(forms, photos, preprocess, batch=4, progress=False)
    assert list(result.exits) == list(result.exit_blocks) == ["exits confidence"]
    images = torch.stack([preprocess(photos.image(i)) for i in range(14)])
    with torch.no_grad(), lraee.trace(with_exits) as t:
        expected = [with_exits.encode_image(part, normalize=True) for part in images.split(4)]
    assert_same(result.embeddings["exits confidence"], torch.cat(expected))
    assert result.exit_blocks["exits confidence"] == t.exit_block.tolist()
    assert len(set(t.exit_block.tolist())) >= 2
    stats = result.exits["exits confidence"]
    assert stats.share == pytest.approx(t.stats.share)
    assert stats == replace(t.stats, share=stats.share)
    rows = compare(result, forms, None)
    assert [row.flops_saved for row in rows] == [None, None, pytest.approx(100 * t.flops_saved)]
    actual = evaluate.report(rows, photos, result, model="m", data="p")
    assert actual["exits"]["exits confidence"]["run_flops"] == t.stats.run_flops
