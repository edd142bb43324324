"""Files that ``torch.save`` wrote: state dicts, and modules pickled whole. Nothing in them runs unasked.

Data is read by ``torch.load(weights_only=True)``. A pickled module may use the classes and functions of
``allowed_globals`` (torch.nn's modules, its activations, a few containers), which restrict the same unpickler
through ``torch.serialization.safe_globals``; anything else is refused by name unless the user trusts the file.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelLoadError
from .function import build_module, current_folder_importable
from .loaded import LoadedModel, LoadOptions, hash_files, one_line, some
from .plain import Example, load_module
from .sniff import wanted_globals

_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net")
_PREFIXES = ("_orig_mod.", "module.", "model.")
_FUNCTIONS = {"relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "selu", "mish", "softplus", "relu6"}
_BASICS = {
    "builtins.dict",
    "builtins.int",
    "builtins.float",
    "builtins.list",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "collections.defaultdict",
    "argparse.Namespace",
    "functools.partial",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
}


def allowed_globals(names: list[str]) -> tuple[list[tuple[Any, str]], list[str]]:
    """Split the globals a pickle wants into those on the allow-list, resolved, and the names of the others.

    Allowed are the ``nn.Module`` classes of torch.nn, activation functions of torch.nn.functional, and a few
    containers of the standard library. Only modules of torch and those containers are imported to resolve them.
    """
    allowed: list[tuple[Any, str]] = []
    refused: list[str] = []
    for name in names:
        value = _resolve(name)
        if value is None:
            refused.append(name)
        else:
            allowed.append((value, name))
    return allowed, refused


def load_pickle(path: Path, options: LoadOptions, example: Example | None) -> LoadedModel:
    """Load a module pickled whole, under the allow-list or, with ``options.trust``, without one.

    Raises:
        ModelLoadError: the file wants more than the allow-list has, is damaged, or holds no module.
    """
    allowed, refused = allowed_globals(wanted_globals(path))
    if refused and not options.trust:
        raise ModelLoadError(
            f"{path}: not loaded, because this pickle wants to run code from {some(refused, 6)}; save a state dict and "
            "give --model module:function, or pass --trust if you trust whoever made the file"
        )
    if options.trust:
        with current_folder_importable():
            value = _unpickle(path, weights_only=False)
    else:
        with torch.serialization.safe_globals(list(allowed)):
            value = _unpickle(path, weights_only=True)
    if isinstance(value, Mapping):
        value = next((v for k in _CONTAINERS if isinstance(v := value.get(k), nn.Module)), value)
    if not isinstance(value, nn.Module):
        raise ModelLoadError(
            f"{path}: the pickle holds {_describe(value)}, not an nn.Module; "
            "for a state dict give --model module:function"
        )
    from .huggingface import is_pretrained, load_pretrained

    source_hash = hash_files([path])
    if is_pretrained(value):
        return load_pretrained(
            value, source=str(path), source_format="pickle", options=options, source_hash=source_hash
        )
    return load_module(
        value, source=str(path), source_format="pickle", options=options, example=example, source_hash=source_hash
    )


def load_state_dict(
    path: Path, model: str | None, options: LoadOptions, example: Example | None, source_format: str = "state_dict"
) -> LoadedModel:
    """Load a state dict (torch.save or safetensors) into the module that ``model`` = "module:function" builds.

    Keys must match exactly once wrapper prefixes (``module.``, ``_orig_mod.``, ``model.``) are stripped; a tensor
    that the module shares with a loaded one (a tied head) may be absent.

    Raises:
        ModelLoadError: no ``model``, a damaged file, or keys or shapes that don't match (the first few are listed).
    """
    state, notes = read_state(path, source_format)
    if model is None:
        raise ModelLoadError(
            f"{path}: a state dict ({some(state, 3)}) says nothing of its architecture; "
            "give --model module:function naming a function that builds the nn.Module, or put its config.json beside it"
        )
    module, given = build_module(model)
    notes += fill(module, state, str(path), model)
    return load_module(
        module,
        source=str(path),
        source_format=source_format,
        options=options,
        example=given if example is None else example,
        source_hash=hash_files([path]),
        notes=tuple(notes),
    )


def read_state(path: Path, source_format: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state-dict file by name, and notes on where in the checkpoint they were."""
    if source_format == "safetensors":
        from .weights import read_safetensors

        return read_safetensors(path), []
    value = _unpickle(path, weights_only=True)
    notes: list[str] = []
    if isinstance(value, Mapping) and not _tensors(value):
        for key in _CONTAINERS:
            inner = value.get(key)
            if isinstance(inner, Mapping) and _tensors(inner):
                others = [str(k) for k in value if k != key]
                ignored = f"; {some(others, 3)} left aside" if others else ""
                notes.append(f"the weights are the checkpoint's '{key}'{ignored}")
                value = inner
                break
    if not isinstance(value, Mapping) or not _tensors(value):
        raise ModelLoadError(f"{path}: holds {_describe(value)}, not a state dict (tensors by name)")
    extra = [str(k) for k, v in value.items() if not isinstance(v, Tensor)]
    if extra:
        notes.append(f"entries that are no tensors were left aside: {some(extra, 3)}")
    return {str(k): v for k, v in value.items() if isinstance(v, Tensor)}, notes


def fill(module: nn.Module, state: dict[str, Tensor], where: str, builder: str) -> list[str]:
    """Copy a state dict into a module, strictly; returns notes on stripped prefixes.

    Raises:
        ModelLoadError: missing, unexpected or misshapen tensors.
    """
    expected = module.state_dict()
    names = {k for k, v in expected.items() if isinstance(v, Tensor)}
    state, notes = _strip_prefixes(state, names)
    missing = names - state.keys()
    tied = {name for name in missing if any(_shares(expected[name], expected[other]) for other in state.keys() & names)}
    unexpected = state.keys() - names
    problems = []
    if missing - tied:
        problems.append(f"{len(missing - tied)} missing ({some(missing - tied)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({some(unexpected)})")
    shapes = {
        f"{k} {list(state[k].shape)} instead of {list(expected[k].shape)}"
        for k in state.keys() & names
        if state[k].shape != expected[k].shape
    }
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({some(shapes, 3)})")
    if problems:
        raise ModelLoadError(
            f"{where}: the state dict doesn't fit the module that {builder} builds: {'; '.join(problems)}; "
            "build the module with the options the checkpoint was trained with"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            expected[name].copy_(tensor)
    return notes


def _strip_prefixes(state: dict[str, Tensor], names: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    if any("_orig_mod." in key for key in state) and not any("_orig_mod." in name for name in names):
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
        notes.append("stripped '_orig_mod.' (torch.compile) from the names of the tensors")
    for prefix in _PREFIXES * 2:
        if state and all(k.startswith(prefix) for k in state) and not any(n.startswith(prefix) for n in names):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            notes.append(f"stripped '{prefix}' from the names of the tensors")
    return state, notes


def _unpickle(path: Path, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except (AttributeError, ImportError) as error:
        raise ModelLoadError(
            f"{path}: the pickle wants code that can't be found here: {one_line(error)}; run from the folder that "
            "holds it, or save a state dict and give --model module:function"
        ) from error
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{path}: not loaded by torch's safe unpickler: {_reason(error)}; save a plain state dict "
            "(torch.save(model.state_dict(), …)) or pass --trust if you trust whoever made the file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelLoadError(
            f"{path}: a truncated or damaged torch.save file ({one_line(error)}); fetch or save it again"
        ) from error


def _reason(error: BaseException) -> str:
    """What the safe unpickler objects to, out of its long advice."""
    text = " ".join(str(error).split())
    for mark in ("WeightsUnpickler error: ", "Unsupported "):
        if mark in text:
            text = text.split(mark, 1)[1]
    return text.split(" Check the doc")[0].split(". ")[0][:200]


def _resolve(name: str) -> Any:
    """The object of an allowed global, None for any other name."""
    module_name, _, attribute = name.rpartition(".")
    if name in _BASICS:
        return getattr(importlib.import_module(module_name), attribute)
    if module_name in {"torch.nn.functional", "torch._C._nn"} and attribute in _FUNCTIONS:
        return getattr(importlib.import_module("torch.nn.functional"), attribute)
    if module_name.startswith("torch.nn.modules.") and attribute.isidentifier():
        try:
            value = getattr(importlib.import_module(module_name), attribute, None)
        except ImportError:
            return None
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module_name:
            return value
    return None


def _tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(v, Tensor) for v in value.values())


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {some(map(str, value), 4) or 'none'}"
    return f"a {type(value).__name__}"
