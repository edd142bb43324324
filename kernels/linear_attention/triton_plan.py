"""What the linear-attention kernels need to know about one problem: block sizes, segments, tiles and tables.

Tiles come from a rule, not from autotuning: one configuration per kernel, head size and kind of chip.
``OVERRIDES["states"] = {"num_warps": 8}`` changes what the rule gives a kernel, for measurements.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..triton_device import processors, shared_memory
from .triton_blocks import INTERPRETED

CHUNK = 64
LEVELS = CHUNK.bit_length() - 1
SLICE = 64
MIN_SEGMENT_CHUNKS = 2
# Bytes of shared memory per block of threads that 128 columns take (A100 has 163 KiB, consumer chips 99, Hopper 227).
ROOMY = 200 * 1024
OVERRIDES: dict[str, dict[str, int]] = {}

Options = dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """Sequences of their own lengths side by side in one row: which rows chunks and which chunks segments take.

    ``table [chunks, 2]``: first row, and the row after the sequence's last. ``runs [segments + sequences, 2]``: first
    chunk and number of chunks of each segment, then first segment and number of segments of each sequence.
    """

    table: Tensor
    runs: Tensor
    chunks: int
    segments: int
    sequences: int

    @property
    def whole(self) -> bool:
        """Every sequence is one segment."""
        return self.segments == self.sequences


@functools.lru_cache(maxsize=64)
def pack(lengths: tuple[int, ...], per_segment: int, device: torch.device) -> Packed:
    """Tables for sequences of these lengths; an empty one is a segment without chunks."""
    rows: list[tuple[int, int]] = []
    segments: list[tuple[int, int]] = []
    sequences: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        first, count = len(rows), -(-length // CHUNK)
        rows += [(start + i * CHUNK, start + length) for i in range(count)]
        own = [(first + i, min(per_segment, count - i)) for i in range(0, count, per_segment)] or [(first, 0)]
        sequences.append((len(segments), len(own)))
        segments += own
        start += length
    table = torch.tensor(rows or [(0, 0)], dtype=torch.int32, device=device)
    runs = torch.tensor(segments + sequences, dtype=torch.int32, device=device)
    return Packed(table, runs, len(rows), len(segments), len(sequences))


@dataclass(frozen=True)
class Plan:
    """One problem: q, k, v, log_decay as the kernels take them; ``lengths`` where sequences lie side by side."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]
    scale: float
    normalize: bool
    lengths: tuple[int, ...] | None = None

    @property
    def problems(self) -> int:
        return self.tensors[1].shape[0] * self.tensors[1].shape[1]

    @property
    def group(self) -> int:
        return self.tensors[0].shape[1] // self.tensors[1].shape[1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, D, Dv."""
        k, v = self.tensors[1], self.tensors[2]
        return k.shape[2], k.shape[3], v.shape[3]

    @property
    def blocks(self) -> tuple[int, int]:
        return padded(self.sizes[1]), padded(self.sizes[2])

    @property
    def slice(self) -> int:
        """Key channels of one program of the kernels that cut them."""
        return min(self.blocks[0], SLICE)

    @property
    def chunks(self) -> int:
        if self.lengths is not None:
            return sum(-(-length // CHUNK) for length in self.lengths)
        return -(-self.sizes[0] // CHUNK)

    @property
    def segment_chunks(self) -> int:
        """Chunks per segment: enough segments for about two waves of programs, none shorter than 2 chunks."""
        wanted = max(1, 2 * processors(self.tensors[0].device) // self.problems)
        return max(min(MIN_SEGMENT_CHUNKS, self.chunks), -(-self.chunks // wanted), 1)

    @property
    def packed(self) -> Packed | None:
        if self.lengths is None:
            return None
        return pack(self.lengths, self.segment_chunks, self.tensors[0].device)

    @property
    def segments(self) -> int:
        packed = self.packed
        return -(-self.chunks // self.segment_chunks) if packed is None else packed.segments

    @property
    def sequences(self) -> int:
        return 1 if self.lengths is None else len(self.lengths)

    @property
    def chained(self) -> bool:
        """Whether a segment's start comes from segments before it."""
        return self.segments > self.sequences

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        packed = self.packed
        return (None, None) if packed is None else (packed.table, packed.runs)

    @property
    def precision(self) -> str:
        return "ieee" if self.tensors[0].dtype == torch.bfloat16 else "tf32x3"

    def options(self) -> Options:
        g = self.tensors[3]
        return {
            "GROUP": self.group,
            "DECAY": g is not None,
            "PER_KEY": g is not None and g.shape[-1] > 1,
            "NORMALIZE": self.normalize,
            "VARLEN": self.lengths is not None,
            "BT": CHUNK,
            "LEVELS": LEVELS,
            "BK": self.blocks[0],
            "BV": self.blocks[1],
            "PRECISION": self.precision,
        }

    def tuning(self, kernel: str, wide: bool) -> Options:
        """Warps, pipelining depth and tile of a kernel."""
        chosen = tiles(kernel, self.blocks, self.group, self.precision == "ieee", wide, roomy(self.tensors[0].device))
        chosen |= OVERRIDES.get(kernel, {})
        return chosen | {"SLICE": min(chosen["SLICE"], self.blocks[0])} if "SLICE" in chosen else chosen

    def state(self, *leading: int) -> Tensor:
        columns = self.sizes[2] + int(self.normalize)
        shape = (self.problems, *leading, self.sizes[1], columns)
        return torch.empty(shape, dtype=torch.float32, device=self.tensors[0].device)


def tiles(kernel: str, blocks: tuple[int, int], group: int, narrow: bool, wide: bool, room: bool) -> Options:
    """The rule. ``narrow``: bfloat16; ``wide``: the kernel's form for strong decays; ``room``: a chip like Hopper."""
    deep = 2 if group == 1 and narrow and room else 1
    # Halving a chunk takes many registers, and few heads decay so strongly: their programs have the chip to themselves.
    warps = 8 if wide and narrow else 4
    if kernel == "states":
        return {"num_warps": 4, "STAGES": 3 if deep > 1 else 1, "SLICE": min(blocks[0], SLICE)}
    if kernel == "output":
        # Scores are computed for every block of value columns: cheap where one product gives them.
        columns = blocks[1] if wide else SLICE
        return {"num_warps": warps, "STAGES": 1, "BV": min(blocks[1], columns)}
    if kernel == "values":
        return {"num_warps": warps, "STAGES": deep, "SLICE": min(blocks[0], SLICE)}
    if kernel == "keys":
        return {"num_warps": warps, "SLICE": min(blocks[0], SLICE)}
    assert kernel == "normaliser", kernel
    return {"num_warps": warps}


def roomy(device: torch.device) -> bool:
    """Whether blocks of 128 columns fit the chip's shared memory."""
    return shared_memory(device) >= ROOMY


def padded(size: int) -> int:
    """Block width: see ``triton.py`` for why none is narrower than 64."""
    return max(16 if INTERPRETED.value else 64, 1 << (size - 1).bit_length())


def block_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Head sizes that the kernels run at in these dtypes: float32 tiles take twice the shared memory."""
    if INTERPRETED.value:
        return (16, 32, 64)
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    return (64, 128) if narrow and roomy(q.device) else (64,)


def key_pieces(width: int, widths: tuple[int, ...]) -> list[slice]:
    """Keys cut into blocks, the widest first; a rest that is no block's width stays what it is."""
    return [slice(start, min(start + widths[-1], width)) for start in range(0, width, widths[-1])]


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these heads as they are: values one block wide, keys in pieces each a block wide."""
    widths = block_widths(q, k, v)
    pieces = key_pieces(k.shape[3], widths)
    return v.shape[3] in widths and all(piece.stop - piece.start in widths for piece in pieces)


def unit_columns(x: Tensor) -> Tensor:
    """``x``, copied where its last axis isn't contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of the first three axes; 0 where there is no tensor."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    normalize: bool,
    lengths: tuple[int, ...] | None = None,
) -> Plan:
    """The problem in the kernels' dtype: bfloat16 where q, k and v are, float32 otherwise."""
    narrow = all(x.dtype == torch.bfloat16 for x in (q, k, v)) and not INTERPRETED.value
    dtype = torch.bfloat16 if narrow else torch.float32
    q, k, v = (unit_columns(x.to(dtype)) for x in (q, k, v))
    return Plan((q, k, v, None if log_decay is None else unit_columns(log_decay)), scale, normalize, lengths)


def in_pieces(plan: Plan) -> list[tuple[slice, Plan]]:
    """One plan for each piece of the keys (views; nothing is copied)."""
    q, k, v, g = plan.tensors
    plans = []
    for keys in key_pieces(k.shape[3], block_widths(q, k, v)):
        gates = g if g is None or g.shape[-1] == 1 else g[..., keys]
        part = (q[..., keys], k[..., keys], v, gates)
        plans.append((keys, Plan(part, plan.scale, plan.normalize, plan.lengths)))
    return plans
