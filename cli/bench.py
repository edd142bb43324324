"""``lincompile bench DIR``: speed, state and memory of an artefact."""

from __future__ import annotations

import click

from . import common


@click.command("bench")
@click.argument("directory", metavar="DIR")
@click.option("--context", type=common.count, default="1024", show_default=True, help="Prompt tokens.")
@click.option("--new-tokens", type=common.count, default="32", show_default=True, help="Tokens to decode.")
@common.runtime_option
@common.device_option
@common.json_option
@common.verbose_option
def command(
    directory: str, context: int, new_tokens: int, runtime: str, device: str, as_json: bool, verbose: bool
) -> None:
    """Prefill and decode tokens per second, bytes of state, peak memory (one sequence)."""
    from ..lowering.artefact.report import human_bytes
    from ..lowering.evaluation.perplexity import bench
    from .generate import open_session

    artefact = common.open_checked(directory, device)
    session = open_session(artefact, runtime)
    with common.working(f"{context} tokens of prompt, {new_tokens} new"):
        result = {"runtime": runtime, **bench(session, context=context, new_tokens=new_tokens)}
    if as_json:
        common.print_json(result)
        return
    out = common.stdout()
    out.print(f"prefill {result['prefill_tokens_per_second']:.1f} tokens/s ({context} tokens)")
    out.print(f"decode  {result['decode_tokens_per_second']:.1f} tokens/s")
    out.print(f"state   {human_bytes(result['state_bytes'])}, peak memory {human_bytes(result['peak_memory_bytes'])}")
