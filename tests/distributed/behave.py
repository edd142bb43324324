"""What sharded programs do beyond being equal: causality, training, prefill, compile, composition, failures."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from exact import batch, collectives, first, order, profiled, proved, student
from torch import Tensor, nn

import lincompile
from lincompile.lowering.generate import Session, generate, prefill
from lincompile.lowering.sharded import ShardedSession
from lincompile.passes.distil.choose import choose
from lincompile.passes.distil.data import TokenWindows
from lincompile.passes.distil.logits import LogitDistillation, distil_logits
from lincompile.passes.distil.retrieval import Made, Needles, WithRetrieval
from lincompile.passes.distil.spread import spread
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.program import Program
from lincompile.passes.shard import SequenceParallel, sequence_loss, shard_batch
from lincompile.passes.sharding.step import shard_step
from lincompile.passes.stateful import make_stateful

Rank = tuple[int, int]


def nano(attn: str = "lawcat", keep: tuple[int, ...] = (0,), **options: Any) -> tuple[Program, Program]:
    """A tiny decoder that counts positions itself, and its sharded form."""
    program = student("nanogpt", attn, keep, dtype=torch.float32, **options)
    return program, lincompile.Pipeline([SequenceParallel()])(program.clone())


def ids(length: int, rows: int = 2, seed: int = 7) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def causality(rank: int, world: int) -> dict[str, bool]:
    """The last token of the first slice is seen by every later slice, the first of the last slice by no earlier one."""
    _, sharded = nano()
    size = 6
    tokens = ids(size * world)

    def run(changed: int | None) -> Tensor:
        values = tokens.clone()
        if changed is not None:
            values[:, changed] = (values[:, changed] + 11) % 90
        return first(sharded(**shard_batch({"idx": values}, rank, world, program=sharded))).detach()

    base, edge, late = run(None), run(size - 1), run(size * (world - 1))
    return {
        "edge token seen": bool(((edge - base).abs().amax((0, 2)) > 0).all()) if rank else not torch.equal(edge, base),
        "rows before the edge unchanged": rank > 0 or torch.equal(edge[:, : size - 1], base[:, : size - 1]),
        "later token unseen": rank == world - 1 or torch.equal(late, base),
    }


def training(rank: int, world: int, steps: int = 100) -> dict[str, Any]:
    """Loss curves of the whole and of the sharded program, from the same weights on the same data."""
    whole, sharded = nano()
    length = 4 * world + 1  # uneven
    curves: list[list[float]] = []
    parameters = list(whole.graph_module.parameters())  # the sharded program's too
    initial = [parameter.detach().clone() for parameter in parameters]
    for program in (whole, sharded):
        with torch.no_grad():
            for parameter, value in zip(parameters, initial, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        losses = []
        for step in range(steps):
            tokens = ids(length, seed=step % 5)
            optimizer.zero_grad()
            if program is whole:
                labels = torch.cat([tokens[:, 1:], tokens.new_full((2, 1), -100)], 1)
                loss = nn.functional.cross_entropy(first(program(tokens)).flatten(0, 1), labels.flatten())
                loss.backward()
            else:
                part = shard_batch({"idx": tokens}, rank, world, labels=tokens, program=program)
                labels = part.pop("labels")
                loss = sequence_loss(first(program(**part)), labels)
                loss.backward()
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                together = torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)])
                dist.all_reduce(together)
                loss, *parts = together.split([1, *(p.numel() for p in parameters)])
                for parameter, part_of in zip(parameters, parts, strict=True):
                    parameter.grad = part_of.view_as(parameter)
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return {"difference": difference, "first": curves[0][0], "last": curves[0][-1]}


class Stretched(WithRetrieval):
    """Plain windows, any token of which counts several times."""

    def made(self, index: int) -> Made:
        tokens = self.base.step(index)
        repeats = torch.randint(1, 9, tokens.shape, generator=torch.Generator().manual_seed(index))
        return Made(tokens, torch.zeros_like(tokens, dtype=torch.bool), repeats)


def distilling(rank: int, world: int) -> dict[str, float]:
    """Attention transfer, layer choice and logits, over slices (activations recomputed) and on one device."""
    teacher = proved("nanogpt", torch.float32)
    data = TokenWindows(ids(600, rows=1)[0], length=4 * world * 2, batch=2)
    group = dist.group.WORLD.group_name
    found: list[dict[str, Any]] = []
    for together in (False, True):
        pupil = student("nanogpt", "lawcat", window=3, dtype=torch.float32)
        with spread(teacher, group, world) if together else nullcontext():
            moved = transfer(teacher, pupil, data, Transfer(steps=6))
            choice = choose(teacher, pupil, data.measure(2), 1)
            stretched = Stretched(data, Needles([], []), 1.0, stretch=8)
            learned = distil_logits(teacher, pupil, stretched, LogitDistillation(steps=4, recompute=together))
        weights = torch.cat([parameter.detach().flatten() for parameter in pupil.graph_module.parameters()])
        numbers = [*moved.losses, *moved.after.values(), *learned.losses, learned.after, choice.chosen]
        found.append({"numbers": torch.tensor(numbers), "weights": weights, "kept": choice.kept})
    one, many = found
    return {
        "numbers": _relative(one["numbers"], many["numbers"]),
        "weights": _relative(one["weights"], many["weights"]),
        "kept": float(one["kept"] != many["kept"]),
        "learned": float(one["numbers"][5] / one["numbers"][0]),
    }


STEPS: dict[str, tuple[str, str, tuple[int, ...], int, bool]] = {
    "gla": ("llama-gqa", "gla", (), 0, False),
    "lawcat, window": ("llama-gqa", "lawcat", (), 5, False),
    "hybrid that counts positions": ("nanogpt", "lawcat", (0,), 0, True),
    "hedgehog hybrid": ("llama-gqa", "hedgehog", (1,), 0, False),
    "gated delta, window": ("gpt2", "gated-delta", (), 3, False),
    "sliding softmax": ("mistral", "softmax", (), 0, False),
}


def handing_over(names: tuple[str, ...]) -> Any:
    """Prefill on all ranks, decode on one: states, logits and the tokens that follow against one device."""

    def run(rank: int, world: int) -> dict[str, Any]:
        return {name: _hand_over(name, rank, world) for name in names}

    return run


def _hand_over(name: str, rank: int, world: int) -> list[dict[str, Any]]:
    model, attn, keep, window, balance = STEPS[name]
    step = make_stateful(student(model, attn, keep, window, dtype=torch.float64 if window else torch.float32))
    for i, node in enumerate(node for node in step.graph_module.graph.nodes if node.op == "placeholder"):
        node.name = node.target = f"input_{i}"  # as in an artefact: read back, its inputs have no other names
    step.graph_module.recompile()
    alone = Session(step)
    together = ShardedSession(step, SequenceParallel(balance=balance), every_token=True)
    results = []
    for length, chunk in ((23, 256), (17, 8), (2, 5)):
        tokens, mask = ids(length), torch.ones(2, length, dtype=torch.bool)
        if not step.uniform_positions and length > 3:
            mask[0, :3] = False
        logits: tuple[list[Tensor], list[Tensor]] = ([], [])
        one, many = (
            prefill(session, tokens, mask, chunk=chunk, collect=lambda _, part, kept=kept: kept.append(part))
            for session, kept in zip((alone, together), logits, strict=True)
        )
        a, b = (torch.cat(parts, 1)[mask] for parts in logits)
        results.append(
            {
                "shapes": [list(x.shape) for x in one.states] == [list(x.shape) for x in many.states],
                "states": max(_relative(x, y) for x, y in zip(one.states, many.states, strict=True)),
                "logits": _relative(a, b),
                "tokens": generate(alone, [[1]] * 2, 8, after=one).tokens
                == generate(together.alone, [[1]] * 2, 8, after=many).tokens,
            }
        )
    last = ShardedSession(step)
    results[0]["last logits only"] = _relative(
        prefill(alone, ids(23), torch.ones(2, 23, dtype=torch.bool)).logits,
        prefill(last, ids(23), torch.ones(2, 23, dtype=torch.bool)).logits,
    )
    return results


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-6)) if a.numel() else 0.0


def compiled(backend: str) -> Any:
    """The sharded program under torch.compile: outputs, gradients, and the collectives in its graphs."""

    def run(rank: int, world: int) -> dict[str, Any]:
        _, sharded = nano("gla")
        part = shard_batch({"idx": ids(6 * world)}, rank, world, program=sharded)
        parameters = [p for p in sharded.graph_module.parameters() if p.requires_grad]
        wanted = first(sharded(**part))
        wanted_grads = torch.autograd.grad(wanted.square().sum(), parameters, allow_unused=True)
        fast = torch.compile(sharded.graph_module, backend=backend)
        for _ in range(2):  # tracing the first one calls collectives on fake tensors
            with profiled() as trace:
                got = first(fast(part["idx"]))
                grads = torch.autograd.grad(got.square().sum(), parameters, allow_unused=True)
        gradient = 0.0
        for a, b in zip(wanted_grads, grads, strict=True):
            assert (a is None) == (b is None)
            gradient = max(gradient, 0.0 if a is None or b is None else _relative(a, b))
        return {
            "output": _relative(wanted.detach(), got.detach()),
            "gradient": gradient,
            "collectives": collectives(trace),
            "order": order(trace),
        }

    return run


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name, tied parameters under each of theirs."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def composed(rank: int, world: int) -> dict[str, float]:
    """On a 2-D mesh (data × sequence): DDP, FSDP2, gradient checkpointing; and six-bit inference."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "sp"))
    copy, place, sequence = mesh["dp"].get_local_rank(), mesh["sp"].get_local_rank(), world // 2
    group = mesh.get_group("sp").group_name
    whole = student("nanogpt", "lawcat", (0,), dtype=torch.float32)
    split = SequenceParallel(mesh_dim="sp", mesh=mesh)
    tokens = ids(9, rows=4)  # two rows for each copy of the model
    labels = torch.cat([tokens[:, 1:], tokens.new_full((4, 1), -100)], 1)
    loss = nn.functional.cross_entropy(first(whole(tokens)).flatten(0, 1), labels.flatten())
    loss.backward()
    wanted = {name: grad.clone() for name, grad in gradients(whole.graph_module).items()}
    mine = tokens[2 * copy : 2 * copy + 2]
    results: dict[str, float] = {}

    def fresh() -> tuple[Program, dict[str, Tensor], Tensor]:
        twin = student("nanogpt", "lawcat", (0,), dtype=torch.float32)
        sharded = lincompile.Pipeline([split])(twin)
        sharded.graph_module.zero_grad()  # it shares the model's own parameters with the others
        part = shard_batch({"idx": mine}, place, sequence, labels=mine, program=sharded)
        return sharded, part, part.pop("labels")

    def largest(grads: dict[str, Tensor]) -> float:
        assert grads.keys() <= wanted.keys() and len(grads) >= len(wanted) - 1  # a copy has one name for tied ones
        return max(_relative(wanted[name], grad) for name, grad in grads.items())

    sharded, part, targets = fresh()
    parallel = nn.parallel.DistributedDataParallel(sharded.graph_module)  # over all ranks: it averages gradients
    share = sequence_loss(first(parallel(part["idx"])), targets, group) * sequence
    share.backward()
    results["ddp"] = largest(gradients(sharded.graph_module))

    meshes = {
        "fsdp2": init_device_mesh("cpu", (world,)),  # over both axes as one
        "fsdp2, two axes": mesh,  # sharded over the sequence's ranks, replicated over the data's
        "fsdp2, data axis": mesh["dp"],  # which averages over the copies only: the sum over slices is the caller's
    }
    for name, over in meshes.items():
        sharded, part, targets = fresh()
        fully_shard(sharded.graph_module, mesh=over)
        alone = name == "fsdp2, data axis"
        share = sequence_loss(first(sharded.graph_module(part["idx"])), targets, group) * (1 if alone else sequence)
        share.backward()
        found = gradients(sharded.graph_module)
        if alone:
            for parameter in sharded.graph_module.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.to_local(), group=mesh.get_group("sp"))
        results[name] = largest({key: grad.full_tensor() for key, grad in found.items()})

    sharded, part, targets = fresh()
    out = checkpoint(lambda x: first(sharded(x)), part["idx"], use_reentrant=False)
    (sequence_loss(out, targets, group) / 2).backward()
    for parameter in sharded.graph_module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    results["checkpoint"] = largest(
        {n: p.grad for n, p in sharded.graph_module.named_parameters() if p.grad is not None}
    )

    lincompile.Pipeline([lincompile.Quantize("w6a16")])(whole)
    sharded = lincompile.Pipeline([split])(whole.clone())
    part = shard_batch({"idx": mine}, place, sequence, program=sharded)
    size = part["idx"].shape[1]
    with torch.no_grad():
        wanted_rows = first(whole(mine))[:, place * size : (place + 1) * size]
        results["int6"] = _relative(wanted_rows, first(sharded(**part))[:, : wanted_rows.shape[1]])
    return results


# --- what must fail, and how ---------------------------------------------------------------------------------------


def refusals(rank: int, world: int) -> dict[str, str]:
    """The errors of runs that fail on every rank alike (the group goes on), by what is wrong."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    gla = student("nanogpt", "gla", dtype=torch.float32)
    other = student("nanogpt", "hedgehog", dtype=torch.float32) if rank else gla
    hybrid = student("nanogpt", "lawcat", (0,), dtype=torch.float32)
    sharded, balanced = SequenceParallel().run(gla).program, SequenceParallel(balance=True).run(hybrid).program
    step = shard_step(make_stateful(gla))
    tokens, mask = ids(4), torch.ones(2, 4, dtype=torch.bool)

    def weights() -> None:
        copies = [parameter.detach().clone() for parameter in gla.graph_module.parameters()]
        with torch.no_grad():
            for parameter in gla.graph_module.parameters():
                parameter.mul_(1 + rank)
        try:
            SequenceParallel().run(gla)
        finally:
            with torch.no_grad():
                for parameter, copy in zip(gla.graph_module.parameters(), copies, strict=True):
                    parameter.copy_(copy)

    def resumed() -> None:
        """A gradient that would have to reach the state a sequence was resumed from: an error, not a wrong number."""
        out, _ = step(tokens, torch.arange(4).expand(2, 4) + 4 * rank, mask, step.initial_states(2))
        out.sum().backward()

    def slices() -> None:
        """Also where every rank has met either shape before."""
        for length in (6, 7):
            sharded(ids(length))
        sharded(ids(6 + rank))

    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("sp",))
    attempts: dict[str, Any] = {
        "programs": lambda: SequenceParallel().run(other),
        "weights": weights,
        "slices": slices,
        "world": lambda: SequenceParallel(world=world + 1).run(gla),
        "odd": lambda: balanced(ids(5)),
        "resumed": resumed,
        "stateful": lambda: make_stateful(sharded),
        "group": lambda: SequenceParallel(group="nobody").run(gla),
        "group object": lambda: SequenceParallel(group=dist.group.WORLD).run(gla),  # type: ignore[arg-type]
        "no mesh": lambda: SequenceParallel(mesh=world).run(gla),
        "axis": lambda: SequenceParallel(mesh_dim="tp", mesh=everyone).run(gla),
        "elsewhere": lambda: SequenceParallel(mesh=DeviceMesh("cpu", [1 - rank], mesh_dim_names=("sp",))).run(gla),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def dying_rank(rank: int, world: int) -> None:
    sharded = SequenceParallel().run(student("nanogpt", "gla", dtype=torch.float32)).program
    if rank == world - 1:
        os._exit(3)
    sharded(ids(6))


def padded_mask(rank: int, world: int) -> dict[str, Any]:
    """Batches whose first slice is all padding: the first rank holds no real token of that row."""
    program = student("llama-gqa", "lawcat", (1,), dtype=torch.float64)
    sharded = lincompile.Pipeline([SequenceParallel()])(program.clone())
    size = 6
    inputs = batch(program, size * world)
    inputs["attention_mask"][0, : size + 1] = 0
    whole = first(program(**inputs))[:, rank * size : (rank + 1) * size]
    part = first(sharded(**shard_batch(inputs, rank, world)))
    real = inputs["attention_mask"][:, rank * size : (rank + 1) * size].bool()
    return {"error": _relative(whole[real].detach(), part[real].detach()), "finite": bool(part.isfinite().all())}
