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

Outcome = tuple[int, Any]
"""(exit code, what the rank returned: JSON-able; its error's text where it failed)."""


def run_ranks(world: int, function: Callable[[int, int], Any], seconds: float = 60.0) -> list[Outcome]:
    """``function(rank, world)`` on every rank of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(_child(Path(folder), rank, world, function, seconds))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        files = [Path(folder) / f"rank{rank}.json" for rank in range(world)]
        return [
            (code, json.loads(file.read_text()) if file.exists() else None)
            for code, file in zip(codes, files, strict=True)
        ]


def _child(folder: Path, rank: int, world: int, function: Callable[[int, int], Any], seconds: float) -> int:
    torch.set_num_threads(1)
    code, result = 0, None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        result = function(rank, world)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        code, result = 1, f"{type(error).__name__}: {error}"
        if os.environ.get("LINCOMPILE_TEST_TRACE"):
            traceback.print_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    return code


def main(out: Path, runs: dict[str, tuple[int, Callable[[int, int], Any], float]]) -> None:
    """Runs everything; writes ``{name: {"seconds": s, "ranks": [[code, result], …]}}`` to ``out``."""
    results = {}
    for name, (world, function, seconds) in runs.items():
        started = time.monotonic()
        outcomes = run_ranks(world, function, seconds)
        results[name] = {"seconds": round(time.monotonic() - started, 2), "ranks": outcomes}
        out.write_text(json.dumps(results))
