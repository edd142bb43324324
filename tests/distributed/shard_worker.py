"""Run under torchrun by test_shard.py: every rank compares its slice of the sharded program with the whole program."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import zoo

import lincompile
from lincompile.passes.program import Program
from lincompile.passes.shard import SequenceParallel, shard_batch

BATCH = 2


def build(name: str, attn: str, keep: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    module, example = zoo.build(name)
    example = {key: value.double() if value.is_floating_point() else value for key, value in example.items()}
    passes = [lincompile.Canonicalize(), lincompile.ProveAttention(), lincompile.LinearizeAttention(attn, keep=keep)]
    return lincompile.Pipeline(passes)(lincompile.capture(module.double().eval(), example))


def batch(program: Program, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    values = {}
    for item in program.inputs:
        if item.role == "mask":
            values[item.name] = torch.ones(BATCH, length, dtype=torch.long)
            values[item.name][0, :3] = 0
        elif item.role == "positions":
            values[item.name] = torch.arange(length).expand(BATCH, length)
        elif item.role == "tokens":
            values[item.name] = torch.randint(0, 90, (BATCH, length), generator=generator)
        else:
            values[item.name] = torch.zeros(BATCH, length, dtype=torch.long)
    return values


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def compare(program: Program, length: int) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = lincompile.Pipeline([SequenceParallel()])(program.clone())
    inputs = batch(program, length)
    parameters = list(program.graph_module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    whole = first(program(**inputs))
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(6), dtype=whole.dtype)
    for name, value in inputs.items():
        if "mask" in name:
            weight = weight * value[:, :, None]  # nobody reads the rows of padded tokens
    wanted = torch.autograd.grad((whole * weight).sum(), parameters, allow_unused=True)
    size = -(-length // world)
    mine = slice(rank * size, min((rank + 1) * size, length))
    with profiled() as forward:
        part = first(sharded(**shard_batch(inputs, rank, world)))[:, : mine.stop - mine.start]
    with profiled() as backward:
        got = torch.autograd.grad((part * weight[:, mine]).sum(), parameters, allow_unused=True)
    output = float(((part - whole[:, mine]) * (weight[:, mine] != 0)).abs().max()) if part.numel() else 0.0
    gradient = 0.0
    for a, b in zip(wanted, got, strict=True):
        if a is None:
            continue
        b = torch.zeros_like(a) if b is None else b.clone()
        dist.all_reduce(b)
        gradient = max(gradient, float((a - b).abs().max() / (a.abs().max() + 1e-3)))
    return {
        "output": output,
        "gradient": gradient,
        "forward_gathers": calls(forward, "all_gather_into_tensor"),
        "backward_gathers": calls(backward, "all_gather_into_tensor"),
        "halo_gathers": calls(forward, "all_gather_into_tensor", "_c10d_functional_autograd"),
        "largest_gather": largest(forward, "all_gather_into_tensor"),
    }


def profiled() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)


def calls(profile: torch.profiler.profile, name: str, library: str = "_c10d_functional") -> int:
    """How many collectives of a kind really ran (the differentiable ones are recorded under their own library)."""
    return sum(event.name == f"{library}::{name}" for event in profile.events())


def largest(profile: torch.profiler.profile, name: str) -> int:
    """Elements that a rank contributes to the largest of them."""
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == f"_c10d_functional::{name}"]
    return max((math.prod(shape) for shape in shapes), default=0)


def main() -> None:
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = []
    for name, attn, keep, length in cases:
        results.append(compare(build(name, attn, tuple(keep)), length))
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
