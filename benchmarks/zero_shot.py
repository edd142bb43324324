"""Zero-shot accuracy of models on local files: ARC-E, PIQA, BoolQ and LAMBADA, teacher and students by the same code.

    python benchmarks/zero_shot.py FOLDER TEACHER STUDENT… --json zero-shot.json --limit 500
    python benchmarks/zero_shot.py --write-tasks TASKS FOLDER     # the same tasks as files for lm_eval

FOLDER holds ``arc_easy*.jsonl``, ``piqa*.jsonl``, ``boolq*.jsonl`` and ``lambada*.jsonl`` as published (where there are
several of one kind, the one that is called validation or test); each MODEL is an artefact or anything the CLI takes.
Prompts, continuations and metrics are those of lm-evaluation-harness (arc_easy, piqa, boolq, lambada_openai), written
here in its own notation; ``python -m lincompile.lm_eval --tasks lincompile_piqa --include_path TASKS`` runs the same.
``kept`` is each model's average divided by the first model's. Results are written after every task.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, UndefinedError
from jinja2.nativetypes import NativeEnvironment
from versions import versions

from lincompile.lowering.evaluation.score import Answer, Request, Scorer
from lincompile.lowering.evaluation.subject import Subject, open_subject
from lincompile.lowering.tokenizer import TextCodec
from lincompile.passes.errors import LincompileError

DEFAULT_LENGTH = 2048  # tokens of context and continuation, where the model doesn't bound its positions


@dataclass(frozen=True)
class Task:
    """A task in lm_eval's notation: Jinja templates over the fields of a document."""

    name: str
    text: str
    target: str
    choices: str | None  # None: the target itself is what greedy decoding must give


TASKS = {
    task.name: task
    for task in (
        Task(
            "arc_easy",
            "Question: {{question}}\nAnswer:",
            "{{choices.label.index(answerKey)}}",
            "{{choices.text}}",
        ),
        Task("piqa", "Question: {{goal}}\nAnswer:", "{{label}}", "{{[sol1, sol2]}}"),
        Task(
            "boolq",
            "{{passage}}\nQuestion: {{question}}?\nAnswer:",
            "{{label if label is defined else answer | int}}",
            '{{["no", "yes"]}}',
        ),
        Task("lambada", "{{text.split(' ')[:-1] | join(' ')}}", "{{' ' + text.split(' ')[-1]}}", None),
    )
}


def file_of(task: str, folder: Path) -> Path:
    """The task's file; a ``LincompileError`` where there is none or the choice isn't clear."""
    found = sorted(folder.glob(f"{task}*.jsonl"))
    preferred = [path for path in found if "validation" in path.name or "test" in path.name] or found
    if len(preferred) != 1:
        raise LincompileError(f"{folder} has {len(preferred)} files for {task} ({task}*.jsonl): one is needed")
    return preferred[0]


def documents(path: Path, limit: int | None) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LincompileError(f"{path} can't be read: {error}") from error
    if not rows:
        raise LincompileError(f"{path} is empty")
    return rows[:limit]


def check(folder: Path, tasks: list[str]) -> None:
    """Reads every document of every task, before minutes are spent on the first of them.

    Raises:
        LincompileError: a file is missing or damaged, or a document lacks what its task needs.
    """
    for name in tasks:
        questions(TASKS[name], documents(file_of(name, folder), None))


@dataclass
class Question:
    """A document as a model sees it."""

    context: str
    continuations: list[str]
    gold: int


def questions(task: Task, rows: list[dict[str, Any]]) -> list[Question]:
    # Text is rendered as text: rendered natively, a question that reads "1" would become a number.
    as_text, as_values = Environment(keep_trailing_newline=True), NativeEnvironment()
    text, written = as_text.from_string(task.text), as_text.from_string(task.target)
    chosen, index = (as_values.from_string(source) for source in (task.choices or "", task.target))
    result = []
    for number, row in enumerate(rows, 1):
        try:
            if task.choices is None:
                result.append(Question(text.render(row), [written.render(row)], 0))
                continue
            choices, gold = chosen.render(row), int(index.render(row))
            result.append(Question(text.render(row), [f" {choice}" for choice in choices], gold))
        except (UndefinedError, TypeError, ValueError) as error:
            raise LincompileError(f"{task.name}: document {number} lacks what the task needs: {error}") from error
    return result


def encoded(codec: TextCodec, context: str, continuation: str) -> Request:
    """Token ids of both, cut where the context's own tokens end (as lm_eval does)."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = codec.encode(context + continuation), codec.encode(context)
    return before, whole[len(before) :]


def run(
    subject: Subject,
    task: Task,
    rows: list[dict[str, Any]],
    batch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Accuracy, its standard error and what else lm_eval reports for the task."""
    asked = questions(task, rows)
    codec = subject.tokenizer("an evaluation task")
    limit = subject.session.max_positions
    scorer = Scorer(subject.session, min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH), subject.chunk)
    requests = [encoded(codec, question.context, text) for question in asked for text in question.continuations]
    done = [0]

    def count(_: int, answer: Answer) -> None:
        done[0] += 1
        progress(done[0], len(requests))

    began = time.monotonic()
    answers = iter(scorer.score(requests, batch, count))
    hits, hits_by_length, logs = [], [], []
    for question in asked:
        scored = [next(answers) for _ in question.continuations]
        if task.choices is None:
            hits.append(scored[0][1])
            logs.append(scored[0][0])
            continue
        values = [score for score, _ in scored]
        by_length = [value / len(text[1:]) for value, text in zip(values, question.continuations, strict=True)]
        hits.append(best(values) == question.gold)
        hits_by_length.append(best(by_length) == question.gold)
    accuracy = sum(hits) / len(hits)
    result = {
        "acc": accuracy,
        "acc_stderr": math.sqrt(accuracy * (1 - accuracy) / max(1, len(hits) - 1)),
        "documents": len(hits),
        "seconds": round(time.monotonic() - began, 1),
    }
    if hits_by_length:
        result["acc_norm"] = sum(hits_by_length) / len(hits_by_length)
    if logs:
        result["perplexity"] = math.exp(-sum(logs) / len(logs))
    return result


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def run_all(
    subject: Subject,
    folder: Path,
    tasks: list[str],
    limit: int | None,
    batch: int,
    say: Callable[[str], None],
    on_task: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Every task of one model; ``on_task`` is called with the result so far after each."""
    result: dict[str, Any] = {"tasks": {}}
    for name in tasks:
        found = run(subject, TASKS[name], documents(file_of(name, folder), limit), batch)
        result["tasks"][name] = found
        result["average"] = sum(task["acc"] for task in result["tasks"].values()) / len(result["tasks"])
        say(f"{subject.name}: {name} {found['acc']:.1%} ± {found['acc_stderr']:.1%} ({found['seconds']:.0f} s)")
        on_task(result)
    return result


def write_tasks(target: Path, folder: Path, tasks: list[str]) -> None:
    """YAML files for lm_eval's --include_path (JSON is YAML)."""
    target.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        task = TASKS[name]
        settings: dict[str, Any] = {
            "task": f"lincompile_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(file_of(name, folder).resolve())}},
            "validation_split": "validation",
            "output_type": "loglikelihood" if task.choices is None else "multiple_choice",
            "doc_to_text": task.text,
            "doc_to_target": task.target,
        }
        if task.choices is None:
            settings["metric_list"] = [{"metric": "acc"}, {"metric": "perplexity"}]
        else:
            settings["doc_to_choice"] = task.choices
            settings["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
        (target / f"lincompile_{name}.yaml").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL_OR_DIR", help="the first is what the others are held to")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, help="only the first so many documents of each task")
    parser.add_argument("--batch", type=int, help="sequences at a time (default: 64 on a GPU, 1 on a CPU)")
    parser.add_argument("--runtime", default="torch", help="of artefacts: torch or onnx")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-tasks", type=Path, metavar="TASKS", help="write task files for lm_eval instead")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    tasks = asked.tasks.split(",")
    if unknown := [name for name in tasks if name not in TASKS]:
        parser.error(f"--tasks: '{unknown[0]}' is none of {', '.join(TASKS)}")
    if asked.limit is not None and asked.limit < 1:
        parser.error("--limit: at least 1")
    check(asked.folder, tasks)
    if asked.write_tasks:
        write_tasks(asked.write_tasks, asked.folder, tasks)
        return
    if not asked.models:
        parser.error("name a model")
    batch = asked.batch or (1 if asked.device == "cpu" else 64)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "limit": asked.limit, "models": {}}

    def keep(name: str, found: dict[str, Any]) -> None:
        result["models"][name] = found
        reference = next(iter(result["models"].values()))
        if found["tasks"].keys() == reference["tasks"].keys():
            found["kept"] = found["average"] / reference["average"] if reference["average"] else None
        if asked.json:
            asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for model in asked.models:
        runtime = asked.runtime if Path(model).is_dir() and (Path(model) / "lincompile.json").is_file() else "torch"
        subject = open_subject(model, runtime=runtime, device=asked.device)
        found = run_all(subject, asked.folder, tasks, asked.limit, batch, print, lambda r, m=model: keep(m, r))
        print(f"{model}: average {found['average']:.1%}, {found.get('kept') or 0:.1%} of the first model's", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LincompileError as error:
        sys.exit(f"zero_shot: {error}")
