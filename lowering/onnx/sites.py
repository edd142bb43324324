"""LAWCAT beside a window as one op per attention site, for the operator of the native library.

A rule in the manner of :mod:`..fusion.stages`, which it comes after: features and gates are one op each by then. A
match proposes; what decides is that the site and the op agree on random inputs in float64, past and padding included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from ...kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from ...passes.graph import argument, aten, expression, finish, target_of, value_of
from ...passes.program import is_lincompile_op, share_tensors
from ...passes.stateful import StepProgram
from ..fusion.chains import LENGTHS, TOLERANCE, WIDE, Mismatch, evaluate_chain, node_of, op_of
from ..fusion.stages import fuse_stages

ops = torch.ops.lincompile
PAST = 3  # cached tokens in the check
BIAS = 19  # the gate's among the op's tensors: in the check it is so wide that a floor is reached
_STAGES = ("hedgehog_features", "decay_gate")


@torch.library.custom_op("lincompile_onnx::lawcat_window", mutates_args=())
def lawcat_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    past_mask: Tensor,
    conv_q_state: Tensor,
    conv_k_state: Tensor,
    state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    conv_q: Tensor,
    conv_k: Tensor,
    map_weight: Tensor,
    map_bias: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    window: int,
    scale: float,
    softcap: float,
    temperature: float,
    rotated: bool,
    lowest: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One site between its projections: LAWCAT (arXiv 2509.18467) and rotary softmax over the nearest keys, mixed.

    q ``[B, H, T, D]``, k and v ``[B, Hkv, T, D]`` before the rotary embedding, x ``[B, T, E]``, cos and sin
    ``[B, T, D]``, mask ``[B, T]`` and past_mask ``[B, P]`` bool, the states as in a step program, and the weights of
    ``Lawcat`` (``passes/linearization/methods.py``). LAWCAT reads q and k as given or, with ``rotated``, after the
    embedding, as the window does; ``lowest``: floor of its log-decays (None: no floor). Returns ``[B, H, T, D]`` and
    the new states.
    """
    turned_q, turned_k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    far_q, far_k = (turned_q, turned_k) if rotated else (q, k)
    features_q, new_q = ops.hedgehog_features(far_q, conv_q, conv_q_state, map_weight, map_bias, mask, False)
    features_k, new_k = ops.hedgehog_features(far_k, conv_k, conv_k_state, map_weight, map_bias, mask, True)
    low = functional.linear(x, gate_down)
    decay = ops.decay_gate(low, gate_up, gate_bias, mask, k.shape[1], temperature, lowest)
    far, new_state = ops.linear_attention(features_q, features_k, v, decay, state, 1.0, True, True)
    seen = torch.cat([past_mask, mask], 1)
    near, keys, values = ops.softmax_attention_step(
        turned_q, turned_k, v, k_cache, v_cache, seen, "sliding", window, scale, softcap
    )
    shares = torch.sigmoid(functional.linear(x, mix_weight, mix_bias)).transpose(1, 2).unsqueeze(-1)
    share_far, share_near = shares.chunk(2, 1)
    return (far * share_far + near * share_near).contiguous(), new_q, new_k, new_state, keys, values


@lawcat_window.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    conv_q_state, conv_k_state, state, k_cache, v_cache = rest[5:10]
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(conv_q_state),
        torch.empty_like(conv_k_state),
        torch.empty_like(state),
        torch.cat([k_cache, k], 2),
        torch.cat([v_cache, v], 2),
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def fuse_sites(step: StepProgram) -> tuple[StepProgram, int, str]:
    """The program with each LAWCAT site that has a window as one op: all of them or, with the reason, none.

    Returns:
        The program (the one given where nothing is fused), how many sites are one op, and why others aren't ("" where
        there are none).
    """
    module = step.graph_module
    if not isinstance(module, GraphModule) or not any(_windows(module)):
        return step, 0, ""
    twin = share_tensors(module, {})
    report = fuse_stages(twin)
    sites = [node for node in _windows(twin) if _beside_linear(node)]
    if not sites:
        return step, 0, ""
    try:
        for site in sites:
            leaves, outputs, call = _match(twin, site)
            _prove(leaves, outputs, call)
            _replace(twin, leaves, outputs, call)
        finish(twin)
        left = [n.name for n in twin.graph.nodes if any(is_lincompile_op(n, stage) for stage in _STAGES)]
        if left:
            raise Mismatch(f"'{left[0]}' belongs to a site without a window")
    except Mismatch as reason:
        why = str(next(iter(report.kept.values()), reason))
        return step, 0, why
    return replace(step, graph_module=twin), len(sites), ""


def _windows(module: GraphModule) -> Iterator[Node]:
    for node in module.graph.nodes:
        if is_lincompile_op(node, "softmax_attention_step") and argument(node, 6, "kind", "causal") == "sliding":
            yield node


def _beside_linear(site: Node) -> bool:
    """Whether a linear attention reads the same values: a window beside it, not a sliding layer of the model's own."""
    return any(is_lincompile_op(user, "linear_attention") for user in node_of(site.args[2]).users)


Call = Callable[..., tuple[Any, ...]]


def _match(module: GraphModule, site: Node) -> tuple[list[Node], list[Node], Call]:
    near_q, near_k, v, k_cache, v_cache, seen = (node_of(item) for item in site.args[:6])
    near = _output(site, 0)
    scaled = _only(near, aten.mul.Tensor, "its share of the window")
    total = _only(scaled, aten.add.Tensor, "the sum of both attentions")
    (far_scaled,) = [node_of(item) for item in total.args[:2] if item is not scaled] or [scaled]
    op_of(far_scaled, aten.mul.Tensor, "the linear attention's share")
    far, share = (node_of(item) for item in far_scaled.args[:2])
    if not is_lincompile_op(_source(far), "linear_attention"):
        far, share = share, far
    linear = _lincompile(_source(far), "linear_attention")
    features_q, features_k, _, decay, state = (node_of(item) for item in linear.args[:5])
    maps_q = _lincompile(_source(features_q), "hedgehog_features")
    maps_k = _lincompile(_source(features_k), "hedgehog_features")
    gate = _lincompile(decay, "decay_gate")
    q, conv_q, conv_q_state, map_weight, map_bias = (node_of(item) for item in maps_q.args[:5])
    k, conv_k, conv_k_state = (node_of(item) for item in maps_k.args[:3])
    low, gate_up, gate_bias = (node_of(item) for item in gate.args[:3])
    temperature, lowest = float(argument(gate, 5, "temperature")), argument(gate, 6, "lowest")
    op_of(low, aten.linear.default, "the gate's first projection")
    while target_of(share) is not aten.linear.default:
        share = node_of(share.args[0])
        if share.op != "call_function":
            raise Mismatch("the shares aren't projected from the hidden states")
    x, mix_weight, mix_bias = (node_of(item) for item in (*share.args, None)[:3])
    before_q, cos, sin = _rotary(near_q)
    rotated = q is near_q  # both attentions read it after its rotary embedding
    if rotated:
        q, k = before_q, _rotary(near_k)[0]
    window, scale, softcap = (argument(site, 7 + i, name) for i, name in enumerate(("window", "scale", "softcap")))
    op_of(seen, aten.cat.default, "the masks of past and new tokens")
    past_mask, mask = (node_of(item) for item in seen.args[0])  # type: ignore[union-attr]
    leaves = [q, k, v, x, cos, sin, mask, past_mask, conv_q_state, conv_k_state, state, k_cache, v_cache, conv_q]
    leaves += [conv_k, map_weight, map_bias, node_of(low.args[1]), gate_up, gate_bias, mix_weight, mix_bias]
    outputs = [total, _output(maps_q, 1), _output(maps_k, 1), _output(linear, 1), _output(site, 1), _output(site, 2)]

    def call(*values: Any) -> tuple[Any, ...]:
        return *values, window, scale, softcap, temperature, rotated, lowest

    return leaves, outputs, call


def _rotary(near: Node) -> tuple[Node, Node, Node]:
    """The x, and the cos and sin ``[B, T, D]``, of what Llama rotates: ``x cos + [−x₂, x₁] sin``."""
    op_of(near, aten.add.Tensor, "rotated queries or keys")
    products = [op_of(node_of(item), aten.mul.Tensor, "rotated queries or keys") for item in near.args[:2]]
    if target_of(node_of(products[0].args[0])) is aten.cat.default:
        products.reverse()
    factors = [op_of(node_of(item.args[1]), aten.unsqueeze.default, "cos or sin of a rotation") for item in products]
    cos, sin = (node_of(factor.args[0]) for factor in factors)
    for leaf in (cos, sin):
        fake = value_of(leaf)
        if not isinstance(fake, Tensor) or fake.dim() != 3:
            raise Mismatch("cos and sin of the rotation aren't [batch, time, head size]")
    return node_of(products[0].args[0]), cos, sin


def _lincompile(node: Node, name: str) -> Node:
    if not is_lincompile_op(node, name):
        raise Mismatch(f"'{node.name}' isn't {name}")
    return node


def _source(item: Node) -> Node:
    return node_of(item.args[0]) if target_of(item) is operator.getitem else item


def _output(node: Node, index: int) -> Node:
    for user in node.users:
        if target_of(user) is operator.getitem and user.args[1] == index:
            return user
    raise Mismatch(f"output {index} of '{node.name}' isn't read")


def _only(node: Node, target: Any, what: str) -> Node:
    users = list(node.users)
    if len(users) != 1:
        raise Mismatch(f"'{node.name}' is read by {len(users)} nodes")
    return op_of(users[0], target, what)


def _prove(leaves: list[Node], outputs: list[Node], call: Call) -> None:
    """The site equals the op on random inputs, or ``Mismatch``."""
    for length in LENGTHS:
        values = _random(leaves, length)
        have = lawcat_window(*call(*values))
        known = dict(zip(leaves, values, strict=True))
        for output, result in zip(outputs, have, strict=True):
            wanted = evaluate_chain(output, known)
            if wanted.shape != result.shape:
                raise Mismatch(f"'{output.name}' is {list(wanted.shape)} at {length} tokens, not {list(result.shape)}")
            real = values[6][:, None, :, None] if output is outputs[0] else torch.ones((), dtype=torch.bool)
            error = float(((wanted - result) * real).norm() / (wanted * real).norm().clamp_min(1e-30))
            if not error <= TOLERANCE:
                raise Mismatch(f"'{output.name}' differs from the op by {error:.1e} at {length} tokens")


def _random(leaves: list[Node], length: int) -> list[Tensor]:
    """Two rows, the first padded on the left where there is room; states after ``PAST`` tokens."""
    generator = torch.Generator().manual_seed(length)
    tokens = value_of(leaves[6])
    assert isinstance(tokens, Tensor)
    sizes = {str(expression(size)): count for size, count in zip(tokens.shape, (2, length), strict=True)}
    values = []
    for leaf in leaves:
        fake = value_of(leaf)
        if not isinstance(fake, Tensor):
            raise Mismatch("the graph carries no shapes")
        shape = []
        for size in (expression(size) for size in fake.shape):
            shape.append(int(size) if size.is_Integer else sizes.setdefault(str(size), PAST))
        random = torch.randn(shape, generator=generator, dtype=torch.float64) * (WIDE if leaf is leaves[BIAS] else 1)
        values.append(
            torch.arange(shape[1]) >= torch.tensor([[length // 2], [0]]) if fake.dtype == torch.bool else random
        )
    return values


def _replace(module: GraphModule, leaves: list[Node], outputs: list[Node], call: Call) -> None:
    with module.graph.inserting_before(outputs[0]):
        new = module.graph.call_function(torch.ops.lincompile_onnx.lawcat_window.default, call(*leaves))
        new.meta["val"] = tuple(value_of(output) for output in outputs)
        for index, output in enumerate(outputs):
            item = module.graph.call_function(operator.getitem, (new, index))
            item.meta["val"] = value_of(output)
            output.replace_all_uses_with(item)
