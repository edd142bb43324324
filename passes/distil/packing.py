"""What a step says of its tokens, packed into them: recorded steps and pieces of steps take one tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BITS = 32  # a token's own; above them stands how many copies of it there are beside itself


def packed(tokens: Tensor, asked: Tensor | None = None, repeats: Tensor | None = None) -> Tensor:
    """Tokens ``[B, T]``, below zero where ``asked`` for (bool), with as how many each counts (int64, 1 or more)."""
    if repeats is not None:
        tokens = tokens.long() | (repeats - 1 << BITS)
    return tokens if asked is None else torch.where(asked, -1 - tokens, tokens)


def unpacked(
    tokens: Tensor, emphasis: float = 1.0, stretched: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tokens again, the weights of the logits at each, which predict the next one, and as how many each counts.

    Args:
        emphasis: weight of what is asked for; 1 where nothing is marked, and the weights, float32 ``[B, T]``, are None.
        stretched: whether tokens count as several; where not, the repeats, int64 ``[B, T]``, are None.
    """
    weights = repeats = None
    if emphasis != 1:
        asked = tokens < 0
        weights = 1 + (emphasis - 1) * functional.pad(asked[:, 1:], (0, 1)).float()
        tokens = torch.where(asked, -1 - tokens, tokens)
    if stretched:
        repeats = (tokens >> BITS) + 1
        tokens = tokens & ((1 << BITS) - 1)
    return tokens, weights, repeats
