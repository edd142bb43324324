"""What differs between the versions of transformers that are supported, found out from transformers itself.

What a loop hands through is called ``cache`` since transformers 5.24, in arguments and outputs alike, and was called
``past_key_values`` before. Newer versions translate the old name for a while, with a warning. What transformers calls,
or what calls transformers, uses ``CACHE``, the installed version's own name; our users may use either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...passes.errors import LincompileError

NAMES = ("cache", "past_key_values")
CACHE = next(name for name in NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})

# Before transformers 5.17, crop(n) says how many tokens to keep; since then, minus how many to drop.
CROP_KEEPS = not hasattr(Cache, "activate_past_recording")


def given_states(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """The states among keyword arguments, under either name, and the name that was used; (``CACHE``, None) without.

    Raises:
        LincompileError: both names are used.
    """
    given = [(name, arguments[name]) for name in NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise LincompileError(f"{NAMES[0]} and {NAMES[1]} are two names of the same argument: give one of them")
    return given[0] if given else (CACHE, None)


def states_of(output: Any) -> Any:
    """The states in an output of ``generate`` or of the model, whatever transformers calls them; None without.

    ``output.cache`` is there since transformers 5.24; ``output.past_key_values`` is there before.
    """
    return getattr(output, CACHE)
