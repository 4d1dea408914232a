"""What users wrap models in: compiled and parallel ones are looked into, others refused."""

import torch
from torch import nn

_HELD = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's module, DataParallel and DistributedDataParallel."""
    while (name := _HELD.get(type(model).__name__)) is not None and name in model._modules:
        model = model.get_submodule(name)
    return model


def require_eager(model: nn.Module) -> None:
    """Raises TypeError on a model of torch.jit."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"accelerate: model must not be of torch.jit, got {type(model).__name__}; pass the"
            " model that was scripted or traced"
        )


def require_own_weights(tower: nn.Module) -> None:
    """Raises TypeError on unmerged adapters, ValueError on weights on the meta device."""
    for name, module in tower.named_modules():
        if type(module).__module__.startswith("peft."):
            raise TypeError(
                f"accelerate: model must have its adapters merged, got {type(module).__name__} of"
                f" PEFT at {name}; pass the result of model.merge_and_unload()"
            )
    for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"accelerate: model must have weights, got {name} on the meta device; load them"
                " first, such as by from_pretrained without device_map"
            )
