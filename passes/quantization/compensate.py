"""Lets a layer make up for the rounding of those that make its inputs: ``down`` for ``gate`` and ``up``, ``o`` for v.

With rounded makers a layer reads ``h̃`` where the float model has ``h``. The part of the error ``W(h − h̃)`` that is
linear in ``h̃`` can be undone by other weights, before they are rounded (as GPTAQ does, arXiv 2504.02692):

    W' = W + Σ w W(h − h̃) h̃ᵀ · (Σ w h̃h̃ᵀ + λ)⁻¹

with token weights ``w`` as in :mod:`.weight_methods`. Everything before the makers is the float model's, so that one
forward pass per batch serves all layers. Nothing is added at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node, map_arg
from torch.nn import functional as F

from ..graph import aten, target_of
from ..program import Program
from .linear_layers import LinearLayer

_DAMPING = 1.0  # of the mean square input: a few thousand tokens say little about so many pairs of features
Visit = Callable[[LinearLayer, Tensor, Tensor], None]


@dataclass(frozen=True)
class Part:
    """``layer`` reads what ``makers`` make and nothing else reads: through the nodes ``between``."""

    layer: LinearLayer
    makers: tuple[LinearLayer, ...]
    between: frozenset[Node]


def find_parts(layers: Sequence[LinearLayer]) -> dict[str, Part]:
    """The layers that can make up for others, by name; ``layers`` are those to be rounded, in graph order.

    The outputs of a part's makers reach the model's outputs through its layer alone, so a residual stream is never
    inside one. No layer is the maker of one part and the layer of another: then one pass serves all parts.
    """
    by_call = {call.node: layer for layer in layers for call in layer.calls}
    order = {node: index for index, node in enumerate(layers[0].calls[0].node.graph.nodes)} if layers else {}
    parts: dict[str, Part] = {}
    for layer in layers:
        if len(layer.calls) != 1:
            continue
        inside: set[Node] = {layer.calls[0].node}
        makers: list[LinearLayer] = []
        candidates = {layer.calls[0].x}
        while candidates:  # the last first: whoever reads it has been decided on
            node = max(candidates, key=lambda candidate: order[candidate])
            candidates.remove(node)
            if node.op != "call_function" or not _readers(node) <= inside:
                continue
            if node not in by_call:
                inside.add(node)
                candidates |= set(node.all_input_nodes)
            elif len(by_call[node].calls) == 1:
                makers.append(by_call[node])
        if makers and not any(maker.name in parts for maker in makers):
            parts[layer.name] = Part(layer, tuple(makers), frozenset(inside - {layer.calls[0].node}))
    return parts


def _readers(node: Node) -> set[Node]:
    return {user for user in node.users if target_of(user) is not aten._assert_tensor_metadata.default}


def replay(program: Program, batch: Mapping[str, Tensor], parts: Sequence[Part], rounded: Mapping[str, Tensor],
           visit: Visit) -> None:  # fmt: skip
    """Run the float model on a batch; ``visit(layer, h, h̃)`` gets each part's two inputs ``[…, K]``.

    ``rounded``: the makers' dequantized weights ``[N, K]`` by layer name.
    """
    graph = program.graph_module.graph
    assert all(part.layer.calls[0].node.graph is graph for part in parts), "the layers are those of another graph"
    _Both(program, parts, rounded, visit).run(*(batch[item.name] for item in program.inputs))


class _Both(Interpreter):
    def __init__(self, program: Program, parts: Sequence[Part], rounded: Mapping[str, Tensor], visit: Visit) -> None:
        super().__init__(program.graph_module)
        self._makers = {maker.calls[0].node: maker for part in parts for maker in part.makers}
        self._between = {node for part in parts for node in part.between}
        self._parts = {part.layer.calls[0].node: part for part in parts}
        self._rounded, self._visit = rounded, visit
        self._other: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        if n in self._parts:
            part = self._parts[n]
            x = part.layer.calls[0].x
            self._visit(part.layer, self.env[x], self._other[x])
            for node in (*part.between, *(maker.calls[0].node for maker in part.makers)):
                self._other.pop(node, None)
        if n in self._makers:
            call, x = self._makers[n].calls[0], self.env[self._makers[n].calls[0].x]
            bias = None if call.bias is None else self.env[call.bias].to(x.dtype)
            self._other[n] = F.linear(x, self._rounded[self._makers[n].name].to(x.dtype), bias)
        elif n in self._between:
            args, kwargs = map_arg((n.args, n.kwargs), self._of)
            self._other[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return super().run_node(n)

    def _of(self, node: Node) -> Any:
        return self._other[node] if node in self._other else self.env[node]


def corrected(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The weights that make up for what ``cross`` says, float32 ``[N, K]``.

    Args:
        weight: float ``[N, K]``.
        moment: second moments of the inputs, ``[K, K]``, mean diagonal 1.
        cross: ``Σ w W(h − h̃) h̃ᵀ``, ``[N, K]``, on the scale of ``moment``.
    """
    matrix = moment.double() + _DAMPING * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    change = torch.cholesky_solve(cross.double().t(), torch.linalg.cholesky(matrix)).t()
    return weight.float() + change.float()


__all__ = ["Part", "corrected", "find_parts", "replay"]
