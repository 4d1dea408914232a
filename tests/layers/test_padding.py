"""Masks of keys among the masks that libraries pass, and tokens that are left out."""

import pytest
import torch
from torch import Tensor

from lraee.layers.padding import by_valid_tokens, split_mask
from tests.support import assert_same

B, L = 3, 5
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
KEYS = VALID[:, None, None]
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()


def added(shown: Tensor, low: float) -> Tensor:
    """The mask as libraries add it to scores."""
    return torch.zeros(shown.shape).masked_fill(~shown, low)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("low", [None, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("rows", [1, L])
def test_keys_are_read(is_causal: bool, low: float | None, rows: int) -> None:
    shown = KEYS.expand(B, 1, rows, L)
    mask = shown if low is None else added(shown, low)
    rest, valid = split_mask(mask, B, L, "Owner", is_causal)
    assert rest is None and valid is not None
    assert_same(valid, VALID)


@pytest.mark.parametrize("low", [None, -torch.inf])
def test_a_causal_module_may_be_told_so(low: float | None) -> None:
    shown = KEYS & CAUSAL
    mask = shown if low is None else added(shown, low)
    _, valid = split_mask(mask, B, L, "Owner", True)
    assert valid is not None
    assert_same(valid, VALID)
    assert split_mask(CAUSAL[None, None], B, L, "Owner", True) == (None, None)
    shown[2, 0, 0] = True  # a query without keys, which libraries let see all
    _, valid = split_mask(shown, B, L, "Owner", True)
    assert valid is not None
    assert_same(valid, VALID)


def test_no_mask_and_masks_of_two_dimensions_are_handed_on() -> None:
    assert split_mask(None, B, L, "Owner") == (None, None)
    assert split_mask(CAUSAL, B, L, "Owner")[0] is CAUSAL
    assert split_mask(torch.ones(1, 1, 1, L).bool(), B, L, "Owner") == (None, None)


@pytest.mark.parametrize("is_causal", [False, True])
def test_other_masks_are_refused(is_causal: bool) -> None:
    own = KEYS.expand(B, 1, L, L).clone()
    own[1, 0, 3, 0] = False
    masks = [own, KEYS[:2], KEYS[..., :4], KEYS.expand(B, 2, 1, L), KEYS.expand(B, 1, 3, L)]
    masks += [] if is_causal else [CAUSAL[None, None]]
    for mask in masks:
        with pytest.raises(NotImplementedError, match="Owner: attention_mask must hide the same"):
            split_mask(mask, B, L, "Owner", is_causal)


def test_valid_tokens_run_without_the_others() -> None:
    x = torch.arange(B * L * 2.0).view(B, L, 2)
    shapes: list[tuple[int, ...]] = []

    def run(tokens: Tensor) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return tokens + 0.5

    y = by_valid_tokens(x, VALID, run, -x)
    assert shapes == [(1, 2, 2), (1, 3, 2), (1, 5, 2)]
    assert_same(y, torch.where(VALID[..., None], x + 0.5, -x))
