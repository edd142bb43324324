"""Process groups as graphs refer to them (by name), this process's place in one, and equal slices."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

functional = torch.ops._c10d_functional

_MET: dict[tuple[str, torch.device, tuple[int, ...]], Tensor] = {}


def _leave_default_group() -> None:
    """Has ``torch.distributed.nn`` look the default group up when it's called, as if imported before there was one.

    Its functions have the default group of the moment of their import as default arguments, and dynamo imports them
    whenever it first traces. A group held there outlives ``destroy_process_group`` with its threads, which now and then
    abort the end of the process ("terminate called without an active exception").
    """
    import torch.distributed.nn.functional as functions
    from torch.distributed import ProcessGroup

    for function in vars(functions).values():
        if isinstance(function, FunctionType) and function.__defaults__:
            function.__defaults__ = tuple(
                None if isinstance(default, ProcessGroup) else default for default in function.__defaults__
            )


if torch.distributed.is_available():
    _leave_default_group()


def process_group(group: str) -> Any:
    """The process group of a name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]


def rank_in(group: str) -> int:
    """This process's rank in a process group, by the group's name."""
    from torch.distributed import get_rank

    return get_rank(process_group(group))


def gather(x: Tensor, world: int, group: str) -> Tensor:
    """``[d0, …]`` on each rank → ``[world, d0, …]`` on all, waited for; without gradients."""
    narrow = x.to(torch.uint8) if x.dtype == torch.bool else x
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(narrow.contiguous(), world, group))
    result: Tensor = gathered.view(world, *x.shape)
    return result.bool() if x.dtype == torch.bool else result


@custom_op("lincompile::rank_index", mutates_args=(), schema="(Tensor like, str group) -> Tensor")
def rank_index(like: Tensor, group: str) -> Tensor:
    """This rank, as an int64 scalar tensor on ``like``'s device: graphs stay the same on every rank."""
    return torch.tensor(rank_in(group), dtype=torch.int64, device=like.device)


@rank_index.register_fake
def _(like: Tensor, group: str) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


@custom_op("lincompile::equal_slices", mutates_args=(), schema="(Tensor x, int world, str group) -> Tensor")
def equal_slices(x: Tensor, world: int, group: str) -> Tensor:
    """``x [B, T, …]`` as it is, once all ranks have been seen to hold slices of the same shape.

    Positions and states would be silently wrong otherwise, so every call compares, by an all-reduce of four integers.
    On a GPU only the first call with a shape waits for the answer; later ones leave an assertion on the stream.

    Raises:
        ValueError: the shapes differ, with every rank's. (On a GPU, where the shape isn't new to this rank, the
            stream's assertion fails instead.)
    """
    key = (group, x.device, tuple(x.shape[:2]))
    new = key not in _MET
    if new:
        _MET[key] = torch.tensor(x.shape[:2], dtype=torch.int64, device=x.device)
    mine = _MET[key]
    most = functional.wait_tensor(functional.all_reduce(torch.cat((mine, -mine)), "max", group))
    equal = (most[:2] == -most[2:]).all()
    if x.is_cuda and not new:
        torch._assert_async(equal, "lincompile.equal_slices: slices of different shapes")
    elif not equal:  # on every rank alike
        shapes = enumerate(gather(mine, world, group).tolist())
        listed = ", ".join(f"rank {rank}: {shape}" for rank, shape in shapes)
        raise ValueError(
            f"lincompile.equal_slices: the ranks hold slices of different shapes [B, T] ({listed}); cut the batch "
            "with shard_batch, which makes them equal"
        )
    return x.clone()


@equal_slices.register_fake
def _(x: Tensor, world: int, group: str) -> Tensor:
    return torch.empty_like(x)


def _same(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


equal_slices.register_autograd(_same)
