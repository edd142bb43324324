"""``lincompile.compile``: the whole pipeline, top to bottom."""

from __future__ import annotations

import tempfile
import time as clock
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.canonicalize import Canonicalize
from ..passes.capture import capture, from_exported
from ..passes.choose_heads import ChooseHeads
from ..passes.distil.adapter import apply_adapter
from ..passes.distil.logits import LogitDistillation
from ..passes.distil.recipe import Distilled, Extension, Listener, Recipe, run_recipe
from ..passes.distil.spread import spread
from ..passes.distil.transfer import Transfer, TransferReport
from ..passes.errors import LincompileError, RefusedError
from ..passes.formats.load import load_model
from ..passes.formats.loaded import LoadedModel, check_finite
from ..passes.half_lives import HalfLives
from ..passes.identity import ProveAttention
from ..passes.inputs import model_values, settle, token_types
from ..passes.linearize import LinearizeAttention, parse_keep
from ..passes.pipeline import Pass, Pipeline
from ..passes.program import Program
from ..passes.quantization.embeddings import unknown_token, vocabulary
from ..passes.quantization.tune import options_for
from ..passes.quantize import Quantize
from ..passes.shard import SequenceParallel
from ..passes.sharding.check import check_fingerprints, fingerprint
from ..passes.split_heads import SplitHeads, named_parts, parse_head_count, parse_heads
from ..passes.stateful import StepProgram, make_full, make_stateful
from ..passes.stepping.offsets import position_limit
from .generate import Session
from .options import Options, Reporter, check_checkpoint, plan_for
from .package import Artefact, open_artefact, save
from .text import Corpus, needles_of, read_corpus, read_tokens
from .triton import lower

CALIBRATION_TOKENS, CALIBRATION_LENGTH = 8192, 512


@dataclass
class Compiled:
    """A compiled model.

    Attributes:
        program: the rewritten, quantized graph (whole sequences; trains like any module).
        teacher: the proved softmax program it came from (its weights are the source model's).
        step: the stateful form, ``step(tokens, positions, mask, *states)``; for bidirectional models the
            whole-sequence form without states.
        distilled: what distillation did, stage by stage (None where it wasn't asked for, or an adapter was applied).
        notes: remarks, the honest ones included.
    """

    program: Program
    teacher: Program
    step: StepProgram
    loaded: LoadedModel
    options: Options
    distilled: Distilled | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _lowered: StepProgram | None = field(default=None, repr=False)
    _artefact: Artefact | None = field(default=None, repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def transfer(self) -> TransferReport | None:
        """What attention transfer did (None where nothing was distilled)."""
        return self.distilled.transfer if self.distilled else None

    @property
    def sites(self) -> list[Any]:
        return self.program.sites

    @property
    def session(self) -> Session:
        """The torch runtime of the step program, with fused ops on a GPU or where ``target="triton"`` asks for them."""
        if self.options.target == "triton" or self.options.device.startswith("cuda"):
            if self._lowered is None:
                self._lowered = lower(self.step, decoding=True)[0]
            return Session(self._lowered, plain=self.step)
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
            "distillation": self.distilled.record() if self.distilled else None,
            "adapter": self.program.metadata.get("adapter"),
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
            if self.options.target == "aot":
                from .aot import export_aot

                export_aot(self.step, folder / "aot")
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
            plain = replace(self, options=replace(self.options, target="eager"))  # no export that nobody reads
            self._artefact = open_artefact(plain.save(Path(self._folder.name) / "artefact"), verify=False)
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
        options: ``attn``, ``quant``, ``keep_softmax``, ``rewrite_sliding``, ``alibi``, ``window``, ``rotary``,
            ``distil`` (a text file, token ids, or ``hf:name``), ``tokens``, ``time`` (seconds), ``train``,
            ``cross_entropy``, ``transfer_loss``, ``extend``, ``retrieval``, ``needles``, ``stretch``, ``echoes``,
            ``adapter``, ``length``, ``batch``, ``target``, ``device``, ``dtype``, ``seed``, ``shard`` (under torchrun,
            after ``init_process_group``): as in the CLI. ``lowest``, the gates' floor, as in ``LinearizeAttention`` (an
            adapter's own is always followed). ``half_lives``, as in the CLI.
            With an adapter and no budget, ``distil`` only calibrates quantization.

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
    check_checkpoint(checkpoint, asked)
    asked = asked.followed()
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
    with _timed(say, times, "prove"):
        teacher = prove(program, asked)
        notes += teacher.notes
    with _timed(say, times, "rewrite"):
        student = rewrite(teacher, asked)
    with _timed(say, times, "distil"):
        student, distilled, ids = distil(teacher, student, loaded, asked, say, transfer_options, checkpoint)
        report = distilled.transfer if distilled else None
        if report is not None:
            for site in student.sites:
                site.details |= {
                    "error_before": report.before.get(site.path),
                    "error_after": report.after.get(site.path),
                }
        elif asked.adapter is None and any(site.method != "softmax" for site in student.sites):
            notes.append("not distilled: linear attention without training is far from the teacher; add --distil FILE")
    if asked.half_lives != 1:
        student = Pipeline([HalfLives(asked.half_lives)])(student)
    with _timed(say, times, "make stateful"):
        step = deployable(student, notes)
    if asked.quant != "none":
        with _timed(say, times, "quantize"):
            if plan_for(asked) != asked.quant:
                notes.append(
                    "int6 for ONNX keeps activations float (w6a16), so that the tokens are torch's; "
                    "--quant w6a8 decodes faster and in less memory, and can differ from torch at near ties"
                )
            if asked.calibrate is not None:
                ids = read_tokens(asked.calibrate, loaded.tokenizer)
            student = quantize(student, asked, ids, say)
            record = student.metadata["quantization"]
            remark = record.get("choice", {}).get("note", "")
            if remark.startswith("no calibration"):
                notes.append(f"{asked.quant}: {remark}; --calibrate FILE chooses")
            tuning = record.get("tuning", {})
            notes += [*tuning.get("notes", []), *([tuning["note"]] if "note" in tuning else [])]
            step = redeployed(student, step)
    lowered = None
    if asked.target == "triton":
        with _timed(say, times, "lower"):
            lowered, fused = lower(step, decoding=True)
            notes.append(fused.summary())
    for remark in notes:
        say.note(remark)
    return Compiled(student, teacher, step, loaded, asked, distilled, notes, times, lowered)


def capture_loaded(loaded: LoadedModel) -> Program:
    """The program of a loaded model; an exported one keeps its own graph."""
    if loaded.exported is not None:
        program = from_exported(loaded.exported, prefix=loaded.prefix, example=loaded.example)
    else:
        program = capture(loaded.module, loaded.example)
    limits = (program.max_positions, loaded.max_positions, position_limit(program))
    bounds = [n for n in limits if n is not None]
    program.max_positions = min(bounds) if bounds else None
    return program


def prove(program: Program, asked: Options) -> Program:
    """The program with every softmax attention proved, and cut apart where single KV heads are to stay softmax.

    Raises:
        RefusedError: ``keep_softmax`` names a KV head that there isn't, or of a site that isn't proved, or asks for
            more KV heads to be chosen than there are.
    """
    asked = asked.followed()
    apart: list[Pass] = []
    if asked.attn != "softmax":
        if count := parse_head_count(asked.keep_softmax):
            apart = [ChooseHeads(count, asked.window or 0, asked.seed)]
        elif heads := parse_heads(asked.keep_softmax):
            apart = [SplitHeads(heads)]
    program = Pipeline([Canonicalize(), ProveAttention(alibi=asked.alibi)])(program)
    settle(program)
    return Pipeline(apart)(program)


def rewrite(teacher: Program, asked: Options) -> Program:
    """A copy of the program with its sites rewritten; refuses when a request for linear attention changes nothing."""
    student = teacher.clone()
    asked = asked.followed()
    if asked.attn == "softmax":
        return student
    if not student.sites:
        raise RefusedError(
            "the model has no softmax attention, so there is nothing to rewrite; "
            "quantize it alone with --attn softmax --quant int6"
        )
    indices, count, _ = parse_keep(asked.keep_softmax) if asked.keep_softmax else ((), 0, 0)
    by_head = parse_head_count(asked.keep_softmax) or parse_heads(asked.keep_softmax)
    if by_head and not named_parts(teacher):
        raise LincompileError(f"--keep-softmax {asked.keep_softmax}: the program's heads weren't cut apart by prove()")
    pass_ = LinearizeAttention(
        asked.attn,
        keep=indices or named_parts(teacher),
        count=count,
        sliding=asked.rewrite_sliding,
        window=asked.window or 0,
        seed=asked.seed,
        rotary=asked.rotary or "",
        lowest=asked.lowest,
    )
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
) -> tuple[Program, Distilled | None, Tensor | None]:
    """Trains the student on the text asked for, or applies an adapter, or trains on from one (at a tenth of the rates).

    Returns:
        The student (another one where layers were chosen), what was done, and the text's token ids.
    """
    corpus = None if asked.distil is None else read_corpus(asked.distil, loaded.tokenizer)
    ids = None if corpus is None else corpus.ids
    logit_options = LogitDistillation(cross_entropy=asked.cross_entropy)
    if asked.adapter is not None:
        apply_adapter(Path(asked.adapter), teacher, student, source_hash=loaded.source_hash)
        if not asked.trains:
            return student, None, ids
        if asked.transfer_loss is not None and student.metadata["projections"] == "adapted":
            raise LincompileError(
                f"--transfer-loss {asked.transfer_loss}: {asked.adapter} holds low-rank factors, from which only the "
                "logits can go on, not attention transfer: leave it out"
            )
        transfer_options = transfer_options or Transfer().scaled(0.1)
        logit_options = logit_options.scaled(0.1)
    if corpus is None:
        return student, None, None
    if corpus.empty:
        say.note(f"{corpus.empty:,} rows of {asked.distil} hold no text and are passed over")
    if asked.transfer_loss is not None:
        transfer_options = replace(transfer_options or Transfer(), loss=asked.transfer_loss)
    on_gpu = asked.device != "cpu"
    limit = teacher.max_positions or 1 << 30
    if asked.length is not None and asked.length > limit:
        raise LincompileError(f"--length {asked.length}: the model has {limit} positions; write at most that")
    keep = parse_keep(asked.keep_softmax)[2] if asked.keep_softmax else 0
    linear = sum(site.method != "softmax" for site in student.sites)
    if keep >= linear:
        raise LincompileError(
            f"--keep-softmax auto:{keep} would leave nothing linear: {linear} sites of the model can be; keep fewer"
        )
    recipe = Recipe(
        train=asked.train or ("full" if on_gpu else "none"),
        keep=keep,
        tokens=asked.tokens,
        seconds=asked.time,
        length=min(asked.length or (1024 if on_gpu else 256), limit),
        batch=asked.batch or (16 if on_gpu else 1),
        seed=asked.seed,
        echoes=asked.echoes,
        transfer=transfer_options or Transfer(),
        logits=logit_options,
        extension=extension_for(asked, loaded, corpus, teacher.max_positions),
        start="logits" if student.metadata.get("projections") == "adapted" else "transfer",
    )

    def relinearize(kept: tuple[int, ...]) -> Program:
        return rewrite(teacher, replace(asked, keep_softmax=",".join(map(str, kept)) + ","))

    with shared(teacher, asked.shard):
        done = run_recipe(
            teacher,
            student,
            corpus.ids,
            recipe,
            relinearize=relinearize,
            documents=corpus.documents,
            checkpoint=checkpoint,
            listener=Listener(say.stage, say.advance, say.note),
        )
    return done.student, done, ids


def extension_for(asked: Options, loaded: LoadedModel, corpus: Corpus, limit: int | None) -> Extension | None:
    """The length extension as asked for, its retrieval examples made from the corpus.

    Raises:
        LincompileError: it is longer than the model's positions.
    """
    if asked.extend is None:
        return None
    if limit is not None and asked.extend > limit:
        raise LincompileError(f"--extend {asked.extend}: the model has {limit} positions; write at most that")
    if not asked.retrieval:
        return Extension(asked.extend)
    needles = needles_of(loaded.tokenizer, asked.needles, corpus.ids, asked.seed)
    return Extension(asked.extend, retrieval=asked.retrieval, needles=needles, stretch=asked.stretch)


def shared(teacher: Program, shard: str | None) -> AbstractContextManager[object]:
    """Inside, distillation's windows are shared over the ranks of the default process group, where that was asked for.

    Raises:
        RefusedError: there is no process group, the ranks hold different models, or the model can't be split.
    """
    if shard is None:
        return nullcontext()
    group, world = SequenceParallel().resolve()
    inputs = [(item.name, item.role, item.inverted) for item in teacher.inputs]
    check_fingerprints(fingerprint(teacher.graph_module, inputs), group, world)
    return spread(teacher, group, world)


def quantize(student: Program, asked: Options, ids: Tensor | None, say: Reporter | None = None) -> Program:
    """Quantizes the program's linear layers as asked, calibrated on the text's token ids where there are any."""
    tell = say or Reporter()
    if asked.quant == "none":
        return student
    calibration = text = None
    if ids is not None:
        rows = vocabulary(student)
        wrong = unknown_token(ids, rows)
        if not ids.numel() or wrong is not None:
            known = "" if rows is None else f", and the model knows {rows}"
            problem = f"token {wrong}{known}" if ids.numel() else "no tokens"
            raise LincompileError(f"the text to calibrate quantization on holds {problem}: give other text")
        if ids.numel() < (asked.calibrate_tokens or 0):
            tell.note(f"calibrated on {ids.numel():,} tokens: the text has no more (--calibrate-tokens)")
        calibration = windows_of(student, ids, asked.calibrate_tokens or CALIBRATION_TOKENS, asked.device)
        if asked.quant_tune is not None:
            wanted = options_for(asked.quant_tune, asked.quant_tune_steps, asked.quant_tune_time).tokens(
                CALIBRATION_LENGTH
            )
            text = windows_of(student, ids, wanted, asked.device)
    pass_ = Quantize(
        plan_for(asked),
        method=asked.quant_method,
        calibration=calibration,
        plan_file=asked.quant_plan,
        scores=asked.quant_scores,
        embeddings=asked.quant_embeddings,
        lm_head=asked.quant_embeddings,
        tune=asked.quant_tune,
        tune_steps=asked.quant_tune_steps,
        tune_time=asked.quant_tune_time,
        tune_seed=asked.seed,
        tune_data=text,
        tune_progress=lambda step, expected, loss, rate: tell.advance(
            step, expected, f"KL {loss:.4f}, {rate:,.0f} tokens/s"
        ),
    )
    return Pipeline([pass_])(student)


def windows_of(student: Program, ids: Tensor, tokens: int, device: str) -> list[dict[str, Tensor]]:
    """Inputs for windows from all over a text, of so many tokens together or as many as there are."""
    length = min(CALIBRATION_LENGTH, student.max_positions or CALIBRATION_LENGTH, ids.numel())
    count = max(1, min(tokens // length, ids.numel() // length))
    stride = ids.numel() // count
    windows = [ids[i * stride : i * stride + length][None].to(device) for i in range(count)]
    return [model_values(student, window) for window in windows]


def deployable(student: Program, notes: list[str]) -> StepProgram:
    """The step form, or the whole-sequence form where the model isn't causal."""
    if any(site.node is not None and site.kind == "full" for site in student.sites) or not student.sites:
        notes.append("bidirectional or attention-free model: the artefact runs whole sequences, without states")
        return whole(student, notes)
    try:
        return make_stateful(student)
    except RefusedError as error:
        notes.append(f"{error}; the artefact runs whole sequences, without states")
        return whole(student, notes)


def whole(student: Program, notes: list[str]) -> StepProgram:
    """The whole-sequence form; what it decides for the user is noted."""
    step = make_full(student)
    if types := token_types(student):
        notes.append(f"the artefact gives the model 0 for every '{types[0]}': one segment")
    return step


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
