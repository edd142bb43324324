"""Sequence parallelism as a pass: LASP-2 for linear sites, LASP-2H for kept softmax sites.

Every rank runs the same graph on its own contiguous slice of the sequence.

- Linear attention: the slice's state and total decay are gathered (one all-gather, state-sized, float32) while the
  slice's own output is computed from zero; the state that reaches the slice is then added in. The backward pass
  gathers once too. (LASP-2, arXiv 2502.07563; with decays as derived in ``kernels/sequence_parallel/op.py``.)
- Short convolutions get the previous rank's last inputs.
- Softmax sites gather keys and values (un-expanded heads), rotated so that the rank's own slice comes last: causal
  and sliding masks are aligned to the end, and later ranks' keys are masked away like padding.
- Models that count positions themselves count from the slice's start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.sequence_parallel import op as _op  # also registers the exchange ops
from .errors import RefusedError
from .graph import Builder, argument, aten, finish, tensor_of
from .offsets import continue_positions, sequence_symbol
from .pipeline import PassResult, register
from .program import Program
from .verify import op_name

ops = torch.ops.lincompile
EPSILON = 1e-10  # of the normaliser, as in linear_attention


@register("shard")
@dataclass(frozen=True)
class SequenceParallel:
    """Makes a program run on slices of the sequence, one per rank of a process group.

    Args:
        mesh_dim: name of the mesh axis the sequence is split over (for the record).
        group: name of the process group (``dist.group.WORLD.group_name`` by default, or a mesh axis's group).
        world: its size; read from the group by default.

    Raises (from ``run``):
        RefusedError: torch.distributed isn't initialised, or the program has a site that can't be split.
    """

    mesh_dim: str = "sp"
    group: str | None = None
    world: int | None = None
    name: str = field(default="shard", init=False, metadata={"text": False})

    def run(self, program: Program) -> PassResult:
        if program.metadata.get("sequence_parallel"):
            return PassResult(program, False, dict(program.metadata["sequence_parallel"]))
        group, world = self.resolve()
        tokens = program.input_with_role("tokens") or program.input_with_role("features")
        if tokens is None:
            raise RefusedError("shard: the program takes no token sequence to split")
        unproved = [site for site in program.sites if site.node is None]
        if unproved:
            raise RefusedError(
                f"shard: the attention at '{unproved[0].path}' isn't proved and can't be split ({unproved[0].reason})"
            )
        sharder = _Sharder(program, program.placeholder(tokens.name), group, world)
        report = {"mesh_dim": self.mesh_dim, "world": world} | sharder.run()
        program.metadata["sequence_parallel"] = report
        return PassResult(program, True, report)

    def resolve(self) -> tuple[str, int]:
        """(group name, number of ranks)."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RefusedError("shard: torch.distributed isn't initialised; start with torchrun and init_process_group")
        world_group = dist.group.WORLD
        assert world_group is not None
        group = self.group or world_group.group_name
        return group, self.world or dist.get_world_size(_op.process_group(group))


class _Sharder:
    """Rewrites one program in place."""

    def __init__(self, program: Program, tokens: Node, group: str, world: int) -> None:
        self.program, self.tokens, self.group, self.world = program, tokens, group, world
        self.module = program.graph_module
        self.graph = self.module.graph
        self.counts = {"linear": 0, "softmax": 0, "conv": 0}
        self.rank: Node | None = None
        self.mask: Node | None = None

    def run(self) -> dict[str, Any]:
        continue_positions(self.program, sequence_symbol(self.tokens), self._offset)
        sites = self.program.site_of_op()
        for node in list(self.graph.nodes):
            name = op_name(node)
            if name == "linear_attention":
                sites[node].node = self._linear(node)
                self.counts["linear"] += 1
            elif name == "short_conv":
                self._conv(node)
                self.counts["conv"] += 1
            elif name == "softmax_attention":
                self._softmax(node)
                self.counts["softmax"] += 1
            elif name in ("gated_delta", "softmax_attention_step"):
                raise RefusedError(f"shard: {name} has no sequence-parallel form yet")
        finish(self.module)
        return {"sites": dict(self.counts)}

    def _anchor(self) -> Node:
        anchor: Node = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
        return anchor

    def _rank(self) -> Node:
        if self.rank is None:
            self.rank = Builder(self.module, self._anchor())(ops.rank_index.default, self.tokens, self.group)
        return self.rank

    def _offset(self) -> Node:
        """Tokens before this rank's slice (slices are of one length)."""
        rank = self._rank()
        make = Builder(self.module, rank.next)
        return make(aten.mul.Tensor, rank, make(aten.sym_size.int, self.tokens, 1))

    def _linear(self, node: Node) -> Node:
        q, k, v, decay, initial = node.args[:5]
        scale, causal, normalize = (argument(node, i, n) for i, n in ((5, "scale"), (6, "causal"), (7, "normalize")))
        if initial is not None:
            raise RefusedError(
                f"shard: '{node.name}' already starts from a state; shard the program before make_stateful"
            )
        make = Builder(self.module, node)
        dtype = torch.float64 if tensor_of(q).dtype == torch.float64 else torch.float32
        values = v
        if normalize:
            ones = make(aten.ones_like.default, make(aten.slice.Tensor, v, 3, 0, 1))
            values = make(aten.cat.default, [v, ones], -1)
        packed = self._summary(make, k, values, decay, dtype)
        gathered = make(ops.gather_states.default, packed, self.world, self.group)
        own = None
        if causal:  # beside the all-gather: what the slice sees of itself
            own_op = make(ops.linear_attention.default, q, k, values, decay, None, scale, True, False)
            own = make(aten.to.dtype, make.item(own_op, 0), dtype)
        arrived = make(ops.prefix_state.default, gathered, self.world, decay is not None, causal, self.group)
        before = make.item(arrived, 0)
        out = self._read(make, q, decay, before, scale, dtype)
        out = out if own is None else make(aten.add.Tensor, own, out)
        if normalize:
            width = tensor_of(v).shape[-1]
            weight = make(aten.add.Tensor, make(aten.slice.Tensor, out, 3, width, width + 1), EPSILON)
            out = make(aten.div.Tensor, make(aten.slice.Tensor, out, 3, 0, width), weight)
        out = make(aten.to.dtype, out, tensor_of(v).dtype)
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(out)
            elif user.users:
                raise RefusedError(f"shard: the final state of '{node.name}' is used, which no single rank has")
            self.graph.erase_node(user)
        self.graph.erase_node(node)
        return before

    def _summary(self, make: Builder, k: Any, values: Any, decay: Any, dtype: torch.dtype) -> Node:
        """``[B, Hkv, D, E]``: the state that the slice leaves from zero; with decay, its sum as one more column."""
        keys, columns = make(aten.to.dtype, k, dtype), make(aten.to.dtype, values, dtype)
        total = None
        if decay is not None:
            log = make(aten.expand_as.default, make(aten.to.dtype, decay, dtype), keys)
            # decay from each token to the slice's end: sums of later rows only, so −inf never meets −inf
            later = make(aten.constant_pad_nd.default, make(aten.slice.Tensor, log, 2, 1), [0, 0, 0, 1])
            suffix = make(aten.flip.default, make(aten.cumsum.default, make(aten.flip.default, later, [2]), 2), [2])
            keys = make(aten.mul.Tensor, keys, make(aten.exp.default, suffix))
            total = make(aten.unsqueeze.default, make(aten.sum.dim_IntList, log, [2]), -1)
        state = make(aten.matmul.default, make(aten.transpose.int, keys, 2, 3), columns)
        return state if total is None else make(aten.cat.default, [state, total], -1)

    def _read(self, make: Builder, q: Any, decay: Any, state: Node, scale: float, dtype: torch.dtype) -> Node:
        """``scale · (q ⊙ e^G) P`` for every query head; G is the decay since the slice's start."""
        heads, kv_heads = tensor_of(q).shape[1], tensor_of(state).shape[1]
        groups = int(heads) // int(kv_heads)
        queries = make(aten.unflatten.int, make(aten.to.dtype, q, dtype), 1, [int(kv_heads), groups])
        if decay is not None:
            since = make(aten.exp.default, make(aten.cumsum.default, make(aten.to.dtype, decay, dtype), 2))
            queries = make(aten.mul.Tensor, queries, make(aten.unsqueeze.default, since, 2))
        read = make(aten.matmul.default, queries, make(aten.unsqueeze.default, state, 2))
        return make(aten.mul.Tensor, make(aten.flatten.using_ints, read, 1, 2), scale)

    def _gather(self, make: Builder, x: Node) -> Node:
        """``[d0, …]`` on each rank → ``[world, d0, …]`` on all; the backward pass reduce-scatters."""
        flat = make(aten.contiguous.default, x)
        gathered = make(
            torch.ops._c10d_functional_autograd.all_gather_into_tensor.default, flat, self.world, self.group
        )
        waited = make(torch.ops._c10d_functional.wait_tensor.default, gathered)
        return make(aten.unflatten.int, waited, 0, [self.world, -1])

    def _conv(self, node: Node) -> None:
        x, weight, initial = node.args
        if initial is not None:
            raise RefusedError(
                f"shard: '{node.name}' already starts from a state; shard the program before make_stateful"
            )
        halo = int(tensor_of(weight).shape[1]) - 1
        if halo == 0 or self.world == 1:
            return
        make = Builder(self.module, node)
        tails = self._gather(make, make(aten.slice.Tensor, x, 1, -halo))
        zeros = make(aten.zeros_like.default, make(aten.slice.Tensor, tails, 0, 0, 1))
        before = make(aten.cat.default, [zeros, make(aten.slice.Tensor, tails, 0, 0, self.world - 1)], 0)
        mine = make(aten.squeeze.dim, make(aten.index_select.default, before, 0, self._as_index(make)), 0)
        node.args = (x, weight, make(aten.transpose.int, mine, 1, 2))

    def _as_index(self, make: Builder) -> Node:
        return make(aten.unsqueeze.default, self._rank(), 0)

    def _order(self, make: Builder) -> Node:
        """Ranks rotated so that this one comes last: (arange(world) + rank + 1) % world."""
        steps = make(aten.arange.default, self.world, device=tensor_of(self.tokens).device)
        shifted = make(aten.add.Tensor, make(aten.add.Tensor, steps, self._rank()), 1)
        return make(aten.remainder.Scalar, shifted, self.world)

    def _softmax(self, node: Node) -> None:
        q, k, v, padding = node.args[:4]
        kind = argument(node, 4, "kind")
        make = Builder(self.module, node)
        order = self._order(make)
        keys, values = (self._rotated(make, x, order, axis=2) for x in (k, v))
        real = padding
        if real is None:
            ones = make(aten.ones_like.default, make(aten.select.int, make(aten.select.int, k, 1, 0), 2, 0))
            real = make(aten.ne.Scalar, ones, 0)
        visible = self._rotated(make, make(aten.to.dtype, real, torch.int64), order, axis=1, group_axis=True)
        if kind != "full":
            earlier = make(aten.le.Tensor, order, self._rank())
            mask = make(aten.unsqueeze.default, make(aten.unsqueeze.default, earlier, 0), -1)
            visible = make(aten.mul.Tensor, visible, make(aten.to.dtype, mask, torch.int64))
        flat = make(aten.ne.Scalar, make(aten.flatten.using_ints, visible, 1, 2), 0)
        node.args = (q, keys, values, flat, *node.args[4:])

    def _rotated(self, make: Builder, x: Any, order: Node, axis: int, group_axis: bool = False) -> Node:
        """All ranks' slices of ``x`` joined along ``axis``, this rank's last (kept apart with ``group_axis``)."""
        gathered = make(aten.index_select.default, self._gather(make, x), 0, order)
        rank_axes = list(range(tensor_of(gathered).dim()))
        rank_axes.insert(axis, rank_axes.pop(0))
        arranged = make(aten.permute.default, gathered, rank_axes)
        return arranged if group_axis else make(aten.flatten.using_ints, arranged, axis, axis + 1)


def shard_batch(inputs: dict[str, Tensor], rank: int, world: int, labels: Tensor | None = None) -> dict[str, Tensor]:
    """One rank's slice of a batch, padded at the end to equal slices.

    Args:
        inputs: tensors ``[B, T, …]`` by name; a name with "mask" is padded with zeros, "position" by counting on.
        labels: ``[B, T]`` next-token labels; token t is trained to predict ``labels[:, t + 1]``, so labels are shifted
            *before* they are cut: the last token of a slice predicts the first of the next. Padding gets −100.

    Returns:
        The slices, and ``labels`` (already shifted: use them without shifting again) where labels were given.
    """
    length = next(iter(inputs.values())).shape[1]
    size = -(-length // world)
    missing = size * world - length
    result: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if missing:
            extra = value[:, -1:].expand(-1, missing, *value.shape[2:])
            if "mask" in name:
                extra = torch.zeros_like(extra)
            elif "position" in name:
                extra = extra + torch.arange(1, missing + 1, device=value.device)
            value = torch.cat([value, extra], 1)
        result[name] = value[:, rank * size : (rank + 1) * size].contiguous()
    if labels is not None:
        ignored = labels.new_full((labels.shape[0], missing + 1), -100)
        shifted = torch.cat([labels[:, 1:], ignored], 1)
        result["labels"] = shifted[:, rank * size : (rank + 1) * size].contiguous()
    return result
