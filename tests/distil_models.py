"""A tiny proved model, students of it, and text, for the tests of distillation."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import Tensor

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.distil.data import TokenWindows
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program

LENGTH = 24


def proved(device: str = "cpu") -> Program:
    torch.manual_seed(0)
    module = zoo.build("nanogpt-gqa-flag")[0]
    with torch.no_grad():  # larger scores than a fresh model's, so that attention isn't uniform
        for block in module.h:
            block.attn.c_attn.weight.mul_(8)
    return Pipeline([Canonicalize(), ProveAttention()])(capture(module.to(device), {"idx": zoo.tokens().to(device)}))


def linear(teacher: Program, attn: str = "lawcat", **options: Any) -> Program:
    return Pipeline([LinearizeAttention(attn, **options)])(teacher.clone())


def text(count: int = 2400, seed: int = 5) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def windows(**options: Any) -> TokenWindows:
    return TokenWindows(**({"ids": text(), "length": LENGTH, "batch": 4} | options))


def trained(program: Program) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in program.graph_module.named_parameters() if n.startswith("lincompile_")}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mean(errors: dict[str, float]) -> float:
    return sum(errors.values()) / len(errors)
