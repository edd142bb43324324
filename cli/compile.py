"""``lincompile MODEL [options]``: capture, prove, rewrite, distil, quantize, package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from ..lowering.compiler import Compiled

ATTENTION = ("gla", "hedgehog", "lawcat", "gated-delta", "softmax")


def quant_option(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """``--quant``, checked before anything is loaded."""
    from ..passes.errors import LincompileError
    from ..passes.quantize import parse_plan

    try:
        parse_plan(value)
    except LincompileError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


def keep_option(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """``--keep-softmax``, checked before anything is loaded."""
    from ..passes.errors import LincompileError
    from ..passes.linearize import parse_keep

    if value is not None:
        try:
            parse_keep(value)
        except LincompileError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return value


def read_recipe(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """``--config``: option names and values that stand in for options not given on the command line."""
    if value is None:
        return
    from ..passes.errors import LincompileError

    try:
        import yaml
    except ImportError:
        raise LincompileError("--config needs the 'pyyaml' package: pip install pyyaml") from None
    try:
        # As text, as on the command line: 17.10 is a KV head there, not a number.
        recipe = yaml.load(value.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise LincompileError(f"--config {value} can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LincompileError(f"--config {value} isn't a YAML file: {error}") from error
    if not isinstance(recipe, dict):
        raise click.BadParameter(f"{value} must hold 'option: value' lines", ctx, param)
    names = {option.removeprefix("--"): p.name for p in ctx.command.params for option in p.opts if option[:2] == "--"}
    unknown = [key for key in recipe if str(key) not in names or key == "config"]
    if unknown:
        raise click.BadParameter(f"{value} names an unknown option '{unknown[0]}'", ctx, param)
    ctx.default_map = {
        str(names[key]): str(item) if item not in ("", "~", "null") else None for key, item in recipe.items()
    }


@click.command("compile")
@click.argument("model")
@click.option(
    "--attn",
    type=click.Choice(ATTENTION),
    default="lawcat",
    show_default=True,
    help="Linear attention to rewrite to; softmax = rewrite nothing.",
)
@click.option(
    "--keep-softmax",
    metavar="N|auto:N|I,J,…|I.H,…|heads:N",
    callback=keep_option,
    help="Sites that stay softmax: a number of evenly spaced ones, as many chosen by KL (auto:N), their indices, "
    "single KV heads of sites (17.1,18.2), or the N KV heads that look back by content most (heads:N).",
)
@click.option("--rewrite-sliding", is_flag=True, help="Also rewrite sliding-window sites.")
@click.option("--alibi", is_flag=True, help=common.ALIBI_HELP)
@click.option(
    "--window", type=common.count, metavar="W", help="Keep a softmax window of W beside the linear attention."
)
@click.option(
    "--rotary",
    type=click.Choice(("keep", "remove")),
    help="Linear attention reads q and k after (keep) or before (remove) their rotary embedding. "
    "[default: keep for hedgehog, remove for the gated methods; as an adapter was trained]",
)
@click.option(
    "--quant",
    default="none",
    show_default=True,
    callback=quant_option,
    metavar="none|int6|w6a6|w6a8|w6a16|w8a8|auto:BITS",
    help="int6 = six-bit weights, activations per layer.",
)
@click.option(
    "--quant-method",
    type=click.Choice(("auto", "rtn", "clip", "gptq")),
    default="auto",
    show_default=True,
    help="How weights are rounded; auto = gptq where there is text to calibrate on.",
)
@click.option("--quant-plan", metavar="FILE", help="Schemes per layer: followed if the file is there, else written.")
@click.option("--quant-scores", metavar="FILE", help="Sensitivity scores: resumed if the file is there, and saved.")
@click.option("--quant-embeddings", is_flag=True, help="Also the embedding and the output head, in six bits.")
@click.option(
    "--quant-tune",
    type=click.Choice(("scales", "codes")),
    help="At last, train scales (and norms), or codes as well, against the float model, on --calibrate's text.",
)
@click.option("--quant-tune-steps", type=common.count, help="Steps of 8 windows. [default: 200 without a time]")
@click.option("--quant-tune-time", type=common.duration, help="Tune for so long, such as 5m.")
@click.option("--calibrate", metavar="FILE|hf:NAME", help="Text to calibrate quantization on. [default: --distil's]")
@click.option("--calibrate-tokens", type=common.count, help="So many of its tokens, from all over it. [default: 8192]")
@click.option(
    "--distil", metavar="FILE|hf:NAME", help="Text to distil on (.txt, .json, .jsonl, .parquet, .npy of ids)."
)
@click.option("--tokens", type=common.count, help="Distil on so many tokens, such as 20M.")
@click.option("--time", "seconds", type=common.duration, help="Distil for so long, such as 10m.")
@click.option(
    "--train",
    metavar="none|full|lora:R",
    help="What learns the teacher's logits after attention transfer. [default: full on a GPU, none on a CPU]",
)
@click.option(
    "--cross-entropy",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Share of the text's own next token in what --train learns, beside the teacher's logits.",
)
@click.option(
    "--transfer-loss",
    type=click.Choice(("mse", "weights", "both")),
    help="What attention transfer compares: outputs, attention weights (hedgehog, lawcat), or both. [default: mse]",
)
@click.option("--extend", type=common.count, metavar="LENGTH", help="Go on at this window length, such as 4096.")
@click.option(
    "--retrieval",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Share of --extend's windows that ask for facts in them.",
)
@click.option(
    "--needles",
    type=click.Choice(("facts", "passkeys")),
    default="facts",
    help="What those windows hold: numbers given to words, or pass keys, asked for as by 'lincompile eval --passkey'.",
)
@click.option(
    "--stretch",
    type=click.FloatRange(1),
    default=1.0,
    metavar="R",
    help="States see the text between those facts as up to R times as long, for keys in far longer texts.",
)
@click.option(
    "--echoes",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Share of all training windows that repeat spans of themselves: teaches looking back by content.",
)
@click.option("--length", type=common.count, help="Tokens per training window.")
@click.option("--batch", type=common.count, help="Training windows per step.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File to save distillation to and resume from.")
@click.option(
    "--half-lives",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    metavar="FACTOR",
    help="Trained gates forget so many times as slowly, for texts far longer than those they were trained on.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="File of trained parts to apply instead of distilling; with --distil and a budget, to train on from. Brings "
    "--window, --rotary, --keep-softmax, --rewrite-sliding and --alibi along, and is refused unless MODEL has the "
    "weights or is the file that it was trained for (told by hash), with the same method and sites.",
)
@common.shard_option("Share the tokens of --distil's windows")
@click.option("--target", type=click.Choice(["eager", "triton", "onnx", "aot"]), default="eager", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--plan", is_flag=True, help="Say what would be done, without reading weights; writes nothing.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artefact folder; by default named after MODEL.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=read_recipe,
    help="YAML file with options ('attn: gla'); the command line wins.",
)
@common.model_options
@common.json_option
@common.verbose_option
def command(
    model: str,
    output: Path | None,
    plan: bool,
    as_json: bool,
    verbose: bool,
    builder: str | None,
    trust: bool,
    device: str,
    dtype: str,
    seconds: float | None,
    checkpoint: Path | None,
    adapter: Path | None,
    shard: str | None,
    **options: Any,
) -> None:
    """Compile MODEL into an artefact folder: linear attention, six bits, ready to run."""
    from ..lowering.compiler import compile
    from ..lowering.options import Options
    from ..lowering.package import check_output
    from .reporter import BarReporter

    if options["target"] == "triton" and device == "cpu":
        raise click.UsageError("--target triton needs --device cuda")
    asked = Options(
        **options,
        time=seconds,
        device=device,
        dtype=dtype,
        adapter=None if adapter is None else str(adapter),
        shard=shard,
    )
    asked.check()
    common.check_device(device)
    if plan:
        from .plan import print_plan

        print_plan(model, asked, builder=builder, trust=trust, as_json=as_json)
        return
    folder = output or Path(f"{Path(model.replace(':', '.')).name}-{asked.attn}-{asked.quant}".replace(":", ""))
    check_output(folder)
    with common.ranks(shard, device) as place:
        asked = replace(asked, device=place.device)
        with BarReporter() as reporter:
            compiled = compile(
                model, builder=builder, trust=trust, reporter=reporter, checkpoint=checkpoint, **vars(asked)
            )
            reporter.stage("package")
            if place.first:
                compiled.save(folder)
    if not place.first:
        return
    if as_json:
        common.print_json(summary(compiled, folder))
    else:
        print_summary(compiled, folder)


def summary(compiled: Compiled, folder: Path) -> dict[str, Any]:
    """The JSON of a compilation."""
    from ..lowering.package import bytes_on_disk

    manifest = compiled.manifest()
    quantization = manifest["quantization"]
    return {
        "output": str(folder),
        "sites": manifest["sites"],
        "rewritten": sum(site.method != "softmax" for site in compiled.sites),
        "parameters": manifest["parameters"],
        "bytes": bytes_on_disk(folder),
        "state_bytes": {str(length): compiled.step.state_bytes(1, length) for length in (8192, 32768)},
        "distillation": manifest["distillation"],
        "quantization": quantization,
        "step_max_error": compiled.step.max_error,
        "seconds": compiled.seconds,
        "notes": compiled.notes,
    }


def print_summary(compiled: Compiled, folder: Path) -> None:
    """What was done, for people."""
    from ..lowering.artefact.report import human_bytes
    from ..lowering.package import bytes_on_disk

    out = common.stdout()
    sites = compiled.sites
    rewritten = [site for site in sites if site.method != "softmax"]
    out.print(
        f"[bold]{folder}[/bold]: {human_bytes(bytes_on_disk(folder))}, {compiled.teacher.parameters:,} parameters"
    )
    if sites:
        window = f" beside a window of {compiled.options.window}" if compiled.options.window and rewritten else ""
        what = "stay" if compiled.options.attn == "softmax" else "are"
        count = len(sites) if compiled.options.attn == "softmax" else len(rewritten)
        out.print(f"{count} of {len(sites)} attention sites {what} {compiled.options.attn}{window}")
    quantization = compiled.manifest()["quantization"]
    print_sensitivity(quantization)
    if (tuning := (quantization or {}).get("tuning")) and tuning["kept"]:
        out.print(
            f"{tuning['mode']} tuned on {tuning['tokens']:,} tokens in {tuning['seconds']:.0f} s: KL to the float "
            f"model {tuning['kl']['before']:.4f} → {tuning['kl']['after']:.4f} nats per token"
        )
    for site in sites:
        if site.method == "softmax" and compiled.options.attn != "softmax":
            out.print(f"  [yellow]{site.path}[/] stays softmax: {site.reason}")
    if compiled.transfer is not None and compiled.transfer.after:
        before, after = (sum(e.values()) / len(e) for e in (compiled.transfer.before, compiled.transfer.after))
        out.print(
            f"distilled on {compiled.transfer.tokens:,} tokens in {compiled.transfer.seconds:.0f} s: "
            f"relative error per layer {before:.3f} → {after:.3f}"
        )
    logits = compiled.distilled.logits if compiled.distilled else None
    if logits is not None:
        out.print(
            f"then on {logits.tokens:,} tokens in {logits.seconds:.0f} s: KL to the teacher "
            f"{logits.before:.3f} → {logits.after:.3f} nats per token"
        )
    longer = compiled.distilled.extension if compiled.distilled else None
    if longer is not None:
        out.print(
            f"then on {longer.tokens:,} tokens in longer windows in {longer.seconds:.0f} s: KL "
            f"{longer.before:.3f} → {longer.after:.3f}"
        )
    if compiled.step.states:
        out.print(f"state per sequence at 32,768 tokens: {human_bytes(compiled.step.state_bytes(1, 32768))}")
        prompt = "--prompt-ids 1,2,3" if compiled.loaded.tokenizer is None else "--prompt 'The capital of France is'"
        out.print(f"next: lincompile generate {folder} {prompt}", soft_wrap=True)


def print_sensitivity(quantization: dict[str, Any] | None, most: int = 8) -> None:
    """A bar per layer for the most sensitive ones; ``report.html`` has them all."""
    from ..lowering.artefact.report import layer_losses

    rows = sorted(layer_losses(quantization or {}), key=lambda row: -row[2])
    if not rows or rows[0][2] <= 0:
        return
    out = common.stdout()
    width = max(len(name) for name, _, _ in rows[:most])
    shown = f"the {min(most, len(rows))} worst of {len(rows)}"
    out.print(f"what quantization is predicted to cost, in nats per token ({shown}):")
    for name, scheme, loss in rows[:most]:
        bar = "█" * max(1, round(30 * loss / rows[0][2]))
        out.print(f"  {name:<{width}} {scheme}  [cyan]{bar}[/] {loss:.1e}", soft_wrap=True)
