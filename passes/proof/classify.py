"""Names what a candidate's scores do: the kind of mask, its window, scale, softcap, bias and padding.

First every pair of positions of some short sequences is looked at, which is enough to say why something is refused.
What looks canonical there must then be shown to stay so: by what ``positions.read`` says about the mask's ops, and
by looking at every place where such a mask can change (``probe.far``), or at all of a mask that is a finite table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from ..graph import symbols_in, tensor_of
from ..program import Program
from .evaluate import Evaluation, Opaque
from .forms import Reading, Unstable
from .match import Candidate
from .probe import HORIZON, MASKED, Observation, Probe, Response, View, allowed_keys, far, far_positions, near, observe

BASE_LENGTHS = (1, 2, 3, 7, 12, 33)
NAMED_LIMIT = 700  # constants up to here are probed past densely, to name chunks, strides and prefixes
BEND = 64  # a linear bias, and a mask beside one, may change its course up to here
TABLE_LIMIT = 4096  # longest mask table looked at as a whole


@dataclass
class Findings:
    """What probing a candidate found. ``kind`` is full, causal, sliding, or the name of what was seen instead.

    Where ``probed`` is empty, scores couldn't be looked at and only ``kind`` and ``reason`` say anything.
    """

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

    counted: bool = False  # ALiBi over the real tokens alone, added up in the padding mask
    linear: bool = False  # whether something that grows with positions is added to the scores
    alibi: bool = False  # whether an ALiBi bias was asked for as part of the canonical form

    @property
    def supported(self) -> bool:
        return self.kind in ("full", "causal", "sliding") and self.bias in self.biases

    @property
    def biases(self) -> tuple[str, ...]:
        """The biases that the canonical form can hold (ALiBi as one more feature of q and k, but not under a cap)."""
        return ("none", "row-constant", *(["alibi"] if self.alibi and not self.softcap else []))


def classify(program: Program, candidate: Candidate, alibi: bool = False) -> Findings:
    """Probes a candidate and names its kind, scale, softcap, bias and padding; never raises for a strange one."""
    probe = Probe(program, candidate)
    try:
        return _classify(probe, alibi)
    except Opaque as error:
        return Findings("data-dependent", f"the mask or bias depends on data: it {error}")
    except Unstable as error:
        return Findings(error.kind, error.reason)


def _classify(probe: Probe, alibi: bool) -> Findings:
    record = Evaluation()
    reading, problem = _read(probe)
    limit = min([probe.program.max_positions or HORIZON, HORIZON, *reading.tables])
    lengths = sorted({min(t, limit) for t in (*BASE_LENGTHS, *(c + d for c in small_constants(probe) for d in (0, 3)))})
    if probe.static:
        lengths = [int(probe.rows)]
    detect_polarity(probe, lengths[min(2, len(lengths) - 1)])
    response = find_response(probe, record, min(7, limit))
    findings = Findings("unknown", scale=response.scale, softcap=response.softcap, probed=list(lengths), alibi=alibi)
    findings.counted, findings.linear = reading.counted, reading.linear
    seen = [observe(probe, near(probe, probe.sizes(t, batch=1 if t > 64 else 2)), response, record) for t in lengths]
    _name(findings, seen, probe)
    findings.reads = sorted(record.inputs)
    if findings.reason:
        return findings
    if problem is not None:
        raise problem
    beyond = _beyond(probe, reading, _reach(reading, findings, limit))
    if beyond is not None:
        findings.probed.append(int(beyond.columns.max()) + 1)
        seen.append(observe(probe, beyond, response, record))
        _name(findings, seen, probe)
        if findings.reason:
            return findings
    find_padding(probe, findings, reading, lengths, beyond)
    return findings


def _read(probe: Probe) -> tuple[Reading, Unstable | None]:
    """How the slice is built, or why that can't be followed: what is seen at short lengths may name it better."""
    try:
        return probe.read(), None
    except Unstable as error:
        if error.kind not in ("unprovable", "length-dependent"):
            raise
        return Reading(), error


def _name(findings: Findings, seen: list[Observation], probe: Probe) -> None:
    """Fills in kind, window and bias, and the reason where they aren't canonical."""
    findings.kind, findings.window = mask_kind(seen, probe)
    findings.bias, findings.slopes = bias_kind(seen, findings.linear)
    if findings.kind not in ("full", "causal", "sliding"):
        findings.reason = f"the mask is {findings.kind}, not full, causal or sliding"
    elif findings.bias not in findings.biases:
        findings.reason = f"a position bias is added to the scores ({findings.bias})"
        if findings.bias == "alibi" and not findings.softcap:
            findings.reason += "; --alibi keeps it, exactly in softmax and as decays in gla"


def _reach(reading: Reading, findings: Findings, limit: int) -> int:
    """Up to where positions are looked at.

    A linear bias grows until rounding hides a step in it, and until it passes for a mask (``MASKED``): so it is looked
    at near 0, which is enough where everything bends near 0.
    """
    if not reading.linear:
        return limit
    steepest = max((abs(slope) for slope in findings.slopes or ()), default=0.0)
    reach = limit if reading.irregular else min(limit, 4 * BEND)
    bends = max((abs(offset) for _, offset in reading.lines), default=0)
    if bends > BEND or reach < min(limit, 4 * bends) or steepest * reach > -0.8 * MASKED:
        raise Unstable("unprovable", "the mask or its bias changes further away than a step in the bias can be seen")
    return reach


def _beyond(probe: Probe, reading: Reading, limit: int) -> View | None:
    """A view that, with the short ones, covers every position; None where the short ones do already."""
    if probe.static:
        return None
    if not reading.irregular:
        if not reading.lines and not probe.candidate.is_causal:
            return None  # nothing but padding, which is the same at every position
        return far(probe, reading, far_positions(probe, reading, limit))
    if limit <= TABLE_LIMIT:
        return near(probe, probe.sizes(limit, batch=1))
    raise Unstable(
        "unprovable", f"the mask goes through {reading.irregular}, so what it does past the probed lengths isn't known"
    )


def small_constants(probe: Probe) -> list[int]:
    """Whole numbers in the slice that a short sequence reaches past (chunk sizes, strides, prefixes, windows)."""
    found: set[int] = set()
    for node in probe.slice_nodes():
        for item in [*node.args, *node.kwargs.values()]:
            if (
                isinstance(item, (int, float))
                and math.isfinite(item)
                and 1 < abs(item) <= NAMED_LIMIT
                and float(item).is_integer()
            ):
                found.add(abs(int(item)))
    return sorted(found)[:6]


def detect_polarity(probe: Probe, length: int) -> None:
    """Finds mask inputs where 1 means "ignore" (torch.nn's key_padding_mask): with all ones nothing is allowed."""
    view = near(probe, probe.sizes(length))
    record = Evaluation()
    if bool((probe.scores(view, torch.zeros(probe.raw_shape(view.sizes)), record) > MASKED).any()):
        return
    for name in sorted(record.inputs):
        if probe.is_mask(probe.program.placeholder(name)):
            probe.inverted = {name: True}
            if bool(allowed_keys(probe, view).any()):
                return
    probe.inverted = {}
    raise Unstable("empty", "the mask allows nothing at all")


def find_response(probe: Probe, record: Evaluation, length: int) -> Response:
    """Scale and softcap: how the chain answers random scores, and scores of every size up to 1e30."""
    view = near(probe, probe.sizes(length))
    shape = probe.raw_shape(view.sizes)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 3
    base = probe.scores(view, torch.zeros(shape), record)
    allowed = base > MASKED
    difference = probe.scores(view, x) - base
    if difference.numel() != x.numel() or difference.shape[-2:] != x.shape[-2:]:
        raise Unstable("unknown-scores", "the scores change shape between q·k and softmax")
    values, inputs = difference[allowed], x.reshape(difference.shape)[allowed]
    plain = Response((values / inputs).median().item(), 0.0)
    bent: float | None = None
    if torch.allclose(values, plain(inputs), rtol=1e-4, atol=1e-5):
        if plain.scale <= 0:
            raise Unstable("negative-scale", f"the scores are scaled by {plain.scale:g}, which isn't positive")
        bent = _bend(probe, view, base, plain)
        if bent is None:
            return plain
    # A softcap far above the scores is a scale as far as random scores can tell.
    large = (probe.scores(view, torch.full(shape, 1e20)) - base)[allowed]
    cap = large.median().item()
    if cap > 0 and torch.allclose(large, torch.full_like(large, cap), rtol=1e-3):
        inner = torch.atanh((values.double() / cap).clamp(-1 + 1e-12, 1 - 1e-12)) * cap
        capped = Response((inner / inputs).median().item(), cap)
        spread = (
            torch.linspace(-4 * cap / capped.scale, 4 * cap / capped.scale, x.numel()).reshape(shape)
            if capped.scale > 0
            else x
        )
        answer = (probe.scores(view, spread) - base)[allowed]
        same = torch.allclose(
            answer, capped(spread.reshape(difference.shape)[allowed]), rtol=1e-4, atol=1e-4 * max(1.0, cap * 1e-2)
        )
        same = same and torch.allclose(capped(inputs), values, rtol=1e-4, atol=1e-5)
        if capped.scale > 0 and same and _bend(probe, view, base, capped) is None:
            return capped
    raise Unstable(
        "unknown-scores",
        "the scores are changed by something other than a scale, a softcap, a mask or a bias"
        + ("" if bent is None else f" where q·k is near {bent:g}"),
    )


def _bend(probe: Probe, view: View, base: Tensor, response: Response) -> float | None:
    """The first of many sizes of scores at which the chain doesn't answer as ``response``; None where there is none."""
    shape, allowed = probe.raw_shape(view.sizes), base > MASKED
    for size in (1e-3, -1e-3, 30.0, -30.0, 1e3, -1e3, 1e5, -1e5, 1e9, -1e9, 1e30, -1e30):
        answer = (probe.scores(view, torch.full(shape, size)) - base)[allowed]
        wanted = response(torch.full_like(answer, size))
        if not torch.allclose(answer, wanted, rtol=1e-3, atol=1e-4 * max(1.0, response.softcap * 1e-2)):
            return size
    return None


def expected_mask(kind: str, window: int | None, rows: Tensor, columns: Tensor) -> Tensor:
    """What a canonical mask allows between query positions ``rows`` and key positions ``columns``."""
    distance = rows[:, None] - columns[None, :]
    if kind == "full":
        return torch.ones_like(distance, dtype=torch.bool)
    if kind == "causal":
        return distance >= 0
    assert kind == "sliding" and window is not None
    return (distance >= 0) & (distance < window)


def mask_kind(observations: list[Observation], probe: Probe) -> tuple[str, int | None]:
    """The kind that explains *every* observation exactly, else a name for what was seen."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for item in observations:
        first = item.allowed[0, 0]
        if not bool((item.allowed == first).all()):
            batches = bool((item.allowed == item.allowed[:1]).all())
            return ("per-head" if batches else "per-batch"), None
        seen.append((first, item.rows, item.columns))
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
    cut = bool((distance >= width).any()) and bool((distance <= -width).any())
    if cut and torch.equal(allowed, distance.abs() < width):
        return f"bidirectional-window-{width}"
    causal = distance >= 0
    for size in range(2, min(int(rows.max()), NAMED_LIMIT) + 1):
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


def bias_kind(observations: list[Observation], linear: bool = False) -> tuple[str, tuple[float, ...] | None]:
    """none, row-constant (softmax doesn't see it), alibi (with slopes per head), toeplitz or arbitrary.

    Where the bias grows with positions (``linear``), what is small at short lengths isn't small: then only 0 is none.
    """
    kinds = [_bias_of(item, 0.0 if linear else 1e-6) for item in observations]
    order = ("none", "row-constant", "alibi", "toeplitz", "arbitrary")
    worst = max(kinds, key=lambda item: order.index(item[0]))
    if worst[0] == "alibi":
        slopes = sorted((s for k, s in kinds if k == "alibi" and s is not None), key=len)
        fewest = slopes[0]  # batch and heads in one axis: every row of the batch repeats them
        for more in slopes:
            repeated = torch.tensor(fewest).repeat(len(more) // len(fewest))
            if len(more) % len(fewest) or not torch.allclose(torch.tensor(more), repeated, rtol=1e-3, atol=1e-6):
                return "arbitrary", None
        return "alibi", fewest
    return worst


def _bias_of(item: Observation, tolerance: float) -> tuple[str, tuple[float, ...] | None]:
    allowed, bias = item.allowed.expand_as(item.bias), item.bias
    if not bool(allowed.any()) or not bool(bias[allowed].abs().max() > tolerance):
        return "none", None
    batch, heads, rows, columns = bias.shape
    first = allowed.float().argmax(-1, keepdim=True)
    relative = torch.where(allowed, bias - bias.gather(-1, first), torch.zeros(()))
    if relative.abs().max() <= 10 * tolerance:
        return "row-constant", None
    columns_at = item.columns.to(bias.dtype)
    offset = columns_at[None, None, None, :] - columns_at[first]
    usable = allowed & (offset > 0)
    slopes = []
    for head in range(heads):
        ratio = (relative[:, head] / offset.expand_as(relative)[:, head].clamp(min=1))[usable[:, head]]
        slopes.append(ratio.median().item() if ratio.numel() else 0.0)
    line = torch.tensor(slopes)[None, :, None, None] * offset
    straight = (line - relative).abs() <= 1e-5 + 1e-6 * line.abs()
    if bool((straight | ~usable).all()):
        return "alibi", tuple(float(f"{s:.8g}") for s in slopes)
    by_distance = all(
        _constant(torch.diagonal(bias[b, h], o)[torch.diagonal(allowed[b, h], o)])
        for b in range(batch)
        for h in range(heads)
        for o in range(1 - rows, columns)
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


def find_padding(probe: Probe, findings: Findings, reading: Reading, lengths: list[int], beyond: View | None) -> None:
    """Finds which mask inputs remove padded keys, near and far, and refuses masks that do anything else with them."""
    sizes = probe.sizes(next((t for t in lengths if t >= 7), lengths[-1]))
    for name in findings.reads:
        node = probe.program.placeholder(name)
        _check_padding(probe, node, near(probe, sizes), lambda masks: near(probe, sizes, masks))
        if beyond is not None and beyond.env:
            rows = beyond.rows if symbols_in(probe.rows) else beyond.columns
            _check_padding(
                probe, node, far(probe, reading, rows), lambda masks, rows=rows: far(probe, reading, rows, masks)
            )
        findings.padding[name] = bool(probe.inverted.get(name))


def _by_batch(allowed: Tensor, batch: int) -> Tensor:
    """``[1, B·H, T, S]`` of scores that fuse batch and heads, as ``[B, H, T, S]`` (heads first shows in the proof)."""
    fused = allowed.shape[0] == 1 and batch > 1 and allowed.shape[1] % batch == 0
    return torch.unflatten(allowed, 1, (batch, -1))[0] if fused else allowed


def _check_padding(probe: Probe, node: Node, plain_view: View, masked_view: object) -> None:
    assert callable(masked_view)
    shape = plain_view.sizes.shape(tensor_of(node))
    plain = _by_batch(allowed_keys(probe, plain_view), shape[0])
    for pattern, real in padding_patterns(*shape).items():
        value = ~real if probe.inverted.get(node.name) else real
        seen = _by_batch(allowed_keys(probe, masked_view({node.name: value}), real), shape[0])
        if torch.equal(seen, plain) or seen.shape[0] != shape[0] or seen.shape[-1] != shape[1]:
            raise Unstable(
                "unknown-mask",
                f"the input '{node.name}' reaches the attention, but {pattern} padding doesn't remove the padded keys",
            )
        wanted = plain & real[:, None, None, :]
        valid = real[:, None, :, None] if plain.shape[-2] == shape[1] else torch.ones_like(wanted)
        if not bool(((seen == wanted) | ~valid).all()):
            raise Unstable(
                "unknown-mask",
                f"the input '{node.name}' changes the mask beyond removing padded keys ({pattern} padding)",
            )
        # Whoever sees their like alone, and not the real tokens, isn't padding but another sequence.
        unreal = ~valid & wanted.any(-1, keepdim=True) & ~(seen & real[:, None, None, :]).any(-1, keepdim=True)
        if plain.shape[-2] == shape[1] and bool((seen & unreal & ~real[:, None, None, :]).any()):
            values = "values" if tensor_of(node).dtype == torch.bool else "numbers"
            raise Unstable(
                "packed",
                f"the {values} in '{node.name}' separate packed sequences; the canonical mask only knows padding",
            )
    if (
        not tensor_of(node).dtype.is_floating_point
        and tensor_of(node).dtype != torch.bool
        and not probe.inverted.get(node.name)
    ):
        segments = torch.ones(shape, dtype=torch.int64)
        segments[:, shape[1] // 2 :] = 2
        view = masked_view({node.name: segments})
        seen = _by_batch(allowed_keys(probe, view), shape[0])
        drowned = bool((probe.scores(view, torch.zeros(probe.raw_shape(view.sizes))) > -MASKED).any())
        if torch.equal(seen, plain) or drowned:
            return  # (1 − mask)·min lifts a 2 above every score: such a mask has no meaning but for 0 and 1
        together = segments[:, None, :, None] == segments[:, None, None, :]
        if plain.shape[-2] == shape[1] and torch.equal(seen, plain & together):
            raise Unstable(
                "packed",
                f"the numbers in '{node.name}' separate packed sequences; the canonical mask only knows padding",
            )
        raise Unstable(
            "unknown-mask", f"numbers other than 0 and 1 in '{node.name}' change the mask; a bool input has none"
        )
