"""Steps of a session as CUDA graphs: recorded once, and then launched as one.

A step is hundreds of kernels, for one token of a few microseconds each, and Python can't launch them that fast:
decoding would take as long as the launching does, and so would the chunks of a small model's prompt. What is recorded
is compared with the step itself before it is used; where they differ, or nothing can be recorded, steps run as they
are, and a warning says so once.

Keys and values of full softmax attention grow with every token. They are recorded with room on their left, as padding
on the left of a prompt is (zeros, which the mask of keys hides), so that one recording serves some hundred tokens.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.stateful import GROWING_AXIS, StepProgram

Run = Callable[[list[Tensor]], list[Tensor]]
Record = Callable[[Run, list[Tensor], Any], tuple[Callable[[], None], list[Tensor]]]

OFTEN = 3  # times that a step of the same shapes has been seen when it is recorded
MOST = 8  # recordings at a time: the least recently used goes
KNOWN = 64  # shapes that are counted at a time
LEAST_ROOM = 256  # tokens by which the room for growing states grows, at least
LARGEST = 1 << 30  # bytes of growing states, of a step to be recorded and of all recordings: each is there thrice
STATES_AT = 3  # in a step's inputs; in its outputs they come after the logits
# The same kernels on the same numbers: only sums in another order may differ.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def recordable(program: StepProgram, device: torch.device) -> bool:
    """Whether a program's steps may be recorded: on a GPU, with states."""
    return device.type == "cuda" and bool(program.states)


def growing(program: StepProgram) -> dict[int, int]:
    """Which of a step's inputs grow with every token, and along which axis: those of full softmax attention."""
    return {
        STATES_AT + index: GROWING_AXIS[spec.role]
        for index, spec in enumerate(program.states)
        if None in spec.shape and program.limit(spec) is None
    }


def room(tokens: int) -> int:
    """Cached tokens that a recording has room for where there are so many: a quarter more at most, but for few.

    With the token that comes they are a multiple of ``LEAST_ROOM``, which kernels like better.
    """
    unit = max(LEAST_ROOM, 1 << max(0, tokens.bit_length() - 3))
    return -(-(tokens + 1) // unit) * unit - 1


def cuda_graph(run: Run, inputs: list[Tensor], pool: Any) -> tuple[Callable[[], None], list[Tensor]]:
    """Records ``run(inputs)``; returns what launches it again, on what ``inputs`` hold then, and where it writes."""
    device = inputs[0].device
    with torch.cuda.device(device):
        before, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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


@dataclass(frozen=True)
class Recording:
    """A recorded step: what it reads and writes, by type, and what launches it."""

    taken: list[Group]
    launch: Callable[[], None]
    outputs: list[Tensor]
    given: list[Group]
    bytes: int  # of its growing states


class Recorded:
    """A step by recordings: ``run([tokens, positions, mask, *states]) -> [logits, *states]``.

    A step that gives one token's logits and leaves its states' shapes as they are is recorded when it has come
    ``OFTEN`` times. (Logits of a whole chunk would stay in memory as long as its recording.) Inputs are copied into a
    recording's own, and what it writes is copied out of it, so nothing that a caller holds changes later. One call at a
    time: others wait.

    Args:
        run: does the same for all inputs of the same shapes, without asking the GPU for a value.
        growing: axes of the inputs that get a column with every token, by place; zeros on their left change nothing.
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
        growing: dict[int, int] | None = None,
    ) -> None:
        self.growing = growing or {}
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
        if self.growing and (given[0].shape[1] != 1 or sum(given[place].nbytes for place in self.growing) > LARGEST):
            return self.run(given)
        shapes = [value.shape for value in given]
        for place, axis in self.growing.items():
            shapes[place] = self._longer(shapes[place], place, room(shapes[place][axis]) - shapes[place][axis])
        key = tuple((shape, value.dtype) for shape, value in zip(shapes, given, strict=True))
        if key in self.recordings:
            self.recordings.move_to_end(key)
            return self._replay(key, given)
        outputs = self.run(given)
        after = [self._longer(value.shape, place, 1) for place, value in enumerate(given)][STATES_AT:]
        if [value.shape for value in outputs[1:]] == after and outputs[0].shape[1] == 1:
            if len(self.seen) >= KNOWN:
                self.seen.clear()
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] >= OFTEN:
                self._try(key, given, outputs)
        return outputs

    def _elsewhere(self) -> bool:
        """Whether this call is part of something that a recording can't be."""
        if torch.is_autocast_enabled(self.device.type) or torch.compiler.is_compiling():
            return True
        if self.device.type != "cuda":
            return False
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def _longer(self, shape: torch.Size, place: int, more: int) -> torch.Size:
        """An input's shape with so many tokens more, where it is one that grows."""
        axis = self.growing.get(place)
        return shape if axis is None else torch.Size((*shape[:axis], shape[axis] + more, *shape[axis + 1 :]))

    def _take(self, recording: Recording, given: list[Tensor]) -> None:
        """Copies inputs into a recording's own. What an earlier step has left beside those that grow goes."""
        for mine, places, grow in recording.taken:
            values = [given[place] for place in places]
            if grow:
                axes = [self.growing[place] for place in places]
                sizes = [value.shape[axis] for value, axis in zip(values, axes, strict=True)]
                unused = [value.shape[axis] - size for value, axis, size in zip(mine, axes, sizes, strict=True)]
                torch._foreach_zero_([value.narrow(a, 0, n) for value, a, n in zip(mine, axes, unused, strict=True)])
                mine = [value.narrow(*part) for value, *part in zip(mine, axes, unused, sizes, strict=True)]
            torch._foreach_copy_(mine, values)

    def _give(self, recording: Recording, given: list[Tensor]) -> list[Tensor]:
        """Copies of what a recording has written, for a step that was given these inputs."""
        results: list[Any] = [None] * len(recording.outputs)
        for mine, places, grow in recording.given:
            if grow:
                came = [place - 1 + STATES_AT for place in places]  # the inputs that they came in by
                axes = [self.growing[place] for place in came]
                sizes = [given[place].shape[axis] + 1 for place, axis in zip(came, axes, strict=True)]
                mine = [value.narrow(a, value.shape[a] - n, n) for value, a, n in zip(mine, axes, sizes, strict=True)]
            for place, copy in zip(places, _copies(mine), strict=True):
                results[place] = copy
        return results

    def _replay(self, key: Any, given: list[Tensor]) -> list[Tensor]:
        recording = self.recordings[key]
        if self.done is not None:  # another stream may still be copying from the last call
            torch.cuda.current_stream(self.device).wait_event(self.done)
        self._take(recording, given)
        recording.launch()
        results = self._give(recording, given)
        if self.device.type == "cuda":
            self.done = torch.cuda.current_stream(self.device).record_event()
        return results

    def _try(self, key: Any, given: list[Tensor], wanted: list[Tensor]) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                inputs = [value.new_zeros(shape) for value, (shape, _) in zip(given, key, strict=True)]
                size = sum(inputs[place].nbytes for place in self.growing)
                recording = Recording(_groups(inputs, set(self.growing)), lambda: None, [], [], size)
                self._take(recording, given)  # what is run while it is recorded should be of sense, too
                launch, outputs = self.record(self.run, inputs, self.pool)
                grown = {place - STATES_AT + 1 for place in self.growing}
                self.recordings[key] = replace(recording, launch=launch, outputs=outputs, given=_groups(outputs, grown))
                for value in outputs:  # so that it is the launch that gives what is compared
                    value.fill_(torch.nan if value.is_floating_point() else 0)
                found = self._replay(key, given)
        except RuntimeError as error:
            self._give_up(f"couldn't be recorded ({' '.join(str(error).split())[:200]})")
            return
        if not all(map(_same, wanted, found)):
            self._give_up("gave something else when recorded")
        while len(self.recordings) > MOST or (len(self.recordings) > 1 and self._bytes() > LARGEST):
            self.recordings.popitem(last=False)

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


def _same(wanted: Tensor, found: Tensor) -> bool:
    """Whether a recorded output is the plain one, up to rounding."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    finite = wanted.isfinite()
    a, b = wanted[finite].double(), found[finite].double()
    if not torch.equal(wanted[~finite].nan_to_num(7.0), found[~finite].nan_to_num(7.0)) or not bool(b.isfinite().all()):
        return False
    return float((a - b).norm()) <= _TOLERANCE.get(wanted.dtype, 1e-6) * float(a.norm()) + 1e-12
