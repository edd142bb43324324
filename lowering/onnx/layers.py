"""What lies between the linear layers of a decoder, as operators of the native library.

A node costs onnxruntime some kilobytes whatever its size, and a pass over memory. So, each with its body in the file:

- the RMS norm, with the residual sum before it, is one node;
- quantized linears of one input (queries, keys and values; gate and up) whose outputs are read together are one matrix;
- silu(gate) · up is one node that reads that matrix's output;
- a look-up in a six-bit table reads the table as it is stored.

Nothing is reordered or rounded: the numbers are the same but for the order of a norm's sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..native.library import DOMAIN
from . import native
from .native import ADD_RMS_NORM, INT6_LINEAR, INT6_ROWS, RMS_NORM, SWIGLU
from .quantized import Emitter
from .schemas import CONTRIB_DOMAIN


def fuse_layers(model: ir.Model) -> None:
    """Apply all rules, in place."""
    graph = model.graph
    used: set[str] = set()
    for rule in (_lookup, _joined, _swiglu, _norm):
        for node in list(graph):
            if node.graph is graph:
                used |= rule(graph, node)
        common.RemoveUnusedNodesPass()(model)
    native.attach(model, *sorted(used))


def _producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == (domain, op_type) else None


def _number(value: ir.Value | None) -> float | None:
    """A stored single number."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().ravel()[0]) if tensor is not None and tensor.size == 1 else None


def _put(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new)


# ---- look-ups


def _lookup(graph: ir.Graph, node: ir.Node) -> set[str]:
    if node.op_type != "Add" or node.domain != "":
        return set()
    parts = [_producer(value, "GatherBlockQuantized", CONTRIB_DOMAIN) for value in node.inputs]
    if any(part is None for part in parts) or node.outputs[0].is_graph_output():
        return set()
    high, low = (part for part in parts if part is not None)
    if [part.attributes["bits"].as_int() for part in (high, low)] != [4, 2] or high.inputs[1] is not low.inputs[1]:
        return set()
    cast = _producer(low.inputs[2], "Cast")
    ids, shape = high.inputs[1], node.outputs[0].shape
    size = shape[-1] if shape is not None and len(shape) == 3 else None
    if (
        cast is None
        or ids is None
        or high.attributes["block_size"].as_int() != native.GROUP_SIZE
        or not isinstance(size, int)
    ):
        return set()
    emit = Emitter(graph, node)
    _put(
        node.outputs[0],
        emit(INT6_ROWS, ids, high.inputs[0], low.inputs[0], cast.inputs[0], domain=DOMAIN, K=size),
    )
    return {INT6_ROWS}


# ---- linears of one input


def _linears(values: Sequence[ir.Value | None]) -> list[ir.Node] | None:
    """The quantized linears that these values come from; None where they don't share an input or are read elsewhere."""
    nodes = [_producer(value, INT6_LINEAR, DOMAIN) for value in values]
    found = [node for node in nodes if node is not None]
    if len(found) < len(values) or len({id(node.inputs[0]) for node in found}) > 1 or len(set(found)) < len(found):
        return None
    for node in found:
        planes = [value for value in node.inputs[1:] if value is not None and value.const_value is not None]
        if len(planes) < 3 or any(len(value.uses()) > 1 for value in planes):
            return None
    return found


def _join(emit: Emitter, nodes: list[ir.Node]) -> ir.Value:
    """One linear with the rows of all."""
    planes = []
    for index in (1, 2, 3):
        stored = [node.inputs[index] for node in nodes]
        tensors = [value.const_value for value in stored if value is not None and value.const_value is not None]
        first = stored[0]
        assert first is not None and len(tensors) == len(nodes)
        planes.append(emit.weight(f"{first.name}.all", np.concatenate([tensor.numpy() for tensor in tensors])))
    rows = sum(node.attributes["N"].as_int() for node in nodes)
    x, columns = nodes[0].inputs[0], nodes[0].attributes["K"].as_int()
    new = emit(INT6_LINEAR, x, *planes, domain=DOMAIN, K=columns, N=rows)
    old = nodes[0].outputs[0]
    if old.shape is not None:
        new.shape = ir.Shape([*list(old.shape)[:-1], rows])
    new.type = old.type
    return new


def _joined(graph: ir.Graph, node: ir.Node) -> set[str]:
    """A Concat of the outputs of linears of one input."""
    if node.op_type != "Concat" or any(value is not None and len(value.uses()) > 1 for value in node.inputs):
        return set()
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    nodes = _linears(node.inputs) if node.attributes["axis"].as_int() in (-1, rank - 1) else None
    if nodes is not None:
        _put(node.outputs[0], _join(Emitter(graph, nodes[0]), nodes))
    return set()


def _swiglu(graph: ir.Graph, node: ir.Node) -> set[str]:
    if node.op_type != "Mul" or node.domain != "" or node.outputs[0].is_graph_output():
        return set()
    for opened, up in (node.inputs, reversed(node.inputs)):
        silu = _producer(opened, "Mul")
        if silu is None:
            continue
        for gate, share in (silu.inputs, reversed(silu.inputs)):
            sigmoid = _producer(share, "Sigmoid")
            if sigmoid is None or gate is None or sigmoid.inputs[0] is not gate:
                continue
            nodes = _linears([gate, up])
            inner = [(gate, 2), (up, 1), (opened, 1), (share, 1)]
            if nodes is None or any(value is None or len(value.uses()) != count for value, count in inner):
                continue
            if nodes[0].attributes["N"].as_int() != nodes[1].attributes["N"].as_int():
                continue
            both = _join(Emitter(graph, nodes[0]), nodes)
            _put(node.outputs[0], Emitter(graph, node)(SWIGLU, both, domain=DOMAIN))
            return {SWIGLU}
    return set()


# ---- norms


def _norm(graph: ir.Graph, node: ir.Node) -> set[str]:
    """``weight · x / √(mean(x²) + ε)``, the form that simplify.py leaves, and the sum x = a + b where there is one."""
    if node.op_type != "Mul" or node.domain != "":
        return set()
    for weight, unit in (node.inputs, reversed(node.inputs)):
        divided = _producer(unit, "Div")
        root = _producer(divided.inputs[1], "Sqrt") if divided is not None else None
        shifted = _producer(root.inputs[0], "Add") if root is not None else None
        mean = _producer(shifted.inputs[0], "ReduceMean") if shifted is not None else None
        square = _producer(mean.inputs[0], "Pow") if mean is not None else None
        if divided is None or shifted is None or mean is None or square is None:
            continue
        x, epsilon = divided.inputs[0], _number(shifted.inputs[1])
        rows = (x.shape, node.outputs[0].shape) if x is not None else (None, None)
        flat = weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 1
        if x is None or square.inputs[0] is not x or not flat or epsilon is None or None in rows:
            continue
        if _number(square.inputs[1]) != 2.0 or _number(mean.inputs[1]) not in (-1.0, len(rows[0] or ()) - 1.0):
            continue
        if mean.attributes["keepdims"].as_int() != 1 or node.outputs[0].is_graph_output():
            continue
        summed = _producer(x, "Add")
        parts = [value.shape for value in summed.inputs if value is not None] if summed is not None else []
        alike = len(parts) == 2 and all(part is not None and list(part) == list(rows[0] or ()) for part in parts)
        if summed is None or not alike or x.is_graph_output():
            _put(node.outputs[0], Emitter(graph, node)(RMS_NORM, x, weight, domain=DOMAIN, epsilon=epsilon))
            return {RMS_NORM}
        new = ir.node(ADD_RMS_NORM, [*summed.inputs, weight], {"epsilon": epsilon}, domain=DOMAIN, num_outputs=2)
        graph.insert_after(summed, new)
        _put(node.outputs[0], new.outputs[0])
        _put(x, new.outputs[1])
        return {ADD_RMS_NORM}
    return set()
