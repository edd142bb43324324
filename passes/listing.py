"""A program's graph as text that people read: one line a node, sizes by name, and where each line was written."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from .graph import innermost_frame, is_symbolic, source_line, symbols_in, tensor_of, value_of
from .program import Program


def size_names(program: Program) -> dict[str, str]:
    """What to call each size symbol: ``B`` for the batch, ``T`` for the sequence, ``T1`` … for other sequences."""
    names: dict[str, str] = {}
    for item in program.inputs:
        value = value_of(program.placeholder(item.name))
        for axis, dim in enumerate(value.shape if isinstance(value, Tensor) else ()):
            free = symbols_in(dim)
            if len(free) == 1:
                role = item.axes.get(axis, f"axis{axis}")
                names.setdefault(next(iter(free)), role.replace("batch", "B").replace("sequence", "T"))
    return names


def size_text(dim: Any, names: Mapping[str, str]) -> str:
    """One size: a number, or its expression in named symbols (``4*T``)."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(dim))


def shape_text(value: Any, names: Mapping[str, str]) -> str:
    """``float32[B, 4, T, 8]`` for a tensor, ``(…, …)`` for several, the expression for a size."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(size_text(n, names) for n in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(shape_text(item, names) for item in value)})"
    return size_text(value, names) if is_symbolic(value) else type(value).__name__


def argument_text(value: Any, names: Mapping[str, str]) -> str:
    """An argument: a node by its name, anything else as it would be written."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(argument_text(item, names) for item in value)}]"
    if is_symbolic(value):
        return size_text(value, names)
    return f"{value:g}" if isinstance(value, float) else str(value) if not isinstance(value, str) else repr(value)


def node_line(node: Node, names: Mapping[str, str]) -> str:
    """``matmul: float32[B, 4, T, T] = aten.matmul(q, k)``."""
    kwargs = [f"{key}={argument_text(value, names)}" for key, value in node.kwargs.items()]
    arguments = ", ".join([*(argument_text(value, names) for value in node.args), *kwargs])
    if node.op == "output":
        return f"return {argument_text(node.args[0], names)}"
    shape = shape_text(value_of(node), names)
    if node.op == "placeholder":
        return f"{node.name}: {shape} = input"
    if node.op == "get_attr":
        return f"{node.name}: {shape} = self.{node.target}"
    if node.target is operator.getitem:
        return f"{node.name}: {shape} = {argument_text(node.args[0], names)}[{argument_text(node.args[1], names)}]"
    op = str(node.target).removesuffix(".default") if node.op == "call_function" else f"self.{node.target}"
    op = getattr(node.target, "__name__", op) if op.startswith("<") else op
    return f"{node.name}: {shape} = {op}({arguments})"


def listing(program: Program) -> list[str]:
    """The whole graph, one line a node."""
    names = size_names(program)
    return [node_line(node, names) for node in program.graph_module.graph.nodes]


def difference(before: Iterable[str], after: Iterable[str], context: int = 2) -> list[str]:
    """A unified diff of two listings, without file names: lines start with ``-``, ``+``, a space or ``@@``."""
    return list(difflib.unified_diff(list(before), list(after), lineterm="", n=context))[2:]


def source_of(node: Node) -> tuple[str, str]:
    """(``file:line``, the code written there) of the innermost frame that made a node; empty where unknown."""
    return source_line(node), innermost_frame(node)[2].strip()


def described(node: Node, names: Mapping[str, str]) -> str:
    """A node and its shape: ``transpose_1 [B, 4, T, 8]``."""
    return f"{node.name} [{', '.join(size_text(n, names) for n in tensor_of(node).shape)}]"
