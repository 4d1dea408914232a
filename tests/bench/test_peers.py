"""bench.peers: which towers it loads, and how a round is cut into requests; no peer is needed."""

import pytest
import torch
import typer
from torch import Tensor, nn

from bench import peers
from bench.peer_towers import Embeddings, accelerated, image_size, load_tower, photo_like_images
from bench.peers import Throughput


def test_a_tower_of_timm_takes_the_size_of_its_name() -> None:
    tower = load_tower("timm:vit_tiny_patch16_224@64")
    assert image_size(tower) == 64
    images = photo_like_images(2, 64)
    with torch.no_grad():
        expected, y = tower(images), accelerated(tower)(images)
    assert y.shape == (2, 192) and (y - expected).norm() < 0.05 * expected.norm()


def test_a_model_of_transformers_becomes_a_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "image_size": 64,
        "num_attention_heads": 2, "projection_dim": 32,
    }  # fmt: skip
    config = ("CLIPVisionModelWithProjection", small)
    monkeypatch.setattr("bench.peer_towers.HUGGING_FACE", {"small": config})
    tower = load_tower("hf:small")
    assert isinstance(tower, Embeddings) and image_size(tower) == 64
    images = photo_like_images(2, 64)
    with torch.no_grad():
        expected = tower.model(pixel_values=images).image_embeds
        assert torch.equal(tower(images), expected)
        y = accelerated(tower)(images)
    assert (y - expected).norm() < 0.05 * expected.norm()
    assert not any(p.requires_grad for p in tower.parameters())


def test_a_round_is_cut_into_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def encode(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.flatten(1)

    monkeypatch.setitem(peers.PEERS, "identity", lambda tower, images: encode)
    run = peers.build("identity", nn.Identity(), torch.zeros(1), Throughput(2, 4))
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(run(x), x.flatten(1)) and sizes == [4, 4]


def test_requests_must_be_whole() -> None:
    line = "--samples must be a multiple of --request 16, got 20"
    with pytest.raises(typer.BadParameter, match=line):
        peers._require_whole_requests(Throughput(2, 16), [("--batch", 32), ("--samples", 20)])
    peers._require_whole_requests(Throughput(2, 16), [("--batch", 32), ("--samples", 48)])


def test_the_float_tower_may_go_untimed() -> None:
    """Agreement is with it all the same."""
    runs: dict[str, peers.Encode] = {
        "lraee int8": lambda x: 1.0 * x.flatten(1),
        "torch float32": lambda x: x.flatten(1),
    }
    images = torch.rand(4, 3, 2, 2)
    rows = peers.measure(runs, images, 2, 0.01, {}, ("torch float32",))
    assert [row["peer"] for row in rows] == ["lraee int8"]
    assert rows[0]["agreement"]["centred"] > 0.999
