"""``torch.ops.lincompile.linear_attention``: schema, checks, fake, gradient. Shapes: ``docs/architecture.md``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import serving, trusted
from ..registration import Grads, backend, gradient_fake, present, selected, without_autocast
from ..shapes import accumulator_dtype, require, require_qkv, require_rank, require_same_device, require_shape
from . import reference

_LINEAR_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, float scale, bool causal, bool normalize"
)


_LAYOUTS = ("b.t.", "b.t.", "b.t.", "b.t.", "b...")  # as ``first_use`` reads them
_PROGRAMS = 512  # more than a GPU has multiprocessors


def _layouts(causal: bool, *more: str) -> list[str]:
    layouts = [*more, *_LAYOUTS]
    return layouts if causal else [layout.replace("t", ".") for layout in layouts]  # every row reads every token


def check_linear(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    causal: bool,
    normalize: bool,
    states: int | None = None,
) -> None:
    """``ValueError`` where shapes or devices don't fit; ``states``: how many states there are, if not one a row."""
    require_qkv(op, q, k, v, same_length=causal)
    require_same_device(op, q, log_decay=log_decay, initial_state=initial_state)
    batch, kv_heads, length, head_dim = k.shape
    if log_decay is not None:
        require(causal, op, "log_decay needs causal=True: a bidirectional site has no decay")
        require_rank(op, "log_decay", log_decay, "[B, Hkv, T, D or 1]")
        width = log_decay.shape[3]
        require(width == 1 or width == head_dim, op, f"log_decay must end in 1 or D = {head_dim}, got {width}")
        require_shape(op, "log_decay", log_decay, "[B, Hkv, T, D or 1]", (batch, kv_heads, length, width))
    if initial_state is not None:
        columns = v.shape[3] + int(normalize)
        count = "B" if states is None else "sequences"
        layout = f"[{count}, Hkv, D, Dv + 1]" if normalize else f"[{count}, Hkv, D, Dv]"
        leading = batch if states is None else states
        require_shape(op, "initial_state", initial_state, layout, (leading, kv_heads, head_dim, columns))


@custom_op(
    "lincompile::linear_attention", mutates_args=(), schema=f"({_LINEAR_ARGS}) -> (Tensor o, Tensor final_state)"
)
@without_autocast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Linear attention with optional decay; returns ``o [B, H, T, Dv]`` (v's dtype), final state (float32/64)."""
    check_linear("linear_attention", q, k, v, log_decay, initial_state, causal, normalize)
    args = (q, k, v, log_decay, initial_state, scale, causal, normalize)
    kernels, asked = backend("linear_attention", q), args[:5]
    later = (
        functools.partial(_launch_backward, args) if any(x is not None and x.requires_grad for x in args[:5]) else None
    )
    run = serving(
        "linear_attention", kernels, reference, "chunkwise", _layouts(causal), args, asked, later, _tiled_forms
    )
    o, state = run.chunkwise(*args)
    return o, state


def forward_forms(args: Sequence[Any]) -> list[Sequence[Any]]:
    """What a first use compares: the call as it is, and with decays so strong that the kernels take their other way
    (``triton_blocks.py``), in chunks halved once and in one halved to the end, while other channels (or chunks, where a
    head's channels decay alike) decay as they did and carry their state across chunks.

    Rounding must not decide: a normalised call gets the signs of features, since a normaliser near zero would blow it
    up, and strong decays stop where an output becomes its own token's value and q's gradient nothing.
    """
    q, k, v, log_decay, state, scale, causal, normalize = args
    if normalize:
        q, k = q.abs(), k.abs()
        state = None if state is None else torch.cat((state[..., :-1], state[..., -1:].abs()), -1)
    forms = [log_decay]
    if log_decay is not None:
        steep = log_decay.clone()
        channels = steep[..., ::2] if log_decay.shape[-1] > 1 else steep[:, :, 64:192]
        channels.fill_(-1.1)
        channels[:, :, 70::101] = -40.0
        forms.append(steep)
    return [(q, k, v, form, state, scale, causal, normalize) for form in forms]


def _tiled_forms(args: Sequence[Any]) -> list[Sequence[Any]]:
    """``forward_forms``; those of one token as one row and as many: the step's tile depends on how many there are."""
    forms, (_, k, v, *_, causal, _) = forward_forms(args), args
    if not causal or k.shape[2] > 1 or not k.shape[0]:
        return forms
    many = -(-_PROGRAMS // (k.shape[1] * -(-v.shape[3] // 32)))
    return [
        [x[:1].expand(rows, -1, -1, -1) if isinstance(x, Tensor) else x for x in form]
        for form in forms
        for rows in (1, many)
    ]


def _backward_forms(args: Sequence[Any]) -> list[Sequence[Any]]:
    grad_o, grad_state, o, *inputs = args
    return [
        (grad_o, grad_state, None if o is None else reference.chunkwise(*form)[0], *form)
        for form in forward_forms(inputs)
    ]


def _launch_backward(args: tuple[Any, ...], kernels: Any) -> None:
    """The backward pass of a call, of outputs that hold nothing: for its kernels to be compiled with the forward's."""
    q, k, v, *_, normalize = args
    o = v.new_empty(*q.shape[:3], v.shape[3])
    state = v.new_empty(*k.shape[:2], k.shape[3], v.shape[3] + int(normalize), dtype=torch.float32)
    kernels.chunkwise_backward(o, state, o if normalize else None, *args)


@linear_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    check_linear("linear_attention", q, k, v, log_decay, initial_state, causal, normalize)
    o = v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    dtype = accumulator_dtype(q, k, v, log_decay, initial_state)
    return o, v.new_empty(k.shape[0], k.shape[1], k.shape[3], v.shape[3] + int(normalize), dtype=dtype)


@custom_op(
    "lincompile::linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor grad_state, Tensor? o, {_LINEAR_ARGS}, bool values=True)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_attention_backward(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
    values: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of ``linear_attention`` for its five tensors, empty where absent, and v's unless ``values``; ``o`` when
    it was normalised.
    """
    inputs = (q, k, v, log_decay, initial_state, scale, causal, normalize)
    args = (grad_o, grad_state, o, *inputs)
    kernels = backend("linear_attention", q)

    def plain(grad_o: Tensor, grad_state: Tensor, o: Tensor | None, *inputs: Any) -> Grads:
        return reference.chunkwise_backward(grad_o, grad_state, *inputs)

    if (
        kernels is not None
        and kernels.supports(q, k, v, log_decay, initial_state)
        and trusted(
            "linear_attention_backward",
            kernels.chunkwise_backward,
            plain,
            _layouts(causal, "b.t.", "b...", "b.t."),
            args,
            forms=_backward_forms,
        )
    ):
        grads = kernels.chunkwise_backward(*args, values=values)
    else:
        grads = reference.chunkwise_backward(grad_o, grad_state, *inputs)
    return present(grads if values else (*grads[:2], None, *grads[3:]), q)


@linear_attention_backward.register_fake
def _(
    grad_o: Tensor,
    grad_state: Tensor,
    o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
    values: bool = True,
) -> tuple[Tensor, ...]:
    return gradient_fake(q, k, v if values else None, log_decay, initial_state)


def register_gradient(
    op: Any, backward: Callable[..., tuple[Tensor, ...]], tensors: int, without_values: bool = False
) -> None:
    """Keeps an op's first ``tensors`` inputs, and its output where it was normalised, for its backward op.

    ``without_values``: the backward op can leave out v's gradient, which attention transfer has no use for.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        normalize = inputs[7]
        ctx.save_for_backward(*inputs[:tensors], output[0] if normalize else None)
        ctx.options = inputs[tensors:]

    def gradient(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> Grads:
        *inputs, o = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[2],) if without_values else ()
        return selected(backward(grad_o, grad_state, o, *inputs, *ctx.options, *wanted), ctx.needs_input_grad)

    op.register_autograd(gradient, setup_context=keep)


register_gradient(linear_attention, linear_attention_backward, 5, without_values=True)
