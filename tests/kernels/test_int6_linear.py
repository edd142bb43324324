"""Six-bit codes, planes and the op: exact storage, the definition, gradients, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lincompile.kernels.int6_linear import codes as q
from lincompile.kernels.int6_linear import op, pack, reference

# Whole groups, SmolLM2's 576 (a partial group of 64), 172 (a partial group of 44), ragged tails, less than a group.
WIDTHS = [128, 256, 576, 172, 131, 130, 129, 64, 7, 1]


def packed(rows: int, width: int, group_size: int = 128) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    weight = torch.randn(rows, width)
    values, scale = q.quantize_weight(weight, group_size)
    return q.dequantize(values, scale, group_size), (*pack.pack(values, group_size), scale)


@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 700),
    group=st.sampled_from([32, 64, 128, 256]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack_for_every_code(rows: int, width: int, group: int, seed: int) -> None:
    values = torch.randint(-32, 32, (rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    hi, lo = pack.pack(values, group)
    assert (hi.shape, lo.shape) == ((rows, -(-width // 2)), (rows, -(-width // 4)))
    assert torch.equal(pack.unpack(hi, lo, width, group), values)


def test_planes_follow_the_documented_order() -> None:
    """Every byte of a full and a ragged group, from the docstring's formulas and nothing else."""
    values = torch.randint(-32, 32, (3, 133)).to(torch.int8)
    hi, lo = pack.pack(values)
    for row in range(3):
        u = [int(c) + 32 for c in values[row]]
        for j in range(32):
            assert int(hi[row, j]) == u[j] >> 2 | (u[32 + j] >> 2) << 4
            assert int(hi[row, 32 + j]) == u[64 + j] >> 2 | (u[96 + j] >> 2) << 4
            assert int(lo[row, j]) == sum((u[32 * s + j] & 3) << 2 * s for s in range(4))
        tail = u[128:] + [0] * 3
        assert [int(b) for b in hi[row, 64:]] == [tail[2 * i] >> 2 | (tail[2 * i + 1] >> 2) << 4 for i in range(3)]
        assert [int(b) for b in lo[row, 32:]] == [
            sum((tail[4 * i + s] & 3) << 2 * s for s in range(4)) for i in range(2)
        ]


def test_unpack_reads_planes_that_are_not_word_aligned() -> None:
    values = torch.randint(-32, 32, (4, 576)).to(torch.int8)
    hi, lo = pack.pack(values)
    shifted = [torch.cat([torch.zeros(1, dtype=torch.uint8), t.flatten()])[1:].view(t.shape) for t in (hi, lo)]
    assert torch.equal(pack.unpack(*shifted, 576), values)


@pytest.mark.parametrize("bad", [-33, 32])
def test_pack_refuses_codes_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[-32, 31\]"):
        pack.pack(torch.tensor([[0, bad]], dtype=torch.int8))


def test_pack_and_unpack_refuse_wrong_types_and_widths() -> None:
    with pytest.raises(ValueError, match="int8"):
        pack.pack(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="multiple of 32"):
        pack.pack(torch.zeros(2, 8, dtype=torch.int8), group_size=48)
    hi, lo = pack.pack(torch.zeros(2, 128, dtype=torch.int8))
    with pytest.raises(ValueError, match="don't hold 130 codes"):
        pack.unpack(hi, lo, 130)


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_rounded_to_the_nearest_multiple_of_the_stored_scale(width: int) -> None:
    weight = torch.randn(6, width)
    values, scale = q.quantize_weight(weight)
    step = scale.float().repeat_interleave(128, dim=1)[:, :width]
    absmax = q.split_groups(weight, 128).abs().amax(-1)
    assert torch.equal(scale, (absmax / 31).to(torch.float16))
    assert values.abs().max() == 31
    # Half a step, plus what rounding the scale to float16 moves a full-scale code (31 codes of 2^-11 relative).
    assert bool(((q.dequantize(values, scale) - weight).abs() <= step * (0.5 + 31 * 2**-11)).all())


def test_dequantize_is_exact() -> None:
    values = torch.randint(-32, 32, (16, 300)).to(torch.int8)
    scale = (torch.rand(16, 3) * 1e-3).to(torch.float16)
    expected = values.double() * scale.double().repeat_interleave(128, dim=1)[:, :300]
    assert torch.equal(q.dequantize(values, scale).double(), expected)


def test_all_zero_groups_stay_exactly_zero() -> None:
    weight = torch.randn(4, 256)
    weight[:, 128:] = 0
    weight[2] = 0
    values, scale = q.quantize_weight(weight)
    assert torch.equal(scale[:, 1], torch.zeros(4, dtype=torch.float16)) and not values[2].any()
    assert torch.equal(q.dequantize(values, scale)[:, 128:], torch.zeros(4, 128))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.randn(4, 128)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"NaN or infinity \(first in row 3"):
        q.quantize_weight(weight)


def test_scales_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="exceeds float16"):
        q.quantize_weight(torch.full((1, 128), 3e6))


def test_scales_below_float16_are_refused_and_subnormal_ones_do_not_clip() -> None:
    for magnitude in (1e-7, 1e-30):
        weight = torch.randn(3, 128)
        weight[1] *= magnitude
        with pytest.raises(ValueError, match="row 1 is too small for float16 scales"):
            q.quantize_weight(weight)
    weight = torch.randn(64, 128) * 1e-5  # scales of about five float16 subnormal steps
    values, scale = q.quantize_weight(weight)
    assert bool((scale < torch.finfo(torch.float16).tiny).all())
    assert bool(((q.dequantize(values, scale) - weight).abs() <= scale.float() * (0.5 + 0.25)).all())


def test_a_tiny_group_in_a_normal_row_is_no_reason_to_refuse() -> None:
    weight = torch.randn(2, 256)
    weight[:, :128] *= 1e-9
    values, scale = q.quantize_weight(weight)
    assert bool((scale[:, 0] > 0).all()) and q.sqnr_db(weight, q.dequantize(values, scale)) > 30


@pytest.mark.parametrize("activation", q.ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
)
def test_the_op_equals_the_definition(width: int, activation: str, dtype: torch.dtype, tolerance: float) -> None:
    _, buffers = packed(9, width)
    x, bias = torch.randn(2, 3, width, dtype=dtype), torch.randn(9, dtype=dtype)
    got = torch.ops.lincompile.int6_linear(x, *buffers, bias, 128, activation)
    expected = reference.int6_linear_definition(x, *buffers, bias, 128, activation)
    assert got.dtype == dtype and got.shape == (2, 3, 9)
    assert float((got.double() - expected).norm() / expected.norm()) < tolerance


def test_the_definition_is_the_formula() -> None:
    """The written-out loop over tokens, rows and groups, with Python integers inside."""
    _, buffers = packed(3, 172)
    codes = pack.unpack(buffers[0], buffers[1], 172)
    x = torch.randn(2, 172)
    got = reference.int6_linear_definition(x, *buffers, None, 128, "a8")
    for token in range(2):
        for row in range(3):
            total = 0.0
            for start, stop in ((0, 128), (128, 172)):
                scale = float(x[token, start:stop].abs().max() / 127)
                ints = [round(float(torch.round(v / scale))) for v in x[token, start:stop]]
                inner = sum(a * int(c) for a, c in zip(ints, codes[row, start:stop], strict=True))
                total += inner * scale * float(buffers[2][row, start // 128])
            assert float(got[token, row]) == pytest.approx(total, rel=1e-5)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    _, buffers = packed(37, 256)
    x, bias = torch.randn(5, 256), torch.randn(37)
    whole = reference.int6_linear(x, *buffers, bias)
    grad = reference.int6_linear_input_grad(torch.ones(5, 37), *buffers, 256, 128)
    monkeypatch.setattr(reference, "_BLOCK_WEIGHTS", 1000)
    torch.testing.assert_close(reference.int6_linear(x, *buffers, bias), whole, rtol=1e-6, atol=1e-5)
    parts = reference.int6_linear_input_grad(torch.ones(5, 37), *buffers, 256, 128)
    torch.testing.assert_close(parts, grad, rtol=1e-6, atol=1e-5)


def test_a6_is_coarser_than_a8_and_a16_leaves_activations_alone() -> None:
    weight, buffers = packed(32, 256)
    x = torch.randn(8, 256)
    exact = x @ weight.t()
    error = {a: q.sqnr_db(exact, torch.ops.lincompile.int6_linear(x, *buffers, None, 128, a)) for a in q.ACTIVATIONS}
    assert error["a16"] > 100 > error["a8"] > error["a6"] + 8 > 30


def test_zero_tokens_zero_activations_and_empty_batches() -> None:
    _, buffers = packed(5, 256)
    bias = torch.randn(5)
    x = torch.randn(3, 256)
    x[1] = 0
    x[2, :128] = 0
    y = torch.ops.lincompile.int6_linear(x, *buffers, bias, 128, "a8")
    assert torch.equal(y[1], bias) and bool(torch.isfinite(y).all())
    assert torch.ops.lincompile.int6_linear(x[:0], *buffers, None, 128, "a8").shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_are_never_turned_into_plausible_numbers(bad: float) -> None:
    _, buffers = packed(5, 256)
    x = torch.randn(3, 256)
    x[1, 200] = bad
    y = torch.ops.lincompile.int6_linear(x, *buffers, None, 128, "a8")
    assert not torch.isfinite(y[1]).any() and bool(torch.isfinite(y[[0, 2]]).all())


def test_gradients_pass_straight_through_rounding_and_the_op_passes_opcheck() -> None:
    weight, buffers = packed(6, 172)
    x = torch.randn(2, 4, 172, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.ops.lincompile.int6_linear(x, *buffers, bias, 128, "a8").backward(grad)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight.double())
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    # "a16" rounds nothing, so finite differences see the same derivative.
    assert torch.autograd.gradcheck(lambda t: torch.ops.lincompile.int6_linear(t, *buffers, None, 128, "a16"), (x,))
    example = (torch.randn(3, 172, requires_grad=True), *buffers, None, 128, "a8")
    torch.library.opcheck(op.int6_linear, example)


def test_int8_linear_equals_its_definition_and_passes_opcheck() -> None:
    weight = torch.randn(7, 172)
    values, scale = q.quantize_weight(weight, bits=8)
    x = torch.randn(2, 3, 172, dtype=torch.float64, requires_grad=True)
    y = torch.ops.lincompile.int8_linear(x, values, scale, None, 128, "a8")
    expected = reference.int8_linear_definition(x.detach(), values, scale, None, 128, "a8")
    torch.testing.assert_close(y.detach(), expected)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], q.dequantize(values, scale, dtype=torch.float64).sum(0))
    torch.library.opcheck(op.int8_linear, (x.detach().float().requires_grad_(), values, scale, None, 128, "a8"))


def test_dynamic_shapes_survive_export() -> None:
    _, buffers = packed(6, 172)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in zip(("hi", "lo", "scale"), buffers, strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.lincompile.int6_linear(x, self.hi, self.lo, self.scale, None, 128, "a8")
            return out

    dims = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(Layer(), (torch.randn(2, 3, 172),), dynamic_shapes=dims, strict=False)
    x = torch.randn(5, 11, 172)
    torch.testing.assert_close(exported.module()(x), Layer()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "a4"}, "activation must be one of a6, a8, a16, got 'a4'"),
        ({"group_size": 100}, "group_size must be a multiple of 32"),
        ({"x": torch.zeros(2, 130)}, "weight_hi must be torch.uint8 .6, 65. for K = 130"),
        ({"x": torch.zeros(2, 128, dtype=torch.int8)}, "x must be float"),
        ({"bias": torch.zeros(5)}, "bias must be .6., got .5."),
        ({"scale": torch.zeros(6, 1)}, "weight_scale must be torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    _, (hi, lo, scale) = packed(6, 128)
    arguments: dict[str, object] = {"x": torch.zeros(2, 128), "hi": hi, "lo": lo, "scale": scale, "bias": None}
    arguments |= {"group_size": 128, "activation": "a8"} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.lincompile.int6_linear(*arguments.values())


def test_storage_is_six_bits_and_a_scale() -> None:
    _, buffers = packed(64, 576)
    assert sum(t.numel() * t.element_size() for t in buffers) / (64 * 576) <= 0.768
