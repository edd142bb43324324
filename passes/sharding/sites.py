"""One attention site, convolution or window as every sequence-parallel rank computes it.

The formulas are written once, against a *maker*: a ``Builder`` inserts them into a graph (the pass), ``Eager`` runs
them at once (attention modules that train under torchrun). Values are nodes or tensors accordingly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ...kernels.sequence_parallel.op import ALL, DECAY, MATRIX
from ..errors import RefusedError
from ..graph import Builder, aten, same_dim, tensor_of

ops = torch.ops.lincompile
functional = torch.ops._c10d_functional
EPSILON = 1e-10  # of the normaliser, as in linear_attention


class Eager:
    """Runs what a ``Builder`` would insert."""

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    def item(self, value: Any, index: int) -> Any:
        return value[index]


Maker = Builder | Eager


def fake(value: Any) -> Tensor:
    """The tensor itself, or a node's fake value."""
    return value if isinstance(value, Tensor) else tensor_of(value)


@dataclass
class Slices:
    """The process group that holds a sequence, one contiguous slice a rank.

    Attributes:
        group: its name; world: its size.
        balance: causal softmax works on head–tail pairs of pieces instead of slices.
        scan: pass states from rank to rank in so many pieces instead of gathering them (0 = gather).
        masks: gathered padding masks and halos of them, by what they were made from.
    """

    group: str
    world: int
    balance: bool = False
    scan: int = 0
    masks: dict[Any, Any] = field(default_factory=dict)

    # ---- linear sites

    def linear(
        self,
        make: Maker,
        q: Any,
        k: Any,
        v: Any,
        decay: Any,
        initial: Any,
        scale: float,
        causal: bool,
        normalize: bool,
        started: Callable[[], None] | None = None,
    ) -> tuple[Any, Any]:
        """``linear_attention`` over the whole sequence: this rank's rows of the output, and the last state.

        ``started`` is called once the all-gather is on its way: for what a bidirectional site can do meanwhile.
        """
        wide = torch.float64 if fake(q).dtype == torch.float64 else torch.float32
        columns = int(fake(v).shape[-1]) + int(normalize)
        passing = ALL if decay is None else DECAY
        packed = make(ops.segment_summary.default, k, v, decay, normalize)
        chained = bool(self.scan) and causal and initial is None
        gathered = slots = own = None
        if not chained:
            gathered, slots = self._start(make, packed, columns, passing, causal)
        if started is not None:
            started()
        if causal:  # beside the all-gather: what the slice sees of itself
            values = v
            if normalize:
                ones = make(aten.ones_like.default, make(aten.slice.Tensor, v, 3, 0, 1))
                values = make(aten.cat.default, [v, ones], -1)
            if chained:
                alone = make(ops.linear_attention.default, q, k, values, decay, None, scale, True, False)
            else:
                alone = make(ops.slice_own.default, q, k, values, None, decay, None, gathered, slots, scale)
                slots = make.item(alone, 1)
            own = make(aten.to.dtype, make.item(alone, 0), wide)
        if chained:
            before, final = make(ops.scan_state.default, packed, self.world, columns, self.scan, self.group), None
        else:
            before, final = self._arrive(make, gathered, slots, initial, columns, passing, causal)
        out = self._read(make, q, decay, before, scale, wide)
        out = out if own is None else make(aten.add.Tensor, own, out)
        if normalize:
            weight = make(aten.add.Tensor, make(aten.slice.Tensor, out, 3, columns - 1, columns), EPSILON)
            out = make(aten.div.Tensor, make(aten.slice.Tensor, out, 3, 0, columns - 1), weight)
        return make(aten.to.dtype, out, fake(v).dtype), final

    def delta(
        self, make: Maker, q: Any, k: Any, v: Any, beta: Any, decay: Any, initial: Any, scale: float
    ) -> tuple[Any, Any]:
        """``gated_delta`` over the whole sequence.

        An earlier state S leaves a slice as ``A S``, with A a matrix ``[D, D]``: the delta rule is linear in its state,
        so it is run on D more value columns, all zero, from the state ``[0 | I]``. That gives ``[M | A]``, and beside
        the slice's own outputs the queries ``q_t A_{1…t}`` that read what arrives.
        """
        wide = torch.float64 if fake(q).dtype == torch.float64 else torch.float32
        width, columns = int(fake(k).shape[3]), int(fake(v).shape[3])
        values = make(aten.cat.default, [v, make(aten.zeros_like.default, k)], -1)
        identity = make(aten.eye.default, width, dtype=wide, device=fake(k).device)
        start = make(aten.constant_pad_nd.default, identity, [columns, 0])
        lent = make(aten.zeros_like.default, make(aten.select.int, k, 2, 0), dtype=wide)  # [B, Hkv, D]: its shape
        start = make(aten.add.Tensor, make(aten.unsqueeze.default, lent, -1), start)
        summary = make.item(make(ops.gated_delta.default, k, k, values, beta, decay, start, 1.0), 1)
        gathered, slots = self._start(make, summary, columns, MATRIX, True)
        both = make(ops.slice_own.default, q, k, values, beta, decay, start, gathered, slots, scale)
        alone, slots = make(aten.to.dtype, make.item(both, 0), wide), make.item(both, 1)
        own = make(aten.slice.Tensor, alone, 3, 0, columns)
        reading = make(aten.slice.Tensor, alone, 3, columns, columns + width)
        before, final = self._arrive(make, gathered, slots, initial, columns, MATRIX, True)
        out = make(aten.add.Tensor, own, self._read(make, reading, None, before, 1.0, wide))
        return make(aten.to.dtype, out, fake(v).dtype), final

    def _start(self, make: Maker, packed: Any, columns: int, passing: str, causal: bool) -> tuple[Any, Any]:
        """Issues the all-gather of a summary; returns it, not waited for, and the slots that carry its gradient."""
        flat = make(aten.contiguous.default, make(aten.detach.default, packed))
        gathered = make(functional.all_gather_into_tensor.default, flat, self.world, self.group)
        slots = make(ops.state_slots.default, packed, gathered, self.world, columns, passing, causal, self.group)
        return gathered, slots

    def _arrive(
        self, make: Maker, gathered: Any, slots: Any, initial: Any, columns: int, passing: str, causal: bool
    ) -> tuple[Any, Any]:
        """Waits; returns the state that reaches this rank and the one after the whole sequence."""
        arrived = make(functional.wait_tensor.default, gathered)
        both = make(ops.prefix_state.default, arrived, slots, initial, self.world, columns, passing, causal, self.group)
        return make.item(both, 0), make.item(both, 1)

    def _read(self, make: Maker, q: Any, decay: Any, state: Any, scale: float, wide: torch.dtype) -> Any:
        """``scale · (q ⊙ e^G) P`` for every query head; G is the decay since the slice's start."""
        kv_heads = int(fake(state).shape[1])
        groups = int(fake(q).shape[1]) // kv_heads
        queries = make(aten.unflatten.int, make(aten.to.dtype, q, wide), 1, [kv_heads, groups])
        if decay is not None:
            since = make(aten.exp.default, make(aten.cumsum.default, make(aten.to.dtype, decay, wide), 2))
            queries = make(aten.mul.Tensor, queries, make(aten.unsqueeze.default, since, 2))
        read = make(aten.matmul.default, queries, make(aten.unsqueeze.default, state, 2))
        return make(aten.mul.Tensor, make(aten.flatten.using_ints, read, 1, 2), scale)

    # ---- token by token

    def convolution(self, make: Maker, x: Any, weight: Any, initial: Any) -> tuple[Any, Any]:
        """``short_conv`` over the whole sequence; the last state only where there was a first one."""
        taps = int(fake(weight).shape[1])
        if taps == 1:
            both = make(ops.short_conv.default, x, weight, initial)
            return make.item(both, 0), make.item(both, 1) if initial is not None else None
        start = None if initial is None else make(aten.transpose.int, initial, 1, 2)
        before = self._halo(make, x, start, taps - 1, 1)
        out = make.item(make(ops.short_conv.default, x, weight, make(aten.transpose.int, before, 1, 2)), 0)
        if initial is None:
            return out, None
        last = make(ops.last_tokens.default, x, start, taps - 1, 1, self.world, self.group)
        return out, make(aten.transpose.int, last, 1, 2)

    def _halo(self, make: Maker, x: Any, initial: Any, size: int, axis: int) -> Any:
        return make(ops.halo.default, x, initial, size, axis, self.world, self.group)

    def window(
        self,
        make: Maker,
        q: Any,
        k: Any,
        v: Any,
        real: Any,
        past: tuple[Any, Any, Any],
        window: int,
        options: list[Any],
    ) -> Any:
        """Sliding softmax: the window − 1 keys and values before the slice come from the rank before.

        Args:
            real: this slice's padding mask ``[B, T]``, or None.
            past: cached keys, values and their mask before the whole sequence, or three Nones.
            options: the op's scale and softcap.
        """
        size = window - 1
        if size == 0:
            return make(ops.softmax_attention.default, q, k, v, real, "sliding", window, *options)
        width = int(fake(k).shape[3])
        if fake(k).dtype == fake(v).dtype:  # both in one message
            start = None if past[0] is None else make(aten.cat.default, [past[0], past[1]], -1)
            both = self._halo(make, make(aten.cat.default, [k, v], -1), start, size, 2)
            earlier = (
                make(aten.slice.Tensor, both, 3, 0, width),
                make(aten.slice.Tensor, both, 3, width, width + int(fake(v).shape[3])),
            )
        else:
            earlier = (self._halo(make, k, past[0], size, 2), self._halo(make, v, past[1], size, 2))
        keys, values = (make(aten.cat.default, [old, own], 2) for old, own in zip(earlier, (k, v), strict=True))
        padding = self._window_mask(make, k, real, past[2], size)
        return make(ops.softmax_attention.default, q, keys, values, padding, "sliding", window, *options)

    def _window_mask(self, make: Maker, k: Any, real: Any, past: Any, size: int) -> Any:
        """Which keys of a halo and the slice are real, ``[B, size + T]``: one exchange for all sites of a window."""
        if real is None:  # keys that would lie before the first token aren't there
            rank, length = make(ops.rank_index.default, k, self.group), make(aten.sym_size.int, k, 2)
            first = make(aten.sub.Tensor, make(aten.mul.Tensor, rank, length), size)
            places = make(aten.add.Tensor, make(aten.arange.default, size, device=fake(k).device), first)
            lent = make(aten.select.int, make(aten.select.int, k, 1, 0), 2, 0)
            own = make(aten.ne.Scalar, make(aten.ones_like.default, lent, dtype=torch.int64), 0)
            there = make(aten.unsqueeze.default, make(aten.ge.Scalar, places, 0), 0)
            halo = make(aten.logical_and.default, make(aten.slice.Tensor, own, 1, 0, 1), there)
            return make(aten.cat.default, [halo, own], 1)
        return self._once(
            ("window", real, past, size),
            lambda: make(aten.cat.default, [self._halo(make, real, past, size, 1), real], 1),
        )

    def _once(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """What was made for the same values before (by identity, keeping them alive), or a new one."""
        known = tuple(id(item) if isinstance(item, (Node, Tensor)) else item for item in key)
        if known not in self.masks:
            self.masks[known] = (key, build())
        return self.masks[known][1]

    def softmax(self, make: Maker, q: Any, k: Any, v: Any, real: Any, kind: str, options: list[Any]) -> Any:
        """Causal or full softmax: keys and values of un-expanded heads are gathered (LASP-2H)."""
        keys, values, padding = self.gathered(make, k, v, real)
        return self.attend(make, q, keys, values, padding, kind, options)

    def attend(self, make: Maker, q: Any, keys: Any, values: Any, padding: Any, kind: str, options: list[Any]) -> Any:
        """This rank's queries against gathered keys and values."""
        balanced = self.balance and kind == "causal"
        queries = make(ops.exchange_halves.default, q, False, self.world, self.group) if balanced else q
        where = (balanced, self.world, self.group)
        out = make(ops.slice_attention.default, queries, keys, values, padding, kind, *options, *where)
        return make(ops.exchange_halves.default, out, True, self.world, self.group) if balanced else out

    def gathered(self, make: Maker, k: Any, v: Any, real: Any) -> tuple[Any, Any, Any]:
        """Keys and values ``[B, Hkv, W·T, ·]`` by one all-gather (where of one dtype), and the mask of all tokens."""
        width = int(fake(k).shape[3])
        if fake(k).dtype == fake(v).dtype:
            both = self._tokens(make, make(aten.cat.default, [k, v], -1), 2)
            keys = make(aten.slice.Tensor, both, 3, 0, width)
            values = make(aten.slice.Tensor, both, 3, width, width + int(fake(v).shape[3]))
        else:
            keys, values = self._tokens(make, k, 2), self._tokens(make, v, 2)
        return keys, values, None if real is None else self.mask(make, real)

    def mask(self, make: Maker, real: Any) -> Any:
        """The padding mask of all tokens ``[B, W·T]``, gathered once for all sites that read it."""

        def build() -> Any:
            numbers = make(aten.to.dtype, real, torch.uint8)
            gathered = make(functional.all_gather_into_tensor.default, numbers, self.world, self.group)
            return make(aten.ne.Scalar, self._joined(make, make(functional.wait_tensor.default, gathered), 1), 0)

        return self._once(("all", real), build)

    def _tokens(self, make: Maker, x: Any, axis: int) -> Any:
        """All ranks' slices of ``x`` joined along ``axis``; the backward pass reduce-scatters."""
        flat = make(aten.contiguous.default, x)
        gather = torch.ops._c10d_functional_autograd.all_gather_into_tensor.default
        gathered = make(gather, flat, self.world, self.group)
        return self._joined(make, make(functional.wait_tensor.default, gathered), axis)

    def _joined(self, make: Maker, gathered: Any, axis: int) -> Any:
        by_rank = make(aten.unflatten.int, gathered, 0, [self.world, -1])
        axes = list(range(1, fake(by_rank).dim()))
        axes.insert(axis, 0)
        return make(aten.flatten.using_ints, make(aten.permute.default, by_rank, axes), axis, axis + 1)


def refuse_cross(q: Any, k: Any, path: str) -> None:
    """Two sequences, cut differently, aren't handled."""
    if not same_dim(fake(q).shape[2], fake(k).shape[2]):
        raise RefusedError(
            f"shard: '{path}' is attention between two sequences, which can't be split over ranks; keep such a model "
            "whole"
        )
