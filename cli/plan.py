"""``lincompile MODEL --plan``: what a compilation would do, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..lowering.compiler import Options
    from ..passes.program import Program

CONTEXTS = (8192, 32768)


def print_plan(model: str, asked: Options, *, builder: str | None, trust: bool, as_json: bool) -> None:
    """Prints the plan: sites, parameters, bytes before and after, state against KV cache.

    Raises:
        LincompileError: the model can't be captured, or the request changes nothing.
    """
    from ..lowering.compiler import deployable, rewrite
    from ..lowering.report import human_bytes
    from ..passes.pipeline import Pipeline
    from .inspect import site_table

    loaded = common.load(model, builder=builder, trust=trust, device=asked.device, dtype=asked.dtype, meta=True)
    program = common.captured(loaded)
    with common.working("proving and rewriting, on shapes alone"):
        teacher = Pipeline("canonicalize,prove")(program)
        student = rewrite(teacher, asked)
        notes: list[str] = []
        step = deployable(student, notes)
    document: dict[str, Any] = {
        "sites": [site.record() for site in student.sites],
        "parameters": teacher.parameters,
        "parameters_added": max(0, student.parameters - teacher.parameters),
        "bytes": weight_bytes(student, asked.quant),
        "state_bytes": {str(n): step.state_bytes(1, n) for n in CONTEXTS},
        "kv_cache_bytes": {str(n): kv_cache_bytes(teacher, n) for n in CONTEXTS},
        "format": loaded.format,
        "notes": [*loaded.notes, *program.notes, *notes],
    }
    if as_json:
        common.print_json(document)
        return
    out = common.stdout()
    out.print(site_table(student.sites, verbose=False))
    out.print(f"parameters {document['parameters']:,} (+ {document['parameters_added']:,} of linear attention)")
    sizes = document["bytes"]
    out.print(f"weights    {human_bytes(sizes['float'])} → {human_bytes(sizes['compiled'])} ({asked.quant})")
    for length in CONTEXTS:
        state, cache = document["state_bytes"][str(length)], document["kv_cache_bytes"][str(length)]
        out.print(f"state      {human_bytes(state)} against {human_bytes(cache)} of KV cache at {length:,} tokens")
    for remark in notes:
        common.note(remark)


def weight_bytes(program: Program, quant: str) -> dict[str, int]:
    """Bytes of all parameters as they are, and with the linear layers packed as ``quant`` asks.

    A plan that chooses per layer (``int6``, ``auto:BITS``) is counted at its average bits.
    """
    from ..passes.linear_layers import find_linears
    from ..passes.schemes import SCHEMES, parse_plan

    plain = sum(parameter.nbytes for parameter in program.graph_module.parameters())
    spec = parse_plan(quant)
    if spec.kind == "none":
        return {"float": plain, "compiled": plain}
    packed = plain
    six = SCHEMES["w6a8"]
    for layer in find_linears(program.graph_module):
        if layer.reason is None:
            own = layer.matrix(program.graph_module).nbytes
            size = (spec.scheme or six).weight_bytes(layer.out_features, layer.in_features)
            if spec.effective_bits is not None:
                size = int(layer.weights * spec.effective_bits / 8)
            packed += size - own
    return {"float": plain, "compiled": packed}


def kv_cache_bytes(teacher: Program, tokens: int) -> int:
    """Bytes of the teacher's KV cache for one sequence, in its own dtype; sliding sites keep their window."""
    total = 0
    size = next(teacher.graph_module.parameters()).element_size()
    for site in teacher.sites:
        kept = min(tokens, site.window) if site.window else tokens
        total += kept * (site.kv_heads or 0) * ((site.head_dim or 0) + (site.value_dim or site.head_dim or 0)) * size
    return total
