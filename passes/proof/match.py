"""Finds softmax attention: a walk from each softmax (or SDPA) to the contractions around it proposes candidates.

The walk knows ops, not models: any chain of elementwise and layout ops may stand between ``q·k``, the softmax and
``p·v``. It decides nothing about semantics: that is ``probe`` (what the scores do) and ``identity`` (the proof).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import (
    argument,
    aten,
    is_symbolic,
    same_dim,
    symbols_in,
    target_of,
    tensor_of,
    value_inputs,
    value_of,
)
from .evaluate import LOW_PRECISION
from .unmatched import path_to_scores, path_to_values, regions

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
SDPA = aten.scaled_dot_product_attention.default
CONTRACTIONS = frozenset({aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default})
LAYOUT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.contiguous.default,
        aten.clone.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)
ELEMENTWISE = frozenset(
    {
        aten.to.dtype,
        aten._to_copy.default,
        aten.to.dtype_layout,
        aten.to.device,
        aten.type_as.default,
        aten.dropout.default,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.mul_.Tensor,
        aten.div_.Tensor,
        aten.add_.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.max.other,
        aten.min.other,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.neg.default,
        aten.tanh.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.square.default,
        aten.pow.Tensor_Scalar,
        aten.exp.default,
        aten.exp2.default,
        aten.softplus.default,
        aten.silu.default,
        aten.gelu.default,
        aten.nan_to_num.default,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.masked_fill_.Scalar,
        aten.masked_fill_.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.log_softmax.int,
    }
)
MIXING = frozenset({aten.linear.default, aten.conv2d.default})
NONLINEAR = frozenset(
    {
        aten.relu.default,
        aten.sigmoid.default,
        aten.square.default,
        aten.pow.Tensor_Scalar,
        aten.exp.default,
        aten.exp2.default,
        aten.silu.default,
        aten.gelu.default,
        aten.softplus.default,
    }
)
BESIDE_SOFTMAX = LAYOUT | ELEMENTWISE | {aten.cat.default, aten.tril.default, aten.triu.default}
MAX_CHAIN = 24


@dataclass
class Candidate:
    """A place where softmax attention may stand.

    ``q``, ``k``, ``v`` are the operands as they enter the contractions; ``scores`` is the q·k contraction,
    ``softmax`` the softmax node, ``weights`` what
    multiplies v and ``out`` the node whose value the site produces. ``problem`` names what the
    walk already saw to be unsupported: (kind, reason).
    """

    form: str
    out: Node
    q: Node
    k: Node
    v: Node
    scores: Node | None = None
    softmax: Node | None = None
    weights: Node | None = None
    mask: Node | None = None
    is_causal: bool = False
    scale: float | None = None
    chain: list[Node] = field(default_factory=list)
    problem: tuple[str, str] | None = None

    @property
    def anchor(self) -> Node:
        """The node that names the site's place in the source."""
        return self.softmax if self.softmax is not None else self.out


def data_nodes(module: GraphModule) -> set[Node]:
    """Nodes whose values depend on the model's inputs (parameters, buffers and sizes alone don't count)."""
    dependent: set[Node] = set()
    for node in module.graph.nodes:
        reads_data = not is_symbolic(value_of(node)) and any(item in dependent for item in value_inputs(node))
        if node.op == "placeholder" or reads_data:
            dependent.add(node)
    return dependent


def find_candidates(module: GraphModule) -> list[Candidate]:
    """Every place that may be softmax attention, in graph order; routers and pooling softmaxes are not among them."""
    data = data_nodes(module)
    found: list[Candidate] = []
    for node in module.graph.nodes:
        target = target_of(node)
        if target is SDPA:
            found.append(_sdpa(node))
        elif target in SOFTMAX:
            candidate = _around_softmax(node, data) or _out_of_reach(node, data)
            if candidate is not None:
                found.append(candidate)
        elif target in CONTRACTIONS:
            candidate = _without_softmax(node, data)
            if candidate is not None:
                found.append(candidate)
        elif target is not None and "flex_attention" in str(target):
            q, k, v = node.args[:3]
            found.append(
                Candidate(
                    "flex",
                    node,
                    q,
                    k,
                    v,
                    problem=("flex", "flex_attention with score_mod or block_mask is not classified yet"),
                )
            )
    return found + [_nested(node, inner) for node, region in regions(module) for inner in _in_region(region)]


def _in_region(region: GraphModule) -> list[Candidate]:
    """Candidates of a region, and softmaxes whose q·k stands outside of it."""
    found, data = find_candidates(region), data_nodes(region)
    for node in region.graph.nodes:
        if target_of(node) not in SOFTMAX or not symbols_in(tensor_of(node).shape[-1]):
            continue
        if all(node is not other.anchor for other in found) and path_to_values(node, data, CONTRACTIONS):
            found.append(Candidate("softmax", node, node, node, node, softmax=node))
    return found


def _nested(node: Node, inner: Candidate) -> Candidate:
    """Attention inside a region that was captured as one op (``torch.cond``, autocast): reported, never rewritten."""
    name = getattr(node.target, "__name__", str(node.target))
    problem = ("nested", f"the attention stands inside '{node.name}' ({name}), which was captured as one op")
    return Candidate("nested", node, inner.q, inner.k, inner.v, softmax=inner.anchor, problem=problem)


def _out_of_reach(softmax: Node, data: set[Node]) -> Candidate | None:
    """Attention whose scores or probabilities go through an op that the walk doesn't follow: reported."""
    rank = tensor_of(softmax).dim()
    if softmax.args[1] not in (-1, rank - 1) or not symbols_in(tensor_of(softmax).shape[-1]):
        return None
    above, below = (find(softmax, data, CONTRACTIONS) for find in (path_to_scores, path_to_values))
    if below is None:
        return None
    v = operands(below[-1])[1] if target_of(below[-1]) in CONTRACTIONS else below[-1]
    if above is None:
        if not _pairs_of_positions(softmax) or softmax not in data:
            return None  # pooling, or weights that no input decides
        problem = ("unknown-scores", "the scores come from data, but not from a product q·k that can be followed")
        return Candidate("softmax", below[-1], softmax, softmax, v, softmax=softmax, problem=problem)
    q, k = operands(above[-1])
    known = LAYOUT | ELEMENTWISE | MIXING | {aten.slice.Tensor, aten.permute.default, aten.transpose.int}
    kind, what, path = "unknown-scores", "the scores go through", above[:-1]
    if all(target_of(node) in known for node in path):
        kind, what, path = "post-softmax", "the probabilities go through", below[1:-1]
    strange = next((node for node in path if target_of(node) not in known), below[-1])
    problem = (kind, f"{what} '{strange.name}' ({strange.target}), which isn't followed")
    return Candidate("softmax", below[-1], q, k, v, above[-1], softmax, problem=problem)


def _pairs_of_positions(node: Node) -> bool:
    """Whether a value's last two axes run over one sequence, as those of self-attention's probabilities do."""
    shape = tensor_of(node).shape
    return len(shape) >= 3 and bool(symbols_in(shape[-1]) & symbols_in(shape[-2]))


def _sdpa(node: Node) -> Candidate:
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    candidate = Candidate(
        "sdpa",
        node,
        q,
        k,
        v,
        mask=argument(node, 3, "attn_mask"),
        is_causal=bool(argument(node, 5, "is_causal", False)),
        scale=argument(node, 6, "scale"),
    )
    dropout = argument(node, 4, "dropout_p", 0.0)
    if dropout:
        candidate.problem = (
            "dropout",
            f"attention dropout {dropout} is active; capture the model in eval mode (or set dropout to 0)",
        )
    elif candidate.is_causal and not same_dim(tensor_of(q).shape[-2], tensor_of(k).shape[-2]):
        candidate.problem = ("causal-top-left", "is_causal between sequences of different lengths (aligned top-left)")
    return candidate


def operands(node: Node) -> tuple[Node, Node]:
    """The two factors of a contraction."""
    target = target_of(node)
    if target is aten.einsum.default:
        pair = node.args[1]
        assert isinstance(pair, (list, tuple))
        return (pair[0], pair[1]) if len(pair) == 2 else (node, node)  # type: ignore[return-value]
    if target is aten.baddbmm.default:
        return node.args[1], node.args[2]  # type: ignore[return-value]
    return node.args[0], node.args[1]  # type: ignore[return-value]


def _around_softmax(softmax: Node, data: set[Node]) -> Candidate | None:
    above = chain_above(softmax.args[0], data, MAX_CHAIN)
    if above is None:
        return None
    scores = above[-1]
    below = chain_below(softmax, data)
    q, k = operands(scores)
    if below is None:
        return None  # nothing is averaged with these weights: a router, a classifier or a pooling score
    *between, product = below
    weights, v = operands(product)
    candidate = Candidate("softmax", product, q, k, v, scores, softmax, weights, chain=above[:-1] + between)
    candidate.problem = _structural_problem(candidate, above[:-1], between, data)
    return candidate


def _structural_problem(
    candidate: Candidate, above: list[Node], between: list[Node], data: set[Node]
) -> tuple[str, str] | None:
    softmax, scores = candidate.softmax, candidate.scores
    assert softmax is not None and scores is not None
    rank = tensor_of(softmax).dim()
    if softmax.args[1] not in (-1, rank - 1):
        return ("softmax-axis", f"softmax runs over axis {softmax.args[1]}, not over the keys (the last axis)")
    for node in above:
        if target_of(node) is aten.cat.default:
            return (
                "sinks",
                "the scores are extended before softmax (an attention sink); canonical softmax attention has none",
            )
        if target_of(node) in MIXING or target_of(node) in CONTRACTIONS:
            return ("talking-heads", "the scores of different heads are mixed before softmax (talking heads)")
    for node in between:
        if target_of(node) in MIXING or target_of(node) in CONTRACTIONS:
            return ("talking-heads", "the probabilities of different heads are mixed after softmax (talking heads)")
    low = [n for n in [*above, softmax, *between] if tensor_of(n).dtype in LOW_PRECISION]
    if low and not any(tensor_of(n).dtype in LOW_PRECISION for n in (candidate.q, candidate.k, candidate.v)):
        dtype = tensor_of(low[-1]).dtype
        return (
            "low-precision",
            f"scores or probabilities are rounded to {dtype} ('{low[-1].name}'), q, k and v aren't",
        )
    if any(target_of(n) is aten.dropout.default and n.args[1] and n.args[2] for n in [*above, *between]):
        return ("dropout", "attention dropout is active; capture the model in eval mode (or set dropout to 0)")
    inside = {softmax, scores, *above, *between, candidate.out}
    for node in [*above, softmax, *between, scores]:
        for user in node.users:
            if user not in inside and _value_escapes(user, inside):
                what = "scores" if node is scores or node in above else "probabilities"
                return ("escapes", f"the attention {what} are used elsewhere (returned or reused by '{user.name}')")
    return None


def _value_escapes(user: Node, inside: set[Node]) -> bool:
    """Whether a reader outside the chain takes the value itself, not just its size, and doesn't lead back inside.

    ``scores − max(scores)`` and ``mask = zeros_like(scores)`` read the chain and flow back into it: no escape.
    """
    if is_symbolic(value_of(user)):
        return False
    if user.op == "output":
        return True
    readers = [n for n in user.users if n not in inside]
    return not user.users or any(_value_escapes(n, inside) for n in readers)


def chain_above(node: Any, data: set[Node], limit: int) -> list[Node] | None:
    """Nodes from a softmax's input up to the q·k contraction (last), through elementwise and layout ops."""
    if not isinstance(node, Node) or limit < 0 or node not in data or not isinstance(value_of(node), Tensor):
        return None
    target = target_of(node)
    if target in CONTRACTIONS:
        left, right = operands(node)
        if left in data and right in data and left is not node:
            return [node]
        inputs = [item for item in (left, right) if item in data and item is not node]
        same = [item for item in inputs if _same_shape(item, node)]
        return _extend(node, same, data, limit)
    if target in LAYOUT or target in (aten.slice.Tensor, aten.permute.default, aten.transpose.int):
        return _extend(node, [node.args[0]], data, limit)
    if target is aten.cat.default:
        return _extend(node, list(node.args[0]), data, limit)  # type: ignore[arg-type]
    if target in MIXING:
        weight = tensor_of(node.args[1])
        square = weight.shape[0] == weight.shape[1]
        mixes_heads = target is aten.conv2d.default or target_of(node.args[0]) in (
            aten.permute.default,
            aten.transpose.int,
        )
        return _extend(node, [node.args[0]], data, limit) if square and mixes_heads else None
    if target in ELEMENTWISE:
        return _extend(node, [item for item in node.all_input_nodes if item in data], data, limit)
    return None


def _extend(node: Node, inputs: list[Any], data: set[Node], limit: int) -> list[Node] | None:
    for item in inputs:
        value = value_of(item)
        if isinstance(value, Tensor) and value.dim() >= 3:
            rest = chain_above(item, data, limit - 1)
            if rest is not None:
                return [node, *rest]
    return None


def _same_shape(a: Node, b: Node) -> bool:
    left, right = tensor_of(a).shape, tensor_of(b).shape
    return len(left) == len(right) and all(same_dim(x, y) for x, y in zip(left, right, strict=True))


def chain_below(node: Node, data: set[Node], limit: int = 12) -> list[Node] | None:
    """Nodes from a softmax (excluded) down to the p·v contraction (last)."""
    if limit < 0:
        return None
    for user in node.users:
        target = target_of(user)
        if target in CONTRACTIONS:
            left, right = operands(user)
            if left is node and right in data and right is not node and _contracts_last_axis(user):
                return [user]
            if left is node and right not in data and _same_shape(user, node):
                rest = chain_below(user, data, limit - 1)
                if rest is not None:
                    return [user, *rest]
        elif (
            target in LAYOUT
            or target in ELEMENTWISE
            or target in MIXING
            or target in (aten.slice.Tensor, aten.permute.default, aten.transpose.int)
        ):
            if target in MIXING and user.args[0] is not node:
                continue
            rest = chain_below(user, data, limit - 1)
            if rest is not None:
                return [user, *rest]
    return None


def _contracts_last_axis(node: Node) -> bool:
    """Whether a contraction sums over the last axis of its first operand (true of every matmul)."""
    if target_of(node) is not aten.einsum.default:
        return True
    equation = str(node.args[0]).replace(" ", "")
    left, _, out = equation.partition("->")[0].partition(",")[0], None, equation.partition("->")[2]
    return bool(left) and left[-1] not in out


def _without_softmax(product: Node, data: set[Node]) -> Candidate | None:
    """``f(q·k)·v`` where f isn't a softmax (relu, sigmoid, squared scores): reported, never rewritten."""
    left, v = operands(product)
    if left not in data or v not in data or left is product:
        return None
    chain: list[Node] = []
    node = left
    for _ in range(MAX_CHAIN):
        target = target_of(node)
        if target in CONTRACTIONS:
            break
        if target in SOFTMAX or target not in BESIDE_SOFTMAX:
            return None
        chain.append(node)
        inputs = [
            i for i in node.all_input_nodes if i in data and isinstance(value_of(i), Tensor) and value_of(i).dim() >= 3
        ]
        if not inputs:
            return None
        node = inputs[0]
    else:
        return None
    q, k = operands(node)
    nonlinear = [n for n in chain if target_of(n) in NONLINEAR]
    if not nonlinear or q not in data or k not in data or q is node or not _is_score_shaped(node, product):
        return None
    what = str(target_of(nonlinear[0])).split(".")[1]
    return Candidate(
        "other",
        product,
        q,
        k,
        v,
        node,
        chain=chain,
        problem=("not-softmax", f"the scores go through {what}, not softmax"),
    )


def _is_score_shaped(scores: Node, product: Node) -> bool:
    """Whether a contraction's last axis is a sequence (a size symbol), as scores' is."""
    return (
        bool(symbols_in(tensor_of(scores).shape[-1])) and tensor_of(scores).dim() >= 3 and tensor_of(product).dim() >= 3
    )
