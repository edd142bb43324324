"""``lincompile.compile``: the whole pipeline, top to bottom."""

from __future__ import annotations

import tempfile
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.canonicalize import Canonicalize
from ..passes.capture import capture, from_exported
from ..passes.distil.data import TokenWindows
from ..passes.distil.instrument import model_inputs
from ..passes.distil.transfer import Transfer, TransferReport, transfer
from ..passes.errors import LincompileError, RefusedError
from ..passes.formats.load import load_model
from ..passes.formats.loaded import LoadedModel, check_finite
from ..passes.identity import ProveAttention
from ..passes.linearize import LinearizeAttention, parse_keep
from ..passes.methods import METHODS, method_class
from ..passes.pipeline import Pipeline
from ..passes.program import Program
from ..passes.quantize import Quantize, parse_plan
from ..passes.stateful import StepProgram, make_full, make_stateful
from .generate import Session
from .package import Artefact, open_artefact, save
from .text import read_tokens

TARGETS = ("eager", "triton", "onnx")
CALIBRATION_BATCHES = 4


class Reporter:
    """What the compiler tells while it works; the CLI draws it, the default is silent."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int, text: str) -> None:
        """The current stage got to ``done`` of ``total``."""

    def note(self, text: str) -> None:
        """A remark the user should see."""


@dataclass(frozen=True)
class Options:
    """What was asked for; the same names as the CLI's options (see ``lincompile --help``)."""

    attn: str = "lawcat"
    quant: str = "none"
    keep_softmax: str | None = None
    rewrite_sliding: bool = False
    distil: Any = None
    tokens: int | None = None
    time: float | None = None
    length: int | None = None
    batch: int | None = None
    adapter: str | None = None
    target: str = "eager"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Raises ``LincompileError`` for a value that no model could satisfy, before anything is loaded."""
        if self.attn not in (*METHODS, "softmax"):
            method_class(self.attn)
        parse_plan(self.quant)
        if self.keep_softmax is not None and parse_keep(self.keep_softmax)[2]:
            raise RefusedError(
                "--keep-softmax auto:N isn't built yet: name the sites (0,5,9) or a number of evenly spaced ones (6)"
            )
        if self.target not in TARGETS:
            raise LincompileError(f"--target {self.target}: the targets are {', '.join(TARGETS)}")
        if self.attn == "softmax" and self.distil is not None:
            raise LincompileError("--distil trains linear attention; with --attn softmax there is nothing to train")

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        values = (
            asdict(self) if not isinstance(self.distil, Tensor) else asdict(Options(**{**vars(self), "distil": None}))
        )
        values["distil"] = (
            self.distil if self.distil is None or isinstance(self.distil, str) else type(self.distil).__name__
        )
        return values


@dataclass
class Compiled:
    """A compiled model.

    Attributes:
        program: the rewritten, quantized graph (whole sequences; trains like any module).
        teacher: the proved softmax program it came from (its weights are the source model's).
        step: the stateful form, ``step(tokens, positions, mask, *states)``; for bidirectional models the
            whole-sequence form without states.
        transfer: what distillation did (None where it wasn't asked for).
        notes: remarks, the honest ones included.
    """

    program: Program
    teacher: Program
    step: StepProgram
    loaded: LoadedModel
    options: Options
    transfer: TransferReport | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _artefact: Artefact | None = field(default=None, repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def sites(self) -> list[Any]:
        return self.program.sites

    @property
    def session(self) -> Session:
        """The torch runtime of the step program."""
        return Session(self.step)

    def manifest(self) -> dict[str, Any]:
        """What the artefact's ``lincompile.json`` records about how it was made."""
        return {
            "source": {
                "name": Path(self.loaded.source).name,
                "format": self.loaded.format,
                "sha256": self.loaded.source_hash,
                "task": self.loaded.task,
            },
            "causal": self.step.causal,
            "options": self.options.record(),
            "passes": self.program.history,
            "sites": [site.record() for site in self.program.sites],
            "quantization": self.program.metadata.get("quantization"),
            "distillation": asdict(self.transfer) if self.transfer else None,
            "metrics": {"step_max_error": self.step.max_error, "seconds": self.seconds},
            "parameters": self.teacher.parameters,
            "config": self.loaded.config,
            "notes": self.notes,
            "seed": self.options.seed,
        }

    def save(
        self,
        directory: Path | str,
        *,
        extra: Callable[[Path], None] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes the artefact folder, whole or not at all; ``metrics`` are added to the manifest's.

        Raises:
            ArtefactError: the folder holds something else or can't be written.
        """
        manifest = self.manifest()
        manifest["metrics"] |= dict(metrics or {})

        def more(folder: Path) -> None:
            if self.options.target == "onnx":
                from .onnx.export import export_onnx

                ends = list(self.loaded.eos_token_ids)
                report = export_onnx(
                    self.step, folder / "onnx", special_tokens={"eos_token_id": ends} if ends else None
                )
                self.notes += report.notes
            if extra:
                extra(folder)

        return save(
            self.step,
            directory,
            manifest=manifest,
            tokenizer=self.loaded.tokenizer,
            eos_ids=self.loaded.eos_token_ids,
            extra=more,
        )

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int = 64, **options: Any) -> str | list[int]:
        """The prompt and its continuation, text for text and token ids for token ids (see ``lincompile.open``)."""
        if self._artefact is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lincompile-")
            self._artefact = open_artefact(self.save(Path(self._folder.name) / "artefact"), verify=False)
        return self._artefact.generate(prompt, max_new_tokens, **options)


def compile(
    model: str | Path | nn.Module,
    *,
    example: Any = None,
    builder: str | None = None,
    trust: bool = False,
    reporter: Reporter | None = None,
    transfer_options: Transfer | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Compiled:
    """Compiles a model: capture, canonicalise, prove, rewrite, distil, quantize, make stateful.

    Args:
        model: an ``nn.Module``, or anything the CLI takes as MODEL.
        example: inputs for an ``nn.Module`` whose inputs can't be inferred.
        builder: ``module:function`` that builds the module of a bare state dict.
        trust: allow code that the model file brings along to run.
        checkpoint: file that distillation saves itself to and resumes from.
        options: ``attn``, ``quant``, ``keep_softmax``, ``distil`` (a text file, token ids, or ``hf:name``),
            ``tokens``, ``time`` (seconds), ``length``, ``batch``, ``target``, ``device``, ``dtype``, ``seed``: as in
            the CLI.

    Raises:
        LincompileError: anything that can't be done as asked; nothing is ever done silently instead.
    """
    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        raise LincompileError(
            f"compile has no option '{sorted(unknown)[0]}'; the options are: {', '.join(Options.__dataclass_fields__)}"
        )
    asked = Options(**options)
    asked.check()
    say = reporter or Reporter()
    times: dict[str, float] = {}
    notes: list[str] = []

    with _timed(say, times, "load"):
        loaded = load_model(
            model, model=builder, example=example, trust=trust, dtype=getattr(torch, asked.dtype), device=asked.device
        )
        check_finite(loaded.module, loaded.prefix)
        notes += loaded.notes
    with _timed(say, times, "capture"):
        program = capture_loaded(loaded)
        notes += program.notes
    with _timed(say, times, "prove"):
        teacher = Pipeline([Canonicalize(), ProveAttention()])(program)
    with _timed(say, times, "rewrite"):
        student = rewrite(teacher, asked)
    with _timed(say, times, "distil"):
        report, ids = distil(teacher, student, loaded, asked, say, transfer_options, checkpoint)
        if report is not None:
            for site in student.sites:
                site.details |= {
                    "error_before": report.before.get(site.path),
                    "error_after": report.after.get(site.path),
                }
        elif any(site.method != "softmax" for site in student.sites):
            notes.append("not distilled: linear attention without training is far from the teacher; add --distil FILE")
    with _timed(say, times, "make stateful"):
        step = deployable(student, notes)
    if asked.quant != "none":
        with _timed(say, times, "quantize"):
            student = quantize(student, asked, ids)
            step = redeployed(student, step)
    for remark in notes:
        say.note(remark)
    return Compiled(student, teacher, step, loaded, asked, report, notes, times)


def capture_loaded(loaded: LoadedModel) -> Program:
    """The program of a loaded model; an exported one keeps its own graph."""
    if loaded.exported is not None:
        program = from_exported(loaded.exported, prefix=loaded.prefix, example=loaded.example)
    else:
        program = capture(loaded.module, loaded.example)
    bounds = [n for n in (program.max_positions, loaded.max_positions) if n is not None]
    program.max_positions = min(bounds) if bounds else None
    return program


def rewrite(teacher: Program, asked: Options) -> Program:
    """A copy of the program with its sites rewritten; refuses when a request for linear attention changes nothing."""
    student = teacher.clone()
    if asked.attn == "softmax":
        return student
    if not student.sites:
        raise RefusedError(
            "the model has no softmax attention, so there is nothing to rewrite; "
            "quantize it alone with --attn softmax --quant int6"
        )
    indices, count, _ = parse_keep(asked.keep_softmax) if asked.keep_softmax else ((), 0, 0)
    pass_ = LinearizeAttention(asked.attn, keep=indices, count=count, sliding=asked.rewrite_sliding, seed=asked.seed)
    student = Pipeline([pass_])(student)
    if not any(site.method != "softmax" for site in student.sites):
        first = student.sites[0]
        raise RefusedError(
            f"no attention site can be rewritten to {asked.attn}: {first.path}: {first.reason}"
            + (
                f" (and {len(student.sites) - 1} more; 'lincompile inspect' lists them)"
                if len(student.sites) > 1
                else ""
            )
        )
    return student


def distil(
    teacher: Program,
    student: Program,
    loaded: LoadedModel,
    asked: Options,
    say: Reporter,
    transfer_options: Transfer | None,
    checkpoint: Path | None,
) -> tuple[TransferReport | None, Tensor | None]:
    """Attention transfer on the text asked for; returns its report and the text's token ids."""
    if asked.distil is None:
        return None, None
    on_gpu = asked.device != "cpu"
    limit = teacher.max_positions or 1 << 30
    length = min(asked.length or (1024 if on_gpu else 256), limit)
    batch = asked.batch or (16 if on_gpu else 1)
    ids = read_tokens(asked.distil, loaded.tokenizer)
    data = TokenWindows(ids, length, batch, asked.seed)
    steps = max(1, asked.tokens // (batch * length)) if asked.tokens else (transfer_options or Transfer()).steps
    if asked.time and not asked.tokens:
        steps = 1 << 30
    base = transfer_options or Transfer()
    chosen = Transfer(**{**vars(base), "steps": steps, "seconds": asked.time or base.seconds})

    def progress(step: int, total: int, loss: float, rate: float) -> None:
        say.advance(step, total, f"relative error {loss:.3f}, {rate:,.0f} tokens/s")

    return transfer(teacher, student, data, chosen, checkpoint=checkpoint, progress=progress), ids


def quantize(student: Program, asked: Options, ids: Tensor | None) -> Program:
    """Quantizes the program's linear layers as asked, calibrated on the distillation text where there is one."""
    if asked.quant == "none":
        return student
    calibration = None
    if ids is not None:
        length = min(256, student.max_positions or 256, ids.numel())
        windows = [
            ids[i * length : (i + 1) * length][None].to(asked.device)
            for i in range(min(CALIBRATION_BATCHES, ids.numel() // length))
        ]
        names = [item.name for item in student.inputs]
        calibration = [dict(zip(names, model_inputs(student, window), strict=True)) for window in windows]
    return Pipeline([Quantize(asked.quant, calibration=calibration)])(student)


def deployable(student: Program, notes: list[str]) -> StepProgram:
    """The step form, or the whole-sequence form where the model isn't causal."""
    if any(site.node is not None and site.kind == "full" for site in student.sites) or not student.sites:
        notes.append("bidirectional or attention-free model: the artefact runs whole sequences, without states")
        return make_full(student)
    try:
        return make_stateful(student)
    except RefusedError as error:
        notes.append(f"{error}; the artefact runs whole sequences, without states")
        return make_full(student)


def redeployed(student: Program, checked: StepProgram) -> StepProgram:
    """The same form as ``checked``, of the program that has since been quantized.

    The check compares chunks with the full forward to rounding, which rounded activations amplify without bound;
    quantization exchanges linear layers, each of which sees one token at a time, so the float program's proof holds.
    """
    if not checked.causal:
        return make_full(student)
    step = make_stateful(student, check=False)
    step.max_error = checked.max_error
    return step


class _timed:
    """Announces a stage and notes how long it took."""

    def __init__(self, say: Reporter, times: dict[str, float], name: str) -> None:
        self.say, self.times, self.name = say, times, name

    def __enter__(self) -> None:
        self.say.stage(self.name)
        self.started = clock.monotonic()

    def __exit__(self, *_: object) -> None:
        self.times[self.name] = round(clock.monotonic() - self.started, 2)
