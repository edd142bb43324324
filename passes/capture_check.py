"""Checks what was traced against the model itself, at sizes where it may take another path.

Tracing follows one path. A Python branch on a size leaves a condition beside the graph (``T >= 6``, ``T % 2 == 0``),
or nothing at all where it asks for a size of 1; a custom backward leaves nothing either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from .canonical.flex import lower_flex
from .canonicalize import remove_unreachable
from .errors import CaptureError
from .graph import is_mutation, source_line, storage_root
from .program import Program, ProgramInput, holds, readable

# Sizes that conditions on sizes are tried at, besides those near the condition's own numbers.
BATCHES = (2, 3, 4, 5, 7, 64)
LENGTHS = (*range(2, 257), 1000, 2048, 4097, 70_000)
LONGEST_RUN = 2048  # scores of all pairs must fit
WORK = 2e11  # parameters × tokens that are run to compare
NARROW = (torch.bfloat16, torch.float16)
LARGEST_NOISE, TIMES_NOISE, TIMES_A_ROW = 0.1, 2.0, 4.0  # of an output's norm; of the noise
ADVICE = "Write the branch as masks, or capture the model in a form that doesn't look at sizes"


@contextmanager
def _as_was(module: nn.Module, program: Program) -> Iterator[None]:
    """Undoes what one run does to the model's buffers, which the program shares, and to the random state."""
    nodes = program.graph_module.graph.nodes
    changes = any(is_mutation(node) and storage_root(node).op == "get_attr" for node in nodes)
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()] if changes else []
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


class _Resized:
    """An example input at other sizes; stands for it in a guard's code."""

    def __init__(self, value: Tensor, sizes: list[int]) -> None:
        self.value, self.sizes = value, sizes

    def size(self) -> list[int]:
        return self.sizes

    def tensor(self) -> Tensor:
        """The example cut or repeated along each axis."""
        result = self.value
        for axis, size in enumerate(self.sizes):
            result = result.index_select(axis, torch.arange(size, device=result.device) % result.shape[axis])
        return result


def _resize(
    program_inputs: Sequence[ProgramInput], inputs: Mapping[str, Tensor], batch: int, length: int
) -> dict[str, _Resized]:
    # In order: export renames inputs that are called like a builtin (``input``).
    axes = {name: item.axes for name, item in zip(inputs, program_inputs, strict=True)}
    return {
        name: _Resized(
            value,
            [
                size if kind is None else batch if kind == "batch" else length
                for size, kind in ((size, axes.get(name, {}).get(axis)) for axis, size in enumerate(value.shape))
            ],
        )
        for name, value in inputs.items()
    }


def check_transforms(program: Program) -> None:
    """Raises ``CaptureError`` where ``torch.vmap`` and its like left calls in the graph that open and close them.

    Block masks of flex_attention are made that way; nothing reads them once its mask function is written out.
    """
    if not _transforms(program.graph_module):
        return
    written_out = program.clone().graph_module
    lower_flex(written_out)
    remove_unreachable(written_out)
    for node in _transforms(written_out):
        where = source_line(node)
        raise CaptureError(
            f"a function transform (torch.vmap) can't be compiled{f', at {where}' if where else ''}: "
            "write the batched ops themselves"
        )


def _transforms(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if getattr(n.target, "__module__", "") == "torch._functorch.predispatch"]


def check_capture(module: nn.Module, exported: ExportedProgram, program: Program, inputs: Mapping[str, Tensor]) -> None:
    """Compares module and program where the traced path may not be the model's own.

    Raises:
        CaptureError: they differ at some size, or the graph holds a function transform.
    """
    check_transforms(program)
    for guard in dict.fromkeys(getattr(exported, "_guards_code", None) or []):
        _check_guard(module, program, inputs, guard)
    if not any(value.is_meta for value in (*inputs.values(), *module.parameters())):
        _check_ones(module, program, inputs)
        _check_backward(module, program, inputs)


def _check_guard(module: nn.Module, program: Program, inputs: Mapping[str, Tensor], guard: str) -> None:
    """A condition that fails at some size: export also writes some that change nothing (``T != 64`` for a table)."""
    try:
        failure = _first_failure(guard, program, inputs)
    except (ArithmeticError, AttributeError, KeyError, NameError, SyntaxError, TypeError) as error:
        program.notes.append(f"a condition on the model's sizes couldn't be read: {readable(guard)} ({error})")
        return
    if failure is None:
        return
    batch, length, given = failure
    holds_where = f"what was traced holds only where {readable(guard)}"
    too_much = length > LONGEST_RUN or program.parameters * length > WORK
    if program.max_positions is not None and length > program.max_positions:
        program.conditions.append(guard)
    elif any(value.is_meta for value in inputs.values()):
        program.notes.append(f"{holds_where}; elsewhere nothing is known")
    elif length > 256 and too_much and length == program.max_positions:
        program.notes.append(f"{holds_where}; at {length} tokens, where a table ends, nothing was compared")
    elif length > 256 and too_much:
        program.conditions.append(guard)
        program.notes.append(f"{holds_where}: the program refuses other sizes")
    elif _compare(module, program, {name: value.tensor() for name, value in given.items()}) not in ("same", "refused"):
        raise CaptureError(
            f"the model takes another path at other sizes: {holds_where} "
            f"(not for a batch of {batch} with {length} tokens). {ADVICE}"
        )


def _first_failure(
    guard: str, program: Program, inputs: Mapping[str, Tensor]
) -> tuple[int, int, dict[str, _Resized]] | None:
    """The first batch and length at which a guard's code doesn't hold, and the inputs there."""
    code = compile(guard, "<guard>", "eval")
    numbers = {int(number) for number in re.findall(r"(?<![\w.\[])\d+(?![\w.\]])", guard)}
    near = {c * times + step for c in numbers if c <= 1 << 24 for times in (1, 2) for step in (-1, 0, 1)}
    batches = sorted({*BATCHES, *(c for c in near if 2 <= c <= 256)})
    lengths = sorted(c for c in {*LENGTHS, *near} if c >= 2)
    few = [c for c in lengths if c <= 16]
    cases = [(2, length) for length in lengths] + [(batch, 9) for batch in batches]
    for batch, length in itertools.chain(cases, itertools.product(batches[:12], [*few, 31, 64, 100])):
        given = _resize(program.inputs, inputs, batch, length)
        if not holds(code, given):
            return batch, length, given
    return None


def _check_ones(module: nn.Module, program: Program, inputs: Mapping[str, Tensor]) -> None:
    """A batch of one and a sequence of one: tracing takes neither for a case of its own and leaves no condition."""
    kinds = {kind for item in program.inputs for kind in item.axes.values()}
    sizes = {
        kind: max(
            value.shape[axis]
            for item, value in zip(program.inputs, inputs.values(), strict=True)
            for axis, k in item.axes.items()
            if k == kind
        )
        for kind in kinds
    }
    batch, length = sizes.get("batch", 2), min((n for kind, n in sizes.items() if kind != "batch"), default=2)
    cases = [(1, length, "a batch of 1", "batch" in kinds), (batch, 1, "sequences of 1 token", kinds - {"batch"})]
    for rows, tokens, what, dynamic in cases:
        if not dynamic:
            continue
        given = {name: value.tensor() for name, value in _resize(program.inputs, inputs, rows, tokens).items()}
        found = _compare(module, program, given)
        if found == "other":
            raise CaptureError(f"the model takes another path for {what}: the traced one differs there. {ADVICE}")
        if found == "fails":
            program.notes.append(f"the program doesn't run for {what}, though the model does")


def _outputs(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _compare(module: nn.Module, program: Program, inputs: dict[str, Tensor]) -> str:
    """ "same" or "other" result, the module "refused" these sizes, or only the program "fails" on them."""

    def run(call: Callable[[], Any]) -> list[Tensor]:
        with _as_was(module, program):
            return _outputs(call())

    try:
        wanted = run(lambda: module(**inputs))
    except Exception:  # the model's own code: what it refuses, nobody gets a result for
        return "refused"
    try:
        found = run(lambda: program(*inputs.values()))
    except Exception:  # whatever the graph's ops raise; told to the user by the caller
        return "fails"
    if len(wanted) != len(found):  # an output object may carry more than the graph returns
        wanted, found = wanted[:1], found[:1]
    if all(map(_close, wanted, found)):
        return "same"
    if not all(a.shape == b.shape and a.dtype in NARROW for a, b in zip(wanted, found, strict=True)):
        return "other"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            again = run(lambda: module(**inputs)), run(lambda: program(*inputs.values()))
    except RuntimeError:  # too large for it, say: then nothing explains the difference
        return "other"
    shares = [_rounded(*outputs) for outputs in zip(wanted, found, *again, strict=False)]
    if None in shares:
        return "other"
    shape = list(next(iter(inputs.values())).shape)
    program.notes.append(
        f"at {shape} model and program differ by {max(s for s in shares if s is not None):.1%} in {wanted[0].dtype}: "
        "no more than two attention kernels do, but smaller faults wouldn't show; capture it in float32 to be sure"
    )
    return "same"


def _rounded(module: Tensor, program: Tensor, module_again: Tensor, program_again: Tensor) -> float | None:
    """The difference of module and program, as a share; None where it is more than rounding explains.

    A branch on a size often only chooses an attention kernel, and what kernels round differently grows from layer to
    layer: 32 layers in bfloat16 make per cents of it. How much of it this model makes is how far module and program
    are from themselves when torch's plain attention is forced on them (the last two).
    """
    if not (_alike(module, program) and _alike(module, module_again) and _alike(program, program_again)):
        return None
    size = _norms(module)
    noise = torch.maximum(_norms(module, module_again), _norms(program, program_again))
    error = _norms(module, program)
    # Row by row as well: one token that is wrong mustn't hide among a thousand that are right. A row's own noise may
    # happen to be small, so the mean over all rows counts, too.
    rows = error <= TIMES_A_ROW * torch.maximum(noise, noise.mean())
    total = (noise.norm() <= LARGEST_NOISE * size.norm()) & (error.norm() <= TIMES_NOISE * noise.norm())
    if not bool(total & rows.all()):
        return None
    return float(error.norm() / size.norm()) if float(size.norm()) else 0.0


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether NaN and the infinities stand at the same places."""
    return all(torch.equal(test(left), test(right)) for test in (torch.isnan, torch.isposinf, torch.isneginf))


def _norms(value: Tensor, less: Tensor | None = None) -> Tensor:
    """Norms (float64) of the rows ``[..., n]`` of a value or of a difference, finite entries alone."""
    wide = value.double() if less is None else value.double() - less.double()
    found: Tensor = wide.nan_to_num(0.0, 0.0, 0.0).reshape(-1, *wide.shape[-1:]).norm(dim=-1)
    return found


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.is_complex() or right.is_complex():
        return left.shape == right.shape
    a, b = left.double(), right.double()
    finite = a[a.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * size + 1e-12, equal_nan=True))


def _check_backward(module: nn.Module, program: Program, inputs: Mapping[str, Tensor]) -> None:
    """Notes a ``torch.autograd.Function`` whose backward isn't the gradient of its forward (the graph's is)."""
    given = {name: value.tensor() for name, value in _resize(program.inputs, inputs, 2, 3).items()}
    given = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in given.items()}
    leaves = [value for value in (*given.values(), *module.parameters()) if value.requires_grad]
    if not leaves:
        return
    results: list[list[Tensor | None]] = []
    names: list[str] = []
    try:
        for run in (module, program):
            with torch.enable_grad(), _as_was(module, program):
                result = program(*given.values()) if run is program else module(**given)
                outputs = [y for y in _outputs(result)[:1] if y.requires_grad and y.is_floating_point()]
                names = names or _custom_backwards(outputs)
                if not outputs or not names:
                    return
                loss = torch.stack([(y.float() * y.detach().float().cos()).sum() for y in outputs]).sum()
                results.append(list(torch.autograd.grad(loss, leaves, allow_unused=True)))
    except (RuntimeError, ValueError, AssertionError) as error:
        program.notes.append(f"gradients of the program and the model couldn't be compared: {str(error)[:80]}")
        return
    zero = torch.zeros(())
    for a, b in zip(*results, strict=True):
        left, right = (zero if grad is None else grad for grad in (a, b))
        if not _close(
            left.expand(right.shape) if a is None else left, right.expand(left.shape) if b is None else right
        ):
            program.notes.append(
                f"the model's own backward ({', '.join(names)}) isn't the gradient of its forward: "
                "the program trains with the gradient of the forward"
            )
            return


def _custom_backwards(outputs: Sequence[Tensor]) -> list[str]:
    """Names of the user-written autograd functions behind ``outputs``."""
    seen: set[Any] = set()
    found: set[str] = set()
    pending = [y.grad_fn for y in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
        pending.extend(parent for parent, _ in node.next_functions)
    return sorted(found)
