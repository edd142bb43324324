"""The LAWCAT block as one would write it with flash-linear-attention: a peer of ``lawcat_block.py``.

FLA's Triton kernels where it has one (``causal_conv1d``, ``chunk_gla``, ``chunk_hgrn``), torch ops for the rest, all
tensors laid out ``[B, T, H, ·]``, as FLA takes them. Variants:

* ``fla compiled``: the normaliser a column of ones beside v, torch ops under ``torch.compile``;
* ``fla compiled, hgrn``: the normaliser apart, as q · (decayed sum of k), whose sum is ``chunk_hgrn``'s;
* ``fla compiled, no normaliser``: less than the block computes, so a bound on what any other way of normalising gives;
* ``fla``: the first with its torch ops eager.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lincompile.passes.linearization.methods import GATE_TEMPERATURE, Lawcat

EPSILON = 1e-10
# A column of ones, and zeros up to a multiple of 16 columns: rows stay aligned to 32 bytes.
COLUMNS = 16
# Those that compute what the block computes, and one more. Two in a row share what FLA has tuned.
EQUAL = ("fla compiled", "fla", "fla compiled, hgrn")
VARIANTS = (*EQUAL, "fla compiled, no normaliser")
# A variant farther from the block's output on a machine computes something else there: no peer. (The hgrn one is 0.73
# away on an H200 with Triton 3.6.)
FARTHEST = 0.05
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[B, T, H, D]`` to both softmaxes of the map, ``[B, T, H, 2 D]``."""
    y = torch.einsum("bthd,hde->bthe", x, weight.to(x.dtype)) + bias.squeeze(1).to(x.dtype)
    return torch.cat((torch.softmax(y, -1), torch.softmax(-y, -1)), -1)


def log_decays(m: Lawcat, x: Tensor) -> Tensor:
    """Hidden states ``[B, T, C]`` to log-decays ``[B, T, H, 2 D]``."""
    gate = functional.linear(functional.linear(x, m.gate.down), m.gate.up, m.gate.bias)
    log_decay = (functional.logsigmoid(gate.float()) / GATE_TEMPERATURE).clamp(min=m.gate.lowest)
    return log_decay.to(x.dtype).unflatten(-1, (m.shape.kv_heads, -1))


def stages(m: Lawcat, q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved q and k ``[B, T, H, D]`` and hidden states: features of both, log-decays."""
    return features(q, m.map.weight, m.map.bias), features(k, m.map.weight, m.map.bias), log_decays(m, x)


def widen(v: Tensor) -> Tensor:
    ones = torch.ones_like(v[..., :1])
    return torch.cat((v, ones, torch.zeros_like(v[..., : COLUMNS - 1])), -1)


def divide(out: Tensor, dim: int) -> Tensor:
    return out[..., :dim] / (out[..., dim : dim + 1] + EPSILON)


def divide_by_sum(out: Tensor, q: Tensor, total: Tensor) -> Tensor:
    normaliser = (q.float() * total.float()).sum(-1, keepdim=True)
    return (out.float() / (normaliser + EPSILON)).to(out.dtype)


def block(m: Lawcat, variant: str) -> Run:
    """q, k, v ``[B, H, T, D]`` and hidden states to the block's output ``[B, T, H, D]``.

    Raises:
        ImportError: flash-linear-attention isn't installed.
    """
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gla import chunk_gla

    before, wide, narrow, by_sum = stages, widen, divide, divide_by_sum
    if "compiled" in variant:
        before, wide, narrow, by_sum = (torch.compile(f, dynamic=False) for f in (stages, widen, divide, divide_by_sum))

    def convolved(y: Tensor, taps: Tensor) -> Tensor:
        flat = y.transpose(1, 2).flatten(2)  # a view: projections write [B, T, H, D]
        result: Tensor = causal_conv1d(flat, taps)[0].unflatten(-1, (y.shape[1], y.shape[3]))
        return result

    def run(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        feature_q, feature_k, decay = before(m, convolved(q, m.conv_q.weight), convolved(k, m.conv_k.weight), x)
        values = v.transpose(1, 2)
        if variant.endswith("no normaliser"):
            out: Tensor = chunk_gla(feature_q, feature_k, values, decay, scale=1.0)[0]
        elif variant.endswith("hgrn"):
            from fla.ops.hgrn import chunk_hgrn

            out = chunk_gla(feature_q, feature_k, values, decay, scale=1.0)[0]
            total = chunk_hgrn(feature_k.flatten(2), decay.flatten(2))[0].view_as(feature_k)
            out = by_sum(out, feature_q, total)
        else:
            out = narrow(chunk_gla(feature_q, feature_k, wide(values), decay, scale=1.0)[0], v.shape[-1])
        return out

    return run


@contextlib.contextmanager
def quick_tuning(warmup: int = 3, rep: int = 15) -> Iterator[None]:
    """Autotuned kernels that are reached inside time each configuration for so many milliseconds, not 25 and 100.

    FLA's block has hundreds of configurations in several variants: at the default its tuning took longer than the
    machine is lent for.
    """
    import triton

    active = triton.runtime.driver.active
    before = active.get_benchmarker
    active.get_benchmarker = lambda: functools.partial(triton.testing.do_bench, warmup=warmup, rep=rep)
    try:
        yield
    finally:
        active.get_benchmarker = before


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """What is called inside has all configurations of its autotuned Triton kernels compiled, by threads; none is timed.

    Tuned afterwards, in this process or, with Triton's files, in another, a kernel finds its configurations compiled.
    Set FLA_CACHE_RESULTS=0, so that the first configuration isn't written down as the best.
    """
    import triton
    from triton.runtime.autotuner import Autotuner

    reached: list[Any] = []

    def compile_one(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        reached.append(self)
        self.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True})
        return [1.0, 1.0, 1.0]

    # Configurations that don't fit are the tuner's business; older Tritons report them at the end.
    known = inspect.signature(triton.AsyncCompileMode).parameters
    options = {"ignore_errors": True} if "ignore_errors" in known else {}
    bench = Autotuner._bench
    Autotuner._bench = compile_one
    try:
        # Backward kernels are reached on the calling thread, where the mode is on.
        with (
            torch.autograd.set_multithreading_enabled(False),
            ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool,
            triton.AsyncCompileMode(pool, **options),
        ):
            yield
    finally:
        Autotuner._bench = bench
        for tuner in reached:
            tuner.cache.clear()
