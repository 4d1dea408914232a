"""CLIP image encoders in INT8, with learned early exits."""
