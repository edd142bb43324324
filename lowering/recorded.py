"""Steps of a session as CUDA graphs: recorded once, and then launched as one.

A step is hundreds of kernels, for one token of a few microseconds each, and Python can't launch them that fast:
decoding would take as long as the launching does, and so would the chunks of a small model's prompt. What is recorded
is compared with the step itself before it is used; where they differ, or nothing can be recorded, steps run as they
are, and a warning says so once.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.stateful import StepProgram
from . import room
from .room import STATES_AT, Room

Run = Callable[[list[Tensor]], list[Tensor]]
Record = Callable[[Run, list[Tensor], Any], tuple[Callable[[], None], list[Tensor]]]

OFTEN = 3  # times that a step of the same shapes has been seen when it is recorded
MOST = 8  # recordings at a time: the least recently used goes
KNOWN = 64  # shapes that are counted at a time
# The same kernels on the same numbers: only sums in another order may differ.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def recordable(program: StepProgram, device: torch.device) -> bool:
    """Whether a program's steps may be recorded: on a GPU, with states."""
    return device.type == "cuda" and bool(program.states)


_CAPTURING = threading.Lock()  # torch records one graph at a time in a process


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream that everything is recorded on: recordings that share a pool must share it, too."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def cuda_graph(run: Run, inputs: list[Tensor], pool: Any) -> tuple[Callable[[], None], list[Tensor]]:
    """Records ``run(inputs)``; returns what launches it again, on what ``inputs`` hold then, and where it writes."""
    device = inputs[0].device
    with _CAPTURING, torch.cuda.device(device):
        before, side = torch.cuda.current_stream(device), _side(device)
        side.wait_stream(before)
        with torch.cuda.stream(side):
            run(inputs)  # libraries make their workspaces
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                outputs = run(inputs)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind

    def launch() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return launch, outputs


Group = tuple[list[Tensor], list[int], bool]  # tensors of one type, their places in a step's list, whether they grow


@dataclass
class Recording:
    """A recorded step: what it reads and writes, by type, and what launches it.

    ``bytes``: of its growing states, of which ``clean`` tokens on the left are zeros.
    """

    taken: list[Group]
    launch: Callable[[], None]
    outputs: list[Tensor]
    given: list[Group]
    bytes: int
    clean: int = 0


class Recorded:
    """A step by recordings: ``run([tokens, positions, mask, *states]) -> [logits, *states]``.

    A step that gives one token's logits and leaves its states' shapes as they are is recorded when it has come
    ``OFTEN`` times. (Logits of a whole chunk would stay in memory as long as its recording.) Inputs are copied into a
    recording's own, and what it writes is copied out of it, so nothing that a caller holds changes later. One call at a
    time: others wait.

    Args:
        run: does the same for all inputs of the same shapes, without asking the GPU for a value.
        growing: the inputs that get a column with every token; masked zeros on their left change nothing.
        places: says where the weights lie. A recording reads them where they lay when it was made: in-place changes
            reach it, and where they have moved since, all recordings go.
        record: what takes the place of ``cuda_graph``.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        places: Callable[[], list[int]] = list,
        record: Record | None = None,
        growing: Room | None = None,
    ) -> None:
        self.growing = growing or Room({})
        self.run, self.device, self.places, self.record = run, device, places, record or cuda_graph
        self.lay: list[int] = []
        self.seen: dict[Any, int] = {}
        self.recordings: OrderedDict[Any, Recording] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.done: torch.cuda.Event | None = None
        self.lock = threading.Lock()
        self.off = False

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = [value.to(self.device) for value in inputs]
        if self.off or self._elsewhere():
            return self.run(given)
        with self.lock:
            return self._step(given)

    def _step(self, given: list[Tensor]) -> list[Tensor]:
        if (places := self.places()) != self.lay:
            self.lay = places
            self.seen.clear()
            self.recordings.clear()
        past, unused, shapes = 0, 0, [value.shape for value in given]
        if self.growing:
            if (tokens := self.growing.tokens(given)) is None:
                return self.run(given)
            past, wide = tokens, room.wide(tokens)
            unused, shapes = wide - past, self.growing.shapes(given, wide)
        key = tuple((shape, value.dtype) for shape, value in zip(shapes, given, strict=True))
        if key in self.recordings:
            self.recordings.move_to_end(key)
            return self._replay(self.recordings[key], given, unused)
        outputs = self.run(given)
        after = self.growing.shapes(given, past + 1)[STATES_AT:]
        if [value.shape for value in outputs[1:]] == after and outputs[0].shape[1] == 1:
            if len(self.seen) >= KNOWN:
                self.seen.clear()
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] == OFTEN:
                self._try(key, given, outputs, unused)
        return outputs

    def _elsewhere(self) -> bool:
        """Whether this call is part of something that a recording can't be."""
        if torch.is_autocast_enabled(self.device.type) or torch.compiler.is_compiling():
            return True
        if self.device.type != "cuda":
            return False
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def _take(self, recording: Recording, given: list[Tensor], unused: int) -> None:
        """Copies inputs into a recording's own, behind so many ``unused`` tokens, of which nothing earlier stays."""
        for mine, places, grow in recording.taken:
            if grow:
                if unused > recording.clean:
                    torch._foreach_zero_(self.growing.parts(mine, places, recording.clean, unused))
                mine = self.growing.parts(mine, places, unused)
            torch._foreach_copy_(mine, [given[place] for place in places])
        recording.clean = unused

    def _give(self, given: list[Group], unused: int) -> list[Tensor]:
        """Copies of what a step has written, without its unused tokens."""
        results: dict[int, Tensor] = {}
        for values, places, grow in given:
            if grow:
                values = self.growing.parts(values, [place - 1 + STATES_AT for place in places], unused)
            results |= zip(places, _copies(values), strict=True)
        return [results[place] for place in range(len(results))]

    def _replay(self, recording: Recording, given: list[Tensor], unused: int) -> list[Tensor]:
        if self.done is not None:  # another stream may still be copying from the last call
            torch.cuda.current_stream(self.device).wait_event(self.done)
        self._take(recording, given, unused)
        recording.launch()
        results = self._give(recording.given, unused)
        if self.device.type == "cuda":
            self.done = torch.cuda.current_stream(self.device).record_event()
        return results

    def _try(self, key: Any, given: list[Tensor], wanted: list[Tensor], unused: int) -> None:
        size = sum(math.prod(key[place][0]) * key[place][1].itemsize for place in self.growing.axes)
        if self.device.type == "cuda" and 4 * size > torch.cuda.mem_get_info(self.device)[0]:
            return  # what fails for want of memory while it is recorded may leave the allocator broken
        try:
            with torch.inference_mode(False), torch.no_grad():
                inputs = [value.new_zeros(shape) for value, (shape, _) in zip(given, key, strict=True)]
                recording = Recording(_groups(inputs, set(self.growing.axes)), lambda: None, [], [], size)
                problem = self._record(recording, inputs, given, wanted, unused)
        except torch.OutOfMemoryError:
            return
        except RuntimeError as error:
            problem = f"couldn't be recorded ({' '.join(str(error).split())[:200]})"
        if problem:
            self._give_up(problem)
            return
        self.recordings[key] = recording
        while len(self.recordings) > MOST or (len(self.recordings) > 1 and self._bytes() > room.LARGEST):
            if self.done is not None:
                self.done.synchronize()
            gone, _ = self.recordings.popitem(last=False)
            self.seen.pop(gone, None)

    def _record(
        self, recording: Recording, inputs: list[Tensor], given: list[Tensor], wanted: list[Tensor], unused: int
    ) -> str:
        """Fills in a recording that reads ``inputs``; returns why it isn't to be used ("" = it is)."""
        grown = {place - STATES_AT + 1 for place in self.growing.axes}
        self._take(recording, given, unused)
        if self.growing:  # a wider step sums in another order; a recording of it sums as it does
            roomy = self._give(_groups(self.run(inputs), grown), unused)
            loose = 2 * max(_TOLERANCE.get(value.dtype, 0.0) for value in (*given, *wanted))
            if not all(_same(one, other, loose) for one, other in zip(wanted, roomy, strict=True)):
                return "gave something else with room for more tokens"
            wanted = roomy
        recording.launch, recording.outputs = self.record(self.run, inputs, self.pool)
        recording.given = _groups(recording.outputs, grown)
        for value in recording.outputs:  # so that it is the launch that gives what is compared
            value.fill_(torch.nan if value.is_floating_point() else 0)
        found = self._replay(recording, given, unused)
        return "" if all(map(_same, wanted, found)) else "gave something else when recorded"

    def _bytes(self) -> int:
        return sum(recording.bytes for recording in self.recordings.values())

    def _give_up(self, why: str) -> None:
        self.off = True
        self.recordings.clear()
        warnings.warn(f"lincompile: steps run one kernel after the other, and slower: they {why}", stacklevel=7)


def _groups(values: list[Tensor], growing: set[int]) -> list[Group]:
    """A model has dozens of states; a kernel, or only a call, for each would take as long as the step."""
    kinds = [(value.dtype, place in growing) for place, value in enumerate(values)]
    found = []
    for kind in dict.fromkeys(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        found.append(([values[place] for place in places], places, kind[1]))
    return found


def _copies(values: list[Tensor]) -> Sequence[Tensor]:
    """Copies of tensors of one type, made by one call: a product with 1 changes no bit of a float."""
    if values[0].is_floating_point():
        return torch._foreach_mul(values, 1.0)
    return [value.clone() for value in values]


def places_of(module: nn.Module) -> Callable[[], list[int]]:
    """What says where a module's parameters and buffers lie; for every step, so without walking over its modules."""
    tables = [
        (table, name)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, value in table.items()
        if value is not None
    ]

    def places() -> list[int]:
        try:
            return list(map(Tensor.data_ptr, [table[name] for table, name in tables]))  # type: ignore[arg-type]
        except (KeyError, TypeError):  # one is gone
            return [value.data_ptr() for table, name in tables if (value := table.get(name)) is not None]

    return places


def _same(wanted: Tensor, found: Tensor, tolerance: float | None = None) -> bool:
    """Whether a recorded output is the plain one, up to rounding (None: that of its own type)."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    finite = wanted.isfinite()
    a, b = wanted[finite].double(), found[finite].double()
    if not torch.equal(wanted[~finite].nan_to_num(7.0), found[~finite].nan_to_num(7.0)) or not bool(b.isfinite().all()):
        return False
    allowed = _TOLERANCE.get(wanted.dtype, 1e-6) if tolerance is None else tolerance
    return float((a - b).norm()) <= allowed * float(a.norm()) + 1e-12
