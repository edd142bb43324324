"""Logit distillation: the whole student learns the teacher's next-token distribution.

The loss (``divergence.py``) is the forward KL divergence KL(teacher ‖ student) at temperature 1, averaged over the
tokens of windows that both models run from the start; the text's own next token may have a share in it. All of the
student's parameters may learn, or low-rank additions to its linear layers (LoRA, arXiv 2106.09685) together with its
attention modules. Weights and optimizer states stay float32; on a GPU the matrix products run in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import LincompileError
from ..graph import finish, get_attribute, set_tensor
from ..linearization.methods import LinearMethod
from ..linearize import MODULE_PREFIX
from ..program import Program
from .data import Ahead, Batches
from .divergence import divergence
from .echo import from_afar
from .instrument import TrainingGraph, add_stage, first_nonfinite, instead, run_of, unpadded
from .loop import LoopOptions, LoopReport, Part, Progress, train
from .lora import PREFIX as LORA_PREFIX
from .lora import Addition, add_lora, merge_lora
from .packing import packed, unpacked
from .pieces import Pieces
from .regions import Compiled
from .retrieval import WithRetrieval, check_stretch
from .spread import current, cut, exchanging, total


@dataclass(frozen=True)
class LogitDistillation(LoopOptions):
    """Options of logit distillation, beside those of every stage.

    Args:
        rate: peak learning rate of the model's own weights.
        lora_rate: peak learning rate of low-rank additions.
        attention_rate: peak learning rate of the attention modules.
        train: "full", or "lora:R" for low-rank additions of rank R to every linear layer; vectors (norms, biases)
            and the attention modules learn whole either way.
        recompute: keep no activations of the attention modules, compute them again in the backward pass.
        emphasis: weight of tokens that have to be looked up, where others have 1: the answers of retrieval examples,
            or, in batches without any, what followed the same token before (``echo.from_afar``). A handful among
            hundreds, they would hardly be heard.
        cross_entropy: share of the text's own next token in what is learned, beside the teacher's distribution (0: the
            divergence alone; 1: the text alone). Learning from the text makes a student better at text like it than
            its teacher is, which says nothing about its attention: compare it with a softmax model that learned the
            same (the control of ``benchmarks/distil.py``).
    """

    rate: float = 3e-4
    lora_rate: float = 2e-3
    attention_rate: float = 1e-3
    train: str = "full"
    recompute: bool = False
    emphasis: float = 1.0
    cross_entropy: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        lora_rank(self.train)
        if not (self.emphasis > 0 and math.isfinite(self.emphasis)):
            raise LincompileError(f"LogitDistillation(emphasis={self.emphasis}): the weight of answers is above 0")
        if not 0 <= self.cross_entropy <= 1:
            raise LincompileError(f"--cross-entropy {self.cross_entropy:g}: the text's own share is from 0 to 1")

    def rate_of(self, name: str) -> float:
        """Peak rate of a parameter, by its name in the training graph."""
        if name.startswith(MODULE_PREFIX):
            return self.attention_rate
        return self.lora_rate if name.startswith(LORA_PREFIX) else self.rate


def lora_rank(text: str) -> int:
    """0 for "full", R for "lora:R".

    Raises:
        LincompileError: anything else.
    """
    if text == "full":
        return 0
    rank = text.removeprefix("lora:")
    if text.startswith("lora:") and rank.isdecimal() and int(rank) > 0:
        return int(rank)
    raise LincompileError(f"--train {text}: write 'full' or 'lora:R' with a rank such as lora:8")


@dataclass
class LogitReport(LoopReport):
    """What a run did. ``before`` and ``after`` are KL divergences in nats per token on held-out windows."""

    before: float = 0.0
    after: float = 0.0


def logits_of(graph: TrainingGraph, tokens: Tensor, compiled: bool = False, repeats: Tensor | None = None) -> Tensor:
    """The logits ``[B, T, V]`` of a graph, which is called with the rest.

    Raises:
        LincompileError: the graph returns something else.
    """
    result = graph(tokens, compiled, repeats)
    first = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(first, Tensor) or first.dim() != 3 or first.shape[:2] != cut(tokens).shape:
        raise LincompileError("logit distillation needs a model that returns logits for every token; this one doesn't")
    return first


class Distiller:
    """Teacher and student side by side: divergences and gradients of token windows.

    ``stretched``: tokens to learn from say as how many each counts for the student's linear attention.
    """

    def __init__(self, teacher: Program, student: Program, options: LogitDistillation, stretched: bool = False) -> None:
        def wrap(path: str, branch: LinearMethod) -> nn.Module:
            return Recomputed(Compiled(branch)) if options.recompute else Compiled(branch)

        self.teacher = unpadded(teacher)
        self.student = instead(teacher, student, wrap, stretched)
        self.stretched = stretched
        self.emphasis, self.cross_entropy = options.emphasis, options.cross_entropy

    @torch.no_grad()
    def measure(self, windows: Tensor) -> float:
        """KL in nats per token, window by window."""
        values = []
        for window in windows:
            tokens = window[None].to(self.teacher.device)
            share = divergence(logits_of(self.student, tokens), logits_of(self.teacher, tokens))
            values.append(float(total(share)))
        return sum(values) / len(values)

    def learn(self, tokens: Tensor, share: float, compiled: bool = False) -> Tensor:
        """Adds ``share`` times the loss's gradient, for ``tokens`` as ``packed``; returns the loss."""
        tokens, weights, repeats = unpacked(tokens.to(self.teacher.device), self.emphasis, self.stretched)
        weights, following = None if weights is None else cut(weights), None
        if self.cross_entropy:
            following = cut(functional.pad(tokens[:, 1:], (0, 1), value=-1))
        with torch.no_grad():
            wanted = logits_of(self.teacher, tokens, compiled)
        found = logits_of(self.student, tokens, compiled, repeats)
        loss = divergence(found, wanted, compiled, weights, following, self.cross_entropy)
        del found, wanted
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return total(loss.detach())


class Recomputed(nn.Module):
    """A module whose activations aren't kept for the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *operands: Tensor, **named: Any) -> Tensor:
        result: Tensor = recompute(self.module, *operands, use_reentrant=False, context_fn=_contexts, **named)
        return result


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the first run and of the second, in the backward pass, which has left ``exchanging`` behind."""
    return nullcontext(), exchanging()


def distil_logits(
    teacher: Program,
    student: Program,
    data: Batches,
    options: LogitDistillation = LogitDistillation(),
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    measure_windows: int = 8,
    note: Callable[[str], None] = lambda text: None,
) -> LogitReport:
    """Trains the student in place. Parameters it shared with the teacher are copied first: the teacher stays as it is.

    Low-rank additions that the student has already, from an earlier run or an adapter, are trained on.

    Args:
        teacher: the proved program, all sites softmax (the student was made from it).
        student: the rewritten program, usually after attention transfer.
        note: told when memory runs out and the windows of a step are taken in smaller groups.

    Returns:
        A report with the KL on held-out windows before and after.

    Raises:
        LincompileError: nothing to distil, no logits, a loss that isn't finite, a checkpoint of another run, or windows
            to stretch for a method that has no form of it.
    """
    if isinstance(data, WithRetrieval):
        check_stretch(data.stretch, data.share, (site.method for site in student.sites))
    own_parameters(student, teacher)
    before = {p: p.requires_grad for p in student.graph_module.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)  # the loop switches on what it trains
    try:
        return _distil(teacher, student, data, options, checkpoint, progress, measure_windows, note)
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _distil(
    teacher: Program,
    student: Program,
    data: Batches,
    options: LogitDistillation,
    checkpoint: Path | None,
    progress: Progress | None,
    measure_windows: int,
    note: Callable[[str], None],
) -> LogitReport:
    stretched = isinstance(data, WithRetrieval) and data.stretch != 1
    distiller = Distiller(teacher, student, options, stretched)
    rank = lora_rank(options.train)
    additions = _additions(distiller, teacher, student, rank) if rank else []
    trained = {
        name: parameter
        for name, parameter in student.graph_module.named_parameters()
        if parameter.is_floating_point() and (not rank or parameter.dim() == 1 or name.startswith(MODULE_PREFIX))
    }
    trained |= {f"{LORA_PREFIX}.{a.name}.{part}": p for a in additions for part, p in (("up", a.up), ("down", a.down))}
    rates = {name: options.rate_of(name) for name in trained}
    held_out = data.measure(measure_windows)
    report = LogitReport()
    identity = run_of("logits", data.fingerprint(), student, teacher if checkpoint is not None else None)
    if checkpoint is None or not checkpoint.exists():
        report.before = distiller.measure(held_out)
        if not math.isfinite(report.before):
            raise LincompileError("the divergence isn't finite before any training: the weights hold NaN or inf")

    compile = options.compiles(distiller.teacher.device)
    if compile:
        distiller.teacher.divide()
        distiller.student.divide()
    learning = list(trained.values())
    pieces = Pieces(distiller.learn, learning, compile=compile, replay=options.replays, report=report, note=note)

    parts = [Part("the logits", trained, rates)]

    def locate(step: int) -> str:
        if current() is not None:
            return ""  # the slices' exchange isn't set up here
        window = _windows(data, step, options.emphasis)[:1].to(distiller.student.device)
        tokens, _, repeats = unpacked(window, options.emphasis, stretched)
        return first_nonfinite(distiller.student, tokens, repeats)

    try:
        with Ahead(lambda step: _windows(data, step, options.emphasis)) as ahead:

            def losses_of(step: int) -> tuple[Tensor, int]:
                tokens = ahead(step)
                return pieces(tokens, step)[None], tokens.numel()

            train(
                parts,
                losses_of,
                options,
                checkpoint=checkpoint,
                identity=identity,
                report=report,
                progress=progress,
                locate=locate,
            )
        add_stage(student, identity, options.decisive())
        report.after = distiller.measure(held_out)
        if not math.isfinite(report.after):
            raise LincompileError("the divergence isn't finite after training: lower the learning rate")
    finally:
        merge_lora(student, additions)
        student.metadata["low_rank"] = additions
    return report


def _windows(data: Batches, step: int, emphasis: float) -> Tensor:
    """A step's tokens ``[B, T]``, ``packed`` with which of them weigh more and as how many each counts."""
    if isinstance(data, WithRetrieval):
        made = data.made(step)
        return packed(made.tokens, None if emphasis == 1 else made.asked, None if data.stretch == 1 else made.repeats)
    tokens = data.step(step)
    return tokens if emphasis == 1 else packed(tokens, torch.stack([from_afar(row) for row in tokens.tolist()]))


def _additions(distiller: Distiller, teacher: Program, student: Program, rank: int) -> list[Addition]:
    """Low-rank additions to the training graph: those of an earlier stage or an adapter go on from where they are."""
    earlier: list[Addition] = student.metadata.get("low_rank", [])
    if widest := max((addition.up.shape[1] for addition in earlier), default=0):
        if widest > rank:
            raise LincompileError(
                f"--train lora:{rank}: the student has additions of rank {widest}: write lora:{widest}"
            )
        own = dict(teacher.graph_module.named_parameters(remove_duplicate=False))
        for addition in earlier:
            get_attribute(student.graph_module, addition.name).data.copy_(own[addition.name])
    additions = add_lora(distiller.student.graph_module, rank)
    known = {addition.name: addition for addition in earlier}
    with torch.no_grad():
        for addition in additions:
            if (found := known.pop(addition.name, None)) is not None:
                width = found.up.shape[1]
                addition.up[:, :width] = found.up
                addition.down[:width] = found.down
    assert not known, f"additions to what no linear layer reads: {', '.join(known)}"
    return additions


def own_parameters(student: Program, teacher: Program) -> None:
    """Replaces every parameter the student shares with the teacher by a copy; ties within the student stay ties."""
    shared = {id(parameter) for parameter in teacher.graph_module.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in list(student.graph_module.named_parameters(remove_duplicate=False)):
        if id(parameter) in shared:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            set_tensor(student.graph_module, name, copies[id(parameter)])
    finish(student.graph_module)
