"""Room for caches that grow, so that one recorded step (``recorded.py``) serves some hundred tokens.

Keys and values of full softmax attention get a column with every token. A recording of such a step has caches with room
on their left, as padding on the left of a prompt has: zeros, which the mask of keys hides. Callers never see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..passes.stateful import GROWING_AXIS, StepProgram

LEAST = 256  # tokens by which room grows, at least
LARGEST = 1 << 30  # bytes of caches, of a step to be recorded and of all recordings: each is there thrice
STATES_AT = 3  # where states begin in a step's inputs; in its outputs they come after the logits


def wide(tokens: int) -> int:
    """Cached tokens that there is room for where there are so many: a quarter more at most, but for few.

    With the token that comes they are a multiple of ``LEAST``, which kernels like better.
    """
    unit = max(LEAST, 1 << max(0, tokens.bit_length() - 3))
    return -(-(tokens + 1) // unit) * unit - 1


@dataclass(frozen=True)
class Room:
    """Which of a step's inputs grow with every token: their axes, by place."""

    axes: dict[int, int]

    @staticmethod
    def of(program: StepProgram) -> Room:
        """The caches of full softmax attention, and the mask of their keys."""
        return Room(
            {
                STATES_AT + index: GROWING_AXIS[spec.role]
                for index, spec in enumerate(program.states)
                if None in spec.shape and program.limit(spec) is None
            }
        )

    def __bool__(self) -> bool:
        return bool(self.axes)

    def tokens(self, given: Sequence[Tensor]) -> int | None:
        """Cached tokens before a step for one token.

        None where there is no room to be had: more tokens come at a time, caches are large, or not of one length (what
        the step does with such ones is its own: a mask of more columns than there are keys has its last ones read).
        """
        lengths = {given[place].shape[axis] for place, axis in self.axes.items()}
        if given[0].shape[1] != 1 or len(lengths) != 1:
            return None
        (length,) = lengths
        bytes_ = sum(given[place].nbytes for place in self.axes) // max(1, length) * wide(length)
        return length if bytes_ <= LARGEST else None

    def shapes(self, given: Sequence[Tensor], tokens: int) -> list[torch.Size]:
        """The inputs' shapes with growing axes of so many tokens."""
        shapes = [value.shape for value in given]
        for place, axis in self.axes.items():
            shapes[place] = torch.Size((*shapes[place][:axis], tokens, *shapes[place][axis + 1 :]))
        return shapes

    def parts(
        self, values: Sequence[Tensor], places: Sequence[int], start: int, end: int | None = None
    ) -> list[Tensor]:
        """Of tensors that grow, tokens ``start`` to ``end``; ``places``: of the inputs that they are or become."""
        found = []
        for value, place in zip(values, places, strict=True):
            axis = self.axes[place]
            found.append(value.narrow(axis, start, (value.shape[axis] if end is None else end) - start))
        return found
