"""Runs commands in the background, one after another on each GPU, where a shell ends before training does.

    python benchmarks/background.py start FOLDER --gpu 0 'python benchmarks/distil.py … --out FOLDER/rows' --gpu 1 '…'
    python benchmarks/background.py wait FOLDER --seconds 560 --copy OUT

``start`` returns at once; commands of one GPU (or of ``--cpu NAME``) follow each other, those of others run beside
them. ``wait`` returns when all have ended (0 if all succeeded, 1 if not), or after so many seconds (3), prints the end
of every log, and copies what was written so far: files of FOLDER and one folder below, by the endings of ``--take``,
at most 16 MiB each. Where nothing was started it fails at once (2): a machine that is held costs what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

LARGEST = 16 << 20
NOTHING, UNFINISHED = 2, 3


def start(folder: Path, queues: dict[str, list[str]]) -> None:
    """Begins a process of its own session for each queue."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, commands in queues.items():
        state = folder / f"{name}.queue"
        state.write_text(json.dumps({"commands": commands, "ended": []}), encoding="utf-8")
        with (folder / f"{name}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, __file__, "work", str(state)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (folder / f"{name}.pid").write_text(str(worker.pid), encoding="utf-8")


def work(state: Path) -> None:
    """Runs a queue's commands; what went wrong with one doesn't keep the next from running."""
    queue = json.loads(state.read_text(encoding="utf-8"))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if state.stem.startswith("gpu"):
        environment["CUDA_VISIBLE_DEVICES"] = state.stem.removeprefix("gpu")
    for command in queue["commands"]:
        print(f"$ {command}", flush=True)
        began = time.monotonic()
        code = subprocess.run(command, shell=True, env=environment, check=False).returncode
        print(f"exit {code} after {time.monotonic() - began:.0f} s", flush=True)
        queue["ended"].append(code)
        partial = state.with_suffix(".partial")
        partial.write_text(json.dumps(queue), encoding="utf-8")
        partial.replace(state)


def alive(process: int) -> bool:
    """Whether a process is there, and not only for want of someone who asks how it ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait(folder: Path, seconds: float, copy: Path | None, take: tuple[str, ...], lines: int) -> int:
    """See the module; returns the exit code."""
    states = sorted(folder.glob("*.queue"))
    if not states:
        print(f"nothing was started in {folder}")
        return NOTHING
    end = time.monotonic() + seconds
    while True:
        queues = {state.stem: json.loads(state.read_text(encoding="utf-8")) for state in states}
        unfinished = [name for name, queue in queues.items() if len(queue["ended"]) < len(queue["commands"])]
        running = [name for name in unfinished if alive(int((folder / f"{name}.pid").read_text(encoding="utf-8")))]
        if not running or time.monotonic() >= end:
            break
        time.sleep(0.5)
    if copy is not None:
        copy.mkdir(parents=True, exist_ok=True)
        for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
            if file.suffix not in take or not file.is_file():
                continue
            if file.stat().st_size > LARGEST:
                print(f"not copied, {file.stat().st_size:,} bytes: {file}")
            else:
                shutil.copy(file, copy / "_".join(file.relative_to(folder).parts))
    for name, queue in queues.items():
        shown = (folder / f"{name}.log").read_text(errors="replace").splitlines()[-lines:]
        print(
            f"== {name}: exits {queue['ended']} of {len(queue['commands'])}", *(line[:220] for line in shown), sep="\n"
        )
    if running:
        return UNFINISHED
    for name in unfinished:
        print(f"the process of {name} has ended before its commands")
    return int(bool(unfinished) or any(code for queue in queues.values() for code in queue["ended"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    starting = verbs.add_parser("start")
    starting.add_argument("folder", type=Path)
    starting.add_argument("--gpu", nargs=2, action="append", default=[], metavar=("N", "COMMAND"))
    starting.add_argument("--cpu", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"))
    waiting = verbs.add_parser("wait")
    waiting.add_argument("folder", type=Path)
    waiting.add_argument("--seconds", type=float, default=560)
    waiting.add_argument("--copy", type=Path, metavar="OUT")
    waiting.add_argument("--take", default=".json,.log,.safetensors")
    waiting.add_argument("--lines", type=int, default=12, help="of each log")
    verbs.add_parser("work").add_argument("state", type=Path)
    asked = parser.parse_args()
    if asked.verb == "work":
        work(asked.state)
        return 0
    if asked.verb == "wait":
        return wait(asked.folder, asked.seconds, asked.copy, tuple(asked.take.split(",")), asked.lines)
    queues: dict[str, list[str]] = {}
    for kind, given in (("gpu", asked.gpu), ("cpu-", asked.cpu)):
        for which, command in given:
            queues.setdefault(f"{kind}{which}", []).append(command)
    if not queues:
        starting.error("give --gpu N COMMAND or --cpu NAME COMMAND")
    if running := [name for name in queues if (asked.folder / f"{name}.queue").exists()]:
        starting.error(f"{asked.folder} has a queue {running[0]} already: name another folder")
    start(asked.folder, queues)
    return 0


if __name__ == "__main__":
    sys.exit(main())
