"""What a compilation would do, computed from shapes alone: no weights are read, so a 70B model is quickly planned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .graph import aten, expression, target_of, tensor_of
from .linearization.methods import LinearMethod, SiteShape, method_class
from .program import AttentionSite, Program
from .quantization.embeddings import find_tables, token_lookups
from .quantization.linear_layers import find_linears
from .quantization.schemes import SCHEMES, parse_plan
from .verify import op_name

CONTEXTS = (8_192, 32_768, 131_072)


@dataclass(frozen=True)
class SiteCost:
    """Per-token costs of one attention site. FLOPs count a multiply-add as two."""

    softmax_flops_per_key: int
    linear_flops: int
    cache_bytes_per_token: int
    state_bytes: int


def site_cost(site: AttentionSite, method: str, hidden: int, itemsize: int) -> SiteCost:
    """Costs of a proved site as softmax (per visible key) and as ``method`` (per token)."""
    assert site.heads and site.kv_heads and site.head_dim and site.value_dim
    softmax = 2 * site.heads * (site.head_dim + site.value_dim)
    cache = site.kv_heads * (site.head_dim + site.value_dim) * itemsize
    if method == "softmax":
        return SiteCost(softmax, 0, cache, 0)
    with torch.device("meta"):
        module = method_class(method)(
            SiteShape(site.heads, site.kv_heads, site.head_dim, site.value_dim, hidden, site.scale or 1.0, True)
        )
    kv_heads, features, columns = module.state_shape
    conv = sum(2 * p.numel() for name, p in module.named_parameters() if "conv" in name)
    maps = sum(2 * p.numel() for name, p in module.named_parameters() if "map" in name and p.dim() > 2) * (
        1 + site.heads // site.kv_heads
    )
    gates = sum(2 * p.numel() for name, p in module.named_parameters() if "gate" in name or "beta" in name)
    recurrence = 2 * kv_heads * features * columns + 2 * site.heads * features * columns
    window = sum(p.shape[0] * (p.shape[1] - 1) * itemsize for name, p in module.named_parameters() if "conv" in name)
    return SiteCost(softmax, recurrence + conv + maps + gates, cache, kv_heads * features * columns * 4 + window)


def plan(
    teacher: Program,
    student: Program,
    quant: str = "none",
    contexts: tuple[int, ...] = CONTEXTS,
    *,
    embeddings: bool = False,
) -> dict[str, Any]:
    """The dry run's figures, JSON-able.

    Args:
        teacher: the proved softmax program (may be on the meta device).
        student: its rewritten copy.
        quant: ``none`` or a ``--quant`` value; any six-bit plan has the same weight bytes.
        embeddings: the embedding and the output head are packed, too.

    Returns:
        ``sites``, ``parameters``, ``parameters_added``, ``weight_bytes`` (before and after), and per context length
        the bytes of KV cache and of state (batch 1) and the FLOPs per token of prefill and decode, before and after.
        All are computed, not measured.
    """
    itemsize = next(teacher.graph_module.parameters()).element_size()
    methods = [site.method for site in student.sites]
    added = {
        s.details["module"]: student.graph_module.get_submodule(s.details["module"])
        for s in student.sites
        if s.method != "softmax"
    }
    extra = sum(p.numel() for module in added.values() for p in module.parameters())
    spec = parse_plan(quant)
    lookups = token_lookups(teacher) if embeddings and spec.kind != "none" else []
    layers = find_linears(teacher.graph_module, lm_head=embeddings, lookups=lookups) if spec.kind != "none" else []
    tables = [table for table in find_tables(teacher, lookups, layers) if table.head is None] if lookups else []
    quantized = [layer for layer in layers if layer.reason is None]
    scheme = spec.scheme or SCHEMES["w6a8"]
    packed = sum(scheme.weight_bytes(layer.out_features, layer.in_features) for layer in quantized)
    plain = sum(layer.weights for layer in quantized)
    if spec.effective_bits is not None:
        packed = math.ceil(plain * spec.effective_bits / 8)
    packed += sum(SCHEMES["w6a8"].weight_bytes(table.rows, table.width) for table in tables)
    plain += sum(table.rows * table.width for table in tables)
    before = teacher.parameters * itemsize
    dense = dense_flops(teacher)
    rows = []
    for context in contexts:
        row: dict[str, Any] = {"context": context}
        for label, chosen in (("softmax", ["softmax"] * len(methods)), ("compiled", methods)):
            cache, state, decode, prefill = 0, 0, dense, dense
            for index, (site, method) in enumerate(zip(teacher.sites, chosen, strict=True)):
                if not site.proved:
                    continue
                width = hidden_width(student, index)
                cost = site_cost(site, method, width, itemsize)
                seen = min(context, site.window or context)
                if method == "softmax":
                    cache += cost.cache_bytes_per_token * seen
                    decode += cost.softmax_flops_per_key * seen
                    prefill += cost.softmax_flops_per_key * (
                        seen - seen // 2 if seen == context and site.kind != "full" else seen
                    )
                else:
                    near = min(context, student.sites[index].details.get("window", 0))
                    state += cost.state_bytes + cost.cache_bytes_per_token * near
                    decode += cost.linear_flops + cost.softmax_flops_per_key * near
                    prefill += cost.linear_flops + cost.softmax_flops_per_key * near
            row[label] = {
                "kv_cache_bytes": cache,
                "state_bytes": state,
                "decode_flops_per_token": decode,
                "prefill_flops_per_token": prefill,
            }
        rows.append(row)
    return {
        "sites": [site.record() for site in student.sites],
        "parameters": teacher.parameters,
        "parameters_added": extra,
        "weight_bytes": {"before": before, "after": before + extra * itemsize - plain * itemsize + packed},
        "quantized_layers": len(quantized),
        "contexts": rows,
        "computed": "from shapes; nothing here was measured",
    }


def hidden_width(student: Program, index: int) -> int:
    """Width of the hidden states that a site's gate reads (1 where the method reads none)."""
    module = student.sites[index].details.get("module")
    if not module:
        return 1
    method = student.graph_module.get_submodule(module)
    assert isinstance(method, LinearMethod)
    return method.shape.hidden


def dense_flops(program: Program) -> int:
    """FLOPs per token of everything but attention: linears and matmuls with parameters."""
    total = 0
    for node in program.graph_module.graph.nodes:
        if op_name(node) == "":
            total += _flops(node)
    return total


def _flops(node: Node) -> int:
    target = target_of(node)
    if target is aten.linear.default:
        weight = tensor_of(node.args[1])
        return 2 * weight.numel()
    if target is aten.addmm.default:
        return 2 * _fixed(node.args[2])
    if target in (aten.matmul.default, aten.mm.default):
        return 2 * _fixed(node.args[1])
    return 0


def _fixed(node: Any) -> int:
    """Elements of a matrix without size symbols (a parameter), else 0."""
    shape = tensor_of(node).shape
    return math.prod(int(n) for n in shape) if all(expression(n).is_Integer for n in shape) else 0
