"""Tiles of int6_linear's kernels on one NVIDIA GPU: the sweeps that the rules in ``kernels/int6_linear`` come from.

    python benchmarks/int6_tiles.py --out benchmarks/results/int6_tiles.json [--paths narrow,vector]

Microseconds a call, taken as in ``int6_linear.py``, which has the tiles of the Gluon kernel for a few tokens
(``--variants``). A tile of ``narrow`` or ``head`` is checked before it is timed, and the fastest ones of ``narrow`` run
through a whole model.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from int6_linear import DECODE, attempt, copies_for, cublas_us, int6_us, int8_us, median_us, poisoned, random_planes
from torch import Tensor
from versions import versions

from lincompile.kernels import ops  # noqa: F401  registers torch.ops.lincompile
from lincompile.kernels.int6_linear import layer, pack
from lincompile.kernels.int6_linear import tiles as rules
from lincompile.kernels.int6_linear import triton as kernels

PATHS = ("vector", "bytes", "narrow", "head", "small", "few_bytes", "large")
# SmolLM2-135M's packed layers: rows, channels, norm before, gated product before, sum after.
NARROW = [(960, 576, True, False, False), (576, 576, False, False, True), (3072, 576, True, False, False),
          (576, 1536, False, True, True)]  # fmt: skip
NARROW_LAYERS = 30
# Rows of a program and warps, in Triton and in Gluon.
NARROW_TILES = {"triton": [(1, 1), (4, 4), (8, 4), (8, 8)], "gluon": [(n, w) for n in (4, 8, 16) for w in (4, 8, 16)]}
# SmolLM2-135M's output head, of its table packed in six bits. Rows of a program, warps, and how many programs of a
# multiprocessor walk over all rows (0: none walks). Of the kernel that has its token quantized for it: rows, half
# groups and warps.
HEAD = (49152, 576, True, False, False)
HEAD_TILES = [(32, 4, 0), (32, 8, 0), (8, 4, 0), *itertools.product((16, 32, 64), (4,), (2, 3, 4)), (16, 4, 6),
              (16, 4, 8), (32, 8, 2), (64, 8, 2), (16, 2, 8), (8, 2, 8)]  # fmt: skip
HEAD_VECTOR = [(2, 64, 2), (4, 8, 1), (8, 8, 2), (8, 8, 1), (16, 8, 4), (16, 8, 2), (32, 8, 4), (32, 8, 8), (64, 8, 8)]
VECTOR = [(1, 64, 2), (1, 128, 4), (2, 64, 2), (2, 64, 4), (2, 128, 4), (4, 64, 2), (4, 64, 4), (4, 128, 4), (8, 64, 4)]
SMALL = [
    (32, 1, 4, 1),
    (32, 2, 3, 1),
    (32, 2, 4, 1),
    (32, 2, 4, 2),
    (32, 2, 4, 4),
    (64, 2, 3, 2),
    (64, 4, 3, 4),
    (128, 4, 3, 2),
]
# Eight-bit weights: rows, warps, stages, shares of the groups.
FEW_BYTES = [(64, 4, 4, 1), (64, 4, 6, 1), (64, 4, 4, 2), (64, 4, 6, 2), (64, 4, 4, 4), (128, 4, 4, 1), (128, 4, 4, 2),
             (128, 8, 4, 2), (128, 4, 4, 4), (32, 4, 6, 1), (32, 2, 4, 2)]  # fmt: skip
LARGE = [(128, 64, 4, 3), (128, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 4), (128, 128, 8, 3), (128, 32, 4, 4)]


Site = tuple[int, int, bool, bool, bool]  # as in NARROW
Planes = tuple[Tensor, Tensor, Tensor]


def narrow_call(site: Site, planes: Planes, x: Tensor, y: Tensor, stream: Tensor, config: dict[str, Any]) -> None:
    """One of SmolLM2-135M's layers; ``stream`` is what its output is added to."""
    _, width, norm, gated, residual = site
    around = kernels.Around(norm_weight(width) if norm else None, 1e-5, gated, stream if residual else None)
    way(config)(x, planes, None, y, "a8", config, around)


def way(config: dict[str, Any]) -> Any:
    """The launcher that a tile is for."""
    return kernels.narrow if "GB" in config else kernels.vector


@functools.cache
def norm_weight(width: int) -> Tensor:
    """Made once: what is made in a call is timed with it."""
    return torch.rand(width, device="cuda", dtype=torch.bfloat16) + 0.5


def check_narrow(site: Site, config: dict[str, Any]) -> None:
    """A tile over poisoned memory: the integer part bit for bit, the whole layer against float64; NaN comes through."""
    rows, width, norm, gated, residual = site
    rows = min(rows, 9001)
    codes = torch.randint(-32, 32, (rows, width), dtype=torch.int8)
    planes = (*(plane.cuda() for plane in pack.pack(codes)),
              torch.ones(rows, pack.group_count(width, 128), dtype=torch.float16, device="cuda"))  # fmt: skip
    x = torch.randint(-127, 128, (1, width)).float()
    x[:, ::16] = 127
    y, bias = poisoned(1, rows), torch.randint(-9, 9, (rows,)).float()
    way(config)(x.cuda(), planes, bias.cuda(), y, "a8", config)
    assert torch.equal(y.cpu().double(), x.double() @ codes.double().t() + bias.double()), "the integer part differs"
    planes = random_planes(rows, width)
    x, stream = (torch.randn(1, n, device="cuda", dtype=torch.bfloat16) for n in (width * (1 + gated), rows))
    y = poisoned(1, rows).to(torch.bfloat16)
    narrow_call(site, planes, x, y, stream, config)
    weight = norm_weight(width).double() if norm else None
    more = stream.double() if residual else None
    expected = layer.plain(x.double(), weight, 1e-5, gated, more, *planes, None, 128, "a8")
    error = float((y.double() - expected).norm() / expected.norm())
    assert error < 2e-2, f"the error is {error:.2g}"
    x[0, 3] = float("nan")
    narrow_call(site, planes, x, y, stream, config)
    assert bool(y.isnan().all()), "NaN is lost"


def few_bytes_us(rows: int, width: int, tokens: int, config: dict[str, Any]) -> float:
    """A tile of few tokens and eight-bit weights, whose integer part is checked bit for bit over poisoned memory."""
    codes = torch.randint(-127, 128, (300, 1168), dtype=torch.int8)
    scale = torch.ones(300, pack.group_count(1168, 128), dtype=torch.float16, device="cuda")
    x = torch.randint(-127, 128, (tokens, 1168)).float()
    x[:, ::16] = 127
    y = poisoned(tokens, 300)
    kernels.few_bytes(x.cuda(), (codes.cuda(), scale), None, y, "a8", config)
    assert torch.equal(y.cpu().double(), x.double() @ codes.double().t()), "the integer part differs"
    return int8_us(rows, width, tokens, config)


def narrow_us(site: Site, config: dict[str, Any]) -> float:
    """One layer after another of the same shape, checked first."""
    check_narrow(site, config)
    rows, width, _, gated, _ = site
    copies = [random_planes(rows, width) for _ in range(copies_for(rows * width * 3 // 4))]
    x, y = (torch.randn(1, n, device="cuda", dtype=torch.bfloat16) for n in (width * (1 + gated), rows))
    stream = torch.zeros_like(y)
    return median_us([lambda p=p: narrow_call(site, p, x, y, stream, config) for p in copies])  # type: ignore[misc]


def chain_us(configs: list[dict[str, Any]]) -> float:
    """Microseconds a call of a whole model's packed layers, each reading what the one before it wrote."""
    layers = [[random_planes(rows, width) for rows, width, *_ in NARROW] for _ in range(NARROW_LAYERS)]
    stream, middle = (torch.randn(1, 576, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    heads, wide = (torch.empty(1, n, device="cuda", dtype=torch.bfloat16) for n in (960, 3072))
    # q takes attention's place; every second sum goes to the other buffer, since a call may not read what it writes.
    flow = [(stream, heads, stream), (heads[:, :576], middle, stream), (middle, wide, middle), (wide, stream, middle)]
    calls = [
        functools.partial(narrow_call, site, planes, *buffers, config)
        for packed in layers
        for site, planes, buffers, config in zip(NARROW, packed, flow, configs, strict=True)
    ]
    return median_us(calls)


def sweep_narrow() -> dict[str, Any]:
    """Each kernel for few channels by shape, then the fastest tiles of each kernel through a whole model."""
    found: dict[str, Any] = {}
    best: dict[str, list[dict[str, Any]]] = {}
    for site in NARROW:
        rows, width, *_ = site
        name = f"{rows}x{width}"
        attempt(found, f"cublas {name}", lambda r=rows, w=width: cublas_us(r, w, 1))  # type: ignore[misc]
        timed: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for form, (block, warps) in ((form, tile) for form, tiles in NARROW_TILES.items() for tile in tiles):
            config = dict(rules.narrow_config(pack.group_count(width, 128), rows, form == "gluon"))
            config |= {"BN": block, "num_warps": warps}
            if warps > config["GB"]:  # warps without a group
                continue
            label = f"narrow {name} {form} {block}/{warps}"
            attempt(found, label, lambda c=config, s=site: narrow_us(s, c))  # type: ignore[misc]
            if isinstance(found[label], float):
                timed.setdefault(form, []).append((found[label], config))
        for form, results in timed.items():
            best.setdefault(form, []).append(min(results, key=lambda result: result[0])[1])
    today = [rules.narrow_config(pack.group_count(width, 128), rows, True) for rows, width, *_ in NARROW]
    for form, configs in {"today": today, **best}.items():
        tiles = " ".join(f"{config['BN']}/{config['num_warps']}" for config in configs)
        attempt(found, f"chain {form} {tiles}", lambda c=configs: chain_us(c))  # type: ignore[misc]
    return found


def sweep_head() -> dict[str, Any]:
    """An output head: programs that walk, programs that don't, and the token quantized in a kernel of its own."""
    found: dict[str, Any] = {}
    rows, width, *_ = HEAD
    attempt(found, f"cublas {rows}x{width}", lambda: cublas_us(rows, width, 1))
    groups = pack.group_count(width, 128)
    few = rules.narrow_config(groups, 1, True)["GB"]
    tiles: dict[str, dict[str, Any]] = {"today": dict(rules.narrow_config(groups, rows, True))}
    for block, warps, walks in HEAD_TILES:
        tiles[f"gluon {block}/{warps}/{walks}"] = {
            "GLUON": True, "BN": block, "GB": few, "num_warps": warps, **({"WALKS": walks} if walks else {}),
        }  # fmt: skip
    for block, halves, warps in HEAD_VECTOR:
        tiles[f"vector {block}/{halves}/{warps}"] = {"BN": block, "HALVES": halves, "num_warps": warps}
    for name, config in tiles.items():
        attempt(found, f"head {name}", lambda c=config: narrow_us(HEAD, c))  # type: ignore[misc]
    return found


def sweep(paths: list[str]) -> dict[str, Any]:
    """Other tile shapes of these of ``PATHS``."""
    found: dict[str, Any] = {}
    for (rows, width), (block, halves, warps) in itertools.product(DECODE if "vector" in paths else (), VECTOR):
        config = {"BN": block, "HALVES": halves, "num_warps": warps}
        attempt(found, f"vector {rows}x{width} {block}/{halves}/{warps}",
                lambda c=config, r=rows, w=width: int6_us(r, w, 1, "vector", c))  # type: ignore[misc]  # fmt: skip
    for (rows, width), (block, halves, warps) in itertools.product(DECODE if "bytes" in paths else (), VECTOR):
        config = {"BN": block, "HALVES": halves, "num_warps": warps}
        attempt(found, f"bytes {rows}x{width} {block}/{halves}/{warps}",
                lambda c=config, r=rows, w=width: int8_us(r, w, 1, c))  # type: ignore[misc]  # fmt: skip
    if "narrow" in paths:
        found |= sweep_narrow()
    if "head" in paths:
        found |= sweep_head()
    few = DECODE[:2] if "small" in paths else ()
    for (rows, width), tokens, (block, warps, stages, split) in itertools.product(few, (16, 32), SMALL):
        config = {"BM": tokens, "BN": block, "STAGES": stages, "SPLIT": split, "num_warps": warps}
        attempt(found, f"small {rows}x{width} M={tokens} {block}/{warps}/{stages}/{split}",
                lambda c=config, r=rows, w=width, t=tokens: int6_us(r, w, t, "small", c))  # type: ignore[misc]  # fmt: skip
    few = DECODE[:2] if "few_bytes" in paths else ()
    for (rows, width), tokens in itertools.product(few, (16, 32, 64)):
        attempt(found, f"cublas {rows}x{width} M={tokens}",
                lambda r=rows, w=width, t=tokens: cublas_us(r, w, t))  # type: ignore[misc]  # fmt: skip
        for block, warps, stages, split in FEW_BYTES:
            config = {"BM": tokens, "BN": block, "STAGES": stages, "SPLIT": split, "num_warps": warps}
            attempt(found, f"few_bytes {rows}x{width} M={tokens} {block}/{warps}/{stages}/{split}",
                    lambda c=config, r=rows, w=width, t=tokens: few_bytes_us(r, w, t, c))  # type: ignore[misc]  # fmt: skip
    for block_m, block_n, warps, stages in LARGE if "large" in paths else ():
        config = {"BM": block_m, "BN": block_n, "STAGES": stages, "BAND": 8, "num_warps": warps}
        attempt(found, f"large {block_m}x{block_n}/{warps}/{stages}",
                lambda c=config: int6_us(28672, 8192, 4096, "large", c))  # type: ignore[misc]  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("int6_tiles.json"))
    parser.add_argument("--paths", default=",".join(PATHS), help="kernels whose tiles are timed")
    arguments = parser.parse_args()
    paths = arguments.paths.split(",")
    if unknown := [path for path in paths if path not in PATHS]:
        parser.error(f"--paths: {unknown[0]} isn't one of {', '.join(PATHS)}")
    torch.manual_seed(0)
    started = time.time()
    result: dict[str, Any] = {"command": f"int6_tiles.py --paths {arguments.paths}", "versions": versions()}
    result["sweep"] = sweep(paths)
    result["seconds"] = round(time.time() - started, 1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["sweep"], indent=0), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
