"""A step program on W ranks: a long prompt is read slice by slice, and every rank ends with the states of the whole.

Sharded prefill and ordinary decode share states: what the sharded step returns is what the unsharded one would have
returned after the whole chunk, on every rank, so any one of them can go on alone. Linear sites have their last state
from the summaries that are gathered anyway; convolutions and windows also gather the ends of the slices; kept softmax
sites have gathered all keys and values in any case.
"""

from __future__ import annotations

import copy

import torch
from torch.fx import Node

from ..errors import RefusedError
from ..graph import Builder, argument, aten, finish
from ..program import AttentionSite, Program, share_tensors
from ..shard import SequenceParallel, Sharder
from ..stateful import StepProgram
from .check import check_fingerprints, fingerprint
from .sites import Slices

ops = torch.ops.lincompile


def shard_step(step: StepProgram, options: SequenceParallel | None = None) -> StepProgram:
    """The step program for slices: the same signature and states, tokens ``[B, t / W]`` instead of ``[B, t]``.

    For inference: gradients don't pass from the last states. Every rank must call it together, with slices of one
    length, in rank order, and the same states. Chunks that don't divide are the caller's to split
    (``lowering.sharded.ShardedSession`` does).

    Raises:
        RefusedError: torch.distributed isn't initialised, the ranks' programs differ, or the program has no states.
    """
    if not step.causal or not step.states:
        raise RefusedError("shard: the program runs whole sequences, without states; shard it before make_stateful")
    options = options or SequenceParallel()
    group, world = options.resolve()
    check_fingerprints(fingerprint(step.graph_module, [spec.name for spec in step.states]), group, world)
    twin = copy.copy(step)
    twin.graph_module = share_tensors(step.graph_module, {})
    stepper = _StepSharder(twin, Slices(group, world, options.balance))
    stepper.sites()
    finish(twin.graph_module)
    twin.metadata = dict(step.metadata) | {"sequence_parallel": {"world": world, "sites": dict(stepper.counts)}}
    return twin


class _StepSharder(Sharder):
    """Positions are inputs of a step program, so only its token-mixing ops change."""

    def __init__(self, step: StepProgram, slices: Slices) -> None:
        inputs = [node for node in step.graph_module.graph.nodes if node.op == "placeholder"]
        super().__init__(Program(step.graph_module, [], {}), inputs[0], slices)
        # by place: a graph that was saved and read back has other names
        names = ["tokens", "positions", "mask", *(spec.name for spec in step.states)]
        self.inputs = dict(zip(names, inputs, strict=True))
        self._check_slices()
        self.everything: Node | None = None
        if "key_mask" in self.inputs:
            self._join_masks(self.inputs["key_mask"], self.inputs["mask"])

    def _join_masks(self, past: Node, own: Node) -> None:
        """The mask of all keys, a state: ``[past | slice]`` in the step graph, here ``[past | all slices]``."""
        joined = next(
            node
            for node in past.users
            if node.target is aten.cat.default and list(node.args[0]) == [past, own]  # type: ignore[arg-type]
        )
        make = Builder(self.module, joined)
        self.everything = make(aten.cat.default, [past, self.slices.mask(make, own)], 1)
        joined.replace_all_uses_with(self.everything)
        self.graph.erase_node(joined)

    def _softmax_attention_step(self, node: Node, site: AttentionSite | None) -> None:
        q, k, v, key_cache, value_cache = node.args[:5]
        kind, window = argument(node, 6, "kind"), argument(node, 7, "window")
        options = [argument(node, 8, "scale"), argument(node, 9, "softcap")]
        make = Builder(self.module, node)
        slices = self.slices
        if kind == "sliding":
            past = (key_cache, value_cache, self.inputs["key_mask"])
            out = slices.window(make, q, k, v, self.inputs["mask"], past, window, options)
            ends = [
                make(ops.last_tokens.default, new, old, window, 2, slices.world, slices.group)
                for new, old in ((k, key_cache), (v, value_cache))
            ]
            self.counts["window"] += 1
        else:
            keys, values, _ = slices.gathered(make, k, v, None)
            ends = [make(aten.cat.default, [old, new], 2) for new, old in ((keys, key_cache), (values, value_cache))]
            out = slices.attend(make, q, ends[0], ends[1], self.everything, kind, options)
            self.counts["softmax"] += 1
        for user in list(node.users):
            user.replace_all_uses_with([out, *ends][int(user.args[1])])  # type: ignore[arg-type]
            self.graph.erase_node(user)
        self.graph.erase_node(node)
