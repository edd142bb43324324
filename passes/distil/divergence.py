"""The loss of logit distillation: KL(teacher ‖ student), with weights for tokens and a share for the text's own.

A vocabulary's worth of float32 per token is what fills a GPU, so the loss and its gradient are computed together, a few
rows of logits at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .spread import share_of_mean

ROWS = 2048  # tokens whose logits are held in float32 at a time


def _rows(
    student: Tensor, teacher: Tensor, weights: Tensor | None, following: Tensor | None, share: float
) -> tuple[Tensor, Tensor]:
    """The weighted sum of rows' losses, for logits ``[R, V]``, and its gradient for the student's, both float32.

    A row's loss is KL(teacher ‖ student) and, for a ``share``, the cross-entropy of the token that follows.

    Args:
        weights: one for each row, float32 ``[R, 1]`` (None: 1 each).
        following: the tokens, int64 ``[R, 1]``, -1 where there is none (None: the divergence alone).
    """
    log_student = functional.log_softmax(student.float(), -1)
    log_teacher = functional.log_softmax(teacher.float(), -1)
    wanted = log_teacher.exp()
    each = (wanted * (log_teacher - log_student)).sum(-1, keepdim=True)
    if following is not None:
        token = following.clamp(min=0)
        part = torch.where(following < 0, 0.0, share)
        each = (1 - part) * each - part * log_student.gather(1, token)
        wanted = (wanted * (1 - part)).scatter_add(1, token, part)
    slope = log_student.exp() - wanted
    return (each.sum(), slope) if weights is None else ((each * weights).sum(), slope * weights)


@functools.cache
def compiled_rows() -> Any:
    """``_rows`` as two or three kernels."""
    return torch.compile(_rows, dynamic=False)


class _Divergence(torch.autograd.Function):
    """Mean loss of tokens (see ``_rows``); its gradient is computed with it, ``ROWS`` tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor | None,
        following: Tensor | None,
        share: float,
        want_gradient: bool,
        compiled: bool,
    ) -> Tensor:
        weights, following = (None if one is None else one.reshape(-1, 1) for one in (weights, following))
        flat, wanted = student.flatten(0, -2), teacher.flatten(0, -2)
        gradient = torch.empty_like(flat) if want_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        rows_of = compiled_rows() if compiled else _rows
        for start in range(0, flat.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            weight, token = (None if one is None else one[rows] for one in (weights, following))
            part, slope = rows_of(flat[rows], wanted[rows], weight, token, share)
            total += part.double()
            if gradient is not None:
                gradient[rows] = slope / flat.shape[0]
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student))
        return (total / flat.shape[0]).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), *[None] * 6


def divergence(
    student: Tensor,
    teacher: Tensor,
    compiled: bool = False,
    weights: Tensor | None = None,
    following: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """Mean KL(teacher ‖ student) in nats per token, of logits ``[..., V]``; differentiable in the student's.

    Inside ``spread`` this rank's share of the window's mean.

    Args:
        weights: float32 ``[...]``, what the tokens' losses are multiplied by before their mean is taken (None: 1 each).
        following: int64 ``[...]``, the tokens that follow, -1 where there is none. Their cross-entropy is the ``share``
            of a token's loss, and the divergence the rest.
    """
    mean: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student, teacher, weights, following, share, student.requires_grad, compiled
    )
    return share_of_mean(mean)
