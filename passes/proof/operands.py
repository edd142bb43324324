"""Brings q, k and v of any spelling of attention to ``[B, heads, T, head_dim]``, KV heads un-expanded, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..graph import (
    Builder,
    argument,
    aten,
    expression,
    is_symbolic,
    same_dim,
    symbols_in,
    target_of,
    tensor_of,
    value_of,
    walk_up,
)
from ..program import Program
from .evaluate import Opaque, Sizes, evaluate
from .match import Candidate

EXPANSIONS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.clone.default,
        aten.contiguous.default,
        aten.repeat_interleave.self_int,
        aten.repeat.default,
        aten.flatten.using_ints,
        aten.index.Tensor,
    }
)


class Unsupported(Exception):
    """The site's operands can't be brought to ``[B, heads, T, head_dim]``; carries the reason."""


def int_dim(dim: int | torch.SymInt, what: str) -> int:
    """A size that must be fixed, as an int; ``Unsupported`` naming ``what`` otherwise."""
    expr = expression(dim)
    if not expr.is_Integer:
        raise Unsupported(f"the number of {what} isn't fixed ({expr})")
    return int(expr)


Restore = Callable[[Node], Node]


def canonical_operands(program: Program, candidate: Candidate, make: Builder) -> tuple[Node, Node, Node, Restore]:
    """Q ``[B, H, T, D]``, k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]`` and the way back to the site's layout."""
    if candidate.softmax is None:
        if tensor_of(candidate.q).dim() == 4:
            return candidate.q, candidate.k, candidate.v, lambda y: y
        k, product = candidate.k, candidate.out
        return _from_ranks(program, candidate.q, k, candidate.v, tensor_of(product).dim(), make)
    assert candidate.scores is not None
    if target_of(candidate.scores) is aten.einsum.default or target_of(candidate.out) is aten.einsum.default:
        return _from_einsum(candidate, make)
    k = untransposed(candidate.k) or make(aten.transpose.int, candidate.k, -1, -2)
    return _from_ranks(program, candidate.q, k, candidate.v, tensor_of(candidate.out).dim(), make)


def _from_ranks(
    program: Program, q: Node, k: Node, v: Node, out_rank: int, make: Builder
) -> tuple[Node, Node, Node, Restore]:
    """Matmul-like operands ``[..., T, D]`` of rank 3 (batch and heads fused), 4, or 5 (grouped heads)."""
    rank = tensor_of(q).dim()
    if rank == 5:
        groups = tensor_of(q).shape[2]
        q = make(aten.flatten.using_ints, q, 1, 2)
        k, v = (_drop_group_axis(x, groups, make) for x in (k, v))
        restore: Restore = lambda y: make(aten.unflatten.int, y, 1, [-1, int_dim(groups, "heads per group")])  # noqa: E731
        return q, k, v, restore
    orders = {fused_order(program, x) for x in (q, k, v) if tensor_of(x).dim() == 3}
    if len(orders) > 1:
        raise Unsupported("q, k and v fuse batch and heads into one axis in different orders")
    heads_first = orders == {"heads first"}
    q, k, v = (split_heads(x, heads_first, make) for x in (q, k, v))
    if out_rank == 3:
        return q, k, v, lambda y: make(aten.flatten.using_ints, swapped(y, heads_first, make), 0, 1)
    if out_rank == 4:
        return q, k, v, lambda y: y
    raise Unsupported(f"attention over tensors of rank {rank} isn't supported")


def _drop_group_axis(node: Node, groups: Any, make: Builder) -> Node:
    """``[B, K, 1 or G, S, D]`` → ``[B, K or K·G, S, D]``."""
    value = tensor_of(node)
    if value.dim() != 5:
        raise Unsupported("grouped queries meet ungrouped keys")
    return make(aten.squeeze.dim, node, 2) if same_dim(value.shape[2], 1) else make(aten.flatten.using_ints, node, 1, 2)


def split_heads(node: Node, heads_first: bool, make: Builder) -> Node:
    """Rank-3 ``[B·H, T, D]`` (or ``[H·B, T, D]`` with ``heads_first``) → ``[B, H, T, D]``; rank 4 unchanged."""
    value = tensor_of(node)
    if value.dim() == 4:
        return node
    if target_of(node) in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        inner = node.args[0]
        assert isinstance(inner, Node)
        source = value_of(inner)
        if (
            source.dim() == 4
            and same_dim(source.shape[3], value.shape[2])
            and same_dim(source.shape[2], value.shape[1])
        ):
            return swapped(inner, heads_first, make)
    heads = fused_heads(node)
    return swapped(make(aten.unflatten.int, node, 0, [heads, -1] if heads_first else [-1, heads]), heads_first, make)


def swapped(node: Node, heads_first: bool, make: Builder) -> Node:
    """``[H, B, ...]`` as ``[B, H, ...]`` and back, where heads come first; otherwise the node itself."""
    return make(aten.transpose.int, node, 0, 1) if heads_first else node


def fused_heads(node: Node) -> int:
    """How many heads the first axis of ``[B·H, T, D]`` holds for each batch row."""
    value = tensor_of(node)
    if value.dim() != 3:
        raise Unsupported(f"an operand of rank {value.dim()} isn't supported")
    expr = expression(value.shape[0])
    if isinstance(expr, sympy.Integer):
        raise Unsupported("batch and heads are fused in one fixed axis, so they can't be told apart")
    heads, rest = expr.as_coeff_Mul()
    if not rest.is_Symbol or not heads.is_Integer:
        raise Unsupported(f"batch and heads are fused in one axis of {expr} rows, which isn't heads × batch")
    return int(heads)


def fused_order(program: Program, node: Node) -> str:
    """Whether the first axis of ``[B·H, T, D]`` is "batch first" or "heads first", proved by where a batch row goes.

    Attention itself doesn't care, but gates, feature maps and states belong to a head and read a row's own tokens. So
    the graph is run from the nearest values that still have a batch axis, with NaN in one of three batch rows.
    """
    heads = fused_heads(node)
    batch = expression(tensor_of(node).shape[0]).as_coeff_Mul()[1]
    rows, chosen = 3, 1
    sources = {n: axis for n in walk_up(node) if n is not node and (axis := _axis_of(n, batch)) is not None}
    nearest = {n: sources[n] for n in walk_up(node, frozenset(sources)) if n in sources}
    symbols = {s for n in walk_up(node, frozenset(nearest)) for dim in _shape(n) for s in symbols_in(dim)}
    sizes = Sizes({name: rows if name == str(batch) else 5 for name in symbols | {str(batch)}})
    env = {}
    for source, axis in nearest.items():
        env[source] = torch.ones(sizes.shape(tensor_of(source)))
        env[source].select(axis, chosen).fill_(float("nan"))
    try:
        reached = evaluate(program.graph_module, node, sizes, env, lambda n: torch.zeros(sizes.shape(tensor_of(n))))
    except Opaque as error:
        raise Unsupported(f"batch and heads are fused in one axis, in an order that can't be found: {error}") from error
    found = reached.isnan().flatten(1)
    at = torch.arange(rows * heads)
    for order, wanted in (("batch first", at // heads == chosen), ("heads first", at % rows == chosen)):
        if torch.equal(found.all(1), wanted) and torch.equal(found.any(1), wanted):
            return order
    raise Unsupported("batch and heads are fused in one axis in an order that is neither batch-major nor head-major")


def _shape(node: Node) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _axis_of(node: Node, batch: sympy.Expr) -> int | None:
    """The axis of a floating-point value that counts exactly the batch rows."""
    value = value_of(node)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return next((axis for axis, dim in enumerate(value.shape) if expression(dim) == batch), None)


def untransposed(node: Node) -> Node | None:
    """The node whose last two axes ``node`` swaps, if that is all it does."""
    value = tensor_of(node)
    last = {value.dim() - 1, value.dim() - 2}
    if target_of(node) is aten.transpose.int:
        a, b = (int(axis) % value.dim() for axis in node.args[1:3])  # type: ignore[arg-type]
        return node.args[0] if {a, b} == last else None  # type: ignore[return-value]
    if target_of(node) is aten.permute.default:
        axes = [int(axis) % value.dim() for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
        swapped = [*range(value.dim() - 2), value.dim() - 1, value.dim() - 2]
        return node.args[0] if axes == swapped else None  # type: ignore[return-value]
    return None


def _equation(node: Node, rank: int) -> tuple[str, str, str]:
    """Labels of a contraction's operands and result; a matmul gets the labels of its axes."""
    if target_of(node) is aten.einsum.default:
        text = str(node.args[0]).replace(" ", "")
        if "." in text or "->" not in text:
            raise Unsupported(f"the einsum '{text}' isn't explicit")
        left, _, out = text.partition("->")
        first, _, second = left.partition(",")
        return first, second, out
    batch = "ABCDE"[: rank - 2]
    return batch + "xz", batch + "zy", batch + "xy"


def _from_einsum(candidate: Candidate, make: Builder) -> tuple[Node, Node, Node, Restore]:
    assert candidate.scores is not None
    if any(tensor_of(n).dim() != tensor_of(candidate.scores).dim() for n in candidate.chain):
        raise Unsupported("the scores change rank between an einsum and the softmax")
    q_labels, k_labels, s_labels = _equation(candidate.scores, tensor_of(candidate.scores).dim())
    p_labels, v_labels, o_labels = _equation(candidate.out, tensor_of(candidate.out).dim())
    if len(p_labels) != len(s_labels):
        raise Unsupported("scores and probabilities have different axes")
    rename = dict(zip(p_labels, s_labels, strict=True))
    unused = iter("αβγδεζηθ")
    for label in dict.fromkeys(v_labels + o_labels):
        rename.setdefault(label, next(unused))
    v_labels, o_labels = ("".join(rename[c] for c in text) for text in (v_labels, o_labels))
    row, column = s_labels[-2], s_labels[-1]
    if row in k_labels or column in q_labels:
        row, column = column, row
        raise Unsupported("the softmax doesn't run over the keys")
    batch = [c for c in s_labels if c not in (row, column)]
    depth = [c for c in q_labels if c in k_labels and c not in s_labels]
    value = [c for c in v_labels if c not in s_labels]
    if len(depth) != 1 or len(value) != 1 or any(c not in q_labels for c in batch) or column not in v_labels:
        raise Unsupported("the einsum isn't q·k or p·v of attention")

    def arrange(node: Node, have: str, want: list[str]) -> Node:
        order = [have.index(c) for c in want]
        return node if order == list(range(len(have))) else make(aten.permute.default, node, order)

    q = arrange(candidate.q, q_labels, [*batch, row, *depth])
    k = arrange(candidate.k, k_labels, [*(c for c in batch if c in k_labels), column, *depth])
    v = arrange(candidate.v, v_labels, [*(c for c in batch if c in v_labels), column, *value])
    groups: int | None = None
    if len(batch) == 3:
        groups = int_dim(tensor_of(q).shape[2], "heads per group")
        q = make(aten.flatten.using_ints, q, 1, 2)
    if len(batch) not in (2, 3) or any(tensor_of(x).dim() != 4 for x in (q, k, v)):
        raise Unsupported(f"einsum attention with {len(batch)} batch axes isn't supported")

    def restore(y: Node) -> Node:
        if groups is not None:
            y = make(aten.unflatten.int, y, 1, [-1, groups])
        return arrange(y, "".join([*batch, row, *value]), list(o_labels))

    return q, k, v, restore


def fold_groups(program: Program, node: Node, heads: int, sizes: Sequence[Sizes]) -> Node:
    """The un-expanded KV heads behind ``repeat_kv`` and its many spellings, proved by evaluating the expansion.

    Args:
        sizes: of which no two axes of one size may be equal, so that a reshape shows what it mixes.
    """
    best, current = node, node
    for _ in range(10):
        if target_of(current) not in EXPANSIONS or not _same_at_every_length(current):
            break
        current = current.args[0]  # type: ignore[assignment]
        value = tensor_of(current)
        if value.dim() != 4 or not expression(value.shape[1]).is_Integer:
            continue
        few = int(expression(value.shape[1]))
        unlike = any(not same_dim(value.shape[axis], tensor_of(node).shape[axis]) for axis in (0, 2, 3))
        if few >= heads or heads % few or unlike:
            continue
        try:
            repeats = all(_repeats(program, current, node, heads // few, at) for at in sizes)
        except Opaque:
            break
        best = current if repeats else best
        break
    return best


def _repeats(program: Program, few: Node, many: Node, times: int, sizes: Sizes) -> bool:
    x = torch.randn(sizes.shape(tensor_of(few)))
    return torch.equal(evaluate(program.graph_module, many, sizes, {few: x}), x.repeat_interleave(times, 1))


def _same_at_every_length(node: Node) -> bool:
    """Whether an expansion that was looked at for two lengths is known for all: none of its choices can hang on one."""
    if target_of(node) is aten.slice.Tensor:  # a prefix; the lengths are compared as expressions
        return argument(node, 2, "start") in (0, None) and argument(node, 4, "step", 1) == 1
    if target_of(node) is aten.index.Tensor:
        indices = node.args[1]
        assert isinstance(indices, (list, tuple))
        rest = [item for axis, item in enumerate(indices) if axis != 1 and item is not None]
        chosen = [n for item in indices if isinstance(item, Node) for n in walk_up(item)]
        return not rest and not any(is_symbolic(value_of(n)) or symbols_in(value_of(n)) for n in chosen)
    return True
