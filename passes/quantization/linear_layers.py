"""Finds the linear layers of a captured graph, however they are spelled, and says why one must be left alone.

Read as linears: ``aten.linear``, ``addmm`` (GPT-2's ``Conv1D`` stores ``[K, N]``), ``mm``, ``matmul`` and ``bmm`` whose
second operand is a parameter, straight or through transposes, casts and broadcasts. A parameter is one layer however
many calls read it (tied weights). An ``einsum`` with a parameter is listed, and left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import LincompileError
from ..graph import argument, aten, get_attribute, target_of, tensor_of, value_of

METHOD_PREFIX = "lincompile_attention."  # parameters of the attention methods: small, and they stay trainable
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "cls", "predictions.decoder")

_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default}
_SAME_MATRIX = {
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
}
_PARTS = {
    operator.getitem,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}
_PRODUCTS = {aten.mm.default, aten.matmul.default, aten.bmm.default}


@dataclass
class Call:
    """One use of a layer. Operands are read from the node when asked: rewriting an earlier layer may replace them."""

    node: Node
    stored_transposed: bool  # the parameter is [K, N]
    partial: bool  # the weight is a slice of the parameter

    @property
    def x(self) -> Node:
        return self.node.args[1 if self.is_addmm else 0]  # type: ignore[return-value]

    @property
    def bias(self) -> Node | None:
        if target_of(self.node) in _PRODUCTS:
            return None
        return self.node.args[0] if self.is_addmm else argument(self.node, 2, "bias")  # type: ignore[return-value]

    @property
    def is_addmm(self) -> bool:
        return target_of(self.node) is aten.addmm.default


@dataclass
class LinearLayer:
    """A linear layer of a graph. ``reason`` is why it can't or shouldn't be quantized (None = it can).

    ``name`` is the layer's dotted path, ``weight`` its parameter's, ``matrix`` (a view) the ``[N, K]`` float weight.
    ``exclusive``: it has one call, and nothing else reads its parameter or any part of it alone, nor its bias.
    """

    name: str
    weight: str
    out_features: int
    in_features: int
    stored_transposed: bool
    calls: list[Call] = field(default_factory=list)
    reason: str | None = None
    exclusive: bool = False

    def matrix(self, module: nn.Module) -> Tensor:
        """The float weight as ``[out_features, in_features]``, without a copy."""
        value: Tensor = get_attribute(module, self.weight).detach()
        return value.t() if self.stored_transposed else value

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def find_linears(
    graph_module: GraphModule,
    *,
    lm_head: bool = False,
    skip: Sequence[str] = (),
    min_in_features: int = 32,
    lookups: Collection[Node] = (),
) -> list[LinearLayer]:
    """Every linear layer in graph order, with ``reason`` set on those to be left in float.

    Args:
        graph_module: a captured graph (nodes carry ``meta['val']``).
        lm_head: also quantize the output head, unless its weight is tied to something that needs it in float.
        skip: ``fnmatch`` patterns of layer names to leave in float.
        min_in_features: below it the scales cost more than they save.
        lookups: embedding calls whose table is packed, too: they need no float weight, and a head tied to one goes
            along.

    Raises:
        LincompileError: a layer's weights hold NaN or infinity, or a ``skip`` pattern matches no layer.
    """
    layers: dict[int, LinearLayer] = {}
    for node in graph_module.graph.nodes:
        found = _read(node)
        if found is None:
            continue
        call, root = found
        parameter = get_attribute(graph_module, str(root.target))
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            continue
        if id(parameter) not in layers:
            layers[id(parameter)] = _layer(parameter, str(root.target), call)
        layer = layers[id(parameter)]
        layer.calls.append(call)
        if layer.stored_transposed != call.stored_transposed:
            layer.reason = "the same parameter is used both straight and transposed"
        layer.reason = layer.reason or _why_not(call, parameter, layer)
    result = [*layers.values(), *_einsums(graph_module, layers)]
    used = {pattern for pattern in skip if any(fnmatch(layer.name, pattern) for layer in result)}
    if unused := [pattern for pattern in skip if pattern not in used]:
        raise LincompileError(f"quantize: skip pattern '{unused[0]}' matches no linear layer; {_names(result)}")
    readers = readers_of(graph_module)
    tables = token_tables(graph_module)
    nodes = {call.node for layer in result for call in layer.calls}
    for layer in result:
        parameter = get_attribute(graph_module, layer.weight)
        own = {call.node for call in layer.calls}
        shared = [reader for reader in readers.get(id(parameter), []) if reader not in own]
        others = [reader for reader in shared if reader not in lookups]
        layer.exclusive = not shared and _one_plain_call(graph_module, layer, readers)
        stays = not lm_head and len(shared) == len(others) and _is_head(layer, tables, nodes)
        layer.reason = layer.reason or _policy(layer, others, stays, skip, min_in_features)
        if layer.reason is None and parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise LincompileError(
                f"quantize: the weights of '{layer.name}' ({layer.weight}) hold NaN or infinity; repair the model, or"
                f" leave the layer in float with skip='{layer.name}'"
            )
    return result


def _names(layers: list[LinearLayer]) -> str:
    shown = ", ".join(layer.name for layer in layers[:8])
    return f"layers are {shown}{' …' if len(layers) > 8 else ''}" if layers else "the model has none"


def _layer(parameter: Tensor, path: str, call: Call) -> LinearLayer:
    name = path.removesuffix(".weight")
    if parameter.dim() != 2:
        reason = f"its weight has {parameter.dim()} axes {list(parameter.shape)}, not two"
        return LinearLayer(name, path, 0, 0, call.stored_transposed, reason=reason)
    rows, columns = parameter.shape
    shape = (columns, rows) if call.stored_transposed else (rows, columns)
    return LinearLayer(name, path, *shape, call.stored_transposed)


def _einsums(graph_module: GraphModule, linear: Collection[int]) -> list[LinearLayer]:
    """The parameters of two or more axes that einsums read and none of the linear layers (by ``id``) does."""
    found: dict[int, LinearLayer] = {}
    for node in graph_module.graph.nodes:
        if target_of(node) is not aten.einsum.default:
            continue
        for operand in node.args[1]:
            if (root := _root(operand)) is None:
                continue
            path = str(root[0].target)
            parameter = get_attribute(graph_module, path)
            if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2 and id(parameter) not in linear:
                rows, columns = parameter.shape if parameter.dim() == 2 else (0, 0)
                layer = LinearLayer(path.removesuffix(".weight"), path, rows, columns, False)
                layer.reason = _policy(layer, [], False, (), 0) or f"it is read by an einsum ({node.args[0]})"
                found.setdefault(id(parameter), layer)
    return list(found.values())


def _read(node: Node) -> tuple[Call, Node] | None:
    """The node as ``x @ Wᵀ + bias`` with a parameter W, or None."""
    target = target_of(node)
    if target is not aten.linear.default and target is not aten.addmm.default and target not in _PRODUCTS:
        return None
    root = _root(node.args[2 if target is aten.addmm.default else 1])
    if root is None:
        return None
    origin, transposed, partial = root
    call = Call(node, transposed != (target is not aten.linear.default), partial)
    if not isinstance(call.x, Node) or tensor_of(call.x).dim() != tensor_of(node).dim():
        return None  # a weight of more axes than x makes a batch of products
    return call, origin


def _root(node: object) -> tuple[Node, bool, bool] | None:
    """The attribute a weight operand comes from; was it transposed an odd number of times; is it only a part of it."""
    transposed = partial = False
    while isinstance(node, Node) and node.op != "get_attr":
        target = target_of(node)
        if target in _TRANSPOSES or _swaps_last_two(node):
            transposed = not transposed
        elif target in _PARTS:
            partial = True
        elif target not in _SAME_MATRIX and not _keeps_matrix(node):
            return None
        node = node.args[0]
    return (node, transposed, partial) if isinstance(node, Node) else None


def _keeps_matrix(node: Node) -> bool:
    """A matrix repeated along a batch, or not at all: its own axes are the parameter's."""
    if target_of(node) is not aten.expand.default:
        return False
    return tensor_of(node).shape[-2:] == tensor_of(node.args[0]).shape[-2:]


def _swaps_last_two(node: Node) -> bool:
    rank = tensor_of(node).dim() if isinstance(value_of(node), Tensor) else 0
    if target_of(node) is aten.transpose.int:
        axes = {argument(node, 1, "dim0") % rank, argument(node, 2, "dim1") % rank}
        return axes == {rank - 2, rank - 1}
    if target_of(node) is aten.permute.default:
        order = [axis % rank for axis in argument(node, 1, "dims")]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return False


def _why_not(call: Call, parameter: Tensor, layer: LinearLayer) -> str | None:
    if call.partial:
        return "its weight is a slice of a larger parameter"
    if call.is_addmm:
        scales = {name: value for name, value in call.node.kwargs.items() if value != 1}
        if scales:
            return f"addmm with {', '.join(f'{k}={v}' for k, v in scales.items())}"
    if call.bias is not None:
        shape = tuple(tensor_of(call.bias).shape)
        if shape != (layer.out_features,):
            return f"its bias has shape {list(shape)}, not [{layer.out_features}]"
    if not tensor_of(call.x).is_floating_point() or not tensor_of(call.node).is_floating_point():
        return "its input isn't floating point"
    return None


def _policy(
    layer: LinearLayer, others: list[Node], head: bool, skip: Sequence[str], min_in_features: int
) -> str | None:
    if (layer.name + ".").startswith(METHOD_PREFIX):
        return "parameter of an attention method (small, stays trainable)"
    if any(fnmatch(layer.name, pattern) for pattern in skip):
        return "left in float as asked (skip)"
    if others:
        kinds = ", ".join(sorted({str(node.target).removeprefix("aten.").split(".")[0] for node in others}))
        return f"its weight is tied: also read by {kinds}, which needs it in float"
    if head:
        return "output head (lm_head=True includes it)"
    if layer.in_features < min_in_features:
        return f"K = {layer.in_features} is below {min_in_features}: scales would cost more than they save"
    return None


def _one_plain_call(graph_module: GraphModule, layer: LinearLayer, readers: dict[int, list[Node]]) -> bool:
    if len(layer.calls) != 1 or layer.calls[0].partial or not layer.weights or layer.calls[0].node.kwargs:
        return False
    bias = layer.calls[0].bias
    if bias is None:
        return True
    if bias.op != "get_attr":
        return False
    tensor = get_attribute(graph_module, str(bias.target))
    return isinstance(tensor, nn.Parameter) and readers.get(id(tensor)) == [layer.calls[0].node]


def readers_of(graph_module: GraphModule) -> dict[int, list[Node]]:
    """For each attribute tensor, the nodes that read it, seen through transposes and casts."""
    readers: dict[int, list[Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        found = readers.setdefault(id(get_attribute(graph_module, str(node.target))), [])
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if target_of(user) in _TRANSPOSES | _SAME_MATRIX or _swaps_last_two(user) or _keeps_matrix(user):
                pending.extend(user.users)
            else:
                found.append(user)
    return readers


def token_tables(graph_module: GraphModule) -> set[int]:
    """Rows of the embedding tables read with an input of the graph: the vocabulary sizes."""
    rows = set()
    for node in graph_module.graph.nodes:
        if target_of(node) is aten.embedding.default:
            origin = index_origin(node)
            if origin is not None and origin.op == "placeholder":
                rows.add(int(tensor_of(node.args[0]).shape[0]))
    return rows


def index_origin(lookup: Node) -> Node | None:
    """The node that an embedding's indices come from, through casts and layouts: an input of the graph, if any."""
    ids = lookup.args[1]
    while isinstance(ids, Node) and isinstance(value_of(ids), Tensor) and ids.op != "placeholder" and ids.args:
        ids = ids.args[0]
    return ids if isinstance(ids, Node) else None


def _is_head(layer: LinearLayer, tables: set[int], linear_nodes: set[Node]) -> bool:
    """Named like an output head, or as wide as the vocabulary with no linear layer after it."""
    if any(layer.name == name or layer.name.endswith("." + name) for name in HEAD_NAMES):
        return True
    if layer.out_features not in tables:
        return False
    pending, seen = [call.node for call in layer.calls], set()
    while pending:
        for user in pending.pop().users:
            if user in linear_nodes:
                return False
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return True
