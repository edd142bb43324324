"""Lowering to Triton: chains of plain ops become one op each, and linear layers of one input become one.

Two rules for the stages around linear attention (``fusion/stages.py``), two for what lies between them
(``fusion/layers.py``), and two for steps of one token (``fusion/one_token.py``), each of pattern, check and
replacement. A match proposes; what decides is that the chain and the op agree on random inputs in float64, at several
lengths, with random weights, masks and carried states. What isn't matched or doesn't agree stays as it is, with the
reason. A saved artefact holds the plain graph, which every target understands; sessions on a GPU run the lowered one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..passes.program import share_tensors
from ..passes.stateful import StepProgram
from .fusion.chains import Lowered
from .fusion.layers import drop_unread, fuse_norms, join_layers, merge_masks
from .fusion.one_token import fuse_inputs, fuse_packed
from .fusion.stages import fuse_stages


def lower(step: StepProgram, *, decoding: bool = False, own: bool = False) -> tuple[StepProgram, Lowered]:
    """The step program for a GPU; weights are shared and its graph is left as it is.

    Args:
        decoding: also join packed layers of one input, and put what surrounds a product into it: one token takes few
            kernels then. The joined layers' tensors become views of one, and what is fused has no gradients.
        own: nobody else holds the step's weights (an opened artefact's): float layers are joined as well.
    """
    with torch.inference_mode(False), torch.no_grad():  # tensors that are made here outlive the caller's mode
        twin = share_tensors(step.graph_module, {})
        report = fuse_stages(twin)
        fuse_norms(twin, report)
        if decoding:
            merge_masks(twin)
            fuse_inputs(twin, report)  # before the gates' projections are joined to others
            join_layers(twin, report, own)
            fuse_packed(twin, report)
            drop_unread(twin)
    return replace(step, graph_module=twin), report
