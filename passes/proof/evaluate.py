"""Evaluates a slice of a captured graph at chosen sizes, without running the model.

Size symbols are bound to integers, SymInt nodes become leaves read from their symbolic expression, and only the
nodes between the requested one and the given leaves are executed, in float32 on the CPU. A slice that reaches an
activation or a missing value raises ``Opaque``: the caller then knows the result depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from ..graph import SHAPE_ONLY, get_attribute, is_symbolic, value_inputs, value_of

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Opaque(Exception):
    """The slice needs a value that isn't a function of sizes and of the given leaves."""


@dataclass
class Sizes:
    """Integers for the graph's size symbols (``{"s0": 2, "s1": 7}``)."""

    binding: Mapping[str, int]
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def concrete(self, value: Any) -> Any:
        """A SymInt, SymFloat or SymBool as a plain number; anything else unchanged."""
        if not is_symbolic(value):
            return value
        expr = value.node.expr
        if expr not in self._cache:
            missing = {str(s) for s in expr.free_symbols} - set(self.binding)
            if missing:
                raise Opaque(f"reads the number {', '.join(sorted(missing))}, which no input's shape gives")
            self._cache[expr] = expr.subs({s: self.binding[str(s)] for s in expr.free_symbols})
        kind = int if isinstance(value, torch.SymInt) else bool if isinstance(value, torch.SymBool) else float
        return kind(self._cache[expr])

    def shape(self, tensor: Tensor) -> list[int]:
        return [self.concrete(dim) for dim in tensor.shape]


def float32_if_low(value: Any) -> Any:
    """A tensor or dtype of low precision as float32, anything else unchanged."""
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in LOW_PRECISION else value


def on_cpu(value: Any) -> Any:
    """The CPU for any device, anything else unchanged."""
    return torch.device("cpu") if isinstance(value, torch.device) else value


@dataclass
class Evaluation:
    """What one evaluation read: placeholders, parameters and buffers (by name)."""

    inputs: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)


def evaluate(
    graph_module: GraphModule,
    node: Node,
    sizes: Sizes,
    env: Mapping[Node, Any] | None = None,
    leaf: Callable[[Node], Any] | None = None,
    record: Evaluation | None = None,
    memo: dict[Node, Any] | None = None,
) -> Any:
    """The value of ``node`` at ``sizes``.

    Args:
        env: nodes whose values are given (the slice stops there).
        leaf: value for a placeholder, or None for "not to be read" (raises ``Opaque``).
        record: filled with the names of what was read.
        memo: pass a dict to keep intermediate values for a next call at the same sizes.

    Raises:
        Opaque: the slice reaches an activation, a data-dependent size, or a tensor without data (meta).
    """
    values: dict[Node, Any] = {} if memo is None else memo
    values.update(env or {})
    for current in _post_order(node, values):
        values[current] = _value(graph_module, current, sizes, values, leaf, record or Evaluation())
    return values[node]


def _post_order(node: Node, known: Mapping[Node, Any]) -> list[Node]:
    order: list[Node] = []
    if node in known:
        return order
    visited = {node}
    stack = [(node, iter(value_inputs(node)))]
    while stack:
        current, inputs = stack[-1]
        for child in inputs:
            if child not in visited and child not in known:
                visited.add(child)
                stack.append((child, iter(value_inputs(child))))
                break
        else:
            order.append(current)
            stack.pop()
    return order


def _value(
    graph_module: GraphModule,
    node: Node,
    sizes: Sizes,
    values: Mapping[Node, Any],
    leaf: Callable[[Node], Any] | None,
    record: Evaluation,
) -> Any:
    if node.op == "placeholder":
        record.inputs.add(node.name)
        given = leaf(node) if leaf else None
        if given is None:
            raise Opaque(f"reads the input '{node.name}'")
        return given
    if is_symbolic(value_of(node)):
        return sizes.concrete(value_of(node))
    if node.op == "get_attr":
        attribute = get_attribute(graph_module, str(node.target))
        if not isinstance(attribute, Tensor):
            return attribute
        if attribute.is_meta:
            raise Opaque(f"reads '{node.target}', which has no data (meta device)")
        (record.parameters if isinstance(attribute, torch.nn.Parameter) else record.buffers).add(str(node.target))
        return float32_if_low(attribute.cpu())
    if node.op != "call_function":
        raise Opaque(f"reads {node.op} '{node.target}'")
    return _call(node, sizes, values)


def _call(node: Node, sizes: Sizes, values: Mapping[Node, Any]) -> Any:
    lookup = lambda item: on_cpu(float32_if_low(values[item]))  # noqa: E731
    if node.target in SHAPE_ONLY and isinstance(node.args[0], Node) and isinstance(value_of(node.args[0]), Tensor):
        like = value_of(node.args[0])
        first: Any = torch.empty(sizes.shape(like), dtype=float32_if_low(like.dtype))
        args: tuple[Any, ...] = (first, *map_arg(node.args[1:], lookup))
    else:
        args = tuple(map_arg(node.args, lookup))
    kwargs = {key: on_cpu(float32_if_low(value)) for key, value in map_arg(node.kwargs, lookup).items()}
    args = tuple(on_cpu(float32_if_low(value)) for value in args)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])  # an in-place op must not change a memoised value
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except Opaque:
        raise
    except RuntimeError as error:  # a shape the model itself would reject at these sizes
        raise Opaque(f"can't be evaluated at {dict(sizes.binding)}: {str(error).splitlines()[0]}") from error
