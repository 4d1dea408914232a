"""CLIP image encoders in INT8, with learned early exits."""

from importlib.metadata import version

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
