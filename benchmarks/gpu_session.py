"""All checks and figures of one GPU in sittings of ten minutes: parts run in order of value and save as they go.

    python benchmarks/gpu_session.py --part kernels --seconds 570 --out results
    python benchmarks/gpu_session.py --part int6 --seconds 570 --out results
    python benchmarks/gpu_session.py --part end_to_end --seconds 570 --out results
    python benchmarks/gpu_session.py --part kernels --dry          # the control flow, on a CPU

Every section is a process of its own with a time limit: one that fails or hangs costs itself only. What it found so
far lies in ``--out`` (one JSON file and one log a section; ``session.json`` says how each ended, and which were left
out for lack of time).

Peers, as wheels on a machine without network (``pip download --no-deps``, then ``pip install --no-deps``; 5.4 MB
together): fla-core 0.6.0, flash-linear-attention 0.6.0, humming-kernels 0.1.20 (needs jinja2, tabulate, tqdm,
cuda-bindings), torchao 0.18.0. FLA also needs einops and transformers. A peer that isn't there is an error in its own
rows. FLA's first call compiles for minutes, on the CPU: that runs beside the checks, which are compiling, too
(``--only`` keeps sections beside each other: ``--only warm_128,warm_64,times``).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = "fla,sdpa flash,sdpa cudnn"


@dataclass
class Section:
    """``option FILE`` is added to the command; ``beside``: starts together with the section before."""

    name: str
    script: str
    arguments: list[str]
    seconds: float
    beside: bool = False
    option: str = "--json"
    environment: dict[str, str] = field(default_factory=dict)
    dry: list[str] | None = None


def kernels(jobs: int) -> list[Section]:
    linear, block = "linear_attention.py", "lawcat_block.py"
    # FLA's kernels: one process per head size, with what it tunes not remembered.
    warm = {"beside": True, "environment": {"FLA_CACHE_RESULTS": "0"}}
    return [
        # On an empty cache, before anything else has compiled.
        Section("first_call", linear, ["--first-call", "--shapes", "0"], 60,
                environment={"TRITON_CACHE_DIR": tempfile.mkdtemp()}),
        Section("check_linear", "linear_attention_checks.py", ["--jobs", str(jobs)], 200, dry=[]),
        Section("check_block", block, ["--check", "--jobs", str(jobs)], 200, beside=True, dry=[]),
        Section("warm_128", linear, ["--warm", "--shapes", "0"], 200, **warm),
        Section("warm_64", linear, ["--warm", "--shapes", "4"], 200, **warm),
        Section("warm_block_64", block, ["--warm", "--shapes", "4"], 200, **warm),
        Section("warm_block_128", block, ["--warm", "--shapes", "0"], 200, **warm),
        Section("times", linear, ["--time", "--shapes", "0,4,2,1,3", "--peers", PEERS], 260),
        Section("decode", linear, ["--decode", "--peers", "fla"], 60),
        Section("growth", linear, ["--growth", "--peers", "fla,sdpa cudnn"], 90),
        Section("block", block, ["--time", "--peers", "fla,sdpa", "--shapes", "4,0", "--budget", "0.4"], 270),
        Section("block_rest", block, ["--time", "--peers", "fla,sdpa", "--shapes", "2,1,3", "--budget", "0.4"], 180),
        Section("stages", block, ["--stages", "--shapes", "0,4", "--budget", "0.3"], 60),
        Section("profile", linear, ["--profile", "--shapes", "0,4,2"], 40),
        Section("profile_block", block, ["--profile", "--shapes", "4,0"], 40),
        Section("compiled", block, ["--time", "--peers", "compiled", "--shapes", "4,0", "--budget", "0.3"], 90),
        Section("tune", linear, ["--tune", "--shapes", "0,4"], 90, dry=[]),
        Section("check_sliding", "sliding_attention.py", ["--check", "--time", "--budget", "0.2"], 80, dry=[]),
    ]  # fmt: skip


def int6(jobs: int) -> list[Section]:
    return [
        Section("int6_linear", "int6_linear.py", ["--seconds", "100"], 120, option="--out", dry=["--no-checks"]),
        Section("int6_end_to_end", "int6_end_to_end.py", ["--seconds", "130"], 150, option="--out",
                dry=["--eager", "--tokens", "2"]),
        Section("int6_peers", "int6_linear.py", ["--peers", "--no-checks", "--seconds", "250"], 270, option="--out"),
        Section("int6_variants", "int6_linear.py", ["--variants", "--no-checks", "--seconds", "180"], 200,
                option="--out", dry=[]),
    ]  # fmt: skip


def end_to_end(jobs: int) -> list[Section]:
    script = "end_to_end.py"
    return [
        Section("end_to_end_1b", script, ["--models", "1", "--seconds", "150"], 180, dry=["--eager"]),
        Section("end_to_end_8b", script, ["--models", "2", "--seconds", "220"], 250, dry=["--eager"]),
        Section("end_to_end_smollm2", script, ["--models", "0", "--seconds", "190"], 220, dry=["--eager"]),
    ]


PARTS = {"kernels": kernels, "int6": int6, "end_to_end": end_to_end}


def start(section: Section, out: Path, dry: bool) -> tuple[subprocess.Popen[bytes], float]:
    arguments = list(section.arguments)
    if dry:
        if "--shapes" in arguments:
            arguments[arguments.index("--shapes") + 1] = "0"
        if "--models" in arguments:
            arguments[arguments.index("--models") + 1] = "0"
        arguments = [a.replace(",compiled", "") for a in arguments] + (section.dry or [])
    folder = HERE.name  # the command that a result keeps names no folder of this machine
    script = [f"{folder}/dry.py", section.script] if dry else [f"{folder}/{section.script}"]
    command = [sys.executable, *script, *arguments, section.option, str(out / f"{section.name}.json")]
    # The project needn't be installed where the GPU is.
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), **section.environment}
    log = (out / f"{section.name}.log").open("wb")
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent, start_new_session=True
    ), (time.perf_counter())


def finish(section: Section, process: subprocess.Popen[bytes], begun: float, limit: float, out: Path) -> dict[str, Any]:
    """Waits until ``limit`` (a time) and says how it ended."""
    try:
        code: int | str = process.wait(max(0.1, limit - time.perf_counter()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()
        code = "stopped: no time left"
    seconds = round(time.perf_counter() - begun, 1)
    tail = (out / f"{section.name}.log").read_text(errors="replace").splitlines()[-40:]
    wrong = [line for line in tail if line.startswith("FAIL") or "Error" in line]
    print(f"== {section.name}: {code}, {seconds} s", *[line[:200] for line in [*wrong[:6], *tail[-6:]]], sep="\n   ",
          flush=True)  # fmt: skip
    return {"exit": code, "seconds": seconds, "last lines": tail[-3:]}


def run(sections: list[Section], seconds: float, out: Path, dry: bool) -> dict[str, Any]:
    started = time.perf_counter()
    end = started + seconds
    ended: dict[str, Any] = {}
    groups: list[list[Section]] = []
    for section in sections:
        if section.beside:
            groups[-1].append(section)
        else:
            groups.append([section])
    for group in groups:
        wanted = [s for s in group if not (dry and s.dry == [])]
        left = end - time.perf_counter()
        if left < 15:
            ended |= {section.name: {"exit": "left out: no time left"} for section in group}
            continue
        running = [(section, *start(section, out, dry)) for section in wanted]
        for section, process, begun in running:
            ended[section.name] = finish(section, process, begun, min(end, begun + section.seconds), out)
        (out / "session.json").write_text(json.dumps(ended, indent=1) + "\n")
    (out / "session.json").write_text(json.dumps(ended, indent=1) + "\n")
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS), required=True)
    parser.add_argument("--only", default="", help="comma-separated sections")
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2 - 1), help="processes for checks")
    parser.add_argument("--out", type=Path, default=Path("gpu_session"))
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU; checks and int6 are left out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sections = PARTS[options.part](options.jobs)
    if options.only:
        unknown = set(options.only.split(",")) - {section.name for section in sections}
        if unknown:
            parser.error(
                f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in sections)}"
            )
        sections = [section for section in sections if section.name in options.only.split(",")]
        sections[0].beside = False
    ended = run(sections, options.seconds, options.out, options.dry)
    return 0 if all(entry["exit"] == 0 for entry in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
