"""``logits_from``: the end of a decoder computed for some of a chunk's tokens only, as reading a prompt needs it.

The logits of a prompt's last token don't depend on what the last layer makes of the tokens before it: after the last
attention, everything up to the head treats each token by itself. Those operators get the wanted rows alone, which
spares the head (a small model's largest product) and most of a layer. States are computed as before, from all rows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .metadata import LOGITS_FROM
from .native import ADD_RMS_NORM, INT6_LINEAR, RMS_NORM, SWIGLU
from .quantized import Emitter
from .schemas import CONTRIB_DOMAIN, PLACEHOLDER_DOMAIN

_LAST = 9223372036854775807
_KEPT = "kept"
_LINEARS = (("", "MatMul"), (CONTRIB_DOMAIN, "MatMulNBits"), (PLACEHOLDER_DOMAIN, INT6_LINEAR))
_TO_HEADS = ("Add", "Mul", "Div", "Tanh", "Cast", "Identity")
# Operators that treat each token by itself: linears and norms over the last axis by their first input, elementwise
# ones by all of them.
_BY_FIRST = {
    *_LINEARS,
    ("", "SimplifiedLayerNormalization"),
    ("", "LayerNormalization"),
    ("", "RMSNormalization"),
    (PLACEHOLDER_DOMAIN, RMS_NORM),
    (PLACEHOLDER_DOMAIN, SWIGLU),
}
_ELEMENTWISE = {
    *(("", name) for name in ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Erf")),
    *(("", name) for name in ("Tanh", "Sigmoid", "Relu", "Gelu", "Softplus", "Cast", "Identity")),
    *((CONTRIB_DOMAIN, name) for name in ("Gelu", "FastGelu", "QuickGelu")),
    (PLACEHOLDER_DOMAIN, ADD_RMS_NORM),
}
_NORMS = ("SimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization")


def choose_logits(model: ir.Model) -> bool:
    """Add the optional input ``logits_from`` ``[1]``: the first token of a chunk whose logits are computed.

    It has a default, 0: a runtime that doesn't know it gets them all. A prompt needs those of its last token, −1.

    Returns:
        Whether there is one; the logits must be a linear layer's output, or come from it by elementwise operators.
    """
    graph = model.graph
    heads: list[ir.Node] = []
    if not _heads_of(graph.outputs[0].producer(), heads):
        return False
    sources = {id(node.inputs[0]): node.inputs[0] for node in heads}
    hidden = next(iter(sources.values()))
    if len(sources) != 1 or hidden is None or hidden.shape is None or len(hidden.shape) != 3:
        return False
    readers = {use.node for use in hidden.uses()}
    by_themselves = _rowwise(graph, heads, hidden) if readers == set(heads) and not hidden.is_graph_output() else []
    start: ir.Value | None = None
    kept: dict[int, ir.Value] = {}
    for node in by_themselves or heads:
        for index in range(len(node.inputs)) if by_themselves else [0]:
            value = node.inputs[index]
            if value is None or value.producer() in by_themselves:
                continue
            if value is not hidden and not _is_rows(value, hidden):
                continue
            if id(value) not in kept:
                emit = Emitter(graph, node)
                start = start or emit.weight(LOGITS_FROM, np.zeros(1, np.int64))
                kept[id(value)] = emit("Slice", value, start, emit.constant([_LAST]), emit.constant([1]))
                kept[id(value)].type = value.type
            node.replace_input_with(index, kept[id(value)])
    if start is None:
        return False
    graph.inputs.append(start)
    for value in kept.values():
        source = value.producer()
        shape = None if source is None or source.inputs[0] is None else source.inputs[0].shape
        assert shape is not None
        value.shape = ir.Shape([shape[0], _KEPT, shape[2]])
        _follow(value)
    return True


def _follow(value: ir.Value) -> None:
    """The axis has its own length from here on."""
    after = [value]
    while after:
        for node, _ in after.pop().uses():
            for found in node.outputs:
                if found.shape is not None and len(found.shape) == 3 and found.shape[1] != _KEPT:
                    found.shape = ir.Shape([found.shape[0], _KEPT, found.shape[2]])
                    after.append(found)


def _rowwise(graph: ir.Graph, heads: list[ir.Node], hidden: ir.Value) -> list[ir.Node]:
    """The nodes before the heads that treat each token by itself and are read by each other and the heads only, with
    the heads, in the graph's order; empty where there are none.
    """
    _name_shapes(graph)
    found = set(heads)
    for node in reversed(list(graph)):
        outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        if (
            node not in found
            and outputs
            and all(not value.is_graph_output() and _is_rows(value, hidden) for value in outputs)
            and all(use.node in found for value in outputs for use in value.uses())
            and _treats_rows_alone(node, hidden)
        ):
            found.add(node)
    # A linear layer has to be among them: a slice more to spare a norm isn't worth its node.
    if not any((node.domain, node.op_type) in _LINEARS for node in found - set(heads)):
        return []
    return [node for node in graph if node in found]


def _treats_rows_alone(node: ir.Node, hidden: ir.Value) -> bool:
    kind, first = (node.domain, node.op_type), node.inputs[0] if node.inputs else None
    if kind in _BY_FIRST:
        if first is None or not _is_rows(first, hidden):
            return False
        if node.op_type in _NORMS:
            axis = node.attributes.get("axis")
            if axis is not None and axis.as_int() not in (-1, 2):
                return False
        if node.op_type == "MatMul" and _rank(node.inputs[1]) != 2:
            return False
        return all(value is None or _stored(value) for value in node.inputs[1:])
    if kind in (("", "ReduceMean"), ("", "ReduceSum"), ("", "ReduceMax")):
        axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        kept = node.attributes.get("keepdims")
        last = axes is not None and axes.numpy().tolist() in ([-1], [2])
        return last and (kept is None or kept.as_int() == 1) and first is not None and _is_rows(first, hidden)
    if kind not in _ELEMENTWISE:
        return False
    return all(value is None or _is_rows(value, hidden) or _per_channel(value) for value in node.inputs)


def _rank(value: ir.Value | None) -> int | None:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        return _rank(node.inputs[0])
    return None if value is None or value.shape is None else len(value.shape)


def _name_shapes(graph: ir.Graph) -> None:
    """What lowering left without a shape: that of the only input, or the rows of a packed product."""
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if len(node.outputs) != 1 or node.outputs[0].shape is not None or source is None or source.shape is None:
            continue
        if (node.domain, node.op_type) in _ELEMENTWISE and len(node.inputs) == 1 and node.op_type != "Cast":
            node.outputs[0].shape, node.outputs[0].type = source.shape, source.type
        elif "N" in node.attributes and (node.domain, node.op_type) in _LINEARS:
            node.outputs[0].shape = ir.Shape([*list(source.shape)[:-1], node.attributes["N"].as_int()])
            node.outputs[0].type = source.type


def _is_rows(value: ir.Value, hidden: ir.Value) -> bool:
    """``[B, T, …]`` with the hidden states' batch and tokens."""
    shape, like = value.shape, hidden.shape
    known = shape is not None and like is not None and len(shape) == 3 and not isinstance(like[1], int)
    return known and shape is not None and like is not None and shape[0] == like[0] and shape[1] == like[1]


def _per_channel(value: ir.Value) -> bool:
    """A stored tensor that is the same for all tokens."""
    tensor = value.const_value
    return tensor is not None and all(size == 1 for size in list(tensor.shape)[:-1])


def _stored(value: ir.Value) -> bool:
    """A weight, or what is computed from weights alone."""
    node = value.producer()
    if value.const_value is not None or node is None:
        return value.const_value is not None
    return all(source is not None and _stored(source) for source in node.inputs)


def _heads_of(node: ir.Node | None, found: list[ir.Node]) -> bool:
    """The linear layers that a value comes from through elementwise operators, into ``found``; False for others."""
    if node is None:
        return False
    if (node.domain, node.op_type) in _LINEARS:
        found.append(node)
        return True
    computed = [value for value in node.inputs if value is not None and value.const_value is None]
    if node.domain != "" or node.op_type not in _TO_HEADS or not computed:
        return False
    return all(_heads_of(value.producer(), found) for value in computed)
