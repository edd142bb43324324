"""What ranks compare before they trust one another: their programs, and a few tokens' outputs with the whole's."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...kernels.sequence_parallel.op import process_group
from ..errors import RefusedError
from ..graph import tensor_of
from ..inputs import reads_padding
from ..program import Program

TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-2  # bfloat16, float16


def fingerprint(module: GraphModule, inputs: object) -> str:
    """A hash of the graph's code, its inputs, and the name, shape and type of every tensor (not of their values)."""
    digest = hashlib.sha256(module.code.encode())
    digest.update(repr(inputs).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    return digest.hexdigest()


def check_fingerprints(own: str, group: str, world: int) -> None:
    """Compares what the ranks are about to run.

    Raises:
        RefusedError: they differ; the message says which ranks hold another one than rank 0.
    """
    import torch.distributed as dist

    found: list[str | None] = [None] * world
    dist.all_gather_object(found, own, group=process_group(group))
    others = [rank for rank, value in enumerate(found) if value != found[0]]
    if others:
        raise RefusedError(
            f"shard: rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} and rank 0 hold different "
            "programs; start every rank with the same model, options and versions"
        )


def check_shard(program: Program, sharded: Program, group: str, world: int, even: bool) -> float | None:
    """Largest relative difference between slices and the whole program on a few tokens, over all ranks.

    Finds what mixes tokens unseen (positions made by counting a mask, for example) and weights that differ. None where
    there are no weights, or inputs that can't be made up.

    Raises:
        RefusedError: it exceeds ``TOLERANCE``.
    """
    import torch.distributed as dist

    size = (2 if even else 1) * max(1, 8 // world)
    length = size * world
    inputs = None if length > (sharded.max_positions or length) else example(program, length)
    if inputs is None or any(p.is_meta for p in program.graph_module.parameters()):
        return None
    rank = dist.get_rank(process_group(group))
    mine = slice(rank * size, (rank + 1) * size)
    with torch.no_grad():
        whole = program(**inputs)
        part = sharded(**{name: value[:, mine].contiguous() for name, value in inputs.items()})
    whole, part = (value if isinstance(value, Tensor) else value[0] for value in (whole, part))
    wanted = whole[:, mine].double()
    real = torch.ones(wanted.shape[:2], dtype=torch.bool, device=wanted.device)
    for item in program.inputs:
        if item.role == "mask":
            real = real & item.real(inputs[item.name][:, mine])
    difference = (part.double() - wanted)[real]
    largest = difference.abs().max() if difference.numel() else wanted.new_zeros(())
    worst = torch.stack([largest, whole.double().abs().max()])
    worst = torch.nan_to_num(worst, nan=torch.inf)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=process_group(group))
    error = float(worst[0] / worst[1].clamp(min=1e-6))
    limit = TOLERANCE if whole.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    if not error <= limit:
        raise RefusedError(
            f"shard: on slices the model differs from the whole sequence by {error:.2g} (relative): it mixes tokens "
            "somewhere other than its attention, or the ranks hold different weights"
        )
    return error


def example(program: Program, length: int) -> dict[str, Tensor] | None:
    """Two sequences of ``length`` tokens, the first padded on the left where the model takes a mask."""
    generator = torch.Generator().manual_seed(3)
    values: dict[str, Tensor] = {}
    mask = torch.ones(2, length, dtype=torch.bool)
    if reads_padding(program):
        mask[0, : length // 3] = False
    for item in program.inputs:
        given, fake = program.example[item.name], tensor_of(program.placeholder(item.name))
        if item.role in ("mask", "positions"):
            value = item.masking(mask) if item.role == "mask" else (mask.long().cumsum(1) - 1).clamp(min=0)
        elif item.role == "tokens":
            value = torch.randint(0, max(int(given.max()) + 1, 2), (2, length), generator=generator)
        elif item.role == "features":
            value = torch.randn(2, length, *given.shape[2:], generator=generator)
        elif fake.dim() == 2 and not fake.is_floating_point():
            value = torch.zeros(2, length, dtype=torch.int64)  # token types
        else:
            return None
        values[item.name] = value.to(device=given.device, dtype=fake.dtype)
    return values
