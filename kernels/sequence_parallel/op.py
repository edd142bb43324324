"""Registers the ops of sequence parallelism (linear sites: ``states``, ``own``, ``scan``; by token: ``tokens``)."""

from __future__ import annotations

from .group import equal_slices, functional, process_group, rank_in, rank_index
from .own import slice_own
from .scan import scan_state
from .states import ALL, DECAY, MATRIX, prefix_state, segment_summary, slot_gradient, state_slots
from .tokens import exchange_halves, halo, last_tokens, slice_attention

__all__ = [
    "ALL",
    "DECAY",
    "MATRIX",
    "equal_slices",
    "exchange_halves",
    "functional",
    "halo",
    "last_tokens",
    "prefix_state",
    "process_group",
    "rank_in",
    "rank_index",
    "scan_state",
    "segment_summary",
    "slice_attention",
    "slice_own",
    "slot_gradient",
    "state_slots",
]
