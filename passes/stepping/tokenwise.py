"""Whether a program treats tokens one by one outside its attention, read from its ops.

Running chunks against the full forward finds mixing at the lengths that are run; a convolution that reaches 40
tokens back, or a scale that changes past a trained length, shows at none of them. So every op that touches the
token axis must be one that is known to keep tokens apart, and none may compute with the sequence length.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..graph import VIEWS, argument, aten, expression, is_symbolic, symbols_in, target_of, tensor_of, value_of
from ..op_kinds import COMPARISONS, OPAQUE_POINTWISE, POINTWISE, is_pointwise
from ..program import Program, content_nodes
from ..verify import op_name

LAYOUT = VIEWS | frozenset({aten.stack.default, aten.repeat.default, aten.unsqueeze.default, aten.glu.default})
# op → position of its ``dim`` argument; None: over the trailing axes of its second argument
ALONG: dict[Any, int | None] = {
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten._safe_softmax.default: 1,
    aten.log_softmax.int: 1,
    aten.sum.dim_IntList: 1,
    aten.mean.dim: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.max.dim: 1,
    aten.var.correction: 1,
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
    aten.cumsum.default: 1,
    aten.cumprod.default: 1,
    aten.flip.default: 1,
    aten.roll.default: 2,
    aten.cat.default: 1,
    aten.argmax.default: 1,
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.layer_norm.default: None,
    aten.native_layer_norm.default: None,
    aten.rms_norm.default: None,
}
SCALARS = POINTWISE | OPAQUE_POINTWISE | COMPARISONS | frozenset({aten.scalar_tensor.default, aten.pow.Scalar})
PRODUCTS = frozenset(
    {
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.linear.default,
    }
)


def mixing(program: Program, sequence: str) -> str | None:
    """Why the program isn't token by token outside its attention, naming the node; None when it is.

    Args:
        sequence: name of the size symbol of the token axis.
    """
    content = content_nodes(program)
    for node in program.graph_module.graph.nodes:
        if node.op != "call_function" or is_symbolic(value_of(node)):
            continue
        reason = _computes_with_length(node, sequence)
        if reason is None and node in content:
            reason = _mixes(node, content, sequence)
        if reason is not None:
            return reason
    return None


def _computes_with_length(node: Node, sequence: str) -> str | None:
    target = target_of(node)
    values: list[Any] = []
    if target in SCALARS:
        values = [*node.args, *node.kwargs.values()]
    elif target in (aten.full.default, aten.new_full.default, aten.full_like.default):
        values = [node.args[1]] if target is not aten.new_full.default else [node.args[2]]
    elif target in (aten.arange.start, aten.arange.start_step):
        values = [node.args[0]]
    for item in values:
        if isinstance(item, Node) and is_symbolic(value_of(item)) and sequence in symbols_in(value_of(item)):
            return f"'{node.name}' computes with the sequence length"
    return None


def _long(node: Any, sequence: str) -> bool:
    """Whether a node holds something for every token."""
    value = value_of(node)
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) and sequence in symbols_in(part) for part in parts)


def _axes(node: Node, sequence: str) -> set[int]:
    """Axes of a tensor that the sequence symbol is part of, counted from the left."""
    return {axis for axis, dim in enumerate(tensor_of(node).shape) if sequence in symbols_in(dim)}


def _mixes(node: Node, content: set[Node], sequence: str) -> str | None:
    target = target_of(node)
    inputs = [item for item in node.all_input_nodes if item in content]
    per_token = [item for item in inputs if _long(item, sequence)]
    if not per_token or op_name(node) or target is operator.getitem:
        return None  # our own ops carry their state, or work on one token
    what = f"'{node.name}' ({target})"
    if len(per_token) < len(inputs):
        return f"{what} mixes one token's values into all others'"
    if not _long(node, sequence):
        return None if _takes_last(node, sequence) else f"{what} sums up the whole sequence"
    if isinstance(value_of(node), Tensor) and len(_axes(node, sequence)) > 1:
        return f"{what} pairs tokens with tokens"
    if target in ALONG:
        return f"{what} runs along the tokens" if _runs_along(node, per_token[0], sequence) else None
    if target in PRODUCTS:
        return f"{what} sums over tokens" if _contracts(node, sequence) else None
    if target is aten.einsum.default:
        inner = str(node.args[0]).replace(" ", "").partition("->")
        labels = zip(inner[0].split(","), node.args[1], strict=True)  # type: ignore[arg-type]
        tokens = {text[axis] for text, item in labels if "." not in text for axis in _axes(item, sequence)}
        return None if "." not in inner[0] and tokens <= set(inner[2]) else f"{what} sums over tokens"
    if target is aten.slice.Tensor:
        axis = int(argument(node, 1, "dim", 0)) % tensor_of(node).dim()
        whole = expression(tensor_of(node).shape[axis]) == expression(tensor_of(node.args[0]).shape[axis])
        return f"{what} moves tokens" if axis in _axes(per_token[0], sequence) and not whole else None
    if target is aten.index_select.default:
        axis = int(argument(node, 1, "dim")) % tensor_of(node.args[0]).dim()
        return f"{what} picks tokens by position" if axis in _axes(per_token[0], sequence) else None
    if target is aten.embedding.default and node.args[0] in content:
        return f"{what} looks up in a table made from tokens"
    if target in (aten.conv1d.default, aten.conv2d.default):
        kernel = tensor_of(node.args[1]).shape[2:]
        return None if all(int(n) == 1 for n in kernel) else f"{what} reaches other tokens"
    if is_pointwise(target) or target in LAYOUT:
        return None
    return f"{what} isn't known to keep tokens apart"


def _takes_last(node: Node, sequence: str) -> bool:
    """Whether a node picks the last token (logits of the next one), or is a layout of fixed size."""
    target = target_of(node)
    if target is aten.select.int:
        return bool(node.args[2] == -1)
    if target is aten.slice.Tensor:
        return bool(argument(node, 2, "start") == -1 and argument(node, 4, "step", 1) == 1)
    if target is aten.index.Tensor:
        places = [item for item in node.args[1] if item is not None]  # type: ignore[union-attr]
        return len(places) == 1 and not isinstance(value_of(places[0]), list) and tensor_of(places[0]).numel() == 1
    return False


def _runs_along(node: Node, source: Node, sequence: str) -> bool:
    value = value_of(source)
    first = value[0] if isinstance(value, (list, tuple)) else value
    rank = first.dim()
    tokens = {axis for axis, dim in enumerate(first.shape) if sequence in symbols_in(dim)}
    position = ALONG[target_of(node)]
    if position is None:
        return bool(tokens & set(range(rank - len(node.args[1]), rank)))  # type: ignore[arg-type]
    given = argument(node, position, "dim", 0 if target_of(node) is aten.cat.default else None)
    if given is None:
        return True
    axes = given if isinstance(given, (list, tuple)) else [given]
    return any(int(axis) % rank in tokens for axis in axes) or not axes


def _contracts(node: Node, sequence: str) -> bool:
    """Whether a matrix product sums over the token axis."""
    skip = 1 if target_of(node) in (aten.addmm.default, aten.baddbmm.default) else 0
    left, right = node.args[skip], node.args[skip + 1]
    assert isinstance(left, Node) and isinstance(right, Node)
    a, b = tensor_of(left), tensor_of(right)
    inner = b.dim() - 1 if target_of(node) is aten.linear.default else max(b.dim() - 2, 0)
    return a.dim() - 1 in _axes(left, sequence) or inner in _axes(right, sequence)
