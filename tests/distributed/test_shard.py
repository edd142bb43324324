"""Sequence parallelism on real process groups: a sharded program equals the whole one, with the promised traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo

import lincompile
from lincompile.passes.errors import RefusedError
from lincompile.passes.shard import SequenceParallel, shard_batch

WORKER = Path(__file__).with_name("shard_worker.py")
# model, method, sites kept softmax, length (uneven ones are padded)
CASES = [
    ("llama-gqa", "gla", [], 12),
    ("llama-gqa", "lawcat", [], 17),
    ("nanogpt", "lawcat", [0], 12),
    ("bert", "hedgehog", [], 12),
    ("mistral", "softmax", [], 12),
]
WORLDS = [3] if os.environ.get("LINCOMPILE_NIGHTLY") is None else [1, 2, 3, 4, 8]


Measured = tuple[int, list[list[dict[str, float]]]]


@pytest.fixture(scope="module", params=WORLDS)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    world = request.param
    folder = tmp_path_factory.mktemp("shard")
    cases = [case for case in CASES if case[3] // world >= 4 or world <= 3]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(WORKER)]
    done = subprocess.run(
        [*command, json.dumps(cases), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return world, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def test_outputs_and_gradients_equal_one_device(measured: Measured) -> None:
    _, ranks = measured
    for results in ranks:
        for case, result in zip(CASES, results, strict=False):
            assert result["output"] < 1e-9, (case, result)
            assert result["gradient"] < 1e-9, (case, result)


def test_one_state_gather_each_way_per_linear_layer(measured: Measured) -> None:
    world, ranks = measured
    for results in ranks:
        by_case = {(name, attn, len(keep)): r for (name, attn, keep, _), r in zip(CASES, results, strict=False)}
        gla = by_case["llama-gqa", "gla", 0]
        assert (gla["forward_gathers"], gla["backward_gathers"], gla["halo_gathers"]) == (2, 2, 0)
        # [M | a]: batch × KV heads × head_dim × (value_dim + 1) numbers, whatever the sequence's length
        assert gla["largest_gather"] == 2 * 3 * 8 * 9
        lawcat = by_case["llama-gqa", "lawcat", 0]
        halos = 0 if world == 1 else 4  # two convolutions in each of two layers
        assert (lawcat["forward_gathers"], lawcat["backward_gathers"], lawcat["halo_gathers"]) == (2, 2, halos)


def test_labels_are_shifted_before_they_are_cut() -> None:
    tokens = torch.arange(10).view(1, 10)
    parts = [
        shard_batch({"input_ids": tokens, "attention_mask": torch.ones(1, 10)}, r, 3, labels=tokens) for r in range(3)
    ]
    assert torch.cat([p["labels"] for p in parts], 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, -100, -100, -100]]
    assert torch.cat([p["attention_mask"] for p in parts], 1).tolist() == [[1.0] * 10 + [0.0] * 2]
    positions = [shard_batch({"position_ids": tokens}, r, 3)["position_ids"] for r in range(3)]
    assert torch.cat(positions, 1).tolist() == [list(range(12))]


def test_without_a_process_group_the_pass_says_what_to_do() -> None:
    module, example = zoo.build("nanogpt")
    program = lincompile.Pipeline("canonicalize,prove")(lincompile.capture(module, example))
    with pytest.raises(RefusedError, match="torchrun"):
        SequenceParallel().run(program)
