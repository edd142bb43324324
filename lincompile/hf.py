"""``lincompile.hf.from_pretrained(DIR)``: an artefact as a transformers model."""

from __future__ import annotations

from .lowering.hf import LincompileConfig, LincompileForCausalLM, from_pretrained
from .lowering.hf_cache import StateCache
from .lowering.hf_versions import states_of

__all__ = ["LincompileConfig", "LincompileForCausalLM", "StateCache", "from_pretrained", "states_of"]
