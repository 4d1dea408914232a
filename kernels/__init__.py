"""Triton kernels for NVIDIA GPUs, installed as lraee.kernels; importing this touches no device."""

if __name__ != "lraee.kernels":
    raise ImportError(f"these kernels must be imported as lraee.kernels, got {__name__}")
