"""Kernels are compared with their reference the first time they are used: compilers err, too.

Triton 3.4 to 3.7.0 generate wrong code for some kernels on Hopper, and which ones depends on shapes and types. So the
first call of a kernel for a device, its types and its head sizes is run on the beginning of its own inputs as well, in
float64 by the reference. Kernels that differ, or that the compiler or the chip refuses, aren't used, and a warning
says so. ``LINCOMPILE_KERNEL_CHECK=0`` skips the comparison. The kernels of a first call are compiled together, before
any of them runs.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Forms = Callable[[Sequence[Any]], Sequence[Sequence[Any]]]

ROWS, TOKENS = 2, 580  # of a call's inputs: more than one segment of linear attention, and no multiple of a chunk
# Root mean square of the difference, relative to the reference's. What is rounded stays far below, a wrong block of
# columns far above.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float32: 2e-3}
# A few wrong values hardly move that mean. What one value may be off, in parts of the reference's root mean square,
# beside its own rounding: two values that have nothing to do with each other are 1.4 apart.
_PEAK = 1.0
_KNOWN: dict[tuple[Any, ...], bool] = {}


def serving(
    name: str,
    kernels: ModuleType | None,
    reference: ModuleType,
    function: str,
    layouts: Sequence[str],
    args: Sequence[Any],
    supported: Sequence[Any],
    later: Function | None = None,
    forms: Forms | None = None,
) -> ModuleType:
    """The module whose ``function`` serves a call: the kernels where they are there, do and may, else the reference.

    Args:
        supported: what ``kernels.supports`` is asked about; and see :func:`trusted`.
        later: called with the kernels' module; launches what will be needed after this call, to be compiled with it.
    """
    if kernels is None or not kernels.supports(*supported):
        return reference
    pair = getattr(kernels, function), getattr(reference, function)
    ahead = None if later is None else functools.partial(later, kernels)
    return kernels if trusted(name, *pair, layouts, args, ahead, forms) else reference


def trusted(
    name: str,
    kernel: Function,
    reference: Function,
    layouts: Sequence[str],
    args: Sequence[Any],
    ahead: Callable[[], Any] | None = None,
    forms: Forms | None = None,
    together: bool = True,
) -> bool:
    """Whether a kernel may serve this call.

    Args:
        name: of the op, for the warning.
        kernel, reference: called with ``args``; one tensor or a sequence of tensors and None.
        layouts: for each tensor among the first arguments, a letter an axis: ``b`` for the batch, ``t`` for tokens, any
            other letter for an axis that is left as it is. Axes beyond a layout are left, too.
        ahead: launches more kernels, which are compiled together with those of this call.
        forms: makes of the beginning of the inputs what is compared, instead of that itself: one list of arguments for
            each way that the kernel has to compute, none of them ill-conditioned.
        together: the kernels are launched through ``compile_ahead.launcher`` and can be compiled before they run.
    """
    if os.environ.get("LINCOMPILE_KERNEL_CHECK", "1") == "0":
        return True
    key = (name, *(_form(x, layout) for x, layout in zip_longest(args, layouts, fillvalue="")))
    if key not in _KNOWN:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return True  # nothing may be waited for here; a graph's warm-up has come this way before
        try:
            few = [_cut(x, layout) for x, layout in zip_longest(args, layouts, fillvalue="")]
            compared = [few] if forms is None else forms(few)
            if together and any(isinstance(x, Tensor) and x.is_cuda for x in args):
                _compile(kernel, [args, *compared], ahead)
            worst = _difference(kernel, reference, compared)
        except Exception as error:
            if not _refused(error):
                raise
            worst, problem = float("inf"), f"can't run on {_where(args)} ({' '.join(str(error).split())[:200]})"
        else:
            problem = f"differ from the reference on {_where(args)} ({worst or 0:.0f} times what rounding explains)"
        if worst is None:
            return True
        _KNOWN[key] = worst <= 1
        if worst > 1:
            warnings.warn(
                f"lincompile: the kernels of {name} {problem}, so a slower way is used; try another version of Triton",
                stacklevel=2,
            )
    return _KNOWN[key]


def _refused(error: Exception) -> bool:
    """Whether Triton couldn't compile a kernel, or the chip has too little room for it."""
    try:
        from triton.errors import TritonError  # Triton isn't everywhere that this module is
    except ImportError:
        return False
    return isinstance(error, TritonError) or "PassManager::run failed" in str(error)


def _where(args: Sequence[Any]) -> str:
    """The device of a call, by name."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _compile(kernel: Function, calls: Sequence[Sequence[Any]], ahead: Callable[[], Any] | None) -> None:
    """Compiles what calls with these arguments and ``ahead`` launch."""
    from .compile_ahead import compile_together  # Triton isn't everywhere that this module is

    compile_together(*(functools.partial(kernel, *args) for args in calls), *([] if ahead is None else [ahead]))


def _form(x: Any, layout: str) -> Any:
    """What decides which code runs: type, device, alignment, sizes other than the batch's; one token, some or many."""
    if not isinstance(x, Tensor):
        return x
    axes = layout.ljust(x.dim())
    sizes = [
        (size == 1, size < TOKENS) if axis == "t" else size
        for axis, size in zip(axes, x.shape, strict=True)
        if axis != "b"
    ]
    return (x.dtype, x.device, x.data_ptr() % 16 == 0, *sizes)


def _cut(x: Any, layout: str) -> Any:
    if isinstance(x, Tensor):
        for axis, letter in enumerate(layout):
            if letter in "bt":
                x = x.narrow(axis, 0, min(x.shape[axis], ROWS if letter == "b" else TOKENS))
    return x


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _difference(kernel: Function, reference: Function, compared: Sequence[Sequence[Any]]) -> float | None:
    """The largest difference of an output over its tolerance; None where the reference isn't finite or is empty."""
    found = [_worst(kernel, reference, args) for args in compared]
    return max((worst for worst in found if worst is not None), default=None)


def _worst(kernel: Function, reference: Function, few: Sequence[Any]) -> float | None:
    narrowest = max(
        (x.dtype for x in few if isinstance(x, Tensor) and x.dtype in _TOLERANCE), key=_TOLERANCE.__getitem__
    )
    got, wanted = _tensors(kernel(*few)), _tensors(reference(*map(_wide, few)))
    worst: float | None = None
    for a, b in zip(got, wanted, strict=True):
        if a is None or b is None or not b.numel():
            continue
        if not bool(torch.isfinite(b).all()):
            return None
        error, size, tolerance = (a.double() - b).abs(), b.square().mean().sqrt(), _TOLERANCE[narrowest]
        mean = error.square().mean().sqrt() / (size * tolerance + 1e-9)
        peak = (error / (size * _PEAK + b.abs() * tolerance + 1e-9)).max()
        worst = max(worst or 0.0, *(float(ratio) if ratio == ratio else float("inf") for ratio in (mean, peak)))
    return worst


def _tensors(result: Any) -> Sequence[Tensor | None]:
    return [result] if isinstance(result, Tensor) else list(result)
