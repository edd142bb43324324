"""Modules without a configuration: how to call them, what they are, how far their positions reach."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import named_inputs
from ..errors import ModelLoadError
from .loaded import BATCH, SEQUENCE, LoadedModel, LoadOptions, check_finite, hash_state, one_line
from .wrap import Tokens, TokensAndTargets, Wrapper

Example = Mapping[str, Tensor] | Sequence[Tensor] | Tensor

_LIMITS = (
    "block_size",
    "max_position_embeddings",
    "n_positions",
    "max_positions",
    "max_seq_len",
    "max_seq_length",
    "context_length",
    "n_ctx",
)
_WAY_OUT = "pass example= in Python, or name a function package.module:function that returns (module, example)"


def load_module(
    module: nn.Module,
    *,
    source: str,
    source_format: str,
    options: LoadOptions,
    example: Example | None = None,
    source_hash: str | None = None,
    notes: tuple[str, ...] = (),
) -> LoadedModel:
    """Make a plain ``nn.Module`` ready for capture; it is put in evaluation mode, and converted in place.

    Without an example one is inferred from the embeddings. The module runs once on the example: that proves the
    example, and shows whether the model returns a tensor (kept as it is) or a tuple (wrapped, see ``wrap.Tokens``).

    Raises:
        ModelLoadError: no example can be inferred, the module fails on it, or a weight isn't finite.
    """
    module = module.eval()
    module = _convert(module, options)
    check_finite(module, str(getattr(module, "prefix", "")))
    inputs = place(infer_example(module) if example is None else named_inputs(module, example), options)
    wrapped, inputs, task = _settle(module, inputs, example is not None)
    return LoadedModel(
        module=wrapped,
        example=inputs,
        task=task,
        format=source_format,
        source=source,
        source_hash=hash_state(module) if source_hash is None else source_hash,
        config=module_config(module),
        max_positions=position_limit(module),
        notes=notes,
    )


def place(inputs: Mapping[str, Tensor], options: LoadOptions) -> dict[str, Tensor]:
    """Example inputs on the model's device, floating-point ones in its dtype."""
    device = "meta" if options.meta else options.device
    return {k: v.to(device, options.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def infer_example(module: nn.Module, required: Sequence[str] | None = None) -> dict[str, Tensor]:
    """An example for a module whose first input is token ids: int64 [2, 11], valid in every embedding.

    ``required`` names the inputs, by default those of ``forward`` without a default value. Ids are below the size of
    the smallest embedding, so it doesn't matter which of them holds the tokens.

    Raises:
        ModelLoadError: the module has no embedding, or requires other inputs besides.
    """
    name = type(module).__name__
    if required is None:
        optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    sizes = [size for size in map(_embedding_size, module.modules()) if size is not None]
    if not required or not sizes:
        missing = "its forward names no required input" if not required else "it has no nn.Embedding to read token ids"
        raise ModelLoadError(f"no example input can be inferred for {name}: {missing}; {_WAY_OUT}")
    limit = position_limit(module)
    length = min([SEQUENCE, *sizes, *([limit] if limit else [])])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(sizes), (BATCH, length), generator=generator)
    known = {
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(length).expand(BATCH, length).contiguous(),
        "token_type_ids": torch.zeros_like(tokens),
    }
    unknown = [item for item in required[1:] if item not in known]
    if unknown:
        raise ModelLoadError(
            f"no example input can be inferred for {name}: its forward also requires {', '.join(unknown)}; {_WAY_OUT}"
        )
    return {required[0]: tokens} | {item: known[item] for item in required[1:]}


def position_limit(module: nn.Module) -> int | None:
    """The longest sequence that the module (or its ``config``) says it takes, None where it says nothing."""
    inner = module.model if isinstance(module, Wrapper) else module
    for holder in (inner, getattr(inner, "config", None), getattr(inner, "args", None), getattr(inner, "params", None)):
        for name in _LIMITS:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def module_config(module: nn.Module) -> dict[str, Any] | None:
    """The module's ``config`` as far as JSON can hold it, None where there is none."""
    inner = module.model if isinstance(module, Wrapper) else module
    config = getattr(inner, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif not isinstance(config, dict):
        config = getattr(config, "__dict__", None)
    if not isinstance(config, dict):
        return None
    result = {}
    for name, value in config.items():
        try:
            result[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue  # a device, a function, a dtype: no part of the description
    return result


def _convert(module: nn.Module, options: LoadOptions) -> nn.Module:
    """Floating-point parameters and buffers in the dtype asked for, everything on the device."""
    try:
        return module.to(device=options.device, dtype=options.dtype)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ModelLoadError(
            f"{type(module).__name__} can't be moved to {options.device} as {options.dtype}: {one_line(error)}"
        ) from error


def _settle(module: nn.Module, inputs: dict[str, Tensor], given: bool) -> tuple[nn.Module, dict[str, Tensor], str]:
    """Run the module once; wrap it if it returns a tuple; tell a causal language model from other readers of tokens."""
    output = _run(module, inputs, given)
    first = next(iter(inputs.values()))
    reads_tokens = not first.is_floating_point() and first.dim() == 2
    if not reads_tokens:
        return module, inputs, "vision" if first.dim() == 4 else "unknown"
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor) and len(inputs) == 1:
        wrapper: nn.Module = Tokens(module)
        if _takes_targets(module) and output[0].dim() == 3 and output[0].shape[1] != first.shape[1]:
            wrapper = TokensAndTargets(module)
        inputs = {"input_ids": first}
        module, output = wrapper, _run(wrapper, inputs, given)
    if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != first.shape:
        return module, inputs, "unknown"
    return module, inputs, "causal-lm" if _is_causal_lm(module, inputs, output) else "encoder"


def _run(module: nn.Module, inputs: dict[str, Tensor], given: bool) -> Any:
    try:
        with torch.no_grad():
            return module(**inputs)
    except Exception as error:  # whatever the user's forward raises; it becomes the one line they see
        what = "the example" if given else "token ids of shape " + str(list(next(iter(inputs.values())).shape))
        raise ModelLoadError(
            f"{type(module).__name__}.forward fails on {what} ({', '.join(inputs)}): "
            f"{type(error).__name__}: {one_line(error)}; {_WAY_OUT}"
        ) from error


def _takes_targets(module: nn.Module) -> bool:
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(parameters) >= 2 and parameters[1].name in {"targets", "target", "labels", "y"}


def _is_causal_lm(module: nn.Module, inputs: dict[str, Tensor], output: Tensor) -> bool:
    """Whether the outputs are as wide as an embedding is long, and don't see the last token before its position."""
    sizes = {size for size in map(_embedding_size, module.modules()) if size is not None}
    if output.shape[-1] not in sizes or output.shape[1] < 2:
        return False
    name = next(iter(inputs))
    changed = inputs[name].clone()
    changed[:, -1] = (changed[:, -1] + 1) % min(sizes)
    again = _run(module, inputs | {name: changed}, given=True)
    return bool(torch.equal(again[:, :-1].isnan(), output[:, :-1].isnan())) and bool(
        torch.allclose(again[:, :-1], output[:, :-1], rtol=1e-4, atol=1e-4)
    )


def _embedding_size(module: nn.Module) -> int | None:
    """``num_embeddings`` of an embedding, scripted or not."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    weight = getattr(module, "weight", None)
    if getattr(module, "original_name", None) == "Embedding" and isinstance(weight, Tensor):
        return int(weight.shape[0])
    return None
