"""One LAWCAT site beside a window as an ONNX model with its body, and the same site in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lincompile.lowering.native.library import DOMAIN
from lincompile.lowering.onnx.functions import attach_bodies
from lincompile.lowering.onnx.lawcat import INPUTS, LAWCAT_WINDOW, OUTPUTS, Sizes, body
from lincompile.lowering.onnx.sites import lawcat_window


@dataclass
class Site:
    """Sizes, the weights by name as the operator takes them, and the width of the hidden states."""

    sizes: Sizes
    width: int
    weights: dict[str, Tensor]


def site(
    heads: int,
    kv_heads: int,
    size: int,
    taps: int = 4,
    rank: int = 16,
    window: int = 64,
    softcap: float = 0.0,
    rotated: int = 0,
    lowest: float = 0.0,
) -> Site:
    sizes = Sizes(heads, kv_heads, size, taps, rank, window, size**-0.5, softcap, 16.0, rotated, lowest)
    width = 4 * size + 5
    shapes = {
        "conv": (taps, sizes.channels),
        "map_weight": (kv_heads, size, size),
        "map_bias": (kv_heads, size),
        "projection": (rank + 2 * heads, width),
        "gate_up": (rank, kv_heads * 2 * size),
        "gate_bias": (kv_heads * 2 * size,),
        "mix_bias": (2 * heads,),
    }
    generator = torch.Generator().manual_seed(heads * size)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    weights["gate_bias"] += 4.0  # half-lives of some hundred tokens, as models have them
    return Site(sizes, width, weights)


def model(case: Site) -> Any:
    """``ModelProto`` whose inputs are the operator's, of any size."""
    import onnx_ir as ir

    shapes = {
        name: ["axis"] * rank for name, rank in zip(INPUTS, (3, 3, 3, 3, 2, 3, 2, 2, 3, 2, 2, 2, 1, 1), strict=True)
    }
    given = [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([f"{name}_{axis}" for axis in range(len(shape))]),
        )
        for name, shape in shapes.items()
    ]
    s = case.sizes
    attributes = {"num_heads": s.heads, "kv_num_heads": s.kv_heads, "window": s.window, "scale": s.scale}
    attributes |= {"softcap": s.softcap, "temperature": s.temperature, "rotated": s.rotated, "lowest": s.lowest}
    node = ir.node(LAWCAT_WINDOW, given, attributes, domain=DOMAIN, num_outputs=3)
    for output, name, rank in zip(node.outputs, OUTPUTS, (3, 3, 2), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([f"{name}_{axis}" for axis in range(rank)])
    imports = {"": 21, "com.microsoft": 1, DOMAIN: 1}
    made = ir.Model(ir.Graph(given, node.outputs, nodes=[node], opset_imports=imports, name="site"), ir_version=10)
    function = body(s)
    made.functions[function.identifier()] = function
    assert attach_bodies(made) == []
    return ir.serde.serialize_model(made)


def tokens(case: Site, batch: int, time: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a chunk, all real, without its states."""
    s, generator = case.sizes, torch.Generator().manual_seed(seed)
    width = (s.heads + 2 * s.kv_heads) * s.size
    angles = torch.rand(batch, time, s.size // 2, generator=generator).repeat(1, 1, 2) * 6
    return {
        "qkv": torch.randn(batch, time, width, generator=generator),
        "hidden": torch.randn(batch, time, case.width, generator=generator),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "mask": torch.ones(batch, time),
    }


def fresh(case: Site, batch: int) -> dict[str, Tensor]:
    """The states before the first token."""
    s = case.sizes
    return {
        "past_conv": torch.zeros(batch, s.channels, s.taps - 1),
        "past_state": torch.zeros(batch, sum(s.state)),
    }


def in_torch(case: Site, feed: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's outputs in float64: attention, new conv state, and what is recurrent of the new state."""
    s, w = case.sizes, {name: weight.double() for name, weight in case.weights.items()}
    x = {name: value.double() for name, value in feed.items()}
    batch = x["qkv"].shape[0]
    heads = [count * s.size for count in (s.heads, s.kv_heads, s.kv_heads)]
    q, k, v = (torch.unflatten(part, 2, (-1, s.size)).transpose(1, 2) for part in torch.split(x["qkv"], heads, 2))
    state, cache, real = torch.split(x["past_state"], s.state, 1)
    rows = cache.reshape(batch, s.window - 1, 2 * s.kv_heads, s.size).transpose(1, 2)
    keys, values = rows.chunk(2, 1)
    conv_q, conv_k = torch.split(x["past_conv"], heads[:2], 1)
    taps_q, taps_k = torch.split(w["conv"].T, heads[:2], 0)
    down, mix = torch.split(w["projection"], [s.rank, 2 * s.heads], 0)
    output, new_q, new_k, new_state, *_ = lawcat_window(
        *(q, k, v, x["hidden"], x["cos"], x["sin"], x["mask"] > 0, real > 0.5, conv_q, conv_k),
        *(state.reshape(batch, s.kv_heads, 2 * s.size, s.size + 1), keys, values, taps_q, taps_k, w["map_weight"]),
        *(w["map_bias"][:, None], down, w["gate_up"].T, w["gate_bias"], mix, w["mix_bias"]),
        *(s.window, s.scale, s.softcap, s.temperature, bool(s.rotated), s.lowest or None),
    )
    flat = output.transpose(1, 2).flatten(2) * x["mask"][..., None]
    return flat, torch.cat([new_q, new_k], 1), new_state.flatten(1)
