"""Attention transfer: every linear site learns to give what its softmax site gave, all sites from one teacher forward.

The teacher's graph is instrumented: beside each softmax site stands the student's module on the same q, k, v and
hidden states. Running it costs one teacher forward; at each site the student's output, its relative squared error
and its gradients are computed at once and freed, so memory stays that of one site. (The output-matching stage of
LoLCATs, arXiv 2410.10254, and LAWCAT, arXiv 2509.18467, with a relative error instead of a scaled one.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LincompileError
from ..linearization.methods import HALF_LIVES, LinearMethod, mixed
from ..program import Program
from .calibrate import calibrate
from .data import Ahead, Batches
from .instrument import TrainingGraph, add_stage, beside, run_of
from .loop import LoopOptions, LoopReport, Part, Progress, train
from .pieces import Pieces
from .regions import Compiled
from .spread import total
from .weights import check_weights, weights_loss

ALONE = 0.1  # weight of the linear attention's own error beside a softmax window
LOSSES = ("mse", "weights", "both")


@dataclass(frozen=True)
class Transfer(LoopOptions):
    """Options of attention transfer, beside those of every stage.

    Args:
        rate: peak learning rate of feature maps, convolutions and output scales.
        gate_rate: peak learning rate of the gates' projections.
        bias_rate: peak learning rate of the gates' biases, which set half-lives and have far to go.
        loss: what is minimised at each site: "mse", the output's relative squared error; "weights", the cross-entropy
            of the attention weights (hedgehog and lawcat; takes longer, by the window's length over the values'
            width); or "both", their sum.
        calibration: windows on which to measure where the teacher's heads look, for untrained gates to start with
            half-lives that fit (0: they start alike).
        longest: half-life in tokens of the slowest feature with which such gates start; farther than the training
            windows for students that must remember farther.
    """

    rate: float = 1e-2
    gate_rate: float = 3e-2
    bias_rate: float = 3e-1
    loss: str = "mse"
    calibration: int = 4
    longest: float = HALF_LIVES[-1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise LincompileError(f"--transfer-loss {self.loss}: the choice is {', '.join(LOSSES)}")
        if not self.longest > HALF_LIVES[0]:
            raise LincompileError(f"Transfer(longest={self.longest}): the slowest feature halves in over 64 tokens")

    def rate_of(self, name: str) -> float:
        """Peak rate of a parameter, by its name within its attention module."""
        if name.endswith("gate.bias"):
            return self.bias_rate
        return self.gate_rate if name.startswith(("gate", "beta", "mix")) else self.rate


@dataclass
class TransferReport(LoopReport):
    """What a run did. ``before`` and ``after`` map site paths to relative errors ‖student − teacher‖² / ‖teacher‖²."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


class _SiteError(nn.Module):
    """One site's (relative error, what to minimise): the same, but beside a softmax window.

    There the linear attention must also give the output by itself: where only the mixture is asked for, the window
    does all the work and the linear part learns nothing (arXiv 2510.05901). With ``softmax`` (the site's kind, window,
    scale and softcap) the attention weights are compared, and the first operands are the softmax's own q and k.
    """

    def __init__(self, branch: LinearMethod, loss: str, softmax: tuple[Any, ...]) -> None:
        super().__init__()
        self.branch, self.loss, self.softmax = branch, loss, softmax

    def forward(self, wanted: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        scores: tuple[Tensor, ...] = ()
        if self.loss != "mse":
            scores, operands = operands[:2], operands[2:]
        far, near, shares = self.branch.parts(*operands)
        error = relative_error(mixed(far, near, shares), wanted)
        loss = error if near is None else error + ALONE * relative_error(far, wanted)
        if not scores or not torch.is_grad_enabled():
            return error, loss
        weights = weights_loss(self.branch, self.softmax, *scores, *operands)
        if self.loss == "both":
            return error, loss + weights
        return error, weights if near is None else error + weights  # the shares learn from the output alone


class _Compare(nn.Module):
    """Computes one site's relative error; it also adds ``learning`` times the gradients to the module's."""

    def __init__(self, branch: LinearMethod, loss: str, softmax: tuple[Any, ...]) -> None:
        super().__init__()
        site = _SiteError(branch, loss, softmax)
        # a block of weights after another would be a long graph to compile
        self.site: nn.Module = Compiled(site) if loss == "mse" else site
        self.learning = 0.0

    def forward(self, wanted: Tensor, *operands: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.learning > 0):
            error, loss = self.site(wanted, *operands)
            if self.learning > 0:
                (loss * self.learning).backward()
        result: Tensor = error.detach()
        return result


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """‖got − wanted‖² / ‖wanted‖² as a float32 (or float64) scalar; inside ``spread`` this rank's share of it."""
    wide = torch.promote_types(wanted.dtype, torch.float32)
    difference = (got.to(wide) - wanted.to(wide)).square().sum()
    return difference / total(wanted.to(wide).square().sum()).clamp(min=1e-12)


class Errors:
    """The relative error of every rewritten site, from one teacher forward.

    Args:
        loss: what ``learn`` minimises, as ``Transfer.loss``.
    """

    def __init__(self, teacher: Program, student: Program, loss: str = "mse") -> None:
        self.comparisons: list[_Compare] = []
        softmax = {site.path: tuple(site.node.args[4:8]) for site in teacher.sites if site.node is not None}

        def wrap(path: str, branch: LinearMethod) -> nn.Module:
            if loss != "mse":
                check_weights(branch, path)
            self.comparisons.append(_Compare(branch, loss, softmax[path]))
            return self.comparisons[-1]

        self.graph: TrainingGraph = beside(teacher, student, wrap, with_scores=loss != "mse")

    @property
    def branches(self) -> dict[str, LinearMethod]:
        return self.graph.branches

    def learn(self, tokens: Tensor, share: float, compiled: bool) -> Tensor:
        """Errors ``[sites]`` on windows ``[B, T]``; adds ``share`` times the gradients to the modules'."""
        return self(tokens, share, compiled)

    def __call__(self, tokens: Tensor, learn: float = 0.0, compiled: bool = False) -> Tensor:
        """Errors ``[sites]`` on windows ``[B, T]``; also adds ``learn`` times the gradients to the modules'."""
        for comparison in self.comparisons:
            comparison.learning = learn
        with torch.no_grad():
            losses = self.graph(tokens.to(self.graph.device), compiled)
        assert isinstance(losses, tuple)
        return total(torch.stack([loss.double() for loss in losses]))

    def by_path(self, tokens: Tensor) -> dict[str, float]:
        """Errors by site path, window by window so that memory doesn't grow with their number."""
        mean = torch.stack([self(window[None]).cpu() for window in tokens]).mean(0)
        return dict(zip(self.branches, mean.tolist(), strict=True))


def transfer(
    teacher: Program,
    student: Program,
    data: Batches,
    options: Transfer = Transfer(),
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    measure_windows: int = 4,
    note: Callable[[str], None] = warnings.warn,
) -> TransferReport:
    """Trains the student's linear sites in place.

    Args:
        teacher: the proved program, all sites softmax (the student was made from it).
        student: the rewritten program; only the parameters of its ``lincompile_attention`` modules change.
        data: token windows.
        checkpoint: file that the run saves itself to, and continues from if it exists.
        note: told when compiled code is left aside because it computes something else, and when memory runs out and
            the windows of a step are taken in smaller groups.

    Returns:
        A report with per-site errors on held-out windows before and after.

    Raises:
        LincompileError: nothing to distil, a loss that isn't finite, or a checkpoint of another run.
    """
    if options.calibration and options.steps and (checkpoint is None or not checkpoint.exists()):
        calibrate(teacher, student, data.step(0)[: options.calibration], options.longest)
    errors = Errors(teacher, student, options.loss)
    parts = [
        Part(path, dict(branch.named_parameters()), {n: options.rate_of(n) for n, _ in branch.named_parameters()})
        for path, branch in errors.branches.items()
    ]
    held_out = data.measure(measure_windows)
    report = TransferReport()
    identity = run_of("transfer", data.fingerprint(), student, teacher if checkpoint is not None else None)
    if checkpoint is None or not checkpoint.exists():
        report.before = errors.by_path(held_out)
        _check_errors(report.before, "before any training: the weights or activations hold NaN or inf")

    parameters = [parameter for part in parts for parameter in part.parameters.values()]
    compile = options.compiles(errors.graph.device)
    if compile:
        errors.graph.divide()
    pieces = Pieces(errors.learn, parameters, compile=compile, replay=options.replays, report=report, note=note)

    with Ahead(data.step) as ahead:

        def losses_of(step: int) -> tuple[Tensor, int]:
            tokens = ahead(step)
            return pieces(tokens, step), tokens.numel()

        train(parts, losses_of, options, checkpoint=checkpoint, identity=identity, report=report, progress=progress)
    add_stage(student, identity, options.decisive())
    report.after = errors.by_path(held_out)
    _check_errors(report.after, "after training: lower the learning rate")
    return report


def _check_errors(errors: dict[str, float], when: str) -> None:
    bad = [path for path, value in errors.items() if not value < float("inf")]
    if bad:
        raise LincompileError(f"the error at '{bad[0]}' isn't finite {when}")
