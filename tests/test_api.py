"""The public API: its names, its signatures, and a model compiled with nothing but them."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
import zoo

import lincompile

NAMES = {
    "AttentionSite",
    "Canonicalize",
    "Compiled",
    "LincompileError",
    "LinearizeAttention",
    "PassResult",
    "Pipeline",
    "Program",
    "ProveAttention",
    "Quantize",
    "SequenceParallel",
    "W6A16",
    "W6A6",
    "W6A8",
    "W8A8",
    "__version__",
    "capture",
    "compile",
    "linearize_",
    "load",
    "make_stateful",
    "open",
    "quantize_",
    "register",
}


def test_public_names_are_pinned() -> None:
    assert set(lincompile.__all__) == NAMES
    for name in NAMES:
        assert getattr(lincompile, name) is not None
    assert set(dir(lincompile)) >= NAMES


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lincompile.nonsense


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("capture", ["module", "example", "prefix", "dynamic_shapes"]),
        ("linearize_", ["module", "attn", "example", "keep", "count", "sliding", "window", "seed", "rotary", "lowest"]),
        ("make_stateful", ["program", "check"]),
        ("open", ["directory", "device", "verify"]),
    ],
)
def test_signatures_are_pinned(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(lincompile, name)).parameters) == parameters


def test_compile_takes_the_options_of_the_command_line() -> None:
    from lincompile.lowering.options import Options

    names = {field.name for field in dataclasses.fields(Options)}
    assert names >= {"attn", "quant", "keep_softmax", "distil", "tokens", "time", "target", "device", "dtype", "seed"}
    assert names >= {"quant_method", "quant_plan", "quant_scores", "quant_embeddings", "calibrate", "calibrate_tokens"}
    assert names >= {"quant_tune", "quant_tune_steps", "quant_tune_time"}


def test_the_options_of_tuning_are_pinned() -> None:
    names = [field.name for field in dataclasses.fields(lincompile.Quantize)]
    assert [name for name in names if name.startswith("tune")] == [
        "tune", "tune_steps", "tune_time", "tune_batch", "tune_rate", "tune_seed", "tune_checkpoint", "tune_data",
        "tune_progress",
    ]  # fmt: skip


def test_passes_are_frozen_dataclasses() -> None:
    for cls in (lincompile.Canonicalize, lincompile.ProveAttention, lincompile.LinearizeAttention, lincompile.Quantize):
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_the_passes_by_hand_equal_compile() -> None:
    module, example = zoo.build("nanogpt")
    compiled = lincompile.compile(module, example=example, attn="gla", quant="w6a8")
    program = lincompile.Pipeline(
        [
            lincompile.Canonicalize(),
            lincompile.ProveAttention(),
            lincompile.LinearizeAttention("gla"),
            lincompile.Quantize("w6a8"),
        ]
    )(lincompile.capture(module, example))
    tokens = torch.randint(0, 97, (1, 17))
    assert torch.equal(program(tokens), compiled.program(tokens))
    assert [site.method for site in program.sites] == ["gla", "gla"]
    site = program.sites[0]
    assert (site.path, site.kind, site.window, site.verdict) == ("h.0.attn", "causal", None, "rewrite")
    assert (site.heads, site.kv_heads, site.head_dim) == (4, 4, 8)
    assert site.max_error is not None and site.max_error < 1e-5
