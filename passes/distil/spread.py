"""Distillation on ranks that share each window: every rank runs its slice of the tokens (sequence parallelism).

Inside ``spread`` the training graphs are given slices, their token-mixing ops exchange what ``sharding/sites.py`` says,
errors and divergences are shares that add up to the whole window's, and the loop adds up gradients. What is learned is
what one device would learn, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...kernels.sequence_parallel.group import process_group, rank_in
from ..errors import LincompileError, RefusedError
from ..linearization.methods import LinearMethod
from ..program import Program
from ..shard import Sharder, splittable
from ..sharding.sites import Eager, Slices
from ..stepping.offsets import continue_positions, sequence_symbol


@dataclass(frozen=True)
class Spread:
    """The ranks that share each window."""

    group: str
    world: int

    @property
    def rank(self) -> int:
        """This one."""
        return rank_in(self.group)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a number over ranks (no gradient passes)."""
        import torch.distributed as dist

        result = value.detach().clone()
        dist.all_reduce(result, group=process_group(self.group))
        return result


_current: Spread | None = None


@contextmanager
def spread(program: Program, group: str, world: int) -> Iterator[Spread]:
    """Shares the windows of everything distilled inside over the ranks of a process group.

    Raises:
        RefusedError: the program can't be split over its tokens, and why.
    """
    global _current
    splittable(program)
    before, fuse = _current, LinearMethod.fuse
    _current, LinearMethod.fuse = Spread(group, world), False  # features and convolutions as ops that can be split
    try:
        yield _current
    finally:
        _current, LinearMethod.fuse = before, fuse


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank runs whole windows by itself, as on one device."""
    global _current
    before, _current = _current, None
    try:
        yield
    finally:
        _current = before


def current() -> Spread | None:
    """The ranks that share the windows now; None on one device."""
    return _current


def cut(value: Tensor) -> Tensor:
    """This rank's slice of ``[B, T, …]``; all of it on one device.

    Raises:
        LincompileError: T isn't a multiple of the number of ranks.
    """
    if _current is None:
        return value
    length = value.shape[1]
    if length % _current.world:
        raise LincompileError(
            f"windows of {length} tokens can't be cut over {_current.world} ranks: give a --length that is a multiple"
        )
    size = length // _current.world
    return value[:, _current.rank * size : (_current.rank + 1) * size].contiguous()


def total(value: Tensor) -> Tensor:
    """The sum of every rank's share; the value itself on one device."""
    return value if _current is None else _current.total(value)


def share_of_mean(value: Tensor) -> Tensor:
    """A slice's mean as its share of the window's mean."""
    return value if _current is None else value / _current.world


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every rank gets the sum of the ranks' gradients."""
    if _current is None:
        return
    import torch.distributed as dist

    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=process_group(_current.group))


def start_alike(parameters: Iterable[nn.Parameter]) -> None:
    """Every rank starts from the first one's parameters."""
    if _current is None:
        return
    import torch.distributed as dist

    group = process_group(_current.group)
    for parameter in parameters:
        dist.broadcast(parameter.detach(), dist.get_global_rank(group, 0), group=group)


def agreed(done: float, device: torch.device) -> float:
    """The first rank's number: clocks differ, and all must stop at the same step."""
    if _current is None:
        return done
    import torch.distributed as dist

    group = process_group(_current.group)
    value = torch.tensor([done], dtype=torch.float64, device=device)
    dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
    return float(value)


def writes() -> bool:
    """Whether this rank is the one that writes files."""
    return _current is None or _current.rank == 0


def shift_positions(program: Program, tokens: str) -> None:
    """Lets a training graph that counts positions itself count from the slice's start."""
    if _current is None:
        return
    node = program.placeholder(tokens)
    offset = Sharder(program, node, Slices(_current.group, _current.world)).offset
    continue_positions(program, sequence_symbol(node), offset)


def exchanging() -> AbstractContextManager[Any]:
    """Inside, the ops that mix tokens see the whole window."""
    return nullcontext() if _current is None else _Exchanging(_current)


class _Exchanging(TorchFunctionMode):
    """Puts the sharded formulas in place of ``torch.ops.lincompile`` calls, in graphs and modules alike."""

    def __init__(self, ranks: Spread) -> None:
        super().__init__()
        self.slices = Slices(ranks.group, ranks.world)
        self.make = Eager()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).removesuffix(".default")
        if name == "lincompile.linear_attention":
            return self.slices.linear(self.make, *args, **kwargs or {})
        if name == "lincompile.gated_delta":
            return self.slices.delta(self.make, *args, **kwargs or {})
        if name == "lincompile.short_conv":
            return self.slices.convolution(self.make, *args, **kwargs or {})
        if name == "lincompile.softmax_attention":
            q, k, v, real, kind, window, *options = args
            if kind == "sliding":
                return self.slices.window(self.make, q, k, v, real, (None, None, None), window, options)
            return self.slices.softmax(self.make, q, k, v, real, kind, options)
        if name in ("lincompile.hedgehog_features", "lincompile.softmax_attention_step"):
            raise RefusedError(f"{name} has no form over several ranks")
        return func(*args, **kwargs or {})
