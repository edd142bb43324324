"""lincompile: compile pretrained softmax-attention models into linear-attention, 6-bit, deployable ones."""

from __future__ import annotations

__version__ = "0.1.0"
