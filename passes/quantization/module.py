"""``quantize_``: the same six-bit layers in a plain ``nn.Module``, without capturing it.

from lincompile import W6A8, quantize_
quantize_(model, W6A8(group_size=128), filter_fn=lambda module, name: "mlp" in name)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.int6_linear.codes import dequantize, quantize_weight, sqnr_db
from ...kernels.int6_linear.pack import GROUP_SIZE, pack
from ..errors import LincompileError, RefusedError
from ..quantize import SCHEMES, Scheme
from .linear_layers import HEAD_NAMES

# PyTorch's fused paths take these modules' weights without calling their linears.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class WeightConfig:
    """Base of the configurations; use ``W6A8``, ``W6A6``, ``W6A16`` or ``W8A8``."""

    group_size: int = GROUP_SIZE
    scheme: ClassVar[Scheme]


class W6A8(WeightConfig):
    """Six-bit weights, dynamic eight-bit activations."""

    scheme = SCHEMES["w6a8"]


class W6A6(WeightConfig):
    """Six-bit weights, dynamic six-bit activations."""

    scheme = SCHEMES["w6a6"]


class W6A16(WeightConfig):
    """Six-bit weights, activations left alone."""

    scheme = SCHEMES["w6a16"]


class W8A8(WeightConfig):
    """Eight-bit weights, dynamic eight-bit activations."""

    scheme = SCHEMES["w8a8"]


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is packed; ``x [..., K] → [..., N]``. Its state dict reloads bit for bit.

    Buffers: ``weight_hi``, ``weight_lo``, ``weight_scale`` (six bits) or ``weight_int8``, ``weight_scale``. ``bias``
    stays the float parameter of the layer it replaces.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, config: WeightConfig) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size, self.scheme = config.group_size, config.scheme
        codes, scale = quantize_weight(weight.detach(), config.group_size, bits=config.scheme.weight_bits)
        self.weight_sqnr_db = sqnr_db(weight, dequantize(codes, scale, config.group_size))
        if config.scheme.weight_bits == 8:
            self.register_buffer("weight_int8", codes)
        else:
            for name, plane in zip(("weight_hi", "weight_lo"), pack(codes, config.group_size), strict=True):
                self.register_buffer(name, plane)
        self.register_buffer("weight_scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        ops, tail = torch.ops.lincompile, (self.weight_scale, self.bias, self.group_size, self.scheme.activation)
        if self.scheme.weight_bits == 8:
            out: Tensor = ops.int8_linear(x, self.weight_int8, *tail)
        else:
            out = ops.int6_linear(x, self.weight_hi, self.weight_lo, *tail)
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}, group_size={self.group_size}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight and its scales."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name.startswith("weight_"))


def quantize_(module: nn.Module, config: WeightConfig, filter_fn: FilterFn | None = None) -> dict[str, Any]:
    """Replace a module's linear layers in place by packed ones.

    Args:
        module: any module; ``nn.Linear`` and the Hugging Face ``Conv1D`` are read as linears.
        config: ``W6A8(group_size=128)`` and its kin.
        filter_fn: ``(layer, dotted name) → bool``; default: every layer but output heads. A layer whose weight another
            module also holds (a head tied to the embedding) always stays in float, and so do the linears of
            ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, whose weights are read directly.

    Returns:
        ``{"layers": […], "skipped": [{"name", "reason"}], "totals": {…}}``.

    Raises:
        LincompileError: a layer's weights hold NaN or infinity. Nothing has been replaced then.
        RefusedError: no layer was left to quantize.
    """
    wanted = filter_fn or _not_a_head
    owners: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    skipped: list[dict[str, Any]] = []
    chosen: list[tuple[str, nn.Module, Tensor]] = []
    for name, part in module.named_modules():
        if reason := _own_way(part):
            skipped.append({"name": name, "reason": reason})
            continue
        weight = _matrix(part)
        if weight is None:
            continue
        parent = module.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, _READ_WEIGHTS):
            skipped.append({"name": name, "reason": f"nn.{type(parent).__name__} reads its weight directly"})
        elif owners[id(part.weight)] > 1:
            skipped.append({"name": name, "reason": "its weight is tied to another module's"})
        elif not name or not wanted(part, name):
            skipped.append({"name": name, "reason": "the module itself" if not name else "left in float by filter_fn"})
        elif not bool(torch.isfinite(weight).all()):
            raise LincompileError(f"quantize_: the weights of '{name}' hold NaN or infinity; repair the model")
        else:
            chosen.append((name, part, weight))
    names: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        names.setdefault(id(part), []).append(name)
    layers: list[dict[str, Any]] = []
    for name, part, weight in chosen:
        try:
            packed = QuantizedLinear(weight, part.bias, config)  # type: ignore[arg-type]
        except ValueError as error:
            skipped.append({"name": name, "reason": str(error)})
            continue
        for place in names[id(part)]:  # a shared layer has several
            owner, _, leaf = place.rpartition(".")
            setattr(module.get_submodule(owner), leaf, packed)
        layers.append({"name": name, "scheme": config.scheme.name, "sqnr_db": round(packed.weight_sqnr_db, 2)}
                      | {"weights": weight.numel(), "bytes_after": packed.weight_bytes})  # fmt: skip
    if not layers:
        raise RefusedError(
            "quantize_: no layer to quantize"
            + (f": {skipped[0]['name'] or 'the module'}: {skipped[0]['reason']}" if skipped else " (no linear layers)")
        )
    weights, size = sum(item["weights"] for item in layers), sum(item["bytes_after"] for item in layers)
    totals = {"layers": len(layers), "weights": weights, "bytes_after": size, "bytes_per_weight": size / weights}
    return {"layers": layers, "skipped": skipped, "totals": totals}


def _not_a_head(_: nn.Module, name: str) -> bool:
    return not any(name == head or name.endswith("." + head) for head in HEAD_NAMES)


def _own_way(module: nn.Module) -> str | None:
    """Why a linear-like module computes something else than its weight's product, if it does."""
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed, not stored (a parametrization)"
    if _matrix(module) is not None and (module._forward_hooks or module._forward_pre_hooks):
        return "it has hooks, which a packed layer wouldn't run"
    return None


def _matrix(module: nn.Module) -> Tensor | None:
    """The ``[N, K]`` weight of a linear-like module; None for others."""
    if isinstance(module, nn.Linear):
        return module.weight
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, nn.Parameter):
        return module.weight.t()  # Hugging Face GPT-2: weight [K, N]
    return None
