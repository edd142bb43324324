"""Cutting a batch into slices, one per rank, and the loss of a slice."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.sequence_parallel.op import process_group
from ..errors import LincompileError, RefusedError
from ..program import Program

IGNORED = -100  # the label that no loss counts


def shard_batch(
    inputs: Mapping[str, Tensor],
    rank: int,
    world: int,
    labels: Tensor | None = None,
    *,
    multiple: int = 1,
    program: Program | None = None,
) -> dict[str, Tensor]:
    """One rank's slice of a batch, padded at the end to equal slices.

    Args:
        inputs: tensors ``[B, T, …]`` by name; a name with "mask" is padded with zeros (ones, where the program reads 1
            as padding), "position" by counting on, the others by repeating the last token.
        labels: ``[B, T]`` next-token labels; token t is trained to predict ``labels[:, t + 1]``, so labels are shifted
            *before* they are cut: the last token of a slice predicts the first of the next. Padding gets −100.
        multiple: slices are as long as a multiple of it (2 for ``SequenceParallel(balance=True)``).
        program: what will read the slices; needed where a batch must be padded that has no padding mask, because a
            bidirectional model would read the padding, or one (``key_padding_mask``) whose 1 may say padding.

    Returns:
        The slices, and ``labels`` (already shifted: use them without shifting again) where labels were given.

    Raises:
        LincompileError: fewer tokens than ranks, inputs of different lengths, or padding that a model would read.
    """
    lengths = {name: value.shape[1] for name, value in inputs.items()}
    length = next(iter(lengths.values()))
    if labels is not None:
        lengths["labels"] = labels.shape[1]
    if odd := [name for name, found in lengths.items() if found != length]:
        raise LincompileError(f"shard_batch: '{odd[0]}' has {lengths[odd[0]]} tokens, '{next(iter(lengths))}' {length}")
    if not 0 <= rank < world:
        raise LincompileError(f"shard_batch: there is no rank {rank} among {world} (they are counted from 0)")
    if length < world:
        raise LincompileError(
            f"shard_batch: a sequence of {length} tokens can't be cut over {world} ranks; use fewer ranks, or longer "
            "sequences"
        )
    size = -(-length // (world * multiple)) * multiple
    missing = size * world - length
    limit = program.max_positions if program is not None else None
    if limit is not None and size * world > limit:
        padded = f", padded to {size * world} for {world} ranks," if missing else ""
        raise LincompileError(f"shard_batch: {length} tokens{padded} are more than the model's {limit} positions")
    if missing and not any("mask" in name for name in inputs):
        _check_padding(program, length, world * multiple)
    result: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if missing:
            extra = value[:, -1:].expand(-1, missing, *value.shape[2:])
            if "mask" in name:
                extra = torch.full_like(extra, _padding_value(program, name))
            elif "position" in name:
                extra = extra + torch.arange(1, missing + 1, device=value.device)
            value = torch.cat([value, extra], 1)
        result[name] = value[:, rank * size : (rank + 1) * size].contiguous()
    if labels is not None:
        ignored = labels.new_full((labels.shape[0], missing + 1), IGNORED)
        shifted = torch.cat([labels[:, 1:], ignored], 1)
        result["labels"] = shifted[:, rank * size : (rank + 1) * size].contiguous()
    return result


def _padding_value(program: Program | None, name: str) -> int:
    """What a padding mask holds for a padded token."""
    known = next((item for item in program.inputs if item.name == name), None) if program is not None else None
    if known is not None and known.problem:
        raise RefusedError(f"shard_batch: {known.problem}")
    if known is not None and known.inverted is not None:
        return int(known.inverted)
    if "pad" in name:
        raise LincompileError(
            f"shard_batch: 1 in '{name}' may say padding or a real token: give program=…, its attention proved, which "
            "says what it reads there"
        )
    return 0


def _check_padding(program: Program | None, length: int, multiple: int) -> None:
    """Padding at the end is invisible to causal attention, and to nothing else."""
    what = f"shard_batch: {length} tokens aren't a multiple of {multiple}, and the inputs hold no padding mask; "
    if program is None:
        raise LincompileError(what + "give the mask, or program=… so that a causal model can be padded without one")
    reading = [site.path for site in program.sites if site.kind == "full"]
    if reading:
        raise LincompileError(what + f"the bidirectional attention at '{reading[0]}' would read the padding")


def sequence_loss(logits: Tensor, labels: Tensor, group: str | None = None) -> Tensor:
    """This rank's share of the mean cross-entropy; the shares of all ranks add up to the whole batch's.

    Args:
        logits: ``[B, T, V]`` of this rank's slice.
        labels: ``[B, T]`` from ``shard_batch`` (already shifted; −100 isn't counted).
        group: name of the ranks' process group; the default one if None.

    The gradient of a parameter is the *sum* over ranks of what ``backward()`` leaves. (DDP and FSDP average: multiply
    the share by the number of sequence-parallel ranks there.)
    """
    import torch.distributed as dist

    count = (labels != IGNORED).sum()
    dist.all_reduce(count, group=process_group(group) if group else None)
    total = functional.cross_entropy(
        logits.flatten(0, -2).float() if logits.dtype != torch.float64 else logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return total / count.clamp(min=1)
