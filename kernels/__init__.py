"""Triton kernels for NVIDIA GPUs, installed as lraee.kernels; importing this touches no device."""

if __name__ != "lraee.kernels":
    # In a checkout this folder has the name of a package that transformers looks for and imports:
    # an empty module of no version is none to it. Modules in here must come as lraee.kernels.
    __path__ = []
