"""Writes products one way: einsums explicit and with the factor of the queries first, ``v·p`` as ``p·v``.

Exact rewrites for ``Canonicalize``: factors change places and axes are swapped, no number is computed otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import Builder, aten, same_dim, target_of, tensor_of, value_of
from ..op_kinds import CASTS, SAME
from ..proof.match import SOFTMAX
from ..proof.operands import untransposed

MATMULS = frozenset({aten.matmul.default, aten.bmm.default})
AFTER_SOFTMAX = (
    CASTS
    | SAME
    | frozenset(
        {
            aten.transpose.int,
            aten.permute.default,
            aten.reshape.default,
            aten.view.default,
            aten.expand.default,
            aten.unsqueeze.default,
            aten.mul.Tensor,
            aten.masked_fill.Scalar,
            aten.nan_to_num.default,
        }
    )
)


def order_products(module: GraphModule) -> int:
    """Rewrites the products that ``match`` would read the wrong way round; returns how many."""
    changed = 0
    for node in list(module.graph.nodes):
        target = target_of(node)
        if target is aten.einsum.default:
            changed += _einsum(node)
        elif target in MATMULS:
            changed += _values_first(module, node) or _keys_first(module, node)
    return changed


def _probabilities(node: Any) -> bool:
    """Whether a node is a softmax, or one moved, masked or cast."""
    for _ in range(8):
        if target_of(node) in SOFTMAX:
            return True
        if target_of(node) not in AFTER_SOFTMAX:
            return False
        node = node.args[0]
    return False


def _einsum(node: Node) -> bool:
    """Makes an einsum of two factors explicit, the probabilities or the queries' factor first."""
    pair = node.args[1]
    factors = [x for x in pair if isinstance(x, Node)] if isinstance(pair, (list, tuple)) else []
    if len(factors) != 2:
        return False
    left, right = factors
    labels = explicit(str(node.args[0]), tensor_of(left), tensor_of(right))
    if labels is None:
        return False
    first, second, out = labels
    swap = _probabilities(right) and not _probabilities(left)
    if not (swap or _probabilities(left) or _probabilities(right)) and min(tensor_of(x).dim() for x in factors) >= 3:
        swap = (
            len(out) > 1
            and out[-1] in first
            and out[-1] not in second
            and any(label in second and label not in first for label in out)
        )
    if swap:
        first, second, left, right = second, first, right, left
    equation = f"{first},{second}->{out}"
    if equation == str(node.args[0]).replace(" ", "") and not swap:
        return False
    node.args = (equation, [left, right], *node.args[2:])
    return True


def explicit(equation: str, left: Tensor, right: Tensor) -> tuple[str, str, str] | None:
    """Labels of both factors and the result without ``...``; None where an axis is broadcast or repeated."""
    text = equation.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    first, comma, second = inputs.partition(",")
    if not comma or "," in second:
        return None
    if not arrow:
        letters = first + second
        single = "".join(sorted(c for c in set(letters) - {"."} if letters.count(c) == 1))
        out = ("..." if "..." in text else "") + single
    if "..." in text:
        if not ("..." in first and "..." in second and "..." in out):
            return None
        sizes = [list(x.shape) for x in (left, right)]
        spans = []
        for labels, shape in zip((first, second), sizes, strict=True):
            start = labels.index("...")
            spans.append(shape[start : len(shape) - (len(labels) - 3 - start)])
        if len(spans[0]) != len(spans[1]) or not all(map(same_dim, *spans)):
            return None
        free = [c for c in "ABCDEFGHIJ" if c not in text][: len(spans[0])]
        first, second, out = (labels.replace("...", "".join(free)) for labels in (first, second, out))
    if any(len(set(labels)) != len(labels) or "." in labels for labels in (first, second, out)):
        return None
    return first, second, out


def _swapped_last(node: Any) -> Node | None:
    """What ``node`` is the transpose of (over the last two axes)."""
    return untransposed(node) if isinstance(node, Node) and isinstance(value_of(node), Tensor) else None


def _values_first(module: GraphModule, node: Node) -> bool:
    """``vᵀ·pᵀ`` → ``(p·v)ᵀ``."""
    left, right = node.args[0], node.args[1]
    turned = _probabilities(right) and _swapped_last(right) is not None
    if not turned or _probabilities(left) or value_of(left).dim() != value_of(right).dim():
        return False
    make = Builder(module, node)
    factors = [_swapped_last(x) or make(aten.transpose.int, x, -1, -2) for x in (right, left)]
    product = make(target_of(node), *factors)
    return _replace(module, node, make(aten.transpose.int, product, -1, -2))


def _keys_first(module: GraphModule, node: Node) -> bool:
    """``(k·qᵀ)ᵀ`` → ``q·kᵀ``, where nobody reads the product itself."""
    users = list(node.users)
    if len(users) != 1 or _swapped_last(users[0]) is not node or _probabilities(node.args[0]):
        return False
    if value_of(node.args[0]).dim() != value_of(node.args[1]).dim():
        return False
    make = Builder(module, node)
    right, left = (_swapped_last(x) or make(aten.transpose.int, x, -1, -2) for x in node.args[:2])
    return _replace(module, users[0], make(target_of(node), left, right))


def _replace(module: GraphModule, old: Node, new: Node) -> bool:
    """Puts ``new`` in the place of ``old``, and what it is the transpose of where ``old`` is transposed back."""
    for user in list(old.users):
        if _swapped_last(user) is old and _swapped_last(new) is not None:
            user.replace_all_uses_with(_swapped_last(new))  # type: ignore[arg-type]
            module.graph.erase_node(user)
    old.replace_all_uses_with(new)
    module.graph.erase_node(old)
    return True
