"""Six-bit embeddings on request: the table that the tokens index, and with it an output head tied to it.

Look-ups read rows of the packed planes (``int6_embedding``), the head multiplies by the same planes (``int6_linear``),
so a tied table is stored once. A table is read one row at a time and rows of a head are outputs: its codes are chosen
by the plain error of the weights, never by error feedback, which would move errors onto other features of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...kernels import ops as _ops  # noqa: F401  registers torch.ops.lincompile
from ...kernels.int6_linear.codes import dequantize, quantize_weight, sqnr_db
from ...kernels.int6_linear.pack import pack
from ..errors import LincompileError, RefusedError
from ..graph import Builder, aten, finish, get_attribute, set_tensor, target_of, tensor_of
from ..program import Program
from .linear_layers import LinearLayer, index_origin, readers_of
from .weight_methods import clip

_ROWS = 4096  # of a table rounded at a time
LOOKUP = torch.ops.lincompile.int6_embedding.default


@dataclass
class Table:
    """An embedding table ``[rows, width]`` that tokens index; ``head`` is a linear layer with the same weight."""

    weight: str
    lookups: list[Node]
    rows: int
    width: int
    head: LinearLayer | None = None


def token_lookups(program: Program) -> list[Node]:
    """The embedding calls whose indices are the program's tokens and whose table is a parameter."""
    tokens = program.input_with_role("tokens")
    found = []
    for node in program.graph_module.graph.nodes:
        if target_of(node) is not aten.embedding.default or tokens is None:
            continue
        origin, table = index_origin(node), node.args[0]
        if origin is not None and origin.name == tokens.name and isinstance(table, Node) and table.op == "get_attr":
            found.append(node)
    return found


def vocabulary(program: Program) -> int | None:
    """How many token ids the program knows: rows of the smallest table that tokens index (None: they index none)."""
    return min((int(tensor_of(node.args[0]).shape[0]) for node in token_lookups(program)), default=None)


def unknown_token(ids: Tensor, rows: int | None) -> int | None:
    """An id that a table of so many rows (None: any) hasn't, the highest or else the lowest; None: there is none."""
    if not ids.numel():
        return None
    low, high = int(ids.min()), int(ids.max())
    if rows is not None and high >= rows:
        return high
    return low if low < 0 else None


def find_tables(program: Program, lookups: list[Node], layers: list[LinearLayer]) -> list[Table]:
    """The tables of ``lookups``; ``layers`` are all linear layers, from ``find_linears`` with these look-ups.

    Raises:
        LincompileError: NaN or infinity in a table.
        RefusedError: there is none, or something else reads one in float.
    """
    module = program.graph_module
    tables: dict[int, Table] = {}
    for node in lookups:
        path = str(node.args[0].target)  # type: ignore[union-attr]
        parameter = get_attribute(module, path)
        table = tables.setdefault(id(parameter), Table(path, [], *parameter.shape))
        table.lookups.append(node)
    if not tables and not any(target_of(node) is LOOKUP for node in module.graph.nodes):
        raise RefusedError("quantize: the model has no embedding table that its tokens index: leave embeddings out")
    readers = readers_of(module)
    for key, table in tables.items():
        parameter = get_attribute(module, table.weight)
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != 2 or not parameter.is_floating_point():
            raise RefusedError(f"quantize: the embedding '{table.weight}' is no float parameter with two axes")
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise LincompileError(f"quantize: the embedding '{table.weight}' holds NaN or infinity; repair the model")
        table.head = next((layer for layer in layers if get_attribute(module, layer.weight) is parameter), None)
        calls = {call.node for call in table.head.calls} if table.head else set()
        others = [node for node in readers.get(key, []) if node not in calls and node not in table.lookups]
        reason = table.head.reason if table.head else None
        if others:
            reason = f"{others[0].target} reads it, too"
        if reason is not None:
            raise RefusedError(f"quantize: the embedding '{table.weight}' can't be packed: {reason}")
        if table.head is not None:
            table.weight = table.head.weight
    return list(tables.values())


def table_codes(weight: Tensor, method: str, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 codes ``[V, K]`` and float16 scales: to nearest for ``rtn``, otherwise at scales of least squared error.

    Raises:
        ValueError: a row that float16 scales can't hold.
    """
    ones = torch.ones(weight.shape[1], device=weight.device)
    parts = []
    for rows in weight.split(_ROWS):  # type: ignore[no-untyped-call]
        plain = quantize_weight(rows, group_size)
        parts.append(plain if method == "rtn" else clip(rows.float(), ones, group_size, 6))
    return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])


def pack_table(module: GraphModule, table: Table, codes: Tensor, scale: Tensor, group_size: int) -> dict[str, Any]:
    """Make the look-ups read planes ``<weight>_hi``, ``<weight>_lo`` and ``<weight>_scale``, and return the record.

    The float table stays for the caller to delete, once a tied head has been replaced as well.
    """
    weight = get_attribute(module, table.weight)
    hi, lo = pack(codes, group_size)
    planes = {"_hi": hi, "_lo": lo, "_scale": scale}
    for suffix, tensor in planes.items():
        set_tensor(module, table.weight + suffix, tensor)
    for node in table.lookups:
        build = Builder(module, node)
        operands = [build.attribute(table.weight + suffix, tensor) for suffix, tensor in planes.items()]
        dtype = node.meta["val"].dtype
        node.replace_all_uses_with(build(LOOKUP, node.args[1], *operands, table.width, group_size, dtype))
        module.graph.erase_node(node)
    finish(module)
    size = sum(tensor.numel() * tensor.element_size() for tensor in planes.values())
    return {
        "weight": table.weight,
        "rows": table.rows,
        "width": table.width,
        "head": None if table.head is None else table.head.name,
        "bytes_before": weight.numel() * weight.element_size(),
        "bytes_after": size,
        "bytes_per_weight": round(size / weight.numel(), 5),
        "sqnr_db": round(sqnr_db(weight, dequantize(codes, scale, group_size)), 2),
    }


__all__ = ["LOOKUP", "Table", "find_tables", "pack_table", "table_codes", "token_lookups", "vocabulary"]
