"""Trains a program, a linearized module and an opened artefact under DDP or FSDP2; prints the losses as JSON.

``python wrapped.py STORE RANK WORLD WRAP FORM [ARTEFACT]``: each rank reads its rows of one batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lincompile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from nano import build

STEPS = 3


def make(form: str, artefact: str = "") -> nn.Module:
    """The same model in one of three forms."""
    if form == "artefact":
        from lincompile.hf import from_pretrained

        return from_pretrained(artefact).requires_grad_(True)
    model, example = build(), torch.zeros(2, 9, dtype=torch.long)
    if form == "module":
        lincompile.linearize_(model, "lawcat", example=example)
        return model
    passes = [lincompile.Canonicalize(), lincompile.ProveAttention(), lincompile.LinearizeAttention("lawcat")]
    return lincompile.Pipeline(passes)(lincompile.capture(model, example)).graph_module


def logits(result: Any) -> Tensor:
    """What each form returns its logits in."""
    found: Tensor = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    return result[0] if found is None else found


def train(model: nn.Module, rank: int = 0, world: int = 1, vocabulary: int = 256) -> list[float]:
    """An ordinary loop: the mean loss over all ranks at each step."""
    tokens = torch.randint(0, vocabulary, (4, 17), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        found = logits(model(tokens[:, :-1]))
        loss = nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def wrapped(model: nn.Module, wrap: str, world: int) -> nn.Module:
    """``model`` under DistributedDataParallel or FSDP2, on the CPU."""
    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))


def main(store: str, rank: int, world: int, wrap: str, form: str, artefact: str = "") -> None:
    """One rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = make(form, artefact)
    names = list(model.state_dict())
    losses = train(wrapped(model, wrap, world), rank, world, 40 if artefact else 256)
    same = [name.removeprefix("module.") for name in model.state_dict()] == names
    if rank == 0:
        print(
            json.dumps(
                {"losses": losses, "names": same, "sharded": any("full_tensor" in dir(p) for p in model.parameters())}
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
