"""The step graph against the full program: chunks, left padding, caches, precision, and what has no step form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.errors import RefusedError
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.stateful import StepProgram, make_full, make_stateful
from lincompile.passes.stepping.check import TOLERANCE, tolerance_of

Proved = Callable[[str], SimpleNamespace]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-gqa", "lawcat", {}),
    ("llama-gqa", "gla", {}),
    ("llama-gqa", "gated-delta", {}),
    ("llama-gqa", "lawcat", {"window": 5}),
    ("gpt2", "gla", {"window": 5, "keep": (1,)}),
    ("llama", "hedgehog", {}),
    ("llama", "softmax", {}),
    ("qwen3", "lawcat", {"keep": (0,)}),
    ("gpt-neox", "gla", {}),
    ("gpt2", "lawcat", {"keep": (1,)}),
    ("mistral", "softmax", {}),
    ("gemma3", "lawcat", {}),
    ("nanogpt", "lawcat", {"keep": (1,)}),
    ("nanogpt-additive-buffer", "softmax", {}),
]


def student(model: SimpleNamespace, attn: str, **options: Any) -> Program:
    program = Pipeline([LinearizeAttention(attn, **options)])(model.program.clone())
    with torch.no_grad():  # away from the identity, where heads and taps could be confused unseen
        for name, parameter in program.graph_module.named_parameters():
            if name.startswith("lincompile_attention"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return program


def full(program: Program, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    values = {"mask": mask, "positions": positions, "tokens": tokens, "features": tokens}
    given = {}
    for item in program.inputs:
        dtype = program.placeholder(item.name).meta["val"].dtype
        given[item.name] = values[item.role].to(dtype)
    with torch.no_grad():
        result = program(**given)
    return result if isinstance(result, Tensor) else result[0]


def in_chunks(
    step: StepProgram, tokens: Tensor, mask: Tensor, positions: Tensor, sizes: list[int], trim: bool = False
) -> Tensor:
    states, parts, begin = step.initial_states(tokens.shape[0]), [], 0
    with torch.no_grad():
        for size in sizes:
            piece = slice(begin, begin + size)
            out, states = step(tokens[:, piece], positions[:, piece], mask[:, piece], states)
            parts.append(out)
            begin += size
            if trim:  # a sliding site needs no more than its window
                states = [step.trim(spec, state) for spec, state in zip(step.states, states, strict=True)]
    return torch.cat(parts, 1)


@pytest.fixture(scope="module")
def stepped(proved: Proved) -> Callable[..., tuple[Program, StepProgram]]:
    """(program, its step form) of a case, made once."""
    cache: dict[str, tuple[Program, StepProgram]] = {}

    def get(name: str, attn: str, options: dict[str, Any]) -> tuple[Program, StepProgram]:
        key = f"{name} {attn} {options}"
        if key not in cache:
            program = student(proved(name), attn, **options)
            cache[key] = program, make_stateful(program)
        return cache[key]

    return get


@pytest.mark.parametrize(("name", "attn", "options"), CASES)
def test_chunks_equal_the_full_forward(stepped: Any, name: str, attn: str, options: dict[str, Any]) -> None:
    program, step = stepped(name, attn, options)
    assert step.max_error is not None and step.max_error <= 1e-4
    tokens = torch.randint(3, zoo.VOCAB, (2, 33))
    mask = torch.ones(2, 33, dtype=torch.bool)
    positions = torch.arange(33).expand(2, 33)
    wanted = full(program, tokens, mask, positions)
    for sizes in ([19, *[1] * 14], [16, 1, 1, 15]):
        got = in_chunks(step, tokens, mask, positions, sizes, trim=True)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    roles = {spec.role for spec in step.states}
    kept = any(site.method == "softmax" or site.near for site in program.sites)
    assert ("mask" in roles) == kept == ("key" in roles)
    for spec, state in zip(step.states, step.initial_states(2), strict=True):
        assert state.shape == (2, *(0 if n is None else n for n in spec.shape)) and state.dtype == spec.dtype


@pytest.mark.parametrize(("name", "attn", "options"), [c for c in CASES if c[0] not in zoo.NANOGPT])
def test_left_padding_equals_running_alone(stepped: Any, name: str, attn: str, options: dict[str, Any]) -> None:
    _, step = stepped(name, attn, options)
    assert not step.uniform_positions
    tokens = torch.randint(3, zoo.VOCAB, (3, 17))
    lengths = [17, 11, 5]
    mask = torch.stack([torch.arange(17) >= 17 - n for n in lengths])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    together = in_chunks(step, tokens, mask, positions, [9, 1, 7])
    for row, n in enumerate(lengths):
        ones = torch.ones(1, n, dtype=torch.bool)
        alone = in_chunks(step, tokens[row : row + 1, 17 - n :], ones, torch.arange(n)[None], [n])
        torch.testing.assert_close(together[row : row + 1, 17 - n :], alone, rtol=1e-4, atol=1e-4)


def test_state_stays_constant_where_nothing_is_kept(proved: Proved) -> None:
    step = make_stateful(student(proved("llama-gqa"), "lawcat"))
    assert step.state_bytes(1, 8_192) == step.state_bytes(1, 32_768) > 0
    near = make_stateful(student(proved("llama-gqa"), "lawcat", window=5))
    assert near.state_bytes(1, 8_192) == near.state_bytes(1, 32_768) > step.state_bytes(1, 8_192)
    assert {near.limit(spec) for spec in near.states if None in spec.shape} == {5}
    half = make_stateful(student(proved("llama-gqa"), "lawcat", window=5, keep=(0,)))
    assert {half.limit(spec) for spec in half.states if spec.role == "mask"} == {None}
    kept = make_stateful(student(proved("llama-gqa"), "softmax"))
    assert kept.state_bytes(1, 32_768) == 4 * kept.state_bytes(1, 8_192)
    sliding = make_stateful(student(proved("mistral"), "softmax"))
    keys = [s for s in sliding.states if s.role == "key"]
    assert keys and all(s.bytes(1, 8_192, 5) == s.bytes(1, 32_768, 5) for s in keys)


def test_the_program_is_left_as_it_was(proved: Proved) -> None:
    program = student(proved("llama"), "lawcat", keep=(0,))
    before, sites = str(program.graph_module.graph), [site.record() for site in program.sites]
    make_stateful(program)
    assert str(program.graph_module.graph) == before and [site.record() for site in program.sites] == sites


def prove(module: nn.Module, example: dict[str, Tensor]) -> Program:
    return Pipeline([Canonicalize(), ProveAttention()])(capture(module.eval(), example))


@pytest.mark.parametrize("attn", ["lawcat", "gla", "softmax"])
def test_float64_steps_agree_to_1e_9(attn: str) -> None:
    torch.manual_seed(1)
    program = prove(zoo.NanoGPT(layers=1).double(), {"idx": zoo.tokens()})
    assert [site.verdict for site in program.sites] == ["rewrite"]
    program = student(SimpleNamespace(program=program), attn)
    step = make_stateful(program)
    tokens, mask, positions = (
        torch.randint(0, 97, (2, 30)),
        torch.ones(2, 30, dtype=torch.bool),
        torch.arange(30).expand(2, 30),
    )
    wanted = full(program, tokens, mask, positions)
    assert wanted.dtype == torch.float64
    got = in_chunks(step, tokens, mask, positions, [13, 1, 1, 15])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_a_step_form(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    program = prove(zoo.NanoGPT(layers=2, width=384).to(dtype), {"idx": zoo.tokens()})
    step = make_stateful(student(SimpleNamespace(program=program), "lawcat"))
    assert step.max_error <= tolerance_of(program)
    if dtype == torch.float16:  # products of bfloat16 may not depend on their shapes
        assert step.max_error > TOLERANCE  # rounding, which the float32 limit would refuse


# ---- what has no step form


class Mixer(zoo.NanoGPT):
    """A causal decoder that also moves information between tokens outside its attention."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__(layers=1)
        self.mix = mix

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        return self.lm_head(self.mix(self.h[0](x)))


class Shift(nn.Module):
    """``x[t] + x[t − by]``: near (by 1) or far past every short check."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 2, dilation=by, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        by = self.conv.dilation[0]
        moved: Tensor = self.conv(nn.functional.pad(x.transpose(1, 2), (by, 0))).transpose(1, 2)
        return x + moved


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x + x.mean(1, keepdim=True),
    "cumsum": lambda x: x + x.cumsum(1),
    "flip": lambda x: x + x.flip(1),
    "shift": Shift(1),
    "far-shift": Shift(40),
    "far-norm": lambda x: x * (1 + (x.square().sum(1, keepdim=True) > 1e9)),
    "length": lambda x: x * (x.shape[1] / 600 + 1),
    "index-select": lambda x: x + x.index_select(1, torch.arange(x.shape[1]).clamp(max=20)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MIXERS), ("mean", torch.bfloat16), ("shift", torch.bfloat16)],
)
def test_mixing_outside_attention_is_refused(name: str, dtype: torch.dtype) -> None:
    program = prove(copy.deepcopy(Mixer(MIXERS[name])).to(dtype), {"idx": zoo.tokens()})
    assert program.sites[0].proved
    with pytest.raises(RefusedError, match="no step form"):
        make_stateful(Pipeline([LinearizeAttention("lawcat")])(program))


@pytest.mark.parametrize(
    ("mix", "op", "dtype"),
    [
        (lambda x: x + x.mean(0, keepdim=True), "mean", torch.float32),
        (lambda x: x + x.mean(0, keepdim=True), "mean", torch.bfloat16),
        (lambda x: x + x.roll(1, 0), "roll", torch.float32),
        (lambda x: x + x.flip(0).cumsum(0), "flip", torch.float32),
    ],
)
def test_rows_of_a_batch_that_influence_one_another_are_refused(
    mix: Callable[[Tensor], Tensor], op: str, dtype: torch.dtype
) -> None:
    program = prove(Mixer(mix).to(dtype), {"idx": zoo.tokens()})
    reason = f"aten.{op}.*lets rows of a batch influence one another.*test_stateful"
    with pytest.raises(RefusedError, match=reason):
        make_stateful(Pipeline([LinearizeAttention("lawcat")])(program))


def test_rows_that_a_layout_moves_are_found_by_running() -> None:
    program = prove(
        Mixer(lambda x: x + x.transpose(0, 1).flatten(0, 1).unflatten(0, x.shape[:2])), {"idx": zoo.tokens()}
    )
    reason = r"rows of a batch influence one another, first in 'aten.*test_stateful"
    with pytest.raises(RefusedError, match=reason):
        make_stateful(Pipeline([LinearizeAttention("lawcat")])(program))


def test_a_model_of_one_length_has_no_program_to_save() -> None:
    program = prove(Mixer(lambda x: x + torch.linspace(0, 1, x.shape[1])[:, None]), {"idx": zoo.tokens()})
    assert any("sequence" in note for note in program.notes)
    with pytest.raises(RefusedError, match=f"takes exactly {zoo.tokens().shape[1]} tokens"):
        make_full(program)


class Rotary(nn.Module):
    """A hand-written rotary attention whose frequencies grow past a trained length (dynamic NTK scaling)."""

    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.embed, self.qkv, self.head = nn.Embedding(97, 32), nn.Linear(32, 96), nn.Linear(32, 97)

    def rotate(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        base = torch.full((), 10_000.0)
        if self.dynamic:
            base = base * torch.clamp(torch.scalar_tensor(length) / 64, min=1.0)
        frequencies = base ** (-torch.arange(0, 8, 2) / 8)
        angle = torch.arange(length)[:, None] * frequencies[None, :]
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, idx: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.embed(idx)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        logits: Tensor = self.head(y.transpose(1, 2).flatten(2))
        return logits


def test_dynamic_rotary_scaling_is_refused_and_a_fixed_one_is_not() -> None:
    example = {"idx": zoo.tokens()}
    assert make_stateful(prove(Rotary(False), example)).uniform_positions
    with pytest.raises(RefusedError, match="length"):
        make_stateful(prove(Rotary(True), example))


@pytest.mark.parametrize(
    ("name", "reason"), [("torch-encoder", "bidirectional"), ("vit", "no token sequence"), ("t5", "isn't proved")]
)
def test_models_without_a_step_form_say_why(proved: Proved, name: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        make_stateful(proved(name).program)


@pytest.mark.parametrize(("attn", "options"), [("softmax", {}), ("lawcat", {"window": 5})])
def test_caches_and_inputs_are_declared_where_the_model_is(proved: Proved, attn: str, options: dict[str, Any]) -> None:
    """A model captured on a GPU has its values there: caches declared elsewhere would be refused beside them."""
    program = student(proved("llama-gqa"), attn, **options)
    elsewhere = torch.device("meta")
    program.graph_module.to(elsewhere)
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta["val"] = value.to(elsewhere)
    step = make_stateful(program, check=False)
    values = [node.meta["val"] for node in step.graph_module.graph.nodes if node.op == "placeholder"]
    assert len(values) > 4 and all(value.device == elsewhere for value in values)
