"""lm-evaluation-harness, offline on local tasks: log-likelihoods, rolling perplexity, generation, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_llama
import torch

from lincompile.lowering import package
from lincompile.passes.errors import LincompileError

from .conftest import write_word_tokenizer

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
harness = pytest.importorskip("lincompile.lowering.evaluation.harness")

TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"question": "w4 w5 w6", "choices": ["w7", "w8 w9", "w10"], "answer": 0},
    {"question": "w11", "choices": ["w12", "w13"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "out"
    return package.save(toy.step, folder, manifest={"sites": toy.sites}, tokenizer=write_word_tokenizer, eos_ids=[1])


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return harness.LincompileLM(path=str(folder))


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    session = model.session
    mask = torch.ones_like(tokens).bool()
    return session.step(tokens, torch.arange(len(ids))[None], mask, session.initial_states(1))[0][0].log_softmax(-1)


def test_log_likelihoods_equal_one_forward(model: Any) -> None:
    pairs = [("w4 w5 w6", " w7 w8"), ("w4 w5 w6", " w9"), ("", "w9 w10"), ("w4 w5 w6", " w32")]
    answers = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, answers, strict=True):
        before, after = model.codec.encode(context) or [1], model.codec.encode(continuation)
        rows = logits(model, before + after)[len(before) - 1 : -1]
        assert score == pytest.approx(float(rows.gather(1, torch.tensor(after)[:, None]).sum()), abs=1e-4)
        assert greedy == (rows.argmax(-1).tolist() == after)


def test_batches_give_the_same_scores(folder: Path, model: Any) -> None:
    pairs = [("w4 w5 w6", " w7 w8"), ("w4 w5 w6", " w9"), ("", "w9 w10"), ("w4 w5 w6 w7 w8", " w32")]
    one_by_one = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    batched = harness.LincompileLM(path=str(folder), batch_size="8")
    answers = batched.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    assert batched.batch == 8 and [greedy for _, greedy in answers] == [greedy for _, greedy in one_by_one]
    assert [score for score, _ in answers] == pytest.approx([score for score, _ in one_by_one], abs=1e-4)


def test_an_uncompiled_model_is_scored_by_the_same_code(tmp_path: Path) -> None:
    teacher = harness.LincompileLM(path=str(tiny_llama.save(tmp_path / "model")))
    (score,) = teacher.loglikelihood([request("one two", " three")], disable_tqdm=True)
    before, after = teacher.codec.encode("one two"), teacher.codec.encode(" three")
    rows = logits(teacher, before + after)[len(before) - 1 : -1]
    assert score[0] == pytest.approx(float(rows.gather(1, torch.tensor(after)[:, None]).sum()), abs=1e-3)


def test_rolling_windows_cover_the_text(folder: Path) -> None:
    model = harness.LincompileLM(path=str(folder), max_length=6)
    ids = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    (score,) = model.loglikelihood_rolling([request(" ".join(f"w{i}" for i in ids))], disable_tqdm=True)
    expected = 0.0
    for inputs, targets in (([1, *ids[:5]], ids[:6]), (ids[3:9], ids[6:])):
        expected += float(logits(model, inputs)[-len(targets) :].gather(1, torch.tensor(targets)[:, None]).sum())
    assert score == pytest.approx(expected, abs=1e-3)


def test_generation_stops_at_a_stop_sequence(model: Any) -> None:
    free = model.generate_until([request("w4 w5 w6 w7", {"until": [], "max_gen_toks": 8})])[0]
    words = free.split()
    stop = words[3]
    cut = model.generate_until([request("w4 w5 w6 w7", {"until": [stop], "max_gen_toks": 8})])[0]
    assert len(words) >= 4 and cut == free.split(stop)[0]


def test_answers_that_leave_no_room_for_a_prompt_are_refused(folder: Path) -> None:
    """A prompt cut down to its last token would be answered, and scored."""
    short = harness.LincompileLM(path=str(folder), max_length=8)
    with pytest.raises(LincompileError, match="8 new tokens leave no room for a prompt in 8: lower the task's max_gen"):
        short.generate_until([request("w4 w5 w6 w7", {"until": [], "max_gen_toks": 8})])
    assert short.generate_until([request("w4 w5 w6 w7", {"until": [], "max_gen_toks": 4})])[0].split()


@pytest.mark.parametrize("plain", [False, True])
def test_the_command_line_runs_a_local_task(folder: Path, tmp_path: Path, plain: bool) -> None:
    """As ``python -m lincompile.lm_eval``; and as plain ``lm_eval``, on a task that makes it import lincompile."""
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    task = tmp_path / "choices.yaml"
    hook = "process_docs: !function lincompile.lm_eval.unchanged\n" if plain else ""
    task.write_text(TASK.format(file=data) + hook)
    command = [sys.executable, "-m", "lm_eval" if plain else "lincompile.lm_eval", "--model", "lincompile"]
    command += ["--model_args", f"path={folder}", "--output_path", str(tmp_path / "result.json")]
    command += ["--tasks", str(task)] if plain else ["--tasks", "choices", "--include_path", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("result*.json")
    assert 0 <= json.loads(file.read_text())["results"]["choices"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "missing"}, "no such file"),
        ({"runtime": "tpu"}, "the runtimes are torch and onnx"),
        ({"batch": 3}, "no 'batch' for lincompile"),
    ],
)
def test_bad_arguments(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        harness.LincompileLM(**{"path": str(folder), **options})
