"""The step program that computes the logits of a chunk's last token only: what reading a prompt needs.

The vocabulary projection of a small model is a fifth of its work, and its output for a whole chunk is the largest
tensor of a prefill. Only the end of the graph changes: the last linear layer gets the last token's row.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from .graph import INT_MAX, aten, finish, target_of
from .op_kinds import CASTS, POINTWISE, SAME
from .program import share_tensors
from .stateful import StepProgram
from .verify import op_name


def last_token_only(step: StepProgram) -> StepProgram | None:
    """A step program with the same weights and states that returns logits ``[B, 1, V]``.

    None where its end isn't a linear layer followed by elementwise ops on that layer's output alone, or where the
    program is no graph (a compiled package).
    """
    if not isinstance(step.graph_module, GraphModule) or _projection(step.graph_module) is None:
        return None
    module = share_tensors(step.graph_module, {})
    projection = _projection(module)
    assert projection is not None
    with module.graph.inserting_before(projection):
        last = module.graph.call_function(aten.slice.Tensor, (projection.args[0], 1, -1, INT_MAX))
    projection.args = (last, *projection.args[1:])
    finish(module)
    return replace(step, graph_module=module)


def _projection(module: GraphModule) -> Node | None:
    """The linear layer ``[B, t, d] → [B, t, V]`` that the graph's first output comes from."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    node = output.args[0][0] if isinstance(output.args[0], (list, tuple)) else None
    while isinstance(node, Node):
        if target_of(node) is aten.linear.default or op_name(node) == "int6_linear":
            return node
        if target_of(node) not in POINTWISE | CASTS | SAME:
            return None
        inputs = [item for item in node.all_input_nodes if item.op != "get_attr"]
        node = inputs[0] if len(inputs) == 1 else None
    return None
