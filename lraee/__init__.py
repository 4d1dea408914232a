"""CLIP image encoders in INT8, with learned early exits."""

from lraee.accelerate import accelerate, restore
from lraee.fidelity import FidelityError
from lraee.quantize import Scheme

__all__ = ["FidelityError", "Scheme", "accelerate", "restore"]
