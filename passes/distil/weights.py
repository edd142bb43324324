"""Hedgehog's loss: the cross-entropy between softmax attention weights and linear ones, row by row (arXiv 2402.04347).

A site's weights for the keys of one block are its output for values that are one at one key each and zero elsewhere:
the canonical softmax op gives the teacher's that way and a method's own forward pass the student's, gates, masks,
grouped heads and numerics included. Only one block's columns are held at a time, in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import LincompileError
from ..linearization.methods import LinearMethod, like
from .spread import current

SMALLEST = 1e-8  # added to the student's weights: rounding may leave zero, whose logarithm says nothing


def check_weights(branch: LinearMethod, path: str) -> None:
    """Raises ``LincompileError`` where a site has no attention weights to compare."""
    if not branch.normalised:
        raise LincompileError(
            f"--transfer-loss: {branch.method} at '{path}' sums where softmax averages, so it has no weights that add "
            "up to one; hedgehog and lawcat have them, and --transfer-loss mse serves every method"
        )
    if current() is not None:
        raise LincompileError("--transfer-loss: attention weights can't be compared over several ranks; use mse")


def columns_of(v: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """(First key, values ``[B, Hkv, T, width]`` that are one at one of the keys from it on), for all keys of ``v``."""
    length = v.shape[2]
    for start in range(0, length, width):
        keys = torch.arange(start, start + width, device=v.device)
        ones = (torch.arange(length, device=v.device)[:, None] == keys).to(v.dtype)
        yield start, ones.expand(*v.shape[:2], length, width).contiguous()


def teacher_weights(
    softmax: tuple[Any, ...], site_q: Tensor, site_k: Tensor, columns: Tensor, mask: Tensor | None
) -> Tensor:
    """Softmax weights ``[B, H, T, width]`` of the columns' keys."""
    found: Tensor = torch.ops.lincompile.softmax_attention(
        like(site_q, columns), like(site_k, columns), columns, mask, *softmax
    )
    return found


def mean_weights(
    attend: Callable[[Tensor, Tensor], Tensor], v: Tensor, width: int, rows: Tensor, keys: Tensor
) -> Tensor:
    """Mean weights ``[H]`` of rows on one key each, float32 on the CPU; a block of keys is looked at at a time.

    Args:
        attend: gives the weights ``[1, H, n, width]`` of n rows for values of ``columns_of``, called with both.
        v: the site's ``[1, Hkv, T, D]``, for the shape and dtype of those values.
        width: keys of a block.
        rows, keys: ``[n]``, of one length.
    """
    rows, keys = rows.to(v.device), keys.to(v.device)
    total = torch.zeros(())
    for start, columns in columns_of(v, width):
        here = (keys >= start) & (keys < start + width)
        if bool(here.any()):
            weights = attend(columns, rows[here])
            places = torch.arange(weights.shape[2], device=v.device)
            total = total + weights[0, :, places, keys[here] - start].float().sum(1).cpu()
    return total / len(rows)


def weights_loss(
    branch: LinearMethod, softmax: tuple[Any, ...], site_q: Tensor, site_k: Tensor, *operands: Tensor | None
) -> Tensor:
    """Mean over rows and heads of −Σⱼ pᵢⱼ log aᵢⱼ, in nats (float32 or float64), differentiable in the student's a.

    Args:
        softmax: kind, window, scale and softcap of the softmax site.
        site_q, site_k: that site's own ``[B, H, T, D]`` and ``[B, Hkv, T, D]``.
        operands: those of the student's module. Beside a softmax window only the linear attention's weights count.
    """
    q, k, v, x, *rest = operands
    assert q is not None and k is not None and v is not None and x is not None
    shape, length = branch.shape, v.shape[2]
    mask = (*rest, None)[2 if branch.mix is not None else 0]
    total = torch.zeros((), device=v.device)
    for _, columns in columns_of(v, shape.value_dim):
        with torch.no_grad():
            wanted = teacher_weights(softmax, site_q, site_k, columns, mask)

        def block(wanted: Tensor, columns: Tensor) -> Tensor:
            got = branch.attend(q, k, columns, x, mask)
            wide = torch.promote_types(got.dtype, torch.float32)
            return -(wanted.to(wide) * (got.to(wide) + SMALLEST).log()).sum()

        total = total + recompute(block, wanted, columns, use_reentrant=False, preserve_rng_state=False)
    return total / (v.shape[0] * shape.heads * length)
