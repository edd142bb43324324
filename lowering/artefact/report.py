"""``report.html``: the manifest for people, one self-contained page without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #667085; --line: #e3e7ee; --bar: #3b6fe0; --bad: #c2410c;
        --back: #fff; --card: #f7f8fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaf0; --soft: #98a2b3; --line: #2b3242; --bar: #7aa2ff; --bad: #fb923c; --back: #11151d;
          --card: #191f2b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 68rem;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.sub { color: var(--soft); margin: .2rem 0 1.5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .32rem .6rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.refuse { color: var(--bad); }
.scroll { overflow-x: auto; }
.bar { background: var(--bar); height: .55rem; border-radius: .3rem; display: inline-block; vertical-align: middle; }
code { font-size: .86em; }
"""


def render_report(document: Mapping[str, Any]) -> str:
    """The page for a manifest (``lincompile.json``'s content); sections without data are left out."""
    source = document.get("source") or {}
    name = str(source.get("name") or "model")
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">compiled by lincompile {escape(str(document.get("versions", {}).get("lincompile", "")))}, '
        f"torch {escape(str(document.get('versions', {}).get('torch', '')))}</p>",
        _cards(document),
        _sites(document.get("sites") or []),
        _sensitivity(document.get("quantization") or {}),
        _table("Quantization", document.get("quantization")),
        _table("Metrics", document.get("metrics")),
        _passes(document.get("passes") or []),
        _files(document.get("files") or {}),
        _table("Options", document.get("options")),
        _table("Versions", document.get("versions")),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)} · lincompile</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def layer_losses(quantization: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Layer, scheme and predicted loss (nats per token) of every layer that a choice by sensitivity covers."""
    scores = (quantization.get("choice") or {}).get("scores") or {}
    layers = quantization.get("layers") or []
    return [
        (layer["name"], layer["scheme"], float(scores[layer["name"]][layer["scheme"]]))
        for layer in layers
        if layer["scheme"] in scores.get(layer["name"], {})
    ]


def _sensitivity(quantization: Mapping[str, Any]) -> str:
    """A bar per layer: what its scheme is predicted to cost."""
    rows = layer_losses(quantization)
    largest = max((loss for _, _, loss in rows), default=0.0)
    if largest <= 0:
        return ""
    body = "".join(
        f'<tr><td><code>{escape(name)}</code></td><td>{escape(scheme)}</td><td class="n">{loss:.2e}</td>'
        f'<td style="width:45%"><span class="bar" style="width:{100 * loss / largest:.1f}%"></span></td></tr>'
        for name, scheme, loss in rows
    )
    return (
        "<h2>Sensitivity</h2><p>What each layer's scheme is predicted to cost, in nats per token.</p>"
        '<div class="scroll"><table><tr><th>layer</th><th>scheme</th><th>loss</th><th></th></tr>'
        f"{body}</table></div>"
    )


def _cards(document: Mapping[str, Any]) -> str:
    sites = document.get("sites") or []
    rewritten = sum(site.get("method", "softmax") != "softmax" for site in sites)
    weights = sum(
        record["bytes"] for name, record in (document.get("files") or {}).items() if name.endswith(".safetensors")
    )
    cards: list[tuple[str, str]] = [(f"{rewritten} of {len(sites)}", "attention sites made linear")]
    if document.get("parameters"):
        cards.append((f"{document['parameters']:,}", "parameters"))
    cards.append((human_bytes(weights), "weights on disk"))
    fixed = [spec for spec in document.get("states") or [] if None not in spec["shape"]]
    if document.get("states"):
        size = sum(math.prod(spec["shape"]) * {"float64": 8, "bool": 1}.get(spec["dtype"], 4) for spec in fixed)
        growing = len(document["states"]) - len(fixed)
        cards.append(
            (human_bytes(size), "constant state per sequence" + (f" (+ {growing} growing caches)" if growing else ""))
        )
    cells = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in cards
    )
    return f'<div class="cards">{cells}</div>'


def _sites(sites: Sequence[Mapping[str, Any]]) -> str:
    if not sites:
        return "<h2>Attention sites</h2><p>This model has no attention sites.</p>"
    errors = [site.get("details", {}).get("error_after") for site in sites]
    largest = max((error for error in errors if error), default=0.0)
    rows = []
    for site, error in zip(sites, errors, strict=True):
        width = 6.0 * error / largest if error and largest else 0.0
        bar = f'<span class="bar" style="width:{width:.2f}rem"></span> {show(error)}' if error else ""
        window = f" {site['window']}" if site.get("window") else ""
        verdict = str(site.get("verdict", ""))
        rows.append(
            f"<tr><td><code>{escape(str(site.get('path')))}</code></td><td>{escape(str(site.get('kind')))}{window}</td>"
            f'<td class="n">{site.get("heads")}/{site.get("kv_heads")} × {site.get("head_dim")}</td>'
            f"<td>{escape(str(site.get('method', 'softmax')))}</td>"
            f'<td class="{escape(verdict)}">{escape(verdict)}: {escape(str(site.get("reason", "")))}</td>'
            f'<td class="n">{show(site.get("max_error"))}</td><td class="n">{bar}</td></tr>'
        )
    head = "".join(
        f"<th>{title}</th>"
        for title in (
            "site",
            "kind",
            "heads",
            "now",
            "verdict",
            "proof: max error",
            "relative error after distillation",
        )
    )
    return f'<h2>Attention sites</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _passes(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    rows = []
    for entry in history:
        options = ", ".join(f"{key}={value}" for key, value in (entry.get("options") or {}).items())
        seconds = entry.get("seconds")
        rows.append(
            f"<tr><td>{escape(str(entry.get('pass') or entry.get('name')))}</td><td><code>{escape(options)}</code></td>"
            f'<td>{"changed" if entry.get("modified") else "left alone"}</td><td class="n">{show(seconds)}</td></tr>'
        )
    head = "<tr><th>pass</th><th>options</th><th>graph</th><th>seconds</th></tr>"
    return f'<h2>Passes</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td><code>{escape(name)}</code></td><td class="n">{record["bytes"]:,}</td>'
        f"<td><code>{escape(record['sha256'][:16])}…</code></td></tr>"
        for name, record in files.items()
    )
    return f"<h2>Files</h2><table><tr><th>file</th><th>bytes</th><th>SHA-256</th></tr>{rows}</table>" if rows else ""


def _table(title: str, values: object) -> str:
    if not isinstance(values, Mapping) or not values:
        return ""
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(show(value))}</td></tr>" for key, value in _flat(values))
    return f'<h2>{escape(title)}</h2><div class="scroll"><table>{rows}</table></div>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def show(value: Any) -> str:
    """A value as people read it: four significant digits, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item) for item in value)
    return str(value)


def human_bytes(count: int) -> str:
    """Bytes in decimal units, as disks are sold: ``83.1 MB``."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
