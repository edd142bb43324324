"""Sliding-window softmax attention on a GPU: right, then how fast.

    python benchmarks/sliding_attention.py --check --time --json benchmarks/results/sliding_attention.json

``--check`` compares the op's values and gradients with the definition in float64 on fresh random inputs (the seed is
printed and recorded), with NaN in freed memory, two runs bit for bit; then one case under torch.compile and in a CUDA
graph. ``--time`` gives medians of CUDA events in ms, forward and forward + backward, of the op and of the reference
that it replaces, and the time to move inputs and outputs once.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import bandwidth, both, guarded
from lawcat_block import poisoned, relative
from torch import Tensor
from versions import versions

from lincompile.kernels import ops
from lincompile.kernels.softmax_attention import reference
from lincompile.kernels.softmax_attention import triton as kernels

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# name: B, H, Hkv, T, S, D, Dv, window, soft cap, padded, dtype
CASES: dict[str, tuple[int, int, int, int, int, int, int, int, float, bool, torch.dtype]] = {
    "sliding bfloat16": (2, 9, 3, 700, 700, 64, 64, 64, 0.0, False, B16),
    "sliding padded, odd": (3, 6, 2, 333, 333, 40, 80, 50, 0.0, True, B16),
    "sliding float16": (2, 4, 4, 300, 300, 64, 64, 100, 0.0, True, F16),
    "sliding float32": (2, 6, 2, 300, 300, 64, 64, 64, 0.0, True, F32),
    "sliding float32, 128": (1, 2, 1, 200, 200, 128, 128, 64, 5.0, False, F32),
    "sliding 128": (2, 4, 2, 500, 500, 128, 128, 64, 0.0, True, B16),
    "sliding soft cap": (2, 6, 2, 300, 300, 64, 64, 64, 3.0, True, B16),
    "sliding long window": (1, 4, 2, 1500, 1500, 64, 64, 777, 0.0, False, B16),
    "sliding window 1": (2, 3, 1, 130, 130, 64, 64, 1, 0.0, True, B16),
    "sliding one token": (3, 3, 1, 1, 1, 64, 64, 64, 0.0, False, B16),
    "sliding chunk after a cache": (2, 9, 3, 100, 163, 64, 64, 64, 0.0, True, B16),
    "sliding decode": (4, 9, 3, 1, 64, 64, 64, 64, 0.0, True, B16),
    "sliding rows before keys": (1, 3, 1, 150, 40, 64, 64, 64, 0.0, False, B16),
    "sliding as trained": (8, 9, 3, 2048, 2048, 64, 64, 64, 0.0, False, B16),
}
SHAPES = [(8, 9, 3, 2048, 64, 64), (8, 9, 3, 2048, 64, 256), (1, 9, 3, 32768, 64, 64), (4, 16, 16, 2048, 128, 64)]
TOLERANCE = {B16: 1.2e-2, F16: 3e-3, F32: 2e-4}
SCALE = 0.125
NAMES = ("o", "dq", "dk", "dv")


def make(
    batch: int, heads: int, kv_heads: int, length: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v and o's gradient as projections write them: ``[B, T, H, D]`` seen as ``[B, H, T, D]``."""
    sizes = ((length, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim), (length, heads, value_dim))
    return [torch.randn(batch, *size, device="cuda", dtype=dtype).transpose(1, 2) for size in sizes]


def run(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, options: tuple[Any, ...]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with poisoned():
        out = function(*leaves, *options)
    with poisoned():
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(name: str, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    *sizes, window, softcap, padded, dtype = CASES[name]
    torch.manual_seed(seed)
    *inputs, grad = make(*sizes, dtype)
    padding = None
    if padded:
        padding = torch.rand(sizes[0], sizes[4], device="cuda") > 0.3
        padding[0, : sizes[4] // 2] = False
        padding[-1] = False
    options = (padding, "sliding", window, SCALE, softcap)
    assert kernels.supports(*inputs, "sliding", window)
    have, again = (run(ops.softmax_attention, inputs, grad, options) for _ in range(2))
    want = run(reference.definition, [x.double() for x in inputs], grad.double(), options)
    theirs = run(by_reference, inputs, grad, options)
    # a gradient that is 0 (window 1: dq and dk) is measured against dv
    least = 1e-2 * float(want[3].norm())
    errors, other = (
        {key: relative(x, y, least) for key, x, y in zip(NAMES, found, want, strict=True)} for found in (have, theirs)
    )
    wrong = [key for key in NAMES if not errors[key] <= TOLERANCE[dtype]]
    same = all(torch.equal(x, y) for x, y in zip(have, again, strict=True))
    blind, unseen = ((want[i] == 0).all(-1) for i in (0, 3))
    exact = all((have[i][nothing] == 0).all() for i, nothing in enumerate((blind, blind, unseen, unseen)))
    return {
        "errors": errors,
        "reference": other,
        "deterministic": same,
        "wrong": wrong,
        "zeros": exact,
        "ok": same and exact and not wrong,
        "seconds": round(time.perf_counter() - started, 2),
    }


class ByReference(torch.autograd.Function):
    """The reference's forward and backward, as the op runs them where no kernel serves."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:4])
        ctx.options = args[4:]
        return reference.forward(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *reference.backward(grad, *ctx.saved_tensors, *ctx.options), *([None] * 5)


def by_reference(*args: Any) -> Tensor:
    result: Tensor = ByReference.apply(*args)
    return result


def check_captured(seed: int) -> dict[str, Any]:
    """The same bits under torch.compile and in a CUDA graph as eagerly."""
    torch.manual_seed(seed)
    *inputs, grad = make(2, 9, 3, 300, 300, 64, 64, B16)
    leaves = [x.requires_grad_() for x in inputs]

    def train(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(x.detach().requires_grad_() for x in args)  # of the stream that is recorded
        out = ops.softmax_attention(*args, None, "sliding", 64, SCALE, 0.0)
        return (out.detach(), *torch.autograd.grad(out, args, grad))

    want = train(*leaves)
    forward = torch.compile(lambda *x: ops.softmax_attention(*x, None, "sliding", 64, SCALE, 0.0), fullgraph=True)
    out = forward(*leaves)
    compiled = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(*leaves)
    graph.replay()
    torch.cuda.synchronize()
    same = {
        name: all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
        for name, found in (("torch.compile", compiled), ("CUDA graph", captured))
    }
    return {"same bits": same, "ok": all(same.values())}


def measure(shape: tuple[int, ...], budget: float, copy: float) -> dict[str, Any]:
    batch, heads, kv_heads, length, dim, window = shape
    torch.manual_seed(0)
    inputs = make(batch, heads, kv_heads, length, length, dim, dim, B16)[:3]
    leaves = [x.requires_grad_() for x in inputs]
    options = (None, "sliding", window, SCALE, 0.0)
    moved = 2 * batch * length * dim
    # q, k, v in and o out; backward: those but o, and o's gradient in, three gradients out
    units = (2 * heads + 2 * kv_heads, 5 * heads + 6 * kv_heads)
    row: dict[str, Any] = {"shape": shape, "floor_ms": [round(unit * moved / copy, 4) for unit in units]}
    for name, function in (("triton", ops.softmax_attention), ("reference", by_reference)):
        row[name] = guarded(lambda f=function: both(functools.partial(f, *leaves, *options), leaves, budget))  # type: ignore[misc]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="one check by name")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each median")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "seed": options.seed}

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    ok = True
    if options.check or options.only:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            **{name: lambda name=name: check(name, options.seed) for name in CASES},  # type: ignore[misc]
            "captured": lambda: check_captured(options.seed),
        }
        wanted = [options.only] if options.only else list(parts)
        checks = result["checks"] = {}
        for name in wanted:
            row = checks[name] = guarded(parts[name])
            ok = ok and bool(row["ok"])
            print("ok  " if row["ok"] else "FAIL", f"{name:28s}", json.dumps(row)[:900], flush=True)
            write()
    if options.time:
        copy = bandwidth()
        result["copy_gb_s"], result["times"] = round(copy / 1e6, 1), []
        for shape in SHAPES:
            row = guarded(lambda shape=shape: measure(shape, options.budget, copy))  # type: ignore[misc]
            result["times"].append(row)
            ok = ok and not any("error" in part for part in (row, *row.values()) if isinstance(part, dict))
            print(json.dumps(row)[:900], flush=True)
            write()
    write()
    print("ALL RIGHT" if ok else "SOMETHING IS WRONG")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
