"""Low-rank additions to the linear layers of a training graph: W + up·down, up zero at the start.

LoRA (arXiv 2106.09685) in weight space: the sum is formed in the graph once a step, so every spelling of a linear
layer is served and merging is one addition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..errors import LincompileError
from ..graph import Builder, aten, finish, get_attribute, set_tensor, target_of, value_of
from ..linearize import PROJECTIONS
from ..program import Program

PREFIX = "lincompile_lora"


@dataclass
class Addition:
    """``up [n, R]`` and ``down [R, m]``, added to the parameter ``[n, m]`` under ``name``."""

    name: str
    up: nn.Parameter
    down: nn.Parameter


def add_lora(module: GraphModule, rank: int, seed: int = 0) -> list[Addition]:
    """Adds ``up @ down`` to every matrix that only linear layers read; registers both as parameters of the graph.

    Raises:
        LincompileError: there is no such matrix.
    """
    additions: list[Addition] = []
    generator = torch.Generator().manual_seed(seed)
    by_target: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            by_target.setdefault(str(node.target), []).append(node)
    for target, nodes in by_target.items():
        weight = get_attribute(module, target)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not all(_feeds_linears(node) for node in nodes):
            continue
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        index = len(additions)
        addition = Addition(
            target,
            nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device)),
            nn.Parameter(down.to(weight)),
        )
        additions.append(addition)
        names = {part: f"{PREFIX}.{index}.{part}" for part in ("up", "down")}
        set_tensor(module, names["up"], addition.up)
        set_tensor(module, names["down"], addition.down)
        for node in nodes:
            make = Builder(module, node.next)
            up, low = (make.attribute(name, get_attribute(module, name)) for name in names.values())
            summed = make(aten.add.Tensor, node, make(aten.mm.default, up, low))
            for user in [user for user in node.users if user is not summed]:
                user.replace_input_with(node, summed)
    if not additions:
        raise LincompileError("--train lora: no linear layer's weights were found; use --train full")
    finish(module)
    return additions


def merge_lora(student: Program, additions: list[Addition]) -> None:
    """Adds the trained products to the student's own parameters, in place."""
    with torch.no_grad():
        for addition in additions:
            weight = get_attribute(student.graph_module, addition.name)
            weight.add_((addition.up.float() @ addition.down.float()).to(weight.dtype))


def _feeds_linears(node: Node) -> bool:
    """Whether only projections read the matrix, through transposes at most (an embedding table doesn't qualify)."""
    users = list(node.users)
    if not users:
        return False
    for user in users:
        if target_of(user) in (aten.transpose.int, aten.t.default, aten.permute.default):
            if not _feeds_linears(user):
                return False
        elif target_of(user) not in PROJECTIONS or user.args[0] is node or not _is_matrix_of(user, node):
            return False
    return True


def _is_matrix_of(user: Node, node: Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() == 2 and node in user.args
