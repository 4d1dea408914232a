"""CLIP image encoders in INT8, with learned early exits.

Names load what they need when they are first used: torch alone takes more than a second, and
`lraee --help` needs none of it. `import lraee.ops` registers the operators `torch.ops.lraee.*`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lraee import ops, zoo
    from lraee.calibration.calibrate import calibrate
    from lraee.exits.bundle import Exits
    from lraee.layers.scheme import Scheme
    from lraee.model.accelerate import accelerate
    from lraee.model.checkpoint import load, save
    from lraee.model.fidelity import FidelityError
    from lraee.model.restore import restore
    from lraee.model.trace import full_depth, trace
    from lraee.quantization.images import Calibration
    from lraee.storage.files import CheckpointError

__version__ = version("lraee")

__all__ = [
    "Calibration", "CheckpointError", "Exits", "FidelityError", "Scheme", "__version__",
    "accelerate", "calibrate", "full_depth", "load", "ops", "restore", "save", "trace", "zoo",
]  # fmt: skip

_HOMES = {
    "Calibration": "quantization.images",
    "CheckpointError": "storage.files",
    "Exits": "exits.bundle",
    "FidelityError": "model.fidelity",
    "Scheme": "layers.scheme",
    "accelerate": "model.accelerate",
    "calibrate": "calibration.calibrate",
    "full_depth": "model.trace",
    "load": "model.checkpoint",
    "restore": "model.restore",
    "save": "model.checkpoint",
    "trace": "model.trace",
}
_ROOMS = ("ops", "zoo")


def __getattr__(name: str) -> Any:
    """The public name, imported now; from then on it is an attribute like any other."""
    if name in _ROOMS:
        return import_module(f"lraee.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lraee' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"lraee.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})
