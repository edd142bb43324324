"""Norms as one op and packed linears joined: the same numbers, nothing stored twice, and reasons for what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lincompile
from lincompile.lowering.artefact.graph_file import read_graph, weights_of
from lincompile.lowering.artefact.manifest import PROGRAM
from lincompile.lowering.fusion import layers
from lincompile.lowering.fusion.chains import Lowered
from lincompile.lowering.fusion.layers import fuse_norms, join_layers, merge_masks
from lincompile.lowering.fusion.one_token import fuse_packed
from lincompile.lowering.generate import Session
from lincompile.lowering.package import open_artefact
from lincompile.lowering.triton import lower
from lincompile.passes.stateful import StepProgram
from lincompile.passes.stepping.last_token import last_token_only

WIDTH = 32


def counts(step: StepProgram) -> Counter[str]:
    return Counter(str(node.target) for node in step.graph_module.graph.nodes if node.op == "call_function")


def outputs(step: StepProgram) -> list[Tensor]:
    """Logits and states of two rows, one of them padded, in three chunks."""
    tokens = torch.randint(0, zoo.VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, :4] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    states, logits = step.initial_states(2), []
    for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
        out, states = step(tokens[:, part], positions[:, part], mask[:, part], states)
        logits.append(out)
    return [torch.cat(logits, 1), *states]


def stored(step: StepProgram) -> int:
    tensors = [*step.graph_module.parameters(), *step.graph_module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(("quant", "op"), [("w6a8", "int6_linear"), ("w8a8", "int8_linear")])
def test_a_llama(quant: str, op: str, tmp_path: Path) -> None:
    module, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(module, example=example, attn="lawcat", quant=quant)
    before, size, names = outputs(compiled.step), stored(compiled.step), counts(compiled.step)
    plain, report = lower(compiled.step)
    assert (report.norms, report.joined, report.kept) == (5, 0, {})
    torch.testing.assert_close(outputs(plain), before, rtol=1e-4, atol=1e-5)

    joined, report = lower(compiled.step, decoding=True)
    assert (report.norms, report.joined, report.kept) == (5, 6, {})  # of each layer q, k, v and gate, up
    after = counts(joined)
    assert "aten.rsqrt.default" not in after and after["lincompile.lawcat_inputs.default"] == report.inputs == 2
    layers = f"lincompile.{op}.default"
    if op == "int6_linear":  # 4 a layer; the last norm's reader is the float head
        assert (after["lincompile.int6_layer.default"], after[layers], after["aten.rms_norm.default"]) == (8, 0, 1)
    else:
        assert (after[layers], after["aten.rms_norm.default"]) == (names[layers] - 6, 5)
    assert "5 norms too; 6 linear layers were joined to others of the same input" in report.summary()
    assert f"2 sites' inputs and {report.layers} packed layers" in report.summary()
    torch.testing.assert_close(outputs(joined), before, rtol=1e-4, atol=1e-5)

    assert counts(compiled.step) == names and stored(compiled.step) == size
    torch.testing.assert_close(outputs(compiled.step), before, rtol=0, atol=0)
    lower(compiled.step, decoding=True)
    assert stored(compiled.step) == stored(joined) == size, "what is joined already isn't copied again"

    last = last_token_only(joined)
    assert last is not None
    tokens = torch.randint(0, zoo.VOCAB, (2, 5))
    inputs = tokens, torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.bool)
    want, got = (step(*inputs, step.initial_states(2))[0] for step in (joined, last))
    assert got.shape[1] == 1
    torch.testing.assert_close(got, want[:, -1:], rtol=1e-5, atol=1e-6)

    artefact = open_artefact(compiled.save(tmp_path / "out"))
    torch.testing.assert_close(outputs(artefact.step), before, rtol=0, atol=0)
    assert Session(joined).vocab_size == zoo.VOCAB


def test_a_tied_table_is_joined_to_nothing() -> None:
    """The planes of an embedding that is the head's, too, stay readable for both."""
    module, example = zoo.build("llama-gqa")
    with torch.no_grad():
        module.model.lm_head.weight = module.model.model.embed_tokens.weight
    compiled = lincompile.compile(module, example=example, attn="lawcat", quant="w6a8", quant_embeddings=True)
    before = outputs(compiled.step)
    torch.testing.assert_close(outputs(lower(compiled.step, decoding=True)[0]), before, rtol=1e-4, atol=1e-5)


class Norm(nn.Module):
    """A norm between two linears, with something about it changed."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight, self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5), norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x), self.weight))
        return result


def root(x: Tensor, power: int = 2, dim: int = -1, epsilon: float = 1e-3) -> Tensor:
    return torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + epsilon)


def read_twice(x: Tensor, weight: Tensor) -> Tensor:
    unit = x * root(x)
    return unit * weight + unit


def fused(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> tuple[Lowered, float]:
    """What became of a norm, and the largest difference relative to the output."""
    torch.manual_seed(0)
    module, x = Norm(norm).to(dtype), torch.randn(3, 7, WIDTH, dtype=dtype)
    program = lincompile.Pipeline([lincompile.Canonicalize()])(lincompile.capture(module, {"x": x[:2, :5]}))
    report = Lowered()
    fuse_norms(program.graph_module, report)
    with torch.no_grad():
        want, have = module(x), program(x)
    return report, float((want - have).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, weight: weight * (x * root(x)),
        lambda x, weight: root(x) * x * weight,
        lambda x, weight: x * torch.rsqrt(0.5 + (x * x).mean(-1, True)) * weight,
        lambda x, weight: weight * (x.float() * root(x.float())).to(x.dtype),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_any_spelling(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    report, error = fused(norm, dtype)
    assert (report.norms, report.kept) == (1, {})
    assert error < 1e-6


def test_a_norm_in_half_precision() -> None:
    report, error = fused(lambda x, weight: weight * (x.float() * root(x.float())).to(x.dtype), torch.bfloat16)
    assert (report.norms, report.kept) == (1, {})
    assert error < 2e-2


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda x, weight: x * root(x, dim=1) * weight, "differ by"),
        (lambda x, weight: x * root(x.abs(), power=3) * weight, "multiplies something else than what was squared"),
        (lambda x, weight: x * root(x, power=4) * weight, "differ by"),
        (lambda x, weight: x * root(x + 1) * weight, "multiplies something else than what was squared"),
        (lambda x, weight: x * root(x) * weight.sum(), "without a stored weight"),
        (lambda x, weight: x * root(x), "without a stored weight"),
        (read_twice, "is read by 2 nodes"),
    ],
)
def test_what_only_looks_like_a_norm_is_kept(norm: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    report, error = fused(norm)
    assert report.norms == 0 and error < 1e-6
    assert [reason in text for text in report.kept.values()] == [True], report.kept


def test_sums_in_half_precision_are_kept() -> None:
    report, _ = fused(lambda x, weight: x * root(x) * weight, torch.bfloat16)
    assert report.norms == 0 and "is summed in half precision" in next(iter(report.kept.values()))


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.plain, self.other = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, again = self.q(x), self.q(x * 2)
        return torch.cat((q, self.k(x), self.plain(x), self.other(x * 3), again), -1)


def test_only_layers_alike_are_joined() -> None:
    torch.manual_seed(0)
    module = Linears()
    lincompile.quantize_(module, lincompile.W6A8(), filter_fn=lambda layer, name: name != "other")
    x = torch.randn(2, 5, WIDTH)
    want = module(x)
    program = lincompile.capture(module, {"x": x})
    report = Lowered()
    join_layers(program.graph_module, report, own=False)
    assert report.joined == 1, "q and k; not the one without bias, nor those of other inputs"
    torch.testing.assert_close(program(x), want, rtol=1e-5, atol=1e-6)


class Float(nn.Module):
    """Linear layers of the names given, by what ``forward`` makes of them."""

    def __init__(self, function: Callable[..., Tensor], names: str, bias: bool = False, out: int = WIDTH) -> None:
        super().__init__()
        self.function = function
        for name in names:
            setattr(self, name, nn.Linear(WIDTH, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def joined(module: nn.Module, own: bool = True) -> tuple[Lowered, float]:
    """What was joined, and the largest difference relative to the output."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, WIDTH)
    with torch.no_grad():
        want = module(x)
        program, report = lincompile.capture(module, {"x": x[:2, :5]}), Lowered()
        join_layers(program.graph_module, report, own)
        return report, float((program(x) - want).abs().max() / want.abs().max())


def test_float_layers_are_joined_where_nobody_else_holds_them() -> None:
    module = Float(lambda m, x: m.a(x) * m.b(x), "ab", bias=True)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    report, error = joined(module, own=False)
    assert report.joined == 0 and error < 1e-6 and places == [p.data_ptr() for p in module.parameters()]
    report, error = joined(module)
    assert report.joined == 1 and error < 1e-6


def cross(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(m.a(x) + m.b(x))
    result: Tensor = m.a(y) + m.c(y)
    return result


def test_a_weight_of_two_groups_is_joined_to_neither() -> None:
    report, error = joined(Float(cross, "abc"))
    assert report.joined == 0 and error < 1e-6


def test_layers_that_share_a_bias_or_memory_stay_apart() -> None:
    tied: Any = Float(lambda m, x: m.a(x) * m.b(x), "ab", bias=True)
    tied.b.bias = tied.a.bias
    alias: Any = Float(lambda m, x: m.a(x) * m.b(x), "ab")
    alias.b.weight = nn.Parameter(alias.a.weight.data)
    for module in (tied, alias):
        assert joined(module)[0].joined == 0


def test_rows_that_lie_side_by_side_in_another_order() -> None:
    module: Any = Float(lambda m, x: m.a(x) * m.b(x), "ab", out=1)
    columns = torch.randn(2 * WIDTH, 1)
    module.a.weight.data, module.b.weight.data = columns[:WIDTH].t(), columns[WIDTH:].t()
    report, error = joined(module)
    assert report.joined == 1 and error < 1e-6


def written_later(x: Tensor) -> Tensor:
    first, second = x > 0, x > 0
    second[..., 0] = False
    return torch.where(first, x, 0) + 2 * torch.where(second, x, 1)


def test_masks_that_are_written_later_are_not_merged() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(written_later(x))
            return result

    module, x = Module(), torch.randn(3, 7, WIDTH)
    program = lincompile.capture(module, {"x": x[:2, :5]})
    merge_masks(program.graph_module)
    torch.testing.assert_close(program(x), module(x))


def packed(function: Callable[..., Tensor], names: str, **out: int) -> tuple[Lowered, Counter[str], float]:
    """What became of packed layers and what stands beside them."""
    torch.manual_seed(0)
    module: Any = Float(function, names)
    for name, width in out.items():
        setattr(module, name, nn.Linear(width, WIDTH, bias=False))
    module.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
    lincompile.quantize_(module, lincompile.W6A8())
    x, report = torch.randn(3, 7, WIDTH), Lowered()
    program = lincompile.capture(module, {"x": x[:2, :5]})
    join_layers(program.graph_module, report, own=False)
    fuse_packed(program.graph_module, report)
    with torch.no_grad():
        want, have = module(x), program(x)
    targets = [str(node.target) for node in program.graph_module.graph.nodes if node.op == "call_function"]
    return report, Counter(targets), float((want - have).abs().max() / want.abs().max())


def up_first(m: Any, x: Tensor) -> Tensor:
    h = nn.functional.rms_norm(x, (WIDTH,), m.weight, 1e-6)
    u = m.u(h)
    return x + m.d(nn.functional.silu(m.g(h)) * u)


def parallel(m: Any, x: Tensor) -> Tensor:
    h = nn.functional.rms_norm(x, (WIDTH,), m.weight, 1e-6)
    return x + m.d(nn.functional.silu(m.g(h)) * m.u(h)) + m.o(torch.tanh(m.q(h) + m.k(h)))


def test_a_gate_stands_before_what_it_gates_however_it_was_written() -> None:
    report, targets, error = packed(up_first, "gud")
    assert (report.layers, report.kept) == (2, {}) and error < 1e-5
    assert not {"aten.silu.default", "aten.add.Tensor"} & set(targets)
    report, targets, error = packed(parallel, "gudoqk")
    assert report.kept == {} and error < 1e-5 and "aten.silu.default" not in targets


def swapped(m: Any, x: Tensor) -> Tensor:
    both = m.a(x)
    return x + m.d(nn.functional.silu(both[..., WIDTH // 2 :]) * both[..., : WIDTH // 2])


def test_halves_in_another_order_stay_and_the_sum_is_taken_in() -> None:
    report, targets, error = packed(swapped, "a", d=WIDTH // 2)
    assert (report.layers, report.kept) == (1, {}) and targets["aten.silu.default"] == 1 and error < 1e-5


def test_gradients_come_from_the_program_as_it_was() -> None:
    module, example = zoo.build("llama-gqa")
    step = lincompile.compile(module, example=example, attn="lawcat", quant="w6a8").step
    for own in (False, True):
        session = Session(lower(step, decoding=True, own=own)[0], plain=step)
        weight = next(p for name, p in step.graph_module.named_parameters() if "embed_tokens" in name)
        weight.requires_grad_()
        tokens = torch.randint(0, zoo.VOCAB, (1, 5))
        inputs = tokens, torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool)
        session.advance(*inputs, session.initial_states(1))[0].square().sum().backward()
        assert weight.grad is not None and float(weight.grad.norm()) > 0
        weight.grad = None


def test_a_session_made_in_inference_mode_leaves_the_module_trainable() -> None:
    module, example = zoo.build("llama-gqa")
    step = lincompile.compile(module, example=example, attn="lawcat").step
    with torch.inference_mode():
        lower(step, decoding=True, own=True)
    assert not any(parameter.is_inference() for parameter in module.parameters())


@pytest.mark.parametrize("model", ["llama-gqa", "nanogpt"])
@pytest.mark.parametrize("quant", ["none", "w6a8"])
def test_an_artefact_is_lowered_where_it_was_not_traced(
    model: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced on a CPU, opened on a GPU, for which the meta device stands here: float layers are joined there too."""
    monkeypatch.setattr(layers, "_apart", lambda *args: True)  # it tells tensors by their addresses, which are 0 there
    module, example = zoo.build(model)
    compiled = lincompile.compile(module, example=example, attn="lawcat", quant=quant)
    artefact = open_artefact(compiled.save(tmp_path / "out"))
    away = {name: tensor.to("meta") for name, tensor in weights_of(artefact.step.graph_module).items()}
    graph = read_graph(artefact.directory / PROGRAM, away, set(artefact.manifest["parameter_names"]))
    step, report = lower(artefact.around(graph), decoding=True, own=True)
    assert report.joined or model == "nanogpt"
    for node in step.graph_module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            assert not isinstance(value, Tensor) or value.device.type == "meta", node.format_node()
    assert [n.name for n in artefact.step.graph_module.graph.nodes] == [n.name for n in graph.graph.nodes]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama-gqa", "nanogpt"])
@pytest.mark.parametrize("quant", ["none", "w6a8"])
def test_an_artefact_of_a_cpu_runs_on_a_gpu(model: str, quant: str, tmp_path: Path) -> None:
    module, example = zoo.build(model)
    folder = lincompile.compile(module, example=example, attn="lawcat", quant=quant).save(tmp_path / "out")
    here, there = (open_artefact(folder, device=device) for device in ("cpu", "cuda"))
    tokens, whole = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.ones(1, 6, dtype=torch.bool)
    for part in (slice(0, 6), slice(0, 1)):  # a prompt, and a token by itself
        given = tokens[:, part], torch.arange(6)[None, part], whole[:, part]
        expected, _ = here.session.step(*given, here.session.initial_states(1))
        found, _ = there.session.step(*given, there.session.initial_states(1))
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
    assert len(there.generate([1, 2, 3], 8)) == 11
