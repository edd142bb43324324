"""Ranks as forked processes: one interpreter imports and captures, its children make the process groups.

Forking a process that has run a backward pass is forbidden by torch, so parents capture and children prove.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Function = Callable[[int, int], Any]
"""What a rank does: ``function(rank, world)``; JSON-able results."""
Outcome = tuple[int, Any]
"""(exit code, what the rank returned; its error's text where it failed)."""


def run_ranks(world: int, functions: dict[str, Function], seconds: float = 60.0) -> dict[str, Any]:
    """Every function in turn on the ranks of one gloo group: ``{name: {"seconds": s, "ranks": [[code, result], …]}}``.

    A rank that fails ends; the functions after that one count as failed.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(_child(Path(folder), rank, world, functions, seconds))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        files = [Path(folder) / f"rank{rank}.json" for rank in range(world)]
        written = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    total = time.monotonic() - started

    def outcome(rank: int, name: str) -> Outcome:
        return tuple(written[rank][name][:2]) if name in written[rank] else (codes[rank], "not run, or ended before")

    return {
        name: {
            "seconds": round(written[0][name][2] if name in written[0] else total, 2),
            "ranks": [outcome(rank, name) for rank in range(world)],
        }
        for name in functions
    }


def _child(folder: Path, rank: int, world: int, functions: dict[str, Function], seconds: float) -> int:
    torch.set_num_threads(1)
    code, results, name, started = 0, {}, "", time.monotonic()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        for name, function in functions.items():
            started = time.monotonic()
            result = function(rank, world)
            dist.barrier()
            results[name] = (0, result, time.monotonic() - started)
        dist.destroy_process_group()
    except BaseException as error:
        code = 1
        results[name] = (1, f"{type(error).__name__}: {error}", time.monotonic() - started)
        if os.environ.get("LINCOMPILE_TEST_TRACE"):
            traceback.print_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    return code


def main(out: Path, batches: list[tuple[int, dict[str, Function], float]]) -> None:
    """Runs everything and writes what it found to ``out``."""
    results: dict[str, Any] = {}
    for world, functions, seconds in batches:
        results |= run_ranks(world, functions, seconds)
    out.write_text(json.dumps(results))
