"""``lincompile export DIR --target onnx|aot``: an artefact's program for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.package import Artefact


def opset_option(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    """``--opset``: a number, or ``std``."""
    if value == "std":
        return value
    if not value.isdigit():
        raise click.BadParameter(f"'{value}' is neither a number nor 'std'", ctx, param)
    return int(value)


@click.command("export")
@click.argument("directory", metavar="DIR")
@click.option(
    "--target",
    type=click.Choice(["onnx", "aot"]),
    default="onnx",
    show_default=True,
    help="onnx: a model for stock onnxruntime; aot: machine code for this torch (AOTInductor).",
)
@click.option(
    "--layout",
    type=click.Choice(["planes", "int8", "native"]),
    default="planes",
    show_default=True,
    help="Six bits in memory; eight and faster; or six with kernels of the native library where it can be compiled.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["float", "int6"]),
    default="float",
    show_default=True,
    help="int6 also rounds the embedding, and a head tied to it, to six bits.",
)
@click.option(
    "--opset",
    default="21",
    show_default=True,
    callback=opset_option,
    metavar="21..23|std",
    help="std writes operators of ai.onnx alone: portable, and slower where there is a kernel for the others.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; by default DIR/TARGET.")
@common.device_option
@common.json_option
@common.verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    directory: str,
    target: str,
    layout: str,
    embeddings: str,
    opset: int | str,
    output: Path | None,
    device: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write the artefact's program as an ONNX model that stock onnxruntime runs, or as compiled code."""
    from ..lowering.artefact.files import forget_files, record_files
    from ..lowering.artefact.report import human_bytes

    given = [
        name
        for name in ("layout", "embeddings", "opset")
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    ]
    if target == "aot" and given:
        raise click.UsageError(f"--{given[0]} belongs to --target onnx")
    if target == "onnx" and device != "cpu":
        raise click.UsageError("--device belongs to --target aot: an ONNX model is exported on the CPU")
    artefact = common.open_checked(directory, device)
    folder = artefact.directory / target if output is None else output
    forget_files(artefact.directory, folder)
    try:
        report = _export(artefact, folder, target, layout, embeddings, opset)
    finally:  # also where it is refused: an earlier export is still there
        record_files(artefact.directory, folder)
    for remark in report.get("notes", ()):
        common.note(remark)
    if as_json:
        common.print_json(report)
    else:
        common.stdout().print(f"wrote {report['path']}: {human_bytes(report['bytes'])} in {report['seconds']:.0f} s")


def _export(
    artefact: Artefact, folder: Path, target: str, layout: str, embeddings: str, opset: int | str
) -> dict[str, Any]:
    if target == "aot":
        from ..lowering.aot import export_aot

        with common.working("compiling with AOTInductor (minutes for a large model)"):
            compiled = export_aot(artefact.step, folder)
        return compiled.record()
    from ..lowering.onnx.export import export_onnx

    special = {"eos_token_id": artefact.eos_ids} if artefact.eos_ids else {}
    with common.working("exporting to ONNX (minutes for a large model)"):
        written = export_onnx(
            artefact.step, folder, special_tokens=special, layout=layout, embeddings=embeddings, opset=opset
        )
    return written.record()
