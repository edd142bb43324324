"""Lowering to Triton: chains of plain ops become one op each, and packed linears of one input become one.

Two rules for the stages around linear attention (``fusion/stages.py``), and two for what lies between them
(``fusion/layers.py``), each of pattern, check and replacement. A match proposes; what decides is that the chain and the
op agree on random inputs in float64, at several lengths, with random weights, masks and carried states. What isn't
matched or doesn't agree stays as it is, with the reason. A saved artefact holds the plain graph, which every target
understands; sessions on a GPU run the lowered one.
"""

from __future__ import annotations

from dataclasses import replace

from ..passes.program import share_tensors
from ..passes.stateful import StepProgram
from .fusion.chains import Lowered
from .fusion.layers import fuse_norms, join_packed
from .fusion.stages import fuse_stages


def lower(step: StepProgram, *, join: bool = False) -> tuple[StepProgram, Lowered]:
    """The step program for a GPU; weights are shared and its graph is left as it is.

    Args:
        join: also make packed linears of one input one. Their tensors become views of the joined ones.
    """
    twin = share_tensors(step.graph_module, {})
    report = fuse_stages(twin)
    fuse_norms(twin, report)
    if join:
        join_packed(twin, report)
    return replace(step, graph_module=twin), report
