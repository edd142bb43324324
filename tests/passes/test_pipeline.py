"""Pipelines: text that round-trips, errors that say what is wrong, and a verifier that names the pass and the node."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
import zoo

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError, PassError
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pass, PassResult, Pipeline, options_of, parse
from lincompile.passes.program import Program
from lincompile.passes.verify import op_name, verify


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(*zoo.build("nanogpt"))


@dataclass(frozen=True)
class Break:
    """Does what its option says to the first attention op."""

    how: str = "kind"
    name: str = field(default="break", init=False, metadata={"text": False})

    def run(self, program: Program) -> PassResult:
        node = next(n for n in program.graph_module.graph.nodes if op_name(n) == "softmax_attention")
        if self.how == "crash":
            raise KeyError("missing")
        if self.how == "kind":
            node.update_arg(4, "diagonal")
        elif self.how == "window":
            node.args = (*node.args[:4], "sliding", 0, *node.args[6:])
        elif self.how == "heads":
            node.update_arg(1, node.args[1].args[0])
        elif self.how == "graph":
            node.prepend(next(n for n in program.graph_module.graph.nodes if n.op == "output").prev)
        elif self.how == "shape":
            with program.graph_module.graph.inserting_before(node):
                program.graph_module.graph.call_function(torch.ops.aten.neg.default, (node.args[0],))
        return PassResult(program, True, {})


@pytest.mark.parametrize(
    "text",
    [
        "canonicalize",
        "canonicalize,prove",
        "prove{tolerance=0.001}",
        "canonicalize,prove,linearize{attn=gla,keep=0+3,seed=7}",
        "linearize{count=2,sliding=true}",
    ],
)
def test_text_round_trips(text: str) -> None:
    assert str(Pipeline(text)) == text
    assert str(Pipeline(str(Pipeline(text)))) == text


def test_text_builds_the_passes_it_names() -> None:
    assert parse(" canonicalize , linearize{attn=gla, keep=-1} ") == [
        Canonicalize(),
        LinearizeAttention("gla", keep=(-1,)),
    ]
    assert options_of(LinearizeAttention("gla", keep=(1, 2)))["keep"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("linearise", "unknown pass 'linearise'.*canonicalize.*linearize"),
        ("linearize{attention=gla}", "no option 'attention'.*attn, keep"),
        ("linearize{sliding=maybe}", "sliding=maybe"),
        ("prove{tolerance=small}", "tolerance=small.*float"),
        ("linearize{attn=gla", "can't read"),
        ("canonicalize;prove", "can't read"),
        ("linearize{name=x}", "no option 'name'"),
    ],
)
def test_wrong_text_says_what_and_what_else(text: str, message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        Pipeline(text)


def test_passes_are_frozen_dataclasses_with_one_method() -> None:
    for item in (Canonicalize(), ProveAttention(), LinearizeAttention(), Break()):
        assert isinstance(item, Pass) and dataclasses.is_dataclass(item)
        with pytest.raises(dataclasses.FrozenInstanceError):
            item.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kind", "pass 'break' broke the graph: node 'softmax_attention.*kind 'diagonal'"),
        ("window", "pass 'break' broke the graph: node 'softmax_attention.*sliding window of 0"),
        ("heads", "pass 'break' broke the graph: node 'softmax_attention"),
        ("graph", "pass 'break' broke the graph: "),
        ("shape", "pass 'break' broke the graph: node 'neg_default.* carries no shape"),
        ("crash", "pass 'break' failed: KeyError"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(captured: Program, how: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline([Canonicalize(), ProveAttention(), Break(how)])(captured.clone())


def test_history_trace_and_progress(captured: Program) -> None:
    seen: list[tuple[int, int, str]] = []
    pipeline = Pipeline("canonicalize,prove", trace=True, on_pass=lambda i, n, name: seen.append((i, n, name)))
    program = pipeline(captured.clone())
    assert seen == [(0, 2, "canonicalize"), (1, 2, "prove")]
    assert [name for name, _ in pipeline.dumps] == ["before", "canonicalize", "prove"]
    assert "softmax_attention" not in pipeline.dumps[1][1]
    assert "= lincompile.softmax_attention(transpose" in pipeline.dumps[2][1]
    assert [entry["pass"] for entry in program.history] == ["canonicalize", "prove"]
    assert program.history[1]["report"]["proved"] == 2
    assert program.history[1]["options"] == {"tolerance": 1e-5, "alibi": False}
    assert verify(program) is None
    assert not captured.history, "a clone shares its history with the original"


def test_verify_sees_a_site_of_another_graph(captured: Program) -> None:
    program = Pipeline("canonicalize,prove")(captured.clone())
    program.sites[0].node = Pipeline("canonicalize,prove")(captured.clone()).sites[0].node
    assert "of another graph" in str(verify(program))


def test_a_program_reports_wrong_inputs(captured: Program) -> None:
    with pytest.raises(LincompileError, match=r"takes idx; got tokens"):
        captured(tokens=torch.zeros(1, 2).long())
    with pytest.raises(LincompileError, match="needs the input 'idx'"):
        captured()
    with pytest.raises(LincompileError, match=r"no attention site 'h\.9'"):
        captured.site("h.9")
