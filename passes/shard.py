"""Sequence parallelism as a pass: LASP-2 for linear sites, LASP-2H for kept softmax sites (arXiv 2502.07563).

Every rank runs the same graph on its own contiguous slice of the sequence.

- Linear attention and the delta rule: the slice's summary is gathered (one all-gather, as large as a state) while the
  slice's own output is computed from zero; what reaches the slice is then added. The backward pass gathers once too.
- Short convolutions and sliding windows get the last tokens of the rank before.
- Other softmax sites gather keys and values (un-expanded heads).
- Models that count positions themselves count from the slice's start.

The formulas are in ``sharding/sites.py``, the exchanges in ``kernels/sequence_parallel``; ``sharding/batch.py`` cuts
batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.sequence_parallel import op as _op  # also registers the exchange ops
from .errors import LincompileError, RefusedError
from .graph import Builder, argument, aten, finish, redirect, symbols_in, tensor_of, value_of
from .identity import ProveAttention
from .pipeline import PassResult, register
from .program import AttentionSite, Program
from .sharding.batch import sequence_loss as sequence_loss
from .sharding.batch import shard_batch as shard_batch
from .sharding.check import check_fingerprints, check_shard, fingerprint
from .sharding.sites import Slices, refuse_cross
from .stepping.offsets import continue_positions, position_limit, sequence_symbol
from .stepping.tokenwise import mixing
from .verify import op_name

ops = torch.ops.lincompile


@register("shard")
@dataclass(frozen=True)
class SequenceParallel:
    """Makes a program run on slices of the sequence, one per rank of a process group.

    All ranks must run the pass together: it compares their programs, and the sharded program's outputs on a few tokens
    with the whole program's.

    Args:
        mesh_dim: name of the mesh axis the sequence is split over.
        balance: causal softmax sites work on head–tail pairs of pieces, so that no rank waits for the last one
            (slices must have even lengths; queries and outputs travel once more).
        scan: linear sites pass their states from rank to rank in so many pieces instead of gathering them (0 = gather):
            for many ranks, see ``docs/sequence_parallel.md``. The delta rule and prefill always gather.
        world: number of ranks expected; the group's by default.
        check: compare with the whole program (skipped where it has no weights).
        mesh: the device mesh that ``mesh_dim`` is an axis of; without one the group is the default one.
        group: name of a process group, instead of a mesh.

    Raises (from ``run``):
        RefusedError: torch.distributed isn't initialised, ranks hold different programs, or the program has a part
            that can't be split; the message names it.
    """

    mesh_dim: str = "sp"
    balance: bool = False
    scan: int = 0
    world: int | None = None
    check: bool = True
    mesh: Any = field(default=None, compare=False, repr=False, metadata={"text": False})
    group: str | None = field(default=None, metadata={"text": False})
    name: str = field(default="shard", init=False, metadata={"text": False})

    def __post_init__(self) -> None:
        if not isinstance(self.scan, int) or self.scan < 0:
            raise LincompileError(f"shard: scan={self.scan}: write a number of pieces, such as 4 (0 = gather)")

    def run(self, program: Program) -> PassResult:
        if program.metadata.get("sequence_parallel"):
            return PassResult(program, False, dict(program.metadata["sequence_parallel"]))
        group, world = self.resolve()
        inputs = [(item.name, item.role, item.inverted) for item in program.inputs]
        check_fingerprints(fingerprint(program.graph_module, inputs), group, world)
        tokens = splittable(program)
        twin = program.clone()
        sharder = Sharder(twin, twin.placeholder(tokens.name), Slices(group, world, self.balance, self.scan))
        report: dict[str, Any] = {
            "mesh_dim": self.mesh_dim,
            "world": world,
            "balance": self.balance,
            "scan": self.scan,
        } | sharder.run()
        limits = [limit for limit in (program.max_positions, position_limit(program)) if limit is not None]
        twin.max_positions = min(limits, default=None)
        if self.check:
            report["max_error"] = check_shard(program, twin, group, world, even=self.balance)
        twin.metadata["sequence_parallel"] = report
        return PassResult(twin, True, report)

    def resolve(self) -> tuple[str, int]:
        """(group name, number of ranks)."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RefusedError("shard: torch.distributed isn't initialised; start with torchrun and init_process_group")
        if self.mesh is not None:
            group = self._axis()
        elif self.group is not None:
            group = self.group
            try:
                _op.process_group(group)
            except (RuntimeError, TypeError, ValueError):
                raise RefusedError(f"shard: there is no process group '{group}' (give a group's group_name)") from None
        else:
            world_group = dist.group.WORLD
            assert world_group is not None
            group = world_group.group_name
        found = dist.get_world_size(_op.process_group(group))
        if self.world is not None and self.world != found:
            raise RefusedError(f"shard: world={self.world}, but the process group has {found} ranks")
        return group, found

    def _axis(self) -> str:
        """The group of the mesh's axis that this process is on."""
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(self.mesh, DeviceMesh):
            raise RefusedError(f"shard: mesh takes a DeviceMesh (init_device_mesh), not {type(self.mesh).__name__}")
        names = self.mesh.mesh_dim_names or ()
        if self.mesh_dim not in names:
            raise RefusedError(
                f"shard: the mesh has no axis '{self.mesh_dim}' (it has {', '.join(names) or 'no names'})"
            )
        if self.mesh.get_coordinate() is None:
            raise RefusedError("shard: this process isn't part of the mesh; run the pass on the mesh's ranks only")
        return str(self.mesh.get_group(self.mesh_dim).group_name)


def splittable(program: Program) -> Any:
    """The input that holds the sequence.

    Raises:
        RefusedError: something in the program can't be split over its tokens, and what.
    """
    tokens = program.input_with_role("tokens") or program.input_with_role("features")
    if tokens is None or "sequence" not in "".join(tokens.axes.values()):
        raise RefusedError("shard: the program takes no token sequence of any length to split")
    if not any(entry["pass"] == ProveAttention.name for entry in program.history):
        raise RefusedError("shard: attention must be proved before it can be split: run canonicalize and prove first")
    unproved = [site for site in program.sites if site.node is None]
    if unproved:
        others = f" (and {len(unproved) - 1} more)" if len(unproved) > 1 else ""
        raise RefusedError(
            f"shard: the attention at '{unproved[0].path}' isn't proved and can't be split: "
            f"{unproved[0].reason}{others}"
        )
    sequence = sequence_symbol(program.placeholder(tokens.name))
    reason = mixing(program, sequence, across_rows=False)
    if reason is not None:
        raise RefusedError(f"shard: {reason}, across the slices of other ranks")
    output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if isinstance(value_of(node), Tensor) and sequence not in symbols_in(tensor_of(node)):
            raise RefusedError(f"shard: the model returns '{node.name}', which isn't one row per token")
    return tokens


class Sharder:
    """Rewrites one program in place."""

    def __init__(self, program: Program, tokens: Node, slices: Slices) -> None:
        self.program, self.tokens, self.slices = program, tokens, slices
        self.module = program.graph_module
        self.graph = self.module.graph
        self.counts = {"linear": 0, "softmax": 0, "window": 0, "conv": 0}

    def run(self) -> dict[str, Any]:
        try:
            continue_positions(self.program, sequence_symbol(self.tokens), self.offset)
        except RefusedError as error:
            raise RefusedError(str(error).replace("no step form", "shard")) from error
        self._check_slices()
        self.sites()
        finish(self.module)
        return {"sites": {name: count for name, count in self.counts.items() if count}}

    def sites(self) -> None:
        """Every op that mixes tokens."""
        sites = self.program.site_of_op()
        for node in list(self.graph.nodes):
            name = op_name(node)
            rewrite = getattr(self, f"_{name}", None)
            if rewrite is not None:
                rewrite(node, sites.get(node))

    def _anchor(self) -> Node:
        anchor: Node = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
        return anchor

    def _check_slices(self) -> None:
        make = Builder(self.module, self._anchor())
        redirect(self.tokens, make(ops.equal_slices.default, self.tokens, self.slices.world, self.slices.group))

    def offset(self) -> Node:
        """Tokens before this rank's slice (slices are of one length)."""
        make = Builder(self.module, self._anchor())
        rank = make(ops.rank_index.default, self.tokens, self.slices.group)
        return make(aten.mul.Tensor, rank, make(aten.sym_size.int, self.tokens, 1))

    def _linear_attention(self, node: Node, site: AttentionSite | None) -> None:
        q, k, v, decay, initial = node.args[:5]
        scale, causal, normalize = (argument(node, i, n) for i, n in ((5, "scale"), (6, "causal"), (7, "normalize")))
        make = Builder(self.module, node)
        refuse_cross(q, k, site.path if site else node.name)
        started = None if causal else partial(self._sink, q, node)
        out, final = self.slices.linear(make, q, k, v, decay, initial, scale, causal, normalize, started)
        self._replace(node, site, out, final, initial)
        self.counts["linear"] += 1

    def _sink(self, q: Any, node: Node) -> None:
        """Moves what only a site's queries need to its place, behind the exchange that has just been started."""
        found: dict[Node, None] = {node: None}
        wanted, place = {q}, node.prev
        while wanted:
            if place in wanted:
                wanted.remove(place)
                if place.op == "call_function" and place.users.keys() <= found.keys():
                    found[place] = None
                    wanted.update(place.all_input_nodes)
            place = place.prev
        for moved in reversed(list(found)[1:]):
            node.prepend(moved)

    def _gated_delta(self, node: Node, site: AttentionSite | None) -> None:
        q, k, v, beta, decay, initial = node.args[:6]
        make = Builder(self.module, node)
        out, final = self.slices.delta(make, q, k, v, beta, decay, initial, argument(node, 6, "scale"))
        self._replace(node, site, out, final, initial)
        self.counts["linear"] += 1

    def _short_conv(self, node: Node, site: AttentionSite | None) -> None:
        x, weight, initial = node.args
        out, final = self.slices.convolution(Builder(self.module, node), x, weight, initial)
        self._replace(node, site, out, final, initial)
        self.counts["conv"] += 1

    def _replace(self, node: Node, site: AttentionSite | None, out: Node, final: Node | None, initial: Any) -> None:
        """Puts (output, last state) in place of an op that returned them."""
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(out)
            elif user.users:
                if initial is None or final is None:
                    raise RefusedError(
                        f"shard: the final state of '{node.name}' is used, which training doesn't hand on; shard the "
                        "step program (shard_step)"
                    )
                user.replace_all_uses_with(final)
            self.graph.erase_node(user)
        if site is not None:
            site.node = out
        self.graph.erase_node(node)

    def _softmax_attention(self, node: Node, site: AttentionSite | None) -> None:
        q, k, v, real = node.args[:4]
        kind, window = argument(node, 4, "kind"), argument(node, 5, "window")
        options = [argument(node, 6, "scale"), argument(node, 7, "softcap")]
        refuse_cross(q, k, site.path if site else node.name)
        make = Builder(self.module, node)
        if kind == "sliding":
            out = self.slices.window(make, q, k, v, real, (None, None, None), window, options)
        else:
            out = self.slices.softmax(make, q, k, v, real, kind, options)
        self._swap(node, site, out)
        self.counts["window" if kind == "sliding" else "softmax"] += 1

    def _swap(self, node: Node, site: AttentionSite | None, out: Node) -> None:
        node.replace_all_uses_with(out)
        if site is not None:
            if site.near is node:
                site.near = out
            else:
                site.node = out
        self.graph.erase_node(node)

    def _hedgehog_features(self, node: Node, site: AttentionSite | None) -> None:
        raise RefusedError(f"shard: '{node.name}' is a fused op of a lowered program; shard before lowering")

    def _softmax_attention_step(self, node: Node, site: AttentionSite | None) -> None:
        raise RefusedError(f"shard: '{node.name}' keeps a cache; shard the step program with shard_step")
