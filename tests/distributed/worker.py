"""Run by test_shard.py: ``python worker.py OUT quick|nightly`` writes what every rank of every run found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import behave
import exact
import forked
import torch

Run = tuple[int, Callable[[int, int], Any], float]


def runs(profile: str) -> dict[str, Run]:
    """name → (world, function, timeout)."""
    nightly = profile == "nightly"
    found: dict[str, Run] = {}
    for world in (4, 8) if nightly else (1, 2, 3):
        found[f"ops-{world}"] = (world, exact.compare_ops, 120.0)
    found["ops32-2"] = (2, exact.compare_ops_float32, 120.0)
    models = {2: ("gla", "hybrid"), 3: ("lawcat-window",)}
    if nightly:
        models = {1: ("lawcat-window", "hybrid"), 2: ("bidirectional", "sliding"), 3: tuple(exact.MODELS)}
        models |= {4: tuple(exact.MODELS), 8: ("gla", "lawcat-window", "hybrid", "gated-delta")}
    for world, names in models.items():
        found[f"models-{world}"] = (world, exact.compare_models(names), 300.0)
    if nightly:
        found["handing over-2"] = (2, behave.handing_over(tuple(behave.STEPS)), 300.0)
        found["handing over-3"] = (3, behave.handing_over(tuple(behave.STEPS)), 300.0)
        found["training-3"] = (3, behave.training, 300.0)
        found["inductor-2"] = (2, behave.compiled("inductor"), 400.0)
        found["composed-4"] = (4, behave.composed, 300.0)
        return found
    found["handing over-2"] = (2, behave.handing_over(("lawcat, window", "hybrid that counts positions")), 120.0)
    found["causality-2"] = (2, behave.causality, 120.0)
    found["training-2"] = (2, behave.training, 120.0)
    found["distilling-2"] = (2, behave.distilling, 120.0)
    found["aot_eager-2"] = (2, behave.compiled("aot_eager"), 120.0)
    found["padding-2"] = (2, behave.padded_mask, 120.0)
    found["refusals-2"] = (2, behave.refusals, 60.0)
    found["dying_rank"] = (2, behave.dying_rank, 60.0)
    return found


def main() -> None:
    out, profile, chosen = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    wanted = {name: run for name, run in runs(profile).items() if not chosen or name in chosen}
    more = ("gpt2", "bert", "mistral") if profile == "nightly" else ()
    for model in ("llama-gqa", "nanogpt", *more):
        exact.captured(model, torch.float64)
    for model in ("nanogpt", *(("llama-gqa", "gpt2", "mistral") if profile == "nightly" else ())):
        exact.captured(model, torch.float32)
    forked.main(out, wanted)


if __name__ == "__main__":
    main()
