"""Capture: dynamic axes survive, parameters are the module's own, and failures say what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.passes.capture import capture
from lincompile.passes.errors import CaptureError
from lincompile.passes.graph import symbols_in, tensor_of


class Small(nn.Module):
    """A causal attention over features, with something that export meets on the way."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(16, 48), nn.Dropout(0.5)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(self.change(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(y.transpose(1, 2).flatten(2))


def test_axes_stay_dynamic_even_from_an_example_of_length_one() -> None:
    module = Small().eval()
    program = capture(module, torch.randn(1, 1, 16))
    assert program.inputs[0].axes == {0: "batch", 1: "sequence"} and program.inputs[0].role == "features"
    assert len(symbols_in(tensor_of(program.placeholder("x")))) == 2
    for shape in ((1, 1, 16), (5, 1, 16), (1, 30, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), module(x))


def test_the_module_is_left_as_it_was_and_shares_its_parameters() -> None:
    module = Small().train()
    program = capture(module, {"x": torch.randn(2, 5, 16)})
    assert module.training and module.drop.training
    assert dict(program.graph_module.named_parameters())["qkv.weight"] is module.qkv.weight
    assert not any("dropout" in name and "True" in name for name in program.op_counts())
    program(torch.randn(2, 4, 16)).sum().backward()
    assert module.qkv.weight.grad is not None


def test_tied_parameters_count_once_and_the_graph_pickles() -> None:
    module, example = zoo.build("nanogpt")
    program = capture(module, example)
    assert program.parameters == sum(p.numel() for p in module.parameters())
    twin = pickle.loads(pickle.dumps(program.graph_module))
    torch.testing.assert_close(twin(example["idx"]), program.graph_module(example["idx"]))


def test_a_position_table_bounds_the_length() -> None:
    assert capture(*zoo.build("nanogpt-additive-buffer")).max_positions == zoo.BLOCK


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({}, "has no inputs"),
        ({"x": 3}, "'x' is int, not a tensor"),
        ([torch.zeros(2, 3, 16)] * 2, "takes 1 inputs, the example has 2"),
        ({"x": torch.zeros(2, 3, 5)}, "can't capture Small"),
    ],
)
def test_wrong_examples(example: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Small(), example)


def test_branching_on_values_is_an_error_that_says_so() -> None:
    with pytest.raises(CaptureError, match="doesn't branch on tensor values"):
        capture(Small(lambda x: x if x.sum() > 0 else -x), torch.randn(2, 5, 16))


class Branching(zoo.NanoGPT):
    """Another computation where a condition on the input's sizes holds."""

    def __init__(self, condition: Callable[[Tensor], bool]) -> None:
        super().__init__(layers=1)
        self.condition = condition

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.wte(idx)
        if self.condition(idx):
            x = x * 3
        return self.lm_head(self.h[0](x))


@pytest.mark.parametrize(
    "condition",
    [
        lambda idx: idx.shape[1] < 6,
        lambda idx: idx.shape[1] % 2 == 1,
        lambda idx: idx.shape[0] > 4,
        lambda idx: idx.numel() > 100,
        lambda idx: idx.shape[0] > idx.shape[1],
    ],
)
def test_branches_on_sizes_are_refused(condition: Callable[[Tensor], bool]) -> None:
    with pytest.raises(CaptureError, match="takes another path at other sizes: what was traced holds only where"):
        capture(Branching(condition), {"idx": zoo.tokens()})


def test_a_longest_sequence_is_no_branch() -> None:
    assert capture(Branching(lambda idx: idx.shape[1] > 64), {"idx": zoo.tokens()}).max_positions == 64
