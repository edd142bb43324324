"""``lincompile.hf.from_pretrained(DIR)``: an artefact as a transformers model."""

from __future__ import annotations

from .lowering.hf import LincompileConfig, LincompileForCausalLM, from_pretrained
from .lowering.huggingface.cache import StateCache
from .lowering.huggingface.versions import states_of

__all__ = ["LincompileConfig", "LincompileForCausalLM", "StateCache", "from_pretrained", "states_of"]
