"""Tiles of ``int6_linear``'s Triton kernels, by rule from sweeps on one H200 (``benchmarks/int6_tiles.py``).

Nothing is tuned as it runs, so a first call is quick. Tiles are kept: a layer of one token that isn't recorded is bound
by what Python does for its launch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import triton

from .pack import GROUP_SIZE, group_count

Tile = Mapping[str, Any]  # shared by all calls of a shape: not to be changed
# Up to so many channels a program can quantize a token beside its own rows' product.
NARROW = 2048


@functools.cache
def vector_config(in_features: int) -> Tile:
    """Tile of the one-token kernel."""
    return {"BN": 2, "HALVES": 64, "num_warps": 4 if in_features >= 8192 else 2}


@functools.cache
def bytes_config(in_features: int) -> Tile:
    """Tile of the one-token kernel for eight-bit weights (``int6_bytes_h200.json``)."""
    if in_features < 4096:
        return vector_config(in_features)
    return {"BN": 4, "HALVES": 128 if in_features >= 8192 else 64, "num_warps": 4}


@functools.cache
def narrow_config(groups: int, rows: int, gluon: bool) -> Tile:
    """Tile of the one-token kernel for few channels, of Gluon's or plain Triton's (see :func:`.triton.hopper`).

    More rows in a program wait longer, fewer read the token more often; on an H200, ``int6_narrow_h200.json``. WALKS:
    so many programs of a multiprocessor walk over all rows.
    """
    few = max(2, triton.next_power_of_2(groups))
    if rows > 8192 and gluon:  # an output head: blocks in turn, of as many rows as registers hold twice
        return {"GLUON": True, "BN": max(16, 256 // few), "GB": few, "WALKS": 4 if few <= 8 else 2, "num_warps": 4}
    block = 4 if rows <= 640 else 8 if rows <= 8192 else 32  # the token would be read too often
    return {"GLUON": gluon, "BN": block, "GB": few, "num_warps": 4 if few <= 8 else 8}


@functools.cache
def few_config(tokens: int, rows: int, in_features: int) -> Tile:
    """Tile of the few-token Gluon kernel; groups are shared out until each multiprocessor has two programs."""
    block_m, groups = (16 if tokens <= 16 else 32), group_count(in_features, GROUP_SIZE)
    programs = triton.cdiv(rows, 128) * triton.cdiv(tokens, block_m)
    shares = max(1, min(264 // max(1, programs), groups // 4))  # of a call without tokens, too
    return {"BM": block_m, "ROWS": 2, "WARPS": 4, "STAGES": 3, "SHARES": shares}


@functools.cache
def small_config(tokens: int, rows: int, in_features: int) -> Tile:
    """Tile of the few-token kernel; the groups are split until there are a few programs for every multiprocessor."""
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    programs = triton.cdiv(rows, 64) * triton.cdiv(tokens, block_m)
    split = 1
    while split < 8 and programs * split < 400 and in_features // GROUP_SIZE >= 8 * split:
        split *= 2
    return {"BM": block_m, "BN": 64, "STAGES": 3, "SPLIT": split, "num_warps": 4}


@functools.cache
def few_bytes_config(tokens: int, rows: int, in_features: int) -> Tile:
    """Tile of the few-token kernel for eight-bit weights; groups are split as in :func:`small_config`."""
    return {**small_config(tokens, rows, in_features), "STAGES": 4}


@functools.cache
def large_config() -> Tile:
    """Tile of the many-token kernel."""
    return {"BM": 64, "BN": 128, "STAGES": 3, "BAND": 8, "num_warps": 4}
