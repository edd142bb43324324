"""Reading a prompt computes the logits of each chunk's last token only, and changes nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from distil_models import linear, proved
from torch.fx import Node

from lincompile.lowering.generate import Session, generate, prefill
from lincompile.passes.graph import target_of
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.quantize import Quantize
from lincompile.passes.stateful import StepProgram, make_stateful
from lincompile.passes.stepping.last_token import _alone, _projection, last_token_only

TOKENS = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(2))
EVERY = torch.ones_like(TOKENS, dtype=torch.bool)


def quantized() -> StepProgram:
    return make_stateful(Pipeline([Quantize("w6a8")])(linear(proved(), "gla")), check=False)


def sliced(node: Node) -> str:
    """``last`` for a node that the last token's row reaches by itself."""
    sources = [item for item in node.all_input_nodes if item.op == "call_function"]
    last = any(target_of(item) is torch.ops.aten.slice.Tensor and item.args[1:3] == (1, -1) for item in sources)
    return "last" if last or any(sliced(item) for item in sources) else ""


@pytest.mark.parametrize("made", ["linear", "softmax", "quantized"])
def test_equals_the_last_row_of_all_logits(made: str) -> None:
    steps = {
        "linear": lambda: make_stateful(linear(proved())),
        "softmax": lambda: make_stateful(proved()),
        "quantized": quantized,
    }
    step = steps[made]()
    short = last_token_only(step)
    assert short is not None
    positions = torch.arange(11).expand(2, 11)
    with torch.no_grad():
        logits, states = step(TOKENS, positions, EVERY, step.initial_states(2))
        last, same = short(TOKENS, positions, EVERY, step.initial_states(2))
    assert last.shape == (2, 1, logits.shape[-1])
    torch.testing.assert_close(last[:, 0], logits[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(states, same, strict=True))
    cut = [node for node in short.graph_module.graph.nodes if "last" in str(sliced(node))]
    products = [node for node in cut if "linear" in str(target_of(node))]
    assert len(products) >= 2, "the last layer's products got all rows"
    for original, shared in zip(step.graph_module.parameters(), short.graph_module.parameters(), strict=True):
        assert original is shared


def test_prefill_takes_it_unless_all_logits_are_collected(toy: SimpleNamespace) -> None:
    session = Session(toy.step)
    widths: list[int] = []
    plain = session.step

    def counted(*arguments: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        result = plain(*arguments)
        widths.append(result[0].shape[1])
        return result

    session.step = counted  # type: ignore[method-assign]
    collected: list[torch.Tensor] = []
    whole = prefill(session, TOKENS, EVERY, chunk=4, collect=lambda _, logits: collected.append(logits))
    assert widths == [4, 4, 3] and torch.cat(collected, 1).shape[1] == 11
    read = prefill(session, TOKENS, EVERY, chunk=4)
    assert widths == [4, 4, 3], "all logits were computed"
    torch.testing.assert_close(read.logits, whole.logits)
    assert generate(session, [TOKENS[0].tolist()], 3).tokens[0][0] == int(whole.logits[0].argmax())


def test_what_others_read_keeps_all_tokens() -> None:
    """The residual stream before the last gated layer, given out as well: what comes before it stays whole."""
    step = make_stateful(linear(proved()))
    graph = step.graph_module.graph
    projection = _projection(step.graph_module)
    assert projection is not None
    everything = _alone(step.graph_module, projection)
    inner = next(node for node in graph.nodes if node in everything and "linear" in str(target_of(node)))
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((*output.args[0], inner),)
    step.graph_module.recompile()
    fewer = _alone(step.graph_module, projection)
    assert inner not in fewer and projection in fewer and len(fewer) < len(everything)
    short = last_token_only(step)
    assert short is not None
    inputs = TOKENS, torch.arange(11).expand(2, 11), EVERY, *step.initial_states(2)
    with torch.no_grad():
        whole, last = step.graph_module(*inputs), short.graph_module(*inputs)
    torch.testing.assert_close(whole[-1], last[-1])
    torch.testing.assert_close(whole[0][:, -1:], last[0])


def test_another_end_is_left_alone() -> None:
    """An output that isn't a linear layer's: here the hidden states of a norm."""
    step = make_stateful(linear(proved()))
    output = next(node for node in step.graph_module.graph.nodes if node.op == "output")
    norm = next(
        n for n in reversed(step.graph_module.graph.nodes) if "layer_norm" in str(target_of(n)) or "norm" in n.name
    )
    output.args = ((norm, *output.args[0][1:]),)
    assert last_token_only(step) is None


def test_a_compiled_package_has_no_graph(toy: SimpleNamespace) -> None:
    package = StepProgram(lambda *arguments: arguments, toy.states)  # type: ignore[arg-type]
    assert last_token_only(package) is None
