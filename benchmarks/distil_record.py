"""What an adapter's file says about how it was made: the row's training, command and figures."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

CALLED = {"transfer": "attention transfer", "choice": "layer choice", "logits": "logits", "extension": "extension"}


def command() -> str:
    """The command line, its files by their names: where they lay on the machine says nothing to others."""
    return shlex.join(re.sub(r"(^|=)(?:\.{0,2}/)+(?:[^/]+/)*(?=[^/])", r"\1", part) for part in sys.argv)


def record_of(results: dict[str, Any], tokens: int, measured: bool = False) -> dict[str, Any]:
    """A record of what results have so far; with the student's perplexities if they were ``measured`` on this adapter.

    Seconds are those of training, the row's that it was begun from included; so are ``tokens``.
    """
    start = results.get("start", {})
    stages = [name for name in CALLED if name in results]
    seconds = sum(results[name].get("seconds", 0.0) for name in stages) + start.get("seconds", 0.0)
    record = {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "gpu": results["versions"].get("gpu", "none"),
        "stages": [*start.get("stages", []), *(CALLED[name] for name in stages)],
        "command": results["command"],
        "options": results["options"],
        "versions": results["versions"],
    } | ({"start": start} if start else {})
    if measured:
        record["perplexity"] = {
            text: {"teacher": round(teacher["perplexity"], 3)}
            | {"student": round(results["student"][text]["perplexity"], 3), "tokens": teacher["tokens"]}
            for text, teacher in results["teacher"].items()
        }
    return record
