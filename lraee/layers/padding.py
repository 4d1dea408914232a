"""Tokens that are padding: a mask of keys among the masks that libraries pass.

Text towers mask such keys (`key_mask` of int8_attention). Images of several sizes are taken
together by their number of valid tokens instead, so padding is neither multiplied nor quantized,
and padding rows of a block's result are those of its input. Either way a valid token has the same
bits whatever its row was padded to.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def split_mask(
    mask: Tensor | None, B: int, L: int, owner: str, is_causal: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """A mask that is none of keys, and which tokens are valid, bool [B, L], or None for all.

    Args:
      mask: None; [B or 1, 1, L or 1, L], bool (valid is True) or added to the scores (valid is 0);
        or a mask of two dimensions, which is none of keys.
      B, L: images and tokens.
      owner: class name that a message begins with.
      is_causal: the module hides later tokens by itself, and the mask may hide them as well.
    Raises: NotImplementedError on a mask that is not the same for all queries but for later tokens
      of a causal module.
    """
    if mask is None or mask.dim() != 4:
        return mask, None
    keys = mask if mask.dtype == torch.bool else mask == 0
    is_shaped = (
        keys.shape[0] in (1, B) and keys.shape[1] == 1
        and keys.shape[2] in (1, L) and keys.shape[3] == L
    )  # fmt: skip
    if not is_shaped or not _is_of_keys(keys[:, 0], is_causal):
        raise NotImplementedError(
            f"{owner}: attention_mask must hide the same keys from all queries,"
            f" [B, 1, L or 1, L] = [{B}, 1, {L} or 1, {L}], got another one of shape"
            f" {list(mask.shape)}; use the float model (lraee.restore)"
        )
    valid = keys[:, 0, -1].expand(B, L)
    return None, None if bool(valid.all()) else valid


def _is_of_keys(shown: Tensor, is_causal: bool) -> bool:
    """Whether each query [b, L or 1, L] is shown what the last one is, later tokens left out in a
    causal module. Queries that are shown nothing may be shown all: libraries do so against NaN.
    """
    last = shown[:, -1:].expand_as(shown)
    if shown.equal(last):
        return True
    causal = last.tril()
    return is_causal and bool(((shown == causal) | ~causal.any(-1, keepdim=True)).all())


def by_valid_tokens(
    x: Tensor, valid: Tensor, run: Callable[[Tensor], Tensor], padding: Tensor
) -> Tensor:
    """Valid tokens of each image through `run`; `padding` elsewhere.

    Args:
      x: tokens [B, L, D].
      valid: bool [B, L].
      run: [b, n, D] -> [b, n, E].
      padding: [B, L, E], rows of tokens that are not valid.
    Returns: [B, L, E].
    """
    result = padding.clone()
    counts = valid.sum(1)
    for n in sorted(set(counts.tolist())):
        if n:
            images = counts == n
            tokens = valid & images[:, None]
            rows = run(x[tokens].view(-1, n, x.shape[-1]))
            result[tokens] = rows.reshape(-1, rows.shape[-1])
    return result
