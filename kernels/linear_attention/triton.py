"""Linear attention on a GPU: the same functions as ``reference.py``, by fused Triton kernels.

One configuration per head size, chosen by rule, no autotuning. bfloat16 inputs run on bfloat16 tensor cores with
float32 accumulation and state; other float inputs run in float32. Which of the two ways to spread decays is used
(see ``triton_blocks.py``) is decided on the device, per problem, without a synchronisation.

Heads wider than one block are cut: outputs are sums over blocks of keys, and columns over blocks of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_launch import Grads, backward, forward

NORMALIZER_EPS = 1e-10


def supports(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, causal: bool) -> bool:
    """Whether these kernels can serve a call: causal, no float64, at least one token."""
    wide = any(x is not None and x.dtype == torch.float64 for x in (q, k, v, log_decay))
    return causal and not wide and k.shape[2] > 0 and min(k.shape[3], v.shape[3]) > 0


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Forward; see ``reference.chunkwise`` for shapes."""
    assert supports(q, k, v, log_decay, causal)
    if max(k.shape[3], v.shape[3]) <= _limit(q, k, v):
        return forward(q, k, v, log_decay, initial_state, scale, normalize, v.dtype)
    out, state = _wide_forward(q, k, _augment(v, normalize), log_decay, initial_state, scale)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + NORMALIZER_EPS)
    return out.to(v.dtype), state


def chunkwise_backward(
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
) -> Grads:
    """Gradients for q, k, v, log_decay, initial_state; states are recomputed from the inputs."""
    assert supports(q, k, v, log_decay, causal)
    if max(k.shape[3], v.shape[3]) <= _limit(q, k, v):
        return backward(grad_o, grad_state, o, q, k, v, log_decay, initial_state, scale, normalize, None)
    values = _augment(v, normalize)
    grad = grad_o
    if normalize:
        out, _ = _wide_forward(q, k, values, log_decay, initial_state, scale)
        inverse = 1.0 / (out[..., -1:] + NORMALIZER_EPS)
        numerator = grad_o.float() * inverse
        grad = torch.cat((numerator, -(numerator * out[..., :-1]).sum(-1, keepdim=True) * inverse), -1)
    grads = _wide_backward(grad, grad_state, q, k, values, log_decay, initial_state, scale)
    d_q, d_k, d_v, d_g, d_initial = grads
    return (
        d_q.to(q.dtype),
        d_k.to(k.dtype),
        d_v[..., : v.shape[3]].to(v.dtype),
        None if d_g is None or log_decay is None else d_g.to(log_decay.dtype),
        None if d_initial is None or initial_state is None else d_initial.to(initial_state.dtype),
    )


def _limit(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Widest block: float32 tiles take twice the shared memory."""
    return 128 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else 64


def _augment(v: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.pad(v, (0, 1), value=1.0) if normalize else v


def _pieces(k: Tensor, v: Tensor, limit: int) -> list[tuple[slice, slice]]:
    keys = [slice(i, min(i + limit, k.shape[3])) for i in range(0, k.shape[3], limit)]
    values = [slice(i, min(i + limit, v.shape[3])) for i in range(0, v.shape[3], limit)]
    return [(a, b) for a in keys for b in values]


def _part(log_decay: Tensor | None, keys: slice) -> Tensor | None:
    return log_decay if log_decay is None or log_decay.shape[-1] == 1 else log_decay[..., keys]


def _wide_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
    state = torch.empty((*k.shape[:2], k.shape[3], v.shape[3]), dtype=torch.float32, device=q.device)
    for keys, values in _pieces(k, v, _limit(q, k, v)):
        start = None if initial is None else initial[:, :, keys, values]
        part, end = forward(
            q[..., keys], k[..., keys], v[..., values], _part(g, keys), start, scale, False, torch.float32
        )
        out[..., values] += part
        state[:, :, keys, values] = end
    return out, state


def _wide_backward(
    grad: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    scale: float,
) -> Grads:
    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    d_q, d_k, d_v = zeros(q), zeros(k), zeros(v)
    d_g, d_initial = None if g is None else zeros(g), None if initial is None else zeros(initial)
    for keys, values in _pieces(k, v, _limit(q, k, v)):
        start = None if initial is None else initial[:, :, keys, values]
        pieces = q[..., keys], k[..., keys], v[..., values], _part(g, keys), start
        part = grad[..., values]
        end = grad_state[:, :, keys, values]
        e_q, e_k, e_v, e_g, e_initial = backward(part, end, None, *pieces, scale, False, torch.float32)
        d_q[..., keys] += e_q
        d_k[..., keys] += e_k
        d_v[..., values] += e_v
        if d_g is not None and e_g is not None:
            target = _part(d_g, keys)
            assert target is not None
            target += e_g
        if d_initial is not None and e_initial is not None:
            d_initial[:, :, keys, values] = e_initial
    return d_q, d_k, d_v, d_g, d_initial
