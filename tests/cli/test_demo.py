"""The demo's tables from fixed figures; ``make demo`` runs the demo itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from lincompile.cli import demo
from lincompile.lowering.options import Options
from lincompile.passes.errors import LincompileError

PERPLEXITIES = {"teacher": 20.0, "undistilled": 2000.0, "student": 50.0}
SPEED = {"prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 5.0}
FIGURES = {
    "model": "model.gguf",
    "parameters": 1_000_000,
    "parameters_added": 2_345,
    "sites": {"found": 4, "proved": 4, "rewritten": 4},
    "bytes": {"float32": 4_000_000, "float16": 2_000_000, "ideal_6_bits": 750_000, "on_disk": 900_000},
    "layer_errors": {f"layer.{i}": {"before": 1.0 + i, "after": 0.25 * i} for i in range(4)},
    "distillation": None,
    "adapter": {"tokens": 41_000_000, "seconds": 460.2, "gpu": "GPU"},
    "perplexity": {name: {"perplexity": value, "nll": 1.0, "tokens": 511} for name, value in PERPLEXITIES.items()},
    "speed": {"teacher": SPEED, "student": SPEED},
    "state_bytes": {"8192": 3_300_000, "32768": 3_300_000},
    "kv_cache_bytes": {"8192": 377_500_000, "32768": 1_510_000_000},
    "text": {"Hello": "Hello\n\n\nworld [bold]"},
    "seconds": {"total": 240.0},
    "peak_memory_bytes": 2_000_000_000,
}


SCRATCH = FIGURES | {"adapter": None, "distillation": {"seconds": 30.0, "tokens": 4096, "steps": 16}}


@pytest.mark.parametrize(
    ("figures", "other"),
    [
        (FIGURES, ("41,000,000 tokens in 460 s on one GPU", f"--adapter {demo.PURE}")),
        (SCRATCH, ("4,096 tokens in 30 s on this CPU", "--distil YOUR_TEXT.txt")),
    ],
)
def test_tables_show_every_figure_and_the_honest_ratio(
    figures: dict[str, Any], other: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    demo.print_tables(figures, Path("out"), Path("model.gguf"))
    shown = capfd.readouterr().out
    for text in (
        "4 of 4 proved",
        "900.0 kB on disk",
        "750.0 kB",
        "50.0 (before distillation 2,000)",
        "1.51 GB KV cache",
        "3.3 MB state",
        "+ 2,345",
        "Hello ⏎ world [bold]",
        "2.50 times the teacher's",
        *other,
    ):
        assert text in shown, text
    assert "4.000" in shown and "0.750" in shown, "the last layer's error before and after"


def test_the_text_ships_and_nothing_held_out_is_trained_on() -> None:
    train, held_out = (file.read_text(encoding="utf-8") for file in (demo.TRAIN, demo.HELD_OUT))
    paragraphs = {text for text in held_out.split("\n\n") if len(text) > 80}
    assert len(paragraphs) > 50
    assert not paragraphs & set(train.split("\n\n"))


def test_time_without_distillation_is_refused() -> None:
    result = CliRunner().invoke(demo.command, ["--time", "5s"])
    assert result.exit_code == 2 and "only --from-scratch" in result.output


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m-lawcat", {"lawcat removed floor -1.0"}),
        ("smollm2-135m-lawcat-window64", {"lawcat+64 removed floor -1.0"}),
        ("smollm2-135m-lawcat-window64-passkey", {"lawcat+64 removed floor -1.0"}),
        ("smollm2-135m-lawcat-window64-softmax6", {"lawcat+64 kept", "softmax"}),
    ],
)
def test_adapters_ship_with_their_record(name: str, expected: set[str]) -> None:
    file = demo.DATA / f"{name}.safetensors"
    with safe_open(file, framework="pt") as adapter:
        metadata = adapter.metadata()
    record = json.loads(metadata["record"])
    assert file.stat().st_size <= 12_000_000
    assert record["tokens"] > 20_000_000 and record["seconds"] <= 600 and record["gpu"] and record["command"]
    assert {"valid", "wikitext2"} <= set(record["perplexity"])
    methods = set(json.loads(metadata["sites"]).values())
    assert methods == expected


@pytest.mark.parametrize("arguments", [[], ["--from-scratch"]])
def test_what_it_asks_of_the_compiler_is_accepted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo takes minutes; its options are checked before anything is loaded."""
    seen: list[Options] = []

    def compile(model: Path, *, reporter: Any, **options: Any) -> None:
        seen.append(Options(**options))
        seen[0].check()
        raise LincompileError("far enough")

    monkeypatch.setattr("lincompile.lowering.compiler.compile", compile)
    monkeypatch.setattr("lincompile.passes.formats.load.find_packaged_model", lambda name: tmp_path / "model.gguf")
    result = CliRunner().invoke(demo.command, [*arguments, "-o", str(tmp_path / "out")])
    assert "far enough" in str(result.exception), result.exception
    assert (seen[0].adapter is None) == bool(arguments)
