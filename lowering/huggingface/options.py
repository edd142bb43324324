"""What transformers' ``from_pretrained`` is called with: which options have a meaning for a compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...passes.errors import LincompileError

# What transformers passes along on its own account and what has no meaning for a local folder.
_IGNORED = {
    "config",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "proxies",
    "revision",
    "token",
    "trust_remote_code",
    "use_safetensors",
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options that would be ignored."""
    if unknown := sorted(name for name, value in options.items() if name not in _IGNORED and value is not None):
        raise LincompileError(
            f"from_pretrained has no option '{unknown[0]}' for a compiled model; it takes device_map and dtype"
        )


def check_config(given: Any, own: Any) -> None:
    """The auto classes turn options into a configuration: what it asks for must be what the program is."""
    if attention := getattr(given, "_attn_implementation_internal", None):
        raise LincompileError(
            f"attn_implementation='{attention}': a compiled program brings its own attention; leave it out"
        )
    for name in ("vocab_size", "max_position_embeddings"):
        if getattr(given, name, None) not in (None, getattr(own, name)):
            raise LincompileError(
                f"{name}={getattr(given, name)}: the program was compiled for {getattr(own, name)}; leave it out"
            )


def one_device(device_map: Any) -> torch.device:
    """The single device that a ``device_map`` names."""
    if isinstance(device_map, dict):
        devices = {str(device) for device in device_map.values()}
        if len(devices) != 1:
            raise LincompileError(f"device_map names {len(devices)} devices: a compiled model goes to one")
        device_map = next(iter(device_map.values()))
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise LincompileError(f"device_map {device_map!r} names no device: {str(error).splitlines()[0]}") from error
    found = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= found):
        raise LincompileError(
            f"device_map {device_map!r}: a compiled model runs on the CPU or a CUDA device, and this machine shows "
            f"{found} of those to torch"
        )
    return device
