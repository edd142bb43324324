"""What is known about the nodes of a score chain: how their values depend on positions."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

MAX_VALUES = 64  # distinct numbers of a constant tensor (per-head windows, say) that are told apart


class Unstable(Exception):
    """The scores depend on more than q·k, positions and padding; carries (kind, reason)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


# Positions enter as ``Σ slope · index along axis + offset``; axes count from the right (-1 = keys, -2 = queries).
Slopes = tuple[tuple[int, int], ...]
Line = tuple[Slopes, float]  # where ``Σ slope · index + offset`` changes sign


@dataclass(frozen=True)
class Form:
    """What is known about one node of the slice.

    ``slopes`` and ``offsets``: it is affine in its indices (several offsets: a constant tensor of several values).
    Otherwise its values only change across ``lines``, or, where ``linear`` names a node, are linear in positions
    between them and vary with them ``along`` some axes (ALiBi). ``relative``: those positions aren't counted from the
    first key of the row, so that nothing but a bias may be made of them: (kind, reason) of the refusal otherwise.
    ``irregular`` names the node after which even that is unknown.
    """

    slopes: Slopes = ()
    offsets: tuple[float, ...] | None = None
    lines: frozenset[Line] = frozenset()
    irregular: str = ""
    linear: str = ""
    along: frozenset[int] = frozenset()
    relative: tuple[str, str] | None = None
    from_scores: bool = False
    padding: bool = False

    @property
    def affine(self) -> bool:
        """Whether it is a position along some axis (a plain constant isn't)."""
        return self.offsets is not None and bool(self.slopes)

    @property
    def positional(self) -> bool:
        """Whether it depends on positions in any way."""
        return self.affine or bool(self.linear or self.lines or self.irregular)

    @property
    def axes(self) -> frozenset[int]:
        """The axes along which it grows with positions."""
        return self.along | {axis for axis, _ in self.slopes}

    @property
    def constant(self) -> bool:
        return self.offsets is not None and not self.slopes


@dataclass
class Reading:
    """What the slice of one candidate is made of.

    ``sources``: nodes that hold positions themselves (``arange`` and the like), by which a probe places positions.
    ``tables``: lengths of the buffers it slices; no position beyond the shortest exists. ``linear``: between its
    lines it grows linearly with positions, as ALiBi does, instead of being constant; ``counted``: with those of the
    real tokens alone, added up in the padding mask.
    """

    lines: set[Line] = field(default_factory=set)
    irregular: str = ""
    linear: bool = False
    counted: bool = False
    sources: dict[Node, Form] = field(default_factory=dict)
    triangles: list[Node] = field(default_factory=list)
    lookups: list[Node] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)

    @property
    def positional(self) -> bool:
        return bool(self.lines) or bool(self.irregular)


def sum_of(left: Form, right: Form, sign: int) -> Form:
    """``left + sign · right`` of affine or constant forms."""
    assert left.offsets is not None and right.offsets is not None
    slopes = dict(left.slopes)
    for axis, slope in right.slopes:
        slopes[axis] = slopes.get(axis, 0) + sign * slope
    kept = tuple(sorted((axis, slope) for axis, slope in slopes.items() if slope))
    offsets = {a + sign * b for a in left.offsets for b in right.offsets}
    if len(offsets) > MAX_VALUES or (kept and any(not float(o).is_integer() for o in offsets)):
        return Form(irregular="sums of many constants") if kept else Form()
    return Form(kept, tuple(sorted(offsets)))


def several(values: set[float]) -> Form:
    """A constant tensor of these values, told apart where they are few."""
    return Form(offsets=tuple(sorted(values))) if len(values) <= MAX_VALUES else Form()


def lines_of(form: Form) -> frozenset[Line]:
    """Where an affine form changes sign."""
    assert form.offsets is not None
    return frozenset((form.slopes, offset) for offset in form.offsets) if form.slopes else frozenset()


def crossing(form: Form) -> Form:
    """A comparison of ``form`` with 0: its lines, or why they aren't known."""
    return form if form.offsets is None else Form(lines=lines_of(form))
