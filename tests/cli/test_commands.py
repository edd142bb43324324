"""Every command on a tiny model, as a user runs it: what is on stdout, what it says, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lincompile import __version__
from lincompile.cli.common import count, duration
from lincompile.cli.main import COMMANDS

from .conftest import Run


def test_help_shows_compile_options_and_commands(cli: Run) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(f"  {name} " in result.out for name in COMMANDS)
    for option in (
        "--attn",
        "--keep-softmax",
        "--window",
        "--quant",
        "--distil",
        "--tokens",
        "--time",
        "--adapter",
        "--shard",
        "--target",
        "--device",
        "--dtype",
        "--seed",
        "--plan",
        "--output",
        "--json",
        "--trust",
        "--config",
        "--verbose",
    ):
        assert option in result.out, option
    assert cli().out == result.out, "no arguments show the help"


def test_version(cli: Run) -> None:
    assert cli("--version").out.strip() == f"lincompile {__version__}"


def test_python_m_lincompile_runs_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lincompile", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"lincompile {__version__}"


def test_inspect_prints_a_table_and_json(cli: Run) -> None:
    table = cli("inspect", "small_model:build")
    assert table.code == 0, table.err
    assert "blocks.0" in table.out and "2 rewrite" in table.out
    document = cli("inspect", "small_model:build", "--json").json
    assert document["format"] == "function"
    assert len(document["sites"]) == 2
    for site in document["sites"]:
        assert {"path", "kind", "window", "heads", "kv_heads", "head_dim", "verdict", "reason", "max_error"} <= set(
            site
        )
        assert site["kind"] == "causal" and site["verdict"] == "rewrite" and site["heads"] == 2
        assert site["max_error"] <= 1e-5


def test_inspect_says_plainly_that_a_model_has_no_attention(cli: Run) -> None:
    assert "no softmax attention" in cli("inspect", "small_model:plain").out


def test_the_artefact_is_complete(artefact: Path) -> None:
    names = {item.name for item in artefact.iterdir()}
    assert {"lincompile.json", "model.safetensors", "program.pt2", "report.html"} <= names
    manifest = json.loads((artefact / "lincompile.json").read_text())
    assert manifest["options"]["attn"] == "gla" and manifest["options"]["quant"] == "w6a8"
    assert [site["method"] for site in manifest["sites"]] == ["gla", "gla"]
    assert manifest["source"]["format"] == "function" and len(manifest["source"]["sha256"]) == 64
    assert [item["pass"] for item in manifest["passes"]] == ["canonicalize", "prove", "linearize", "quantize"]


def test_generate_prints_the_continuation_and_nothing_else(cli: Run, artefact: Path) -> None:
    result = cli("generate", artefact, "--prompt-ids", "1,2,3", "--max-new-tokens", 5)
    assert result.code == 0, result.err
    ids = [int(item) for item in result.out.strip().split(",")]
    assert ids[:3] == [1, 2, 3] and len(ids) == 8
    document = cli("generate", artefact, "--prompt-ids", "1,2,3", "--max-new-tokens", 5, "--json").json
    assert document["tokens"] == ids[3:]
    assert document["prompt_tokens"] == 3 and document["finish"] == "length"


def test_states_are_saved_and_loaded(cli: Run, artefact: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "state", ("--max-new-tokens", 5)
    whole = cli("generate", artefact, "--prompt-ids", "1,2,3,4,5,6", *options).out
    saved = cli("generate", artefact, "--prompt-ids", "1,2,3,4", "--save-state", file, "--max-new-tokens", 0)
    assert saved.code == 0 and saved.out == "1,2,3,4\n", saved.err
    rest = cli("generate", artefact, "--prompt-ids", "5,6", "--load-state", file, *options)
    assert rest.out.split(",")[2:] == whole.split(",")[6:] and "continuing after 4 tokens" in rest.err
    again = cli(
        "generate", artefact, "--prompt-ids", "1,2,3,4,5,6", "--load-state", file, "--save-state", file, *options
    )
    assert again.out == whole and "the first 4 tokens of the prompt already: 2 are left" in again.err
    # The state now holds all six: no prompt is needed.
    alone = cli("generate", artefact, "--load-state", file, *options)
    assert alone.out.strip().split(",") == whole.strip().split(",")[6:], alone.err
    small = file.stat().st_size
    long = ",".join(["7"] * 100)
    assert cli("generate", artefact, "--prompt-ids", long, "--save-state", file, *options).code == 0
    assert abs(file.stat().st_size - small) < 200, "a state doesn't grow with what was read"


def test_an_interrupted_prefill_resumes(
    cli: Run, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lincompile.lowering import generate
    from lincompile.lowering.generate import Session

    file, prompt = tmp_path / "state", ",".join(str(i % 50) for i in range(100))
    options = ("generate", artefact, "--prompt-ids", prompt, "--max-new-tokens", 4)
    whole = cli(*options).out
    step, calls = Session.step, iter(range(100))

    def interrupted(self: Session, *inputs: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step(self, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "PREFILL_CHUNK", 30)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", interrupted)
        stopped = cli(*options, "--save-state", file)
    assert stopped.code == 130 and f"resume with --load-state {file}" in stopped.err.replace("\n", "")
    other = cli("generate", artefact, "--prompt-ids", "9,9,9", "--load-state", file)
    assert other.code == 1 and "saved 60 tokens into another prompt" in other.error
    resumed = cli(*options, "--load-state", file)
    assert resumed.out == whole and "40 are left" in resumed.err


KILLED = """
import os, signal, sys
from lincompile.cli.generate import StateFiles
from lincompile.cli.main import run
from lincompile.lowering import generate

StateFiles.SHARE = 0  # these chunks take less time than saving one
generate.PREFILL_CHUNK = 30
step, left = generate.Session.step, [2]


def killed(self, *inputs):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return step(self, *inputs)


generate.Session.step = killed
run(sys.argv[1:])
"""


def test_the_same_command_goes_on_after_a_kill(cli: Run, artefact: Path, tmp_path: Path) -> None:
    """``kill -9`` in the middle of a prompt: each chunk was saved, and the same command reads the rest."""
    file, prompt = tmp_path / "state", ",".join(str(i % 50) for i in range(100))
    options = ["generate", str(artefact), "--prompt-ids", prompt, "--max-new-tokens", "4"]
    whole = cli(*options).out
    save = ["--save-state", str(file)]
    done = subprocess.run([sys.executable, "-c", KILLED, *options, *save], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    other = cli("generate", artefact, "--prompt-ids", "9,9,9", "--save-state", tmp_path / "copy", "--max-new-tokens", 1)
    assert other.code == 0, other.err
    remains = tmp_path / ".state.0.partial"
    remains.write_bytes(b"half")
    os.utime(remains, (0, 0))
    resumed = cli(*options, *save)
    assert resumed.out == whole and "has the first 60 tokens of this prompt: 40 are left" in resumed.err
    assert not remains.exists()
    # Now it is whole: a prompt cache, and what another prompt may replace.
    assert cli("generate", artefact, "--load-state", file, "--max-new-tokens", 4).out.strip() in whole
    assert "are left" not in cli(*options, *save).err
    shutil.copy(tmp_path / "copy", file)
    assert cli(*options, *save).out == whole


def test_sampling_is_seeded(cli: Run, artefact: Path) -> None:
    options = ("generate", artefact, "--prompt-ids", "1,2", "--max-new-tokens", 12, "--temperature", 2, "--seed")
    first = cli(*options, 1).out
    assert cli(*options, 1).out == first
    assert cli(*options, 2).out != first


def test_bench_reports_speed_and_state(cli: Run, artefact: Path) -> None:
    document = cli("bench", artefact, "--context", 32, "--new-tokens", 4, "--json").json
    assert document["decode_tokens_per_second"] > 0 and document["state_bytes"] > 0
    longer = cli("bench", artefact, "--context", 64, "--new-tokens", 4, "--json").json
    assert longer["state_bytes"] == document["state_bytes"], "a linear model's state is constant"


def test_a_plan_reads_shapes_and_writes_nothing(cli: Run, module: Path) -> None:
    before = sorted(module.parent.iterdir())
    document = cli("small_model:build", "--attn", "hedgehog", "--quant", "w6a8", "--plan", "--json").json
    assert [site["method"] for site in document["sites"]] == ["hedgehog", "hedgehog"]
    assert document["weight_bytes"]["after"] < document["weight_bytes"]["before"]
    heads = cli("small_model:build", "--attn", "lawcat", "--keep-softmax", "1.0", "--plan", "--json").json
    assert [site["path"].rpartition(".")[2] for site in heads["sites"] if site["method"] == "softmax"] == ["kv0"]
    chosen = cli("small_model:build", "--attn", "lawcat", "--keep-softmax", "heads:1", "--plan", "--json").json
    assert [site["path"][-4:-1] for site in chosen["sites"] if site["method"] == "softmax"] == [".kv"]
    assert any("--keep-softmax heads:1 keeps" in note for note in chosen["notes"]), "a function's module has weights"
    assert "KV heads are written SITE.HEAD" in cli("small_model:build", "--keep-softmax", "1,1.0", "--plan").error
    assert [item for item in sorted(module.parent.iterdir()) if item.name != "__pycache__"] == [
        item for item in before if item.name != "__pycache__"
    ]


def test_a_plan_of_an_adapter_is_of_its_sites(cli: Run, module: Path, tmp_path: Path) -> None:
    """What a compilation would refuse isn't planned."""
    import lincompile
    from lincompile.passes.distil.adapter import save_adapter

    made = lincompile.compile("small_model:build", attn="gla", window=8)
    save_adapter(tmp_path / "a.safetensors", made.teacher, made.program)
    options = ("small_model:build", "--adapter", tmp_path / "a.safetensors", "--plan", "--json")
    assert [site["method"] for site in cli(*options, "--attn", "gla").json["sites"]] == ["gla", "gla"]
    assert "give --attn gla --window 8" in cli(*options).error
    assert "give --attn gla --window 8" in cli(*options, "--attn", "gla", "--window", "4").error


def test_quantization_is_calibrated_saved_edited_and_shown(cli: Run, tmp_path: Path) -> None:
    ids, plan, scores = (tmp_path / name for name in ("ids.npy", "plan.json", "scores.json"))
    np.save(ids, np.random.default_rng(0).integers(0, 60, 600))
    options = ("small_model:build", "--attn", "softmax", "--quant", "int6", "--calibrate", ids)
    options += ("--quant-plan", plan, "--quant-scores", scores)
    first = cli(*options, "-o", tmp_path / "first")
    assert first.code == 0 and "predicted to cost" in first.out and "█" in first.out
    assert json.loads(scores.read_text())["tokens"] == 4 * 128  # windows as long as the model allows
    layers = json.loads(plan.read_text())["layers"]
    assert set(layers.values()) <= {"w6a6", "w6a8"}
    report = (tmp_path / "first" / "report.html").read_text()
    assert "Sensitivity" in report and all(name in report for name in layers)
    edited = next(iter(layers))
    plan.write_text(json.dumps({"format": 1, "layers": layers | {edited: "w8a8"}}))
    second = cli(*options, "-o", tmp_path / "second", "--json").json["quantization"]
    assert {layer["name"]: layer["scheme"] for layer in second["layers"]}[edited] == "w8a8"
    assert second["method"] == "gptq"
    plan.write_text(json.dumps({"format": 1, "layers": {"blocks.9.nothing": "w6a8"}}))
    refused = cli(*options, "-o", tmp_path / "third")
    assert refused.code == 1 and "the plan names 'blocks.9.nothing'" in refused.error


def test_stored_numbers_are_tuned_from_the_command_line(cli: Run, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 60, 3000))
    options = ("small_model:build", "--attn", "softmax", "--quant", "w6a8", "--calibrate", ids, "--quant-tune")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quant-tune-steps: 3\n")
    tuning = cli(*options, "scales", "--config", recipe, "-o", tmp_path / "a", "--json").json["quantization"]["tuning"]
    assert (tuning["mode"], tuning["steps"], tuning["tokens"]) == ("scales", 3, 3 * 8 * 128)
    limited = cli(*options, "codes", "--quant-tune-time", "1s", "-o", tmp_path / "b")
    assert limited.code == 0 and ("codes tuned on" in limited.out or "tuning didn't lower" in limited.err)
    unknown = cli(*options, "all", "-o", tmp_path / "c")
    assert unknown.code == 2 and "'all' is not one of 'scales', 'codes'" in unknown.error


def test_a_model_without_attention_can_still_be_quantized(cli: Run, tmp_path: Path) -> None:
    refused = cli("small_model:plain", "-o", tmp_path / "a")
    assert refused.code == 1
    assert "no softmax attention" in refused.error and "--attn softmax" in refused.error
    done = cli("small_model:plain", "--attn", "softmax", "--quant", "w6a8", "-o", tmp_path / "b", "--json")
    assert done.code == 0, done.err
    assert done.json["quantization"]["layers"]


def test_kept_sites_and_recipes(cli: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("attn: hedgehog\nkeep-softmax: '1,'\nseed: 3\n")
    document = cli("small_model:build", "--config", recipe, "--attn", "lawcat", "-o", tmp_path / "out", "--json").json
    assert [site["method"] for site in document["sites"]] == ["lawcat", "softmax"], "the command line wins"
    assert json.loads((tmp_path / "out" / "lincompile.json").read_text())["options"]["seed"] == 3


def test_distillation_from_the_command_line(cli: Run, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 60, 2000))
    done = cli(
        "small_model:build",
        "--attn",
        "lawcat",
        "--distil",
        tmp_path / "ids.npy",
        "--tokens",
        "2K",
        "--length",
        32,
        "--batch",
        4,
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.code == 0, done.err
    transfer = done.json["distillation"]
    assert transfer["tokens"] == 1920 and transfer["steps"] == 15
    assert sum(transfer["after"].values()) < sum(transfer["before"].values())


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("20M", 20_000_000), ("1.5k", 1500), ("2G", 2 * 10**9)])
def test_counts(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize(("text", "value"), [("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)])
def test_durations(text: str, value: float) -> None:
    assert duration(text) == value


def test_an_export_takes_the_place_of_the_one_before(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the one that compiling wrote: the manifest's hashes follow, and tell a damaged file."""
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    options = ["--prompt-ids", "1,2,3", "--max-new-tokens", "4"]
    assert cli("small_model:build", "--attn", "gla", "--quant", "w6a8", "--target", "onnx", "-o", out).code == 0
    before = (out / "onnx" / "model.onnx").read_bytes()
    assert cli("export", out, "--layout", "int8").code == 0
    model = out / "onnx" / "model.onnx"
    assert model.read_bytes() != before
    (out / "onnx" / "genai_config.json").write_text("{}")  # its user's to change
    for runtime in ("torch", "onnx"):
        result = cli("generate", out, *options, "--runtime", runtime)
        assert result.code == 0, result.error

    refused = cli("export", out, "--opset", "12")
    assert refused.code == 1 and cli("generate", out, *options, "--runtime", "onnx").code == 0
    kept = model.read_bytes()
    model.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "model.onnx doesn't match its hash" in cli("generate", out, *options).error
    shutil.rmtree(out / "onnx")
    assert cli("generate", out, *options).code == 0
    assert "has no ONNX program" in cli("generate", out, *options, "--runtime", "onnx").error


def test_verbose_says_which_kernels_run(
    cli: Run, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    shutil.copytree(artefact, out)
    assert cli("export", out, "--layout", "native").code == 0
    generate = ["generate", out, "--prompt-ids", "1,2,3", "--max-new-tokens", "2", "--runtime", "onnx"]
    monkeypatch.setenv("LINCOMPILE_NATIVE", "0")
    assert "stock kernels run instead of native ones: the native library is switched off" in cli(*generate, "-v").err
    assert "native" not in cli(*generate).err
