"""``benchmarks/zero_shot.py``: prompts as lm_eval writes them, scores as it counts them, and bad files by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lincompile.passes.errors import LincompileError

pytest.importorskip("jinja2")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def zero_shot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import zero_shot as script

    return script


def test_prompts(zero_shot: ModuleType) -> None:
    def ask(task: str, row: dict[str, Any]) -> tuple[str, list[str], int]:
        (asked,) = zero_shot.questions(zero_shot.TASKS[task], [row])
        return asked.context, asked.continuations, asked.gold

    arc = {"question": "1", "choices": {"text": ["2", "[3]"], "label": ["A", "B"]}, "answerKey": "B"}
    assert ask("arc_easy", arc) == ("Question: 1\nAnswer:", [" 2", " [3]"], 1)
    piqa = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    assert ask("piqa", piqa) == ("Question: g\nAnswer:", [" a", " b"], 0)
    boolq = {"passage": "p", "question": "is it", "answer": True}
    assert ask("boolq", boolq) == ("p\nQuestion: is it?\nAnswer:", [" no", " yes"], 1)
    del boolq["answer"]  # as SuperGLUE has it
    assert ask("boolq", {**boolq, "label": 0})[2] == 0 and ask("boolq", {**boolq, "label": 1})[2] == 1
    assert ask("lambada", {"text": "a b\n\nc d."}) == ("a b\n\nc", [" d."], 0)
    with pytest.raises(LincompileError, match="piqa: document 1 lacks what the task needs"):
        ask("piqa", {"goal": "g"})


def test_scores_of_a_model_that_knows(zero_shot: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Knows:
        """Scores short continuations high, and the letter z always highest."""

        def __init__(self, *_: Any) -> None: ...

        def score(self, requests: Any, batch: int, on_answer: Any) -> Any:
            return [(0.0 if 122 in ids else -float(len(ids)), 122 in ids) for _, ids in requests]

    subject = SimpleNamespace(tokenizer=lambda purpose: None, session=SimpleNamespace(max_positions=None), chunk=8)
    monkeypatch.setattr(zero_shot, "Scorer", Knows)
    monkeypatch.setattr(zero_shot, "encoded", lambda codec, context, text: ([1], [ord(c) for c in text]))
    rows = [
        {"goal": "g", "sol1": "zz", "sol2": "a", "label": 0},
        {"goal": "g", "sol1": "a", "sol2": "bb", "label": 1},
    ]
    result = zero_shot.run(subject, zero_shot.TASKS["piqa"], rows)
    assert result["acc"] == 0.5 and result["documents"] == 2 and result["acc_norm"] == 1.0
    words = [{"text": "one z"}, {"text": "one two"}, {"text": "three z"}, {"text": "four z"}]
    result = zero_shot.run(subject, zero_shot.TASKS["lambada"], words)
    assert result["acc"] == 0.75 and "perplexity" in result


def test_files_are_found_or_named(zero_shot: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(LincompileError, match="has 0 files for piqa"):
        zero_shot.file_of("piqa", tmp_path)
    (tmp_path / "piqa_train_2000.jsonl").write_text("{}\n")
    (tmp_path / "piqa_validation.jsonl").write_text("not json\n")
    assert zero_shot.file_of("piqa", tmp_path).name == "piqa_validation.jsonl"
    with pytest.raises(LincompileError, match=r"piqa_validation\.jsonl can't be read"):
        zero_shot.check(tmp_path, ["piqa"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LincompileError, match=r"empty\.jsonl is empty"):
        zero_shot.documents(tmp_path / "empty.jsonl", None)


def test_task_files_for_lm_eval(zero_shot: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "lambada_test.jsonl").write_text("{}\n")
    zero_shot.write_tasks(tmp_path / "tasks", tmp_path, ["lambada"])
    settings = json.loads((tmp_path / "tasks" / "lincompile_lambada.yaml").read_text())
    assert settings["output_type"] == "loglikelihood" and settings["doc_to_text"] == zero_shot.TASKS["lambada"].text
