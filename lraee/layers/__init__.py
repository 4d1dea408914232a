"""The layers that stand in an accelerated tower, and the scheme that quantizes them."""
