"""Linear attention on a GPU: correctness against float64, then time against FLA, FlashAttention and cuDNN.

    python benchmarks/linear_attention.py --check --time --peers --json benchmarks/results/linear_attention.json

Timings are medians of CUDA events after warm-up, bfloat16 inputs (gates too), float32 state, each input set larger
than the L2 cache. ``floor`` is the time to move every input and output once at the copy bandwidth measured in the
same run. Peers need ``flash-linear-attention`` installed; a peer's first call (its autotuning) is timed apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from versions import versions

from lincompile.kernels import ops
from lincompile.kernels.linear_attention import reference

SHAPES = [(16, 2048, 16, 128), (4, 8192, 16, 128), (1, 32768, 16, 128), (1, 131072, 16, 128), (8, 4096, 32, 64)]
CHECKS = {
    # name: B, H, Hkv, T, D, Dv, decay, strongest decay a step, normalise, state, dtype
    "plain": (2, 4, 4, 300, 128, 128, "key", 0.1, False, True, "bfloat16"),
    "long": (1, 2, 2, 5000, 128, 128, "key", 0.1, False, True, "bfloat16"),
    "normalised": (2, 6, 2, 517, 128, 64, "key", 0.1, True, True, "bfloat16"),
    "no decay": (2, 4, 4, 300, 64, 64, "none", 0.0, True, True, "bfloat16"),
    "per head": (2, 8, 2, 300, 64, 64, "head", 0.1, False, False, "bfloat16"),
    "strong": (2, 4, 4, 300, 128, 128, "key", 10.0, False, True, "bfloat16"),
    "strong normalised": (1, 8, 2, 1500, 64, 64, "key", 10.0, True, True, "bfloat16"),
    # half chunks decay by 29, 42 and 58: around the limit of one anchor per chunk, in segments of many chunks
    "even 0.9": (1, 9, 3, 2048, 128, 64, "even", 0.9, True, True, "bfloat16"),
    "even 1.3": (1, 9, 3, 2048, 128, 64, "even", 1.3, True, True, "bfloat16"),
    "even 1.8": (1, 9, 3, 2048, 128, 64, "even", 1.8, True, True, "bfloat16"),
    "float32 even 1.8": (1, 9, 3, 2048, 128, 64, "even", 1.8, True, True, "float32"),
    "forget": (1, 4, 4, 200, 64, 64, "-inf", 0.1, False, True, "bfloat16"),
    "one token": (3, 8, 2, 1, 128, 128, "key", 0.5, True, True, "bfloat16"),
    "odd sizes": (1, 4, 2, 77, 40, 24, "key", 0.1, True, True, "bfloat16"),
    "wide heads": (1, 2, 2, 130, 192, 256, "key", 0.1, False, True, "bfloat16"),
    "float32": (1, 4, 2, 300, 64, 64, "key", 0.1, True, True, "float32"),
    "float32 strong": (1, 4, 2, 300, 64, 64, "key", 10.0, False, True, "float32"),
    "float32 wide": (1, 4, 2, 130, 128, 65, "key", 0.1, True, True, "float32"),
}
TOLERANCE = {"bfloat16": 1.2e-2, "float32": 1e-4}
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dstate")


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    value_dim: int,
    decay: str,
    strongest: float,
    normalize: bool,
    state: bool,
    dtype: str,
) -> list[Tensor | None]:
    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device="cuda")

    narrow = getattr(torch, dtype)
    g = None
    if decay != "none":
        g = -strongest * rand(batch, kv_heads, length, 1 if decay == "head" else head_dim)
        if decay == "even":
            g.fill_(-strongest)
        if decay == "-inf":
            g[:, :, ::50] = float("-inf")
        g = g.to(narrow)
    # Strided like a projection's output: [B, T, H, D] seen as [B, H, T, D].
    q = (rand(batch, length, heads, head_dim) - (0.0 if normalize else 0.5)).to(narrow).transpose(1, 2)
    k = (rand(batch, length, kv_heads, head_dim) - (0.0 if normalize else 0.5)).to(narrow).transpose(1, 2)
    v = (rand(batch, kv_heads, length, value_dim) - 0.5).to(narrow)
    initial = rand(batch, kv_heads, head_dim, value_dim + int(normalize)) if state else None
    return [q, k, v, g, initial]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Freed memory full of NaN: a kernel that reads what nothing wrote shows it."""
    blocks = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(8)]
    del blocks
    yield


def gradients(function: Callable[..., Any], inputs: list[Tensor | None], options: tuple[Any, ...]) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with poisoned():
        o, state = function(*leaves, *options)
    generator = torch.Generator("cuda").manual_seed(11)
    weights = [torch.randn(x.shape, generator=generator, device="cuda") for x in (o, state)]
    with poisoned():
        grads = torch.autograd.grad((o, state), [x for x in leaves if x is not None], [
            weight.to(x.dtype) for weight, x in zip(weights, (o, state), strict=True)
        ])  # fmt: skip
    return [o.detach(), state.detach(), *grads]


def check(only: str) -> dict[str, Any]:
    """Relative errors ‖x − ref‖ / ‖ref‖ against the float64 recurrence."""
    results: dict[str, Any] = {}
    for name, case in CHECKS.items():
        if only and name != only:
            continue
        torch.manual_seed(len(name))
        inputs, normalize = make(*case), case[8]
        options = (0.125, True, normalize)
        started = time.perf_counter()
        have = gradients(ops.linear_attention, inputs, options)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        wide = [None if x is None else x.double() for x in inputs]
        function = reference.recurrent if case[3] <= 1500 else ops.linear_attention
        want = gradients(function, wide, options)
        names = [n for n, x in zip(NAMES[2:], inputs, strict=True) if x is not None]
        errors = {
            n: float((x.double() - y).norm() / y.norm().clamp_min(1e-30))
            for n, x, y in zip([*NAMES[:2], *names], have, want, strict=True)
        }
        again = gradients(ops.linear_attention, inputs, options)
        same = all(torch.equal(x, y) for x, y in zip(have, again, strict=True))
        finite = all(bool(torch.isfinite(x).all()) for x in have)
        ok = finite and same and max(errors.values()) < TOLERANCE[case[10]]
        results[name] = {"errors": errors, "deterministic": same, "ok": ok, "first_call_s": round(seconds, 2)}
        worst = max(errors, key=lambda n: errors[n])
        line = " ".join(f"{n} {e:.1e}" for n, e in errors.items())
        print(f"{'ok  ' if ok else 'FAIL'} {name:18s} worst {worst}; {line} same={same} {seconds:.1f}s", flush=True)
    return results


def check_causality() -> bool:
    inputs = make(1, 4, 2, 700, 64, 64, "key", 0.1, True, False, "bfloat16")
    before, _ = ops.linear_attention(*inputs, 0.125, True, True)
    for x in inputs[:3]:
        assert x is not None
        x[:, :, 333:] = 3.0
    after, _ = ops.linear_attention(*inputs, 0.125, True, True)
    same = torch.equal(before[:, :, :333], after[:, :, :333])
    return same and not torch.equal(before[:, :, 333:], after[:, :, 333:])


def milliseconds(function: Callable[[], Any], repeat: int = 20) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeat):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def graph_microseconds(function: Callable[[], Any], calls: int = 20) -> float:
    """Time of one call inside a captured CUDA graph of ``calls``."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return milliseconds(graph.replay) * 1e3 / calls


def bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6  # GB/s


def both(function: Callable[[], Any], leaves: list[Tensor]) -> tuple[float, ...]:
    """Forward ms, forward + backward ms, peak GiB of the second; without leaves the forward only."""
    with torch.no_grad():
        forward = milliseconds(function)
    if not leaves:
        return (forward,)
    out = function()
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn_like(out)

    def train() -> None:
        result = function()
        torch.autograd.grad(result[0] if isinstance(result, tuple) else result, leaves, grad)

    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    total = milliseconds(train, 10)
    return forward, total, (torch.cuda.max_memory_allocated() - base) / 2**30


def first_call(function: Callable[[], Any], leaves: list[Tensor]) -> float:
    """Seconds of the first forward (and backward): compilation and autotuning."""
    started = time.perf_counter()
    with torch.set_grad_enabled(bool(leaves)):
        result = function()
    if leaves:
        out = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    torch.cuda.synchronize()
    return round(time.perf_counter() - started, 2)


def peers(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, names: list[str]
) -> Iterator[tuple[str, Callable[[], Any], list[Tensor]]]:
    scale = q.shape[-1] ** -0.5
    if "fla" in names or "fla forward" in names:
        from fla.ops.gla import chunk_gla

        flat = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v, g)]
        yield "fla chunk_gla", lambda: chunk_gla(*flat, scale=scale), flat if "fla" in names else []
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    for name, backend in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION)):
        if name not in names:
            continue

        def attend(backend: Any = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)

        yield name, attend, dense


def time_shape(shape: tuple[int, int, int, int], names: list[str], copy: float) -> dict[str, Any]:
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    inputs = make(batch, heads, heads, length, dim, dim, "key", 0.1, False, False, "bfloat16")
    q, k, v, g = (x.contiguous().requires_grad_() for x in inputs[:4] if x is not None)
    moved = sum(x.numel() * x.element_size() for x in (q, k, v, g))
    # Forward: read four, write one. Backward: read those five, write four.
    row: dict[str, Any] = {"shape": shape, "floor_ms": [moved * 1.25 / copy / 1e6, moved * 3.5 / copy / 1e6]}

    def ours(group: int = 1, normalize: bool = False) -> Any:
        part = (x[:, ::group] for x in (k, v, g))
        return ops.linear_attention(q, *part, None, dim**-0.5, True, normalize)

    row["ours, first call s"] = first_call(ours, [q, k, v, g])
    row["ours"] = both(ours, [q, k, v, g])
    row["ours normalised"] = both(lambda: ours(1, True), [q, k, v, g])
    row["ours, 4 query heads per kv head"] = both(lambda: ours(4), [q, k, v, g])
    if length <= 32768:
        steep = (g * 100).detach()
        with torch.no_grad():
            row["ours, strong decay, forward"] = milliseconds(
                lambda: ops.linear_attention(q, k, v, steep, None, dim**-0.5, True, False)
            )
    for name, function, leaves in peers(q, k, v, g, names):
        if name.startswith("sdpa") and length > 32768:
            continue
        row[name + ", first call s"] = first_call(function, leaves)
        row[name] = both(function, leaves)
    print(json.dumps(row), flush=True)
    return row


def time_decode(batch: int, names: list[str], copy: float) -> dict[str, Any]:
    inputs = make(batch, 32, 32, 1, 128, 128, "key", 0.1, False, True, "bfloat16")
    q, k, v, g, state = (x for x in inputs if x is not None)
    moved = 2 * state.numel() * 4
    row: dict[str, Any] = {"batch": batch, "floor_us": moved / copy / 1e3}
    # Several states, together larger than the L2 cache.
    pool = [state.clone() for _ in range(max(1, (256 << 20) // moved))][:64]
    turn = iter(range(1 << 30))

    def ours() -> Any:
        return ops.linear_attention(q, k, v, g, pool[next(turn) % len(pool)], 0.1, True, False)

    row["ours_us"] = graph_microseconds(ours)
    if any(name.startswith("fla") for name in names):
        from fla.ops.gla import fused_recurrent_gla

        flat = [x.transpose(1, 2).contiguous() for x in (q, k, v, g)]

        def theirs() -> Any:
            state = pool[next(turn) % len(pool)]
            with torch.no_grad():
                return fused_recurrent_gla(
                    *flat[:3], gk=flat[3], scale=0.1, initial_state=state, output_final_state=True
                )

        row["fla_us"] = graph_microseconds(theirs)
    print(json.dumps(row), flush=True)
    return row


def profile(shape: tuple[int, int, int, int]) -> None:
    """Kernel times of one forward and backward."""
    batch, length, heads, dim = shape
    inputs = make(batch, heads, heads, length, dim, dim, "key", 0.1, False, False, "bfloat16")
    leaves = [x.contiguous().requires_grad_() for x in inputs[:4] if x is not None]

    def train() -> None:
        o, _ = ops.linear_attention(*leaves, None, dim**-0.5, True, False)
        torch.autograd.grad(o, leaves, o.detach())

    train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            train()
        torch.cuda.synchronize()
    print(shape, "us per call:")
    for event in sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:14]:
        print(f"  {event.device_time_total / 5:9.1f} x{event.count // 5} {event.key[:60]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="one check by name")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print kernel times per shape")
    parser.add_argument("--peers", default="", help="comma-separated: fla, fla forward, sdpa flash, sdpa cudnn")
    parser.add_argument("--shapes", default="", help="indices into the list of shapes, e.g. 0,4; default all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in options.peers.split(",") if name]
    shapes = [SHAPES[int(i)] for i in options.shapes.split(",")] if options.shapes else SHAPES
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions()}
    ok = True
    if options.check:
        result["checks"] = check(options.only)
        result["causal"] = check_causality()
        ok = result["causal"] and all(row["ok"] for row in result["checks"].values())
    if options.decode or options.time:
        copy = bandwidth()
        result["copy_gb_s"] = round(copy, 1)
    if options.decode:
        result["decode"] = [time_decode(batch, names, copy) for batch in (1, 32)]
    if options.time:
        result["times_ms"] = [time_shape(shape, names, copy) for shape in shapes]
    if options.profile:
        for shape in shapes:
            profile(shape)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("ALL RIGHT" if ok else "SOMETHING IS WRONG")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
