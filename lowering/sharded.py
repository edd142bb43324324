"""Running on several ranks under torchrun: the process group, programs on slices, prefill that decodes anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.sequence_parallel.group import gather, process_group
from ..passes.canonicalize import Canonicalize
from ..passes.errors import LincompileError, RefusedError
from ..passes.identity import ProveAttention
from ..passes.inputs import beyond_text, model_values
from ..passes.pipeline import Pipeline
from ..passes.program import Program
from ..passes.shard import SequenceParallel, shard_batch
from ..passes.sharding.step import shard_step
from ..passes.stateful import StepProgram
from .evaluation.perplexity import LogitsOf, logits_of_program
from .generate import Session

TIMEOUT = 600.0  # seconds that a rank waits for the others
TIMEOUT_VARIABLE = "LINCOMPILE_SHARD_TIMEOUT"


@dataclass(frozen=True)
class Ranks:
    """This process among those that ``torchrun`` started."""

    rank: int
    world: int
    device: str

    shared: bool = False

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of a number over all ranks, on every rank."""
        import torch.distributed as dist

        if not self.shared:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        """Until all ranks have come here."""
        import torch.distributed as dist

        if self.shared:
            dist.barrier()


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """Joins the process group that torchrun set up: gloo for ``cpu``, NCCL for ``cuda`` (one GPU a rank).

    Raises:
        LincompileError: not started by torchrun, or another rank ended or stopped answering while this one waited for
            it (``LINCOMPILE_SHARD_TIMEOUT`` seconds, 600 by default).
    """
    import torch.distributed as dist

    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LincompileError(
            "--shard sp runs in several processes: start it with torchrun --nproc-per-node N -m lincompile …"
        )
    seconds = timeout()
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise LincompileError(f"--shard sp: the ranks don't find one another: {error}") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, shared=True)
    except LincompileError:
        raise
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise LincompileError(
            f"--shard sp: rank {dist.get_rank()} lost the others: one of them ended, or didn't answer within "
            f"{seconds:g} s; its own message says why ({str(error).splitlines()[0].split('. ')[0]})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def timeout() -> float:
    """Seconds that a rank waits for the others, from the environment."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise LincompileError(f"{TIMEOUT_VARIABLE}={text}: write a number of seconds, such as 600")
    return seconds


def _lost(error: RuntimeError) -> bool:
    """Whether an error comes from the process group: gloo and NCCL raise plain RuntimeErrors too."""
    import torch.distributed as dist

    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "socket")
    return isinstance(error, dist.DistError) or any(word in text for word in words)


class ShardedSession(Session):
    """A session whose long chunks are read by all ranks together; decoding is each rank's own.

    Every rank must make the same calls. A chunk of t tokens is cut into W slices; where W doesn't divide t, the first
    t mod W tokens are read by every rank alone. States are the whole sequence's on every rank, so after the prefill any
    one of them can go on with ``alone``.

    Args:
        step: the step program, the same on every rank.
        every_token: return the logits of all tokens of a chunk (for perplexity), not of its last alone.
    """

    def __init__(
        self,
        step: StepProgram,
        options: SequenceParallel | None = None,
        *,
        vocab_size: int | None = None,
        every_token: bool = False,
    ) -> None:
        import torch.distributed as dist

        options = options or SequenceParallel()
        self.group, self.world = options.resolve()
        self.rank = dist.get_rank(process_group(self.group))
        self.sharded = shard_step(step, options)
        self.multiple = self.world * (2 if options.balance else 1)
        self.every_token = every_token
        super().__init__(step, vocab_size=vocab_size)

    @property
    def alone(self) -> Session:
        """The same program on this rank only."""
        return Session(self.program, vocab_size=self.vocab_size)

    def advance(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk; see ``StepSession``. Without gradients."""
        length = tokens.shape[1]
        head = length % self.multiple
        if length < self.multiple:
            return super().advance(tokens, positions, mask, states)
        parts = []
        if head:
            logits, states = super().advance(tokens[:, :head], positions[:, :head], mask[:, :head], states)
            parts.append(logits)
        size = (length - head) // self.world
        mine = slice(head + self.rank * size, head + (self.rank + 1) * size)
        on = self.device
        with torch.no_grad():
            slices = [item[:, mine].to(on) for item in (tokens, positions, mask)]
            logits, new = self.sharded(slices[0], slices[1], slices[2], states)
        states = [self.program.trim(spec, state) for spec, state in zip(self.states, new, strict=True)]
        if not self.every_token:
            return gather(logits[:, -1:], self.world, self.group)[-1], states
        gathered = gather(logits, self.world, self.group).transpose(0, 1).flatten(1, 2)
        return torch.cat([*parts, gathered], 1), states

    @cached_property
    def _last(self) -> Session | None:
        """None: a rank computes the logits of its whole slice, and what is gathered is the last token's already."""
        return None


def logits_of_slices(program: Program) -> LogitsOf:
    """As ``logits_of_program``: each rank runs its slice of a window and yields that slice's logits.

    Sums over tokens are then sums over ranks (``perplexity(add_up=…)``).

    Raises:
        RefusedError: the program can't be split, or isn't a language model.
    """
    import torch.distributed as dist

    if unknown := beyond_text(program):
        raise RefusedError(f"perplexity needs a language model: this one takes '{unknown[0]}'")
    sharded = Pipeline([Canonicalize(), ProveAttention(), SequenceParallel()])(program)
    rank, world, alone = dist.get_rank(), dist.get_world_size(), logits_of_program(program)

    def logits_of(tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        length = tokens.shape[1]
        if length < world:
            yield from alone(tokens) if rank == 0 else ()
            return
        part = shard_batch(model_values(program, tokens), rank, world, program=program)
        size = next(iter(part.values())).shape[1]
        with torch.no_grad():
            logits = sharded(**part)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        yield rank * size, logits[:, : max(0, length - rank * size)]

    return logits_of
