"""The numbers of a quantized program in a form that learns: codes, group scales, and the vectors left in float.

A quantized layer computes ``x̂ · (code · scale)ᵀ + bias`` with rounded activations x̂. Here the codes are a float32
latent in units of the scale, rounded and clamped, and the scales ``scale · exp(change)``, rounded to float16 as they
are stored. The gradient passes all rounding straight through. Latents begin at the codes and changes at 0, so that
nothing is computed differently before the first step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ...kernels import ops as _ops  # noqa: F401  registers torch.ops.lincompile
from ...kernels.int6_linear.codes import LEVELS, dequantize, fake_quantize_activation, split_groups
from ...kernels.int6_linear.pack import pack, unpack
from ..graph import finish, get_attribute, set_tensor, target_of
from ..program import Program
from .embeddings import LOOKUP

_INT6, _INT8 = torch.ops.lincompile.int6_linear.default, torch.ops.lincompile.int8_linear.default
_PREFIX = "lincompile_tuned_"
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # positive float16


@dataclass
class Precision:
    """``training``: the dtype of matrix products inside ``lowered`` (None, and outside: that of the activations)."""

    training: torch.dtype | None = None
    products: torch.dtype | None = None

    @contextmanager
    def lowered(self) -> Iterator[None]:
        self.products = self.training
        try:
            yield
        finally:
            self.products = None


class _Weight(torch.autograd.Function):
    """``[N, K]`` float32 from codes (int8, or a float32 latent), stored scales and their changes.

    The codes aren't kept for the backward pass but rounded again: memory is what parameters and gradients take.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, change: Tensor, group_size: int, levels: int) -> Tensor:
        ctx.save_for_backward(codes, scale, change)
        ctx.group_size, ctx.levels = group_size, levels
        return dequantize(rounded(codes, levels), changed(scale, change), group_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, change = ctx.saved_tensors
        groups = split_groups(grads[0].float(), ctx.group_size)
        wide = changed(scale, change).float()
        latent = None
        if ctx.needs_input_grad[0]:
            latent = (groups * wide.unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]
            outwards = ((codes > ctx.levels) & (latent < 0)) | ((codes < -ctx.levels - 1) & (latent > 0))
            latent = latent.masked_fill_(outwards, 0.0)
        along = (groups * split_groups(rounded(codes, ctx.levels).float(), ctx.group_size)).sum(dim=-1) * wide
        return latent, None, along, None, None


class _Rounded(torch.autograd.Function):
    """Activations as the op rounds them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_size: int, activation: str) -> Tensor:
        return fake_quantize_activation(x, group_size, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def rounded(codes: Tensor, levels: int) -> Tensor:
    """The codes that are meant: of a latent, those nearest to it in ``[−levels − 1, levels]``."""
    return codes.round().clamp_(-levels - 1, levels) if codes.is_floating_point() else codes


def changed(scale: Tensor, change: Tensor) -> Tensor:
    """float16 scales times ``exp(change)``; positive ones stay positive and finite, 0 stays 0."""
    moved = (scale.float() * change.exp()).clamp_(_SMALLEST, _LARGEST)
    return torch.where(scale == 0, 0.0, moved).to(torch.float16)


def rounded_activation(x: Tensor, group_size: int, activation: str) -> Tensor:
    """``x […, K]`` as a quantized layer reads it, in float32 (float64 for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide if activation == "a16" else _Rounded.apply(wide, group_size, activation)  # type: ignore[no-untyped-call]


class TunedLinear(nn.Module):
    """A quantized layer that learns; called with rounded activations and the bias.

    Attributes:
        change: of the scales, float32 ``[N, groups]``.
        latent: float32 ``[N, K]`` in units of the scale, or None where the codes stay.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, bits: int, group_size: int, learn_codes: bool, precision: Precision
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.precision = bits, group_size, precision
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.change = nn.Parameter(torch.zeros(scale.shape, dtype=torch.float32, device=scale.device))
        self.latent = nn.Parameter(codes.float()) if learn_codes else None

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Tensor]:
        """int8 codes and float16 scales as they stand."""
        codes = self.codes if self.latent is None else rounded(self.latent, LEVELS[self.bits]).to(torch.int8)
        return codes, changed(self.scale, self.change)

    def forward(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        source = self.codes if self.latent is None else self.latent
        weight = _Weight.apply(source, self.scale, self.change, self.group_size, LEVELS[self.bits])  # type: ignore[no-untyped-call]
        low = self.precision.products
        kind = low or x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        return y if low is not None else y.to(dtype)


class TunedVector(nn.Module):
    """A vector of the float model that learns: ``start + unit · change``, its unit the root of its mean square."""

    start: Tensor
    unit: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("unit", start.float().square().mean().sqrt())
        self.change = nn.Parameter(torch.zeros(start.shape, dtype=torch.float32, device=start.device))

    def forward(self) -> Tensor:
        return (self.start.float() + self.unit * self.change).to(self.start.dtype)


@dataclass
class TunedParts:
    """What learns, by the dotted names of the weights and vectors."""

    linears: dict[str, TunedLinear]
    vectors: dict[str, TunedVector]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The learning numbers by ``NAME/latent`` and ``NAME/change``."""
        return {
            f"{name}/{kind}": parameter
            for name, part in (self.linears | self.vectors).items()
            for kind, parameter in part.named_parameters()
        }

    def state(self) -> dict[str, Tensor]:
        """What would be stored: ``NAME/codes``, ``NAME/scale`` and ``NAME/vector``."""
        found: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            found[f"{name}/codes"], found[f"{name}/scale"] = (tensor.clone() for tensor in linear.stored())
        return found | {f"{name}/vector": vector().detach().clone() for name, vector in self.vectors.items()}


def find_parts(program: Program, weights: Collection[str], learn_codes: bool, precision: Precision) -> TunedParts:
    """What can learn in a quantized program: the layers of ``weights`` and the vectors that its graph reads.

    Planes that an embedding reads, too, stay as they are. Nothing in the program changes.
    """
    module = program.graph_module
    tables = {
        str(operand.target)
        for node in module.graph.nodes
        if target_of(node) is LOOKUP
        for operand in node.all_input_nodes
    }
    parts = TunedParts({}, {})
    for node in module.graph.nodes:
        name = weight_of(node)
        if name in weights and name not in parts.linears and str(node.args[1].target) not in tables:
            bits = 6 if target_of(node) is _INT6 else 8
            codes, scale = stored_codes(module, name, int(node.args[0].meta["val"].shape[-1]), node.args[-2])
            parts.linears[name] = TunedLinear(codes, scale, bits, node.args[-2], learn_codes, precision)
    seen: set[int] = set()
    for node in module.graph.nodes:
        if (vector := _vector(module, node)) is not None and id(vector) not in seen:
            seen.add(id(vector))
            parts.vectors[str(node.target)] = TunedVector(vector.detach())
    return parts


def weight_of(node: Node) -> str:
    """The dotted name of the weight that a quantized layer's planes were made of; "" for other nodes."""
    if target_of(node) is _INT6:
        return str(node.args[1].target).removesuffix("_hi")  # type: ignore[union-attr]
    if target_of(node) is _INT8:
        return str(node.args[1].target).removesuffix("_int8")  # type: ignore[union-attr]
    return ""


def stored_codes(module: nn.Module, name: str, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 codes ``[N, K]`` and float16 scales of the packed weight that was called ``name``."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    scale = buffers[name + "_scale"]
    if (codes := buffers.get(name + "_int8")) is not None:
        return codes, scale
    return unpack(buffers[name + "_hi"], buffers[name + "_lo"], in_features, group_size), scale


def _vector(module: nn.Module, node: Node) -> nn.Parameter | None:
    if node.op != "get_attr":
        return None
    value = get_attribute(module, str(node.target))
    plain = isinstance(value, nn.Parameter) and value.is_floating_point() and value.dim() == 1
    return value if plain and bool((value != 0).any()) else None


def learn_by(module: GraphModule, parts: TunedParts) -> None:
    """Make a quantized graph compute with ``parts`` in place of what it has stored."""
    names = {name: _PREFIX + str(index) for index, name in enumerate(parts.linears | parts.vectors)}
    owners = {id(get_attribute(module, name)): name for name in parts.vectors}
    shared: dict[tuple[Node, int, str], Node] = {}
    for node in list(module.graph.nodes):
        if (vector := _vector(module, node)) is not None:
            name = owners[id(vector)]
            module.add_submodule(names[name], parts.vectors[name])
            with module.graph.inserting_before(node):
                new = module.graph.call_module(names[name])
        elif (name := weight_of(node)) in parts.linears:
            module.add_submodule(names[name], parts.linears[name])
            x, (bias, group_size, activation) = node.args[0], node.args[-3:]
            assert isinstance(x, Node)
            with module.graph.inserting_before(node):
                key = (x, group_size, activation)
                if key not in shared:  # q, k and v read the same rounded activations
                    shared[key] = module.graph.call_function(rounded_activation, key)
                    shared[key].meta["val"] = x.meta["val"]
                new = module.graph.call_module(names[name], (shared[key], bias, node.meta["val"].dtype))
        else:
            continue
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    finish(module)


@torch.no_grad()
def store(program: Program, parts: TunedParts, state: dict[str, Tensor]) -> None:
    """Write what :meth:`TunedParts.state` gave into a quantized program. Vectors become new parameters, under every
    name that had the old one: programs and modules that share the old one keep it.
    """
    module = program.graph_module
    for name, linear in parts.linears.items():
        codes, scale = state[f"{name}/codes"], state[f"{name}/scale"]
        planes = (
            {"_int8": codes}
            if linear.bits == 8
            else dict(zip(("_hi", "_lo"), pack(codes, linear.group_size), strict=True))
        )
        for suffix, tensor in (planes | {"_scale": scale}).items():
            set_tensor(module, name + suffix, tensor.to(linear.scale.device))
    old = {id(get_attribute(module, name)): name for name in parts.vectors}
    new: dict[str, nn.Parameter] = {}
    for path, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) in old:
            name = old[id(parameter)]
            if name not in new:
                new[name] = nn.Parameter(state[f"{name}/vector"].to(parameter.device), parameter.requires_grad)
            set_tensor(module, path, new[name])
    module.recompile()


__all__ = ["Precision", "TunedLinear", "TunedParts", "TunedVector", "find_parts", "learn_by", "store"]
