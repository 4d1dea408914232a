"""Names of gates and of what exits are for; no torch, so that the command line can list them."""

from typing import Literal

GateKind = Literal["learned", "confidence", "patience", "agreement", "static"]
Target = Literal["classes", "search"]
