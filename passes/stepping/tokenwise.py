"""Whether a program treats tokens one by one outside its attention, read from its ops.

Running chunks against the full forward finds mixing at the lengths that are run; a convolution that reaches 40
tokens back, or a scale that changes past a trained length, shows at none of them. So every op that touches the
token axis must be one that is known to keep tokens apart, and none may compute with the sequence length. That
holds for positions and masks as for tokens: a step sees those of its chunk alone, so their maximum, sum or first
one is another than the whole sequence's, and rows of a batch must not read one another's.
"""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import (
    VIEWS,
    argument,
    aten,
    expression,
    is_mutation,
    is_symbolic,
    source_line,
    storage_root,
    symbols_in,
    target_of,
    tensor_of,
    value_inputs,
    value_of,
    walk_up,
)
from ..op_kinds import is_pointwise
from ..program import Program, content_nodes
from ..verify import op_name
from .positional import (
    SIZES,
    axes_of,
    batch_symbols,
    is_long,
    numbers_in,
    own_counters,
    parts_of,
    row_nodes,
    token_nodes,
    unknown_start,
)

LAYOUT = (VIEWS - {aten.diagonal.default}) | frozenset(
    {
        aten.stack.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
        aten.polar.default,
        aten.complex.default,
        aten.outer.default,
        aten.one_hot.default,
    }
)
RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)
# op → position of its ``dim`` argument; None: over the trailing axes of its second argument
ALONG: dict[Any, int | None] = {
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten._safe_softmax.default: 1,
    aten.log_softmax.int: 1,
    aten.logsumexp.default: 1,
    aten.sum.dim_IntList: 1,
    aten.mean.dim: 1,
    aten.prod.dim_int: 1,
    aten.any.dim: 1,
    aten.all.dim: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.var.correction: 1,
    aten.std.correction: 1,
    aten.var.dim: 1,
    aten.std.dim: 1,
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
    aten.cumsum.default: 1,
    aten.cumprod.default: 1,
    aten.flip.default: 1,
    aten.roll.default: 2,
    aten.cat.default: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.glu.default: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.unbind.int: 1,
    aten.repeat_interleave.self_int: 2,
    aten.layer_norm.default: None,
    aten.native_layer_norm.default: None,
    aten.rms_norm.default: None,
}
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


@dataclass(frozen=True)
class _Axis:
    """An axis whose entries must be kept apart: its size symbol, what its entries are, and the nodes that hold any."""

    symbol: str
    entries: str
    nodes: set[Node]

    @property
    def tokens(self) -> bool:
        return self.entries == "tokens"


def mixing(program: Program, sequence: str, *, across_rows: bool = True) -> str | None:
    """Why the program isn't token by token outside its attention, naming the node; None when it is.

    Args:
        sequence: name of the size symbol of the token axis.
        across_rows: also refuse what lets the rows of a batch influence one another.
    """
    nodes = program.graph_module.graph.nodes
    content = content_nodes(program)
    needed = _needed(program, content)
    tokens = _Axis(sequence, "tokens", token_nodes(program, sequence, content))
    batch = batch_symbols(program) if across_rows else []
    rows = [_Axis(name, "rows of a batch", row_nodes(program, name)) for name in batch]
    counters = own_counters(program, sequence)
    for node in nodes:
        if node.op != "call_function" or node in counters or op_name(node):
            continue  # our own ops carry their state, or work on one token
        if is_symbolic(value_of(node)):
            reason = _reads_out(node, tokens)
        elif node not in needed or not any(isinstance(part, Tensor) for part in parts_of(node)):
            continue
        else:
            reason = _computes_with_sizes(node, tokens, rows) or _mixes(node, tokens, content)
            reason = reason or _writes(node, content, tokens)
            for axis in rows if reason is None else []:
                found = _mixes(node, axis, content)
                reason = f"lets rows of a batch influence one another: it {found}" if found else None
        if reason is not None:
            line = source_line(node)
            return f"'{node.name}' ({node.target}) {reason}{f' ({line})' if line else ''}"
    return None


def _needed(program: Program, content: set[Node]) -> set[Node]:
    """Nodes that outputs or tokens' nodes are made of, also by what is written into them."""
    nodes = program.graph_module.graph.nodes
    needed = content.union(*(walk_up(node) for node in nodes if node.op == "output"))
    writes = [node for node in nodes if is_mutation(node)]
    while found := [node for node in writes if node not in needed and storage_root(node) in needed]:
        needed.update(*map(walk_up, found))
    return needed


def _reads_out(node: Node, tokens: _Axis) -> str | None:
    """A number that is read out of a tensor (``item``), with which anything may be computed."""
    sizes = str(node.target).startswith("aten.sym_")
    read = not sizes and any(item in tokens.nodes for item in node.all_input_nodes)
    return "reads a number out of the whole sequence" if read else None


def _computes_with_sizes(node: Node, tokens: _Axis, rows: list[_Axis]) -> str | None:
    if target_of(node) is aten.slice.Tensor and _is_whole(node):
        return None
    place = SIZES.get(target_of(node))
    values: list[Any] = []
    torch.fx.map_arg([item for i, item in enumerate(node.args) if i != place], values.append)
    torch.fx.map_arg(node.kwargs, values.append)
    symbols = frozenset().union(*(symbols_in(value_of(item)) for item in values if is_symbolic(value_of(item))))
    if tokens.symbol in symbols:
        return "computes with the sequence length"
    return "computes with the batch size" if any(axis.symbol in symbols for axis in rows) else None


def _writes(node: Node, content: set[Node], tokens: _Axis) -> str | None:
    """What is written into a tensor changes it for readers that don't depend on the writing node."""
    root = storage_root(node)
    if not is_mutation(node) or root in content:
        return None
    if root.op == "get_attr":
        same = target_of(node) is aten.copy_.default and not any(item in tokens.nodes for item in value_inputs(node))
        return None if same else "changes a stored tensor, which the next chunk reads"
    if root not in tokens.nodes:
        return None
    whole = numbers_in(tensor_of(root).shape) == numbers_in(tensor_of(node).shape)
    return None if whole and node not in content else "writes into a part of a tensor of positions"


def _mixes(node: Node, axis: _Axis, content: set[Node]) -> str | None:
    target, symbol, entries = target_of(node), axis.symbol, axis.entries
    inputs = [item for item in value_inputs(node) if item in axis.nodes]
    each = [item for item in inputs if is_long(item, symbol)]
    if target is operator.getitem:
        return None
    if not each:
        return unknown_start(node, symbol) if axis.tokens and is_long(node, symbol) else None
    if len(each) < len(inputs):
        return f"mixes one of the {entries} into all others"
    if not is_long(node, symbol):
        if node in content and axis.tokens:
            return None if _takes_last(node) else "sums up the whole sequence"
        return f"reads {'the positions or mask of ' if axis.tokens else ''}all {entries} at once"
    if isinstance(value_of(node), Tensor) and len(axes_of(node, symbol)) > 1:
        return f"pairs {entries} with {entries}"
    if target in ALONG:
        return f"runs along the {entries}" if _runs_along(node, each[0], symbol) else None
    if target in PRODUCTS:
        return f"sums over {entries}" if _contracts(node, symbol) else None
    if target is aten.einsum.default:
        return f"sums over {entries}" if _sums(node, symbol) else None
    if target is aten.slice.Tensor:
        dim = int(argument(node, 1, "dim", 0)) % tensor_of(node).dim()
        return f"moves {entries}" if dim in axes_of(each[0], symbol) and not _is_whole(node) else None
    if target in (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default):
        return _looks_up(node, axis)
    if target is aten.bucketize.Tensor:
        return f"looks up in a table made from {entries}" if node.args[1] in axis.nodes else None
    if target is aten.repeat.default:
        return None if axes_of(node, symbol) <= _unrepeated(node) else f"runs along the {entries}"
    if target in (aten.conv1d.default, aten.conv2d.default):
        kernel = tensor_of(node.args[1]).shape[2:]
        return None if all(int(n) == 1 for n in kernel) else f"reaches other {entries}"
    if target in RESHAPES and node not in content and axis.tokens and not _keeps_order(node, symbol):
        return f"puts {entries} elsewhere"  # what tokens hold differs enough for running chunks to find it
    if is_pointwise(target) or target in LAYOUT:
        return None
    return f"isn't known to keep {entries} apart"


def _takes_last(node: Node) -> bool:
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


def _is_whole(node: Node) -> bool:
    """Whether a slice is as long as what it is cut from."""
    dim = int(argument(node, 1, "dim", 0)) % tensor_of(node).dim()
    return bool(expression(tensor_of(node).shape[dim]) == expression(tensor_of(node.args[0]).shape[dim]))


def _looks_up(node: Node, axis: _Axis) -> str | None:
    """Entries of a table, read at places that each token says; or the same places of what each token holds."""
    target, table = target_of(node), node.args[0]
    if table not in axis.nodes and target is not aten.gather.default:
        return None
    along = axes_of(table, axis.symbol)
    if target is aten.embedding.default:
        return f"looks up in a table made from {axis.entries}"
    if target is aten.index.Tensor:
        places = {place: item for place, item in enumerate(node.args[1]) if item is not None}  # type: ignore[arg-type]
        apart = not (along & places.keys()) and not any(item in axis.nodes for item in places.values())
        return None if apart else f"picks {axis.entries} by position"
    dim = int(argument(node, 1, "dim")) % tensor_of(table).dim()
    if target is aten.gather.default and table not in axis.nodes:
        return None if axes_of(node, axis.symbol) <= {dim} | along else f"picks {axis.entries} by position"
    return f"picks {axis.entries} by position" if dim in along else None


def _unrepeated(node: Node) -> set[int]:
    """Axes along which ``repeat`` says its input once."""
    times: Any = node.args[1]
    return {axis for axis, count in enumerate(times) if isinstance(count, int) and count == 1}


def _keeps_order(node: Node, symbol: str) -> bool:
    """Whether a reshape has as many numbers behind each token as before: it then moves none to another's place."""
    before, after = (numbers_in(tensor_of(x).shape[max(axes_of(x, symbol)) + 1 :]) for x in (node.args[0], node))
    return bool(before == after)


def _runs_along(node: Node, source: Node, symbol: str) -> bool:
    first = parts_of(source)[0]
    rank = first.dim()
    along = {axis for axis, dim in enumerate(first.shape) if symbol in symbols_in(dim)}
    target = target_of(node)
    position = ALONG[target]
    if position is None:
        return bool(along & set(range(rank - len(node.args[1]), rank)))  # type: ignore[arg-type]
    described = target._schema.arguments[position]
    given = argument(node, position, described.name, described.default_value)
    if given is None:
        return True
    axes = given if isinstance(given, (list, tuple)) else [given]
    return any(int(axis) % rank in along for axis in axes) or not axes


def _sums(node: Node, symbol: str) -> bool:
    """Whether an einsum sums over an axis: one whose letter its result lacks, or that isn't told."""
    inputs, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    operands: Any = node.args[1]
    texts = inputs.split(",")
    wide = [
        tensor_of(item).dim() - len(text) + 3 if "..." in text else 0
        for text, item in zip(texts, operands, strict=True)
    ]
    spare = [letter for letter in string.ascii_uppercase if letter not in inputs][: max(wide)]

    def spelled(text: str, count: int) -> str:
        return text.replace("...", "".join(spare[len(spare) - count :]))  # broadcast from the right, as shapes are

    kept = {
        spelled(text, count)[place]
        for text, count, item in zip(texts, wide, operands, strict=True)
        for place in axes_of(item, symbol)
    }
    return not arrow or not kept <= set(spelled(out, len(spare)))


def _contracts(node: Node, symbol: str) -> bool:
    """Whether a matrix product sums over an axis."""
    skip = 1 if target_of(node) in (aten.addmm.default, aten.baddbmm.default) else 0
    left, right = node.args[skip], node.args[skip + 1]
    a, b = tensor_of(left), tensor_of(right)
    inner = b.dim() - 1 if target_of(node) is aten.linear.default else max(b.dim() - 2, 0)
    return a.dim() - 1 in axes_of(left, symbol) or inner in axes_of(right, symbol)
