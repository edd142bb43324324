"""Which sites to keep softmax: each is set back to softmax alone, and those that bring the model closest are kept.

The measure is KL(teacher ‖ student) on held-out text after attention transfer (as in arXiv 2512.20569), one student
forward per site and window. ``choose`` ranks once; sites are not re-ranked after each choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LincompileError
from ..program import Program
from .divergence import divergence
from .instrument import either, unpadded
from .logits import logits_of
from .spread import total


@dataclass
class Choice:
    """KL in nats per token: of the student with every site linear, and with one site alone set back to softmax.

    ``kept`` are the indices (into ``program.sites``) of the chosen sites, ascending; ``chosen`` is the KL with all of
    them set back together.
    """

    linear: float = 0.0
    restored: dict[str, float] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    chosen: float = 0.0


@torch.no_grad()
def choose(
    teacher: Program,
    student: Program,
    windows: Tensor,
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """The ``count`` rewritten sites whose return to softmax lowers the divergence most.

    Args:
        windows: token windows ``[n, T]``.
        progress: called with (sites measured, sites).

    Raises:
        LincompileError: there are fewer rewritten sites than ``count``, or the divergence isn't finite.
    """
    wanted = unpadded(teacher)
    graph, switches = either(teacher, student)
    if not 0 < count <= len(switches):
        raise LincompileError(f"--keep-softmax auto:{count}: the model has {len(switches)} sites that could be linear")
    targets = [logits_of(wanted, window[None].to(wanted.device)) for window in windows]

    def measure(*softmax: str) -> float:
        for path, switch in switches.items():
            switch.softmax = path in softmax
        values = [
            float(total(divergence(logits_of(graph, window[None].to(wanted.device)), target)))
            for window, target in zip(windows, targets, strict=True)
        ]
        return sum(values) / len(values)

    result = Choice(linear=measure())
    for index, path in enumerate(switches):
        result.restored[path] = measure(path)
        progress(index + 1, len(switches))
    if any(value != value for value in [result.linear, *result.restored.values()]):
        raise LincompileError("--keep-softmax auto: the divergence isn't finite; check the model's weights")
    best = sorted(switches, key=result.restored.__getitem__)[:count]
    result.kept = tuple(index for index, site in enumerate(student.sites) if site.path in best)
    result.chosen = measure(*best)
    return result
