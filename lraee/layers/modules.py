"""Modules taken apart and put together: subclasses made at run time, hooks, parts by path."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, cast

from torch import nn

T = TypeVar("T")


NO_SCRIPT = (
    "encode_image: an int8 tower must not be traced for TorchScript or ONNX, which have no"
    " int8 blocks; use torch.export inside lraee.full_depth, or convert the float model"
    " (lraee.restore)"
)


class Take(Protocol):
    """How a part of the float model enters the fast one: copied, or as it is."""

    def __call__(self, part: T) -> T:
        """The part for the fast model."""
        ...


HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class Adapter(nn.Module):
    """What a class of a library becomes in an accelerated model: `subclass(adapter, base)`.

    An instance is one of the library's class, which code and hooks of that library look for.
    pickle and deepcopy name these classes, since the one made of them is in no module.
    """

    adapter_prefix: ClassVar[str] = "Int8"
    own_attributes: ClassVar[tuple[str, ...]] = ()
    """What release removes."""
    _classes: ClassVar[tuple[type["Adapter"], type[nn.Module]]]

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether adopt turns this module into one of this class."""
        return True

    @classmethod
    def adopt(cls, module: nn.Module, **attributes: object) -> None:
        """Turns a module of a library that fits into this class; its numbers stay where they are.

        attributes: set on it, as own_attributes names them.
        """
        if cls.fits(module):
            module.__class__ = subclass(cls, type(module))
            module.__dict__.update(attributes)

    @classmethod
    def release(cls, module: nn.Module) -> None:
        """The way back from adopt; leaves any other module alone."""
        if isinstance(module, cls):
            for name in cls.own_attributes:
                module.__dict__.pop(name, None)
            module.__class__ = type(module)._classes[1]  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The classes, and the state."""
        return _blank, tuple(_chain(type(self))), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Everything."""
        return self.__dict__

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks each module for."""
        raise NotImplementedError(NO_SCRIPT)


_subclasses: dict[tuple[type, type], type[Adapter]] = {}


def subclass(adapter: type[Adapter], base: type[nn.Module]) -> type[Adapter]:
    """The class whose methods are the adapter's, then the base's; the same one at every call."""
    if (adapter, base) not in _subclasses:
        name = f"{adapter.adapter_prefix}{base.__name__}"
        namespace = {"__module__": adapter.__module__, "_classes": (adapter, base)}
        # setdefault: of two threads that come here at once, both get one class
        _subclasses.setdefault((adapter, base), type(name, (adapter, base), namespace))
    return _subclasses[adapter, base]


def library_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, less the adapters."""
    return _chain(type(module))[-1]


def _chain(kind: type[nn.Module]) -> list[type[nn.Module]]:
    """The adapters that a class was made of, the last one first, and the library's class."""
    if not issubclass(kind, Adapter):
        return [kind]
    adapter, base = kind._classes
    return [adapter, *_chain(base)]


def _blank(*chain: type[nn.Module]) -> nn.Module:
    *adapters, kind = chain
    for adapter in reversed(adapters):
        kind = subclass(cast(type[Adapter], adapter), kind)
    return kind.__new__(kind)


def shell(
    module: nn.Module, kind: type[nn.Module], children: Mapping[str, nn.Module], take: Take
) -> Any:
    """A module of class `kind` with the attributes, parameters and buffers of another.

    Args:
      module: whose attributes are taken; its children and hooks are not.
      kind: class of the result; none of its __init__ runs.
      children: its children.
      take: brings attributes and tensors into the fast model.
    """
    result = kind.__new__(kind)
    nn.Module.__init__(result)
    attributes = {k: v for k, v in module.__dict__.items() if k not in result.__dict__}
    own = attributes.get("forward")
    if getattr(own, "__func__", None) is type(module).forward:
        del attributes["forward"]  # transformers 4 leaves the method of the class there
    result.__dict__.update({name: take(value) for name, value in attributes.items()})
    result._parameters = {name: take(p) for name, p in module._parameters.items()}
    result._buffers = {name: take(b) for name, b in module._buffers.items()}
    result._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, child in children.items():
        result.add_module(name, child)
    result.training = False
    return result


def put_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Sets the submodule of this path; parents that are not there become plain modules."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = cast(nn.Module, root._modules[parent])
    if isinstance(root, nn.ModuleList | nn.Sequential):
        root._modules[name] = module
    else:
        setattr(root, name, module)


def carry_hooks(source: nn.Module, target: nn.Module, take: Take) -> None:
    """Gives each module of target the forward hooks of the module of that name in source."""
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        if name in modules and module is not modules[name]:
            for attribute in HOOKS:
                module.__dict__[attribute] = take(modules[name].__dict__[attribute])


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook sees the calls of this very module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def without_numbers(part: nn.Module) -> nn.Module:
    """The module on the meta device, without hooks: all that restore needs besides the weights."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in part.parameters()
    }
    for module in part.modules():
        for attribute in HOOKS:
            memo[id(module.__dict__[attribute])] = OrderedDict()
    return copy.deepcopy(part, memo)
