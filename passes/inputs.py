"""What the model's inputs are given by whoever has tokens alone: artefacts, calibration, distillation, checks.

Those have the tokens, their positions, and which of them are real. An input's name says what it could be for; what 1
means in a padding mask is known from the attention that reads it (``read_by``) or from what it does (``settle``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from .errors import LincompileError
from .graph import SHAPE_ONLY, aten, target_of, tensor_of
from .program import Program, ProgramInput, is_lincompile_op

TOKEN_TYPES = re.compile(r"token_?types?|segment", re.IGNORECASE)
LEFT = 0.01  # of what padded tokens change in others without a mask, what may be left with it


def is_token_types(name: str, value: Tensor) -> bool:
    """Whether an input says which segment a token belongs to: one segment, 0, where there is nothing but tokens."""
    return bool(TOKEN_TYPES.search(name)) and value.dim() == 2 and not value.is_floating_point()


def token_types(program: Program) -> list[str]:
    """Names of the inputs that hold token types, as far as the program reads them."""
    nodes = [program.placeholder(item.name) for item in program.inputs if item.role == "other"]
    return [node.name for node in nodes if is_token_types(node.name, tensor_of(node)) and readers(program, node.name)]


def readers(program: Program, name: str) -> list[Node]:
    """Who reads an input's values (many read its sizes alone)."""
    return [user for user in program.placeholder(name).users if target_of(user) not in SHAPE_ONLY]


def reads_padding(program: Program) -> bool:
    """Whether a mask says which tokens are padding, as far as is known."""
    return any(item.role == "mask" and item.inverted is not None for item in program.inputs)


def beyond_text(program: Program) -> list[str]:
    """Names of the inputs that are no text's tokens, nor their positions or mask."""
    first = program.input_with_role("tokens")
    return [item.name for item in program.inputs if item is not first and item.role not in ("mask", "positions")]


def model_values(program: Program, tokens: Tensor) -> dict[str, Tensor]:
    """The program's inputs for unpadded token windows ``[B, T]``.

    Raises:
        LincompileError: the program takes something that tokens don't determine.
    """
    real = torch.ones_like(tokens, dtype=torch.bool)
    types = token_types(program)
    first = program.input_with_role("tokens")
    values: dict[str, Tensor] = {}
    for item in program.inputs:
        node = program.placeholder(item.name)
        if item is first:
            value = tokens
        elif item.role == "mask":
            value = item.masking(real)
        elif item.role == "positions":
            value = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).contiguous()
        elif item.name in types or (not readers(program, item.name) and tensor_of(node).dim() == 2):
            value = torch.zeros_like(tokens)
        else:
            raise LincompileError(
                f"the model takes '{item.name}', which text doesn't give: distil or calibrate it from Python with your "
                "own data, or give that input a fixed value in a module around the model"
            )
        values[item.name] = value.to(tensor_of(node).dtype)
    return values


def read_by(program: Program, readings: Mapping[str, Mapping[bool, str]]) -> None:
    """Records what 1 means in the mask inputs that attention was shown to read as padding.

    Args:
        readings: for each of these inputs, the path of a site that takes 1 for a real token (under False), and of one
            that takes it for padding (True).
    """
    for index, item in enumerate(program.inputs):
        found = dict(readings.get(item.name, {}))
        if not found:
            continue
        if item.inverted is not None:
            found.setdefault(item.inverted, "another site")
        outside = _read_elsewhere(program, item.name)
        if item.role != "mask" and outside:
            continue  # not a padding mask alone: it stays an input of its own
        problem = ""
        if len(found) > 1:
            problem = (
                f"1 in the input '{item.name}' is a real token for the attention at '{found[False]}' and padding for "
                f"that at '{found[True]}', so no mask can be given: give each a mask of its own, or invert one"
            )
        elif True in found and outside:
            problem = (
                f"1 in the input '{item.name}' is padding for the attention at '{found[True]}', and "
                f"'{outside[0].name}' reads it, too, where what 1 means isn't proved, so no mask can be given: let a "
                f"module around the model take a mask of 1 for real tokens and give '{item.name}' its inverse"
            )
        program.inputs[index] = replace(item, role="mask", inverted=True in found, problem=problem)


def _read_elsewhere(program: Program, name: str) -> list[Node]:
    """Who reads the values of a mask input, but for the padding masks of proved attention."""
    own: set[Node] = set()
    pending = [n.args[3] for n in program.graph_module.graph.nodes if is_lincompile_op(n, "softmax_attention")]
    while pending:
        node = pending.pop()
        if isinstance(node, Node) and node not in own:
            own.add(node)
            pending += node.args if target_of(node) is aten.logical_and.default else []
    return [user for user in readers(program, name) if user not in own]


def settle(program: Program) -> None:
    """Finds out, by running the program, what 1 means in each mask that no proved attention reads.

    A mask is one of padding if padded tokens change what others get without it, and don't with it; of packed sequences
    that is true both ways round, and nothing is known then. Programs without weights aren't run.
    """
    if any(t.is_meta for t in program.graph_module.parameters()):
        return
    for index, item in enumerate(program.inputs):
        if item.role != "mask" or item.inverted is not None or item.problem or not readers(program, item.name):
            continue
        ways = [inverted for inverted in (False, True) if _removes_padding(program, replace(item, inverted=inverted))]
        problem = (
            f"the model also takes '{item.name}', and no proved attention reads it as a padding mask, nor does it hide "
            "padded tokens from the others: give it a fixed value in a module around the model, or let the model take "
            "a mask of 1 for real tokens and 0 for padding"
        )
        program.inputs[index] = replace(item, inverted=ways[0]) if len(ways) == 1 else replace(item, problem=problem)


def _removes_padding(program: Program, item: ProgramInput) -> bool:
    """Whether others don't see padded tokens; at the right, too: a row may give what its first token gives alone."""
    tokens = program.input_with_role("tokens")
    if tokens is None or program.example[item.name].shape != program.example[tokens.name].shape:
        return False
    length = program.example[tokens.name].shape[1]
    padding = length // 3
    return any(_hides(program, item, tokens, places) for places in (slice(padding), slice(length - padding, None)))


@torch.no_grad()
def _hides(program: Program, item: ProgramInput, tokens: ProgramInput, places: slice) -> bool:
    """Whether other tokens at these places of the first row change what the rest gets, and with the mask don't."""
    ids = program.example[tokens.name]
    other = ids.clone()
    other[0, places] = (ids[0, places] + 1) % max(int(ids.max()) + 1, 2)
    every = torch.ones_like(ids, dtype=torch.bool)
    real = every.clone()
    real[0, places] = False

    def first_row(ids: Tensor, mask: Tensor) -> Tensor:
        given = program.example | {tokens.name: ids}
        for each in program.inputs:
            if each.name == item.name or (each.role == "mask" and each.inverted is not None and not each.problem):
                value = item.masking(mask) if each.name == item.name else each.masking(every)
                given[each.name] = value.to(given[each.name].dtype)
        result = program(**given)
        row = (result if isinstance(result, Tensor) else result[0])[0].double()
        return row[real[0]] if row.dim() > 1 and row.shape[0] == ids.shape[1] else row

    try:
        without, left = (float((first_row(other, m) - first_row(ids, m)).abs().max()) for m in (every, real))
    except (RuntimeError, IndexError, LincompileError):  # the model's own: such a mask or such tokens aren't for it
        return False
    return without > 0 and left <= LEFT * without
