"""What ``distil.py`` measures of a teacher and a student, and the file that keeps it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import zero_shot
from torch import Tensor

import lincompile.cli.eval
from lincompile.lowering.compiler import quantize
from lincompile.lowering.evaluation import perplexity as evaluate
from lincompile.lowering.evaluation.agreement import Writing, compare
from lincompile.lowering.evaluation.passkey import Passkey, PasskeyResult, retrieve
from lincompile.lowering.evaluation.subject import Subject, of_program
from lincompile.lowering.options import Options
from lincompile.passes.distil.echo import from_afar
from lincompile.passes.distil.instrument import TrainingGraph, instead
from lincompile.passes.distil.logits import logits_of
from lincompile.passes.formats.loaded import LoadedModel
from lincompile.passes.linearization.methods import Shares
from lincompile.passes.program import Program

ABLATION_TOKENS = 40_960  # of each text
CALIBRATION_TOKENS = 1 << 16  # of the training text, for int6
STAGES = ("transfer", "after_transfer", "choice", "logits", "extension")
BEFORE_TRAINING = ("options", "versions", "command", "heads", "teacher", "start", "seconds")
# What the test was published with hides the key in (arXiv 2305.16300).
REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
ABLATIONS = {"window only": (0, 1), "linear only": (1, 0), "no attention": (0, 0)}
Say = Callable[[str], None]


class Results:
    """The JSON of a run: written whenever something is added, and read back when the run goes on.

    Args:
        path: the file; None keeps the results in memory only.
        options: what the results belong to; a file of other options is replaced.
    """

    def __init__(self, path: Path | None, options: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        plain = json.loads(json.dumps(options))
        if path is not None:
            found = self.read(path)
            self.values = found if found.get("options") == plain else {}
        self.values["options"] = plain

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """What a file holds; nothing where there is none."""
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def set(self, name: str, value: Any) -> None:
        """Adds a value, and writes the file whole or not at all."""
        self.values[name] = value
        if self.path is not None:
            temporary = self.path.with_suffix(".partial")
            temporary.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)

    def forget_after(self, stage: str) -> None:
        """Drops a stage and all that was measured of what came after it."""
        kept = {*BEFORE_TRAINING, *STAGES[: STAGES.index(stage)]}
        self.values = {name: value for name, value in self.values.items() if name in kept}

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value under a name, computed only if an earlier run hasn't."""
        if name not in self.values:
            self.set(name, compute())
        return self.values[name]


@torch.no_grad()
def perplexity(graph: TrainingGraph, ids: Tensor, context: int, limit: int | None) -> dict[str, float]:
    """Non-overlapping windows, each predicting its tokens but the first; the last may be shorter.

    ``recalled`` is the same (nats per token) over tokens that followed the same token before, last more than 64
    tokens ago: what a model must look up (the associative recall of arXiv 2312.04927).
    """
    total, count, recalled, found = 0.0, 0, 0.0, 0
    ids = ids[:limit]
    for start in range(0, len(ids), context):
        window = ids[start : start + context].long()[None].to(graph.device)
        if window.shape[1] < 2:
            break
        logits = logits_of(graph, window)[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").double().cpu()
        far = from_afar(window[0].tolist())[1:]
        total, count = total + float(losses.sum()), count + len(losses)
        recalled, found = recalled + float(losses[far].sum()), found + int(far.sum())
    figures = {"perplexity": math.exp(total / count), "nll": total / count, "tokens": count}
    return figures | ({"recalled": recalled / found, "recalled_tokens": found} if found else {})


class Measures:
    """Measures of one run, each kept under its name in the results.

    Args:
        texts: token ids by name.
        context: tokens per window; limit: tokens of each text, None = all.
        deadline: says whether there is time for one more measure.
    """

    def __init__(
        self,
        results: Results,
        teacher: Program,
        loaded: LoadedModel,
        texts: dict[str, Tensor],
        context: int,
        limit: int | None,
        say: Say,
        deadline: Callable[[], bool] = lambda: True,
    ) -> None:
        self.results, self.teacher, self.loaded, self.texts = results, teacher, loaded, texts
        self.context, self.limit, self.say, self.deadline = context, limit, say, deadline

    def perplexities(self, name: str, graph: Callable[[], TrainingGraph], limit: int | None = None) -> dict[str, Any]:
        """Of every text, with the ratio to the teacher's where that is known."""

        def compute() -> dict[str, Any]:
            run = graph()
            return {text: perplexity(run, ids, self.context, limit or self.limit) for text, ids in self.texts.items()}

        found: dict[str, Any] = self.results.once(name, compute)
        self.say(f"{name.replace('_', ' ')}: {self.summary(found)}")
        return found

    def summary(self, found: dict[str, Any]) -> str:
        """``valid 29.2 (1.081x, recalled 1.69), …``."""
        teacher = self.results.values.get("teacher", found)

        def one(name: str) -> str:
            value = found[name]["perplexity"]
            recalled = f", recalled {found[name]['recalled']:.2f}" if "recalled" in found[name] else ""
            return f"{name} {value:.3f} ({value / teacher[name]['perplexity']:.3f}x{recalled})"

        return ", ".join(map(one, found)) or "no text"

    def student(self, student: Program, wanted: tuple[str, ...], **options: Any) -> None:
        """The measures a recipe names, in order, as far as there is time."""
        for name in wanted:
            if name in self.results and not self.results[name].get("partial"):
                continue
            if not self.deadline():
                self.say(f"no time left for {name}: the same command goes on from here")
                return
            found = getattr(self, name.replace("-", "_"))(student, **options)
            if found is not None:
                self.results.set(name, found)

    def ablations(self, student: Program, **_: Any) -> dict[str, Any]:
        """What the window and the linear attention do alone."""
        graph, found = instead(self.teacher, student), {}
        for name, (far, near) in ABLATIONS.items():
            with shares_times(far, near):
                limit = self.limit or ABLATION_TOKENS
                found[name] = {text: perplexity(graph, ids, self.context, limit) for text, ids in self.texts.items()}
            self.say(f"{name}: {self.summary(found[name])}")
        return found

    def generation(self, student: Program, **_: Any) -> dict[str, Any]:
        """What the student writes, against the teacher; prompts from each text."""
        one, other = of_program(student, self.loaded, "student"), of_program(self.teacher, self.loaded, "teacher")
        found = {name: compare(one, other, ids.tolist(), Writing()).record() for name, ids in self.texts.items()}
        for name, figures in found.items():
            self.say(
                f"writing on {name}: {figures['agreement']:.1%} of the teacher's tokens chosen, "
                f"{figures['same_tokens']:.1f} tokens alike, different 4-grams {figures['distinct']['student']:.1%}"
            )
        return found

    def int6(self, student: Program, train_ids: Tensor, seed: int = 0, **_: Any) -> dict[str, Any] | None:
        """Perplexity before and after ``--quant int6``, both by the package's own code."""
        if not len(train_ids):
            self.say("int6 is left out: give --train TEXT to calibrate it on")
            return None
        asked = Options(
            attn="softmax", quant="int6", seed=seed, device=str(next(student.graph_module.parameters()).device)
        )
        quantized = quantize(student.clone(), asked, train_ids[:CALIBRATION_TOKENS].long())
        limit = min(self.limit or ABLATION_TOKENS, ABLATION_TOKENS)
        record = quantized.metadata["quantization"]
        found: dict[str, Any] = {
            "plan": record.get("choice"),
            "layers": len(record["layers"]),
            "skipped": [layer["reason"] for layer in record["skipped"]],
        }
        for name, program in (("before", student), ("after", quantized)):
            run = evaluate.logits_of_program(program)
            device = next(program.graph_module.parameters()).device
            found[name] = {
                text: evaluate.perplexity(
                    lambda tokens, run=run, device=device: run(tokens.to(device)), ids[:limit].tolist(), self.context
                ).record()
                for text, ids in self.texts.items()
            }
            self.say(f"{name} int6: {self.summary(found[name])}")
        return found

    def passkey(self, student: Program, passkey: tuple[int, ...] = (), seed: int = 0, **_: Any) -> dict[str, Any]:
        """Retrieval from prose and from a sentence over and over, by student and teacher, kept cell by cell.

        The teacher is asked only as far as its positions reach.
        """
        prose = lincompile.cli.eval.HAYSTACK.read_text(encoding="utf-8")
        found: dict[str, Any] = {}

        def ask(what: str, subject: Subject, lengths: tuple[int, ...], haystack: str) -> None:
            def keep(result: PasskeyResult) -> None:
                found[what] = result.record()
                self.results.set("passkey", found | {"partial": True})

            result = retrieve(subject, haystack, Passkey(lengths, seed=seed), on_cell=keep)
            self.say(f"passkey, {what}: " + ", ".join(f"{n}: {result.accuracy(n):.0%}" for n in lengths))

        for name, program in (("student", student), ("teacher", self.teacher)):
            subject, lengths = of_program(program, self.loaded, name), passkey
            if name == "student":
                subject = subject.beyond_configuration()
            elif (limit := subject.session.max_positions) is not None:
                lengths = tuple(length for length in passkey if length + 16 <= limit)
            if lengths:
                ask(name, subject, lengths, prose)
                ask(f"{name}, repeated", subject, lengths, REPEATED)
        return found

    def zero_shot(
        self, student: Program, tasks: Path | None = None, limit: int | None = None, batch: int = 1, **_: Any
    ) -> dict[str, Any] | None:
        """Accuracies of teacher and student, and the share of the average that was kept."""
        if tasks is None:
            return None
        found: dict[str, Any] = {}
        for name, program in (("teacher", self.teacher), ("student", student)):

            def keep(result: dict[str, Any], name: str = name) -> None:
                found[name] = result
                self.results.set("zero-shot", found | {"partial": True})

            zero_shot.run_all(
                of_program(program, self.loaded, name), tasks, list(zero_shot.TASKS), limit, batch, self.say, keep
            )
        if found["teacher"]["average"]:
            found["kept"] = found["student"]["average"] / found["teacher"]["average"]
            self.say(f"zero-shot average kept: {found['kept']:.1%}")
        return found


@contextlib.contextmanager
def shares_times(far: float, near: float) -> Iterator[None]:
    """Multiplies the shares of the linear attention and of the window, of every site."""
    plain = Shares.forward

    def scaled(self: Shares, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = plain(self, x)
        return shares[0] * far, shares[1] * near

    Shares.forward = scaled  # type: ignore[method-assign]
    try:
        yield
    finally:
        Shares.forward = plain  # type: ignore[method-assign]


def thin(report: Any, points: int = 200) -> dict[str, Any]:
    """A stage's report with its loss curve averaged into at most ``points`` values."""
    record = asdict(report)
    losses = record["losses"]
    size = max(1, math.ceil(len(losses) / points))
    record["losses"] = [round(sum(p) / len(p), 5) for p in (losses[i : i + size] for i in range(0, len(losses), size))]
    record["losses_averaged_over"] = size
    return record
