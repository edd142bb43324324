"""Structural identity of graph regions: two regions with one key compute the same function of their inputs.

The layers of a model repeat one attention many times. Their proofs would run the same numbers through the same ops,
so a proof is done once per structure and its result shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import expression, get_attribute, is_symbolic, value_of


class RegionKeys:
    """Numbers regions by structure: ops, constants, symbolic sizes and the very tensors and inputs they read."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self._numbers: dict[Any, int] = {}

    def key(self, outputs: Iterable[Node], inputs: Iterable[Node]) -> tuple[int, ...]:
        """The key of the region between ``inputs`` (in order; only their shapes and dtypes count) and ``outputs``."""
        known: dict[Node, int] = {}
        for index, node in enumerate(inputs):
            value = value_of(node)
            shape = tuple(str(expression(dim)) for dim in value.shape)
            known[node] = self._number(("input", index, shape, str(value.dtype)))
        return tuple(self._visit(node, known) for node in outputs)

    def _number(self, structure: Any) -> int:
        return self._numbers.setdefault(structure, len(self._numbers))

    def _visit(self, root: Node, known: dict[Node, int]) -> int:
        pending = [root]
        while pending:
            node = pending[-1]
            if node in known:
                pending.pop()
                continue
            missing = (
                [] if is_symbolic(value_of(node)) else [item for item in node.all_input_nodes if item not in known]
            )
            if missing:
                pending.extend(missing)
                continue
            known[node] = self._number(self._structure(node, known))
            pending.pop()
        return known[root]

    def _structure(self, node: Node, known: Mapping[Node, int]) -> Any:
        if is_symbolic(value_of(node)):
            return ("size", str(value_of(node).node.expr))
        if node.op == "get_attr":
            value = get_attribute(self.module, str(node.target))
            return ("tensor", id(value)) if isinstance(value, Tensor) else ("attribute", str(node.target))
        if node.op == "placeholder":
            return ("placeholder", node.name)
        return (
            node.op,
            str(node.target),
            self._argument(node.args, known),
            self._argument(tuple(sorted(node.kwargs.items())), known),
        )

    def _argument(self, value: Any, known: Mapping[Node, int]) -> Any:
        if isinstance(value, Node):
            return ("node", known[value])
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item, known) for item in value)
        if is_symbolic(value):
            return ("size", str(value.node.expr))
        return (type(value).__name__, str(value))
