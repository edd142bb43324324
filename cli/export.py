"""``lincompile export DIR --target onnx``: an artefact's program for another runtime."""

from __future__ import annotations

from pathlib import Path

import click

from . import common


@click.command("export")
@click.argument("directory", metavar="DIR")
@click.option("--target", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option(
    "--layout",
    type=click.Choice(["planes", "int8"]),
    default="planes",
    show_default=True,
    help="Six bits in memory, or eight and faster.",
)
@click.option("--opset", type=int, default=21, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; by default DIR/onnx.")
@common.json_option
@common.verbose_option
def command(
    directory: str, target: str, layout: str, opset: int, output: Path | None, as_json: bool, verbose: bool
) -> None:
    """Write the artefact's program as an ONNX model that stock onnxruntime runs."""
    from ..lowering.onnx.export import export_onnx
    from ..lowering.report import human_bytes

    artefact = common.open_checked(directory)
    folder = artefact.directory / "onnx" if output is None else output
    special = {"eos_token_id": artefact.eos_ids} if artefact.eos_ids else {}
    with common.working("exporting to ONNX (minutes for a large model)"):
        report = export_onnx(artefact.step, folder, layout=layout, opset=opset, special_tokens=special)
    for remark in report.notes:
        common.note(remark)
    if as_json:
        common.print_json(report.record())
    else:
        common.stdout().print(f"wrote {report.path}: {human_bytes(report.bytes)} in {report.seconds:.0f} s")
