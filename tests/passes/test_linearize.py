"""Rewriting proved sites: the right operands, the right heads, and a graph that still trains, saves and exports."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter
from torch.nn import functional as F

from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.graph import Builder
from lincompile.passes.linearization.methods import METHODS, SiteShape, half_life_bias, method_class
from lincompile.passes.linearize import LinearizeAttention, content_nodes, find_operands, parse_keep
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.verify import op_name

Proved = Callable[[str], SimpleNamespace]


def rewritten(model: SimpleNamespace, attn: str, **options: Any) -> Program:
    return Pipeline([LinearizeAttention(attn, **options)])(model.program.clone())


# ---- the methods against hand-written references, one query head at a time


def hedgehog_features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x @ weight + bias
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution of ``[T, D]`` with taps ``[D, W]``, the last tap on the current token."""
    width = weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    return sum((padded[w : w + x.shape[0]] * weight[:, w] for w in range(width)), torch.zeros(()).to(x))


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """``S ← diag(e^g) S + kᵀv; o = q S``, token by token."""
    state = torch.zeros(k.shape[-1], v.shape[-1], dtype=v.dtype)
    rows = []
    for t in range(q.shape[0]):
        state = (state if decay is None else decay[t].exp()[:, None] * state) + k[t][:, None] * v[t][None, :]
        rows.append(q[t] @ state)
    return torch.stack(rows)


def reference(method: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, head: int) -> Tensor:
    """Query head ``head`` of one batch row; it reads KV head ``head // groups``."""
    shape = method.shape
    kv, width = head // shape.groups, shape.head_dim
    ones = torch.ones(v.shape[1], 1, dtype=v.dtype)
    name = method.method
    decay = None
    if method.gated:
        features = method.gate.features
        logits = x @ method.gate.down.T @ method.gate.up.T + method.gate.bias
        decay = F.logsigmoid(logits)[:, kv * features : (kv + 1) * features] / 16
    if name == "gla":
        return recurrence(q[head] * shape.scale, k[kv], v[kv], decay) * method.out_scale[head]
    if name == "hedgehog":
        fq = hedgehog_features(q[head], method.map_q.weight[head], method.map_q.bias[head])
        fk = hedgehog_features(k[kv], method.map_k.weight[kv], method.map_k.bias[kv])
    else:
        cq = convolved(q[head], method.conv_q.weight[head * width : (head + 1) * width])
        ck = convolved(k[kv], method.conv_k.weight[kv * width : (kv + 1) * width])
        fq = hedgehog_features(cq, method.map.weight[kv], method.map.bias[kv])
        fk = hedgehog_features(ck, method.map.weight[kv], method.map.bias[kv])
    o = recurrence(fq, fk, torch.cat([v[kv], ones], -1), decay)
    return o[:, :-1] / (o[:, -1:] + 1e-10)


@pytest.mark.parametrize("name", ["gla", "hedgehog", "lawcat"])
def test_nine_query_heads_read_three_kv_heads_in_order(name: str) -> None:
    shape = SiteShape(heads=9, kv_heads=3, head_dim=4, value_dim=5, hidden=7, scale=0.5, causal=True)
    method = method_class(name)(shape).double()
    for parameter in method.parameters():  # away from the identity, or all heads would look alike
        nn.init.normal_(parameter, std=0.5)
    q, k, v = torch.randn(2, 9, 11, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 5)
    q, k, v, x = q.double(), k.double(), v.double(), torch.randn(2, 11, 7).double()
    out = method(q, k, v, x)
    for batch in range(2):
        for head in range(9):
            wanted = reference(method, q[batch], k[batch], v[batch], x[batch], head)
            torch.testing.assert_close(out[batch, head], wanted, rtol=1e-9, atol=1e-9)


def test_gates_start_with_half_lives_spread_from_64_to_4096_tokens() -> None:
    log_decay = F.logsigmoid(half_life_bias(16).double()) / 16
    half_lives = torch.log(torch.tensor(0.5)) / log_decay
    torch.testing.assert_close(half_lives[[0, -1]], torch.tensor([64.0, 4096.0]).double(), rtol=1e-3, atol=0)
    steps = half_lives.log().diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_as_if_it_were_not_there(name: str) -> None:
    shape = SiteShape(heads=4, kv_heads=2, head_dim=4, value_dim=4, hidden=6, scale=0.5, causal=True)
    method = method_class(name)(shape).double()
    tensors = [torch.randn(1, *s).double() for s in ((4, 9, 4), (2, 9, 4), (2, 9, 4), (9, 6))]
    q, k, v, x = tensors
    mask = torch.arange(9)[None] >= 4
    padded = method(q, k, v, x, mask)[:, :, 4:]
    alone = method(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], x[:, 4:])
    torch.testing.assert_close(padded, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_a_window_mixes_in_softmax_over_the_nearest_keys(name: str) -> None:
    sizes = {"heads": 6, "kv_heads": 3, "head_dim": 4, "value_dim": 5, "hidden": 7, "scale": 0.5, "causal": True}
    method = method_class(name)(SiteShape(**sizes, window=4)).double()
    alone = method_class(name)(SiteShape(**sizes)).double()
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert not alone.load_state_dict(method.state_dict(), strict=False).missing_keys
    q, k, v, x = (torch.randn(2, *s).double() for s in ((6, 11, 4), (3, 11, 4), (3, 11, 5), (11, 7)))
    near_q, near_k = torch.randn_like(q), torch.randn_like(k)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    keys, values = near_k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (near_q @ keys.transpose(2, 3) * 0.5).masked_fill((distance < 0) | (distance >= 4), float("-inf"))
    assert method.mix is not None
    share = torch.sigmoid(x @ method.mix.weight.T + method.mix.bias).transpose(1, 2)[..., None]
    wanted = share[:, 6:] * (scores.softmax(-1) @ values) + share[:, :6] * alone(q, k, v, x)
    torch.testing.assert_close(method(q, k, v, x, near_q, near_k), wanted, rtol=1e-9, atol=1e-9)
    mask = torch.arange(11)[None] >= torch.tensor([[0], [3]])
    padded = method(q, k, v, x, near_q, near_k, mask)[1:, :, 3:]
    cut = [t[1:, :, 3:] for t in (q, k, v)] + [x[1:, 3:]] + [t[1:, :, 3:] for t in (near_q, near_k)]
    torch.testing.assert_close(padded, method(*cut), rtol=1e-9, atol=1e-9)


def test_a_windowed_site_reads_its_own_q_and_k_in_the_window(proved: Proved) -> None:
    model = proved("llama-gqa")
    before = [site.node.args[:2] for site in model.program.sites]
    program = rewritten(model, "lawcat", window=5)
    for site, (q, k) in zip(program.sites, before, strict=True):
        assert site.near is not None and site.node is not None
        assert [n.name for n in site.near.args[:2]] == [q.name, k.name]  # after the rotary embedding
        assert site.near.args[4:7] == ("sliding", 5, site.scale)
        assert not {q.name, k.name} & {n.name for n in site.node.args[:2]}
        assert site.details["window"] == 5 and "beside a softmax window of 5" in site.reason
    twin = program.clone()
    assert all(site.near.graph is twin.graph_module.graph for site in twin.sites)
    with pytest.raises(LincompileError, match="--window -1"):
        LinearizeAttention("lawcat", window=-1)
    refused = rewritten(proved("bert"), "hedgehog", window=5)
    assert all(s.verdict == "keep" and "--window mixes in a causal window" in s.reason for s in refused.sites)


@pytest.mark.parametrize("first", [True, False])
def test_heads_before_batch_in_one_axis(proved: Proved, first: bool) -> None:
    """A gate reads its own row's hidden states even where the model keeps [heads · batch] in one axis, unmasked."""
    program = rewritten(proved("nanogpt-heads-first" if first else "nanogpt-baddbmm"), "gla")
    assert all(site.method == "gla" and site.heads == 4 for site in program.sites)
    tokens = torch.randint(3, 40, (3, 9))
    with torch.no_grad():
        for parameter in program.graph_module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # or all heads' gates would be alike
        together = program(tokens)
        alone = torch.cat([program(row[None]) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# ---- what the rewrite hands to a method


def operands_at(model: SimpleNamespace, index: int, given: dict[str, Tensor]) -> tuple[Any, dict[Any, Any]]:
    """The operands of LAWCAT at a site (as nodes), and every node's value on ``given``."""
    program = model.program.clone()
    site = program.sites[index]
    found = find_operands(
        site, method_class("lawcat"), Builder(program.graph_module, site.node), content_nodes(program)
    )
    program.graph_module.recompile()
    interpreter = Interpreter(program.graph_module, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*(given[item.name] for item in program.inputs))
    return found, interpreter.env


def projections(model: SimpleNamespace, path: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, q, k before any rotary embedding, ``[B, heads, T, D]``) of a teacher's attention module."""
    inner = model.module.get_submodule(getattr(model.module, "prefix", "") + path)
    seen: list[Tensor] = []
    hook = inner.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.module(**given)
        hook.remove()
        x = seen[0]
        if hasattr(inner, "query_key_value"):
            q, k, _ = inner.query_key_value(x).unflatten(-1, (-1, 3 * 8)).transpose(1, 2).chunk(3, -1)
        elif hasattr(inner, "c_attn"):
            q, k, _ = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in inner.c_attn(x).split(32, -1))
        else:
            q, k = inner.q_proj(x).unflatten(-1, (-1, 8)), inner.k_proj(x).unflatten(-1, (-1, 8))
            if hasattr(inner, "q_norm"):
                q, k = inner.q_norm(q), inner.k_norm(k)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
    return x, q, k


@pytest.mark.parametrize(
    ("name", "rotary"),
    [("llama", True), ("llama-gqa", True), ("gpt-neox", True), ("qwen3", True), ("gpt2", False), ("nanogpt", False)],
)
def test_q_and_k_are_taken_before_the_rotary_embedding(proved: Proved, name: str, rotary: bool) -> None:
    model = proved(name)
    site = model.program.sites[1]
    found, env = operands_at(model, 1, model.example)
    hidden, q, k = projections(model, site.path, model.example)
    assert not isinstance(found, str) and found.rotary == ("removed" if rotary else "none")
    torch.testing.assert_close(env[found.q], q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(env[found.k], k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(env[found.hidden], hidden, rtol=1e-5, atol=1e-5)
    if rotary:
        assert (env[site_node(found, env, model)] - q).abs().max() > 1e-2  # what softmax reads is rotated


def site_node(found: Any, env: dict[Any, Any], model: SimpleNamespace) -> Any:
    name = model.program.sites[1].node.args[0].name
    return next(node for node in env if node.name == name)


# ---- the rewritten program


@pytest.mark.parametrize("attn", METHODS)
def test_one_op_per_site_and_all_parameters_train(proved: Proved, attn: str) -> None:
    model = proved("llama-gqa")
    program = rewritten(model, attn)
    ops = [op_name(node) for node in program.graph_module.graph.nodes if op_name(node)]
    assert ops.count("gated_delta" if attn == "gated-delta" else "linear_attention") == 2
    assert "softmax_attention" not in ops
    assert [site.method for site in program.sites] == [attn, attn]
    added = {n: p for n, p in program.graph_module.named_parameters() if n.startswith("lincompile_attention")}
    assert sum(p.numel() for p in added.values()) == program.history[-1]["report"]["parameters_added"] > 0
    for batch, length in ((1, 1), (3, 21)):
        given = {"input_ids": torch.randint(3, 97, (batch, length)), "attention_mask": torch.ones(batch, length).long()}
        given["position_ids"] = torch.arange(length).expand(batch, length)
        out = program(**{item.name: given[item.name] for item in program.inputs})
        assert out.shape == (batch, length, 97) and out.isfinite().all()
    gradients = torch.autograd.grad(out.square().mean(), list(added.values()))
    assert all(g.isfinite().all() for g in gradients)
    assert sum(bool(g.abs().max() > 0) for g in gradients) == len(gradients)
    assert "softmax_attention" in model.program.op_counts().__str__(), "the proved program was changed"


def test_kept_sliding_and_bidirectional_sites(proved: Proved) -> None:
    assert [s.method for s in rewritten(proved("llama"), "lawcat", keep=(-1,)).sites] == ["lawcat", "softmax"]
    assert [s.method for s in rewritten(proved("llama"), "lawcat", count=1).sites].count("softmax") == 1
    kept = rewritten(proved("gemma3"), "lawcat")
    assert [(s.kind, s.method) for s in kept.sites] == [("sliding", "softmax"), ("causal", "lawcat")]
    assert "sliding window of 5" in kept.sites[0].reason
    assert [s.method for s in rewritten(proved("gemma3"), "lawcat", sliding=True).sites] == ["lawcat", "lawcat"]
    encoder = rewritten(proved("torch-encoder"), "lawcat")
    assert {s.method for s in encoder.sites} == {"softmax"} and "--attn hedgehog" in encoder.sites[0].reason
    assert {s.method for s in rewritten(proved("torch-encoder"), "hedgehog").sites} == {"hedgehog"}
    assert rewritten(proved("llama"), "softmax").history[-1]["modified"] is False
    with pytest.raises(RefusedError, match="2 attention sites"):
        rewritten(proved("llama"), "lawcat", keep=(2,))
    with pytest.raises(LincompileError, match="unknown attention method 'mamba'"):
        rewritten(proved("llama"), "mamba")


def test_cross_attention_stays_softmax(proved: Proved) -> None:
    sites = rewritten(proved("torch-decoder"), "hedgehog").sites
    assert [s.method for s in sites] == ["hedgehog", "softmax", "hedgehog", "softmax"]
    assert "cross-attention" in sites[1].reason


def test_rewriting_twice_changes_nothing_and_seeds_repeat(proved: Proved) -> None:
    program = rewritten(proved("llama"), "lawcat")
    before = str(program.graph_module.graph)
    again = Pipeline([LinearizeAttention("lawcat")])(program)
    assert str(again.graph_module.graph) == before and not again.history[-1]["modified"]
    first, second, other = (
        rewritten(proved("llama"), "lawcat", seed=seed).graph_module.get_parameter("lincompile_attention.1.gate.down")
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.fixture(scope="module")
def student(proved: Proved) -> Program:
    return rewritten(proved("nanogpt"), "lawcat")


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict", "export", "compile"])
def test_the_rewritten_graph_is_an_ordinary_module(student: Program, proved: Proved, way: str) -> None:
    module, tokens = student.graph_module, torch.randint(0, 97, (3, 17))
    wanted = student(tokens)
    if way == "deepcopy":
        twin: Any = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif way == "state dict":
        fresh = rewritten(proved("nanogpt"), "lawcat", seed=9)
        twin = copy.deepcopy(fresh.graph_module)
        twin.load_state_dict(module.state_dict())
    elif way == "export":
        dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        twin = torch.export.export(module, (torch.zeros(2, 9, dtype=torch.int64),), dynamic_shapes=(dynamic,)).module()
    else:
        twin = torch.compile(module, backend="eager", fullgraph=True)
    result = twin(tokens)
    result = result[0] if isinstance(result, (tuple, list)) else result
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


def test_parse_keep() -> None:
    assert parse_keep("0,5,9") == ((0, 5, 9), 0, 0)
    assert parse_keep("6") == ((), 6, 0)
    assert parse_keep("auto:6") == ((), 0, 6)
    with pytest.raises(LincompileError, match="write a number"):
        parse_keep("some")
