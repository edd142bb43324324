"""lincompile: compile pretrained softmax-attention models into linear-attention, 6-bit, deployable ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; imported when first used, so that `import lincompile` is instant and light.
_HOMES = {
    "compile": "lowering.compiler",
    "Compiled": "lowering.compiler",
    "open": ("lowering.package", "open_artefact"),
    "load": ("passes.formats.load", "load_model"),
    "capture": "passes.capture",
    "Program": "passes.program",
    "AttentionSite": "passes.program",
    "Pipeline": "passes.pipeline",
    "PassResult": "passes.pipeline",
    "register": "passes.pipeline",
    "Canonicalize": "passes.canonicalize",
    "ProveAttention": "passes.identity",
    "LinearizeAttention": "passes.linearize",
    "linearize_": "passes.linearization.module",
    "Quantize": "passes.quantize",
    "SequenceParallel": "passes.shard",
    "quantize_": "passes.quantization.module",
    "W6A6": "passes.quantization.module",
    "W6A8": "passes.quantization.module",
    "W6A16": "passes.quantization.module",
    "W8A8": "passes.quantization.module",
    "make_stateful": "passes.stateful",
    "LincompileError": "passes.errors",
}
__all__ = [
    "W6A6",
    "W6A8",
    "W6A16",
    "W8A8",
    "AttentionSite",
    "Canonicalize",
    "Compiled",
    "LincompileError",
    "LinearizeAttention",
    "PassResult",
    "Pipeline",
    "Program",
    "ProveAttention",
    "Quantize",
    "SequenceParallel",
    "__version__",
    "capture",
    "compile",
    "linearize_",
    "load",
    "make_stateful",
    "open",
    "quantize_",
    "register",
]

if TYPE_CHECKING:
    from .lowering.compiler import Compiled as Compiled
    from .lowering.compiler import compile as compile
    from .lowering.package import open_artefact as open
    from .passes.canonicalize import Canonicalize as Canonicalize
    from .passes.capture import capture as capture
    from .passes.errors import LincompileError as LincompileError
    from .passes.formats.load import load_model as load
    from .passes.identity import ProveAttention as ProveAttention
    from .passes.linearization.module import linearize_ as linearize_
    from .passes.linearize import LinearizeAttention as LinearizeAttention
    from .passes.pipeline import PassResult as PassResult
    from .passes.pipeline import Pipeline as Pipeline
    from .passes.pipeline import register as register
    from .passes.program import AttentionSite as AttentionSite
    from .passes.program import Program as Program
    from .passes.quantization.module import W6A6 as W6A6
    from .passes.quantization.module import W6A8 as W6A8
    from .passes.quantization.module import W6A16 as W6A16
    from .passes.quantization.module import W8A8 as W8A8
    from .passes.quantization.module import quantize_ as quantize_
    from .passes.quantize import Quantize as Quantize
    from .passes.shard import SequenceParallel as SequenceParallel
    from .passes.stateful import make_stateful as make_stateful


def __getattr__(name: str) -> Any:
    if name == "hf":  # a module, which needs transformers
        import importlib

        return importlib.import_module(".hf", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'lincompile' has no attribute '{name}'")
    import importlib

    home = _HOMES[name]
    module, attribute = home if isinstance(home, tuple) else (home, name)
    return getattr(importlib.import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
