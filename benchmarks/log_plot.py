"""Curves on logarithmic axes as one SVG file, panels side by side. Needs nothing but Python."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 330, 62, 14, 34, 46
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


@dataclass
class Panel:
    """``curves``: points (x, y), both > 0, by name. Names in ``dashed`` are bounds, drawn grey and dashed."""

    title: str
    across: str
    up: str
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    dashed: tuple[str, ...] = ()


def ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside, or 1, 2 and 5 times them where there are fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**e for e in decades if low <= 10.0**e <= high]
    if len(inside) >= 3:
        return inside
    return [m * 10.0**e for e in decades for m in (1, 2, 5) if low * 0.999 <= m * 10.0**e <= high * 1.001]


def label(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K"
    return f"{value:g}"


def draw(panel: Panel, offset: int) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    middle = offset + LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts = [f'<text x="{middle}" y="18" text-anchor="middle" font-weight="bold">{html.escape(panel.title)}</text>']
    if not points:
        return [*parts, f'<text x="{middle}" y="{HEIGHT / 2}" text-anchor="middle">not measured</text>']
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    x_low, x_high, y_low, y_high = xs[0] / 1.15, xs[-1] * 1.15, min(ys) / 1.3, max(ys) * 1.3

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / math.log(x_high / x_low)
        up = math.log(y / y_low) / math.log(y_high / y_low)
        return (
            round(offset + LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    left, bottom = place(x_low, y_low)
    right, top = place(x_high, y_high)
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>')
    for x in xs:
        at = place(x, y_low)[0]
        parts.append(f'<text x="{at}" y="{bottom + 15}" text-anchor="middle">{label(x)}</text>')
    for y in ticks(y_low, y_high):
        at = place(x_low, y)[1]
        parts.append(f'<path d="M{left} {at}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{at + 4}" text-anchor="end">{label(y)}</text>')
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(panel.across)}</text>')
    turn = f"rotate(-90 {offset + 14} {HEIGHT / 2})"
    parts.append(f'<text x="{offset + 14}" y="{HEIGHT / 2}" text-anchor="middle" transform="{turn}">')
    parts.append(f"{html.escape(panel.up)}</text>")
    for number, (name, curve) in enumerate(panel.curves.items()):
        bound = name in panel.dashed
        colour = "#888" if bound else COLOURS[number % len(COLOURS)]
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in sorted(curve)))
        dash = ' stroke-dasharray="5 3"' if bound else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>' for x, y in (place(*point) for point in curve)]
        at = TOP + 8 + 13 * number
        parts.append(f'<path d="M{left + 8} {at}h18" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{left + 31}" y="{at + 4}">{html.escape(name)}</text>')
    return parts


def save(panels: list[Panel], file: Path) -> None:
    """Writes the panels; one without points says ``not measured``."""
    width = WIDTH * len(panels)
    parts = [part for number, panel in enumerate(panels) for part in draw(panel, number * WIDTH)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" font-family="sans-serif" '
    text = [head + 'font-size="11">', '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
