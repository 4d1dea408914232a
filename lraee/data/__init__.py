"""Photos, their labels and class names; every file is hostile until checked."""

from lraee.data.photos import Photos, decode

__all__ = ["Photos", "decode"]
