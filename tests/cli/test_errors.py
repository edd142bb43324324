"""Bad input: one line that says what, where and what to do; exit code 1 or 2; nothing half-written."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import Run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--attn", "linear"], "'linear' is not one of 'gla', 'hedgehog'"),
        (["m", "--quant", "int5"], "unknown quantization 'int5'; the choices are none, int6"),
        (["m", "--quant", "auto:99"], "ask for 6 to 16 bits"),
        (["m", "--keep-softmax", "some"], "write a number (6), 'auto:6', site indices (0,5,9), KV heads (17.1"),
        (["m", "--keep-softmax", "heads:few"], "heads:few: write how many KV heads to keep, from 1 (heads:4)"),
        (["m", "--tokens", "many"], "isn't a positive whole number such as"),
        (["m", "--tokens", "0"], "isn't a positive whole number such as"),
        (["m", "--time", "soon"], "isn't a time such as 90s"),
        (["m", "--bogus"], "No such option"),
        (["m", "--target", "wasm"], "'wasm' is not one of"),
        (["m", "--dtype", "int3"], "'int3' is not one of"),
        (["m", "--window", "0"], "--window"),
        (["m", "--shard", "tp"], "'tp' is not"),
        (["m", "n"], "unexpected extra argument"),
        (["m", "--target", "triton"], "needs --device cuda"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["eval", "m"], "Missing option '--text'"),
        (["generate", "d"], "exactly one of --prompt, --prompt-file and --prompt-ids"),
        (["generate", "d", "--prompt", "a", "--prompt-ids", "1"], "exactly one of"),
        (["generate", "d", "--prompt", "a", "--runtime", "tpu"], "'tpu' is not one of"),
    ],
)
def test_usage_errors_exit_with_2(cli: Run, arguments: list[str], message: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert message in result.error
    assert result.out == ""


def test_text_that_cannot_calibrate_is_named(cli: Run, tmp_path: Path) -> None:
    for ids, message in (
        ([], "holds no tokens"),
        ([3, 60], "holds token 60, and the model knows 60"),
        ([-1, 3], "holds token -1, and the model knows 60"),
    ):
        np.save(tmp_path / "ids.npy", np.array(ids, dtype=np.int64))
        done = cli("small_model:build", "--attn", "softmax", "--quant", "int6", "--calibrate", tmp_path / "ids.npy")
        assert done.code == 1 and message in done.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "no such file"),
        (["inspect", "missing"], "no such file"),
        (["small_model:nothing"], "nothing"),
        (["small_model:build", "--device", "tpu"], "--device tpu: the choices are cpu"),
        (["small_model:build", "--device", "cuda:99"], "--device cuda:99: this machine shows"),
        (["small_model:build", "--keep-softmax", "auto:4"], "auto:N"),
        (["small_model:build", "--quant", "w6a8", "--quant-method", "gptq"], "gptq needs text to calibrate on"),
        (["small_model:build", "--quant", "auto:7"], "auto:7 needs text to calibrate on: add --calibrate FILE"),
        (["small_model:build", "--quant-plan", "p.json"], "--quant-plan is about quantization: add --quant"),
        (["small_model:build", "--keep-softmax", "0,9"], "the model has 2 attention sites"),
        (["small_model:build", "--keep-softmax", "9"], "the model has only 2 attention sites"),
        (["small_model:build", "--keep-softmax", "heads:9"], "heads:9: the model has 4 KV heads to choose from"),
        (["small_model:build", "--keep-softmax", "heads:1", "--attn", "softmax"], "all of them stay softmax"),
        (["small_model:backwards", "--keep-softmax", "heads:3"], "2 KV heads to choose from; 'blocks.0' isn't proved"),
        (["small_model:build", "--distil", "missing.txt"], "missing.txt doesn't exist"),
        (["small_model:build", "--config", "missing.yaml"], "missing.yaml can't be read"),
        (["generate", "missing", "--prompt", "a"], "isn't a folder"),
        (["bench", "."], "isn't a lincompile artefact"),
        (["eval", "missing", "--text", "missing.txt"], "missing.txt doesn't exist"),
        (["export", "."], "isn't a lincompile artefact"),
    ],
)
def test_what_cant_be_done_exits_with_1(cli: Run, arguments: list[str], message: str, module: Path) -> None:
    result = cli(*arguments)
    assert result.code == 1
    assert message in result.error
    assert result.out == ""
    assert {item.name for item in module.parent.iterdir()} <= {"small_model.py", "__pycache__"}, "nothing was written"


def files(tmp_path: Path) -> dict[str, Path]:
    """Damaged and hostile model files, by what is wrong with them."""
    made = {}

    def add(name: str, data: bytes) -> None:
        made[name] = tmp_path / name
        made[name].write_bytes(data)

    add("empty.pt", b"")
    add("noise.bin", bytes(range(7, 250)) * 4)
    add("truncated.gguf", b"GGUF\x03\x00\x00\x00" + b"\x01\x00\x00\x00")
    add("truncated.safetensors", (1000).to_bytes(8, "little") + b'{"a":{"dtype":"F32"')
    torch.save({"tokens.weight": torch.zeros(60, 32)}, tmp_path / "whole.pt")
    add("truncated.pt", (tmp_path / "whole.pt").read_bytes()[:300])
    add("payload.pt", pickle.dumps(Payload()))
    made["partial_state.pt"] = tmp_path / "whole.pt"
    return made


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "name", ["empty.pt", "noise.bin", "truncated.gguf", "truncated.safetensors", "truncated.pt", "payload.pt"]
)
def test_damaged_and_hostile_files(cli: Run, tmp_path: Path, name: str) -> None:
    result = cli(files(tmp_path)[name], "-o", tmp_path / "out")
    assert result.code == 1
    assert name in result.error
    assert not Path("executed").exists(), "the payload ran"
    assert not (tmp_path / "out").exists()


def test_a_state_dict_with_missing_keys_names_them(cli: Run, tmp_path: Path) -> None:
    result = cli(files(tmp_path)["partial_state.pt"], "--model", "small_model:build", "-o", tmp_path / "out")
    assert result.code == 1
    assert "missing" in result.error


def test_nan_weights_are_named(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Path) -> None:
    monkeypatch.syspath_prepend(str(module.parent))
    import small_model

    model = small_model.build()
    model.blocks[1].out.weight.data[0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    result = cli(tmp_path / "nan.pt", "--model", "small_model:build", "-o", tmp_path / "out")
    assert result.code == 1
    assert "NaN" in result.error and "blocks.1.out.weight" in result.error


def test_an_occupied_output_is_refused_before_any_work(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = cli("missing.gguf", "-o", tmp_path)
    assert result.code == 1
    assert "holds something else ('notes.txt')" in result.error
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_that_cant_be_written(cli: Run) -> None:
    result = cli("small_model:build", "-o", "/proc/lincompile/out")
    assert result.code == 1
    assert "can't be written" in result.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "text"], "no tokenizer.json: give token ids"),
        (["--prompt-ids", ""], "the prompt is empty"),
        (["--prompt-ids", "1,60"], "token id 60 is outside the model's vocabulary"),
        (["--prompt-ids", ",".join(["1"] * 129)], "129 tokens, the model accepts at most 128"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature must be"),
        (["--prompt-ids", "1", "--top-p", "0"], "top_p must be"),
        (["--prompt-ids", "1", "--max-new-tokens", "-1"], "max_new_tokens must be"),
        (["--prompt-file", "missing.txt"], "missing.txt can't be read"),
        (["--prompt-ids", "1", "--runtime", "onnx"], "has no ONNX program: run 'lincompile export"),
        (["--prompt-ids", "1", "--runtime", "aot"], "has no compiled package: run 'lincompile export"),
        (["--prompt-ids", "1", "--load-state", "missing"], "there is no state file missing"),
        (["--prompt-ids", "1", "--load-state", "small_model.py"], "small_model.py can't be read"),
        (["--prompt-ids", "1", "--save-state", "no/such"], "--save-state no/such: the folder no doesn't exist"),
    ],
)
def test_bad_prompts_and_options(cli: Run, artefact: Path, arguments: list[str], message: str) -> None:
    result = cli("generate", artefact, *arguments)
    assert result.code == 1
    assert message in result.error
    assert result.out == ""


def test_a_recipe_with_an_unknown_option(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("atn: gla\n")
    result = cli("small_model:build", "--config", tmp_path / "recipe.yaml")
    assert result.code == 2
    assert "unknown option 'atn'" in result.error


def test_a_recipe_says_what_the_command_line_says(cli: Run, tmp_path: Path) -> None:
    """10 of ``1.10`` is a KV head; as a number it would be 1."""
    (tmp_path / "recipe.yaml").write_text("keep-softmax: 0.10\nadapter: null\nrewrite-sliding: true\n")
    result = cli("small_model:build", "--config", tmp_path / "recipe.yaml", "--plan")
    assert result.code == 1 and "0.10" in result.error, result.error


def test_an_internal_error_is_one_line_too(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("lincompile.passes.formats.load.load_model", broken)
    result = cli("inspect", "small_model:build")
    assert result.code == 1
    assert "internal error, please report it: RuntimeError: first line second line" in result.error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(module: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lincompile", "small_model:build", "-o", str(tmp_path / "out")],
        cwd=module.parent,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a background shell starts its jobs
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("capture"):
            break
    time.sleep(0.3)
    process.send_signal(number)
    rest = process.stderr.read()
    # Where the interruption passes through an exec(), as export has them, Python itself ends by SIGINT: 130 in a shell.
    assert process.wait(60) in (130, -signal.SIGINT), rest
    assert "Traceback" not in rest
    assert rest.rstrip().splitlines()[-1].startswith("lincompile: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_import_ends_first(tmp_path: Path) -> None:
    """Native modules abort the process when an exception meets them while they are imported."""
    body = "print('begins', file=sys.stderr)\ntime.sleep(1)\nprint('ends', file=sys.stderr)"
    text = f"import sys, time\n{body}\ndef build():\n    time.sleep(30)\n"
    (tmp_path / "slow_import.py").write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "lincompile", "inspect", "slow_import:build"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("begins"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().splitlines()
    assert process.wait(60) == 130
    assert rest[0] == "ends"
    assert rest[-1].startswith("lincompile: interrupted")


@pytest.mark.parametrize("compiled", [False, True])
def test_eval_beyond_the_positions(cli: Run, artefact: Path, tmp_path: Path, compiled: bool) -> None:
    """An uncompiled model's limit is found as a compiled one's is: in the table of its positions."""
    np.save(tmp_path / "ids.npy", np.arange(200) % 50)
    model = artefact if compiled else "small_model:build"
    result = cli("eval", model, "--text", tmp_path / "ids.npy", "--context", "129")
    assert result.code == 2
    assert "--context 129: the model accepts at most 128 positions" in result.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16"], "--dtype is for models, and {} is an artefact: it keeps the dtype"),
        (["--model", "small_model:build"], "--model is for models, and {} is an artefact: it brings its own program"),
        (["--trust"], "--trust is for models, and {} is an artefact: it brings no code"),
    ],
)
def test_eval_of_an_artefact_ignores_no_option(cli: Run, artefact: Path, options: list[str], message: str) -> None:
    (artefact.parent / "t.txt").write_text("some text")
    result = cli("eval", artefact, "--text", artefact.parent / "t.txt", *options)
    assert result.code == 2
    assert message.format(artefact) in result.error
