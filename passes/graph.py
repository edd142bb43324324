"""Helpers shared by every pass: reading FX nodes, building new ones with fake values, and where a node came from."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

from .errors import PassError

aten = torch.ops.aten
INT_MAX = 9223372036854775807
SymTypes = (torch.SymInt, torch.SymFloat, torch.SymBool)

# Ops whose tensor argument only lends its shape, dtype and device: the value is not read.
SHAPE_ONLY = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.sym_size.int,
    }
)

# Ops whose result shares memory with their first argument (some copy at times; counting those too is safe).
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.split.Tensor,
        aten.chunk.default,
        operator.getitem,
        aten.detach.default,
        aten.alias.default,
        aten.t.default,
        aten.numpy_T.default,
        aten.unflatten.int,
        aten.flatten.using_ints,
        aten.narrow.default,
        aten.diagonal.default,
        aten._unsafe_view.default,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.expand_as.default,
        aten.view_as.default,
        aten.squeeze.default,
        aten.dropout.default,
        aten.type_as.default,
        aten.to.other,
    }
)


def is_view(node: object) -> bool:
    """Whether an op's result may share memory with its first argument."""
    target = target_of(node)
    schema = getattr(target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    return target in VIEWS or any(item.alias_info is not None and not item.alias_info.is_write for item in returns)


def target_of(node: object) -> Any:
    """The op of a ``call_function`` node, None for anything else."""
    return node.target if isinstance(node, Node) and node.op == "call_function" else None


def value_of(node: Any) -> Any:
    """The fake value recorded at capture (tensor, SymInt …), None where there is none."""
    return node.meta.get("val") if isinstance(node, Node) else None


def tensor_of(node: Any) -> Tensor:
    """The fake tensor of a node known to produce one."""
    value = value_of(node)
    assert isinstance(value, Tensor), f"{node} carries no tensor value"
    return value


def is_symbolic(value: object) -> bool:
    """Whether a value is a symbolic size, truth value or float."""
    return isinstance(value, SymTypes)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Argument ``name`` of a node, whether it was written by position or by keyword."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def on_device(arguments: Any, device: torch.device) -> Any:
    """Arguments of a node, nested as they are, with every device among them exchanged for ``device``."""
    return torch.fx.node.map_aggregate(arguments, lambda item: device if isinstance(item, torch.device) else item)


def get_attribute(module: nn.Module, path: str) -> Any:
    """The attribute of a module under a dotted path."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def parent_of(module: nn.Module, path: str, create: bool = False) -> tuple[nn.Module, str]:
    """The submodule that holds ``path`` and the last name; makes empty submodules on the way when asked."""
    *parents, leaf = path.split(".")
    for part in parents:
        if create and not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module, leaf


def set_tensor(module: nn.Module, path: str, value: Tensor, persistent: bool = True) -> None:
    """Registers a parameter or buffer under a dotted path, creating the submodules it needs."""
    parent, leaf = parent_of(module, path, create=True)
    if isinstance(value, nn.Parameter):
        parent.register_parameter(leaf, value)
    else:
        parent.register_buffer(leaf, value, persistent=persistent)


def symbols_in(value: Any) -> frozenset[str]:
    """Names of the free size symbols of a SymInt (or of a tensor's shape)."""
    if isinstance(value, Tensor):
        return frozenset().union(*(symbols_in(dim) for dim in value.shape)) if value.dim() else frozenset()
    if is_symbolic(value):
        return frozenset(str(symbol) for symbol in value.node.expr.free_symbols)
    return frozenset()


def expression(dim: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression."""
    return dim.node.expr if isinstance(dim, torch.SymInt) else sympy.Integer(dim)


def same_dim(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal as expressions (no guard is added, unlike ``a == b``)."""
    difference = expression(a) - expression(b)
    return bool(difference == 0 if difference.is_Integer or difference.is_Symbol else sympy.simplify(difference) == 0)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module a node was traced in ('' for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for value in stack.values():
        path = value[0] if isinstance(value, tuple) else str(value)
    path = re.sub(r"^L\['self'\]\.?", "", path)
    return re.sub(
        r"\._modules\['([^']+)'\]|\['?([^'\]]+)'?\]", lambda m: "." + (m.group(1) or m.group(2)), path
    ).lstrip(".")


def source_line(node: Node) -> str:
    """'file:line' of the innermost user frame that made the node, '' when the trace kept none."""
    file, line, _ = innermost_frame(node)
    return f"{file}:{line}" if file else ""


def innermost_frame(node: Node) -> tuple[str, str, str]:
    """(file, line number, code) of the innermost user frame that made the node; empty where the trace kept none."""
    frames = re.findall(r'File "([^"<]+)", line (\d+), in \S+[ \t]*\n?[ \t]*(.*)', node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if "torch/fx/" not in frame[0]]
    return frames[-1] if frames else ("", "", "")


def copy_origin(source: Node, destination: Node) -> None:
    """Lets a new node say that it comes from where another one came from."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in source.meta:
            destination.meta[key] = source.meta[key]


class Builder:
    """Inserts nodes before ``anchor`` and keeps ``meta['val']`` of each one true.

    Calling it with an op and arguments returns the new node; the fake value is computed in the graph's own
    fake mode, so symbolic sizes stay symbolic.
    """

    def __init__(self, graph_module: GraphModule, anchor: Node) -> None:
        self.graph_module = graph_module
        self.anchor = anchor
        self.fake_mode = fake_mode_of(graph_module)

    def insert(self, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Node:
        """Inserts a call whose fake value is already known (computing it costs milliseconds a node)."""
        with self.graph_module.graph.inserting_before(self.anchor):
            node = self.graph_module.graph.call_function(op, args, kwargs)
        node.meta["val"] = value
        copy_origin(self.anchor, node)
        return node

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), value_of)
        return self.insert(op, args, kwargs, fake_value(self.fake_mode, op, fake_args, fake_kwargs))

    def attribute(self, path: str, value: Tensor, fake: Any = None) -> Node:
        """A ``get_attr`` node for a tensor registered on the graph module under ``path``."""
        with self.graph_module.graph.inserting_before(self.anchor):
            node = self.graph_module.graph.create_node("get_attr", path)
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True) if fake is None else fake
        copy_origin(self.anchor, node)
        return node

    def item(self, node: Node, index: int) -> Node:
        return self(operator.getitem, node, index)


def fake_value(mode: Any, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What an op gives for fake values, its symbolic sizes still symbolic.

    Composite ops are decomposed in Python, as torch.export does: the C++ ones ask for sizes as ints (``matmul`` of
    torch 2.11), which ties a symbol to the example's size, in all of the graph and without a word.

    Raises:
        PassError: the op tied a symbol to a number nevertheless.
    """
    environment = mode.shape_env
    before = set() if environment is None else _fixed_symbols(environment)
    with mode, enable_python_dispatcher():
        value = op(*args, **kwargs)
    if environment is not None and (fixed := _fixed_symbols(environment) - before):
        raise PassError(
            f"{op} made {', '.join(sorted(fixed))}, a free size of the graph, a fixed one: this version of torch can't "
            "rewrite the graph for all sizes; use another one (2.11 to 2.13 are tested)"
        )
    return value


def _fixed_symbols(environment: Any) -> set[str]:
    """Sizes that a shape environment knows to be one number."""
    return {str(symbol) for symbol, value in environment.replacements.items() if value.is_Integer}


def uncached_fakes() -> AbstractContextManager[Any]:
    """Exports made inside don't cache fake tensors: with dynamic sizes that costs a third to a half of their time."""
    from torch._dynamo import config  # more than a second, which a refused option need not wait for

    patched: AbstractContextManager[Any] = config.patch(fake_tensor_cache_enabled=False)
    return patched


def fake_mode_of(graph_module: GraphModule) -> Any:
    """The fake mode (and shape environment) the graph was captured in."""
    for node in graph_module.graph.nodes:
        mode = getattr(value_of(node), "fake_mode", None)  # detect_fake_mode prefers that of a running torch.compile
        if mode is not None:
            return mode
    raise PassError("the graph carries no fake values: capture the model with lincompile.capture first")


def walk_up(node: Node, stop: frozenset[Node] | set[Node] = frozenset()) -> Iterator[Node]:
    """Every ancestor of ``node`` (itself included), each once, not going past ``stop``."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if current not in stop:
            pending.extend(value_inputs(current))


def value_inputs(node: Node) -> list[Node]:
    """Inputs whose *values* the node reads (a shape-only argument is not one, nor is the base of a size)."""
    if node.op != "placeholder" and is_symbolic(value_of(node)):
        return []
    inputs = node.all_input_nodes
    if node.op == "call_function" and node.target in SHAPE_ONLY and node.args and isinstance(node.args[0], Node):
        rest = torch.fx.node.map_arg
        others: list[Node] = []
        rest((node.args[1:], node.kwargs), others.append)
        return others
    return list(inputs)


def redirect(node: Node, new: Node) -> None:
    """Makes every reader of ``node`` read ``new`` instead, but for ``new`` itself (which may be computed from it)."""

    def others(user: Node) -> bool:
        return user is not new

    node.replace_all_uses_with(new, delete_user_cb=others)


def finish(graph_module: GraphModule) -> None:
    """Removes dead nodes, checks the graph's structure and regenerates its code."""
    graph: Graph = graph_module.graph
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


def is_mutation(node: Node) -> bool:
    """Whether the op writes into one of its arguments."""
    schema = getattr(target_of(node), "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def storage_root(node: Node) -> Node:
    """The node whose memory ``node`` may share: itself, or what it is a view of."""
    while (
        node.op == "call_function"
        and node.args
        and isinstance(node.args[0], Node)
        and (is_view(node) or is_mutation(node))
    ):
        node = node.args[0]
    return node


def written_nodes(graph_module: GraphModule) -> set[Node]:
    """Nodes whose memory an op writes into after they were made: their values depend on when they are read."""
    roots = {node: storage_root(node) for node in graph_module.graph.nodes}
    written = {roots[node] for node in graph_module.graph.nodes if is_mutation(node)}
    return {node for node, root in roots.items() if root in written}


def order_of(graph_module: GraphModule) -> dict[Node, int]:
    """Each node's position in the graph."""
    return {node: index for index, node in enumerate(graph_module.graph.nodes)}
