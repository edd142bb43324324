"""Linear attention's kernels on a GPU against the recurrence in float64: values, states, every gradient.

    python benchmarks/linear_attention_checks.py --jobs 8 --json benchmarks/results/linear_attention_checks.json
    python benchmarks/linear_attention_checks.py --only "varlen,bidirectional"

Fresh random inputs (the seed is printed and recorded), strided as projections write them, NaN in freed memory, two runs
bit for bit. Most of a check's time is compiling, which ``--jobs`` processes do at the same time; the file is written
after each. Kernels that are off until checked (``cu_seqlens``, no causal order) are on here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_timing import guarded
from lawcat_block import poisoned, run_apart
from linear_attention import make
from torch import Tensor
from versions import versions

from lincompile.kernels import ops
from lincompile.kernels.linear_attention import reference, varlen_reference

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
    "carry": (1, 9, 3, 2048, 128, 64, "carry", 15.0, True, True, "bfloat16"),
    "carry 128": (2, 4, 2, 1500, 128, 128, "carry", 15.0, False, True, "bfloat16"),
    "float32 carry": (1, 9, 3, 1100, 128, 64, "carry", 15.0, True, True, "float32"),
    "forget": (1, 4, 4, 200, 64, 64, "-inf", 0.1, False, True, "bfloat16"),
    "one token": (3, 8, 2, 1, 128, 128, "key", 0.5, True, True, "bfloat16"),
    "odd sizes": (1, 4, 2, 77, 40, 24, "key", 0.1, True, True, "bfloat16"),
    "wide heads": (1, 2, 2, 130, 192, 256, "key", 0.1, False, True, "bfloat16"),
    "float32": (1, 4, 2, 300, 64, 64, "key", 0.1, True, True, "float32"),
    "float32 strong": (1, 4, 2, 300, 64, 64, "key", 10.0, False, True, "float32"),
    "float32 wide": (1, 4, 2, 130, 128, 65, "key", 0.1, True, True, "float32"),
}
# name: lengths, H, Hkv, D, Dv, decay, strongest, normalise, state, dtype
VARLEN = {
    "varlen": ((300, 0, 1, 64, 700), 4, 2, 128, 64, "key", 0.1, True, True, "bfloat16"),
    "varlen 128": ((1000, 24, 3000), 4, 4, 128, 128, "key", 0.1, False, False, "bfloat16"),
    "varlen strong": ((130, 517), 4, 2, 64, 64, "key", 10.0, True, True, "bfloat16"),
    "varlen float32": ((77, 300), 4, 2, 64, 64, "head", 0.1, True, True, "float32"),
}
# name: B, H, Hkv, queries, keys, D, Dv, normalise, state, dtype
BIDIRECTIONAL = {
    "bidirectional": (2, 4, 2, 517, 517, 128, 64, True, True, "bfloat16"),
    "bidirectional cross": (2, 4, 4, 100, 3000, 128, 128, False, False, "bfloat16"),
    "bidirectional odd": (1, 6, 2, 77, 77, 40, 24, True, False, "bfloat16"),
    "bidirectional float32": (2, 4, 2, 300, 300, 64, 64, True, True, "float32"),
}
TOLERANCE = {"bfloat16": 1.2e-2, "float32": 1e-4}
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dstate")


def output_gradients(outputs: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same for every dtype: values that bfloat16 holds."""
    generator = torch.Generator("cuda").manual_seed(11)
    return [torch.randn(x.shape, generator=generator, device="cuda").to(torch.bfloat16).to(dtype) for x in outputs]


def gradients(function: Callable[..., Any], inputs: list[Tensor | None], options: tuple[Any, ...]) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with poisoned():
        o, state = function(*leaves, *options)
    slopes = [grad.to(x.dtype) for grad, x in zip(output_gradients([o, state]), (o, state), strict=True)]
    with poisoned():
        grads = torch.autograd.grad((o, state), [x for x in leaves if x is not None], slopes)
    return [o.detach(), state.detach(), *grads]


def verdict(
    names: list[str], have: list[Tensor], want: list[Tensor], again: list[Tensor], dtype: str
) -> dict[str, Any]:
    """Relative errors ‖x − ref‖ / ‖ref‖, and whether all is well."""
    errors = {
        n: float((x.double() - y).norm() / y.norm().clamp_min(1e-30)) for n, x, y in zip(names, have, want, strict=True)
    }
    same = all(torch.equal(x, y) for x, y in zip(have, again, strict=True))
    finite = all(bool(torch.isfinite(x).all()) for x in have)
    # q's gradient of a normalised head holds differences of values and outputs: where few keys count, the rounding of
    # the outputs is most of its error.
    near = all(error < TOLERANCE[dtype] * (2 if name == "dq" else 1) for name, error in errors.items())
    return {"errors": errors, "deterministic": same, "ok": finite and same and near}


def names_of(inputs: list[Tensor | None]) -> list[str]:
    return [*NAMES[:2], *(n for n, x in zip(NAMES[2:], inputs, strict=True) if x is not None)]


def widened(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


def check_causal(name: str) -> dict[str, Any]:
    case = CHECKS[name]
    inputs, normalize = make(*case), case[8]
    options = (0.125, True, normalize)
    have, again = (gradients(ops.linear_attention, inputs, options) for _ in range(2))
    function = reference.recurrent if case[3] <= 1500 else ops.linear_attention
    want = gradients(function, widened(inputs), options)
    return verdict(names_of(inputs), have, want, again, case[10])


def check_varlen(name: str) -> dict[str, Any]:
    lengths, heads, kv_heads, dim, value_dim, decay, strongest, normalize, state, dtype = VARLEN[name]
    inputs = make(1, heads, kv_heads, sum(lengths), dim, value_dim, decay, strongest, normalize, False, dtype)
    if state:
        inputs[4] = torch.rand(len(lengths), kv_heads, dim, value_dim + int(normalize), device="cuda")
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    options = (bounds, 0.125, normalize)
    have, again = (gradients(ops.linear_attention_varlen, inputs, options) for _ in range(2))
    leaves = widened(inputs)
    want = list(varlen_reference.forward(*leaves, lengths, 0.125, normalize))
    slopes = output_gradients(have[:2], torch.float64)
    want += [x for x in varlen_reference.backward(*slopes, *leaves, lengths, 0.125, normalize) if x is not None]
    return verdict(names_of(inputs), have, want, again, dtype)


def check_bidirectional(name: str) -> dict[str, Any]:
    batch, heads, kv_heads, queries, keys, dim, value_dim, normalize, state, dtype = BIDIRECTIONAL[name]
    inputs = make(batch, heads, kv_heads, keys, dim, value_dim, "none", 0.0, normalize, state, dtype)
    inputs[0] = make(batch, heads, kv_heads, queries, dim, value_dim, "none", 0.0, normalize, state, dtype)[0]
    options = (0.125, False, normalize)
    have, again = (gradients(ops.linear_attention, inputs, options) for _ in range(2))
    want = gradients(ops.linear_attention, widened(inputs), options)  # float64: the reference
    return verdict(names_of(inputs), have, want, again, dtype)


def check_here(name: str, seed: int) -> dict[str, Any]:
    """One check on fresh inputs; kernels that are off until checked are on."""
    from lincompile.kernels.linear_attention import triton as kernels

    kernels.BIDIRECTIONAL = kernels.VARLEN = True
    run = check_varlen if name in VARLEN else check_bidirectional if name in BIDIRECTIONAL else check_causal
    torch.manual_seed(seed)
    started = time.perf_counter()
    row = guarded(lambda: run(name))
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def report(name: str, row: dict[str, Any]) -> None:
    errors = row.get("errors", {})
    line = " ".join(f"{n} {e:.1e}" for n, e in errors.items()) or str(row.get("error"))[:300]
    print(f"{'ok  ' if row['ok'] else 'FAIL'} {name:22s} {line} same={row.get('deterministic')} {row.get('seconds')}s",
          flush=True)  # fmt: skip


def check(wanted: list[str], seed: int, jobs: int, save: Callable[[str, dict[str, Any]], None]) -> None:
    """Runs the checks, most of whose time is compiling, in ``jobs`` processes; ``save(name, row)`` after each."""

    def run(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run_apart(__file__, name, seed, Path(folder) / "check.json")

    with ThreadPoolExecutor(jobs) as pool:
        rows = pool.map(run, wanted) if jobs > 1 else (check_here(name, seed) for name in wanted)
        for name, row in zip(wanted, rows, strict=True):
            report(name, row)
            save(name, row)


def check_causality() -> bool:
    inputs = make(1, 4, 2, 700, 64, 64, "key", 0.1, True, False, "bfloat16")
    before, _ = ops.linear_attention(*inputs, 0.125, True, True)
    for x in inputs[:3]:
        assert x is not None
        x[:, :, 333:] = 3.0
    after, _ = ops.linear_attention(*inputs, 0.125, True, True)
    same = torch.equal(before[:, :, :333], after[:, :, :333])
    return same and not torch.equal(before[:, :, 333:], after[:, :, 333:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="checks by name, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run checks at the same time")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checks: dict[str, Any] = {}
    result = {"command": " ".join(sys.argv), "versions": versions(), "seed": options.seed, "checks": checks}
    wanted = options.only.split(",") if options.only else [*CHECKS, *VARLEN, *BIDIRECTIONAL]
    unknown = set(wanted) - {*CHECKS, *VARLEN, *BIDIRECTIONAL}
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")

    def write() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    def keep(name: str, row: dict[str, Any]) -> None:
        checks[name] = row
        write()

    print("seed", options.seed, flush=True)
    check(wanted, options.seed, options.jobs, keep)
    if not options.only:
        result["causal"] = check_causality()
        print("causal:", result["causal"], flush=True)
    write()
    ok = all(row["ok"] for row in checks.values()) and result.get("causal", True)
    print("ALL RIGHT" if ok else "SOMETHING IS WRONG")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
