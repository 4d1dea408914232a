"""The conversion of lraee-tiny to transformers' CLIPModel, for the comparison of servers."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lraee import zoo


@torch.inference_mode()
def test_the_same_embeddings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
    from bench.serve_clip import main

    main(tmp_path)
    there = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    here, _, tokenizer = zoo.load("lraee-tiny")
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    rows = there.vision_model(images).pooler_output @ there.visual_projection.weight.T
    # Float towers of two implementations: sums of 192 to 768 terms in another order.
    assert_close(rows, here.encode_image(images), rtol=1e-4, atol=1e-4)
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a photo of a tabby cat", "espresso"]
    tokens = words(texts, padding="max_length", max_length=24, return_tensors="pt")
    rows = there.text_model(**tokens).pooler_output @ there.text_projection.weight.T
    assert_close(rows, here.encode_text(tokenizer(texts)), rtol=1e-4, atol=1e-4)
