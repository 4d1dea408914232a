"""CLIP image encoders in INT8, with learned early exits."""

from lraee.accelerate import accelerate, restore
from lraee.calibrate import calibrate
from lraee.checkpoint import load, save
from lraee.exits.exits import Exits
from lraee.fidelity import FidelityError
from lraee.files import CheckpointError
from lraee.quantize import Scheme
from lraee.trace import full_depth, trace

__all__ = [
    "CheckpointError", "Exits", "FidelityError", "Scheme",
    "accelerate", "calibrate", "full_depth", "load", "restore", "save", "trace",
]  # fmt: skip
