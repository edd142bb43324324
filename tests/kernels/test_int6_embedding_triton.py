"""The Triton kernel that looks up rows of a packed table, bit for bit against the plain ops.

Without a GPU the cases run in a second process, under Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, needs_kernels, needs_triton, poisoned, run_under_the_interpreter

from lincompile.kernels import ops
from lincompile.kernels.int6_linear import codes, embedding, pack

pytestmark = needs_triton
WIDTHS = [4, 128, 176, 300, 576, 1028, 2304]  # partial groups, and more than a program's channels
# Under the interpreter bfloat16 is cut off instead of rounded.
TYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def table(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = codes.quantize_weight(torch.randn(rows, width))
    hi, lo, scale = (part.to(DEVICE) for part in (*pack.pack(values), scale))
    return hi, lo, scale


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_the_plain_ops_bit_for_bit(width: int) -> None:
    from lincompile.kernels.int6_linear import triton_embedding as kernels

    planes = table(40, width)
    for ids in (torch.tensor([0, 39, 7, 7, 1]), torch.tensor([39], dtype=torch.int32)):
        for dtype in TYPES:
            args = (ids.to(DEVICE), *planes, width, 128, dtype)
            assert kernels.supports(*args)
            with poisoned():
                found = kernels.lookup(*args)
            assert found.dtype == dtype and torch.equal(found, embedding.plain(*args))


@needs_kernels
def test_planes_with_gaps_and_all_codes() -> None:
    from lincompile.kernels.int6_linear import triton_embedding as kernels

    hi, lo = pack.pack(torch.arange(-32, 32, dtype=torch.int8).repeat(3, 3))
    scale = torch.tensor([[0.5, 6.1e-5], [0.0, 65504.0], [1.0, 5.96e-8]], dtype=torch.float16)
    apart = [part.to(DEVICE).repeat_interleave(2, 1)[:, ::2] for part in (hi, lo, scale)]
    args = (torch.arange(3, device=DEVICE), *apart, 192, 128, torch.float32)
    assert torch.equal(kernels.lookup(*args), embedding.plain(*args))


@needs_kernels
def test_the_op_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels.int6_linear import triton_embedding as kernels

    lookup = MagicMock(wraps=kernels.lookup)
    monkeypatch.setattr(kernels, "lookup", lookup)
    monkeypatch.setattr(embedding, "backend", lambda folder, x, file: kernels)
    planes = table(9, 144)
    ids = torch.tensor([[0, 8, 7], [7, 7, 1]], device=DEVICE)
    found = ops.int6_embedding(ids, *planes, 144, 128, torch.float32)
    assert found.shape == (2, 3, 144) and lookup.call_count >= 1
    assert torch.equal(found.flatten(0, 1), embedding.plain(ids.flatten(), *planes, 144, 128, torch.float32))
    lookup.reset_mock()
    assert ops.int6_embedding(ids, *planes, 144, 128, torch.float64).dtype == torch.float64
    assert ops.int6_embedding(ids[:, :0], *planes, 144, 128, torch.float32).shape == (2, 0, 144)
    assert not lookup.called


@needs_kernels
def test_a_wrong_kernel_isnt_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels import first_use
    from lincompile.kernels.int6_linear import triton_embedding as kernels

    monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK", raising=False)
    monkeypatch.setattr(first_use, "_KNOWN", {})
    monkeypatch.setattr(kernels, "lookup", lambda *args: embedding.plain(*args) * 1.5)
    monkeypatch.setattr(embedding, "backend", lambda folder, x, file: kernels)
    planes, ids = table(9, 144), torch.tensor([3, 8], device=DEVICE)
    with pytest.warns(UserWarning, match="int6_embedding differ from the reference"):
        found = ops.int6_embedding(ids, *planes, 144, 128, torch.float32)
    assert torch.equal(found, embedding.plain(ids, *planes, 144, 128, torch.float32))


@needs_kernels
def test_what_is_left_to_the_plain_ops() -> None:
    from lincompile.kernels.int6_linear import triton_embedding as kernels

    ids, planes = torch.tensor([1], device=DEVICE), table(3, 128)
    assert kernels.supports(ids, *planes, 128, 128, torch.bfloat16)
    assert not kernels.supports(ids, *planes, 128, 128, torch.float64)
    assert not kernels.supports(ids, *planes, 128, 64, torch.float32)
    assert not kernels.supports(ids, *planes, 130, 128, torch.float32)
    assert not kernels.supports(ids[:0], *planes, 128, 128, torch.float32)


# A failed assertion leaves a GPU's context useless, so this is a process of its own.
OUTSIDE = """
import sys, torch
from lincompile.kernels.int6_linear import pack, triton_embedding as kernels
if kernels.INTERPRETED:  # which asserts only if it is told to here; the kernel's options tell the compiler
    from triton.runtime import interpreter
    options = interpreter.interpreter_builder.options
    vars(options).update(debug=True, sanitize_overflow=False)
planes = [plane.to(sys.argv[1]) for plane in pack.pack(torch.zeros(3, 128, dtype=torch.int8))]
scale = torch.ones(3, 1, dtype=torch.float16, device=sys.argv[1])
found = kernels.lookup(torch.tensor([0, int(sys.argv[2])], device=sys.argv[1]), *planes, scale, 128, 128, torch.float32)
print("read", found.sum().item())
"""


@needs_kernels
@pytest.mark.parametrize("row", [-1, 2, 3])
def test_ids_outside_the_table_fail_an_assertion(row: int) -> None:
    command = [sys.executable, "-c", OUTSIDE, DEVICE, str(row)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if row == 2:
        assert done.returncode == 0 and "read" in done.stdout, done.stderr[-2000:]
    else:
        assert done.returncode != 0 and "read" not in done.stdout
        assert "an id outside the table" in done.stderr + done.stdout, done.stderr[-2000:]


@pytest.mark.gpu
def test_ids_change_under_a_recorded_graph() -> None:
    planes = table(49152, 576)
    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    call = (*planes, 576, 128, torch.bfloat16)
    ops.int6_embedding(ids, *call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.int6_embedding(ids, *call)
    for row in (49151, 0, 12345):
        ids.fill_(row)
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found[0], embedding.plain(ids[0], *call))


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the cases run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, len(WIDTHS) + 4 + 3)
