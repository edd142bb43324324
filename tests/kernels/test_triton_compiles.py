"""The Triton kernels compile for Hopper and older chips, which needs no GPU (see compile_for_hopper.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import needs_triton

# What one block may have, in KiB.
SHARED_MEMORY = {"sm_90": 227, "sm_80": 163, "sm_86": 99}
ATTENTION = "chunk_decays chunk_depths output states scan normaliser value_gradients key_gradients"
SCRIPT = Path(__file__).with_name("compile_for_hopper.py")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "chip", "kernels"),
    [
        (
            "stages",
            "sm_90",
            "conv_backward features_forward features_backward gate_forward gate_backward forward_scan backward_scan",
        ),
        ("attention", "sm_90", ATTENTION),
        ("forms", "sm_90", ATTENTION + " summed product"),
        ("small", "sm_80", ATTENTION),
        ("small", "sm_86", ATTENTION),
        (
            "int6",
            "sm_90",
            "quantize_kernel vector_kernel group_kernel token_kernel head_kernel few_kernel small_kernel"
            " reduce_kernel unpack_kernel large_kernel vector_bytes_kernel prefill_kernel scale_kernel",
        ),
        ("lookup", "sm_90", "embedding_kernel"),
        ("inputs", "sm_90", "one_token"),
        ("few", "sm_90", "few_queries"),
        ("sliding", "sm_90", "sliding_forward query_gradients key_gradients"),
    ],
)
def test_compiles(part: str, chip: str, kernels: str, tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), part, chip], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [line.split()[1:] for line in done.stdout.splitlines()]
    assert {name for name, _ in compiled} == set(kernels.split())
    assert [(name, size) for name, size in compiled if int(size) > SHARED_MEMORY[chip] * 1024] == []
