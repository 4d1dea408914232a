"""Weights and norms of the int8 blocks, calibrated on images."""
