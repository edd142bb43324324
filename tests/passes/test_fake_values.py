"""New nodes keep the graph's free sizes free, whichever torch computes their shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lincompile
from lincompile.passes.errors import PassError
from lincompile.passes.graph import Builder, aten, symbols_in, tensor_of, value_of


class Pair(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(k @ q.transpose(-1, -2), -2)


def captured() -> Any:
    return lincompile.capture(Pair(), {"q": torch.randn(2, 3, 11, 8), "k": torch.randn(2, 3, 11, 8)})


def test_a_product_of_two_nodes_leaves_their_sizes_free() -> None:
    """The C++ matmul of torch 2.11 asks for sizes as ints, which fixed batch and length to those of the example."""
    module = captured().graph_module
    softmax = next(node for node in module.graph.nodes if "softmax" in str(node.target))
    make = Builder(module, softmax)
    q, k = (node for node in module.graph.nodes if node.op == "placeholder")
    free = symbols_in(tensor_of(q))
    product = make(aten.matmul.default, q, make(aten.transpose.int, k, -1, -2))
    assert free and symbols_in(tensor_of(q)) == free and symbols_in(tensor_of(product)) <= free
    assert tensor_of(product).dim() == 4 and symbols_in(tensor_of(product))


def test_an_op_that_fixes_a_size_is_an_error() -> None:
    module = captured().graph_module
    output = next(node for node in module.graph.nodes if node.op == "output")
    q = next(node for node in module.graph.nodes if node.op == "placeholder")
    assert symbols_in(value_of(q))

    def greedy(x: Tensor) -> Tensor:
        return x[: sum(int(size) for size in x.shape)]

    with pytest.raises(PassError, match="a free size of the graph, a fixed one"):
        Builder(module, output)(greedy, q)
