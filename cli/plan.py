"""``lincompile MODEL --plan``: what a compilation would do, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import common

if TYPE_CHECKING:
    from ..lowering.compiler import Options


def print_plan(model: str, asked: Options, *, builder: str | None, trust: bool, as_json: bool) -> None:
    """Prints the plan: sites, parameters, bytes before and after, state against KV cache.

    Raises:
        LincompileError: the model can't be captured, or the request changes nothing.
    """
    from ..lowering.compiler import rewrite
    from ..lowering.report import human_bytes
    from ..passes.canonicalize import Canonicalize
    from ..passes.identity import ProveAttention
    from ..passes.pipeline import Pipeline
    from ..passes.plan import plan
    from .inspect import site_table

    loaded = common.load(model, builder=builder, trust=trust, device=asked.device, dtype=asked.dtype, meta=True)
    program = common.captured(loaded)
    with common.working("proving and rewriting, on shapes alone"):
        teacher = Pipeline([Canonicalize(), ProveAttention(alibi=asked.alibi)])(program)
        student = rewrite(teacher, asked)
        document = plan(teacher, student, asked.quant)
    document |= {"format": loaded.format, "notes": [*loaded.notes, *program.notes]}
    if as_json:
        common.print_json(document)
        return
    out = common.stdout()
    out.print(site_table(student.sites, verbose=False))
    out.print(f"parameters {document['parameters']:,} (+ {document['parameters_added']:,} of linear attention)")
    sizes = document["weight_bytes"]
    out.print(f"weights    {human_bytes(sizes['before'])} → {human_bytes(sizes['after'])} (quant: {asked.quant})")
    for row in document["contexts"]:
        before, after = row["softmax"], row["compiled"]
        held = after["kv_cache_bytes"] + after["state_bytes"]
        out.print(
            f"at {row['context']:>7,} tokens: KV cache {human_bytes(before['kv_cache_bytes'])} → {human_bytes(held)}, "
            f"decode {before['decode_flops_per_token'] / 1e6:,.0f} → {after['decode_flops_per_token'] / 1e6:,.0f} "
            "MFLOP per token"
        )
