"""``torch.ops.lincompile.softmax_attention`` and its step form: the canonical op that every matched site becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..first_use import serving, trusted
from ..registration import Grads, backend, gradient_fake, present, selected, without_autocast
from ..shapes import require, require_qkv, require_rank, require_same_device, require_shape
from . import flash, reference

_OPTIONS = "Tensor? key_padding, str kind, int window, float scale, float softcap"


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, kind: str, window: int, softcap: float
) -> None:
    require_qkv(op, q, k, v, same_length=False)
    require(kind in reference.KINDS, op, f"kind must be one of {', '.join(reference.KINDS)}, got {kind!r}")
    require(kind != "sliding" or window > 0, op, f"kind 'sliding' needs window > 0, got {window}")
    require(softcap >= 0, op, f"softcap must be 0 (none) or positive, got {softcap}")
    if key_padding is not None:
        require(key_padding.dtype == torch.bool, op, f"key_padding must be bool (True = real), got {key_padding.dtype}")
        require_shape(op, "key_padding", key_padding, "[B, S]", (k.shape[0], k.shape[2]))
        require_same_device(op, q, key_padding=key_padding)


def _kernels(*args: Any, function: str) -> ModuleType:
    """The Triton kernels where they serve the call of ``forward`` or ``backward``, else the reference."""
    q, k, v, _, kind, window, *_ = args[-8:]
    layouts = [*["b.t."] * (3 + len(args) - 8), "bt"]  # the gradient first, in ``backward``
    kernels, asked = backend("softmax_attention", q), (q, k, v, kind, window)
    return serving(f"softmax_attention {function}", kernels, reference, function, layouts, args, asked)


def _few(*args: Any, function: str) -> Callable[..., Any] | None:
    """The Triton kernel for few queries where it serves the call of ``forward`` or ``step``."""
    q, k, v, kind, window = *args[:3], *args[-4:-2]
    kernels, past = backend("softmax_attention", q, "triton_few"), args[3].shape[2] if function == "step" else None
    if kernels is None or not kernels.supports(q, k, v, past):
        return None
    if past is None and kernels.slower(q, v) and reference.unmasked(q, k, v, args[3], kind, args[-1]):
        return None
    per = kernels.compared(q, k, v, past, kind, window)  # which decides what code runs: a part of the name
    compared = partial(getattr(kernels, function), per=per), getattr(reference, function)
    layouts, forms = [*["b.t."] * (len(args) - 5), "bt"], None if past is None else _with_padding
    found = trusted(f"softmax_attention {function}, few queries, {per}", *compared, layouts, args, forms=forms)
    return getattr(kernels, function) if found else None


def _with_padding(args: Sequence[Any]) -> list[list[Any]]:
    """A step's arguments whose axes of keys were cut alike: caches as long as the padding has columns for."""
    *tensors, k_cache, v_cache, padding = args[:6]
    past = k_cache.shape[2] if padding is None else min(k_cache.shape[2], padding.shape[1] - tensors[1].shape[2])
    padding = None if padding is None else padding[:, : past + tensors[1].shape[2]]
    return [[*tensors, k_cache[:, :, :past], v_cache[:, :, :past], padding, *args[6:]]]


def _forward(*args: Any) -> Tensor:
    forward = _few(*args, function="forward")
    if forward is None:
        args = _without_padding(*args)
        forward = _flash(*args) or _kernels(*args, function="forward").forward
    out: Tensor = forward(*args)
    return out


def _without_padding(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, kind: str, window: int, scale: float, softcap: float
) -> tuple[Any, ...]:
    """The call without its padding, where every key is real and fused kernels serve it then.

    A prompt's mask says so more often than not, and only its values tell. A GPU is waited for once a call, which takes
    less than the masks of a few hundred queries do; a recording can't wait.
    """
    recorded = q.is_cuda and torch.cuda.is_current_stream_capturing()
    plain = (q, k, v, None, kind, softcap)
    if key_padding is not None and not recorded and (reference.unmasked(*plain) or flash.continues(*plain)):
        key_padding = None if bool(key_padding.all()) else key_padding
    return q, k, v, key_padding, kind, window, scale, softcap


def _flash(*args: Any) -> Callable[..., Tensor] | None:
    """FlashAttention where it serves the call of ``forward`` and torch's SDPA can't be told so."""
    q, k, v, key_padding, kind, _, _, softcap = args
    if not flash.continues(q, k, v, key_padding, kind, softcap):
        return None
    pair = flash.forward, reference.forward
    name, layouts = "softmax_attention forward (FlashAttention)", ["b.t."] * 3
    return flash.forward if trusted(name, *pair, layouts, args, forms=_last_half, together=False) else None


def _last_half(args: Sequence[Any]) -> list[list[Any]]:
    """The call with the last half of its queries, fewer than there are keys also where the beginnings are as long."""
    q, *rest = args
    return [[q[:, :, q.shape[2] // 2 :], *rest]]


@custom_op(
    "lincompile::softmax_attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> Tensor"
)
@without_autocast
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Softmax attention, ``o [B, H, T, Dv]`` in v's dtype; a row that sees no key is 0."""
    _check("softmax_attention", q, k, v, key_padding, kind, window, softcap)
    return _forward(q, k, v, key_padding, kind, window, scale, softcap)


@softmax_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    _check("softmax_attention", q, k, v, key_padding, kind, window, softcap)
    return v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@custom_op(
    "lincompile::softmax_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def softmax_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``softmax_attention`` for q, k, v, contiguous."""
    args = (grad_o, q, k, v, key_padding, kind, window, scale, softcap)
    if flash.supports(q, k, v, key_padding, kind, softcap):
        pair, layouts = (flash.backward, reference.backward), ["b.t."] * 4
        if trusted("softmax_attention backward (FlashAttention)", *pair, layouts, args, together=False):
            return present(flash.backward(*args), q)
    return present(_kernels(*args, function="backward").backward(*args), q)


@softmax_attention_backward.register_fake
def _(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    return gradient_fake(q, k, v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, grad_o: Tensor) -> Grads:
    return selected(softmax_attention_backward(grad_o, *ctx.saved_tensors, *ctx.options), ctx.needs_input_grad)


softmax_attention.register_autograd(_backward, setup_context=_setup)


# --- step: append to the caches, then attend ---------------------------------------------------------------------


def _check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    softcap: float,
) -> None:
    op = "softmax_attention_step"
    require_qkv(op, q, k, v, same_length=True)
    _check(op, q, k, v, None, kind, window, softcap)
    require_rank(op, "k_cache", k_cache, "[B, Hkv, P, D]")
    past = k_cache.shape[2]
    require_shape(op, "k_cache", k_cache, "[B, Hkv, P, D]", (k.shape[0], k.shape[1], past, k.shape[3]))
    require_shape(op, "v_cache", v_cache, "[B, Hkv, P, Dv]", (v.shape[0], v.shape[1], past, v.shape[3]))
    require(k_cache.dtype == k.dtype, op, f"k_cache is {k_cache.dtype}, k is {k.dtype}")
    require(v_cache.dtype == v.dtype, op, f"v_cache is {v_cache.dtype}, v is {v.dtype}")
    require_same_device(op, q, k_cache=k_cache, v_cache=v_cache, key_padding=key_padding)
    if key_padding is not None:
        require(key_padding.dtype == torch.bool, op, f"key_padding must be bool (True = real), got {key_padding.dtype}")
        require_shape(op, "key_padding", key_padding, "[B, >= P + t]", (k.shape[0], key_padding.shape[1]))


def _step_padding(key_padding: Tensor | None, keys: int) -> Tensor | None:
    """The last ``keys`` columns: a caller may have trimmed the caches of a sliding site."""
    if key_padding is None:
        return None
    have = key_padding.shape[1]
    op = "softmax_attention_step"
    require(have >= keys, op, f"key_padding must have at least P + t = {keys} columns, got {have}")
    return key_padding[:, have - keys :]


@custom_op(
    "lincompile::softmax_attention_step",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, {_OPTIONS})"
    " -> (Tensor o, Tensor k_cache, Tensor v_cache)",
)
@without_autocast
def softmax_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append ``k, v [B, Hkv, t, ·]`` to caches of P keys and attend from the t new queries.

    Returns ``o [B, H, t, Dv]`` and the caches ``[B, Hkv, P + t, ·]``. ``key_padding [B, >= P + t]``: its last
    P + t columns belong to the keys.
    """
    _check_step(q, k, v, k_cache, v_cache, key_padding, kind, window, softcap)
    padding = _step_padding(key_padding, k_cache.shape[2] + k.shape[2])
    args = (q, k, v, k_cache, v_cache, padding, kind, window, scale, softcap)
    found: tuple[Tensor, Tensor, Tensor] = (_few(*args, function="step") or partial(reference.step, attend=_forward))(
        *args
    )
    return found


@softmax_attention_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Whether key_padding is long enough is checked on real sizes only: a guard here could forbid valid lengths.
    _check_step(q, k, v, k_cache, v_cache, key_padding, kind, window, softcap)
    keys = k_cache.shape[2] + k.shape[2]
    return (
        v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3]),
        k.new_empty(k.shape[0], k.shape[1], keys, k.shape[3]),
        v.new_empty(v.shape[0], v.shape[1], keys, v.shape[3]),
    )


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, _, _, k_cache, _, key_padding = inputs[:6]
    _, keys, values = output
    ctx.save_for_backward(q, keys, values, key_padding)
    ctx.past = k_cache.shape[2]
    ctx.options = inputs[6:]


def _step_backward(ctx: Any, grad_o: Tensor, grad_keys: Tensor, grad_values: Tensor) -> Grads:
    q, keys, values, key_padding = ctx.saved_tensors
    if key_padding is not None:
        key_padding = key_padding[:, key_padding.shape[1] - keys.shape[2] :]
    d_q, d_keys, d_values = softmax_attention_backward(grad_o, q, keys, values, key_padding, *ctx.options)
    d_keys, d_values = d_keys + grad_keys, d_values + grad_values
    past = ctx.past
    grads = (d_q, d_keys[:, :, past:], d_values[:, :, past:], d_keys[:, :, :past], d_values[:, :, :past])
    return selected(grads, ctx.needs_input_grad)


softmax_attention_step.register_autograd(_step_backward, setup_context=_step_setup)
