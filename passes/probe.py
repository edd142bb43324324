"""Says what a candidate's scores do, by evaluating the chain between q·k and the softmax.

Zeros reveal mask and bias, random scores the scale, large scores a softcap, and altered inputs the padding. Finite
probes alone would be unsound (a window of 4096 looks causal at length 64), so every integer constant in the mask's
slice is harvested and probed past: densely where that fits, otherwise at positions spread around the constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .evaluate import Evaluation, Opaque, Sizes, evaluate
from .graph import INT_MAX, aten, get_attribute, is_symbolic, same_dim, symbols_in, target_of, tensor_of, value_inputs, value_of
from .match import Candidate
from .program import Program

MASKED = -9000.0  # additive masks in use start at −1e4
BASE_LENGTHS = (1, 2, 3, 7, 12, 33)
DENSE_LIMIT = 700  # longest length probed with every pair of positions
BUFFER_LIMIT = 8192  # longest mask buffer probed as a whole


@dataclass
class Findings:
    """What probing a candidate found. ``kind`` is one of full, causal, sliding, or the name of what was seen instead."""

    kind: str
    reason: str = ""
    window: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    bias: str = "none"
    slopes: tuple[float, ...] | None = None
    padding: dict[str, bool] = field(default_factory=dict)  # mask input → inverted (True = 1 means padding)
    reads: list[str] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)

    @property
    def supported(self) -> bool:
        return self.kind in ("full", "causal", "sliding") and self.bias in ("none", "row-constant")


class Unclassified(Exception):
    """Carries the verdict (kind, reason) of a candidate that can't be canonical softmax attention."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass
class Probe:
    """Evaluates one candidate's score chain at chosen lengths."""

    program: Program
    candidate: Candidate

    def __post_init__(self) -> None:
        q, k = tensor_of(self.candidate.q), tensor_of(self.candidate.k)
        scores = self.candidate.scores
        if scores is not None:
            self.rows, self.columns = tensor_of(scores).shape[-2:]
        else:
            self.rows, self.columns = q.shape[-2], k.shape[-2]
        self.same_length = same_dim(self.rows, self.columns)

    def sizes(self, length: int, batch: int = 2) -> Sizes:
        """Binds the symbols: batch, and the row axis to ``length`` (other sequence axes get ``length + 2``)."""
        binding: dict[str, int] = {}
        row_symbols = symbols_in(self.rows)
        for item in self.program.inputs:
            fake = tensor_of(self.program.placeholder(item.name))
            for axis, dim in enumerate(fake.shape):
                free = symbols_in(dim)
                if len(free) == 1:
                    symbol = next(iter(free))
                    wanted = batch if item.axes.get(axis, "batch") == "batch" else length if symbol in row_symbols else length + 2
                    binding.setdefault(symbol, wanted)
        return Sizes(binding)

    def leaf(self, sizes: Sizes, masks: dict[str, Tensor] | None = None, positions: Tensor | None = None) -> Any:
        """Values for placeholders: masks all ones, positions counting up; anything else is data, not to be read."""
        roles = {item.name: item for item in self.program.inputs}

        def value(node: Node) -> Tensor | None:
            item = roles[node.name]
            fake = tensor_of(node)
            shape = sizes.shape(fake)
            if masks and node.name in masks:
                return masks[node.name].to(fake.dtype)
            if item.role == "positions" and len(shape) == 2:
                return (torch.arange(shape[1]).expand(shape) if positions is None else positions).to(fake.dtype)
            if self.is_mask(node):
                return torch.full(shape, 0 if self.inverted.get(node.name) else 1).to(fake.dtype)
            return None

        return value

    inverted: dict[str, bool] = field(default_factory=dict)

    def is_mask(self, node: Node) -> bool:
        fake = tensor_of(node)
        item = next(i for i in self.program.inputs if i.name == node.name)
        return fake.dim() == 2 and item.role in ("mask", "other") and ("mask" in item.role or fake.dtype == torch.bool)

    def scores(self, sizes: Sizes, raw: Tensor, leaf: Any, record: Evaluation | None = None, env: dict[Node, Any] | None = None) -> Tensor:
        """The softmax's input (float32) as a function of the raw contraction ``raw``."""
        module, candidate = self.program.graph_module, self.candidate
        env = dict(env or {})
        if candidate.softmax is not None:
            assert candidate.scores is not None
            env[candidate.scores] = raw
            if target_of(candidate.scores) is aten.baddbmm.default:
                env[candidate.scores] = self._baddbmm(sizes, raw, leaf, record, env)
            source = candidate.softmax.args[0]
            assert isinstance(source, Node)
            result: Tensor = evaluate(module, source, sizes, env, leaf, record)
            return result.float()
        scale = candidate.scale if candidate.scale is not None else 1 / math.sqrt(int(tensor_of(candidate.q).shape[-1]))
        result = raw * scale
        if candidate.mask is not None:
            mask = evaluate(module, candidate.mask, sizes, env, leaf, record)
            result = result.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else result + mask
        if candidate.is_causal:
            result = result.masked_fill(~torch.ones(result.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        return result

    def _baddbmm(self, sizes: Sizes, raw: Tensor, leaf: Any, record: Evaluation | None, env: dict[Node, Any]) -> Tensor:
        node = self.candidate.scores
        assert node is not None
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        base = evaluate(self.program.graph_module, node.args[0], sizes, dict(env), leaf, record)  # type: ignore[arg-type]
        return alpha * raw if beta == 0 else beta * base + alpha * raw

    def raw_shape(self, sizes: Sizes) -> list[int]:
        if self.candidate.scores is not None:
            return sizes.shape(tensor_of(self.candidate.scores))
        q, k = sizes.shape(tensor_of(self.candidate.q)), sizes.shape(tensor_of(self.candidate.k))
        return [*q[:-1], k[-2]]

    def slice_nodes(self) -> list[Node]:
        """Nodes of the score chain and of the masks that feed it (the raw contraction excluded)."""
        candidate = self.candidate
        roots = [candidate.mask] if candidate.softmax is None else [candidate.softmax.args[0]]
        seen: set[Node] = {candidate.scores} if candidate.scores is not None else set()
        found: list[Node] = []
        pending = [root for root in roots if isinstance(root, Node)]
        if candidate.scores is not None and target_of(candidate.scores) is aten.baddbmm.default:
            pending.append(candidate.scores.args[0])  # type: ignore[arg-type]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            found.append(node)
            pending.extend(value_inputs(node))
        return found


def classify(program: Program, candidate: Candidate) -> Findings:
    """Probes a candidate and names its kind, scale, softcap, bias and padding; never raises for a strange one."""
    try:
        return _classify(Probe(program, candidate))
    except Opaque as error:
        return Findings("data-dependent", f"the mask or bias depends on data: it {error}")
    except Unclassified as error:
        return Findings(error.kind, error.reason)


def _classify(probe: Probe) -> Findings:
    record = Evaluation()
    constants, buffer_length = harvest(probe)
    limit = probe.program.max_positions or 1 << 62
    static = not symbols_in(probe.rows)
    lengths = sorted({t for t in BASE_LENGTHS if t <= limit} | {min(c + d, limit) for c in constants if c <= DENSE_LIMIT for d in (0, 3)})
    if buffer_length:
        lengths.append(min(buffer_length, limit))
    if static:
        lengths = [int(probe.rows)]
    detect_polarity(probe, lengths[min(2, len(lengths) - 1)])
    findings = Findings("unknown", probed=list(lengths))
    findings.scale, findings.softcap = response(probe, record)
    observations: list[tuple[Tensor, Tensor, Tensor]] = []
    for length in lengths:
        allowed, bias, positions = observe(probe, length, record)
        observations.append((allowed, positions, bias))
    far = [c for c in constants if c > DENSE_LIMIT and c < limit]
    if far and not static:
        observations.append(observe_sparse(probe, far, record))
        findings.probed.append(max(far) * 2)
    if record.parameters and any(_has_bias(a, b) for a, _, b in observations):
        raise Unclassified("learned-bias", f"a learned bias is added to the scores ({', '.join(sorted(record.parameters))})")
    findings.kind, findings.window = mask_kind(observations, probe)
    findings.bias, findings.slopes = bias_kind(observations)
    findings.reads = sorted(record.inputs)
    if findings.kind not in ("full", "causal", "sliding"):
        findings.reason = f"the mask is {findings.kind}{f' ({findings.window})' if findings.window else ''}, not full, causal or sliding"
        return findings
    if findings.bias not in ("none", "row-constant"):
        findings.reason = f"a position bias is added to the scores ({findings.bias})"
        return findings
    padding(probe, findings, lengths)
    return findings


def harvest(probe: Probe) -> tuple[list[int], int]:
    """Integer constants of the mask's slice, and the length of the longest buffer it slices."""
    constants: set[int] = set()
    buffer_length = 0
    module = probe.program.graph_module
    for node in probe.slice_nodes():
        if node.op == "get_attr":
            value = get_attribute(module, str(node.target))
            if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and value.dtype != torch.bool:
                constants.update(_whole(value.item()))
            elif isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.dim() >= 2:
                buffer_length = max(buffer_length, min(int(value.shape[-1]), BUFFER_LIMIT))
            continue
        if node.op != "call_function" or target_of(node) in (aten.slice.Tensor, aten.expand.default, aten.reshape.default, aten.view.default):
            items: list[Any] = [a for a in node.args if is_symbolic(value_of(a))]
        else:
            items = [*node.args[1:], *node.kwargs.values()] if node.args and isinstance(node.args[0], Node) else [*node.args, *node.kwargs.values()]
        for item in items:
            if _is_fill(node, item):
                continue
            if isinstance(item, Node) and is_symbolic(value_of(item)):
                constants.update(abs(int(n)) for n in value_of(item).node.expr.atoms(sympy.Integer))
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                constants.update(_whole(item))
    return sorted(c for c in constants if 1 < c < INT_MAX // 2), buffer_length


def _is_fill(node: Node, item: Any) -> bool:
    """Whether a number is the value put at masked places, not something positions are compared with."""
    if not isinstance(item, (int, float)) or target_of(node) not in FILLS:
        return False
    return item <= MASKED or (target_of(node) is aten.mul.Tensor and item >= -MASKED and tensor_of(node).is_floating_point())


FILLS = frozenset(
    {
        aten.masked_fill.Scalar,
        aten.masked_fill_.Scalar,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.full.default,
        aten.full_like.default,
        aten.new_full.default,
        aten.mul.Tensor,
    }
)


def _whole(value: float) -> set[int]:
    finite = isinstance(value, int) or (math.isfinite(value) and float(value).is_integer())
    return {abs(int(value))} if finite and 1 < abs(value) < 1 << 40 else set()


def detect_polarity(probe: Probe, length: int) -> None:
    """Finds mask inputs where 1 means "ignore" (torch.nn's key_padding_mask): with all ones nothing is allowed."""
    sizes = probe.sizes(length)
    record = Evaluation()
    zero = torch.zeros(probe.raw_shape(sizes))
    allowed = probe.scores(sizes, zero, probe.leaf(sizes), record) > MASKED
    if bool(allowed.any()):
        return
    for name in sorted(record.inputs):
        if probe.is_mask(probe.program.placeholder(name)):
            probe.inverted = {name: True}
            if bool((probe.scores(sizes, zero, probe.leaf(sizes)) > MASKED).any()):
                return
    probe.inverted = {}
    raise Unclassified("empty", "the mask allows nothing at all")


def response(probe: Probe, record: Evaluation) -> tuple[float, float]:
    """Scale and softcap: how the chain answers random and very large scores."""
    length = 7 if (probe.program.max_positions or 7) >= 7 else probe.program.max_positions or 7
    sizes = probe.sizes(length)
    leaf = probe.leaf(sizes)
    shape = probe.raw_shape(sizes)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 3
    base = probe.scores(sizes, torch.zeros(shape), leaf, record)
    allowed = base > MASKED
    difference = probe.scores(sizes, x, leaf) - base
    if difference.numel() != x.numel():
        raise Unclassified("unknown-scores", "the scores change shape between q·k and softmax")
    values, inputs = difference[allowed], x.reshape(difference.shape)[allowed]
    large = (probe.scores(sizes, torch.full(shape, 1000.0), leaf) - base)[allowed]
    scale = (values / inputs).median().item()
    if torch.allclose(values, scale * inputs, rtol=1e-4, atol=1e-5) and torch.allclose(large, torch.full_like(large, 1000 * scale), rtol=1e-4):
        if scale <= 0:
            raise Unclassified("unknown-scores", f"the scores are scaled by {scale:g}, which isn't positive")
        return scale, 0.0
    cap = large.median().item()
    if cap > 0 and torch.allclose(large, torch.full_like(large, cap), rtol=1e-3):
        inner = torch.atanh((values.double() / cap).clamp(-1 + 1e-12, 1 - 1e-12)) * cap
        scale = (inner / inputs).median().item()
        if torch.allclose(cap * torch.tanh(scale * inputs / cap), values, rtol=1e-4, atol=1e-5):
            return scale, cap
    raise Unclassified("unknown-scores", "the scores are changed by something other than a scale, a softcap, a mask or a bias")


def observe(probe: Probe, length: int, record: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    """(allowed, bias, positions) at one length; long lengths use one batch row and, where it broadcasts, one head."""
    sizes = probe.sizes(length, batch=1 if length > 64 else 2)
    shape = probe.raw_shape(sizes)
    leaf = probe.leaf(sizes)
    zero = torch.zeros(shape)
    if length > 256 and len(shape) == 4:
        zero = torch.zeros([shape[0], 1, *shape[2:]])
    try:
        values = probe.scores(sizes, zero, leaf, record)
    except Opaque:
        if list(zero.shape) == shape:
            raise
        values = probe.scores(sizes, torch.zeros(shape), leaf, record)
    values = _four_axes(values)
    return values > MASKED, torch.where(values > MASKED, values, torch.zeros(())), torch.arange(values.shape[-1])


def observe_sparse(probe: Probe, constants: list[int], record: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    """Observes at positions spread around large constants, by giving ``arange`` nodes those positions.

    Sound only where the mask is a pointwise function of positions, which the ops of its slice show.
    """
    wanted = {0, 1, 2, 3, 5, 17}
    for constant in constants:
        wanted |= {constant + d for d in (-2, -1, 0, 1, 2)} | {2 * constant + d for d in (-1, 0, 1, 5)} | {constant // 2, 3 * constant // 2}
    farthest = 2 * max(constants)
    wanted |= {1 << bits for bits in range(4, 40) if 1 << bits <= farthest} | {int(farthest * f) for f in (0.013, 0.07, 0.19, 0.37, 0.61, 0.83)}
    limit = probe.program.max_positions
    positions = torch.tensor(sorted(p for p in wanted if p >= 0 and (limit is None or p < limit)))
    aranges: dict[Node, Any] = {}
    for node in reversed(probe.slice_nodes()):
        value = value_of(node)
        if target_of(node) in (aten.arange.default, aten.arange.start) and isinstance(value, Tensor) and symbols_in(value) == symbols_in(probe.rows):
            start = node.args[0] if target_of(node) is aten.arange.start else 0
            if start != 0:
                raise Unclassified("unprovable", f"the mask counts from {start}; it can't be probed past the constant {max(constants)}")
            aranges[node] = positions
    if not aranges:
        raise Unclassified("unprovable", f"the mask reads the constant {max(constants)}, past which it can't be probed")
    for node in probe.slice_nodes():
        value = value_of(node)
        made_from_size = isinstance(value, Tensor) and symbols_in(value) & symbols_in(probe.rows) and node.op == "call_function"
        if made_from_size and target_of(node) in NOT_POINTWISE:
            raise Unclassified(
                "unprovable", f"the mask reads the constant {max(constants)} beside '{node.name}', so it can't be probed past it; build the mask from arange"
            )
    sizes = probe.sizes(len(positions), batch=1)
    shape = probe.raw_shape(sizes)
    values = _four_axes(probe.scores(sizes, torch.zeros(shape), probe.leaf(sizes), record, env=aranges))
    return values > MASKED, positions, torch.where(values > MASKED, values, torch.zeros(()))


NOT_POINTWISE = frozenset(
    {
        aten.tril.default,
        aten.triu.default,
        aten.cumsum.default,
        aten.slice.Tensor,
        aten.flip.default,
        aten.roll.default,
        aten.constant_pad_nd.default,
        aten.sort.default,
        aten.diagonal.default,
        aten.eye.default,
    }
)


def _four_axes(values: Tensor) -> Tensor:
    if values.dim() == 3:
        return values.unsqueeze(0)
    return values.flatten(1, 2) if values.dim() == 5 else values


def expected_mask(kind: str, window: int | None, rows: Tensor, columns: Tensor) -> Tensor:
    """What a canonical mask allows between query positions ``rows`` and key positions ``columns``."""
    distance = rows[:, None] - columns[None, :]
    if kind == "full":
        return torch.ones_like(distance, dtype=torch.bool)
    if kind == "causal":
        return distance >= 0
    assert kind == "sliding" and window is not None
    return (distance >= 0) & (distance < window)


def mask_kind(observations: list[tuple[Tensor, Tensor, Tensor]], probe: Probe) -> tuple[str, int | None]:
    """The kind that explains *every* observation exactly, else a name for what was seen."""
    seen = []
    for allowed, positions, _ in observations:
        first = allowed[0, 0]
        if not bool((allowed == first).all()):
            return "per-head", None
        rows = positions if probe.same_length or first.shape[0] == len(positions) else torch.arange(first.shape[0])
        seen.append((first, rows, positions if first.shape[1] == len(positions) else torch.arange(first.shape[1])))
    windows = {int((r[:, None] - c[None, :])[a].max()) + 1 for a, r, c in seen if bool(a.any())}
    hypotheses: list[tuple[str, int | None]] = [("full", None)]
    if probe.same_length:
        hypotheses += [("causal", None), *(("sliding", w) for w in sorted(windows) if w > 0)]
    for kind, window in hypotheses:
        if all(torch.equal(a, expected_mask(kind, window, r, c)) for a, r, c in seen):
            return kind, window
    return _describe(seen[-1] if len(seen[-1][1]) > 3 else max(seen, key=lambda s: len(s[1]))), None


def _describe(observation: tuple[Tensor, Tensor, Tensor]) -> str:
    """A short name for a mask that isn't supported, for the refusal."""
    allowed, rows, columns = observation
    distance = rows[:, None] - columns[None, :]
    if not bool(allowed.any()):
        return "empty"
    if torch.equal(allowed, distance <= 0):
        return "anticausal"
    if torch.equal(allowed, distance > 0) or not bool(allowed.diagonal()[1:].any()):
        return "no-self"
    width = int(distance[allowed].abs().max()) + 1
    if torch.equal(allowed, distance.abs() < width):
        return f"bidirectional-window-{width}"
    causal = distance >= 0
    for size in range(2, int(rows.max()) + 1):
        same = (rows[:, None] // size) == (columns[None, :] // size)
        if torch.equal(allowed, causal & same):
            return f"chunked-{size}"
        if torch.equal(allowed, causal | (columns[None, :] < size)) or torch.equal(
            allowed, causal | ((rows[:, None] < size) & (columns[None, :] < size))
        ):
            return f"prefix-lm-{size}"
        if torch.equal(allowed, causal & (distance % size == 0)) or torch.equal(allowed, distance % size == 0):
            return f"strided-{size}"
    return "arbitrary"


def _has_bias(allowed: Tensor, bias: Tensor) -> bool:
    return bool(allowed.any()) and bool(bias[allowed].abs().max() > 1e-6)


def bias_kind(observations: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[str, tuple[float, ...] | None]:
    """none, row-constant (softmax doesn't see it), alibi (with slopes per head), toeplitz or arbitrary."""
    kinds: list[tuple[str, tuple[float, ...] | None]] = []
    for allowed, positions, bias in observations:
        kinds.append(_bias_of(allowed, positions, bias) if _has_bias(allowed, bias) else ("none", None))
    order = ("none", "row-constant", "alibi", "toeplitz", "arbitrary")
    worst = max(kinds, key=lambda item: order.index(item[0]))
    if worst[0] == "alibi":
        slopes = [s for k, s in kinds if k == "alibi" and s is not None]
        if any(not torch.allclose(torch.tensor(s), torch.tensor(slopes[-1]), rtol=1e-3, atol=1e-6) for s in slopes):
            return "arbitrary", None
        return "alibi", slopes[-1]
    return worst


def _bias_of(allowed: Tensor, positions: Tensor, bias: Tensor) -> tuple[str, tuple[float, ...] | None]:
    batch, heads, rows, columns = bias.shape
    allowed = allowed.expand_as(bias)
    first = allowed.float().argmax(-1, keepdim=True)
    relative = torch.where(allowed, bias - bias.gather(-1, first), torch.zeros(()))
    if relative.abs().max() < 1e-5:
        return "row-constant", None
    columns_at = positions[:columns].to(bias.dtype) if len(positions) >= columns else torch.arange(columns).to(bias.dtype)
    offset = columns_at[None, None, None, :] - columns_at[first]
    usable = allowed & (offset > 0)
    slopes = []
    for head in range(heads):
        ratio = (relative[:, head] / offset.expand_as(relative)[:, head].clamp(min=1))[usable[:, head]]
        slopes.append(ratio.median().item() if ratio.numel() else 0.0)
    line = torch.tensor(slopes)[None, :, None, None] * offset
    tolerance = 1e-4 + 1e-5 * float(line.abs().max())
    if torch.allclose(torch.where(usable, line, torch.zeros(())), torch.where(usable, relative, torch.zeros(())), atol=tolerance):
        return "alibi", tuple(round(s, 8) for s in slopes)
    by_distance = all(
        _constant(torch.diagonal(bias[b, h], o)[torch.diagonal(allowed[b, h], o)]) for b in range(batch) for h in range(heads) for o in range(1 - rows, columns)
    )
    return ("toeplitz", None) if by_distance else ("arbitrary", None)


def _constant(values: Tensor) -> bool:
    return values.numel() < 2 or bool((values - values[0]).abs().max() < 1e-5)


def padding_patterns(batch: int, length: int) -> dict[str, Tensor]:
    """Left, right and holed padding masks ``[B, T]`` (True = real token); the last row has no padding."""
    left = torch.ones(batch, length, dtype=torch.bool)
    left[0, : length // 3] = False
    holes = torch.ones(batch, length, dtype=torch.bool)
    holes[0, 1 : length - 1 : 3] = False
    return {"left": left, "right": left.flip(1), "holes": holes}


def padding(probe: Probe, findings: Findings, lengths: list[int]) -> None:
    """Finds which mask inputs remove padded keys, and refuses masks that do anything else with them."""
    length = next((t for t in lengths if t >= 7), lengths[-1])
    sizes = probe.sizes(length)
    zero = torch.zeros(probe.raw_shape(sizes))
    plain = _four_axes(probe.scores(sizes, zero, probe.leaf(sizes)) > MASKED)
    for name in findings.reads:
        node = probe.program.placeholder(name)
        item = next(i for i in probe.program.inputs if i.name == name)
        if item.role == "positions":
            _check_packing(probe, sizes, zero, plain)
            continue
        shape = sizes.shape(tensor_of(node))
        for pattern, real in padding_patterns(*shape).items():
            value = ~real if probe.inverted.get(name) else real
            seen = _four_axes(probe.scores(sizes, zero, probe.leaf(sizes, {name: value})) > MASKED)
            if torch.equal(seen, plain) or seen.shape[0] != shape[0] or seen.shape[-1] != shape[1]:
                raise Unclassified("unknown-mask", f"the input '{name}' reaches the mask, but {pattern} padding doesn't remove the padded keys")
            wanted = plain & real[:, None, None, :]
            valid = real[:, None, :, None] if plain.shape[-2] == shape[1] else torch.ones_like(wanted)
            if not bool(((seen == wanted) | ~valid).all()):
                raise Unclassified("unknown-mask", f"the input '{name}' changes the mask beyond removing padded keys ({pattern} padding)")
        findings.padding[name] = bool(probe.inverted.get(name))


def _check_packing(probe: Probe, sizes: Sizes, zero: Tensor, plain: Tensor) -> None:
    item = probe.program.input_with_role("positions")
    assert item is not None
    batch, length = sizes.shape(tensor_of(probe.program.placeholder(item.name)))
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).expand(batch, length)
    packed = _four_axes(probe.scores(sizes, zero, probe.leaf(sizes, positions=positions)) > MASKED)
    if not torch.equal(packed, plain):
        raise Unclassified("packed", "the mask separates packed sequences by position ids; capture with an attention_mask input, one document per row")
