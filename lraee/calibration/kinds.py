"""Names of ways to train; no torch, so that the command line can list them."""

from typing import Literal

Training = Literal["distill", "labels", "both"]
