"""Linear attention's time on a GPU, against FLA, FlashAttention and cuDNN (its checks: ``linear_attention_checks.py``).

    python benchmarks/linear_attention.py --time --decode --growth --peers "fla,sdpa flash,sdpa cudnn" --json FILE
    python benchmarks/linear_attention.py --first-call --json FILE       # with an empty TRITON_CACHE_DIR
    python benchmarks/linear_attention.py --tune --json FILE             # tiles beside those of the rule

Timings are those of ``gpu_timing.py``, bfloat16 inputs (gates too), float32 state, each input set larger than the L2
cache. ``floor`` is the time to move every input and output once at the copy bandwidth measured in the
same run. Peers need ``flash-linear-attention`` installed; a peer's first call (its autotuning) is timed apart.
The file is written after every row, and a peer that fails leaves its error there. ``--warm`` only compiles FLA's
kernels (its first call takes minutes), which another process can do beside the checks: set FLA_CACHE_RESULTS=0 there,
so that it tunes itself when it is timed.
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
from gpu_timing import bandwidth, both, graph_milliseconds, guarded, milliseconds
from lawcat_fla import compiling
from torch import Tensor
from versions import versions

from lincompile.kernels import ops

DRY = {"SHAPES": [(2, 80, 4, 16)], "LENGTHS": (64, 128), "BUDGET": 0.001}
LENGTHS = (2048, 8192, 32768, 131072)
SHAPES = [(16, 2048, 16, 128), (4, 8192, 16, 128), (1, 32768, 16, 128), (1, 131072, 16, 128), (8, 4096, 32, 64)]
# Tiles that --tune times beside the rule's (see kernels/linear_attention/triton_plan.py).
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "states": [{"num_warps": 8}, {"STAGES": 1}, {"STAGES": 3}, {"SLICE": 128, "num_warps": 8}],
    "output": [{"BV": 64}, {"BV": 64, "STAGES": 1}, {"num_warps": 8}, {"num_warps": 8, "STAGES": 1}, {"STAGES": 1}],
    "keys": [{"num_warps": 8}],
    "values": [{"num_warps": 8}, {"STAGES": 1}],
}
BUDGET = 0.4  # seconds for each median
TIMES = ("forward_ms", "forward_backward_ms")


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
        if decay == "carry":  # as trained gates: some channels forget at once, others never
            g = g * torch.logspace(-4, 0, g.shape[-1], device="cuda") * (rand(batch, kv_heads, length, 1) < 0.3)
        if decay == "-inf":
            g[:, :, ::50] = float("-inf")
        g = g.to(narrow)
    # Strided like a projection's output: [B, T, H, D] seen as [B, H, T, D].
    q = (rand(batch, length, heads, head_dim) - (0.0 if normalize else 0.5)).to(narrow).transpose(1, 2)
    k = (rand(batch, length, kv_heads, head_dim) - (0.0 if normalize else 0.5)).to(narrow).transpose(1, 2)
    v = (rand(batch, kv_heads, length, value_dim) - 0.5).to(narrow)
    initial = rand(batch, kv_heads, head_dim, value_dim + int(normalize)) if state else None
    return [q, k, v, g, initial]


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


def warm(leaves: list[Tensor]) -> float:
    """Seconds in which FLA's kernels for these inputs are compiled."""
    from fla.ops.gla import chunk_gla

    flat = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
    started = time.perf_counter()
    with compiling():
        out = chunk_gla(*flat, scale=0.1)[0]
        torch.autograd.grad(out, flat, torch.ones_like(out))
    torch.cuda.synchronize()
    return round(time.perf_counter() - started, 1)


def peers(q: Tensor, k: Tensor, v: Tensor, g: Tensor, names: list[str]) -> dict[str, Callable[[], Any]]:
    """Runs by name; each makes its own inputs, and fails alone where its package is missing."""
    scale = q.shape[-1] ** -0.5
    found: dict[str, Callable[[], Any]] = {}

    def fla(forward_only: bool) -> dict[str, Any]:
        from fla.ops.gla import chunk_gla

        flat = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v, g)]
        return both(lambda: chunk_gla(*flat, scale=scale), [] if forward_only else flat, BUDGET)

    def sdpa(backend: str) -> dict[str, Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]

        def attend() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)

        return both(attend, dense, BUDGET)

    if "fla" in names or "fla forward" in names:
        found["fla chunk_gla"] = lambda: fla("fla" not in names)
    if "sdpa flash" in names:
        found["sdpa flash"] = lambda: sdpa("FLASH_ATTENTION")
    if "sdpa cudnn" in names:
        found["sdpa cudnn"] = lambda: sdpa("CUDNN_ATTENTION")
    return found


Save = Callable[[], None]


def time_shape(
    shape: tuple[int, int, int, int], names: list[str], copy: float, row: dict[str, Any], save: Save
) -> None:
    """Fills ``row``; calls ``save`` after each figure."""
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    inputs = make(batch, heads, heads, length, dim, dim, "key", 0.1, False, False, "bfloat16")
    q, k, v, g = (x.contiguous().requires_grad_() for x in inputs[:4] if x is not None)
    moved = sum(x.numel() * x.element_size() for x in (q, k, v, g))
    # Forward: read four, write one. Backward: read those five, write four.
    row |= {"shape": shape, "floor_ms": [moved * 1.25 / copy, moved * 3.5 / copy]}

    positive = [x.detach().abs().requires_grad_() for x in (q, k)]  # features, for a normaliser that isn't near zero

    def ours(group: int = 1) -> Any:
        part = (x[:, ::group] for x in (k, v, g))
        return ops.linear_attention(q, *part, None, dim**-0.5, True, False)

    def normalised() -> Any:
        return ops.linear_attention(*positive, v, g, None, dim**-0.5, True, True)

    def measured(function: Callable[[], Any]) -> dict[str, Any]:
        return both(function, [q, k, v, g], BUDGET)

    def repeated() -> Any:
        part = (x[:, ::4].repeat_interleave(4, 1) for x in (k, v, g))
        return ops.linear_attention(q, *part, None, dim**-0.5, True, False)

    def strong() -> dict[str, Any]:
        steep = (g * 100).detach()
        with torch.no_grad():
            return both(lambda: ops.linear_attention(q, k, v, steep, None, dim**-0.5, True, False), [], BUDGET)

    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: measured(ours),
        **peers(q, k, v, g, names),
        "ours, 4 query heads per kv head": lambda: measured(lambda: ours(4)),
        "ours, heads repeated": lambda: measured(repeated),
        "ours normalised": lambda: both(normalised, [*positive, v, g], BUDGET),
    }
    if length <= 32768:
        runs["ours, strong decay"] = strong
    for name, run in runs.items():
        row[name] = guarded(run)
        print(f"  {shape} {name}: {json.dumps(row[name])[:300]}", flush=True)
        save()
    mine = row["ours"]
    row["÷ ours"] = {
        name: [round(row[name][key] / mine[key], 3) for key in TIMES if key in row[name] and key in mine]
        for name in runs
    }
    save()


def grow(names: list[str], copy: float, rows: list[dict[str, Any]], save: Save) -> None:
    """One sequence, from 2K to 128K tokens: forward and forward + backward ms, peak GiB, and the floor."""
    for length in LENGTHS:
        inputs = make(1, 16, 16, length, 128, 128, "key", 0.1, False, False, "bfloat16")
        leaves = [x.contiguous().requires_grad_() for x in inputs[:4] if x is not None]
        moved = sum(x.numel() * x.element_size() for x in leaves)
        row: dict[str, Any] = {"length": length, "floor_ms": [moved * 1.25 / copy, moved * 3.5 / copy]}
        rows.append(row)
        runs = {
            "ours": lambda leaves=leaves: both(  # type: ignore[misc]
                lambda: ops.linear_attention(*leaves, None, 0.1, True, False), leaves, BUDGET
            ),
            **peers(*leaves, names),
        }
        for name, run in runs.items():
            row[name] = guarded(run)
            save()
        print(json.dumps(row), flush=True)


def tune(shape: tuple[int, int, int, int], save: Callable[[dict[str, Any]], None]) -> None:
    """Times of the rule's tiles and of each candidate, and how far results move from the rule's."""
    from lincompile.kernels.compile_ahead import compile_together
    from lincompile.kernels.linear_attention import triton
    from lincompile.kernels.linear_attention.triton_plan import OVERRIDES

    batch, length, heads, dim = shape
    torch.manual_seed(0)
    for normalize, value_dim in ((False, dim), (True, max(dim // 2, 16))):
        inputs = make(batch, heads, heads, length, dim, value_dim, "key", 0.1, normalize, False, "bfloat16")
        leaves = [x.contiguous().requires_grad_() for x in inputs[:4] if x is not None]

        def run(leaves: list[Tensor] = leaves, normalize: bool = normalize) -> Any:
            return ops.linear_attention(*leaves, None, dim**-0.5, True, normalize)

        def results(leaves: list[Tensor] = leaves, run: Callable[[], Any] = run) -> list[Tensor]:
            out = run()[0]
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

        trials = [("rule", "", {}), *((kernel, str(c), c) for kernel, cs in CANDIDATES.items() for c in cs)]

        def launch(
            kernel: str, tile: dict[str, int], leaves: list[Tensor] = leaves, normalize: bool = normalize
        ) -> None:
            OVERRIDES[kernel] = tile
            q, k, v, g = (x.detach() for x in leaves)
            options = (q, k, v, g, None, dim**-0.5, True, normalize)
            o, state = triton.chunkwise(*options)
            triton.chunkwise_backward(o, state, o, *options)
            OVERRIDES.clear()

        compile_together(*(functools.partial(launch, kernel, tile) for kernel, _, tile in trials))
        base = results()
        for kernel, text, tile in trials:

            def attempt(
                kernel: str = kernel,
                tile: dict[str, int] = tile,
                leaves: list[Tensor] = leaves,
                base: list[Tensor] = base,
                run: Callable[[], Any] = run,
                results: Callable[[], list[Tensor]] = results,
            ) -> dict[str, Any]:
                OVERRIDES[kernel] = tile
                found = results()
                moved = max(float((x - y).norm() / y.norm()) for x, y in zip(found, base, strict=True))
                return {**both(run, leaves, BUDGET), "moved": moved}

            row = {"shape": shape, "value_dim": value_dim, "kernel": kernel, "tile": text, **guarded(attempt)}
            OVERRIDES.clear()
            print(json.dumps(row)[:300], flush=True)
            save(row)


def time_decode(batch: int, names: list[str], copy: float) -> dict[str, Any]:
    """One token of 32 heads of 128: µs in a recorded graph that walks through several states, and from Python."""
    inputs = make(batch, 32, 32, 1, 128, 128, "key", 0.1, False, True, "bfloat16")
    q, k, v, g, state = (x for x in inputs if x is not None)
    # The state read and written in float32; q, k, v and g in and the output out.
    moved = 2 * state.numel() * 4 + sum(x.numel() * x.element_size() for x in (q, k, v, g, v))
    row: dict[str, Any] = {"batch": batch, "floor_us": moved / copy * 1e3}
    # The states together are larger than the L2 cache, and a graph reads each of them.
    pool = [state.clone() for _ in range(max(2, (192 << 20) // (state.numel() * 4)))]
    turn = iter(range(1 << 30))

    def measured(step: Callable[[], Any]) -> dict[str, Any]:
        with torch.no_grad():
            found = {"us": 1e3 * graph_milliseconds(step, calls=max(16, len(pool)))}
            return found | {"eager_us": 1e3 * milliseconds(step, BUDGET)}

    def ours() -> Any:
        return ops.linear_attention(q, k, v, g, pool[next(turn) % len(pool)], 0.1, True, False)

    def fla() -> dict[str, Any]:
        from fla.ops.gla import fused_recurrent_gla

        flat = [x.transpose(1, 2).contiguous() for x in (q, k, v, g)]

        def theirs() -> Any:
            state = pool[next(turn) % len(pool)]
            return fused_recurrent_gla(*flat[:3], gk=flat[3], scale=0.1, initial_state=state, output_final_state=True)

        with torch.no_grad():
            want, have = (
                ours_once()[0].transpose(1, 2),
                fused_recurrent_gla(*flat[:3], gk=flat[3], scale=0.1, initial_state=pool[0], output_final_state=True)[
                    0
                ],
            )
        return measured(theirs) | {"differs": float((have.float() - want.float()).norm() / want.float().norm())}

    def ours_once() -> Any:
        return ops.linear_attention(q, k, v, g, pool[0], 0.1, True, False)

    row["ours"] = guarded(lambda: measured(ours))
    if any(name.startswith("fla") for name in names):
        row["fla fused_recurrent_gla"] = guarded(fla)
    print(json.dumps(row), flush=True)
    return row


def profile(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Kernel times in µs of one forward and backward."""
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
    events = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:14]
    return {f"{event.key[:60]} x{event.count // 5}": round(event.device_time_total / 5, 1) for event in events}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-call", action="store_true", help="seconds of the first forward and backward, only")
    parser.add_argument("--warm", action="store_true", help="compile FLA's kernels, only")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--growth", action="store_true", help="one sequence of 2K to 128K tokens")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--tune", action="store_true", help="tiles beside those of the rule")
    parser.add_argument("--profile", action="store_true", help="kernel times per shape")
    parser.add_argument("--peers", default="", help="comma-separated: fla, fla forward, sdpa flash, sdpa cudnn")
    parser.add_argument("--shapes", default="", help="indices into the list of shapes, e.g. 0,4; default all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in options.peers.split(",") if name]
    shapes = [SHAPES[int(i)] for i in options.shapes.split(",")] if options.shapes else SHAPES
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions()}

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    if options.first_call or options.warm:
        # FLA compiles anew for every number of heads: what is warmed is the shape that will be timed.
        for shape in shapes if options.warm else dict.fromkeys((1, 1024, 16, dim) for *_, dim in shapes):
            batch, length, heads, dim = shape
            inputs = make(batch, heads, heads, length, dim, dim, "key", 0.1, False, False, "bfloat16")
            leaves = [x.contiguous().requires_grad_() for x in inputs[:4] if x is not None]
            if options.warm:
                result[f"warm {shape}"] = guarded(lambda leaves=leaves: {"s": warm(leaves)})  # type: ignore[misc]
            else:
                call = first_call(lambda x=leaves: ops.linear_attention(*x, None, 0.1, True, False), leaves)  # type: ignore[misc]
                result[f"first call, forward and backward, head {dim}, s"] = call
            print(json.dumps(result)[-400:], flush=True)
            write()
        return 0
    copy = bandwidth() if options.decode or options.time or options.growth else 0.0
    result["copy_gb_s"] = round(copy / 1e6, 1)
    if options.time:
        rows = result["times"] = []
        for shape in shapes:
            rows.append({})
            failed = guarded(lambda shape=shape: time_shape(shape, names, copy, rows[-1], write) or {})  # type: ignore[misc]
            rows[-1] |= failed
            torch.cuda.empty_cache()
            write()
    if options.decode:
        result["decode"] = []
        for batch in (1, 32):
            result["decode"].append(guarded(lambda batch=batch: time_decode(batch, names, copy)))  # type: ignore[misc]
            write()
    if options.growth:
        result["growth"] = []
        failed = guarded(lambda: grow(names, copy, result["growth"], write) or {})  # type: ignore[func-returns-value]
        if failed:
            result["growth failed"] = failed
        write()
    if options.profile:
        result["profile_us"] = {}
        for shape in shapes:
            found = result["profile_us"][str(shape)] = guarded(lambda shape=shape: profile(shape))  # type: ignore[misc]
            print(shape, "us per call:", *(f"{took:>9} {name}" for name, took in found.items()), sep="\n  ", flush=True)
            write()
    if options.tune:
        trials = result["tune"] = []

        def add(row: dict[str, Any]) -> None:
            trials.append(row)
            write()

        for shape in shapes:
            failed = guarded(lambda shape=shape: tune(shape, add) or {})  # type: ignore[misc]
            if failed:
                add({"shape": shape, **failed})
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
