"""The step graph held against the full program, by running both: in chunks, padded, and row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ..errors import RefusedError
from ..graph import module_path, same_dim, source_line, tensor_of
from ..inputs import reads_padding
from ..program import Program

if TYPE_CHECKING:
    from ..stateful import StepProgram

TOLERANCE = 1e-4  # relative
# In half precision chunks and batches round differently: their products have other shapes. 30 layers of bfloat16 differ
# by two units of the outputs' last place, 8 of float16 by one; what mixes tokens differs by far more.
UNITS = 8


def tolerance_of(program: Program) -> float:
    """``TOLERANCE``, or ``UNITS`` roundings of the narrowest float type that the program's weights have."""
    tensors = [*program.graph_module.parameters(), *program.graph_module.buffers()]
    units = [torch.finfo(x.dtype).eps for x in tensors if x.dtype in (torch.bfloat16, torch.float16)]
    return max(TOLERANCE, UNITS * max(units, default=0.0))


def check_step(program: Program, step: StepProgram, tokens: str) -> float:
    """Largest relative difference between chunked steps and the full program, with left padding where it applies.

    Raises:
        RefusedError: it exceeds :func:`tolerance_of` the program, or a row gives something else alone than in a batch:
            a session takes prompts together that have nothing to do with each other.
    """
    limit = min(program.max_positions or 9, 9)
    chunks = [limit - limit // 2 - 1, 1, limit // 2] if limit >= 4 else [1] * limit
    example = program.example[tokens]
    device = example.device
    generator = torch.Generator().manual_seed(3)
    if example.is_floating_point():
        ids = torch.randn(2, limit, *example.shape[2:], generator=generator).to(example)
    else:
        high = int(example.max()) + 1
        ids = torch.randint(0, max(high, 2), (2, limit), generator=generator).to(device)
    padded = reads_padding(program)
    mask = torch.ones(2, limit, dtype=torch.bool, device=device)
    if padded and not step.uniform_positions:
        mask[0, : limit // 3] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    inputs: dict[str, Tensor] = {}
    for item in program.inputs:
        fake = tensor_of(program.placeholder(item.name))
        source = item.masking(mask) if item.role == "mask" else positions if item.role == "positions" else ids
        inputs[item.name] = source.to(fake.dtype)
    worst = 0.0
    with torch.no_grad():
        full = _first(program(**inputs))
        if not isinstance(tensor_of(program.placeholder(tokens)).shape[0], int):
            _check_rows(program, inputs, full)
        states = step.initial_states(2, device)
        parts, begin = [], 0
        for size in chunks:
            piece = slice(begin, begin + size)
            out, states = step(ids[:, piece], positions[:, piece], mask[:, piece], states)
            parts.append(out)
            begin += size
        if same_dim(full.shape[1], limit) and parts[-1].shape[1] == chunks[-1]:
            difference = (torch.cat(parts, 1) - full)[mask]
        else:  # models that return only the last token's output
            difference = parts[-1][:, -1] - full[:, -1]
        worst = float(difference.abs().max() / full.abs().max().clamp(min=1e-6))
    if not worst <= tolerance_of(program):
        raise RefusedError(
            f"no step form: in chunks the model differs from the full forward by {worst:.2g} (relative); "
            "it mixes tokens somewhere other than its attention"
        )
    return worst


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _check_rows(program: Program, inputs: dict[str, Tensor], full: Tensor) -> None:
    """Raises ``RefusedError`` where a row (the last: it isn't padded) differs alone from what it is in the batch."""
    alone = {name: value[-1:] if value.dim() > 1 else value for name, value in inputs.items()}
    difference = (_first(program(**alone))[0] - full[-1]).abs().max() / full.abs().max().clamp(min=1e-6)
    tolerance = tolerance_of(program)
    if difference <= tolerance:
        return
    node = _first_to_differ(program, inputs, alone, 10 * tolerance)
    where = ""
    if node is not None:
        path, line = module_path(node), source_line(node)
        where = f" first in '{node.target}'{f' of {path!r}' if path else ''}{f' ({line})' if line else ''}"
    raise RefusedError(
        f"no step form: rows of a batch influence one another,{where}: a prompt alone gives outputs that differ by "
        f"{float(difference):.2g} (relative) from those it gives beside another"
    )


class _Recorder(Interpreter):
    """Keeps every tensor a graph computes."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.seen: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen[n] = result
        return result


def _first_to_differ(
    program: Program, inputs: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float
) -> Node | None:
    """The first node whose last row isn't what it is when that row runs alone."""
    names = [item.name for item in program.inputs]
    both, single = _Recorder(program), _Recorder(program)
    both.run(*(inputs[name] for name in names))
    single.run(*(alone[name] for name in names))
    for node, value in both.seen.items():
        other = single.seen[node]
        if node.op != "call_function" or not value.is_floating_point() or value.shape[1:] != other.shape[1:]:
            continue
        a, b = value[-1] if value.dim() else value, other[-1] if other.dim() else other
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance / 100, equal_nan=True):
            return node
    return None
