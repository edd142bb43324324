"""The table of the rows in a folder: what ``distil.py`` has measured so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row per result file that has a student, with ratios to the teacher and, where it was run, to the control."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    control = found.get("control", {}).get("student")
    return [_row(name, result, control) for name, result in found.items() if "student" in result]


def _row(name: str, result: dict[str, Any], control: dict[str, Any] | None) -> dict[str, Any]:
    stages = [result[stage] for stage in ("transfer", "logits", "extension") if stage in result]
    row: dict[str, Any] = {
        "variant": name,
        "training": f"{sum(s['seconds'] for s in stages):.0f} s, {sum(s['tokens'] for s in stages) / 1e6:.1f}M tokens",
    }
    for text, figures in result["student"].items():
        value = figures["perplexity"]
        row[text] = f"{value:.2f} ({value / result['teacher'][text]['perplexity']:.3f}x)"
        if control and text in control:
            row[f"{text} ÷ control"] = f"{value / control[text]['perplexity']:.3f}"
        if "int6" in result:
            before, after = (result["int6"][when][text]["perplexity"] for when in ("before", "after"))
            row[f"{text}, int6"] = f"{after / before - 1:+.2%}"
        if "generation" in result:
            row[f"{text}, writing"] = f"{result['generation'][text]['agreement']:.1%}"
    if "kept" in result.get("zero-shot", {}):
        row["zero-shot kept"] = f"{result['zero-shot']['kept']:.1%}"
    for length, share in result.get("passkey", {}).get("student", {}).get("by_length", {}).items():
        row[f"passkey {length}"] = f"{share:.0%}"
    return row


def print_table(folder: Path) -> None:
    """As Markdown; a column for everything that any row has."""
    table = rows(folder)
    columns = list(dict.fromkeys(name for row in table for name in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in table:
        print("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |")
