"""Names of gates; no torch, so that the command line can list them."""

from typing import Literal

GateKind = Literal["learned", "confidence", "patience", "agreement", "static"]
