"""The compiled CPU kernel: the same numbers as the definition, and a clean fall back where it can't be had."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lincompile.kernels.int6_linear import codes as q
from lincompile.kernels.int6_linear import cpu, op, pack, reference


@pytest.fixture
def kernel() -> None:
    if cpu._library() is None:
        pytest.skip("no C compiler on this machine")


@pytest.fixture
def fresh() -> Iterator[None]:
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["a8", "a6", "a16"])
@pytest.mark.parametrize(("rows", "width", "group"), [(37, 576, 128), (5, 131, 128), (64, 172, 32), (9, 7, 64)])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_kernel_equals_the_definition(
    kernel: None, rows: int, width: int, group: int, tokens: int, activation: str, dtype: torch.dtype
) -> None:
    codes, scale = q.quantize_weight(torch.randn(rows, width), group)
    planes = (*pack.pack(codes, group), scale)
    x, bias = torch.randn(1, tokens, width, dtype=dtype), torch.randn(rows, dtype=dtype)
    assert cpu.supports(x, group, activation)
    got = cpu.int6_linear(x, *planes, bias, group, activation)
    expected = reference.int6_linear_definition(x, *planes, bias, group, activation)
    assert got.dtype == dtype and got.shape == (1, tokens, rows)
    assert float((got.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_the_integer_part_is_exact(kernel: None) -> None:
    codes = torch.randint(-32, 32, (50, 576), dtype=torch.int8)
    x = torch.randint(-127, 128, (4, 576)).float()
    x[:, ::16] = 127
    planes = (*pack.pack(codes), torch.ones(50, 5, dtype=torch.float16))
    got = cpu.int6_linear(x, *planes, None, 128, "a8")
    assert torch.equal(got.double(), x.double() @ codes.double().t())


def test_every_float16_scale_is_read_exactly(kernel: None) -> None:
    """Zero, subnormal, normal and largest scales, against torch's own conversion."""
    scale = torch.arange(0, 0x7C00, 37, dtype=torch.int16).view(torch.float16).unsqueeze(1)
    codes = torch.full((len(scale), 32), 1, dtype=torch.int8)
    x = torch.zeros(1, 32)
    x[0, 0] = 127
    got = cpu.int6_linear(x, *pack.pack(codes, 32), scale, None, 32, "a8")
    assert torch.equal(got[0].double(), 127 * scale[:, 0].double())


def test_threads_share_rows_without_changing_the_result(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = q.quantize_weight(torch.randn(301, 256))
    planes, x = (*pack.pack(codes), scale), torch.randn(2, 256)
    alone = cpu.int6_linear(x, *planes, None, 128, "a8")
    monkeypatch.setattr(cpu, "_WEIGHTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(cpu.int6_linear(x, *planes, None, 128, "a8"), alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_inputs_give_non_finite_outputs(kernel: None, bad: float) -> None:
    codes, scale = q.quantize_weight(torch.randn(8, 300))
    x = torch.randn(3, 300)
    x[1, 290] = bad
    y = cpu.int6_linear(x, *pack.pack(codes), scale, None, 128, "a8")
    assert not torch.isfinite(y[1]).any() and bool(torch.isfinite(y[[0, 2]]).all())


def test_views_of_larger_tensors_are_read_correctly(kernel: None) -> None:
    codes, scale = q.quantize_weight(torch.randn(8, 256))
    planes = (*pack.pack(codes), scale)
    wide = torch.randn(3, 512)
    part = wide[:, ::2]
    torch.testing.assert_close(
        cpu.int6_linear(part, *planes, None, 128, "a8"), cpu.int6_linear(part.contiguous(), *planes, None, 128, "a8")
    )
    hi = torch.cat([planes[0], planes[0]], dim=1)[:, : planes[0].shape[1]]
    torch.testing.assert_close(
        cpu.int6_linear(part, hi, *planes[1:], None, 128, "a8"), cpu.int6_linear(part, *planes, None, 128, "a8")
    )


def test_calls_it_is_not_for_go_to_the_reference() -> None:
    x = torch.randn(3, 64)
    assert not cpu.supports(x.double(), 64, "a16") and not cpu.supports(x.double(), 64, "a8")
    assert not cpu.supports(torch.randn(17, 64), 64, "a8") and not cpu.supports(x[:0], 64, "a8")


def test_switched_off_or_without_a_compiler_the_reference_answers(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    codes, scale = q.quantize_weight(torch.randn(8, 256))
    planes, x = (*pack.pack(codes), scale), torch.randn(2, 256)
    expected = reference.int6_linear(x, *planes, None, 128, "a8")
    monkeypatch.setenv("LINCOMPILE_CPU_KERNEL", "0")
    assert torch.equal(op.int6_linear(x, *planes, None, 128, "a8"), expected)
    cpu._library.cache_clear()
    monkeypatch.delenv("LINCOMPILE_CPU_KERNEL")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no C compiler"):
        cpu.build()
    assert torch.equal(op.int6_linear(x, *planes, None, 128, "a8"), expected)


def test_a_kernel_that_computes_something_else_is_not_used(
    fresh: None, kernel: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu._library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "SOURCE", cpu.SOURCE.replace("sum - 32 *", "sum - 31 *"))
    with caplog.at_level(logging.WARNING):
        assert cpu._library() is None
    assert "doesn't agree with the reference" in caplog.text
    assert [path.suffix for path in (tmp_path / "lincompile").iterdir()] == [".so"]
