"""What every rank compares with one device: ops on plain tensors, and models with every parameter's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import zoo
from torch import Tensor

import lincompile
from lincompile.passes.program import Program
from lincompile.passes.shard import SequenceParallel, shard_batch
from lincompile.passes.sharding.sites import Eager, Slices
from lincompile.passes.split_heads import SplitHeads, named_parts

ops = torch.ops.lincompile
Site = Callable[..., Tensor]
# name, model, method, kept softmax: sites or (site, KV head), window, length (uneven: padded), head–tail balance
MODELS: dict[str, tuple[str, str, tuple[Any, ...], int, int, bool]] = {
    "gla": ("llama-gqa", "gla", (), 0, 12, False),
    "lawcat-window": ("llama-gqa", "lawcat", (), 5, 17, False),
    "hybrid": ("nanogpt", "lawcat", (0,), 0, 12, True),
    "bidirectional": ("bert", "hedgehog", (), 0, 14, False),
    "bidirectional-nano": ("nanogpt-bidirectional", "hedgehog", (), 0, 24, False),
    "sliding": ("mistral", "softmax", (), 0, 12, False),
    "gated-delta": ("gpt2", "gated-delta", (), 3, 13, False),
    "hedgehog-hybrid": ("llama-gqa", "hedgehog", (1,), 0, 16, True),
    "some-heads": ("llama-gqa", "lawcat", ((1, 0),), 5, 17, False),
}
_captured: dict[Any, tuple[Program, list[Tensor]]] = {}


def _copy(key: Any, build: Callable[[], Program]) -> Program:
    """A copy of what ``build`` gave the first time. Copies share parameters: they get their first values again."""
    if key not in _captured:
        program = build()
        _captured[key] = program, [parameter.detach().clone() for parameter in program.graph_module.parameters()]
    program, values = _captured[key]
    with torch.no_grad():
        for parameter, value in zip(program.graph_module.parameters(), values, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return program.clone()


def captured(name: str, dtype: torch.dtype = torch.float64) -> Program:
    """A copy of a zoo model's program; captured once for all ranks if a parent asked for it before forking."""

    def build() -> Program:
        module, example = zoo.build(name)
        example = {k: value.to(dtype) if value.is_floating_point() else value for k, value in example.items()}
        return lincompile.capture(module.to(dtype).eval(), example)

    return _copy((name, dtype), build)


def proved(name: str, dtype: torch.dtype = torch.float64) -> Program:
    passes = [lincompile.Canonicalize(), lincompile.ProveAttention()]
    return _copy((name, dtype, "proved"), lambda: lincompile.Pipeline(passes)(captured(name, dtype)))


def student(name: str, attn: str, keep: tuple[Any, ...] = (), window: int = 0, dtype: Any = torch.float64) -> Program:
    def build() -> Program:
        torch.manual_seed(0)
        heads = tuple(item for item in keep if isinstance(item, tuple))
        teacher = lincompile.Pipeline([SplitHeads(heads)])(proved(name, dtype))
        rewrite = lincompile.LinearizeAttention(attn, keep=named_parts(teacher) if heads else keep, window=window)
        return lincompile.Pipeline([rewrite])(teacher)

    return _copy((name, dtype, attn, keep, window), build)


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def batch(program: Program, length: int) -> dict[str, Tensor]:
    """Random tokens; the first row padded on the left by three where the model takes a mask."""
    generator = torch.Generator().manual_seed(5)
    values = {}
    for item in program.inputs:
        if item.role == "mask":
            values[item.name] = torch.ones(2, length, dtype=torch.long)
            values[item.name][0, :3] = 0
        elif item.role == "positions":
            values[item.name] = torch.arange(length).expand(2, length)
        elif item.role == "tokens":
            values[item.name] = torch.randint(0, 90, (2, length), generator=generator)
        else:
            values[item.name] = torch.zeros(2, length, dtype=torch.long)
    return values


# --- ops --------------------------------------------------------------------------------------------------------------


def compare_ops_float32(rank: int, world: int) -> dict[str, float]:
    return compare_ops(rank, world, dtype=torch.float32)


def compare_ops(rank: int, world: int, length: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest error of outputs and gradients of every op, by name; ``length`` tokens a rank."""
    group = dist.group.WORLD.group_name
    make, slices, balanced = Eager(), Slices(group, world), Slices(group, world, balance=True)
    mine = slice(rank * length, (rank + 1) * length)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    total = length * world
    q, k, v, weight = random(2, 4, total, 3), random(2, 2, total, 3), random(2, 2, total, 5), random(2, 4, total, 5)
    per_key, per_head = -random(2, 2, total, 3).abs(), -random(2, 2, total, 1).abs()
    per_key[:, :, total // 2] = -math.inf  # forgets everything
    beta, unit = random(2, 2, total).sigmoid(), torch.nn.functional.normalize(k, dim=-1)
    real = torch.ones(2, total, dtype=torch.bool)
    real[0, :3] = False
    results: dict[str, float] = {}

    def check(name: str, whole: Site, part: Site, *tensors: Tensor) -> None:
        one = [x.detach().to(dtype).requires_grad_() for x in tensors]
        many = [x.detach().to(dtype).requires_grad_() for x in tensors]
        cut = [x[:, :, mine] if x.dim() > 2 and x.shape[2] == total else x[:, mine] if x.dim() > 2 else x for x in many]
        wanted, got = whole(*one), part(*cut)
        axis = 2 if wanted.dim() == 4 else 1
        seed = (weight if axis == 2 else random(*wanted.shape)).to(dtype)
        (wanted * seed).sum().backward()
        (got * seed.narrow(axis, mine.start, length)).sum().backward()
        rows = wanted.narrow(axis, mine.start, length)
        worst = float((got - rows).detach().abs().max() / wanted.detach().abs().max().clamp(min=1.0))
        for a, b in zip(one, many, strict=True):
            assert a.grad is not None and b.grad is not None, name
            dist.all_reduce(b.grad)
            worst = max(worst, float((a.grad - b.grad).abs().max() / a.grad.abs().max().clamp(min=1.0)))
        results[name] = worst

    def linear(name: str, normalize: bool, decay: Tensor | None) -> None:
        positive = [q.abs(), k.abs()] if normalize else [q, k]
        check(
            name,
            lambda *x: ops.linear_attention(*x, *[None] * (5 - len(x)), 0.5, True, normalize)[0],
            lambda *x: slices.linear(make, *x, *[None] * (5 - len(x)), 0.5, True, normalize)[0],
            *positive,
            v,
            *([] if decay is None else [decay]),
        )

    for normalize in (False, True):
        kind = "normalised" if normalize else "plain"
        linear(f"{kind}, no decay", normalize, None)
        linear(f"{kind}, decay per key", normalize, per_key)
        linear(f"{kind}, decay per head", normalize, per_head)
    for pieces in (1, 2, 9):  # more pieces than key features: one a feature
        slices.scan = pieces
        linear(f"scan in {pieces}", pieces == 2, None if pieces == 1 else per_key)
    slices.scan = 0
    check(
        "bidirectional",
        lambda *x: ops.linear_attention(*x, None, None, 0.5, False, True)[0],
        lambda *x: slices.linear(make, *x, None, None, 0.5, False, True)[0],
        q.abs(),
        k.abs(),
        v,
    )
    for name, gates in (("delta", []), ("gated delta", [per_head])):
        check(
            name,
            lambda *x: ops.gated_delta(*x, *[None] * (6 - len(x)), 0.5)[0],
            lambda *x: slices.delta(make, *x, *[None] * (6 - len(x)), 0.5)[0],
            q,
            unit,
            v,
            beta,
            *gates,
        )
    check(
        "convolution",
        lambda x, taps: ops.short_conv(x, taps, None)[0],
        lambda x, taps: slices.convolution(make, x, taps, None)[0],
        random(2, total, 7),
        random(7, 4),
    )
    for mask, suffix in ((None, ""), (real, ", padded")):
        own = None if mask is None else mask[:, mine]
        for kind, over in (("causal", slices), ("causal", balanced), ("full", slices)):
            over.masks.clear()
            check(
                f"{kind}{' balanced' if over.balance else ''}{suffix}",
                lambda *x, kind=kind, mask=mask: ops.softmax_attention(*x, mask, kind, 0, 0.5, 3.0),
                lambda *x, kind=kind, own=own, over=over: over.softmax(make, *x, own, kind, [0.5, 3.0]),
                q,
                k,
                v,
            )
        for window in (1, 3, length + 1, length + 3, 3 * length):
            slices.masks.clear()
            check(
                f"window {window}{suffix}",
                lambda *x, window=window, mask=mask: ops.softmax_attention(*x, mask, "sliding", window, 0.5, 0.0),
                lambda *x, window=window, own=own: slices.window(make, *x, own, (None, None, None), window, [0.5, 0.0]),
                q,
                k,
                v,
            )
    return results


# --- models -----------------------------------------------------------------------------------------------------------


def compare_models(names: Sequence[str]) -> Callable[[int, int], dict[str, dict[str, Any]]]:
    def compare(rank: int, world: int) -> dict[str, dict[str, Any]]:
        return {name: compare_model(name, rank, world) for name in names}

    return compare


def compare_model(name: str, rank: int, world: int) -> dict[str, Any]:
    """Errors of outputs and of every parameter's gradient, and the collectives that ran."""
    model, attn, keep, window, length, balance = MODELS[name]
    program = student(model, attn, keep, window)
    sharded = lincompile.Pipeline([SequenceParallel(balance=balance)])(program.clone())
    inputs = batch(program, length)
    parameters = list(program.graph_module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    whole = first(program(**inputs))
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(6), dtype=whole.dtype)
    for key, value in inputs.items():
        if "mask" in key:
            weight = weight * value[:, :, None]  # nobody reads the rows of padded tokens
    wanted = torch.autograd.grad((whole * weight).sum(), parameters, allow_unused=True)
    part = shard_batch(inputs, rank, world, multiple=1 + balance, program=program)
    size = next(iter(part.values())).shape[1]
    mine = slice(rank * size, min((rank + 1) * size, length))
    with profiled() as forward:
        got = first(sharded(**part))[:, : max(0, mine.stop - mine.start)]
    with profiled() as backward:
        grads = torch.autograd.grad((got * weight[:, mine]).sum(), parameters, allow_unused=True)
    difference = ((got - whole[:, mine]) * (weight[:, mine] != 0)).detach().abs()
    gradient = 0.0
    for a, b in zip(wanted, grads, strict=True):
        if a is not None:
            total = torch.zeros_like(a) if b is None else b.clone()
            dist.all_reduce(total)
            gradient = max(gradient, float((a - total).abs().max() / (a.abs().max() + 1e-3)))
    nodes = [str(node.target) for node in sharded.graph_module.graph.nodes if node.op == "call_function"]
    return {
        "output": float(difference.max()) if difference.numel() else 0.0,
        "gradient": gradient,
        "report": sharded.metadata["sequence_parallel"],
        "gather_nodes": nodes.count("_c10d_functional.all_gather_into_tensor.default"),
        "forward": collectives(forward),
        "backward": collectives(backward),
        "order": order(forward),
        "backward_order": order(backward),
        "beside": [products_beside(forward), products_beside(backward)],
        "graph_order": [STAGES[name] for name in map(_stage, nodes) if name in STAGES],
    }


def profiled() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)


def collectives(profile: torch.profiler.profile) -> list[tuple[str, int]]:
    """(name, elements that this rank contributed) of every collective that ran, in order."""
    found = []
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        library, _, name = event.name.partition("::")
        starts = name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_to_all_single")
        if library == "_c10d_functional" and starts:
            found.append((name, math.prod(event.input_shapes[0])))
    return found


STAGES = {
    "_c10d_functional::all_gather_into_tensor": "start",
    "lincompile::slice_own": "own",
    "lincompile::slice_own_backward": "own",
    "_c10d_functional::wait_tensor": "wait",
    "lincompile::prefix_state": "use",
    "lincompile::slot_gradient": "use",
}


def products_beside(profile: torch.profiler.profile) -> list[int]:
    """How many matrix products ran between the start of each exchange of states and the next wait."""
    counts, open_ = [], False
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        stage = STAGES.get(event.name)
        if stage == "start":
            counts.append(0)
        open_ = stage == "start" or (open_ and stage != "wait")
        if open_ and event.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            counts[-1] += 1
    return counts


def _stage(target: str) -> str:
    return "::".join(target.split(".")[:2])


def order(profile: torch.profiler.profile) -> list[str]:
    """The linear sites' exchanges and own work, in the order they ran in."""
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [STAGES[event.name] for event in events if event.name in STAGES]
