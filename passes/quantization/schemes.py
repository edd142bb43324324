"""Quantization schemes of one layer, and the ``--quant`` values that ask for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...kernels.int6_linear.pack import GROUP_SIZE, group_count, plane_bytes
from ..errors import LincompileError


@dataclass(frozen=True)
class Scheme:
    """Bits of a layer's weights and the op's ``activation`` argument."""

    name: str
    weight_bits: int
    activation: str

    def weight_bytes(self, out_features: int, in_features: int, group_size: int = GROUP_SIZE) -> int:
        """Bytes of the packed weight and its scales; ``float`` counts as 16 bits per weight."""
        if self.is_float:
            return out_features * in_features * 2
        codes = in_features if self.weight_bits == 8 else sum(plane_bytes(in_features))
        return out_features * (codes + 2 * group_count(in_features, group_size))

    @property
    def is_float(self) -> bool:
        return self.weight_bits >= 16

    @property
    def activation_bits(self) -> int:
        return int(self.activation[1:])


FLOAT = Scheme("float", 16, "a16")
SCHEMES = {
    "w6a6": Scheme("w6a6", 6, "a6"),
    "w6a8": Scheme("w6a8", 6, "a8"),
    "w6a16": Scheme("w6a16", 6, "a16"),
    "w8a8": Scheme("w8a8", 8, "a8"),
    "float": FLOAT,
}
CHOICES = "none, int6, w6a6, w6a8, w6a16, w8a8, auto:BITS"


@dataclass(frozen=True)
class PlanSpec:
    """What ``--quant`` asks for: ``kind`` is ``none``, ``uniform``, ``int6`` or ``auto``."""

    kind: str
    scheme: Scheme | None = None
    effective_bits: float | None = None


def parse_plan(text: str, effective_bits: float | None = None) -> PlanSpec:
    """Read a ``--quant`` value.

    ``none``; one scheme for every layer (``w6a6``, ``w6a8``, ``w6a16``, ``w8a8``); ``int6``: six-bit weights with six-
    or eight-bit activations chosen per layer; ``auto:BITS``: a scheme per layer for BITS bits per weight on average.

    Raises:
        LincompileError: unknown name, or bits missing or out of range.
    """
    name, separator, value = text.strip().lower().partition(":")
    if name == "auto":
        if separator and not re.fullmatch(r"\d+(\.\d+)?", value):
            raise LincompileError(f"quant '{text}': write the bits as a number, for example auto:6.5")
        bits = float(value) if separator else effective_bits
        if bits is None or not 6 <= bits <= 16:
            given = "no bits given" if bits is None else f"{bits:g} bits"
            raise LincompileError(f"quant '{text}': {given}; ask for 6 to 16 bits per weight, for example auto:6.5")
        return PlanSpec("auto", effective_bits=bits)
    if not separator and name in ("none", "int6"):
        return PlanSpec(name)
    if not separator and name in SCHEMES and name != "float":
        return PlanSpec("uniform", SCHEMES[name])
    raise LincompileError(f"unknown quantization '{text}'; the choices are {CHOICES}")
