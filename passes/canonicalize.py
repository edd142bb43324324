"""Canonicalisation: removes what tracing left behind, so that one matcher sees one spelling.

Exact rewrites only: every rule keeps values, dtypes and gradients.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .canonical.flex import lower_flex
from .canonical.parts import assemble_parts
from .canonical.products import order_products
from .canonical.spelling import respell
from .graph import (
    INT_MAX,
    Builder,
    argument,
    aten,
    copy_origin,
    finish,
    get_attribute,
    is_mutation,
    is_view,
    storage_root,
    target_of,
    value_of,
)
from .pipeline import PassResult, register
from .program import Program

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)
COPIES = frozenset(
    {aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype, aten.lift_fresh_copy.default}
)
# In-place ops that have an out-of-place twin; after export they act on fresh values, so the twin is equal.
FUNCTIONAL = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.detach_.default: aten.detach.default,
}


@register("canonicalize")
@dataclass(frozen=True)
class Canonicalize:
    """Removes no-op casts, slices, dropouts and asserts, inlines grad-mode regions, folds hand-written softmax.

    Tensors written part by part become concatenations, products are brought into one order of factors, and ops that
    torch has under two names get the first of them.
    """

    name: str = field(default="canonicalize", init=False, metadata={"text": False})

    def run(self, program: Program) -> PassResult:
        module = program.graph_module
        before = len(module.graph.nodes)
        counts = {
            "inlined regions": inline_regions(module),
            "ops respelled": respell(module),
            "flex_attention written out": lower_flex(module),
            "tensors assembled": assemble_parts(module),
            "no-ops removed": remove_noops(module),
            "softmaxes folded": fold_manual_softmax(module),
            "products reordered": order_products(module),
        }
        finish(module)
        counts["nodes removed"] = before - len(module.graph.nodes)
        return PassResult(program, modified=any(counts.values()), report=counts)


def remove_noops(module: GraphModule) -> int:
    """Drops nodes that return their input unchanged; turns ``view`` into ``reshape`` (no stride contract)."""
    graph, removed = module.graph, 0
    remove_unreachable(module)
    make_functional(module)
    mutates = any(is_mutation(node) for node in graph.nodes)
    for node in list(graph.nodes):
        target = target_of(node)
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)
            removed += 1
            continue
        if target is None:
            continue
        if target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # the op whose strides made a view legal may be replaced later
        elif target in (
            aten._assert_tensor_metadata.default,
            aten._assert_scalar.default,
            aten.sym_constrain_range_for_size.default,
        ):
            graph.erase_node(node)
            removed += 1
            continue
        source = _same_as(node)
        if source is not None and not (mutates and target in COPIES):  # a copy matters where something is written
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            removed += 1
    graph.eliminate_dead_code()
    return removed


def make_functional(module: GraphModule) -> None:
    """Turns in-place ops on fresh tensors without views into out-of-place twins; later readers read those."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        base = node.args[0] if target_of(node) in FUNCTIONAL else None
        if not isinstance(base, Node) or base.op != "call_function" or is_view(base):
            continue
        if any(is_view(user) or (is_mutation(user) and user is not node) for user in base.users):
            continue  # others may see the write through shared memory: left in place, and refused where it matters
        for user in [user for user in base.users if order[user] > order[node]]:
            user.replace_input_with(base, node)
        node.target = FUNCTIONAL[target_of(node)]


def remove_unreachable(module: GraphModule) -> None:
    """Removes what no output needs. Unlike fx's own clean-up it also removes in-place ops on tensors nobody reads."""
    roots = {node: storage_root(node) for node in module.graph.nodes}
    readers: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        if is_mutation(node):
            readers.setdefault(roots[node], []).append(node)
    needed: set[Node] = set()
    pending = [node for node in module.graph.nodes if node.op in ("output", "placeholder", "call_module")]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
            pending.extend(readers.get(roots[node], ()))
    outside = {root for root in readers if root.op != "call_function"}  # buffers and inputs that the model changes
    for root in outside - needed:
        pending.extend([root, *readers[root]])
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in reversed(list(module.graph.nodes)):
        if node not in needed and not node.users:
            module.graph.erase_node(node)


def _same_as(node: Node) -> Node | None:
    """The input this node returns unchanged (same values, dtype, device, shape and gradient), if any."""
    target = target_of(node)
    base = node.args[0] if node.args else None
    if not isinstance(base, Node) or not isinstance(value_of(base), Tensor):
        return None
    if target in CASTS:
        old, new = value_of(base), value_of(node)
        return base if old.dtype == new.dtype and old.device == new.device else None
    if target is aten.slice.Tensor:
        start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        return base if start in (0, None) and end in (INT_MAX, None) and step == 1 else None
    if target in (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default):
        return base if node.args[1] == 0 or not node.args[2] else None
    if target is aten.repeat_interleave.self_int:
        return base if node.args[1] == 1 and argument(node, 2, "dim") is not None else None
    if target is aten.expand.default:
        sizes = node.args[1]
        return (
            base
            if isinstance(sizes, (list, tuple)) and len(sizes) == value_of(base).dim() and all(s == -1 for s in sizes)
            else None
        )
    neutral = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Scalar: 1}.get(
        target
    )
    if neutral is not None and len(node.args) > 1 and not isinstance(node.args[1], Node) and node.args[1] == neutral:
        return base if value_of(base).dtype == value_of(node).dtype else None
    return None


def fold_manual_softmax(module: GraphModule) -> int:
    """``exp(x − max x) / Σ exp`` and ``exp(log_softmax)`` → ``softmax``. Subtracting a row constant changes nothing."""
    graph, folded = module.graph, 0
    for node in list(graph.nodes):
        scores = _manual_softmax_input(node)
        if scores is None:
            continue
        source, dim = scores
        with graph.inserting_before(node):
            softmax = graph.call_function(aten.softmax.int, (source, dim))
        softmax.meta = dict(node.meta)
        node.replace_all_uses_with(softmax)
        folded += 1
    if folded:
        graph.eliminate_dead_code()
    return folded


def _manual_softmax_input(node: Node) -> tuple[Node, int] | None:
    if target_of(node) is aten.exp.default and target_of(node.args[0]) in (
        aten.log_softmax.int,
        aten._log_softmax.default,
    ):
        inner = node.args[0]
        assert isinstance(inner, Node)
        return (inner.args[0], inner.args[1]) if value_of(inner).dtype == value_of(inner.args[0]).dtype else None  # type: ignore[return-value]
    if target_of(node) is not aten.div.Tensor:
        return None
    exponential, total = node.args[0], node.args[1]
    if target_of(exponential) is not aten.exp.default or target_of(total) is not aten.sum.dim_IntList:
        return None
    assert isinstance(exponential, Node) and isinstance(total, Node)
    last = value_of(exponential).dim() - 1
    dims: Any = total.args[1]
    if list(dims) not in ([-1], [last]) or not argument(total, 2, "keepdim", False):
        return None
    summed = total.args[0]
    again = target_of(summed) is aten.exp.default and summed.args[0] is exponential.args[0]  # type: ignore[union-attr]
    if summed is not exponential and not again:
        return None
    shifted = exponential.args[0]
    assert isinstance(shifted, Node)
    if target_of(shifted) is aten.sub.Tensor and _is_row_maximum(shifted.args[1], shifted.args[0], last):
        base = shifted.args[0]
        assert isinstance(base, Node)
        return base, -1
    return shifted, -1


def _is_row_maximum(node: Any, scores: Any, last: int) -> bool:
    """Whether ``node`` is the maximum of ``scores`` over its last axis, kept as an axis of length 1."""
    if target_of(node) is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if target_of(node) is aten.detach.default:
        return _is_row_maximum(node.args[0], scores, last)
    if target_of(node) is aten.amax.default:
        return (
            node.args[0] is scores
            and list(argument(node, 1, "dim", [])) in ([-1], [last])
            and bool(argument(node, 2, "keepdim", False))
        )
    if target_of(node) is aten.max.dim:
        return node.args[0] is scores and node.args[1] in (-1, last) and bool(argument(node, 2, "keepdim", False))
    return False


def inline_regions(module: GraphModule) -> int:
    """Inlines ``with torch.no_grad()`` and ``with autocast(enabled=False)`` regions, which export wraps in one op.

    Outputs of a no-grad region are detached, so that gradients stay as they were.
    """
    inlined = 0
    for node in list(module.graph.nodes):
        name = getattr(target_of(node), "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            enabled, body, operands = node.args[0], node.args[1], node.args[2:]
            detach = not enabled
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, operands, detach = node.args[4], node.args[5:], False
        else:
            continue
        assert isinstance(body, Node)
        _inline(module, node, get_attribute(module, str(body.target)), operands, detach)
        inlined += 1
    if inlined:
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
    return inlined


def _inline(module: GraphModule, call: Node, body: GraphModule, operands: tuple[Any, ...], detach: bool) -> None:
    graph = module.graph
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    mapping: dict[Node, Any] = dict(zip(placeholders, operands, strict=True))
    with graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                setattr(module, f"_{call.name}_{node.target}", get_attribute(body, str(node.target)))
            new = graph.node_copy(node, lambda item: mapping[item])
            if node.op == "get_attr":
                new.target = f"_{call.name}_{node.target}"
            copy_origin(node if "stack_trace" in node.meta else call, new)
            mapping[node] = new
    output = next(node for node in body.graph.nodes if node.op == "output")
    results = torch.fx.map_arg(output.args[0], lambda item: mapping[item])
    build = Builder(module, call)
    finals: list[Node] = []
    for result in results if isinstance(results, (list, tuple)) else [results]:
        differentiable = isinstance(value_of(result), Tensor) and value_of(result).is_floating_point()
        finals.append(build(aten.detach.default, result) if detach and differentiable else result)
    for user in list(call.users):
        if target_of(user) is operator.getitem:
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(finals[index])
            graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(finals[0])
    graph.erase_node(call)
