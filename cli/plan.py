"""``lincompile MODEL --plan``: what a compilation would do, from shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..lowering.options import Options


def print_plan(model: str, asked: Options, *, builder: str | None, trust: bool, as_json: bool) -> None:
    """Prints the plan: sites, parameters, bytes before and after, state against KV cache.

    Raises:
        LincompileError: the model can't be captured, the request changes nothing, or an adapter is for other sites.
    """
    from ..lowering.artefact.report import human_bytes
    from ..lowering.compiler import prove, rewrite
    from ..passes.distil.adapter import check_adapter
    from ..passes.plan import plan
    from .inspect import site_table

    loaded = common.load(model, builder=builder, trust=trust, device=asked.device, dtype=asked.dtype, meta=True)
    program = common.captured(loaded)
    told = len(program.notes)
    with common.working("proving and rewriting, on shapes alone"):
        teacher = prove(program, asked)
        student = rewrite(teacher, asked)
        if asked.adapter is not None:
            check_adapter(Path(asked.adapter), student)
        document = plan(teacher, student, asked.quant, embeddings=asked.quant_embeddings)
    for remark in teacher.notes[told:]:
        common.note(remark)
    document |= {"format": loaded.format, "notes": [*loaded.notes, *program.notes]}
    if as_json:
        common.print_json(document)
        return
    out = common.stdout()
    out.print(site_table(student.sites, verbose=False))
    out.print(f"parameters {document['parameters']:,} (+ {document['parameters_added']:,} of linear attention)")
    sizes = document["weight_bytes"]
    out.print(f"weights    {human_bytes(sizes['before'])} → {human_bytes(sizes['after'])} (quant: {asked.quant})")
    out.print(context_table(document["contexts"]))
    out.print("[dim]computed from shapes, batch 1; FLOPs per token, of prefill averaged over the context[/]")


def context_table(rows: list[dict[str, Any]]) -> Any:
    """Per context length: KV cache and state, FLOPs of prefill and decode, before → after."""
    from rich.table import Table

    from ..lowering.artefact.report import human_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("context", "KV cache", "→ KV cache + state", "prefill MFLOP", "→", "decode MFLOP", "→"):
        table.add_column(title, justify="right")
    for row in rows:
        before, after = row["softmax"], row["compiled"]
        held = f"{human_bytes(after['kv_cache_bytes'])} + {human_bytes(after['state_bytes'])}"
        flops = [
            f"{side[f'{phase}_flops_per_token'] / 1e6:,.0f}"
            for phase in ("prefill", "decode")
            for side in (before, after)
        ]
        table.add_row(f"{row['context']:,}", human_bytes(before["kv_cache_bytes"]), held, *flops)
    return table
