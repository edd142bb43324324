"""Every op under torch.library's own checks, torch.export with dynamic sizes, make_fx and FX interpretation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lincompile.kernels import ops


def tensors(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.rand(batch, 6, length, 4),
        "k": torch.rand(batch, 2, length, 4),
        "v": torch.randn(batch, 2, length, 3),
        "g": -torch.rand(batch, 2, length, 4),
        "beta": torch.rand(batch, 2, length),
        "state": torch.rand(batch, 2, 4, 4),
        "x": torch.randn(batch, length, 5),
        "weight": torch.randn(5, 4),
        "conv_state": torch.randn(batch, 5, 3),
        "k_cache": torch.rand(batch, 2, 3, 4),
        "v_cache": torch.rand(batch, 2, 3, 3),
        "mask": torch.ones(batch, length, dtype=torch.bool),
    }


def samples(t: dict[str, Tensor]) -> list[tuple[object, tuple[object, ...]]]:
    q, k, v, g, state = t["q"], t["k"], t["v"], t["g"], t["state"]
    return [
        (ops.linear_attention, (q, k, v, g, state, 0.5, True, True)),
        (ops.linear_attention, (q, k, v, g[..., :1], None, 0.5, True, False)),
        (ops.linear_attention, (q, k, v, None, None, 0.5, False, True)),
        (ops.gated_delta, (q, k, v, t["beta"], g[..., :1], state[..., :3], 0.5)),
        (ops.gated_delta, (q, k, v, t["beta"], None, None, 0.5)),
        (ops.short_conv, (t["x"], t["weight"], t["conv_state"])),
        (ops.short_conv, (t["x"], t["weight"], None)),
        (ops.softmax_attention, (q, k, v, t["mask"], "causal", 0, 0.5, 0.0)),
        (ops.softmax_attention, (q, k, v, None, "sliding", 2, 0.5, 3.0)),
        (ops.softmax_attention_step, (q, k, v, t["k_cache"], t["v_cache"], None, "causal", 0, 0.5, 0.0)),
    ]


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("length", [1, 6])
def test_opcheck(case: int, length: int) -> None:
    op, args = samples(tensors(length=length))[case]
    args = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    torch.library.opcheck(op, args)


class AllOps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        conv, conv_state = ops.short_conv(k.transpose(1, 2).flatten(2), self.weight.repeat(2, 1), None)
        k = conv.unflatten(2, (2, 4)).transpose(1, 2)
        k = k * mask[:, None, :, None]
        o, final = ops.linear_attention(q, k, v, g, state, 0.5, True, True)
        d, delta = ops.gated_delta(q, k, v, g[..., 0].exp(), g[..., :1], None, 0.5)
        s = ops.softmax_attention(q, k, v, mask, "causal", 0, 0.5, 0.0)
        return o + d + s, final, delta, conv_state


def all_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    t = tensors(batch, length)
    return t["q"], t["k"], t["v"], t["g"], t["state"], t["mask"]


def test_export_with_dynamic_sizes_then_one_token() -> None:
    module = AllOps()
    batch, length = Dim("batch"), Dim("length")
    tall = {0: batch, 2: length}
    program = torch.export.export(
        module, all_inputs(2, 6), dynamic_shapes=(tall, tall, tall, tall, {0: batch}, {0: batch, 1: length})
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert "lincompile.linear_attention.default" in names and "lincompile.gated_delta.default" in names
    for shape in [(1, 1), (1, 70), (3, 1), (2, 6)]:
        inputs = all_inputs(*shape)
        for have, want in zip(program.module()(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(have, want)
            assert torch.isfinite(have).all()


def test_step_export_grows_the_cache() -> None:
    class Step(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            return ops.softmax_attention_step(q, k, v, kc, vc, mask, "causal", 0, 0.5, 0.0)

    t = tensors(2, 6)
    batch, length, past = Dim("batch"), Dim("length"), Dim("past")
    new, old = {0: batch, 2: length}, {0: batch, 2: past}
    mask = torch.ones(2, 9, dtype=torch.bool)
    args = (t["q"], t["k"], t["v"], t["k_cache"], t["v_cache"], mask)
    program = torch.export.export(
        Step(), args, dynamic_shapes=(new, new, new, old, old, {0: batch, 1: Dim("seen")})
    ).module()
    t = tensors(1, 1)
    empty = t["k_cache"][:, :, :0], t["v_cache"][:, :, :0]
    o, k_cache, v_cache = program(t["q"], t["k"], t["v"], *empty, torch.ones(1, 1, dtype=torch.bool))
    assert o.shape == (1, 6, 1, 3) and k_cache.shape == (1, 2, 1, 4) and v_cache.shape == (1, 2, 1, 3)
    torch.testing.assert_close(o, t["v"].repeat_interleave(3, 1))


def test_make_fx_and_interpreter_keep_the_gradient() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    t = tensors()

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        o, state = torch.ops.lincompile.linear_attention(q, k, v, g, None, 0.5, True, True)
        return o.square().sum() + state.sum()

    inputs = (t["q"], t["k"], t["v"], t["g"])
    graph = make_fx(loss, tracing_mode="symbolic")(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.fx.Interpreter(graph).run(*leaves).backward()
    want = torch.autograd.grad(loss(*[x.requires_grad_() for x in inputs]), inputs)
    for leaf, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


def test_double_backward_is_refused() -> None:
    t = tensors()
    q = t["q"].requires_grad_()
    o, _ = ops.linear_attention(q, t["k"], t["v"], t["g"], None, 0.5, True, False)
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention_backward"):
        grad.sum().backward()


def test_importing_the_ops_needs_torch_only() -> None:
    code = (
        "import lincompile.kernels.ops, sys; "
        "bad = {m.split('.')[0] for m in sys.modules} & {'triton', 'onnx', 'onnxruntime', 'transformers'}; "
        "sys.exit(' '.join(sorted(bad)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiles_as_one_graph_with_gradients() -> None:
    module = AllOps()
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in all_inputs(2, 6)]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    leaves = [x for x in inputs if x.requires_grad]
    have = torch.autograd.grad(sum(x.square().sum() for x in compiled(*inputs)), leaves)
    want = torch.autograd.grad(sum(x.square().sum() for x in module(*inputs)), leaves)
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_does_not_reach_the_sums_inside_an_op() -> None:
    """Under autocast, matrix products in a float32 op were bfloat16, and softmax windows failed."""
    for op, arguments in samples(tensors()):
        plain = op(*arguments)  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            under = op(*arguments)  # type: ignore[operator]
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, under)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), op
