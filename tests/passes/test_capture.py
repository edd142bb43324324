"""Capture: dynamic axes survive, parameters are the module's own, and failures say what to do."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.passes.capture import capture
from lincompile.passes.capture_check import _rounded
from lincompile.passes.errors import CaptureError, LincompileError
from lincompile.passes.graph import symbols_in, tensor_of
from lincompile.passes.pipeline import Pipeline


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
        lambda idx: idx.shape[1] == 37,
        lambda idx: idx.shape[1] % 11 == 0,
        lambda idx: idx.shape[0] == 5,
    ],
)
def test_branches_on_sizes_are_refused(condition: Callable[[Tensor], bool]) -> None:
    with pytest.raises(CaptureError, match="takes another path at other sizes: what was traced holds only where"):
        capture(Branching(condition), {"idx": zoo.tokens()})


@pytest.mark.parametrize(
    ("condition", "what"),
    [(lambda idx: idx.shape[0] == 1, "a batch of 1"), (lambda idx: idx.shape[1] == 1, "sequences of 1 token")],
)
def test_branches_on_a_size_of_one_are_refused(condition: Callable[[Tensor], bool], what: str) -> None:
    with pytest.raises(CaptureError, match=f"takes another path for {what}: the traced one differs there"):
        capture(Branching(condition), {"idx": zoo.tokens()})


class OtherKernel(nn.Module):
    """Layers of attention that for a batch of one compute it step by step, and ``extra`` times too much of it."""

    def __init__(self, layers: int, extra: float) -> None:
        super().__init__()
        self.layers, self.extra = nn.ModuleList(nn.Linear(32, 96) for _ in range(layers)), extra

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (
                part.unflatten(2, (2, 16)).transpose(1, 2)
                for part in layer(nn.functional.normalize(x, dim=-1) * 8).chunk(3, -1)
            )
            if x.shape[0] == 1:
                scores = (q @ k.mT / 4).masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -torch.inf)
                mixed = scores.softmax(-1) @ v * (1 + self.extra)
            else:
                mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2)
        return x


def test_another_kernel_for_a_batch_of_one_is_no_other_path() -> None:
    """In bfloat16 kernels round differently, and that grows with depth; what is wrong is more than that."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32)
    assert not capture(OtherKernel(12, 0.0), {"x": x}).notes
    program = capture(OtherKernel(12, 0.0).bfloat16(), {"x": x.bfloat16()})
    assert [note for note in program.notes if re.search(r"at \[1, 9, 32\] model and program differ by \d\.\d%", note)]
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(CaptureError, match="takes another path for a batch of 1"):
            capture(OtherKernel(12, 0.05).to(dtype), {"x": x.to(dtype)})


def test_one_wrong_token_and_a_nan_are_more_than_rounding() -> None:
    torch.manual_seed(0)
    plain, again = torch.randn(1, 1000, 32), torch.randn(1, 1000, 32)
    noisy = plain + 0.02 * again
    assert _rounded(plain, plain + 0.02 * torch.randn_like(plain), noisy, noisy) == pytest.approx(0.02, rel=0.1)
    for index, value in ((-1, 1.0), (0, torch.nan), (5, torch.inf)):
        wrong = plain + 0.02 * torch.randn_like(plain)
        wrong[0, index] += value
        assert _rounded(plain, wrong, noisy, wrong + 0.02 * again) is None
    zero = torch.zeros(1, 3, 4)
    assert _rounded(zero, zero.masked_fill(torch.tensor([True, False, False, False]), torch.nan), zero, zero) is None
    assert _rounded(zero, zero, zero, zero) == 0.0


def test_a_longest_sequence_is_no_branch_but_the_program_ends_there() -> None:
    program = capture(Branching(lambda idx: idx.shape[1] > 64), {"idx": zoo.tokens()})
    assert program.max_positions == 64
    assert program(torch.ones(1, 64, dtype=torch.long)).shape[1] == 64
    with pytest.raises(LincompileError, match=r"holds only where idx\.shape\[1\] <= 64$"):
        program.clone()(torch.ones(1, 65, dtype=torch.long))


def test_a_far_branch_is_noted_and_refused_at_run_time() -> None:
    program = capture(Branching(lambda idx: idx.shape[1] == 5000), {"idx": zoo.tokens()})
    assert any("holds only where idx.shape[1] != 5000" in note for note in program.notes)
    with pytest.raises(LincompileError, match="take another path of the model"):
        program(torch.ones(1, 5000, dtype=torch.long))


def test_a_length_that_the_model_fixes_holds_at_run_time() -> None:
    program = capture(Small(lambda x: x * torch.tensor(float(x.shape[1]))).eval(), torch.randn(2, 5, 16))
    assert "fixes its sequence axis" in program.notes[0]
    with pytest.raises(LincompileError, match="'x' has 6 along axis 1; the program was captured for 5"):
        program(torch.randn(2, 6, 16))


class Cross(nn.Module):
    """Queries and keys from two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None], is_causal=True)


def test_inputs_captured_with_one_length_keep_it() -> None:
    program = capture(Cross(), {"x": torch.randn(2, 5, 16), "y": torch.randn(2, 5, 16)})
    with pytest.raises(LincompileError, match="'y' has 7 along axis 1 and 'x' 4 along axis 1; the example"):
        program(torch.randn(2, 4, 16), torch.randn(2, 7, 16))
    program = capture(Cross(), {"x": torch.randn(2, 5, 16), "y": torch.randn(2, 6, 16)})
    assert program(torch.randn(2, 4, 16), torch.randn(2, 7, 16)).shape == (2, 1, 4, 16)


class Counting(nn.Module):
    """Counts its calls in a buffer and reads the count."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_buffers_that_the_model_writes_are_left_as_they_were() -> None:
    module = Counting()
    program = capture(module, torch.randn(2, 5, 16))
    assert module.calls == 0
    torch.testing.assert_close(program(torch.ones(1, 3, 16)), torch.ones(1, 3, 16))


def test_flex_attention_is_captured_with_trainable_weights() -> None:
    """On the CPU it has no backward and says so; the module itself keeps its gradients. The fourth head differs far."""
    from torch.nn.attention.flex_attention import flex_attention

    def three_causal(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i >= j) & ((h < 3) | (i - j < 6000)), s, -float("inf"))

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Any:
            q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            causal = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))
            return causal, flex_attention(q, k, v, score_mod=three_causal)

    module = Flex().eval()
    program = Pipeline("canonicalize,prove")(capture(module, torch.randn(2, 5, 16)))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert [(s.verdict, s.kind) for s in program.sites] == [("rewrite", "causal"), ("refuse", "per-head")]
    x = torch.randn(3, 30, 16)
    with torch.no_grad():
        for got, wanted in zip(program(x), module(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class Tenth(torch.autograd.Function):
    """The identity, with a tenth of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.1


class Whole(Tenth):
    """The identity, with its own gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()


def test_a_backward_of_its_own_is_noted_where_it_differs() -> None:
    (note,) = capture(Small(Tenth.apply).eval(), torch.randn(2, 5, 16)).notes
    assert note.startswith("the model's own backward (Tenth) isn't the gradient of its forward")
    assert not capture(Small(Whole.apply).eval(), torch.randn(2, 5, 16)).notes


class Mapped(nn.Module):
    """Attention mapped over batch and heads: export leaves calls that open and close the maps."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        out: Tensor = torch.vmap(torch.vmap(lambda a: (a @ a.transpose(-1, -2) * 0.5).softmax(-1) @ a))(heads)
        return out


def test_function_transforms_are_refused() -> None:
    where = r"a function transform \(torch\.vmap\) can't be compiled, at .*test_capture\.py:\d+: write the batched ops"
    with pytest.raises(CaptureError, match=where):
        capture(Mapped(), torch.randn(2, 5, 16))


class Strided(nn.Module):
    """Reads a weight's storage by its place, not by its shape."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.weight = nn.Embedding(8, 6), nn.Parameter(weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) + torch.as_strided(self.weight.detach(), (6,), (1,), 3)


def test_storage_read_behind_a_weights_shape_is_refused() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    values = torch.arange(24.0).reshape(6, 4)
    assert capture(Strided(values), tokens).graph_module
    for view in (values.t(), values[1:], values.view(-1)[:12].view(3, 4)):
        with pytest.raises(CaptureError, match=r"reads the storage of 'weight' by as_strided.*make it contiguous"):
            capture(Strided(view), tokens)


def test_one_tensor_for_two_inputs_is_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(50, 8), nn.Embedding(50, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.first(a) - self.second(b)

    same = torch.randint(0, 50, (2, 9))
    module = Two()
    program = capture(module, {"a": same, "b": same})
    torch.testing.assert_close(program(same, same.flip(1)), module(same, same.flip(1)))
