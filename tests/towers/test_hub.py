"""Tokens of a text, counted without its padding."""

from types import SimpleNamespace

import pytest
import torch

from lraee import zoo
from lraee.towers.hub import count_tokens


def tokenizer(padding: int | None, end: int | None) -> SimpleNamespace:
    """As open_clip holds one of transformers."""
    return SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=padding, eos_token_id=end))


@pytest.mark.parametrize(
    ("padding", "end", "expected"),
    [(1, 2, [4, 2, 5]), (0, 1, [5, 5, 5]), (None, 2, [5, 5, 5]), (1, 1, [5, 3, 5])],
)
def test_padding_is_the_tokenizer_s(padding: int | None, end: int, expected: list[int]) -> None:
    tokens = torch.tensor([[3, 1, 4, 2, 1], [3, 2, 1, 1, 1], [3, 4, 5, 6, 2]])
    assert count_tokens(tokenizer(padding, end), tokens).tolist() == expected


def test_clip_s_tokenizers_pad_with_zero() -> None:
    own = zoo.load("lraee-tiny")[2]
    texts = ["a", "a photo of a dog", ""]
    tokens = own(texts)
    assert count_tokens(own, tokens).tolist() == tokens.count_nonzero(1).tolist()
