"""Registers the ops of sequence parallelism: for linear sites ``states.py``, ``scan.py``; for tokens ``tokens.py``."""

from __future__ import annotations

from .group import equal_slices, functional, process_group, rank_in, rank_index
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
    "slot_gradient",
    "state_slots",
]
