"""Exact simplifications of the exported graph: fewer nodes, since at one token a node costs more than its work.

- a transpose of a transpose, and a reshape to the shape that its source had, disappear;
- a reshape of a reshape is one reshape;
- ``x · 1/√v`` is written ``x / √v``, the spelling of the RMS norm that onnxruntime fuses into one kernel.

No rule compares floating-point constants.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common


def simplify(model: ir.Model) -> int:
    """Apply the rules to the main graph until nothing changes; returns how many applications there were."""
    count = 0
    while True:
        done = sum(_apply(model.graph, node) for node in list(model.graph))
        common.RemoveUnusedNodesPass()(model)
        if not done:
            return count
        count += done


def _apply(graph: ir.Graph, node: ir.Node) -> bool:
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    replacement = rule(graph, node) if rule is not None else None
    if replacement is None:
        return False
    old = node.outputs[0]
    if old.is_graph_output():
        return False  # its name is the signature's
    if replacement.shape is None:
        replacement.shape = old.shape
    if replacement.type is None:
        replacement.type = old.type
    old.replace_all_uses_with(replacement)
    return True


def _before(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: object
) -> ir.Value:
    new = ir.node(op_type, inputs, attributes)
    graph.insert_before(node, new)
    return new.outputs[0]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _same_shape(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether both are known and equal, a symbol being equal to itself only."""
    return one is not None and other is not None and len(one) == len(other) and all(map(_same_dim, one, other))


def _same_dim(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    return one.value is not None and one.value == other.value


def _transpose(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    inner = _producer(node.inputs[0], "Transpose")
    if inner is None or "perm" not in node.attributes or "perm" not in inner.attributes:
        return None
    first, second = inner.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
    combined = [first[axis] for axis in second]
    if combined == sorted(combined):
        return inner.inputs[0]
    return _before(graph, node, "Transpose", [inner.inputs[0]], perm=combined)


def _reshape(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    source, target = node.inputs[0], node.outputs[0].shape
    if source is None:
        return None
    if target is None:
        target = node.outputs[0].shape = _reshaped(source.shape, node.inputs[1])
        node.outputs[0].type = node.outputs[0].type or source.type
    if _same_shape(source.shape, target):
        return source
    inner = _producer(source, "Reshape")
    origin = inner.inputs[0] if inner is not None else None
    if origin is None or target is None:
        return None
    if _same_shape(origin.shape, target):
        return origin
    dims = _shape_from(origin.shape, target)
    if dims is None:
        return None
    shape = _before(graph, node, "Constant", [], value_ints=dims)
    return _before(graph, node, "Reshape", [origin, shape])


def _reshaped(source: ir.Shape | None, wanted: ir.Value | None) -> ir.Shape | None:
    """The shape that a constant request makes of a source; None where it can't be told."""
    constant = wanted.const_value if wanted is not None else None
    producer = wanted.producer() if wanted is not None else None
    if constant is None and producer is not None and "value_ints" in producer.attributes:
        sizes = list(producer.attributes["value_ints"].as_ints())
    elif constant is not None:
        sizes = constant.numpy().tolist()
    else:
        return None
    if source is None or any(size < 0 or (size == 0 and axis >= len(source)) for axis, size in enumerate(sizes)):
        return None
    return ir.Shape([size or source[axis] for axis, size in enumerate(sizes)])


def _shape_from(origin: ir.Shape | None, target: ir.Shape) -> list[int] | None:
    """``target`` as a constant: 0 copies the origin's dimension, one other unknown is inferred; None if it can't be."""
    dims: list[int] = []
    for axis, dim in enumerate(target):
        if isinstance(dim, int):
            dims.append(dim)
        elif origin is not None and axis < len(origin) and _same_dim(origin[axis], dim):
            dims.append(0)
        else:
            dims.append(-1)
    if dims.count(-1) > 1 or any(isinstance(dim, int) and dim == 0 for dim in target):
        return None
    return dims


def _product(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    for factor, other in (node.inputs, reversed(node.inputs)):
        reciprocal = _producer(factor, "Reciprocal")
        root = _producer(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
        if root is not None and other is not None:
            return _before(graph, node, "Div", [other, root.outputs[0]])
    return None


_RULES: dict[str, Callable[[ir.Graph, ir.Node], ir.Value | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Mul": _product,
}
