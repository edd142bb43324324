"""Longer memories without training: gates of linear attention forget more slowly, by one factor.

A student that has only seen windows of a thousand tokens keeps what it stores for about as long. What it should keep
for ten times as long has faded by then to a small fraction, though nothing has overwritten it. Adding ln f to a gate's
bias multiplies the half-lives of slow features by f and leaves those that forget within some tokens as they are: they
are local, and stay so. (MambaExtend, ICLR 2025, scales Mamba's time steps for longer texts, by factors that are
calibrated per layer; LongMamba, arXiv 2504.16053, tells slow channels from local ones. This is the plainest form.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from .errors import LincompileError, RefusedError
from .graph import finish, get_attribute, set_tensor
from .linearize import MODULE_PREFIX
from .pipeline import PassResult, register
from .program import Program

GATE = ".gate.bias"  # of GLA, LAWCAT and gated-delta, in a site's module


@register("half-lives")
@dataclass(frozen=True)
class HalfLives:
    """Multiplies the half-lives of gated sites' slow features: logsigmoid(z) in log α becomes logsigmoid(z + ln f).

    The factor is of what was trained: run again with the same one, nothing changes. Programs that share the weights are
    left as they are.

    Args:
        factor: f, above 0; 1 is as trained.

    Raises:
        LincompileError: the factor isn't a number above 0.
        RefusedError (when run): no site has gates.
    """

    factor: float = 1.0
    name: str = field(default="half-lives", init=False, metadata={"text": False})

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise LincompileError(f"--half-lives {self.factor:g}: the factor is a number above 0, such as 4")

    def run(self, program: Program) -> PassResult:
        module = program.graph_module
        names = (name for name, _ in module.named_parameters() if name.startswith(MODULE_PREFIX))
        gates = [name for name in names if name.endswith(GATE)]
        if not gates:
            raise RefusedError(
                f"--half-lives {self.factor:g}: no site has gates (those of gla, lawcat and gated-delta have)"
            )
        report = {"factor": self.factor, "gates": len(gates)}
        before = float(program.metadata.get("half_lives", 1.0))
        if self.factor == before:
            return PassResult(program, False, report)
        for name in gates:
            bias = get_attribute(module, name)
            longer = (bias.detach().double() + math.log(self.factor / before)).to(bias.dtype)
            set_tensor(module, name, nn.Parameter(longer, bias.requires_grad))
        program.metadata["half_lives"] = self.factor
        finish(module)
        return PassResult(program, True, report)
