"""Distils a model to linear attention and measures it: loads, proves, rewrites, trains stage by stage, evaluates.

    python benchmarks/distil.py MODEL --variant lawcat-window64 --train TEXT --eval NAME=TEXT --out DIR
    python benchmarks/distil.py MODEL --window 64 --evaluate ADAPTER --eval NAME=TEXT --device cpu
    python benchmarks/distil.py --table DIR

Variants are the recipes of ``distil_recipes.py``; options replace what a recipe says. DIR gets VARIANT.json (options,
seeds, tokens, seconds, versions, loss curves, every measure), VARIANT.safetensors (the adapter, or all weights where
all were trained) and a checkpoint per stage. All of it is written as it comes, so that a run that is cut off loses
little, and **the same command goes on where it stopped**. ``--until S`` fits training and measures into S seconds.

TEXT is anything the CLI's --distil takes. Perplexity is over non-overlapping windows without BOS (as ``lincompile
eval``), in float32 on a CPU and with bfloat16 products on a GPU, teacher and student by the same code; the student
measured is one rebuilt from its file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import zero_shot
from distil_control import train_control
from distil_measure import Measures, Results, thin
from distil_recipes import RECIPES, Recipe, Stage
from distil_record import command, record_of
from distil_table import print_table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from versions import versions

from lincompile.lowering.compiler import capture_loaded, prove, rewrite
from lincompile.lowering.evaluation.perplexity import peak_memory
from lincompile.lowering.options import Options
from lincompile.lowering.text import Corpus, needles_of, read_corpus, read_tokens
from lincompile.passes.distil.adapter import apply_adapter, save_adapter, save_record
from lincompile.passes.distil.choose import choose
from lincompile.passes.distil.data import Batches, TokenWindows
from lincompile.passes.distil.echo import WithEchoes
from lincompile.passes.distil.instrument import add_stage, checksum, instead, sites_of, unpadded
from lincompile.passes.distil.logits import LogitDistillation, distil_logits, own_parameters
from lincompile.passes.distil.loop import LoopOptions, LoopReport
from lincompile.passes.distil.recipe import with_branches_of
from lincompile.passes.distil.retrieval import WithRetrieval, check_stretch
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.formats.load import load_model
from lincompile.passes.formats.loaded import LoadedModel
from lincompile.passes.program import Program

HELD_OUT = 0.005  # of the training text, for the divergences before and after
RESERVE = 30.0  # seconds kept for writing and evaluating at the end of --until
BEGAN = time.monotonic()
STAGE_OPTIONS = {
    "seconds": float,
    "length": int,
    "batch": int,
    "steps": int,
    "retrieval": float,
    "stretch": float,
    "emphasis": float,
    "cross_entropy": float,
    "echoes": float,
    "rates": float,
}
# What weighs or repeats the tokens of logits: the transfer and the control don't.
OF_LOGITS = ("stretch", "emphasis", "cross_entropy")


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}] {text}", flush=True)


def progress(name: str, every: float = 10.0) -> Any:
    last = [0.0]

    def show(step: int, total: int, loss: float, rate: float) -> None:
        if time.monotonic() - last[0] > every:
            last[0] = time.monotonic()
            say(f"{name} {step}/{total} loss {loss:.4f} {rate:,.0f} tokens/s")

    return show


@dataclass
class Run:
    """One variant: the model, the text, and where everything is kept."""

    asked: argparse.Namespace
    recipe: Recipe
    loaded: LoadedModel
    teacher: Program
    corpus: Corpus
    results: Results
    kept: str | None = None
    tokens: int = 0

    @property
    def name(self) -> str:
        return str(self.asked.variant or "custom")

    @property
    def adapts(self) -> bool:
        """Whether what is trained fits an adapter."""
        return adapts(self.recipe)

    def file(self, ending: str) -> Path | None:
        return None if self.asked.out is None else self.asked.out / f"{self.name}{ending}"

    def fresh(self) -> Program:
        """The rewritten student before any training, with the sites chosen so far kept softmax."""
        recipe = self.recipe
        return rewrite(
            self.teacher,
            Options(
                attn=recipe.attn,
                keep_softmax=self.kept,
                window=recipe.window,
                rotary=recipe.rotary,
                seed=self.asked.seed,
                adapter=adapter_of(self.asked, recipe),
            ),
        )

    def data(self, stage: Stage, seed: int) -> Batches:
        plain = TokenWindows(
            self.corpus.ids, stage.length, stage.batch, seed, held_out=HELD_OUT, documents=self.corpus.documents
        )
        say(plain.summary())
        windows: Batches = WithEchoes(plain, stage.echoes, seed) if stage.echoes else plain
        if not stage.retrieval:
            return windows
        needles = needles_of(self.loaded.tokenizer, self.recipe.needles, self.corpus.ids, seed)
        return WithRetrieval(windows, needles, stage.retrieval, seed, stage.stretch)

    def options(self, stage: Stage, options: LoopOptions) -> Any:
        """The stage's options: its budget, cut to what ``--until`` leaves. What a GPU holds is counted from here on."""
        if torch.device(self.asked.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = stage.seconds
        if self.asked.until is not None:
            left = max(0.0, self.asked.until - (time.monotonic() - BEGAN) - RESERVE)
            seconds = left if seconds is None else min(seconds, left)
        options = replace(options, steps=stage.steps, seconds=seconds, compile=self.asked.compile, save_every=200)
        return options if stage.rates == 1 else options.scaled(stage.rates)

    def report(self, name: str, report: LoopReport) -> None:
        """Keeps what a stage did: loss curve, tokens, seconds; what was measured after less of it goes."""
        self.tokens += report.tokens
        if name in self.results and self.results[name]["steps"] != report.steps:
            self.results.forget_after(name)
        peak = peak_memory()
        self.results.set(name, thin(report) | {"peak_memory_bytes": peak})
        rate, held = report.tokens / max(report.seconds, 1e-9), peak / 2**30
        say(
            f"{name}: {report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.0f} s, {rate:,.0f} tokens/s, "
            f"{held:.1f} GiB at most"
        )

    def save(self, student: Program, ending: str = ".safetensors") -> None:
        """The trained parts as an adapter, or all weights where whole matrices were trained."""
        if (path := self.file(ending)) is None:
            return
        if not self.adapts:
            weights = {
                name: value.detach().cpu().contiguous() for name, value in student.graph_module.named_parameters()
            }
            save_file(weights, str(path), {"sites": json.dumps(sites_of(student))})
        else:
            record = record_of(self.results.values, self.tokens)
            save_adapter(path, self.teacher, student, source_hash=self.loaded.source_hash, record=record)
        say(f"{path.name}: {path.stat().st_size:,} bytes")

    def load(self, path: Path, student: Program) -> dict[str, Any]:
        """Puts what ``save`` wrote into a fresh student; returns an adapter's record."""
        if not self.adapts:
            with safe_open(str(path), framework="pt") as file:
                made = (file.metadata() or {}).get("sites")
            # Files that don't say it were written before gates had a floor.
            floored = any("lowest" in site.details for site in student.sites)
            if floored if made is None else json.loads(made) != sites_of(student):
                raise SystemExit(
                    f"{path} was trained with other methods, windows or positions, or another floor of gates"
                )
            own_parameters(student, self.teacher)
            weights = load_file(str(path), device=str(next(student.graph_module.parameters()).device))
            with torch.no_grad():
                for name, parameter in student.graph_module.named_parameters():
                    parameter.copy_(weights[name])
            add_stage(student, "weights", checksum(weights.values()))
            return {}
        return apply_adapter(path, self.teacher, student, source_hash=self.loaded.source_hash)


def train(run: Run, measures: Measures) -> Program:
    """All stages of the recipe; the student at their end."""
    recipe, seed = run.recipe, run.asked.seed
    if recipe.attn == "softmax":
        return _control(run)
    student = run.fresh()
    told: dict[str, Any] = {"note": say}
    automatic = int(recipe.keep[5:]) if recipe.keep and recipe.keep.startswith("auto:") else 0
    if run.asked.start:
        run.results.set("start", run.load(run.asked.start, student))
        run.tokens = int(run.results["start"].get("tokens", 0))
    elif recipe.transfer is not None:
        data = run.data(recipe.transfer, seed)
        options = run.options(recipe.transfer, Transfer(loss=recipe.transfer_loss, longest=recipe.longest))
        file = run.file(".transfer.ckpt")
        moved = transfer(run.teacher, student, data, options, checkpoint=file, progress=progress("transfer"), **told)
        run.report("transfer", moved)
        before, after = (sum(errors.values()) / len(errors) for errors in (moved.before, moved.after))
        say(f"transfer: relative error {before:.3f} -> {after:.3f}")
        run.save(student, ".transfer.safetensors")
        measures.perplexities("after_transfer", lambda: instead(run.teacher, student))
    if automatic:
        stage = recipe.transfer or recipe.logits
        assert stage is not None, "a row that chooses layers trains something"
        windows = run.data(stage, seed).measure(8)
        chosen = run.results.once("choice", lambda: asdict(choose(run.teacher, student, windows, automatic)))
        say(f"kept softmax: {chosen['kept']}; KL {chosen['linear']:.3f} -> {chosen['chosen']:.3f}")
        run.kept = ",".join(map(str, chosen["kept"])) + ","
        student = with_branches_of(student, run.fresh())
    for index, (name, stage) in enumerate((("logits", recipe.logits), ("extension", recipe.extension))):
        if stage is None:
            continue
        learnt = distil_logits(
            run.teacher,
            student,
            run.data(stage, seed + 1 + index),
            run.options(
                stage, LogitDistillation(train=recipe.train, emphasis=stage.emphasis, cross_entropy=stage.cross_entropy)
            ),
            checkpoint=run.file(f".{name}.ckpt"),
            progress=progress(name),
            **told,
        )
        run.report(name, learnt)
        say(f"{name}: KL {learnt.before:.3f} -> {learnt.after:.3f}")
        run.save(student)
    return student


def _control(run: Run) -> Program:
    """The softmax model itself, trained on the text for as many steps as the row it is the control of."""
    recipe = run.recipe
    assert recipe.logits is not None
    stage = recipe.logits
    if given := [name for name in OF_LOGITS if getattr(stage, name) != getattr(Stage, name)]:
        raise SystemExit(f"the control learns the text itself, every token alike: leave its {given[0]} out")
    if recipe.steps_of is not None and run.asked.out is not None:
        other = Results.read(run.asked.out / f"{recipe.steps_of}.json")
        if (steps := other.get("logits", {}).get("steps")) is not None:
            stage = replace(stage, steps=steps, seconds=None)
            say(f"{steps:,} steps, as {recipe.steps_of}")
        else:
            say(f"{recipe.steps_of} hasn't been run: the control takes {stage.seconds} s instead of its steps")
    student, report = train_control(
        run.teacher,
        run.data(stage, run.asked.seed + 1),
        run.options(stage, LogitDistillation(train=recipe.train)),
        checkpoint=run.file(".logits.ckpt"),
        progress=progress("control"),
        note=say,
    )
    run.report("logits", report)
    run.save(student)
    return student


def recipe_of(asked: argparse.Namespace) -> Recipe:
    """The variant's recipe, with what the command line replaces."""
    recipe = RECIPES[asked.variant] if asked.variant else Recipe(measures=("ablations",))
    names = {"keep_softmax": "keep", "mode": "train"} | {
        name: name for name in ("attn", "window", "rotary", "measures")
    }
    given = {field: getattr(asked, name) for name, field in names.items() if getattr(asked, name) is not None}
    if asked.passkey is not None:
        given["passkey"] = asked.passkey
    recipe = replace(recipe, **given)
    changes: dict[str, dict[str, Any]] = {"transfer": {}, "logits": {}, "extension": {}}
    for stage in changes:
        for name, kind in STAGE_OPTIONS.items():
            value = getattr(asked, f"{stage}_{name}", None)
            if value is not None:
                changes[stage][name] = kind(value)
    stages = {
        name: replace(stage, **changed)
        for name, changed in changes.items()
        if (stage := getattr(recipe, name)) is not None and changed
    }
    if recipe.window is None:
        stages["measures"] = tuple(name for name in recipe.measures if name != "ablations")
    return replace(recipe, **stages)


def adapts(recipe: Recipe) -> bool:
    """Whether what a row trains fits an adapter: low-rank additions, of a student and not the control."""
    return recipe.train != "full" and recipe.attn != "softmax"


def adapter_of(asked: argparse.Namespace, recipe: Recipe) -> str | None:
    """The file of ``--evaluate`` or ``--start`` where it is an adapter (and not all weights), which says its sites."""
    file = asked.evaluate or asked.start
    return str(file) if file is not None and adapts(recipe) else None


def tokens_of(source: str, loaded: LoadedModel) -> Tensor:
    return read_tokens(source, loaded.tokenizer)


def corpus_of(sources: list[str], loaded: LoadedModel) -> Corpus:
    """The documents of all sources, one source after another; nothing where there is none."""
    found = [read_corpus(source, loaded.tokenizer) for source in sources]
    if not found:
        return Corpus(torch.zeros(0), torch.zeros(0))
    begins = itertools.accumulate((len(corpus.ids) for corpus in found), initial=0)
    documents = torch.cat([corpus.documents + begin for corpus, begin in zip(found, begins, strict=False)])
    return Corpus(torch.cat([corpus.ids for corpus in found]), documents, sum(corpus.empty for corpus in found))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--variant", choices=RECIPES, help="the row to repeat")
    parser.add_argument(
        "--train",
        action="append",
        metavar="TEXT",
        help="to train on, may be given again; beside --evaluate, to calibrate int6 on",
    )
    parser.add_argument("--eval", action="append", default=[], metavar="NAME=TEXT")
    parser.add_argument("--out", type=Path, help="folder for results, adapter and checkpoints")
    parser.add_argument("--until", type=float, help="cut stages short and leave measures out to end by this second")
    parser.add_argument("--tasks", type=Path, metavar="FOLDER", help="zero-shot sets (see zero_shot.py)")
    parser.add_argument("--task-limit", type=int, help="documents of each task")
    parser.add_argument("--task-batch", type=int, help="sequences at a time (default: 64 on a GPU, 1 on a CPU)")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only measure what an adapter (or weights) makes")
    parser.add_argument("--start", type=Path, metavar="FILE", help="begin from an adapter, without a transfer")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of the results in a folder")
    recipe = parser.add_argument_group("instead of what the recipe says")
    recipe.add_argument("--attn")
    recipe.add_argument("--rotary", choices=("keep", "remove"), help="as the CLI's")
    recipe.add_argument("--window", type=int, help="softmax over the nearest tokens beside the linear part")
    recipe.add_argument("--keep-softmax", help="as in the CLI; auto:N chooses by KL after the transfer, heads:N before")
    recipe.add_argument("--mode", help="full or lora:R")
    as_numbers = functools.partial(_numbers, parser)
    recipe.add_argument("--passkey", type=as_numbers, metavar="N,N", help="tokens of the passkey prompts")
    recipe.add_argument("--measures", type=lambda text: tuple(text.split(",")) if text else ())
    for stage in ("transfer", "logits", "extension"):
        for name, kind in STAGE_OPTIONS.items():
            if stage != "transfer" or name not in OF_LOGITS:
                recipe.add_argument(f"--{stage}-{name.replace('_', '-')}", type=kind)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=None, help="evaluate on so many tokens of each text")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.table is None:
        if asked.model is None:
            parser.error("name a model")
        if asked.train is None and asked.evaluate is None:
            parser.error("give --train TEXT, or --evaluate ADAPTER")
        recipe = recipe_of(asked)
        try:  # before anything is loaded or trained
            for stage in filter(None, (recipe.transfer, recipe.logits, recipe.extension)):
                check_stretch(stage.stretch, stage.retrieval, [recipe.attn])
        except LincompileError as error:
            parser.error(str(error))
        known = ("ablations", "generation", "int6", "passkey", "zero-shot")
        if wrong := [name for name in recipe.measures if name not in known]:
            parser.error(f"--measures: '{wrong[0]}' is none of {', '.join(known)}")
    return asked


def _numbers(parser: argparse.ArgumentParser, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        parser.error(f"'{text}': write whole numbers separated by commas")


def main() -> None:
    asked = parsed()
    if asked.table is not None:
        print_table(asked.table)
        return
    recipe = recipe_of(asked)
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
    if asked.tasks is not None:
        zero_shot.check(asked.tasks, list(zero_shot.TASKS))
    loaded = load_model(asked.model, dtype=torch.float32, device=asked.device)
    program = capture_loaded(loaded)
    kept = None if recipe.keep and recipe.keep.startswith("auto:") else recipe.keep
    teacher = prove(
        program,
        Options(
            attn=recipe.attn,
            keep_softmax=kept,
            window=recipe.window,
            seed=asked.seed,
            adapter=None if kept else adapter_of(asked, recipe),
        ),
    )
    say(f"loaded; proved {sum(site.proved for site in teacher.sites)} of {len(teacher.sites)} sites")
    texts = {name: tokens_of(path, loaded) for name, path in (item.split("=", 1) for item in asked.eval)}
    corpus = corpus_of(asked.train or [], loaded)
    say(", ".join(f"{len(ids):,} tokens of {name}" for name, ids in {"train": corpus.ids, **texts}.items()))
    # What results depend on; how long a run may take and where it writes are not among it.
    described = {"recipe": asdict(recipe), "model": Path(asked.model).name} | {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(asked).items()
        if name in ("variant", "train", "eval", "context", "limit", "seed", "device", "evaluate", "start", "task_limit")
    }
    path = None if asked.out is None else asked.out / f"{asked.variant or 'custom'}.json"
    results = Results(path, described)
    if len(results.values) > 1:
        say(f"going on from {path}: it has {', '.join(name for name in results.values if name != 'options')}")
    results.values["command"] = command()
    results.set("versions", versions())
    for entry in teacher.history:
        if entry["pass"] == "choose-heads":
            say(teacher.notes[-1])
            results.set("heads", entry["report"])
    run = Run(asked, recipe, loaded, teacher, corpus, results)
    run.kept = kept
    measures = Measures(
        results, teacher, loaded, texts, asked.context, asked.limit, say, functools.partial(_in_time, asked)
    )
    measures.perplexities("teacher", lambda: unpadded(teacher))
    if asked.evaluate:
        student = run.fresh()
        results.set("adapter", run.load(asked.evaluate, student))
    else:
        student = train(run, measures)
        if (saved := run.file(".safetensors")) is not None and saved.exists():
            student = run.fresh()
            run.load(saved, student)
    graph = (
        functools.partial(unpadded, student)
        if recipe.attn == "softmax"
        else functools.partial(instead, teacher, student)
    )
    measures.perplexities("student", graph)
    if not asked.evaluate and run.adapts and (saved := run.file(".safetensors")) is not None:
        save_record(saved, record_of(results.values, run.tokens, measured=True))
    measures.student(
        student,
        recipe.measures,
        train_ids=corpus.ids,
        seed=asked.seed,
        passkey=recipe.passkey,
        tasks=asked.tasks,
        limit=asked.task_limit,
        batch=asked.task_batch or (1 if asked.device == "cpu" else 64),
    )
    results.set("seconds", results.values.get("seconds", 0.0) + time.monotonic() - BEGAN)


def _in_time(asked: argparse.Namespace) -> bool:
    return asked.until is None or time.monotonic() - BEGAN < asked.until - RESERVE


if __name__ == "__main__":
    try:
        main()
    except LincompileError as error:
        sys.exit(f"distil: {error}")
