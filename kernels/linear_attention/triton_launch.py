"""Launches the linear-attention kernels in order, with their scratch tensors. Tiles and segments: ``triton_plan.py``.

``lengths``: sequences of these lengths lie side by side in one row of q, k and v (B = 1), and states are
``[sequences, Hkv, D, E]``; None: every row is one sequence.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..compile_ahead import launcher
from ..triton_device import chained, processors
from .triton_backward import key_gradients, normaliser, value_gradients
from .triton_forward import chunk_decays, chunk_depths, decode, output, scan, states
from .triton_plan import CHUNK, LEVELS, Plan, in_pieces, prepare, strides, unit_columns

# Largest |log decay| of half a chunk that the anchored factors are used for. Between the middles of two chunks lie two
# halves, and exp(-2 · LIMIT), times a state and features that may be small themselves, must stay far above the smallest
# float32 and bfloat16 (exp(-87)): what is lost there is lost for good, however large the next factor is. Half a chunk
# of log-decays at the gates' floor, -1, comes to LIMIT and no rounded sum of them goes beyond it.
LIMIT = 32.0

Lengths = tuple[int, ...] | None
Decays = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, tuple[bool, ...]]
Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _decays(plan: Plan) -> Decays:
    """Half-chunk decays, the wide flags, how often each chunk is halved, and which kernel variants to launch."""
    g, k, (length, width, _) = plan.tensors[3], plan.tensors[1], plan.sizes
    wide = torch.zeros(plan.problems, dtype=torch.int32, device=k.device)
    if g is None:
        return None, None, wide, None, (False,)
    shape = (plan.problems, plan.chunks, plan.blocks[0])
    halves = torch.empty((2, *shape), dtype=torch.float32, device=g.device)
    depths = torch.empty(shape[:2], dtype=torch.int32, device=g.device)
    if plan.chunks:
        where = (plan.tables[0], *strides(g), length, width, k.shape[1], plan.chunks, LIMIT)
        form = {"PER_KEY": g.shape[-1] > 1, "VARLEN": plan.lengths is not None, "BT": CHUNK, "BK": plan.blocks[0]}
        grid = (plan.chunks, plan.problems)
        launcher(chunk_decays, grid)(g, halves[0], halves[1], wide, *where, **form, num_warps=1)
        launcher(chunk_depths, grid)(g, wide, depths, *where, LEVELS=LEVELS, **form, num_warps=4)
    return halves[0], halves[1], wide, depths, (False, True)


def _run_states(
    plan: Plan,
    decays: Decays,
    initial: Tensor | None,
    grad: Tensor | None,
    weight: Tensor | None,
    store: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Segment starts, the last states, and every chunk's carried state and sums (``store``).

    With ``grad`` the same backwards in time: q and the outputs' gradient instead of k and v.
    """
    q, k, v, g = plan.tensors
    reverse = grad is not None
    x, y = (q, grad) if grad is not None else (k, v)
    first, second, wide, _, variants = decays
    if reverse:
        first, second = second, first
    (length, width, columns), (block_k, block_v) = plan.sizes, plan.blocks
    end = plan.state(plan.segments)
    options = plan.options() | {"REVERSE": reverse, "WEIGHTED": weight is not None}
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
            tuning = plan.tuning("states", variant)
            launcher(states, (plan.segments, plan.problems, block_k // tuning["SLICE"]))(
                x, y, g, weight, first, second, wide, start, chunk_states, chunk_sums, end, total, *plan.tables,
                *strides(x), *strides(y), *strides(g), length, plan.scale if reverse else 1.0, width, columns,
                k.shape[1], plan.chunks, plan.segments, plan.segment_chunks,
                HAS_START=start is not None, STORE_CHUNKS=keep, WIDE=variant, **tuning, **options,
            )  # fmt: skip

    start: Tensor | None = initial
    final = end
    if plan.chained or not store:
        total = torch.empty((plan.problems, plan.segments, block_k), dtype=torch.float32, device=q.device)
        launch(None, False, total)
        start, final = plan.state(plan.segments), plan.state(plan.sequences)
        rows = min(16, block_k)
        launcher(scan, (triton.cdiv(width, rows), plan.problems, plan.sequences))(
            end, total, initial, start, final, plan.tables[1], width, end.shape[-1], plan.segments,
            REVERSE=reverse, DECAY=g is not None, HAS_INITIAL=initial is not None, VARLEN=plan.lengths is not None,
            BK=block_k, ROWS=rows, BE=triton.next_power_of_2(end.shape[-1]), num_warps=4,
        )  # fmt: skip
    if store:
        launch(start, True, None)
    return start, final, chunk_states, chunk_sums


def _start_of(plan: Plan, initial: Tensor | None, keys: slice) -> Tensor | None:
    """Rows of an initial state (or of a last state's gradient), problems first."""
    if initial is None:
        return None
    state = initial[:, :, keys].float()
    return (state if plan.lengths is None else state.transpose(0, 1)).contiguous()


def _state_of(plan: Plan, state: Tensor) -> Tensor:
    """A last state as the op returns it."""
    k = plan.tensors[1]
    if plan.lengths is None:
        return state.view(*k.shape[:2], *state.shape[-2:])
    return state.view(k.shape[1], len(plan.lengths), *state.shape[-2:]).transpose(0, 1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
    dtype: torch.dtype,
    lengths: Lengths = None,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, H, T, Dv]`` in ``dtype`` and the final state; heads as ``fits`` wants them (any for T = 1)."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
    whole = prepare(q, k, v, log_decay, scale, normalize, lengths)
    if k.shape[2] == 1 and lengths is None:
        return out, _step(whole, _start_of(whole, initial_state, slice(None)), out)
    plans = in_pieces(whole)
    # Shares of the pieces so far: outputs and the normaliser, in float32.
    partial = out.new_empty(out.shape, dtype=torch.float32) if len(plans) > 1 else None
    sums = out.new_empty(out.shape[:3], dtype=torch.float32) if len(plans) > 1 and normalize else None
    ends = []
    for number, (keys, plan) in enumerate(plans):
        finish = number == len(plans) - 1
        target = out if finish or partial is None else partial
        start = _start_of(plan, initial_state, keys)
        ends.append(_forward_piece(plan, start, target, partial, sums, number > 0, finish))
    return out, ends[0].contiguous() if len(ends) == 1 else torch.cat(ends, 2)


def state_alone(k: Tensor, v: Tensor, log_decay: Tensor | None, normalize: bool) -> Tensor:
    """The final state from zero, without outputs; heads as ``fits`` wants them."""
    ends = []
    for _, plan in in_pieces(prepare(k, k, v, log_decay, 1.0, normalize)):
        _, final, _, _ = _run_states(plan, _decays(plan), None, None, None, store=False)
        ends.append(_state_of(plan, final))
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
    decays = _decays(plan)
    first, second, wide, depths, variants = decays
    start: Tensor | None = initial
    final: Tensor | None = None
    if plan.chained:
        start, final, _, _ = _run_states(plan, decays, initial, None, None, store=False)
    last = plan.state(plan.sequences)
    length, width, columns = plan.sizes
    # Segments of a chained sequence know only their own end: ``scan`` has made the last states.
    options = plan.options() | {"ADD": add, "FINISH": finish, "ENDS": plan.lengths is not None and not plan.chained}
    for variant in variants:
        tuned = options | plan.tuning("output", variant)
        launcher(output, (triton.cdiv(columns, tuned["BV"]), plan.segments, plan.problems))(
            q, k, v, g, first, second, wide, depths, start, out, last, partial, sums, *plan.tables,
            *strides(q), *strides(k), *strides(v), *strides(g), *strides(out),
            length, plan.scale, width, columns, k.shape[1], plan.chunks, plan.segments, plan.segment_chunks,
            HAS_START=start is not None, WIDE=variant, **tuned,
        )  # fmt: skip
    return _state_of(plan, last if final is None else final)


def _step_tile(plan: Plan) -> dict[str, int]:
    """One token's tile. Where the usual ones leave multiprocessors without work, a step takes as long as its slowest
    program: those are made short, with all query heads of a group in one sum.
    """
    _, _, columns = plan.sizes
    block = min(plan.blocks[1], 32)
    if triton.cdiv(columns, block) * plan.problems >= processors(plan.tensors[0].device):
        return {"BV": block, "MEMBERS": 1, "num_warps": 4}
    return {"BV": 4, "MEMBERS": min(4, triton.next_power_of_2(plan.group)), "num_warps": 4}


def _step(plan: Plan, initial: Tensor | None, out: Tensor) -> Tensor:
    q, k, v, g = plan.tensors
    _, width, columns = plan.sizes
    final = plan.state()
    tile = _step_tile(plan)
    launcher(decode, (triton.cdiv(columns, tile["BV"]), plan.problems))(
        q, k, v, g, initial, out, final, *strides(q)[:2], *strides(k)[:2], *strides(v)[:2], *strides(g)[:2],
        plan.scale, width, columns, k.shape[1],
        GROUP=plan.group, DECAY=g is not None, PER_KEY=g is not None and g.shape[-1] > 1,
        NORMALIZE=plan.normalize, HAS_INITIAL=initial is not None, BK=plan.blocks[0], **tile, **chained(q.device),
    )  # fmt: skip
    return _state_of(plan, final)


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
    lengths: Lengths = None,
    values: bool = True,
) -> Grads:
    """Gradients in ``dtype`` (None: each input's own); ``o`` is read only when normalised, and v's gradient written
    only where ``values`` is set.
    """
    whole = prepare(q, k, v, log_decay, scale, normalize, lengths)
    plans = in_pieces(whole)
    g = whole.tensors[3]
    grad = unit_columns(grad_o.to(whole.tensors[2].dtype))
    runs = []
    for keys, plan in plans:
        decays = _decays(plan)
        start = _start_of(plan, initial_state, keys)
        _, _, chunk_states, chunk_sums = _run_states(plan, decays, start, None, None, store=True)
        runs.append((decays, chunk_states, chunk_sums))
    weight = None
    if normalize:
        assert o is not None
        weight = torch.empty((2, *q.shape[:3]), dtype=torch.float32, device=q.device)
        for number, ((_, plan), (decays, _, chunk_sums)) in enumerate(zip(plans, runs, strict=True)):
            _run_normaliser(plan, decays, unit_columns(o), grad, chunk_sums, weight, number, len(plans))
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in (q, k, v))
    partial = torch.empty(v.shape, dtype=torch.float32, device=v.device) if len(plans) > 1 else None
    per_key = g is not None and g.shape[-1] > 1
    slices = [plan.blocks[0] // plan.slice for _, plan in plans]
    d_g = slice_g = None
    if g is not None:
        d_g = torch.empty(g.shape, dtype=dtype or g.dtype, device=g.device)
        # A decay shared by a head's channels gets its gradient from every slice of channels.
        slice_g = d_g if per_key else d_g.new_empty((sum(slices), *g.shape), dtype=torch.float32)
    d_initials = []
    for number, ((keys, plan), (decays, chunk_states, chunk_sums)) in enumerate(zip(plans, runs, strict=True)):
        q, k, v, g = plan.tensors
        first, second, wide, depths, variants = decays
        length, width, columns = plan.sizes
        slopes = _start_of(plan, grad_state, keys)
        _, d_initial, state_slopes, sum_slopes = _run_states(plan, decays, slopes, grad, weight, store=True)
        d_initials.append(_state_of(plan, d_initial))
        own_g = slice_g
        if slice_g is not None:
            own_g = slice_g[..., keys] if per_key else slice_g[sum(slices[:number]) :]
        own_v = d_v if number == len(plans) - 1 or partial is None else partial
        for variant in variants if plan.chunks else ():
            if values:
                launcher(value_gradients, (plan.chunks, plan.problems))(
                    q, k, g, grad, weight, wide, depths, state_slopes, own_v, partial, plan.tables[0],
                    *strides(q), *strides(k), *strides(g), *strides(grad),
                    length, scale, width, columns, k.shape[1], plan.chunks,
                    WIDE=variant, ADD=number > 0, **plan.tuning("values", variant), **plan.options(),
                )  # fmt: skip
            launcher(key_gradients, (slices[number], plan.chunks, plan.problems))(
                q, k, v, g, grad, weight, wide, depths, chunk_states, chunk_sums, state_slopes, sum_slopes,
                d_q[..., keys], d_k[..., keys], own_g, plan.tables[0],
                *strides(q), *strides(k), *strides(v), *strides(g), *strides(grad),
                first, second, length, scale, width, d_k.shape[-1], columns, k.shape[1], plan.chunks,
                WIDE=variant, **plan.tuning("keys", variant), **plan.options(),
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
    _, _, wide, depths, variants = decays
    length, width, columns = plan.sizes
    options = {key: value for key, value in plan.options().items() if key != "NORMALIZE"}
    for variant in variants if plan.chunks else ():
        launcher(normaliser, (plan.chunks, plan.problems))(
            q, k, g, o, grad, chunk_sums, wide, depths, weight, plan.tables[0],
            *strides(q), *strides(k), *strides(g), *strides(o), *strides(grad),
            length, plan.scale, width, columns, k.shape[1], plan.chunks,
            WIDE=variant, ADD=number > 0, FINISH=number == pieces - 1, **plan.tuning("normaliser", variant), **options,
        )  # fmt: skip
