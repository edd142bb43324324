"""The whole LAWCAT block on a GPU, from pre-rotary q, k, v and hidden states to its output: right, then how fast.

    python benchmarks/lawcat_block.py --check --jobs 12 --stages --time --peers "compiled,fla,sdpa" --json FILE
    python benchmarks/lawcat_block.py --quick        # some checks and one shape, in about a minute

``--check`` compares values and the gradients of every input and parameter with the plain module in float64, on fresh
random inputs (the seed is printed and recorded), with NaN in freed memory, two runs bit for bit; beside each error
stands the plain module's own in the same dtype. ``--time`` gives forward and forward + backward in bfloat16 (medians,
as ``gpu_timing.py`` says), for

* ours: the block on fused kernels; plain: the same module on its unfused graph; compiled: that under torch.compile;
* fla: the same block written with flash-linear-attention (``lawcat_fla.py``: four variants); ``differs`` says how far
  its output is from ours;
* sdpa: softmax attention (FlashAttention) on the same q, k and v, without the projections of the gate.

Every part stands alone: one that fails leaves its traceback in the JSON, which is written anew after each part.
``--warm`` only compiles the kernels of FLA's variants, for a process beside others (set FLA_CACHE_RESULTS=0 there).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lawcat_fla
import torch
from gpu_timing import bandwidth, both, guarded
from torch import Tensor
from torch.nn import functional
from versions import versions

from lincompile.kernels import ops
from lincompile.kernels.decay_gate import reference as gate_reference
from lincompile.kernels.gated_delta import reference as delta_reference
from lincompile.kernels.hedgehog_features import reference as feature_reference
from lincompile.kernels.short_conv import reference as conv_reference
from lincompile.passes.linearization.methods import GATE_RANK, GATE_TEMPERATURE, LOWEST, Lawcat, SiteShape

SHAPES = [(16, 2048, 16, 128), (4, 8192, 16, 128), (1, 32768, 16, 128), (1, 131072, 16, 128), (8, 4096, 32, 64)]
DRY = {"SHAPES": [(2, 80, 4, 16)], "QUICK_SHAPES": [(2, 80, 4, 16)]}
QUICK_SHAPES = [(8, 4096, 32, 64)]
# name: B, T, H, Hkv, D, padding, mode
BLOCKS = {
    "float32": (2, 300, 4, 2, 64, False, "float32"),
    "float32 padded": (2, 130, 4, 4, 40, True, "float32"),
    "bfloat16": (2, 300, 4, 2, 64, False, "bfloat16"),
    "bfloat16, as timed": (2, 528, 4, 4, 64, False, "bfloat16"),
    "bfloat16, wide heads": (2, 528, 4, 4, 128, False, "bfloat16"),
    "bfloat16 padded": (2, 300, 6, 2, 64, True, "bfloat16"),
    "autocast": (2, 300, 9, 3, 64, False, "autocast"),
    "autocast padded, odd": (1, 77, 4, 2, 80, True, "autocast"),
    "two tokens": (2, 2, 4, 2, 64, False, "autocast"),
}
# name: B, T, C, taps, state, dtype
CONVS = {
    "conv float32": (2, 300, 130, 4, False, torch.float32),
    "conv state": (2, 67, 66, 4, True, torch.float32),
    "conv bfloat16": (2, 1500, 192, 4, False, torch.bfloat16),
    "conv one token": (3, 1, 64, 8, True, torch.bfloat16),
    "conv strided": (2, 200, 96, 2, True, torch.bfloat16),
}
# name: B, T, H, maps, D, taps, state, mask, dtype
FEATURES = {
    "features float32": (2, 300, 4, 2, 64, 4, False, False, torch.float32),
    "features state, mask": (2, 130, 4, 2, 64, 4, True, True, torch.bfloat16),
    "features 128": (2, 1100, 4, 4, 128, 4, False, False, torch.bfloat16),
    "features 40": (1, 77, 6, 2, 40, 3, False, True, torch.bfloat16),
    "features 96": (1, 300, 2, 1, 96, 4, False, False, torch.bfloat16),
    "features, no conv": (2, 300, 4, 4, 64, 0, False, True, torch.bfloat16),
    "features one token": (3, 1, 4, 2, 64, 4, True, False, torch.bfloat16),
}
# name: B, T, kv heads, features, mask, dtype
GATES = {
    "gate float32": (2, 300, 2, 128, False, torch.float32),
    "gate bfloat16": (2, 1100, 4, 128, True, torch.bfloat16),
    "gate 256": (2, 300, 4, 256, False, torch.bfloat16),
    "gate 80": (1, 77, 3, 80, True, torch.bfloat16),
    "gate one token": (3, 1, 2, 128, False, torch.bfloat16),
}
# name: B, T, H, Hkv, D, Dv, strongest decay, dtype
DELTAS = {
    "delta": (2, 300, 4, 2, 64, 64, 0.1, torch.float32),
    "delta 128, bfloat16": (1, 700, 4, 4, 128, 128, 0.1, torch.bfloat16),
    "delta strong, odd": (2, 77, 4, 2, 80, 40, 10.0, torch.float32),
}
QUICK = ("conv bfloat16", "features state, mask", "features 128", "gate bfloat16", "gate 256", "bfloat16, as timed")
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


# ---- the block


def block_module(heads: int, kv_heads: int, dim: int) -> Lawcat:
    """A LAWCAT block away from its start: random convolutions and maps, gates as they start."""
    module = Lawcat(SiteShape(heads, kv_heads, dim, dim, heads * dim, dim**-0.5, True)).cuda()
    with torch.no_grad():
        for conv in (module.conv_q, module.conv_k):
            conv.weight += 0.3 * torch.randn_like(conv.weight)
        module.map.weight += 0.1 * torch.randn_like(module.map.weight)
        module.map.bias += 0.3 * torch.randn_like(module.map.bias)
        module.gate.down *= 3
    module.fuse = False  # the graph that CPUs run; ``fused`` below is what GPUs run
    return module


def fused(m: Lawcat, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    weights = (m.map.weight, m.map.bias)
    features_q = ops.hedgehog_features(q, m.conv_q.weight, None, *weights, mask, False)[0]
    features_k = ops.hedgehog_features(k, m.conv_k.weight, None, *weights, mask, True)[0]
    z = functional.linear(x, m.gate.down)
    log_decay = ops.decay_gate(z, m.gate.up, m.gate.bias, mask, m.shape.kv_heads, GATE_TEMPERATURE, m.gate.lowest)
    out: Tensor = ops.linear_attention(features_q, features_k, v, log_decay, None, 1.0, True, True)[0]
    return out


def make(batch: int, length: int, heads: int, kv_heads: int, dim: int, padded: bool, dtype: torch.dtype) -> list[Any]:
    """q, k, v as projections write them (``[B, T, H, D]`` seen as ``[B, H, T, D]``), hidden states, mask."""

    def projected(count: int) -> Tensor:
        return torch.randn(batch, length, count, dim, device="cuda", dtype=dtype).transpose(1, 2)

    x = torch.randn(batch, length, heads * dim, device="cuda", dtype=dtype)
    mask = torch.rand(batch, length, device="cuda") > 0.2 if padded else None
    return [projected(heads), projected(kv_heads), projected(kv_heads), x, mask]


# ---- checks


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Freed memory full of NaN: a kernel that reads what nothing wrote shows it."""
    blocks = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(16)]
    blocks += [torch.full((1 << 14,), float("nan"), device="cuda") for _ in range(64)]
    del blocks
    yield


def relative(have: Tensor, want: Tensor, least: float = 1e-30) -> float:
    """‖have − want‖ / ‖want‖, or / ``least`` where want is smaller (0 but for rounding)."""
    return float((have.detach().double() - want.detach().double()).norm() / max(float(want.detach().norm()), least))


def run_block(
    function: Callable[..., Tensor], module: Lawcat, inputs: list[Any], mode: str, seed: int
) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward; the output's gradient is the same for every dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    with poisoned(), torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        out = function(module, *leaves, inputs[4])
    generator = torch.Generator("cuda").manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, device="cuda").to(torch.bfloat16).to(out.dtype)
    if inputs[4] is not None:
        grad = grad * inputs[4][:, None, :, None]
    parameters = dict(module.named_parameters())
    with poisoned():
        grads = torch.autograd.grad(out, [*leaves, *parameters.values()], grad)
    names = ["o", "dq", "dk", "dv", "dx", *("d " + name for name in parameters)]
    return dict(zip(names, [out.detach(), *grads], strict=True))


def plain(module: Lawcat, *args: Any) -> Tensor:
    result: Tensor = module(*args)
    return result


def check_block(name: str, seed: int) -> dict[str, Any]:
    batch, length, heads, kv_heads, dim, padded, mode = BLOCKS[name]
    torch.manual_seed(seed)
    narrow = torch.float32 if mode == "float32" else torch.bfloat16
    module = block_module(heads, kv_heads, dim)
    if mode == "bfloat16":
        module = module.bfloat16()
    inputs = make(batch, length, heads, kv_heads, dim, padded, narrow)
    have, again = (run_block(fused, module, inputs, mode, seed) for _ in range(2))
    theirs = run_block(plain, module, inputs, mode, seed)
    wide = block_module(heads, kv_heads, dim).double()
    wide.load_state_dict({key: value.double() for key, value in module.state_dict().items()})
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    want = run_block(plain, wide, exact, "float64", seed)
    least = 1e-3 * float(want["dv"].norm())
    errors = {key: relative(have[key], want[key], least) for key in want}
    unfused = {key: relative(theirs[key], want[key], least) for key in want}
    tolerance = TOLERANCE[narrow]
    wrong = [key for key in want if not errors[key] <= max(tolerance, 1.5 * unfused[key])]
    same = all(torch.equal(have[key], again[key]) for key in have)
    return {"errors": errors, "unfused": unfused, "deterministic": same, "wrong": wrong, "ok": same and not wrong}


def compare(op: Callable[..., Any], reference: Any, args: list[Any], count: int, seed: int) -> dict[str, Any]:
    """An op's values and gradients against its reference in float64."""

    def run(function: Callable[..., Any], values: list[Any]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]
        with poisoned():
            out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator("cuda").manual_seed(seed)
        grads = [torch.randn(x.shape, generator=generator, device="cuda").to(torch.bfloat16).to(x.dtype) for x in out]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        with poisoned():
            return [*out, *torch.autograd.grad(out, wanted, grads, allow_unused=True)]

    have, again = run(op, args), run(op, args)
    want = run(op, [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args])
    definition = reference(*[x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args])
    definition = definition if isinstance(definition, tuple) else (definition,)
    kept = [i for i, x in enumerate(want) if x is not None and x.numel()]
    errors = {f"{'value' if i < count else 'gradient'} {i}": relative(have[i], want[i]) for i in kept}
    errors["definition"] = relative(want[0].detach(), definition[0])
    same = all(torch.equal(have[i], again[i]) for i in kept)
    tolerance = TOLERANCE[args[0].dtype]
    wrong = [key for key, error in errors.items() if not error <= (1e-9 if key == "definition" else tolerance)]
    return {"errors": errors, "deterministic": same, "wrong": wrong, "ok": same and not wrong}


def check_conv(name: str, seed: int) -> dict[str, Any]:
    batch, length, channels, taps, state, dtype = CONVS[name]
    torch.manual_seed(seed)
    x = torch.randn(batch, length, channels, device="cuda", dtype=dtype)
    if "strided" in name:
        x = torch.randn(batch, channels, 2 * length, device="cuda", dtype=dtype)[..., ::2].transpose(1, 2)
    initial = torch.randn(batch, channels, taps - 1, device="cuda", dtype=dtype) if state else None
    args = [x, torch.randn(channels, taps, device="cuda"), initial]
    return compare(ops.short_conv, conv_reference.recurrent, args, 2, seed)


def check_features(name: str, seed: int) -> dict[str, Any]:
    batch, length, heads, maps, dim, taps, state, masked, dtype = FEATURES[name]
    torch.manual_seed(seed)
    x = torch.randn(batch, length, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    conv = torch.randn(heads * dim, taps, device="cuda") * 0.5 if taps else None
    initial = torch.randn(batch, heads * dim, taps - 1, device="cuda", dtype=dtype) if state else None
    weight, bias = torch.randn(maps, dim, dim, device="cuda") * 0.2, torch.randn(maps, 1, dim, device="cuda")
    mask = torch.rand(batch, length, device="cuda") > 0.2 if masked else None
    args = [x, conv, initial, weight.to(torch.bfloat16).float(), bias, mask, masked]
    return compare(ops.hedgehog_features, feature_reference.forward, args, 2, seed)


def check_gate(name: str, seed: int) -> dict[str, Any]:
    batch, length, heads, features, masked, dtype = GATES[name]
    torch.manual_seed(seed)
    z = torch.randn(batch, length, GATE_RANK, device="cuda", dtype=dtype)
    weight = (torch.randn(heads * features, GATE_RANK, device="cuda") * 0.5).to(torch.bfloat16).float()
    bias = torch.randn(heads * features, device="cuda") * 12  # a part of the log-decays at the floor
    mask = torch.rand(batch, length, device="cuda") > 0.2 if masked else None
    args = [z, weight, bias, mask, heads, GATE_TEMPERATURE, LOWEST]
    return compare(ops.decay_gate, gate_reference.forward, args, 1, seed)


def check_delta(name: str, seed: int) -> dict[str, Any]:
    batch, length, heads, kv_heads, dim, value_dim, strongest, dtype = DELTAS[name]
    torch.manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    args = [
        rand(batch, length, heads, dim).transpose(1, 2),
        functional.normalize(rand(batch, kv_heads, length, dim), dim=-1),
        rand(batch, kv_heads, length, value_dim),
        torch.rand(batch, kv_heads, length, device="cuda").to(dtype),
        -strongest * torch.rand(batch, kv_heads, length, 1, device="cuda").to(dtype),
        torch.randn(batch, kv_heads, dim, value_dim, device="cuda"),
        0.3,
    ]
    return compare(ops.gated_delta, delta_reference.recurrent, args, 2, seed)


CHECKS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    **dict.fromkeys(CONVS, check_conv),
    **dict.fromkeys(FEATURES, check_features),
    **dict.fromkeys(GATES, check_gate),
    **dict.fromkeys(DELTAS, check_delta),
    **dict.fromkeys(BLOCKS, check_block),
}


# ---- times


def both_ways(run: Callable[..., Tensor], inputs: list[Tensor], leaves: list[Tensor]) -> None:
    """Reaches a block's kernels, those of its gradients too."""
    out = run(*inputs)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def time_shape(shape: tuple[int, int, int, int], names: list[str], budget: float, copy: float, save: Any) -> Any:
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    torch._dynamo.reset()  # past its limit of recompilations a function runs eagerly
    module = block_module(heads, heads, dim).bfloat16()
    q, k, v, x = (t.requires_grad_() for t in make(batch, length, heads, heads, dim, False, torch.bfloat16)[:4])
    leaves = [q, k, v, x, *module.parameters()]
    moved = 2 * batch * length * heads * dim
    # q, k, v, x in and o out; backward: those five and o's gradient in, four gradients out.
    row: dict[str, Any] = {"shape": shape, "floor_ms": [round(5 * moved / copy, 4), round(15 * moved / copy, 4)]}
    save(row)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "ours": lambda: both(lambda: fused(module, q, k, v, x), leaves, budget),
        "plain": lambda: both(lambda: module(q, k, v, x), leaves, budget),
    }
    if "compiled" in names:
        whole = torch.compile(module, dynamic=False)
        runs["compiled"] = lambda: both(lambda: whole(q, k, v, x), leaves, budget)

    def peer(variant: str) -> dict[str, Any]:
        run = lawcat_fla.block(module, variant)
        with lawcat_fla.compiling():  # one configuration after the other would be, while it is tuned
            both_ways(lawcat_fla.block(module, variant.replace(" compiled", "")), [q, k, v, x], leaves)
        with lawcat_fla.quick_tuning():
            both_ways(run, [q, k, v, x], leaves)
        found = both(lambda: run(q, k, v, x), leaves, budget)
        with torch.no_grad():
            return found | {"differs": relative(run(q, k, v, x).transpose(1, 2), fused(module, q, k, v, x))}

    if "fla" in names:
        runs |= {variant: lambda variant=variant: peer(variant) for variant in lawcat_fla.VARIANTS}  # type: ignore[misc]
    if "sdpa" in names and length <= 32768:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        runs["sdpa flash"] = lambda: both(attend, [q, k, v], budget)
    for name, run in runs.items():
        row[name] = guarded(run)
        save(row)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"  {shape} {name}: {json.dumps(row[name])[:300]}", flush=True)
    return row


def warm(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Seconds in which FLA's kernels of a shape's head size are compiled, on 1,024 tokens."""
    _, _, heads, dim = shape
    module = block_module(heads, heads, dim).bfloat16()
    q, k, v, x = (t.requires_grad_() for t in make(2, 1024, heads, heads, dim, False, torch.bfloat16)[:4])
    leaves = [q, k, v, x, *module.parameters()]

    def once(variant: str) -> dict[str, Any]:
        started = time.perf_counter()
        with lawcat_fla.compiling():
            both_ways(lawcat_fla.block(module, variant), [q, k, v, x], leaves)
        torch.cuda.synchronize()
        return {"s": round(time.perf_counter() - started, 1)}

    # Eager and compiled variants share their kernels.
    return {variant: guarded(lambda variant=variant: once(variant)) for variant in ("fla", "fla, hgrn")}  # type: ignore[misc]


def time_stages(shape: tuple[int, int, int, int], budget: float, copy: float) -> dict[str, Any]:
    """Each fused stage alone: ms, and the time to move its inputs and outputs once."""
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    m = block_module(heads, heads, dim).bfloat16()
    q, k, v = (t.requires_grad_() for t in make(batch, length, heads, heads, dim, False, torch.bfloat16)[:3])
    z = torch.randn(batch, length, GATE_RANK, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    one = 2 * batch * length * heads * dim
    flat = q.detach().transpose(1, 2).flatten(2).requires_grad_()
    args = (m.conv_q.weight, None, m.map.weight, m.map.bias, None, False)
    with torch.no_grad():
        features_q, features_k = ops.hedgehog_features(q, *args)[0], ops.hedgehog_features(k, *args)[0]
        decay = ops.decay_gate(z, m.gate.up, m.gate.bias, None, heads, GATE_TEMPERATURE, m.gate.lowest)
    wide = [t.requires_grad_() for t in (features_q, features_k, decay)]
    parts: dict[str, tuple[Callable[[], Tensor], list[Tensor], tuple[float, float]]] = {
        # floor: bytes forward, bytes forward + backward
        "short_conv": (lambda: ops.short_conv(flat, m.conv_q.weight, None)[0], [flat, m.conv_q.weight], (2, 5)),
        "features": (
            lambda: ops.hedgehog_features(q, *args)[0],
            [q, m.conv_q.weight, m.map.weight, m.map.bias],
            (3, 7),
        ),
        "gate": (
            lambda: ops.decay_gate(z, m.gate.up, m.gate.bias, None, heads, GATE_TEMPERATURE, m.gate.lowest),
            [z, m.gate.up, m.gate.bias],
            (2, 4),
        ),
        "linear_attention": (
            lambda: ops.linear_attention(wide[0], wide[1], v, wide[2], None, 1.0, True, True)[0],
            [*wide, v],
            (8, 25),
        ),
    }
    row: dict[str, Any] = {"shape": shape}
    for name, (function, leaves, units) in parts.items():
        row[name] = guarded(lambda f=function, x=leaves: both(f, x, budget))  # type: ignore[misc]
        row[name]["floor_ms"] = [round(unit * one / copy, 4) for unit in units]
        print(f"  {shape} {name}: {json.dumps(row[name])[:300]}", flush=True)
    return row


def profile(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Kernel times in µs of one fused forward and backward."""
    batch, length, heads, dim = shape
    module = block_module(heads, heads, dim).bfloat16()
    q, k, v, x = (t.requires_grad_() for t in make(batch, length, heads, heads, dim, False, torch.bfloat16)[:4])
    leaves = [q, k, v, x, *module.parameters()]
    grad = torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16)

    def train() -> None:
        torch.autograd.grad(fused(module, q, k, v, x), leaves, grad)

    train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            train()
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:22]
    table = {f"{event.key[:60]} x{event.count // 5}": round(event.device_time_total / 5, 1) for event in events}
    print(shape, "us per call:\n" + "\n".join(f"  {value:9.1f} {key}" for key, value in table.items()), flush=True)
    return table


# ---- driver


def check_here(name: str, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    row = guarded(lambda: CHECKS[name](name, seed))
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def run_apart(script: str, name: str, seed: int, file: Path) -> dict[str, Any]:
    """A script's check in a process of its own; ``file`` is for its result."""
    command = [sys.executable, script, "--only", name, "--seed", str(seed), "--json", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": "took longer than 400 s"}
    row = json.loads(file.read_text()).get("checks", {}).get(name) if file.exists() else None
    return row or {"ok": False, "error": f"exit code {done.returncode}: {done.stderr[-2000:]}"}


def check_apart(name: str, seed: int) -> dict[str, Any]:
    """A check in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return run_apart(__file__, name, seed, Path(folder) / "check.json")


def report(name: str, row: dict[str, Any]) -> None:
    errors = row.get("errors", {})
    worst = max(errors, key=lambda key: errors[key]) if errors else ""
    detail = f"worst {worst} {errors[worst]:.1e}" if worst else row.get("error", "")
    if not row.get("ok"):
        detail += f"; wrong {row.get('wrong')}, two runs agree: {row.get('deterministic')}"
    print(f"{'ok  ' if row.get('ok') else 'FAIL'} {name:22s} {detail} {row.get('seconds', 0)}s", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Forward and forward + backward in ms, and how many times as long as ours."""
    lines = [
        "",
        f"{'shape':24s} {'what':22s} {'fwd ms':>9s} {'fwd+bwd':>9s} {'÷ ours':>14s} {'GiB':>7s} {'first s':>8s}",
    ]
    for row in rows:
        ours = row.get("ours", {})
        lines.append(f"{tuple(row['shape'])!s:24s} {'floor':22s} {row['floor_ms'][0]:9.3f} {row['floor_ms'][1]:9.3f}")
        for name, value in row.items():
            if not isinstance(value, dict):
                continue
            if "forward_ms" not in value:
                lines.append(f"{'':24s} {name:22s} FAILED: {value.get('error', '?')[:70]}")
                continue
            one, two = value["forward_ms"], value["forward_backward_ms"]
            ratio = ""
            if "forward_ms" in ours:
                ratio = f"{one / ours['forward_ms']:6.2f} {two / ours['forward_backward_ms']:6.2f}"
            times = f"{one:9.3f} {two:9.3f} {ratio:>14s}"
            lines.append(f"{'':24s} {name:22s} {times} {value['peak_gib']:7.2f} {value['first_call_s']:8.1f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="one check by name")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run checks at the same time")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--stages", action="store_true", help="time each stage alone")
    parser.add_argument("--warm", action="store_true", help="compile FLA's kernels, only")
    parser.add_argument("--profile", action="store_true", help="kernel times of the fused block")
    parser.add_argument("--quick", action="store_true", help="some checks and one shape")
    parser.add_argument("--peers", default="", help="comma-separated: compiled, fla, sdpa")
    parser.add_argument("--shapes", default="", help="indices into the list of shapes, e.g. 0,4; default all")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each median")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = [SHAPES[int(i)] for i in options.shapes.split(",")] if options.shapes else SHAPES
    if options.quick:
        shapes = QUICK_SHAPES if not options.shapes else shapes
        options.budget = min(options.budget, 0.3)
    peers = [name for name in options.peers.split(",") if name]
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "seed": options.seed}

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    if options.warm:
        result["warm"] = {str(shape): guarded(lambda shape=shape: warm(shape)) for shape in shapes}  # type: ignore[misc]
        print(json.dumps(result["warm"]), flush=True)
        write()
        return 0
    if options.check or options.quick or options.only:
        checks = result["checks"] = {}
        wanted = [options.only] if options.only else list(QUICK if options.quick else CHECKS)
        # Most of a check's time goes into compiling its kernels, which other processes can do at the same time.
        with ThreadPoolExecutor(options.jobs) as pool:
            alone = options.jobs == 1 or len(wanted) == 1
            run = check_here if alone else check_apart
            for name, row in zip(wanted, pool.map(lambda name: run(name, options.seed), wanted), strict=True):
                checks[name] = row
                report(name, row)
                write()
    rows: list[dict[str, Any]] = []
    if options.time or options.stages or options.quick:
        copy = bandwidth()
        result["copy_gb_s"] = round(copy / 1e6, 1)
    if options.stages or options.quick:
        result["stages"] = []
        for shape in shapes:
            result["stages"].append(guarded(lambda shape=shape: time_stages(shape, options.budget, copy)))  # type: ignore[misc]
            gc.collect()
            torch.cuda.empty_cache()
            write()
    if options.profile:
        result["profile_us"] = {str(shape): guarded(lambda shape=shape: profile(shape)) for shape in shapes}  # type: ignore[misc]
        write()
    if options.time or options.quick:
        result["times"] = rows

        def save(row: dict[str, Any]) -> None:
            if row not in rows:
                rows.append(row)
            write()

        for shape in shapes:
            failed = guarded(lambda shape=shape: time_shape(shape, peers, options.budget, copy, save))  # type: ignore[misc]
            if "error" in failed:
                result.setdefault("failed", []).append({"shape": shape, **failed})
            gc.collect()
            torch.cuda.empty_cache()
            write()
    print(table(rows))
    ok = all(value.get("ok") for value in result.get("checks", {}).values())
    for row in rows:
        for name in lawcat_fla.EQUAL:
            if (far := row.get(name, {}).get("differs", 0.0)) > lawcat_fla.FARTHEST:
                print(f"{name} differs from the block by {far:.2f} at {row['shape']}: no peer here")
    if "checks" in result:
        print("ALL CHECKS RIGHT" if ok else "SOMETHING IS WRONG")
    write()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
