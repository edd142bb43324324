"""What a file says about itself beside its graph: its states and limits, stored in its metadata.

A session reads this with onnxruntime alone: the packages that write files take 30 MB to import.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ...passes.errors import LincompileError

if TYPE_CHECKING:
    import onnx_ir as ir

METADATA_KEY = "lincompile"
LOGITS_FROM = "logits_from"


@dataclass(frozen=True)
class BoundState:
    """One state of the file. ``shape`` leaves out the batch axis; None is an axis that grows with time."""

    past: str
    present: str
    site: str
    role: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """What a runtime must know beyond the graph; stored in the file's metadata.

    Attributes:
        states: in the order of the file's inputs.
        vocabulary: number of token ids (the size of an encoder's output).
        causal: False for an encoder: no states, each call is a whole sequence.
        max_positions: longest sequence, None if unbounded.
        uniform_positions: all rows of a batch must be at the same position.
        windows: tokens that a sliding site's cache may be trimmed to, by site.
    """

    states: list[BoundState]
    vocabulary: int
    causal: bool = True
    max_positions: int | None = None
    uniform_positions: bool = False
    windows: dict[str, int] = field(default_factory=dict)

    def store(self, model: ir.Model) -> None:
        """Write it into the model's metadata."""
        model.metadata_props[METADATA_KEY] = json.dumps(asdict(self))

    @staticmethod
    def read(metadata: dict[str, str]) -> Signature:
        """What :meth:`store` wrote.

        Raises:
            LincompileError: the file wasn't written by this exporter.
        """
        if METADATA_KEY not in metadata:
            raise LincompileError(f"it has no '{METADATA_KEY}' metadata: it wasn't exported by lincompile")
        record = json.loads(metadata[METADATA_KEY])
        record["states"] = [BoundState(**{**item, "shape": tuple(item["shape"])}) for item in record["states"]]
        return Signature(**record)
