"""``lincompile.hf.from_pretrained(DIR)``: an artefact as a transformers model."""

from __future__ import annotations

from .lowering.hf import LincompileConfig, LincompileForCausalLM, StateCache, from_pretrained

__all__ = ["LincompileConfig", "LincompileForCausalLM", "StateCache", "from_pretrained"]
