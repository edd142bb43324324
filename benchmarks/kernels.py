"""Linear attention and the LAWCAT block on one GPU, as tables: from what ``gpu_session.py`` wrote, or after running it.

    python benchmarks/kernels.py results/ --json benchmarks/results/kernels_h200.json --plot docs/kernels.svg
    python benchmarks/kernels.py --run --seconds 570 results/       # the sections first, then the tables

Files are those of ``linear_attention.py`` and ``lawcat_block.py`` (``--time``, ``--decode``, ``--growth``,
``--first-call``), or folders of them. Every ratio is of one row, that is of one run: of rows of the same shape the one
with most figures is taken, the later of equals. Bytes and floors are of one pass over memory: every input read and
every output written once, at the bandwidth of a copy in the same run. What isn't there is "not measured".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import log_plot
from lawcat_fla import EQUAL, FARTHEST

HERE = Path(__file__).parent
SECTIONS = "first_call,warm_128,warm_64,warm_block_64,warm_block_128,times,decode,growth,block,block_rest"
SHAPES = ((16, 2048, 16, 128), (4, 8192, 16, 128), (1, 32768, 16, 128), (1, 131072, 16, 128), (8, 4096, 32, 64))
LENGTHS = (2048, 8192, 32768, 131072)
BATCHES = (1, 32)
FORWARD, BOTH = "forward_ms", "forward_backward_ms"
PASSES = (FORWARD, BOTH)
PEERS = {"FLA chunk_gla": "fla chunk_gla", "SDPA flash": "sdpa flash", "cuDNN": "sdpa cudnn"}
# The compositions that compute what the block computes (see lawcat_fla.py).
GROUPED, REPEATED = "ours, 4 query heads per kv head", "ours, heads repeated"
MISSING = "not measured"
Row = dict[str, Any]


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The JSON files among the paths and in folders among them, in the order given.

    Raises:
        FileNotFoundError: a path that isn't there.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} isn't there: give files or folders that gpu_session.py wrote")
        found += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [file for file in found if file.name != "session.json"]


def gather(files: list[Path]) -> dict[str, Any]:
    """Rows by kind and point: ``times``, ``block`` by shape, ``decode`` by batch, ``growth`` by length, ``first``."""
    found: dict[str, Any] = {"times": {}, "block": {}, "decode": {}, "growth": {}, "first": {}, "sources": []}
    for file in files:
        whole = json.loads(file.read_text(encoding="utf-8"))
        for run in whole.get("runs", [whole]) if isinstance(whole, dict) else []:
            used = take(run, found)
            if used:
                source = {key: run[key] for key in ("command", "versions", "copy_gb_s", "commit") if key in run}
                found["sources"].append({"file": file.name, "used": used, **source})
    return found


def take(run: Row, found: dict[str, Any]) -> list[str]:
    """Puts a run's rows into ``found``; returns the kinds of those that went in."""
    kind = "block" if "lawcat_block" in str(run.get("command")) else "times"
    rows: dict[str, dict[Any, Row]] = {
        kind: {tuple(row["shape"]): row for row in run.get("times", []) if "shape" in row},
        "decode": {row["batch"]: row for row in run.get("decode", []) if "batch" in row},
        "growth": {row["length"]: row for row in run.get("growth", []) if "length" in row},
        "first": {key: value for key, value in run.items() if key.startswith("first call")},
    }
    # What growth times, one sequence of 16 heads of 128, are rows of shapes, too.
    rows["times"] = {(1, length, 16, 128): row for length, row in rows["growth"].items()} | rows.get("times", {})
    copy = run.get("copy_gb_s")
    used = set()
    for name, points in rows.items():
        for point, row in points.items():
            if name == "first" or figures(row) >= figures(found[name].get(point, {})):
                found[name][point] = row if name == "first" else {"copy_gb_s": copy, **row}
                used.add(name)
    return sorted(used)


def figures(row: Row) -> int:
    """How many runs of a row gave a time."""
    return sum(isinstance(entry, dict) and bool({FORWARD, "us"} & set(entry)) for entry in row.values())


def value(row: Row | None, name: str, key: str) -> Any:
    """``row[name][key]``, or that it wasn't measured, or with what error it failed."""
    entry = (row or {}).get(name)
    if not isinstance(entry, dict):
        return MISSING
    if key in entry:
        return entry[key]
    return f"failed: {entry['error'][:60]}" if "error" in entry else MISSING


def ratio(above: Any, below: Any) -> Any:
    """How many times as long, or that it wasn't measured."""
    if isinstance(above, (int, float)) and isinstance(below, (int, float)) and below:
        return round(above / below, 3)
    return next((x for x in (above, below) if isinstance(x, str) and x != MISSING), MISSING)


def floors(row: Row | None, mine: list[Any]) -> Row:
    """Floor in ms, bytes of one pass in MiB, and the share of the time that the floor is, forward and with backward."""
    floor = (row or {}).get("floor_ms") or [MISSING, MISSING]
    copy = (row or {}).get("copy_gb_s")
    known = isinstance(copy, (int, float)) and not isinstance(floor[0], str)
    return {
        "floor_ms": [x if isinstance(x, str) else round(x, 4) for x in floor],
        "one_pass_mib": [round(x * copy * 1e6 / 2**20, 1) for x in floor] if known else [MISSING, MISSING],
        "share_of_floor": [ratio(x, y) for x, y in zip(floor, mine, strict=True)],
    }


def beside_peers(row: Row | None) -> Row:
    """Our times, the floor and the peers' times of one row."""
    mine = [value(row, "ours", key) for key in PASSES]
    entry: Row = {"ours_ms": mine, **floors(row, mine), "peak_gib": value(row, "ours", "peak_gib")}
    for title, name in PEERS.items():
        theirs = [value(row, name, key) for key in PASSES]
        times = [ratio(x, y) for x, y in zip(theirs, mine, strict=True)]
        entry[title] = {"ms": theirs, "times_ours": times, "peak_gib": value(row, name, "peak_gib")}
    return entry


def gla(found: dict[str, Any]) -> list[Row]:
    rows = []
    for shape in SHAPES:
        entry: Row = {"shape": list(shape), **beside_peers(found["times"].get(shape))}
        fla = entry["FLA chunk_gla"]
        fla["memory_times_ours"] = ratio(fla["peak_gib"], entry["peak_gib"])
        rows.append(entry)
    return rows


def gqa(found: dict[str, Any]) -> list[Row]:
    rows = []
    for shape in SHAPES:
        row = found["times"].get(shape)
        one, two = ([value(row, name, key) for key in PASSES] for name in (GROUPED, REPEATED))
        times = [ratio(x, y) for x, y in zip(two, one, strict=True)]
        rows.append({"shape": list(shape), "grouped_ms": one, "repeated_ms": two, "times_grouped": times})
    return rows


def block(found: dict[str, Any]) -> list[Row]:
    rows = []
    for shape in SHAPES:
        row = found["block"].get(shape)
        mine = [value(row, "ours", key) for key in PASSES]
        entry: Row = {"shape": list(shape), "ours_ms": mine, **floors(row, mine)}
        entry["peak_gib"] = value(row, "ours", "peak_gib")
        done = [
            name
            for name in EQUAL
            if isinstance(value(row, name, BOTH), (int, float)) and row[name].get("differs", 0.0) <= FARTHEST
        ]
        best = min(done, key=lambda name: value(row, name, BOTH)) if done else EQUAL[0]
        fla = [value(row, best, key) for key in PASSES]
        if done:  # each pass by its own best
            fla[0] = min(value(row, name, FORWARD) for name in done)
        entry["best_of_fla"] = {
            "variant": best if done else MISSING, "of": done, "ms": fla,
            "times_ours": [ratio(x, y) for x, y in zip(fla, mine, strict=True)],
            "peak_gib": value(row, best, "peak_gib"), "differs": value(row, best, "differs"),
        }  # fmt: skip
        for name in ("fla compiled, no normaliser", "plain", "compiled", "sdpa flash"):
            theirs = [value(row, name, key) for key in PASSES]
            entry[name] = {"ms": theirs, "times_ours": [ratio(x, y) for x, y in zip(theirs, mine, strict=True)]}
        rows.append(entry)
    return rows


def decode(found: dict[str, Any]) -> list[Row]:
    rows = []
    for batch in BATCHES:
        row = found["decode"].get(batch)
        mine, fla = (value(row, name, "us") for name in ("ours", "fla fused_recurrent_gla"))
        floor = (row or {}).get("floor_us", MISSING)
        rows.append({
            "batch": batch, "floor_us": floor if isinstance(floor, str) else round(floor, 2), "ours_us": mine,
            "share_of_floor": ratio(floor, mine), "fla_us": fla, "fla_times_ours": ratio(fla, mine),
            "called_from_python_us": [value(row, n, "eager_us") for n in ("ours", "fla fused_recurrent_gla")],
        })  # fmt: skip
    return rows


def growth(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for length in LENGTHS:
        entry: Row = {"length": length, **beside_peers(found["growth"].get(length))}
        entry["us_per_1k_tokens"] = [ratio(x, length / 1024 / 1e3) for x in entry["ours_ms"]]
        rows.append(entry)
    return rows


def shown(item: Any, digits: int = 3) -> str:
    if isinstance(item, (list, tuple)):
        parts = [shown(part, digits) for part in item]
        return parts[0] if len(set(parts)) == 1 and MISSING in parts else " / ".join(parts)
    if isinstance(item, float):
        return f"{item:,.0f}" if abs(item) >= 1000 else f"{item:.{digits}g}"
    return str(item)


def markdown(title: str, rows: list[Row], columns: dict[str, Callable[[Row], Any]]) -> str:
    lines = [f"\n{title}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (shown(column(row)) for column in columns.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size(row: Row) -> str:
    return ", ".join(map(str, row["shape"]))


def tables(result: dict[str, Any]) -> str:
    """All of it in Markdown; pairs are forward / forward and backward."""

    def against(name: str) -> Callable[[Row], Any]:
        return lambda row: row[name]["times_ours"]

    titles = {f"{title} ÷ ours": against(title) for title in PEERS}
    parts = [
        markdown("GLA, ms forward / forward and backward", result["gla"], {
            "B, T, H, D": size, "ours": lambda r: r["ours_ms"], **titles, "one pass, MiB": lambda r: r["one_pass_mib"],
            "floor": lambda r: r["floor_ms"], "share of the floor": lambda r: r["share_of_floor"],
            "GiB": lambda r: r["peak_gib"], "FLA's GiB ÷ ours": lambda r: r["FLA chunk_gla"]["memory_times_ours"],
        }),
        markdown("Four query heads per KV head, ms", result["gqa"], {
            "B, T, H, D": size, "shared": lambda r: r["grouped_ms"], "repeated": lambda r: r["repeated_ms"],
            "repeated ÷ shared": lambda r: r["times_grouped"],
        }),
        markdown("LAWCAT block, ms", result["block"], {
            "B, T, H, D": size, "ours": lambda r: r["ours_ms"], "best of FLA": lambda r: r["best_of_fla"]["variant"],
            "FLA ÷ ours": lambda r: r["best_of_fla"]["times_ours"],
            "FLA without the normaliser ÷ ours": against("fla compiled, no normaliser"),
            "torch ops ÷ ours": against("plain"), "SDPA flash ÷ ours": against("sdpa flash"),
            "share of the floor": lambda r: r["share_of_floor"], "GiB": lambda r: r["peak_gib"],
            "outputs differ by": lambda r: r["best_of_fla"]["differs"],
        }),
        markdown("Decode, 32 heads of 128, µs a step", result["decode"], {
            "batch": lambda r: r["batch"], "ours": lambda r: r["ours_us"], "FLA": lambda r: r["fla_us"],
            "FLA ÷ ours": lambda r: r["fla_times_ours"], "floor": lambda r: r["floor_us"],
            "share of the floor": lambda r: r["share_of_floor"],
            "from Python: ours / FLA": lambda r: r["called_from_python_us"],
        }),
        markdown("One sequence, 16 heads of 128, ms", result["growth"], {
            "tokens": lambda r: r["length"], "ours": lambda r: r["ours_ms"],
            "µs per 1,024 tokens": lambda r: r["us_per_1k_tokens"], **titles, "GiB": lambda r: r["peak_gib"],
        }),
        "\nFirst call on an empty cache\n\n" + ("\n".join(f"{k}: {v}" for k, v in result["first"].items()) or MISSING),
        "\n" + measured_on(result["sources"]),
    ]  # fmt: skip
    return "\n".join(parts)


def measured_on(sources: list[Row]) -> str:
    """The chips; runs that name none, as dry runs do, are pointed out."""
    chips = {str(source.get("versions", {}).get("gpu")) for source in sources}
    where = ", ".join(sorted(chips - {"None"})) or "no GPU"
    unnamed = [source["file"] for source in sources if not source.get("versions", {}).get("gpu")]
    return f"Measured on: {where}" + (
        f"; without a GPU, so figures mean nothing: {', '.join(unnamed)}" if unnamed else ""
    )


def plot(result: dict[str, Any], file: Path) -> None:
    """Time against length, both axes logarithmic, with the time of one pass over memory."""
    panels = []
    for index, title in enumerate(("forward", "forward and backward")):
        panel = log_plot.Panel(f"{title}, 16 heads of 128", "tokens", "ms", dashed=("one pass over memory",))
        curves = {"lincompile": [(r["length"], r["ours_ms"][index]) for r in result["growth"]]}
        for name in PEERS:
            curves[name] = [(r["length"], r[name]["ms"][index]) for r in result["growth"]]
        curves["one pass over memory"] = [(r["length"], r["floor_ms"][index]) for r in result["growth"]]
        for name, points in curves.items():
            known = [(float(x), float(y)) for x, y in points if not isinstance(y, str) and y > 0]
            if known:
                panel.curves[name] = known
        panels.append(panel)
    log_plot.save(panels, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files, or folders of them; with --run, one folder")
    parser.add_argument("--run", action="store_true", help="run the sections into the folder first")
    parser.add_argument("--only", default=SECTIONS, help="the sections that --run runs, with commas between them")
    parser.add_argument("--seconds", type=float, default=570, help="time for --run")
    parser.add_argument("--dry", action="store_true", help="--run on a CPU: control flow, not figures")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an .svg file")
    options = parser.parse_args()
    code = 0
    if options.run:
        if len(options.results) != 1:
            parser.error("--run writes into one folder")
        command = [sys.executable, str(HERE / "gpu_session.py"), "--part", "kernels", "--only", options.only]
        command += ["--seconds", str(options.seconds), "--out", str(options.results[0])]
        code = subprocess.run([*command, *(["--dry"] if options.dry else [])], check=False).returncode
    try:
        found = gather(files_of(options.results))
    except FileNotFoundError as error:
        parser.error(str(error))
    result = {
        "command": " ".join(sys.argv), "sources": found["sources"], "gla": gla(found), "gqa": gqa(found),
        "block": block(found), "decode": decode(found), "growth": growth(found), "first": found["first"],
    }  # fmt: skip
    print(tables(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(result, options.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
