"""Tables of gated activations: those of csrc/cpu/numerics/gates.h, which says how they are made.

The root of the gate G(-t), t = |y|, as a polynomial: coefficients from the lowest power, exact in
float32, of t up to the clamp, and how often the root is squared.
"""


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float.fromhex, text.split()))


GELU = _floats("""
    0x1.d581b4p-1 -0x1.76ab6ep-4 -0x1.050ccep-5 -0x1.9f86d2p-11
    0x1.ab6632p-10 -0x1.4efab0p-15 -0x1.2b6808p-15 0x1.b2a354p-19
""")
GELU_TANH = _floats("""
    0x1.d581dcp-1 -0x1.76ba76p-4 -0x1.04a474p-5 -0x1.92e2e2p-11
    0x1.ac923cp-10 0x1.97e6aap-14 -0x1.7542a8p-13 0x1.5f7050p-15 -0x1.b5eb84p-19
""")
QUICK_GELU = _floats("""
    0x1.ea4c2cp-1 -0x1.a28bdep-5 -0x1.3d9c34p-6 -0x1.7f868ep-10 0x1.bbcd94p-8 -0x1.d37912p-9
    0x1.06c1a8p-10 -0x1.662e76p-13 0x1.275d24p-16 -0x1.0eac92p-20 0x1.a652d4p-26
""")
GELU_CLAMP, QUICK_GELU_CLAMP = 5.5, 9.0
"""gelu_tanh has that of gelu."""
GELU_SQUARINGS, QUICK_GELU_SQUARINGS = 3, 4
