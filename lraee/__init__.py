"""CLIP image encoders in INT8, with learned early exits."""

from lraee.accelerate import accelerate, restore
from lraee.checkpoint import load, save
from lraee.fidelity import FidelityError
from lraee.files import CheckpointError
from lraee.quantize import Scheme

__all__ = [
    "CheckpointError", "FidelityError", "Scheme", "accelerate", "load", "restore", "save",
]  # fmt: skip
