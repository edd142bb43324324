"""Tunes the stored numbers of a quantized program end to end, so that its outputs come closer to the float model's.

Rounding methods look at one layer at a time. Here all layers learn together what the float program says about the next
token: the loss is the forward KL(float ‖ quantized) over all positions, with activations rounded as they will be.
``scales`` trains the group scales of the packed layers (as in the second phase of arXiv 2407.11062) and the vectors
left in float (norm weights, biases); ``codes`` also the codes, each through a latent that begins at the code and moves
by Adam in units of the scale, so that only a gradient of one sign over many steps makes it another (a straight-through
estimator, as in arXiv 2305.17888). What is stored has the same form and size as before: nothing is added at run time.

Memory beside both models and the activations of one step: for ``codes`` 16 bytes per quantized weight (the latent, its
gradient, and Adam's two moments), for ``scales`` 16 per group. Products run in bfloat16 on a GPU, in float32 on a CPU;
divergences that are reported and compared are always measured in full precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distil.divergence import divergence
from ..distil.instrument import TrainingGraph, checksum, unpadded, weights_checksum
from ..distil.loop import LoopOptions, LoopReport, Part, Progress, train
from ..distil.pieces import Pieces
from ..distil.recipe import UNLIMITED
from ..errors import LincompileError
from ..inputs import model_values
from ..program import Program
from .sensitivity import Batch, frozen, is_logits, real_tokens
from .tuned_layers import Precision, find_parts, learn_by, store

MODES = ("scales", "codes")
_CHECKS = 6  # measurements of the held-out divergence during a run
_HELD_OUT, _MOST_HELD_OUT = 8, 32  # one batch in so many, and at most so many
# A latent that follows noise alone ends about a ninth of a code from where it began, hardly ever at another code.
_WALK = 0.18
# Of the divergence, what the first step of scales and vectors would take away if it were linear in them.
_FIRST = 0.25
_FASTEST = 2e-3  # relative, per step
_USUAL = 300  # steps that a run of unknown length is taken to have


@dataclass(frozen=True)
class TuneOptions(LoopOptions):
    """How to tune, beside the options of every training loop.

    Args:
        mode: ``scales`` or ``codes``.
        batch: calibration batches per step.
        rate: of the peak learning rates, a multiple of those that are chosen. For codes that is as much as noise
            allows in so many steps; for scales and vectors it follows from the first step's gradient, since many of
            them add up to a larger change.
    """

    mode: str = "codes"
    batch: int = 8
    seed: int = 0
    rate: float = 1.0
    compile: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise LincompileError(f"quantize: unknown tuning '{self.mode}'; the choices are {', '.join(MODES)}")
        if self.batch < 1 or not self.rate > 0:
            raise LincompileError("quantize: tuning needs at least one batch per step, and a rate above 0")

    def tokens(self, length: int) -> int:
        """Tokens that a run of ``steps`` reads, the held-out ones included, where batches have ``length`` tokens."""
        training = self.steps * self.batch
        return length * (training + max(1, min(training // (_HELD_OUT - 1), _MOST_HELD_OUT)))


def options_for(
    mode: str,
    steps: int | None = None,
    seconds: float | None = None,
    batch: int = 8,
    rate: float = 1.0,
    seed: int = 0,
) -> TuneOptions:
    """Options as ``Quantize`` has them: 200 steps without a budget, and as many as fit where only time is limited."""
    count = steps if steps is not None else TuneOptions.steps if seconds is None else UNLIMITED
    return TuneOptions(mode=mode, steps=count, seconds=seconds, batch=batch, rate=rate, seed=seed)


@dataclass
class TuneReport(LoopReport):
    """What a run did; divergences in nats per token on held-out batches.

    ``measured``: (step, divergence) during the run; ``best``: the state of the lowest one.
    """

    before: float = 0.0
    measured: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def tune(
    teacher: Program,
    student: Program,
    weights: Collection[str],
    batches: Sequence[Batch],
    options: TuneOptions,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tune a quantized program in place; the last batches, one in eight, are held out.

    Args:
        teacher: what is learnt from: the program before quantization, or the one that it was converted from.
        student: the quantized program, with the same inputs.
        weights: dotted names of the quantized weights that may change.
        batches: inputs by name, at least two of them.
        checkpoint: file that the run saves itself to and continues from.

    Returns:
        The report. ``kept`` is False where no measured state diverged less on the held-out batches than before: the
        program is as it was then, and ``note`` says so. ``notes`` tell of smaller pieces where memory ran out.

    Raises:
        LincompileError: a teacher of other inputs or outputs, too few batches, a loss that isn't finite (the program is
            as it was), or a checkpoint of another run.
    """
    if len(batches) < 2:
        raise LincompileError(
            "quantize: tuning needs at least two batches of text, of which one is held out: give more text"
        )
    count = max(1, min(len(batches) // _HELD_OUT, _MOST_HELD_OUT))
    tuner = _Tuner(teacher, student, weights, batches[:-count], batches[-count:], options)
    try:
        report = tuner.run(checkpoint, progress)
    except LincompileError as error:
        raise LincompileError(
            f"quantize: tuning stopped, and the codes are as they were: {error} (quantize without tune, or tune with a"
            " lower rate)"
        ) from error
    return tuner.finish(report)


class _Tuner:
    def __init__(
        self,
        teacher: Program,
        student: Program,
        weights: Collection[str],
        training: Sequence[Batch],
        held_out: Sequence[Batch],
        options: TuneOptions,
    ) -> None:
        self.teacher, self.student, self.options = teacher, student, options
        self.training, self.held_out = training, held_out
        self.precision = Precision()
        self.held_out_tokens = 0
        self.rates: dict[str, float] = {}
        self.parts = find_parts(student, weights, options.mode == "codes", self.precision)
        if not self.parts.linears:
            raise LincompileError("quantize: there is no layer to tune: none has been packed that no embedding reads")
        self.device = next(iter(self.parts.linears.values())).scale.device
        self.before = self.parts.state()
        self.exact = student.clone()
        learn_by(self.exact.graph_module, self.parts)
        self.windows = token_windows(student, training)
        if self.device.type == "cuda":  # which short sequences, one at a time, hardly keep busy
            self.held_out = _merged(student, held_out, options.batch)
        if self.windows is None:
            self.models = [TrainingGraph(program.clone(), {}, None) for program in (teacher, student)]
        else:  # nothing is padded: without masks, attention can use fused kernels
            self.models = [unpadded(program) for program in (teacher, student)]
            self.precision.training = torch.bfloat16 if self.device.type == "cuda" else None
        learn_by(self.models[1].graph_module, self.parts)

    def run(self, checkpoint: Path | None, progress: Progress | None) -> TuneReport:
        options, report = self.options, TuneReport()
        if checkpoint is None or not checkpoint.exists():
            report.before = self.measure()
            if not math.isfinite(report.before):
                raise LincompileError("the divergence isn't finite before any step: the model or the text gives NaN")
        parameters = self.parts.parameters()
        losses_of: Callable[[int], tuple[Tensor, int]] = self._by_batches
        if self.windows is not None:
            losses_of = self._by_windows(self.windows, list(parameters.values()), report)
        with self._learning():
            rates = self._rates(parameters, losses_of)

        def after_step(step: int, expected: int, loss: float, rate: float) -> None:
            if progress:
                progress(step, expected, loss, rate)
            if step * _CHECKS // expected > (step - 1) * _CHECKS // expected:
                self._check(report)

        identity: dict[str, Any] = {"stage": "quantize", "codes": checksum(self.before.values())}
        if checkpoint is not None:
            identity["model"] = weights_checksum(self.teacher)
            identity["text"] = checksum(value for batch in (*self.training, *self.held_out) for value in batch.values())
        parts = [Part("the quantized layers", parameters, rates)]
        with self._learning():
            train(
                parts,
                losses_of,
                options,
                checkpoint=checkpoint,
                identity=identity,
                report=report,
                progress=after_step,
            )
        if report.steps and report.steps not in dict(report.measured):
            self._check(report)
        return report

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Gradients for what learns, whatever the caller has switched off, and for nothing else."""
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.teacher), frozen(self.student):
            yield

    def _rates(
        self, parameters: dict[str, nn.Parameter], losses_of: Callable[[int], tuple[Tensor, int]]
    ) -> dict[str, float]:
        """Peak rates by parameter; those of scales and vectors from the gradient of step 0."""
        options = self.options
        known = options.steps < UNLIMITED
        codes = options.rate * _WALK / math.sqrt(max(options.steps, 1) if known else _USUAL)
        scales = options.rate * _FASTEST
        if options.steps:
            losses, _ = losses_of(0)
            slope = sum(
                float(parameter.grad.abs().sum(dtype=torch.float64))
                for name, parameter in parameters.items()
                if parameter.grad is not None and not name.endswith("/latent")
            )
            for parameter in parameters.values():
                parameter.grad = None
            if slope > 0 and math.isfinite(slope):
                scales = options.rate * min(_FASTEST, _FIRST * float(losses.sum()) / slope)
        self.rates = {"codes": codes, "scales": scales} if options.mode == "codes" else {"scales": scales}
        return {name: codes if name.endswith("/latent") else scales for name in parameters}

    def finish(self, report: TuneReport) -> dict[str, Any]:
        """Write the best state, if it is better than what was there, and say what happened."""
        best_step, best = min(report.measured, key=lambda item: item[1], default=(0, math.inf))
        kept = best < report.before
        if kept:
            store(self.student, self.parts, report.best)
        else:
            best_step, best = 0, report.before
        after = report.best if kept else self.before
        names = [name for name in self.before if name.endswith("/codes")]
        found: dict[str, Any] = {
            "mode": self.options.mode,
            "kept": kept,
            "kl": {"before": report.before, "after": best},
            "measured": [list(item) for item in report.measured],
            "best_step": best_step,
            "rates": self.rates,
            "steps": report.steps,
            "tokens": report.tokens,
            "seconds": round(report.seconds, 2),
            "held_out_tokens": self.held_out_tokens,
            "resumed_at": report.resumed_at,
            "notes": report.notes,
            "layers": len(self.parts.linears),
            "vectors": len(self.parts.vectors),
            "codes": sum(self.before[name].numel() for name in names),
            "codes_changed": sum(int((after[name].to(self.device) != self.before[name]).sum()) for name in names),
        }
        if not kept and report.measured:
            lowest = min(value for _, value in report.measured)
            found["note"] = (
                f"tuning didn't lower the divergence on held-out text ({report.before:.5f} nats per token before,"
                f" {lowest:.5f} at best in {report.steps} steps): codes and scales are as they were"
            )
        return found

    @torch.no_grad()
    def measure(self) -> float:
        """Divergence of the student as it stands, in nats per token on the held-out batches, in full precision."""
        total, count = 0.0, 0
        for batch in self.held_out:
            wanted, found = (
                _output(program.graph_module(*self._inputs(batch))) for program in (self.teacher, self.exact)
            )
            loss, tokens = self._loss(batch, found, wanted)
            total, count = total + float(loss) * tokens, count + tokens
        self.held_out_tokens = count
        return total / max(count, 1)

    def _check(self, report: TuneReport) -> None:
        found = self.measure()
        lowest = min((value for _, value in report.measured), default=report.before)
        report.measured.append((report.steps, found))
        if found < min(lowest, report.before):
            report.best = self.parts.state()

    def _chosen(self, step: int) -> list[int]:
        """The batches of a step: a new order each epoch, from the seed and the step alone."""
        rows = min(self.options.batch, len(self.training))
        epoch, position = divmod(step, len(self.training) // rows)
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.training), generator=generator)
        return order[position * rows : (position + 1) * rows].tolist()

    def _by_windows(
        self, windows: list[Tensor], parameters: list[nn.Parameter], report: TuneReport
    ) -> Callable[[int], tuple[Tensor, int]]:
        compile = self.options.compiles(self.device)
        if compile:
            for model in self.models:
                model.divide()

        def learn(tokens: Tensor, share: float, compiled: bool) -> Tensor:
            tokens = tokens.to(self.device)
            with torch.no_grad():
                wanted = _output(self.models[0](tokens, compiled))
            with self.precision.lowered():
                found = _output(self.models[1](tokens, compiled))
            loss = self._mean(found, wanted, compiled)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            return loss.detach()[None]

        def note(text: str) -> None:
            if text not in report.notes:
                report.notes.append(text)

        pieces = Pieces(learn, parameters, compile=compile, replay=self.options.replays, report=report, note=note)

        def losses_of(step: int) -> tuple[Tensor, int]:
            rows = torch.cat([windows[index] for index in self._chosen(step)])
            return pieces(rows, step), rows.numel()

        return losses_of

    def _by_batches(self, step: int) -> tuple[Tensor, int]:
        """One batch after another, each token counting the same."""
        total, count = 0.0, 0
        for batch in (self.training[index] for index in self._chosen(step)):
            inputs = self._inputs(batch)
            with torch.no_grad():
                wanted = _output(self.models[0].graph_module(*inputs))
            loss, tokens = self._loss(batch, _output(self.models[1].graph_module(*inputs)), wanted)
            (loss * tokens).backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.detach()) * tokens, count + tokens
        for parameter in self.parts.parameters().values():
            if parameter.grad is not None:
                parameter.grad /= max(count, 1)
        return torch.tensor([total / max(count, 1)], dtype=torch.float64), count

    def _inputs(self, batch: Batch) -> list[Tensor]:
        return [batch[item.name].to(self.device) for item in self.student.inputs]

    def _loss(self, batch: Batch, found: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
        """Mean divergence over a batch's real tokens, and their number."""
        real = real_tokens(self.teacher, batch, wanted).to(self.device, torch.bool)
        tokens = int(real.sum())
        if tokens < real.numel():
            found, wanted = found[real], wanted[real]
        return self._mean(found, wanted), tokens

    def _mean(self, found: Tensor, wanted: Tensor, compiled: bool = False) -> Tensor:
        if is_logits(self.teacher, wanted):
            return divergence(found, wanted, compiled)
        return (found.float() - wanted.float()).square().sum(dim=-1).mean() / 2


def token_windows(program: Program, batches: Sequence[Batch]) -> list[Tensor] | None:
    """The tokens ``[B, T]`` of each batch, if they are alike in shape and all other inputs are what text alone gives.

    None where anything is padded, or the model takes something else.
    """
    item = program.input_with_role("tokens")
    if item is None:
        return None
    windows = [batch[item.name] for batch in batches]
    if any(window.dim() != 2 or window.shape != windows[0].shape for window in windows):
        return None
    for batch, window in zip(batches, windows, strict=True):
        try:
            plain = model_values(program, window)
        except LincompileError:  # an input that isn't made from tokens
            return None
        if not all(torch.equal(batch[name], value) for name, value in plain.items()):
            return None
    return windows


def _merged(program: Program, batches: Sequence[Batch], count: int) -> Sequence[Batch]:
    """The same windows, ``count`` batches in one, where they can be put together."""
    windows = token_windows(program, batches)
    if windows is None:
        return batches
    joined = [torch.cat(windows[start : start + count]) for start in range(0, len(windows), count)]
    return [model_values(program, tokens) for tokens in joined]


def _output(result: object) -> Tensor:
    """The first floating-point output of a graph."""
    values = result if isinstance(result, (tuple, list)) else (result,)
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


__all__ = ["MODES", "TuneOptions", "TuneReport", "options_for", "tune"]
