"""transformers' own doors: auto classes, pipelines, streamers, saved prompt caches, conversations."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lincompile.lowering import package
from lincompile.lowering.artefact.graph_file import weights_of
from lincompile.passes.errors import LincompileError

from .conftest import write_word_tokenizer

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("lincompile.hf", reason="transformers isn't installed", exc_type=LincompileError)

PROMPT = [[4, 5, 6, 7, 8, 9, 10]]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def folder(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto") / "out"
    return package.save(toy.step, folder, manifest={"sites": toy.sites}, tokenizer=write_word_tokenizer, eos_ids=[1])


@pytest.fixture(scope="module")
def model(folder: Path) -> hf.LincompileForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_auto_classes_open_an_artefact(model: hf.LincompileForCausalLM, folder: Path) -> None:
    assert isinstance(model, hf.LincompileForCausalLM) and not model.training
    ours = package.open_artefact(folder).continue_ids(PROMPT, 8).tokens[0]
    assert model.generate(torch.tensor(PROMPT), **GREEDY)[0, 7:].tolist() == ours
    assert transformers.AutoConfig.from_pretrained(folder).vocab_size == model.config.vocab_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w4 w5")["input_ids"] == [4, 5]


def test_the_tokenizer_needs_no_lincompile(folder: Path) -> None:
    code = (
        f"from transformers import AutoTokenizer; print(AutoTokenizer.from_pretrained({str(folder)!r})('w4').input_ids)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[4]"


def test_pipelines(folder: Path, model: hf.LincompileForCausalLM) -> None:
    pipe = transformers.pipeline("text-generation", model=str(folder))
    ids = model.generate(torch.tensor(PROMPT), **GREEDY)[0, 7:].tolist()
    text = pipe(" ".join(f"w{i}" for i in PROMPT[0]), return_full_text=False, **GREEDY)[0]["generated_text"]
    assert pipe.tokenizer(text)["input_ids"] == [i for i in ids if i > 1]
    batch = pipe(["w4 w5 w6", "w7"], batch_size=2, **GREEDY)
    assert [row[0]["generated_text"] for row in batch] == [
        pipe(p, **GREEDY)[0]["generated_text"] for p in ("w4 w5 w6", "w7")
    ]
    with pytest.raises(LincompileError, match="row 1 of the batch is empty"):
        inputs = pipe.tokenizer(["w4 w5", ""], padding=True, padding_side="left", return_tensors="pt")
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **GREEDY)
    chat = pipe([{"role": "user", "content": "w9"}], **GREEDY)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant" and chat[0]["content"] == "w9"


def test_streaming(model: hf.LincompileForCausalLM, folder: Path) -> None:
    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Collect()
    tokens = model.generate(torch.tensor(PROMPT), streamer=streamer, **GREEDY)
    assert streamer.seen == [*tokens[0].tolist(), -1]


@pytest.mark.parametrize("options", [GREEDY, {**GREEDY, "num_beams": 3, "num_return_sequences": 2}])
def test_a_conversation_continues_without_reading_again(
    model: hf.LincompileForCausalLM, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.generate(torch.tensor(PROMPT), return_dict_in_generate=True, **GREEDY)
    turn = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
    whole = model.generate(turn, **options)
    lengths: list[int] = []
    advance = model.session.advance
    monkeypatch.setattr(
        model.session, "advance", lambda tokens, *rest: lengths.append(tokens.shape[1]) or advance(tokens, *rest)
    )
    again = model.generate(turn, past_key_values=hf.states_of(first), **options)
    assert again.tolist() == whole.tolist()
    assert max(lengths) <= 4  # the last token of the answer, and the three of the next turn


def test_a_prompt_cache_on_disk(model: hf.LincompileForCausalLM, tmp_path: Path) -> None:
    prompt = torch.tensor(PROMPT)
    cache = hf.states_of(model(prompt[:, :5]))
    file = model.save_states(tmp_path / "cache", cache, prompt)
    # The same file serves lincompile's own loop, and the other way round.
    saved = model.artefact.load_state(file)
    assert saved.unread(PROMPT[0]) == (PROMPT[0][5:], True)
    loaded = model.load_states(model.artefact.save_state(tmp_path / "again", saved.state), batch=1)
    assert (
        model.generate(prompt, past_key_values=loaded, **GREEDY).tolist() == model.generate(prompt, **GREEDY).tolist()
    )
    with pytest.raises(LincompileError, match="holds 1 sequences, 2 are wanted"):
        model.load_states(file, batch=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "the artefact holds torch.float32"),
        ({"device_map": {"a": "cpu", "b": "cuda:0"}}, "names 2 devices"),
        ({"device_map": "sideways"}, "names no device"),
        ({"device_map": "cuda:99"}, "this machine shows"),
        ({"device_map": "meta"}, "runs on the CPU or a CUDA device"),
        ({"attn_implementation": "flash_attention_2"}, "brings its own attention"),
        ({"vocab_size": 99}, "vocab_size=99: the program was compiled for 40"),
        ({"quantization_config": {"bits": 3}}, "no option 'quantization_config'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def test_options_that_change_nothing(folder: Path) -> None:
    for options in ({"dtype": "auto"}, {"dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        assert hf.from_pretrained(folder, **options).device.type == "cpu"


def test_padding_between_tokens_is_refused(model: hf.LincompileForCausalLM) -> None:
    cache = hf.states_of(model(torch.tensor([[4, 5], [6, 7]])))
    with pytest.raises(LincompileError, match="padding after tokens already read"):
        model(
            torch.tensor([[8, 9], [1, 9]]),
            attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]),
            past_key_values=cache,
        )


def rows() -> list[dict[str, torch.Tensor]]:
    """Training examples of different lengths."""
    lengths = [7, 3, 5, 7, 2, 6, 4, 7]
    return [{"input_ids": torch.arange(4, 4 + n), "labels": torch.arange(4, 4 + n)} for n in lengths]


@torch.no_grad()
def loss(of: hf.LincompileForCausalLM) -> float:
    return float(of(torch.tensor(PROMPT), labels=torch.tensor(PROMPT)).loss)


def trainer(model: hf.LincompileForCausalLM, output: Path, **options: object) -> transformers.Trainer:
    pytest.importorskip("accelerate")
    known: dict[str, object] = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
    }
    known |= {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    arguments = transformers.TrainingArguments(output_dir=str(output), **{**known, **options})
    return transformers.Trainer(model.requires_grad_(True), arguments, train_dataset=rows(), eval_dataset=rows()[:2])


def test_it_trains_under_trainer_and_saves_what_it_learned(folder: Path, tmp_path: Path) -> None:
    model = hf.from_pretrained(folder)
    assert model.artefact.holds(weights_of(model.program))
    before = loss(model)
    run = trainer(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    model.eval()
    after = loss(model)
    assert after < before
    run.save_model()  # beside the checkpoints
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert loss(again) == pytest.approx(after)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run")("w4")["input_ids"] == [4]
    assert "changed since compilation" in again.artefact.manifest["notes"][-1]
    again.save_pretrained(tmp_path / "run")  # an artefact is replaced
    resumed = hf.from_pretrained(folder)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert loss(resumed.eval()) == pytest.approx(after, rel=1e-4), "two steps, stopped, two more = four steps"


def test_accumulated_gradients_weigh_every_token_alike(folder: Path, tmp_path: Path) -> None:
    """Rows of different lengths, one at a time, must give the gradient that they give together."""
    run = trainer(hf.from_pretrained(folder), tmp_path, max_steps=1, gradient_accumulation_steps=len(rows()))
    run.train()
    model = hf.from_pretrained(folder).requires_grad_(True)
    items = sum(len(row["labels"]) - 1 for row in rows())
    for row in rows():
        model(row["input_ids"][None], labels=row["labels"][None], num_items_in_batch=items).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert run.state.log_history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda f: (f / "config.json").write_text("{}"), {}, "holds another model"),
        (lambda f: f.rmdir() or f.write_text(""), {}, "isn't a folder"),
        (lambda f: None, {"push_to_hub": True}, "no option 'push_to_hub'"),
        (lambda f: None, {"safe_serialization": False}, "as safetensors only"),
    ],
)
def test_what_save_pretrained_refuses(
    model: hf.LincompileForCausalLM, tmp_path: Path, prepare: Any, options: dict[str, object], message: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    prepare(target)
    with pytest.raises(LincompileError, match=message):
        model.save_pretrained(target, **options)


def test_names_are_the_programs_own(model: hf.LincompileForCausalLM, toy: SimpleNamespace) -> None:
    ours = dict(model.named_parameters(remove_duplicate=False))
    theirs = dict(toy.graph_module.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    model.load_state_dict(toy.graph_module.state_dict())
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.program.head.weight and twin.head.weight is not model.head.weight
    assert pickle.loads(pickle.dumps(model)).generate(torch.tensor(PROMPT), **GREEDY).tolist() == (
        twin.generate(torch.tensor(PROMPT), **GREEDY).tolist()
    )
    with pytest.raises(LincompileError, match=r"can't go from torch.float32 to torch.float16"):
        model.half()


def test_generation_settings_are_saved(folder: Path, tmp_path: Path) -> None:
    model = hf.from_pretrained(folder)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "copy")
    again = hf.from_pretrained(tmp_path / "copy")
    assert again.generate(torch.tensor(PROMPT)).shape == (1, 10)


def test_the_program_compiles_as_one_graph(model: hf.LincompileForCausalLM) -> None:
    compiled = torch.compile(model.program, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (7, 3):
        tokens = torch.tensor(PROMPT)[:, :length]
        inputs = (tokens, torch.arange(length)[None], torch.ones_like(tokens).bool(), *model.session.initial_states(1))
        torch.testing.assert_close(compiled(*inputs)[0], model.program(*inputs)[0])
