"""The stages of distillation in order, fitted to a budget: transfer, layer choice, logits, logits at greater length."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LincompileError
from ..linearize import MODULE_PREFIX
from ..program import Program
from ..quantization.embeddings import unknown_token, vocabulary
from .choose import Choice, choose
from .data import Batches, TokenWindows
from .echo import WithEchoes, check_share
from .instrument import STAGES
from .logits import LogitDistillation, LogitReport, distil_logits, lora_rank
from .loop import LoopOptions
from .retrieval import Needles, WithRetrieval, check_stretch
from .spread import current
from .transfer import Transfer, TransferReport, transfer

TRANSFER_SHARE = 0.35
CHOICE_WINDOWS = 4
UNLIMITED = 1 << 30

Stage = TypeVar("Stage", bound=LoopOptions)


@dataclass(frozen=True)
class Extension:
    """Logit distillation at greater length, after that at the ordinary one and as its continuation.

    Args:
        length: tokens per window; a step takes as many tokens as the stage before.
        share: of the whole budget.
        retrieval: share of the windows that are retrieval examples (needs ``needles``).
        needles: what those are made of.
        stretch: as how many of itself each token between their facts counts, at most (``WithRetrieval.stretch``).
        emphasis: weight of what those ask for (``LogitDistillation.emphasis``).
        rates: of the stage before, times this.
        steps: where no budget is given.
    """

    length: int
    share: float = 0.15
    retrieval: float = 0.0
    needles: Needles | None = None
    emphasis: float = 10.0
    rates: float = 0.3
    steps: int = 20
    stretch: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and 0 <= self.retrieval <= 1 and self.rates > 0):
            raise LincompileError("the extension needs a share between 0 and 1, retrieval from 0 to 1 and rates > 0")
        check_stretch(self.stretch, self.retrieval)
        if self.retrieval and self.needles is None:
            raise LincompileError(
                "retrieval examples are made of needles: give Extension(needles=Needles.from_spans(…))"
            )
        if self.retrieval and self.needles is not None and self.length < (least := self.needles.shortest()):
            raise LincompileError(
                f"--extend {self.length}: a retrieval example takes {least} tokens or more; give a greater length"
            )


@dataclass(frozen=True)
class Recipe:
    """What to do with the text.

    Args:
        train: what logit distillation trains after the transfer: "none" (no such stage), "full" or "lora:R".
        keep: how many sites the layer choice sets back to softmax (0 = no choice).
        tokens: budget in tokens; seconds: budget in time. With two stages the transfer gets 35% of either, and what
            an extension gets is taken from both.
        length, batch: tokens per window and windows per step.
        echoes: share of the windows that repeat spans of themselves, in every stage that trains.
        transfer, logits, extension: the stages' options; their ``steps`` count where no budget is given.
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
    echoes: float = 0.0
    transfer: Transfer = field(default_factory=Transfer)
    logits: LogitDistillation = field(default_factory=LogitDistillation)
    extension: Extension | None = None

    def __post_init__(self) -> None:
        check_share(self.echoes)
        if self.extension is not None and self.train == "none":
            raise LincompileError("--extend trains on the teacher's logits: add --train lora:R or --train full")
        if self.extension is not None and self.extension.length <= self.length:
            raise LincompileError(
                f"--extend {self.extension.length} isn't longer than the windows of {self.length} before"
            )
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
    extension: LogitReport | None = None

    def record(self) -> dict[str, Any]:
        """JSON-able; the transfer's numbers at the top."""
        later = {"choice": self.choice, "logits": self.logits, "extension": self.extension}
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
    documents: Tensor | None = None,
    checkpoint: Path | None = None,
    listener: Listener | None = None,
) -> Distilled:
    """Runs the stages.

    Args:
        student: rewritten everywhere if the recipe chooses layers; changed in place.
        ids: the text's token ids ``[N]``.
        relinearize: a fresh student with these sites (indices) kept softmax.
        documents: where each document begins in ``ids`` (None: all is one).
        checkpoint: file of the transfer; the later stages save themselves beside it, with ``.logits`` and
            ``.extension`` appended.

    Raises:
        LincompileError: tokens that the model doesn't know; and see the stages.
    """
    tell = listener or Listener()
    began = time.monotonic()
    check_tokens(teacher, ids)
    if recipe.extension is not None:  # now, not after hours of the stages before
        check_stretch(recipe.extension.stretch, recipe.extension.retrieval, (site.method for site in student.sites))
        if recipe.extension.needles is not None:
            check_tokens(teacher, recipe.extension.needles.tokens())
    data = TokenWindows(ids, recipe.length, recipe.batch, recipe.seed, documents=documents, multiple=_ranks())
    if documents is not None and len(documents) > 1:
        tell.note(data.summary())
    shares = _shares(recipe)
    first = _budgeted(recipe.transfer, recipe, shares[0], recipe.seconds, recipe.length)
    if not shares[0]:
        first = dataclasses.replace(recipe.transfer, steps=0, seconds=None)  # only measured

    def progress(what: str) -> Callable[[int, int, float, float], None]:
        return lambda step, total, loss, rate: tell.advance(step, total, f"{what} {loss:.3f}, {rate:,.0f} tokens/s")

    def echoing(windows: TokenWindows) -> Batches:
        return WithEchoes(windows, recipe.echoes, recipe.seed) if recipe.echoes else windows

    windows = echoing(data)
    moved = transfer(
        teacher, student, windows, first, checkpoint=checkpoint, progress=progress("relative error"), note=tell.note
    )
    result = Distilled(student, moved)
    if recipe.keep:
        tell.stage("choose layers")
        held_out = data.measure(CHOICE_WINDOWS)
        result.choice = choose(
            teacher, student, held_out, recipe.keep, lambda done, total: tell.advance(done, total, "sites measured")
        )
        result.student = with_branches_of(student, relinearize(result.choice.kept))
    if recipe.train == "none":
        return result

    def later(
        name: str, data: Batches, options: LogitDistillation, share: float, rest: float, length: int
    ) -> LogitReport:
        """A stage that gets ``share`` of what is left, of which ``rest`` is for it and those after it."""
        # a resumed run's earlier stages took their time in another process
        spent = max(time.monotonic() - began, moved.seconds + (result.logits.seconds if result.logits else 0.0))
        left = None if recipe.seconds is None else max(recipe.seconds - spent, 0.0) / rest
        return distil_logits(
            teacher,
            result.student,
            data,
            _budgeted(options, recipe, share, left, length),
            checkpoint=None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{name}"),
            progress=progress("KL"),
            note=tell.note,
        )

    tell.stage("distil logits")
    options = dataclasses.replace(recipe.logits, train=recipe.train)
    windows = echoing(dataclasses.replace(data, seed=recipe.seed + 1))
    result.logits = later("logits", windows, options, shares[1], shares[1] + shares[2], recipe.length)
    if recipe.extension is not None:
        tell.stage("extend length")
        extension = recipe.extension
        options = dataclasses.replace(options.scaled(extension.rates), steps=extension.steps)
        longer: Batches = echoing(_longer(ids, documents, recipe, extension, tell))
        if extension.retrieval:
            assert extension.needles is not None
            longer = WithRetrieval(longer, extension.needles, extension.retrieval, recipe.seed, extension.stretch)
            options = dataclasses.replace(options, emphasis=extension.emphasis)
        result.extension = later("extension", longer, options, shares[2], shares[2], extension.length)
    return result


def check_tokens(program: Program, ids: Tensor) -> None:
    """Raises ``LincompileError`` where a text holds tokens that the program's embedding has no row for."""
    rows = vocabulary(program)
    if rows is not None and (wrong := unknown_token(ids, rows)) is not None:
        raise LincompileError(
            f"the text holds token {wrong}, the model knows 0 to {rows - 1}: another model's tokenizer made it"
        )


def _shares(recipe: Recipe) -> tuple[float, float, float]:
    """Of the budget: the transfer's, the logits' and the extension's."""
    if recipe.train == "none":
        return 1.0, 0.0, 0.0
    last = recipe.extension.share if recipe.extension is not None else 0.0
    first = TRANSFER_SHARE if recipe.start == "transfer" else 0.0
    return first * (1 - last), (1 - first) * (1 - last), last


def _ranks() -> int:
    """How many ranks share each window."""
    together = current()
    return 1 if together is None else together.world


def _longer(
    ids: Tensor, documents: Tensor | None, recipe: Recipe, extension: Extension, tell: Listener
) -> TokenWindows:
    """The extension's windows."""
    batch = max(1, recipe.batch * recipe.length // extension.length)
    data = TokenWindows(ids, extension.length, batch, recipe.seed + 2, documents=documents, multiple=_ranks())
    longest = data.sizes[0].size
    if longest <= recipe.length:
        raise LincompileError(
            f"--extend {extension.length}: no document of the text is longer than the windows of {recipe.length} before"
        )
    tell.note(f"extension: {data.summary()}")
    return data


def with_branches_of(trained: Program, fresh: Program) -> Program:
    """Gives the attention modules of ``fresh`` the weights they have in ``trained`` (which may have more of them)."""
    source = dict(trained.graph_module.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.graph_module.named_parameters():
            if name.startswith(MODULE_PREFIX):
                parameter.copy_(source[name])
    fresh.metadata[STAGES] = trained.metadata.get(STAGES, [])
    return fresh


def _budgeted(options: Stage, recipe: Recipe, share: float, seconds: float | None, length: int) -> Stage:
    """The stage's options with its share of the budget; ``seconds`` is what all stages would have."""
    limit = None if seconds is None else seconds * share
    if recipe.tokens is not None:
        rows = max(1, recipe.batch * recipe.length // length)
        return dataclasses.replace(
            options, steps=max(1, round(recipe.tokens * share) // (rows * length)), seconds=limit
        )
    return options if limit is None else dataclasses.replace(options, steps=UNLIMITED, seconds=limit)
