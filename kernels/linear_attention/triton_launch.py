"""Launches the linear-attention kernels: block sizes, segments, scratch tensors. One configuration per head size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..triton_device import processors
from .triton_backward import key_gradients, normaliser, value_gradients
from .triton_blocks import INTERPRETED
from .triton_forward import chunk_decays, decode, output, scan, states

# Largest |log decay| of half a chunk that the anchored factors are used for. Between the middles of two chunks lie two
# halves, and exp(-2 · LIMIT), times a state and features that may be small themselves, must stay far above the smallest
# float32 and bfloat16 (exp(-87)): what is lost there is lost for good, however large the next factor is.
LIMIT = 32.0
CHUNK = 64
SLICE = 64
MIN_SEGMENT_CHUNKS = 8

Decays = tuple[Tensor | None, Tensor | None, Tensor, tuple[bool, ...]]
Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Plan:
    """Everything the kernels need to know about one problem."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]
    scale: float
    normalize: bool

    @property
    def problems(self) -> int:
        return self.tensors[1].shape[0] * self.tensors[1].shape[1]

    @property
    def group(self) -> int:
        return self.tensors[0].shape[1] // self.tensors[1].shape[1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, D, Dv."""
        k, v = self.tensors[1], self.tensors[2]
        return k.shape[2], k.shape[3], v.shape[3]

    @property
    def blocks(self) -> tuple[int, int]:
        return _padded(self.sizes[1]), _padded(self.sizes[2])

    @property
    def chunks(self) -> int:
        return -(-self.sizes[0] // CHUNK)

    @property
    def segment_chunks(self) -> int:
        """Chunks per segment: enough segments for about two waves of programs, none shorter than 8 chunks."""
        wanted = max(1, 2 * processors(self.tensors[0].device) // self.problems)
        return max(min(MIN_SEGMENT_CHUNKS, self.chunks), -(-self.chunks // wanted))

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.segment_chunks)

    @property
    def precision(self) -> str:
        return "ieee" if self.tensors[0].dtype == torch.bfloat16 else "tf32x3"

    def options(self) -> dict[str, Any]:
        g = self.tensors[3]
        return {
            "GROUP": self.group,
            "DECAY": g is not None,
            "PER_KEY": g is not None and g.shape[-1] > 1,
            "NORMALIZE": self.normalize,
            "BT": CHUNK,
            "LEVELS": CHUNK.bit_length() - 1,
            "BK": self.blocks[0],
            "BV": self.blocks[1],
            "PRECISION": self.precision,
        }

    def tuning(self, kernel: str) -> dict[str, int]:
        """Warps and pipelining depth, by kernel and size."""
        large = self.blocks[0] * self.blocks[1] > 64 * 64
        deep = self.group == 1 and self.precision == "ieee"
        if kernel == "keys":
            return {"num_warps": 4}
        return {"num_warps": 8 if large and kernel == "states" else 4, "STAGES": 2 if deep else 1}

    def decays(self) -> Decays:
        """Half-chunk decays, the wide flags, and which kernel variants to launch."""
        g, k, (length, width, _) = self.tensors[3], self.tensors[1], self.sizes
        wide = torch.zeros(self.problems, dtype=torch.int32, device=k.device)
        if g is None:
            return None, None, wide, (False,)
        shape = (self.problems, self.chunks, self.blocks[0])
        halves = torch.empty((2, *shape), dtype=torch.float32, device=g.device)
        chunk_decays[(self.chunks, self.problems)](
            g, halves[0], halves[1], wide, *_strides(g), length, width, k.shape[1], self.chunks, LIMIT,
            PER_KEY=g.shape[-1] > 1, BT=CHUNK, BK=self.blocks[0], num_warps=1,
        )  # fmt: skip
        return halves[0], halves[1], wide, (False, True)

    def state(self, *leading: int) -> Tensor:
        columns = self.sizes[2] + int(self.normalize)
        shape = (self.problems, *leading, self.sizes[1], columns)
        return torch.empty(shape, dtype=torch.float32, device=self.tensors[0].device)


def _padded(size: int) -> int:
    """Block width: see ``triton.py`` for why none is narrower than 64."""
    return max(16 if INTERPRETED.value else 64, 1 << (size - 1).bit_length())


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _prepare(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, normalize: bool) -> Plan:
    narrow = all(x.dtype == torch.bfloat16 for x in (q, k, v)) and not INTERPRETED.value
    dtype = torch.bfloat16 if narrow else torch.float32
    q, k, v = (_unit_columns(x.to(dtype)) for x in (q, k, v))
    return Plan((q, k, v, None if log_decay is None else _unit_columns(log_decay)), scale, normalize)


def _run_states(
    plan: Plan,
    decays: Decays,
    initial: Tensor | None,
    grad: Tensor | None,
    weight: Tensor | None,
    store: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Segment starts, the last state, and every chunk's carried state and sums (``store``).

    With ``grad`` the same backwards in time: q and the outputs' gradient instead of k and v.
    """
    q, k, v, g = plan.tensors
    reverse = grad is not None
    x, y = (q, grad) if grad is not None else (k, v)
    first, second, wide, variants = decays
    if reverse:
        first, second = second, first
    (length, width, columns), (block_k, block_v) = plan.sizes, plan.blocks
    end = plan.state(plan.segments)
    options = plan.options() | plan.tuning("states") | {"REVERSE": reverse, "WEIGHTED": weight is not None}
    if not reverse:
        options["GROUP"] = 1
    chunk_states = chunk_sums = None
    if store:
        slots = (plan.problems, plan.chunks)
        chunk_states = torch.empty((*slots, block_v, block_k), dtype=q.dtype, device=q.device)
        if plan.normalize:
            chunk_sums = torch.empty((*slots, block_k), dtype=torch.float32, device=q.device)

    def launch(start: Tensor | None, keep: bool, total: Tensor | None) -> None:
        for variant in variants:
            states[(plan.segments, plan.problems)](
                x, y, g, weight, first, second, wide, start, chunk_states, chunk_sums, end, total,
                *_strides(x), *_strides(y), *_strides(g), length, plan.scale if reverse else 1.0, width, columns,
                k.shape[1], plan.chunks, plan.segments, plan.segment_chunks,
                HAS_START=start is not None, STORE_CHUNKS=keep, WIDE=variant, **options,
            )  # fmt: skip

    start: Tensor | None = initial
    final = end
    if plan.segments > 1 or not store:
        total = torch.empty((plan.problems, plan.segments, block_k), dtype=torch.float32, device=q.device)
        launch(None, False, total)
        start, final = plan.state(plan.segments), plan.state()
        rows = min(16, block_k)
        scan[(triton.cdiv(width, rows), plan.problems)](
            end, total, initial, start, final, width, end.shape[-1], plan.segments,
            REVERSE=reverse, DECAY=g is not None, HAS_INITIAL=initial is not None,
            BK=block_k, ROWS=rows, BE=triton.next_power_of_2(end.shape[-1]), num_warps=4,
        )  # fmt: skip
    if store:
        launch(start, True, None)
    return start, final, chunk_states, chunk_sums


def block_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Head sizes that the kernels run at in these dtypes: float32 tiles take twice the shared memory."""
    if INTERPRETED.value:
        return (16, 32, 64)
    return (64, 128) if q.dtype == k.dtype == v.dtype == torch.bfloat16 else (64,)


def key_pieces(width: int, widths: tuple[int, ...]) -> list[slice]:
    """Keys cut into blocks, the widest first; a rest that is no block's width stays what it is."""
    return [slice(start, min(start + widths[-1], width)) for start in range(0, width, widths[-1])]


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these heads as they are: values one block wide, keys in pieces each a block wide."""
    widths = block_widths(q, k, v)
    pieces = key_pieces(k.shape[3], widths)
    return v.shape[3] in widths and all(piece.stop - piece.start in widths for piece in pieces)


def _plans(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, normalize: bool
) -> list[tuple[slice, Plan]]:
    """One plan for each piece of the keys (views; nothing is copied)."""
    pieces = key_pieces(k.shape[3], block_widths(q, k, v))
    whole = _prepare(q, k, v, log_decay, scale, normalize)
    q, k, v, g = whole.tensors
    plans = []
    for keys in pieces:
        gates = g if g is None or g.shape[-1] == 1 else g[..., keys]
        plans.append((keys, Plan((q[..., keys], k[..., keys], v, gates), scale, normalize)))
    return plans


def _piece_of(initial: Tensor | None, keys: slice) -> Tensor | None:
    return None if initial is None else initial[:, :, keys].float().contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, H, T, Dv]`` in ``dtype`` and the final state; heads as ``fits`` wants them (any for T = 1)."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
    if k.shape[2] == 1:
        plan = _prepare(q, k, v, log_decay, scale, normalize)
        return out, _step(plan, _piece_of(initial_state, slice(None)), out)
    plans = _plans(q, k, v, log_decay, scale, normalize)
    # Shares of the pieces so far: outputs and the normaliser, in float32.
    partial = out.new_empty(out.shape, dtype=torch.float32) if len(plans) > 1 else None
    sums = out.new_empty(out.shape[:3], dtype=torch.float32) if len(plans) > 1 and normalize else None
    ends = []
    for number, (keys, plan) in enumerate(plans):
        finish = number == len(plans) - 1
        target = out if finish or partial is None else partial
        ends.append(_forward_piece(plan, _piece_of(initial_state, keys), target, partial, sums, number > 0, finish))
    return out, ends[0] if len(ends) == 1 else torch.cat(ends, 2)


def state_alone(k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool) -> Tensor:
    """The final state from zero, without outputs; heads as ``fits`` wants them."""
    ends = []
    for _, plan in _plans(k, k, v, log_decay, 1.0, normalize):
        _, final, _, _ = _run_states(plan, plan.decays(), None, None, None, store=False)
        ends.append(final.view(*k.shape[:2], plan.sizes[1], -1))
    return ends[0] if len(ends) == 1 else torch.cat(ends, 2)


def _forward_piece(
    plan: Plan,
    initial: Tensor | None,
    out: Tensor,
    partial: Tensor | None,
    sums: Tensor | None,
    add: bool,
    finish: bool,
) -> Tensor:
    """One piece of the keys: writes ``out``, returns its rows of the final state."""
    q, k, v, g = plan.tensors
    decays = plan.decays()
    first, second, wide, variants = decays
    start: Tensor | None = initial
    final: Tensor | None = None
    if plan.segments > 1:
        start, final, _, _ = _run_states(plan, decays, initial, None, None, store=False)
    last = plan.state()
    length, width, columns = plan.sizes
    options = plan.options() | plan.tuning("output") | {"ADD": add, "FINISH": finish}
    for variant in variants:
        grid = (triton.cdiv(columns, options["BV"]), plan.segments, plan.problems)
        output[grid](
            q, k, v, g, first, second, wide, start, out, last, partial, sums,
            *_strides(q), *_strides(k), *_strides(v), *_strides(g), *_strides(out),
            length, plan.scale, width, columns, k.shape[1], plan.chunks, plan.segments, plan.segment_chunks,
            HAS_START=start is not None, WIDE=variant, **options,
        )  # fmt: skip
    return (last if final is None else final).view(*k.shape[:2], width, -1)


def _step(plan: Plan, initial: Tensor | None, out: Tensor) -> Tensor:
    q, k, v, g = plan.tensors
    _, width, columns = plan.sizes
    final = plan.state()
    block = min(plan.blocks[1], 32)
    decode[(triton.cdiv(columns, block), plan.problems)](
        q, k, v, g, initial, out, final, *_strides(q)[:2], *_strides(k)[:2], *_strides(v)[:2], *_strides(g)[:2],
        plan.scale, width, columns, k.shape[1],
        GROUP=plan.group, DECAY=g is not None, PER_KEY=g is not None and g.shape[-1] > 1,
        NORMALIZE=plan.normalize, HAS_INITIAL=initial is not None, BK=plan.blocks[0], BV=block, num_warps=4,
    )  # fmt: skip
    return final.view(*k.shape[:2], width, -1)


def backward(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
    dtype: torch.dtype | None,
) -> Grads:
    """Gradients in ``dtype`` (None: each input's own); ``o`` is read only when normalised."""
    plans = _plans(q, k, v, log_decay, scale, normalize)
    _, _, values, g = _prepare(q, k, v, log_decay, scale, normalize).tensors
    grad = _unit_columns(grad_o.to(values.dtype))
    runs = []
    for keys, plan in plans:
        decays = plan.decays()
        _, _, chunk_states, chunk_sums = _run_states(
            plan, decays, _piece_of(initial_state, keys), None, None, store=True
        )
        runs.append((decays, chunk_states, chunk_sums))
    weight = None
    if normalize:
        assert o is not None
        weight = torch.empty((2, *q.shape[:3]), dtype=torch.float32, device=q.device)
        for number, ((_, plan), (decays, _, chunk_sums)) in enumerate(zip(plans, runs, strict=True)):
            _run_normaliser(plan, decays, _unit_columns(o), grad, chunk_sums, weight, number, len(plans))
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in (q, k, v))
    partial = torch.empty(v.shape, dtype=torch.float32, device=v.device) if len(plans) > 1 else None
    per_key = g is not None and g.shape[-1] > 1
    slices = [plan.blocks[0] // min(plan.blocks[0], SLICE) for _, plan in plans]
    d_g = slice_g = None
    if g is not None:
        d_g = torch.empty(g.shape, dtype=dtype or g.dtype, device=g.device)
        # A decay shared by a head's channels gets its gradient from every slice of channels.
        slice_g = d_g if per_key else d_g.new_empty((sum(slices), *g.shape), dtype=torch.float32)
    d_initials = []
    for number, ((keys, plan), (decays, chunk_states, chunk_sums)) in enumerate(zip(plans, runs, strict=True)):
        q, k, v, g = plan.tensors
        first, second, wide, variants = decays
        length, width, columns = plan.sizes
        slopes = grad_state[:, :, keys].float().contiguous()
        _, d_initial, state_slopes, sum_slopes = _run_states(plan, decays, slopes, grad, weight, store=True)
        d_initials.append(d_initial.view(*k.shape[:2], width, -1))
        options = plan.options() | {"SLICE": min(plan.blocks[0], SLICE)}
        own_g = slice_g
        if slice_g is not None:
            own_g = slice_g[..., keys] if per_key else slice_g[sum(slices[:number]) :]
        own_v = d_v if number == len(plans) - 1 or partial is None else partial
        for variant in variants:
            value_gradients[(plan.chunks, plan.problems)](
                q, k, g, grad, weight, wide, state_slopes, own_v, partial,
                *_strides(q), *_strides(k), *_strides(g), *_strides(grad),
                length, scale, width, columns, k.shape[1], plan.chunks,
                WIDE=variant, ADD=number > 0, **plan.tuning("values"), **options,
            )  # fmt: skip
            key_gradients[(slices[number], plan.chunks, plan.problems)](
                q, k, v, g, grad, weight, wide, chunk_states, chunk_sums, state_slopes, sum_slopes,
                d_q[..., keys], d_k[..., keys], own_g,
                *_strides(q), *_strides(k), *_strides(v), *_strides(g), *_strides(grad),
                first, second, length, scale, width, d_k.shape[-1], columns, k.shape[1], plan.chunks,
                WIDE=variant, **plan.tuning("keys"), **options,
            )  # fmt: skip
    if d_g is not None and slice_g is not None and slice_g is not d_g:
        d_g.copy_(slice_g.sum(0))
    d_start = None if initial_state is None else torch.cat(d_initials, 2).to(initial_state.dtype)
    return d_q, d_k, d_v, d_g, d_start


def _run_normaliser(
    plan: Plan,
    decays: Decays,
    o: Tensor,
    grad: Tensor,
    chunk_sums: Tensor | None,
    weight: Tensor,
    number: int,
    pieces: int,
) -> None:
    """Adds piece ``number``'s normaliser to ``weight``; the last turns the sum into the gradient's two rows."""
    q, k, _, g = plan.tensors
    _, _, wide, variants = decays
    length, width, columns = plan.sizes
    options = {key: value for key, value in plan.options().items() if key != "NORMALIZE"}
    for variant in variants:
        normaliser[(plan.chunks, plan.problems)](
            q, k, g, o, grad, chunk_sums, wide, weight,
            *_strides(q), *_strides(k), *_strides(g), *_strides(o), *_strides(grad),
            length, plan.scale, width, columns, k.shape[1], plan.chunks,
            WIDE=variant, ADD=number > 0, FINISH=number == pieces - 1, num_warps=4, **options,
        )  # fmt: skip
