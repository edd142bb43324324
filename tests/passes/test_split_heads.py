"""Sites cut apart by KV heads: exact, rewritten part by part, stepped, trained, and refused where they can't be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from distil_models import LENGTH, linear, proved, text, windows

from lincompile.passes.distil import instrument
from lincompile.passes.distil.adapter import apply_adapter, save_adapter
from lincompile.passes.distil.logits import LogitDistillation, distil_logits
from lincompile.passes.distil.transfer import Transfer, transfer
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.linearize import LinearizeAttention, parse_keep
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.split_heads import SplitHeads, heads_text, named_parts, parse_heads
from lincompile.passes.stateful import make_stateful

Proved = Callable[[str], SimpleNamespace]


def apart(program: Program, *heads: tuple[int, int]) -> Program:
    return Pipeline([SplitHeads(heads)])(program.clone())


def logits(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    given = {}
    for item in program.inputs:
        values = {"mask": torch.ones_like(tokens), "positions": torch.arange(tokens.shape[1]).expand_as(tokens)}
        given[item.name] = values.get(item.role, tokens).to(program.placeholder(item.name).meta["val"].dtype)
    result = program(**given)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize(
    ("name", "heads"), [("llama-gqa", ((1, 0),)), ("gpt2", ((0, 1), (1, 0), (1, 3))), ("mistral", ((0, 1),))]
)
def test_outputs_and_gradients_stay(proved: Proved, name: str, heads: tuple[tuple[int, int], ...]) -> None:
    model = proved(name)
    split = apart(model.program, *heads)
    sites = {index for index, _ in heads}
    before = [site.path for index, site in enumerate(model.program.sites) if index in sites]
    parts = [site for site in split.sites if "part" in site.details]
    assert {site.details["part"]["of"] for site in parts} == set(before)
    for path in before:
        mine = [site for site in parts if site.details["part"]["of"] == path]
        whole = model.program.site(path)
        assert sum(site.heads or 0 for site in mine) == whole.heads
        assert [h for site in mine for h in site.details["part"]["kv_heads"]] == list(range(whole.kv_heads or 0))
    assert len({site.path for site in split.sites}) == len(split.sites)
    named = {
        (s.details["part"]["of"], h)
        for i in named_parts(split)
        for s in [split.sites[i]]
        for h in s.details["part"]["kv_heads"]
    }
    assert named == {(model.program.sites[index].path, head) for index, head in heads}
    for length in (3, 21):
        tokens = torch.randint(3, zoo.VOCAB, (2, length))
        found = []
        for program in (model.program, split):
            program.graph_module.zero_grad()
            out = logits(program, tokens)
            out.square().sum().backward()
            weights = {id(p): p.grad.clone() for p in program.graph_module.parameters() if p.grad is not None}
            found.append((out.detach(), weights))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("attn", "options"),
    [
        ("lawcat", {}),
        ("lawcat", {"window": 5}),
        ("lawcat", {"rotary": "keep"}),
        ("gla", {}),
        ("hedgehog", {}),
        ("gated-delta", {"window": 5}),
    ],
)
def test_the_rest_of_a_layer_is_rewritten_and_steps(proved: Proved, attn: str, options: dict[str, Any]) -> None:
    teacher = apart(proved("llama-gqa").program, (1, 1))
    kept = named_parts(teacher)
    program = Pipeline([LinearizeAttention(attn, keep=kept, **options)])(teacher.clone())
    methods = [(site.path.rpartition(".")[2], site.method, site.details.get("rotary")) for site in program.sites]
    wanted = "kept" if attn == "hedgehog" or options.get("rotary") else "removed"
    assert methods[1:] == [("kv0", attn, wanted), ("kv1", "softmax", None), ("kv2", attn, wanted)], methods
    with torch.no_grad():
        for name, parameter in program.graph_module.named_parameters():
            if name.startswith("lincompile_attention"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    step = make_stateful(program)  # compares with the program
    assert step.max_error is not None and step.max_error <= 1e-4
    whole = make_stateful(
        Pipeline([LinearizeAttention(attn, keep=(1,), **options)])(proved("llama-gqa").program.clone())
    )
    grown, before = (s.state_bytes(1, 8192) - s.state_bytes(1, 4096) for s in (step, whole))
    assert 0.3 < grown / before < 0.37, "the caches of one of three KV heads"


class Noting(torch.fx.Interpreter):
    """Keeps every node's value."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def test_a_part_reads_its_own_heads(proved: Proved) -> None:
    """What is fed to the rewritten part is the heads it replaces, before the rotary embedding as after it."""
    model = proved("llama-gqa").program
    whole = Pipeline([LinearizeAttention("lawcat")])(model.clone())
    split = apart(model, (0, 1))
    parts = Pipeline([LinearizeAttention("lawcat", keep=named_parts(split))])(split.clone())
    first = "lincompile_attention.0"
    wide, narrow = (p.graph_module.get_submodule(first) for p in (whole, parts))
    groups = narrow.shape.groups
    tokens = torch.randint(3, zoo.VOCAB, (1, 12))
    seen = []
    with torch.no_grad():
        rows = 2 * narrow.shape.head_dim  # the same first KV head in both
        gate = {"down": wide.gate.down, "up": wide.gate.up[:rows], "bias": wide.gate.bias[:rows]}
        narrow.gate.load_state_dict(gate)
        for program in (whole, parts):
            given = []
            for item in program.inputs:
                extra = {"mask": torch.ones_like(tokens), "positions": torch.arange(12)[None]}
                fake = program.placeholder(item.name).meta["val"]
                given.append(extra.get(item.role, tokens).to(fake.dtype))
            noting = Noting(program.graph_module)
            noting.run(*given)
            site = program.sites[0].node
            assert site is not None
            seen.append(noting.values[site][0])
    torch.testing.assert_close(seen[0][:, :groups], seen[1], rtol=1e-5, atol=1e-6)


def test_distillation_and_adapters(tmp_path: Path) -> None:
    teacher = apart(proved(), (1, 0))
    kept = named_parts(teacher)
    student = linear(teacher, keep=kept)
    moved = transfer(teacher, student, windows(), Transfer(steps=6))
    assert len(moved.after) == len(teacher.sites) - 1 and sum(moved.after.values()) < sum(moved.before.values())
    done = distil_logits(teacher, student, windows(), LogitDistillation(steps=4, train="lora:2"))
    assert done.after < done.before
    file = tmp_path / "heads.safetensors"
    save_adapter(file, teacher, student, dtype=torch.float32)
    fresh = linear(teacher, keep=kept)
    apply_adapter(file, teacher, fresh)
    tokens = text(2 * LENGTH)[None]
    torch.testing.assert_close(logits(fresh, tokens), logits(student, tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(LincompileError, match=r"is for \d+ sites with lawcat, softmax: give .*--keep-softmax 1\.0$"):
        apply_adapter(file, teacher, linear(proved()))


@pytest.mark.parametrize("window", [0, 4])
def test_heads_apart_train_in_mixed_precision(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: q, k and v of the teacher are cast, which must not hide where they were cut."""
    monkeypatch.setattr(instrument, "_autocast", lambda program: torch.bfloat16)
    teacher = apart(proved(), (0, 1))
    student = linear(teacher, window=window, keep=named_parts(teacher))
    moved = transfer(teacher, student, windows(), Transfer(steps=2, compile=False))
    assert len(moved.after) == len(student.sites) - 1 and all(0 < error < 2 for error in moved.after.values())
    report = distil_logits(teacher, student, windows(), LogitDistillation(steps=30, train="lora:2", compile=False))
    assert report.after < report.before


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((7, 0), r"--keep-softmax 7\.0: the model has 2 attention sites \(0 to 1\)"),
        ((0, 3), r"--keep-softmax 0\.3: '.*' has 3 KV heads \(0 to 2\)"),
        ((-1, 0), r"--keep-softmax -1\.0: the model has 2"),
    ],
)
def test_heads_that_there_are_not(proved: Proved, heads: tuple[int, int], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        apart(proved("llama-gqa").program, heads)


def test_rewritten_sites_are_not_cut(proved: Proved) -> None:
    program = Pipeline([LinearizeAttention("lawcat")])(proved("llama-gqa").program.clone())
    with pytest.raises(RefusedError, match=r"--keep-softmax 0\.0: '.*' isn't proved softmax attention"):
        apart(program, (0, 0))


def test_how_heads_are_written() -> None:
    assert parse_heads("17.1, 18.2") == ((17, 1), (18, 2)) and parse_heads("3.0") == ((3, 0),)
    assert parse_heads("5,7") == parse_heads("6") == parse_heads("auto:6") == parse_heads(None) == ()
    assert parse_keep("17.1,18.2") == ((), 0, 0)
    for wrong in ("5,17.1", "17.1.2", "a.b", "1."):
        with pytest.raises(LincompileError, match=r"KV heads are written SITE\.HEAD"):
            parse_heads(wrong)
    paths = ["a", "b.kv0_1", "b.kv2", "c.kv0", "c.kv1_2", "d"]
    assert heads_text(paths, [False, False, True, False, True, False]) == "1.2,2.1,2.2"
    assert heads_text(["a", "b"], [True, False]) is None
