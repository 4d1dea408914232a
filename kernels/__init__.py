"""Triton kernels for NVIDIA GPUs, installed as lraee.kernels; importing this touches no device."""

if __name__ != "lraee.kernels":
    # transformers looks for another package of this name, and beside a checkout it finds this one:
    # too old for it, and with nothing inside
    __version__ = "0"
    __path__ = []
