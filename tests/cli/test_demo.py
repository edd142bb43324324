"""The demo's tables from fixed figures; ``make demo`` runs the demo itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from lincompile.cli import demo

PERPLEXITIES = {"teacher": 20.0, "undistilled": 2000.0, "student": 50.0}
SPEED = {"prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 5.0}
FIGURES = {
    "model": "model.gguf",
    "parameters": 1_000_000,
    "parameters_added": 2_345,
    "sites": {"found": 4, "proved": 4, "rewritten": 4},
    "bytes": {"float32": 4_000_000, "float16": 2_000_000, "ideal_6_bits": 750_000, "on_disk": 900_000},
    "layer_errors": {f"layer.{i}": {"before": 1.0 + i, "adapter": 0.5, "after": 0.25 * i} for i in range(4)},
    "distillation": {"seconds": 30.0, "tokens": 4096, "steps": 16},
    "adapter": {"tokens": 5_000_000, "seconds": 78, "gpu": "GPU"},
    "perplexity": {name: {"perplexity": value, "nll": 1.0, "tokens": 511} for name, value in PERPLEXITIES.items()},
    "speed": {"teacher": SPEED, "student": SPEED},
    "state_bytes": {"8192": 3_300_000, "32768": 3_300_000},
    "kv_cache_bytes": {"8192": 377_500_000, "32768": 1_510_000_000},
    "text": {"Hello": "Hello\n\n\nworld [bold]"},
    "seconds": {"total": 240.0},
    "peak_memory_bytes": 2_000_000_000,
}


def test_tables_show_every_figure_and_the_honest_ratio(capfd: pytest.CaptureFixture[str]) -> None:
    demo.print_tables(FIGURES, Path("out"), Path("model.gguf"))
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
        "--distil YOUR_TEXT.txt",
    ):
        assert text in shown, text
    assert "4.000" in shown and "0.750" in shown, "the last layer's error before and after"


def test_the_text_ships_and_nothing_held_out_is_trained_on() -> None:
    train, held_out = (file.read_text(encoding="utf-8") for file in (demo.TRAIN, demo.HELD_OUT))
    paragraphs = {text for text in held_out.split("\n\n") if len(text) > 80}
    assert len(paragraphs) > 50
    assert not paragraphs & set(train.split("\n\n"))
