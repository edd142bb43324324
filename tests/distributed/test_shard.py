"""Sequence parallelism on real process groups (gloo): sharded programs equal whole ones, with the promised traffic.

One process captures, its forks are the ranks (``worker.py``). ``--run-slow`` adds W = 1 to 8 for every model, Inductor,
and the 2 × 2 mesh.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

import lincompile
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.shard import SequenceParallel, shard_batch, splittable

WORKER = Path(__file__).with_name("worker.py")
LIMITS = {"quick": 1500, "nightly": 3600}  # seconds, on a busy machine
pytestmark = pytest.mark.timeout(3700)  # the first test waits for all runs


def measure(profile: str, folder: Path) -> dict[str, Any]:
    out = folder / "results.json"
    places = [str(WORKER.parent), str(WORKER.parents[1]), str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, str(WORKER), str(out), profile]
    worker = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = worker.communicate(timeout=LIMITS[profile])
    finally:
        if worker.returncode is None:
            os.killpg(worker.pid, signal.SIGKILL)  # the ranks, its forks, wouldn't end with it
    assert worker.returncode == 0, errors[-3000:]
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.fixture(scope="module", params=["quick", pytest.param("nightly", marks=pytest.mark.slow)])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(request.param, tmp_path_factory.mktemp("shard"))


def succeeded(measured: dict[str, Any], kind: str) -> dict[str, list[Any]]:
    """Results by rank of every run of a kind, named with the world size."""
    found = {}
    for name, run in measured.items():
        if name.rpartition("-")[0] == kind:
            assert [code for code, _ in run["ranks"]] == [0] * len(run["ranks"]), (name, run["ranks"])
            found[name] = [result for _, result in run["ranks"]]
    return found


def test_ops_equal_one_device(measured: dict[str, Any]) -> None:
    runs = [(kind, name, ranks) for kind in ("ops", "ops32") for name, ranks in succeeded(measured, kind).items()]
    assert {kind for kind, _, _ in runs} == {"ops", "ops32"}
    for kind, name, ranks in runs:
        for errors in ranks:
            assert len(errors) == 29
            for op, error in errors.items():
                assert error < (1e-5 if kind == "ops32" else 1e-9), (name, op, error)


def test_models_equal_one_device(measured: dict[str, Any]) -> None:
    runs = succeeded(measured, "models")
    assert runs
    for name, ranks in runs.items():
        for models in ranks:
            for model, result in models.items():
                assert result["output"] < 1e-9, (name, model, result["output"])
                assert result["gradient"] < 1e-9, (name, model, result["gradient"])


def test_one_state_gather_each_way_per_linear_layer(measured: dict[str, Any]) -> None:
    """By formula: [M | a] forward and dP backward, KV heads × key features × (value columns (+ 1)), any length."""
    for name, ranks in succeeded(measured, "models").items():
        world = len(ranks)
        for models in ranks:
            if "gla" in models:
                gla = models["gla"]
                assert gla["gather_nodes"] == 2, "functional collectives stand in the graph"
                check, *gathers = gla["forward"]
                assert check == ["all_reduce", 4], "the shapes of the slices"
                assert gathers == [["all_gather_into_tensor", 2 * 3 * 8 * (8 + 1)]] * 2, name
                assert gla["backward"] == [["all_gather_into_tensor", 2 * 3 * 8 * 8]] * 2, name
            if "lawcat-window" in models:
                found = models["lawcat-window"]["forward"]
                gathers = [size for kind, size in found if kind == "all_gather_into_tensor"]
                size = -(-17 // world)
                if size >= 4:  # slices longer than every halo: nothing but states is gathered
                    assert gathers == [2 * 3 * 16 * (9 + 1)] * 2
                    halos = [size for kind, size in found if kind == "all_to_all_single" and size]
                    # q and k of a convolution: 3 inputs; keys and values of the window: 4 tokens; their mask
                    sent = [2 * 3 * 72, 2 * 3 * 24, 2 * 3 * 4 * 16, 2 * 4] * 2
                    assert sorted(halos) in ([], sorted(sent)), name
            if "gated-delta" in models:
                # [M | A]: D more columns; backward dP
                gathers = [size for kind, size in models["gated-delta"]["forward"] if kind == "all_gather_into_tensor"]
                state = 2 * 4 * 8 * (8 + 8)
                assert gathers.count(state) == 2, name
                if -(-13 // world) >= 3:  # shorter slices are gathered for the convolution's three earlier inputs
                    assert gathers == [state] * 2, name
                back = [size for kind, size in models["gated-delta"]["backward"] if kind == "all_gather_into_tensor"]
                assert back == [2 * 4 * 8 * 8] * 2, name
            for model in ("bidirectional", "bidirectional-nano"):
                if model in models:  # the normaliser is a column of its own
                    gathers = [["all_gather_into_tensor", 2 * 4 * 16 * (8 + 1)]] * 2
                    assert models[model]["forward"][1:] == gathers and models[model]["backward"] == gathers, name
            if "hedgehog-hybrid" in models:
                state = 2 * 3 * 16 * (8 + 1)
                for direction in ("forward", "backward"):  # beside it: the padding mask; head-tail halves
                    found = models["hedgehog-hybrid"][direction]
                    gathers = [size for kind, size in found if kind == "all_gather_into_tensor"]
                    assert gathers == ([state, 2 * -(-16 // (2 * world)) * 2] if direction == "forward" else [state])
            if "hybrid" in models:  # K and V of the softmax layer in one gather, their gradients in one reduce-scatter
                kinds = [kind for kind, _ in models["hybrid"]["backward"]]
                size = 2 * -(-12 // (2 * world))
                # two more for the convolutions' gradients where slices are shorter than the inputs they reach back to
                assert kinds.count("reduce_scatter_tensor") == (1 if size >= 3 else 3), name


def test_the_gather_runs_beside_the_slices_own_work(measured: dict[str, Any]) -> None:
    for ranks in succeeded(measured, "models").values():
        for models in ranks:
            if "gla" in models:
                gla = models["gla"]
                assert gla["graph_order"] == ["start", "own", "wait", "use"] * 2, "in the graph"
                assert gla["order"][-8:] == ["start", "own", "wait", "use"] * 2, "in the profiler's trace"
                # the summaries, which have long arrived, are waited for once more: that is free
                assert gla["backward_order"] == ["start", "own", "wait", "wait", "use"] * 2


def test_a_bidirectional_site_makes_its_queries_beside_the_gather(measured: dict[str, Any]) -> None:
    """Nothing of its attention can be computed before the others' states are there: what leads to its queries can."""
    found = [
        model["beside"]
        for ranks in succeeded(measured, "models").values()
        for models in ranks
        for name, model in models.items()
        if name.startswith("bidirectional")
    ]
    assert found
    for forward, backward in found:
        assert len(forward) == len(backward) == 2 and min(*forward, *backward) > 0, (forward, backward)


def test_prefill_on_many_ranks_decodes_on_one(measured: dict[str, Any]) -> None:
    runs = succeeded(measured, "handing over")
    assert runs
    for name, ranks in runs.items():
        for methods in ranks:
            for method, results in methods.items():
                for result in results:
                    assert result["shapes"] and result["tokens"], (name, method, result)
                    assert result["states"] < 1e-5 and result["logits"] < 1e-5, (name, method, result)
                assert results[0]["last logits only"] < 1e-5


def test_tokens_are_seen_across_the_slices_edge_in_one_direction(measured: dict[str, Any]) -> None:
    for ranks in succeeded(measured, "causality").values():
        for result in ranks:
            assert all(result.values()), result


def test_a_hundred_steps_give_the_same_loss_curve(measured: dict[str, Any]) -> None:
    runs = succeeded(measured, "training")
    assert runs
    for ranks in runs.values():
        for result in ranks:
            assert result["difference"] < 1e-3 * result["first"], result
            assert result["last"] < 0.7 * result["first"], "it learned"


def test_distillation_over_slices_learns_what_one_device_learns(measured: dict[str, Any]) -> None:
    for ranks in succeeded(measured, "distilling").values():
        for result in ranks:
            assert result["numbers"] < 1e-4 and result["weights"] < 1e-4 and not result["kept"], result
            assert result["learned"] < 0.99


def test_under_torch_compile(measured: dict[str, Any]) -> None:
    runs = succeeded(measured, "aot_eager") | succeeded(measured, "inductor")
    assert runs
    for name, ranks in runs.items():
        for result in ranks:
            assert result["output"] < 1e-5 and result["gradient"] < 1e-4, (name, result)
            gathers = [size for kind, size in result["collectives"] if kind == "all_gather_into_tensor"]
            states = [size for size in gathers if size in (2 * 4 * 8 * 9, 2 * 4 * 8 * 8)]
            assert states == [2 * 4 * 8 * 9, 2 * 4 * 8 * 8], "one linear layer: once forward, once backward"
            steps = result["order"]
            where = [i for i, step in enumerate(steps) if step == "own"]
            assert len(where) == 2, "forward and backward"
            assert all(steps[i - 1] == "start" and steps[i + 1] == "wait" for i in where), steps


def test_composes_on_a_mesh(measured: dict[str, Any]) -> None:
    for ranks in succeeded(measured, "composed").values():
        for result in ranks:
            assert result.keys() == {"ddp", "fsdp2", "fsdp2, two axes", "fsdp2, data axis", "checkpoint", "int6"}
            assert all(error < 1e-4 for error in result.values()), result


def test_slices_of_padding(measured: dict[str, Any]) -> None:
    for ranks in succeeded(measured, "padding").values():
        for result in ranks:
            assert result["finite"] and result["error"] < 1e-9


REFUSALS = {
    "programs": "RefusedError: shard: rank 1 and rank 0 hold different programs",
    "weights": "or the ranks hold different weights",
    "slices": "slices of different shapes [B, T] (rank 0: [2, 6], rank 1: [2, 7]); cut the batch with shard_batch",
    "world": "RefusedError: shard: world=3, but the process group has 2 ranks",
    "odd": "balanced softmax needs slices of even length, got 5 tokens",
    "resumed": "gradients don't reach the state a sequence was resumed from",
    "stateful": "RefusedError: no step form: the program is sharded; make the step program first, then shard_step",
    "group": "RefusedError: shard: there is no process group 'nobody' (give a group's group_name)",
    "group object": "RefusedError: shard: there is no process group '<torch.distributed",
    "no mesh": "RefusedError: shard: mesh takes a DeviceMesh (init_device_mesh), not int",
    "axis": "RefusedError: shard: the mesh has no axis 'tp' (it has sp)",
    "elsewhere": "RefusedError: shard: this process isn't part of the mesh; run the pass on the mesh's ranks only",
}


def test_bad_runs_say_what_is_wrong_on_every_rank(measured: dict[str, Any]) -> None:
    for ranks in succeeded(measured, "refusals").values():
        for errors in ranks:
            assert errors.keys() == REFUSALS.keys()
            for name, message in REFUSALS.items():
                assert message in errors[name], (name, errors[name])


def test_a_rank_that_dies_ends_the_others(measured: dict[str, Any]) -> None:
    if "dying_rank" not in measured:
        pytest.skip("in the quick profile")
    (code, error), (dead, _) = measured["dying_rank"]["ranks"]
    assert code == 1 and dead == 3, (error, "the survivor ends with an error")
    assert measured["dying_rank"]["seconds"] < 60, "within the timeout"


class Mixing(nn.Module):
    """A tiny decoder with something that can't be cut: ``what`` says which."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.what == "shift":
            x = x + functional.pad(x, (0, 0, 1, 0))[:, :-1]
        q = x.unsqueeze(1)
        if self.what == "bias":
            place = torch.arange(q.shape[2])
            bias = self.slope * (place[None, :] - place[:, None])
            mask = (place[None, :] > place[:, None]) * -1e9
            y = (q @ q.transpose(-1, -2) + bias + mask).softmax(-1) @ q
        else:
            y = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        y = self.head(x + y.squeeze(1))
        return y[:, -1] if self.what == "last" else y


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shift", r"shard: '.+' \(.+\) .+, across the slices of other ranks"),
        ("bias", r"shard: the attention at '.*' isn't proved and can't be split: .+slope"),
        ("last", r"shard: the model returns '.+', which isn't one row per token"),
    ],
)
def test_models_that_cant_be_cut_say_why(what: str, message: str) -> None:
    program = lincompile.capture(Mixing(what).eval(), {"tokens": torch.zeros(2, 12, dtype=torch.int64)})
    program = lincompile.Pipeline("canonicalize,prove")(program)
    with pytest.raises(RefusedError, match=message):
        splittable(program)
    with pytest.raises(RefusedError, match="run canonicalize and prove first"):
        splittable(lincompile.capture(Mixing("none").eval(), {"tokens": torch.zeros(2, 12, dtype=torch.int64)}))
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    whole = lincompile.capture(Mixing("none").eval(), {"tokens": tokens})
    assert splittable(lincompile.Pipeline("canonicalize,prove")(whole)).name == "tokens"


def test_labels_are_shifted_before_they_are_cut() -> None:
    tokens = torch.arange(10).view(1, 10)
    parts = [
        shard_batch({"input_ids": tokens, "attention_mask": torch.ones(1, 10)}, r, 3, labels=tokens) for r in range(3)
    ]
    assert torch.cat([p["labels"] for p in parts], 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, -100, -100, -100]]
    assert torch.cat([p["attention_mask"] for p in parts], 1).tolist() == [[1.0] * 10 + [0.0] * 2]
    inputs = {"position_ids": tokens, "attention_mask": torch.ones(1, 10)}
    positions = [shard_batch(inputs, r, 3)["position_ids"] for r in range(3)]
    assert torch.cat(positions, 1).tolist() == [list(range(12))]
    balanced = [shard_batch(inputs, r, 3, multiple=2)["position_ids"].shape[1] for r in range(3)]
    assert balanced == [4, 4, 4]


def test_batches_that_cant_be_cut() -> None:
    tokens = torch.arange(5).view(1, 5)
    with pytest.raises(LincompileError, match="5 tokens can't be cut over 8 ranks; use fewer ranks"):
        shard_batch({"x": tokens}, 0, 8)
    with pytest.raises(LincompileError, match="no rank 2 among 2"):
        shard_batch({"x": tokens}, 2, 2)
    with pytest.raises(LincompileError, match="'labels' has 4 tokens, 'x' 5"):
        shard_batch({"x": tokens}, 0, 2, labels=tokens[:, :4])
    with pytest.raises(LincompileError, match="no padding mask"):
        shard_batch({"x": tokens}, 0, 2)
    module, example = zoo.build("nanogpt")
    program = lincompile.capture(module, example)
    program.max_positions = 64  # as the loader knows it
    with pytest.raises(LincompileError, match=r"64 tokens, padded to 66 for 3 ranks, are more than the model's 64"):
        shard_batch({"idx": torch.zeros(1, 64, dtype=torch.int64)}, 0, 3, program=program)
    module, example = zoo.build("nanogpt-bidirectional")
    program = lincompile.Pipeline("canonicalize,prove")(lincompile.capture(module, example))
    with pytest.raises(LincompileError, match=r"the bidirectional attention at '.+' would read the padding"):
        shard_batch({"idx": tokens}, 0, 2, program=program)


def test_without_a_process_group_the_pass_says_what_to_do() -> None:
    module, example = zoo.build("nanogpt")
    program = lincompile.Pipeline("canonicalize,prove")(lincompile.capture(module, example))
    with pytest.raises(RefusedError, match="torchrun"):
        SequenceParallel().run(program)
    for scan in (-1, "4"):
        with pytest.raises(LincompileError, match=f"scan={scan}"):
            SequenceParallel(scan=scan)  # type: ignore[arg-type]
    text = str(lincompile.Pipeline("canonicalize,shard{mesh_dim=sp,balance=true}"))
    assert text == "canonicalize,shard{balance=true}"


LEAVING = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
import torch.distributed.nn.functional as late  # as dynamo does when it first traces
held = any(late.all_reduce.__defaults__)
import lincompile
lincompile.SequenceParallel
dist.destroy_process_group()
print(held, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_group_ends_when_it_is_destroyed(tmp_path: Path) -> None:
    """Threads of a group that outlives ``destroy_process_group`` now and then abort the end of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path / "store")], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[:1] != ["False"], "torch no longer keeps the group: group.py needn't let go of it"
    assert done.stdout.split() == ["True", "1"], done.stderr
