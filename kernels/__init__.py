"""Triton kernels, installed as lraee.kernels."""
