"""The hash of a tower's numbers."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tower_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over name, type, shape and bytes of each tensor of a tower, in order of names.

    torch.compile puts `_orig_mod.` into names; a compiled tower has the hash of its original.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
