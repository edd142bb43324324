"""FlashAttention (arXiv 2307.08691), as torch ships it, where ``scaled_dot_product_attention`` doesn't reach it.

Gradients of sites that see all keys or all before them: the reference forms all weights of a block of rows in float32,
which takes most of a training step's time where many sites stay softmax. And a prompt's later chunks, whose queries are
the last of the keys' tokens: the reference makes masks of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import unmasked

aten = torch.ops.aten
WIDEST = 256  # channels of a head
REFUSED = range(193, 225)  # channels that torch raises an error for on all but a few chips


def supports(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, kind: str, softcap: float) -> bool:
    """Whether FlashAttention takes a call: 16-bit inputs on a GPU that has it, no padding, window or soft cap, heads of
    8, 16 … 192 or 232 … 256 channels, as many in v as in q.
    """
    return unmasked(q, k, v, key_padding, kind, softcap) and _takes(q, k, v)


def continues(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, kind: str, softcap: float) -> bool:
    """Whether :func:`forward` takes a call: as in :func:`supports`, of fewer queries than keys."""
    plain = kind == "causal" and key_padding is None and softcap == 0 and q.dtype == k.dtype == v.dtype
    return plain and q.shape[2] < k.shape[2] and _takes(q, k, v)


def _takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or not min(*q.shape, *k.shape):
        return False
    width = q.shape[3]
    if width != v.shape[3] or width % 8 or width > WIDEST or width in REFUSED:
        return False
    known = torch.backends.cuda.is_flash_attention_available()
    return known and torch.cuda.get_device_capability(q.device)[0] >= 8


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """See ``reference.forward``. This op aligns queries with the last keys; ``is_causal`` of torch's SDPA doesn't."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[0]
    return out.contiguous()


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    kind: str,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.backward``. Sums have a fixed order: torch's flag for that is set meanwhile.

    Torch's ops are called as they are: autograd doesn't reach into an op's own code.
    """
    causal, groups = kind == "causal", q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    q, grad_o = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, grad_o.to(q.dtype)))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # with warn_only FlashAttention warns and takes the other way
    try:
        out, sums, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        cum_q, cum_k, most_q, most_k, seed, offset = rest[:6]
        d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_backward(
            grad_o, q, k, v, out, sums, cum_q, cum_k, most_q, most_k, 0.0, causal, seed, offset, scale=scale
        )
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    d_k, d_v = (torch.unflatten(x, 1, (-1, groups)).sum(2, dtype=torch.float32).to(q.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v
