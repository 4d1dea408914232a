"""Interleaved timing, and what a measurement says of the machine that it ran on."""
