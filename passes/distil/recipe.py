"""The stages of distillation in order, fitted to a budget: attention transfer, layer choice, logit distillation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LincompileError
from ..linearize import MODULE_PREFIX
from ..program import Program
from .choose import Choice, choose
from .data import TokenWindows
from .logits import LogitDistillation, LogitReport, distil_logits, lora_rank
from .loop import LoopOptions
from .transfer import Transfer, TransferReport, transfer

TRANSFER_SHARE = 0.35
CHOICE_WINDOWS = 4
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Recipe:
    """What to do with the text.

    Args:
        train: what logit distillation trains after the transfer: "none" (no such stage), "full" or "lora:R".
        keep: how many sites the layer choice sets back to softmax (0 = no choice).
        tokens: budget in tokens; seconds: budget in time. With two stages the transfer gets 35% of either.
        length, batch: tokens per window and windows per step.
        transfer, logits: the stages' options; their ``steps`` count where no budget is given.
        start: "transfer", or "logits" for a student whose projections are no longer the teacher's: attention that is
            fitted to the teacher's own q, k and v would be wrong for it.
    """

    train: str = "none"
    start: str = "transfer"
    keep: int = 0
    tokens: int | None = None
    seconds: float | None = None
    length: int = 256
    batch: int = 1
    seed: int = 0
    transfer: Transfer = field(default_factory=Transfer)
    logits: LogitDistillation = field(default_factory=LogitDistillation)

    def __post_init__(self) -> None:
        if self.train != "none":
            try:
                lora_rank(self.train)
            except LincompileError:
                raise LincompileError(f"--train {self.train}: write none, full, or lora:R such as lora:16") from None
        if self.start == "logits" and self.train == "none":
            raise LincompileError(
                "this student's projections aren't the teacher's (an adapter with low-rank factors was applied), and "
                "attention transfer would undo that: train on with --train lora:R or --train full"
            )


@dataclass
class Distilled:
    """The student after the stages, and what each did (None where it didn't run)."""

    student: Program
    transfer: TransferReport
    choice: Choice | None = None
    logits: LogitReport | None = None

    def record(self) -> dict[str, Any]:
        """JSON-able; the transfer's numbers at the top."""
        later = {"choice": self.choice, "logits": self.logits}
        return asdict(self.transfer) | {name: asdict(part) if part else None for name, part in later.items()}


@dataclass
class Listener:
    """Told what happens: a new stage, the progress within it, a remark."""

    stage: Callable[[str], None] = lambda text: None
    advance: Callable[[int, int, str], None] = lambda done, total, text: None
    note: Callable[[str], None] = lambda text: None


def run_recipe(
    teacher: Program,
    student: Program,
    ids: Tensor,
    recipe: Recipe,
    *,
    relinearize: Callable[[tuple[int, ...]], Program],
    checkpoint: Path | None = None,
    listener: Listener | None = None,
) -> Distilled:
    """Runs the stages.

    Args:
        student: rewritten everywhere if the recipe chooses layers; changed in place.
        ids: the text's token ids ``[N]``.
        relinearize: a fresh student with these sites (indices) kept softmax.
        checkpoint: file of the transfer; logit distillation saves itself beside it, with ``.logits`` appended.

    Raises:
        LincompileError: see the stages.
    """
    tell = listener or Listener()
    began = time.monotonic()
    data = TokenWindows(ids, recipe.length, recipe.batch, recipe.seed)
    share = 1.0 if recipe.train == "none" else TRANSFER_SHARE if recipe.start == "transfer" else 0.0
    first = _budgeted(recipe.transfer, recipe, share, recipe.seconds)
    if not share:
        first = dataclasses.replace(recipe.transfer, steps=0, seconds=None)  # only measured

    def progress(what: str) -> Callable[[int, int, float, float], None]:
        return lambda step, total, loss, rate: tell.advance(step, total, f"{what} {loss:.3f}, {rate:,.0f} tokens/s")

    moved = transfer(teacher, student, data, first, checkpoint=checkpoint, progress=progress("relative error"))
    result = Distilled(student, moved)
    if recipe.keep:
        tell.stage("choose layers")
        windows = data.measure(CHOICE_WINDOWS)
        result.choice = choose(
            teacher, student, windows, recipe.keep, lambda done, total: tell.advance(done, total, "sites measured")
        )
        result.student = with_branches_of(student, relinearize(result.choice.kept))
    if recipe.train != "none":
        tell.stage("distil logits")
        spent = time.monotonic() - began
        left = None if recipe.seconds is None else max(recipe.seconds - spent, 0.0)
        options = dataclasses.replace(recipe.logits, train=recipe.train)
        second = _budgeted(options, recipe, 1 - share, None if left is None else left / (1 - share))
        data = dataclasses.replace(data, seed=recipe.seed + 1)
        result.logits = distil_logits(
            teacher,
            result.student,
            data,
            second,
            checkpoint=None if checkpoint is None else checkpoint.with_name(checkpoint.name + ".logits"),
            progress=progress("KL"),
            note=tell.note,
        )
    return result


def with_branches_of(trained: Program, fresh: Program) -> Program:
    """Gives the attention modules of ``fresh`` the weights they have in ``trained`` (which may have more of them)."""
    source = dict(trained.graph_module.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.graph_module.named_parameters():
            if name.startswith(MODULE_PREFIX):
                parameter.copy_(source[name])
    return fresh


def _budgeted(options: Any, recipe: Recipe, share: float, seconds: float | None) -> Any:
    """The stage's options with its share of the budget."""
    assert isinstance(options, LoopOptions)
    if recipe.tokens is not None:
        steps = max(1, round(recipe.tokens * share) // (recipe.batch * recipe.length))
        return dataclasses.replace(options, steps=steps, seconds=None if seconds is None else seconds * share)
    if seconds is not None:
        return dataclasses.replace(options, steps=UNLIMITED, seconds=seconds * share)
    return options
