"""Run by test_shard.py: ``python worker.py OUT quick|nightly [NAME…]`` writes what every rank of every run found."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import behave
import exact
import forked
import torch


def runs(profile: str) -> dict[int, dict[str, forked.Function]]:
    """world → name → function. The runs of one world share their processes, and what those have linearized."""
    nightly = profile == "nightly"
    found: dict[int, dict[str, forked.Function]] = defaultdict(dict)
    for world in (4, 8) if nightly else (1, 2, 3):
        found[world][f"ops-{world}"] = exact.compare_ops
    found[2]["ops32-2"] = exact.compare_ops_float32
    models = {2: ("gla", "hybrid", "bidirectional-nano"), 3: ("lawcat-window",)}
    if nightly:
        models = {1: ("lawcat-window", "hybrid"), 2: ("bidirectional", "sliding")}
        models |= {world: tuple(exact.MODELS) for world in (3, 4, 8)}
    for world, names in models.items():
        found[world][f"models-{world}"] = exact.compare_models(names)
    if nightly:
        for world in (2, 3):
            found[world][f"handing over-{world}"] = behave.handing_over(tuple(behave.STEPS))
        found[3]["training-3"] = behave.training
        found[2]["inductor-2"] = behave.compiled("inductor")
        found[4]["composed-4"] = behave.composed
        return found
    found[2] |= {
        "handing over-2": behave.handing_over(("lawcat, window", "hybrid that counts positions")),
        "causality-2": behave.causality,
        "training-2": behave.training,
        "distilling-2": behave.distilling,
        "aot_eager-2": behave.compiled("aot_eager"),
        "padding-2": behave.padded_mask,
        "refusals-2": behave.refusals,
    }
    return found


def prepare(profile: str, some: bool) -> None:
    """Captures what the ranks share, and linearizes it where a fork may follow a backward pass (proving runs one).

    Where torch has device threads it forbids that; where it has none the ranks would only repeat the work.
    """
    more = ("gpt2", "bert", "mistral") if profile == "nightly" else ()
    for model in ("llama-gqa", "nanogpt", "nanogpt-bidirectional", *more):
        exact.captured(model, torch.float64)
    for model in ("nanogpt", *(("llama-gqa", "gpt2", "mistral") if profile == "nightly" else ())):
        exact.captured(model, torch.float32)
    if some or torch.backends.cuda.is_built() or torch.backends.mps.is_built():
        return
    for model, attn, keep, window, *_ in exact.MODELS.values():
        if profile == "nightly" or (model, attn) in LINEARIZED:
            exact.student(model, attn, keep, window)
    exact.student("llama-gqa", "lawcat", (1,))
    for attn, keep, window in (("gla", (), 0), ("lawcat", (0,), 0), ("lawcat", (), 3), ("hedgehog", (), 0)):
        exact.student("nanogpt", attn, keep, window, torch.float32)


LINEARIZED = (
    ("llama-gqa", "gla"),
    ("llama-gqa", "lawcat"),
    ("nanogpt", "lawcat"),
    ("nanogpt-bidirectional", "hedgehog"),
)


def main() -> None:
    out, profile, chosen = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    prepare(profile, bool(chosen))
    batches = []
    for world, functions in runs(profile).items():
        wanted = {name: function for name, function in functions.items() if not chosen or name in chosen}
        batches.append((world, wanted, 300.0))
    if profile == "quick" and (not chosen or "dying_rank" in chosen):
        batches.append((2, {"dying_rank": behave.dying_rank}, 60.0))  # by itself: it breaks the group
    forked.main(out, [batch for batch in batches if batch[1]])


if __name__ == "__main__":
    main()
