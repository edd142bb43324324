"""Ways to split a sequence over ranks, in one harness: bytes and messages measured, larger clusters computed.

    python benchmarks/sequence_parallel.py [--ranks 2,4] [--length 512] [-o benchmarks/results/sequence_parallel.json]

Measured: one attention layer, forward and backward, on gloo ranks of this machine, every output and gradient compared
with one device's; what each rank receives is counted where it is received. Computed: a cost model of training steps on
8 to 128 GPUs and 128K to 4M tokens (``sequence_parallel_model.py``), beside the figures that LASP-2 publishes
(``sequence_parallel_published.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sequence_parallel_model import A100, H200, METHODS, Cluster, Model, crossover, scan_seconds
from sequence_parallel_peers import Wire, lasp1, ring_attention, ulysses
from sequence_parallel_published import compared
from torch import Tensor
from versions import versions

from lincompile.kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from lincompile.passes.sharding.sites import Eager, Slices

ops = torch.ops.lincompile
BATCH, HEADS, KV_HEADS, DIM, SCALE = 1, 8, 4, 32, 0.125
TOLERANCE = 1e-4  # float32, relative to the largest value
Method = Callable[..., Tensor]


class Overheard(Wire):
    """Counts what lincompile's own chain receives through ``dist.recv``."""

    def overhearing(self, receive: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.received(1, tensor.nbytes)
            return receive(tensor, *args, **kwargs)

        return counted


def problem(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(BATCH, heads, length, DIM, generator=generator)

    return {
        "q": random(HEADS),
        "k": random(KV_HEADS),
        "v": random(KV_HEADS),
        "decay": -torch.rand(BATCH, KV_HEADS, length, DIM, generator=generator) / 8,
        "weight": random(HEADS),
    }


def linear_here(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    out: Tensor = ops.linear_attention(q, k, v, decay, None, SCALE, True, False)[0]
    return out


def softmax_here(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    out: Tensor = ops.softmax_attention(q, k, v, None, "causal", 0, SCALE, 0.0)
    return out


def methods(rank: int, world: int) -> dict[str, tuple[Method, Method, Wire | None]]:
    """name → (on slices, on one device, what counts its messages; None: the profiler)."""
    group, make = dist.group.WORLD.group_name, Eager()
    chain, ring, heads = (Wire(rank, world) for _ in range(3))

    def gated(scan: int) -> Method:
        slices = Slices(group, world, scan=scan)
        return lambda q, k, v, g: slices.linear(make, q, k, v, g, None, SCALE, True, False)[0]

    def gathered(balance: bool) -> Method:
        slices = Slices(group, world, balance)
        return lambda q, k, v, g: slices.softmax(make, q, k, v, None, "causal", [SCALE, 0.0])

    found: dict[str, tuple[Method, Method, Wire | None]] = {
        "LASP-2 (gathered states)": (gated(0), linear_here, None),
        "pipelined scan, 4 pieces": (gated(4), linear_here, Overheard(rank, world)),
        "LASP-1 (chain of states)": (lambda q, k, v, g: lasp1(q, k, v, g, SCALE, chain), linear_here, chain),
        "Ring Attention (softmax)": (lambda q, k, v, g: ring_attention(q, k, v, SCALE, ring), softmax_here, ring),
        "gathered keys (softmax, LASP-2H)": (gathered(False), softmax_here, None),
        "gathered keys, head-tail balance": (gathered(True), softmax_here, None),
    }
    if HEADS % world == 0:
        found["Ulysses (softmax)"] = (lambda q, k, v, g: ulysses(q, k, v, SCALE, heads), softmax_here, heads)
    return found


def run_rank(rank: int, world: int, length: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    results = {name: measure(*method, length, rank, world) for name, method in methods(rank, world).items()}
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def measure(part: Method, whole: Method, wire: Wire | None, length: int, rank: int, world: int) -> dict[str, Any]:
    """One layer, forward and backward: errors against one device, bytes and messages received, seconds."""
    values = problem(length)
    names = [name for name in values if name != "weight"]
    size = length // world
    mine = slice(rank * size, (rank + 1) * size)
    one = {name: values[name].clone().requires_grad_() for name in names}
    wanted = whole(*one.values())
    (wanted * values["weight"]).sum().backward()
    many = {name: values[name][:, :, mine].clone().requires_grad_() for name in names}
    dist.barrier()
    receive = dist.recv
    if isinstance(wire, Overheard):
        dist.recv = wire.overhearing(receive)
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        got = part(*many.values())
        (got * values["weight"][:, :, mine]).sum().backward()
    seconds = time.perf_counter() - started
    dist.recv = receive
    error = _error(wanted[:, :, mine], got)
    for name in names:
        grad, full = many[name].grad, one[name].grad
        assert (grad is None) == (full is None), name
        if grad is not None and full is not None:
            error = max(error, _error(full[:, :, mine], grad))
    if not error < TOLERANCE:
        raise SystemExit(f"rank {rank}: a method differs from one device by {error:.2g}")
    messages, received = (wire.messages, wire.bytes) if wire is not None else functional_traffic(profile, world)
    return {"error": error, "messages": messages, "bytes": received, "seconds": round(seconds, 4)}


def _error(wanted: Tensor, got: Tensor) -> float:
    return float((wanted - got).detach().abs().max() / wanted.detach().abs().max())


def functional_traffic(profile: torch.profiler.profile, world: int) -> tuple[int, int]:
    """(collectives, bytes received) of functional collectives on float32 tensors."""
    messages = received = 0
    for event in profile.events():
        library, _, name = event.name.partition("::")
        if library not in ("_c10d_functional", "_c10d_functional_autograd") or not event.input_shapes:
            continue
        elements = math.prod(event.input_shapes[0])
        share = {
            "all_gather_into_tensor": (world - 1) * elements,
            "reduce_scatter_tensor": elements * (world - 1) // world,
            "all_to_all_single": elements,
        }.get(name)
        if share is not None:
            messages, received = messages + 1, received + 4 * share
    return messages, received


def measured(worlds: list[int], length: int) -> dict[str, Any]:
    """By ranks and method: the largest over ranks of everything."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            torch.multiprocessing.start_processes(
                run_rank, args=(world, length, folder), nprocs=world, start_method="fork"
            )
            ranks = [json.loads(Path(folder, f"{world}-{rank}.json").read_text()) for rank in range(world)]
            results[str(world)] = {
                name: {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]} for name in ranks[0]
            }
    return results


def computed() -> dict[str, Any]:
    """Seconds per training step and what LASP-2 gains, by cluster, ranks and length; and where the scan wins."""
    model = Model()
    steps: dict[str, Any] = {}
    for cluster in (A100, H200):
        for world in (8, 16, 32, 64, 128):
            for length in (131_072, 524_288, 2_097_152, 4_194_304):
                seconds = {name: step(cluster, model, world, length) for name, step in METHODS.items()}
                steps[f"{cluster.name}, {world} ranks, {length // 1024}K"] = {
                    name: None if math.isinf(value) else round(value, 4) for name, value in seconds.items()
                }
    return {
        "clusters": {cluster.name: asdict(cluster) for cluster in (A100, H200)},
        "model": asdict(model) | {"state_bytes": model.state},
        "seconds_per_step": steps,
        "against_published": compared(),
        "scan": {cluster.name: scan_table(cluster) for cluster in (A100, H200)},
    }


def scan_table(cluster: Cluster) -> list[dict[str, Any]]:
    """By state size: milliseconds of gather and scan at 64 and 256 ranks, and from how many ranks the scan wins."""
    rows = []
    for megabytes in (0.13, 1, 4, 16, 64):
        state = megabytes * 1e6
        row: dict[str, Any] = {"state_megabytes": megabytes, "scan_wins_from_ranks": crossover(cluster, state)}
        for world in (64, 256):
            seconds, pieces = scan_seconds(cluster, state, world)
            row[f"{world} ranks"] = {
                "gather_ms": round(1e3 * cluster.gather(state, world), 3),
                "scan_ms": round(1e3 * seconds, 3),
                "pieces": pieces,
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="process counts to measure, such as 2,4,8")
    parser.add_argument("--length", type=int, default=512, help="tokens of the whole sequence")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    worlds = [int(text) for text in options.ranks.split(",")]
    if any(options.length % (2 * world) for world in worlds):
        parser.error("--length must be a multiple of twice every number of ranks")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shape = {"batch": BATCH, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "length": options.length}
    result = {
        "versions": versions(),
        "measured": {"what": "gloo ranks on one CPU, float32, one layer forward and backward", "shape": shape}
        | {"received_by_one_rank": measured(worlds, options.length)},
        "computed": computed(),
    }
    text = json.dumps(result, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    for world, rows in result["measured"]["received_by_one_rank"].items():
        print(f"measured, {world} ranks, {options.length} tokens (most of any rank)")
        for name, row in rows.items():
            print(f"  {name:34} {row['messages']:4} messages {row['bytes']:12,} bytes  error {row['error']:.1e}")
    for length, rows in result["computed"]["against_published"]["gains_on_64_a100"].items():
        print(f"computed, LASP-2's gain at {length} tokens on 64 A100s")
        for name, row in rows.items():
            if isinstance(row, dict):
                print(f"  {name:72} published {row['published']:.3f}  computed {row['with_fixed']:.3f}")


if __name__ == "__main__":
    main()
