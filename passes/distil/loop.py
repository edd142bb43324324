"""The training loop every stage shares: schedule, float32 masters, clipping, divergence checks, checkpoints.

Batches depend on the seed and the step number alone and nothing else is random, so a run that was interrupted and
resumed from its checkpoint equals, to the bit, the run that wasn't (with a limit on steps; one on seconds follows
the clock).
"""

from __future__ import annotations

import json
import math
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LincompileError
from ..writing import beside
from .spread import add_gradients, agreed, current, start_alike, writes

Progress = Callable[[int, int, float, float], None]
"""Called after every step: (step, steps expected, mean loss, tokens per second)."""

Options = TypeVar("Options", bound="LoopOptions")
NO_ARCHIVE = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class LoopOptions:
    """What every stage lets its user choose.

    Args:
        steps: optimizer steps at most.
        seconds: time budget; the schedule follows whichever of steps and seconds is further along.
        clip: largest gradient norm of one part (one site in attention transfer, all parameters otherwise).
        warmup: share of the run over which the rates rise.
        weight_decay: AdamW's decoupled decay.
        save_every: steps between checkpoints.
        replay: on a GPU, record a step as a CUDA graph and launch that (several times faster for small models).
        compile: compile what lies between matrix products, and the attention modules (None: on a GPU).
    """

    steps: int = 200
    seconds: float | None = None
    clip: float = 1.0
    warmup: float = 0.05
    weight_decay: float = 0.0
    save_every: int = 50
    replay: bool = True
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.steps < 0 or (self.seconds is not None and self.seconds < 0):
            raise LincompileError(f"training can't take {self.steps} steps or {self.seconds} seconds: give 0 or more")
        if not (self.clip > 0 and 0 <= self.warmup <= 1 and self.weight_decay >= 0 and self.save_every > 0):
            raise LincompileError("training needs clip > 0, warmup from 0 to 1, weight_decay >= 0 and save_every > 0")

    def scaled(self: Options, factor: float) -> Options:
        """All rates times ``factor``: for a student that has been trained already."""
        rates = [option.name for option in fields(self) if option.name == "rate" or option.name.endswith("_rate")]
        return replace(self, **{name: getattr(self, name) * factor for name in rates})

    def decisive(self) -> dict[str, Any]:
        """Those that change what a step computes (JSON-able)."""
        others = ("seconds", "save_every", "replay", "compile")
        return {name: value for name, value in asdict(self).items() if name not in others}

    @property
    def replays(self) -> bool:
        """Whether steps may be recorded as CUDA graphs (on several ranks: not)."""
        return self.replay and current() is None

    def compiles(self, device: torch.device) -> bool:
        """Whether to train with compiled code on a device (on several ranks: not)."""
        if current() is not None:
            return False
        return device.type == "cuda" if self.compile is None else self.compile


@dataclass
class LoopReport:
    """What a run did: optimizer steps, tokens seen, seconds, mean loss of each step, and where it was resumed.

    ``piece_tokens``: how many tokens at a time the GPU's memory had room for (0: all of a step's), with ``notes`` that
    say so.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0
    piece_tokens: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Part:
    """Parameters that are clipped together, with a loss of their own.

    ``rates`` gives every parameter's peak learning rate; ``name`` is what errors call the part.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    rates: dict[str, float]


class Masters:
    """AdamW on float32 copies of the parameters (the parameters themselves where they are float32 or float64).

    A bfloat16 parameter would swallow updates smaller than 1/256 of it.
    """

    def __init__(self, parts: Sequence[Part], weight_decay: float) -> None:
        self.parts = parts
        self.masters: dict[str, Tensor] = {}
        self.copied: list[tuple[nn.Parameter, Tensor]] = []
        by_rate: dict[float, list[Tensor]] = {}
        for part in parts:
            for name, parameter in part.parameters.items():
                master = parameter
                if parameter.dtype not in (torch.float32, torch.float64):
                    master = nn.Parameter(parameter.detach().float())
                    self.copied.append((parameter, master))
                self.masters[f"{part.name}/{name}"] = master
                by_rate.setdefault(part.rates[name], []).append(master)
        groups = [{"params": members, "peak": rate, "lr": rate} for rate, members in sorted(by_rate.items())]
        on_gpu = all(master.is_cuda for master in self.masters.values())
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=on_gpu or None)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, _ in self.copied:
            parameter.grad = None

    def step(self, factor: float, clip: float, step: int) -> None:
        """Clips each part and updates it at ``factor`` times its peak rates.

        Raises:
            LincompileError: a gradient isn't finite; nothing was changed.
        """
        for parameter, master in self.copied:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        check_finite(self._clip(clip).cpu(), self.parts, step, "gradient", self._bad_gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        self.write()

    def _bad_gradient(self, index: int, what: str) -> str:
        """The first parameter of a part whose gradient isn't finite."""
        part = self.parts[index]
        for name in part.parameters:
            grad = self.masters[f"{part.name}/{name}"].grad
            if grad is not None and not bool(grad.isfinite().all()):
                return name
        return ""

    def write(self) -> None:
        """Masters → parameters."""
        with torch.no_grad():
            for parameter, master in self.copied:
                parameter.copy_(master)

    @torch.no_grad()
    def _clip(self, clip: float) -> Tensor:
        """Scales each part's gradients to norm ``clip`` at most; returns the norms they had, ``[parts]``.

        As ``clip_grad_norm_`` part by part, which for hundreds of parts would launch thousands of kernels.
        """
        owners, grads = [], []
        for index, part in enumerate(self.parts):
            for name in part.parameters:
                grad = self.masters[f"{part.name}/{name}"].grad
                if grad is not None:
                    owners.append(index)
                    grads.append(grad)
        if not grads:
            return torch.zeros(len(self.parts))
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(grads)])
        owner = torch.tensor(owners, device=norms.device)
        totals = norms.new_zeros(len(self.parts)).index_add_(0, owner, norms.square()).sqrt()
        factors = (clip / (totals + 1e-6)).clamp(max=1.0)
        if len(self.parts) == 1:
            torch._foreach_mul_(grads, factors[0])
        else:
            torch._foreach_mul_(grads, list(factors[owner].unbind()))
        return totals

    def state(self) -> dict[str, Any]:
        masters = {name: master.detach() for name, master in self.masters.items()}
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.write()


def schedule(done: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` of the run, cosine fall to a tenth over the rest."""
    if done < warmup:
        return max(done / warmup, 0.1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))


def check_finite(
    values: Tensor, parts: Sequence[Part], step: int, what: str, locate: Callable[[int, str], str] | None = None
) -> None:
    """Raises ``LincompileError`` naming the first part whose value isn't finite, and what ``locate`` finds in it."""
    for index, (part, value) in enumerate(zip(parts, values.tolist(), strict=True)):
        if not math.isfinite(value):
            raise _diverged(step, what, part.name, locate(index, what) if locate is not None else "")


def check_trained(parts: Sequence[Part], step: int) -> None:
    """Raises ``LincompileError`` naming the first parameter that the update of a step left with NaN or infinity."""
    for part in parts:
        for name, parameter in part.parameters.items():
            if not bool(parameter.isfinite().all()):
                raise _diverged(step, "update", part.name, name)


def _diverged(step: int, what: str, part: str, found: str) -> LincompileError:
    return LincompileError(
        f"distillation diverged at step {step}: the {what} at '{part}' isn't finite"
        + (f", first in '{found}'" if found else "")
        + " (lower the learning rate, or check the model's weights); the last checkpoint is intact"
    )


def train(
    parts: Sequence[Part],
    losses_of: Callable[[int], tuple[Tensor, int]],
    options: LoopOptions,
    *,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    report: LoopReport | None = None,
    progress: Progress | None = None,
    locate: Callable[[int], str] | None = None,
) -> LoopReport:
    """Trains the parts' parameters in place.

    Args:
        losses_of: computes step ``i``: adds to the gradients, returns the parts' losses and the tokens used.
        checkpoint: file the run saves itself to and continues from if it exists.
        identity: what makes this run this run (JSON-able); a checkpoint with another identity is refused.
        report: the object to fill (a subclass of ``LoopReport``); restored from the checkpoint as a whole.
        locate: where in the model step ``i``'s loss stops being finite ("" = not known), for the error to say.

    Raises:
        LincompileError: a loss, gradient or updated parameter that isn't finite, or a checkpoint that is damaged or of
            another run.
    """
    report = report or LoopReport()
    names = [[part.name, *part.parameters] for part in parts]
    fingerprint = json.dumps({"options": options.decisive(), "parameters": names, **(identity or {})})
    frozen = {p: p.requires_grad for part in parts for p in part.parameters.values()}
    for parameter in frozen:
        parameter.requires_grad_(True)
    start_alike(frozen)
    masters = Masters(parts, options.weight_decay)
    device = next(iter(frozen)).device if frozen else torch.device("cpu")
    try:
        if checkpoint is not None and checkpoint.exists():
            _restore(checkpoint, fingerprint, masters, report)
        began = time.monotonic() - report.seconds
        while True:
            done = max(
                report.steps / options.steps if options.steps else 1.0,
                0.0 if options.seconds is None else (time.monotonic() - began) / max(options.seconds, 1e-9),
            )
            done = agreed(done, device)
            if done >= 1:
                break
            masters.zero_grad()
            losses, tokens = losses_of(report.steps)
            add_gradients(frozen)
            check_finite(losses, parts, report.steps, "loss", lambda *_: locate(report.steps) if locate else "")
            masters.step(schedule(done, options.warmup), options.clip, report.steps)
            report.steps += 1
            report.tokens += tokens
            report.seconds = time.monotonic() - began
            report.losses.append(float(losses.mean()))
            if progress:
                share = max(report.steps / options.steps, report.seconds / options.seconds if options.seconds else 0.0)
                expected = max(report.steps, round(report.steps / share))
                progress(report.steps, expected, report.losses[-1], report.tokens / max(report.seconds, 1e-9))
            if checkpoint is not None and writes() and report.steps % options.save_every == 0:
                check_trained(parts, report.steps - 1)
                _save(checkpoint, fingerprint, masters, report)
        if report.steps:
            check_trained(parts, report.steps - 1)
        if checkpoint is not None and writes():
            _save(checkpoint, fingerprint, masters, report)
    finally:
        masters.zero_grad()
        for parameter, wanted in frozen.items():
            parameter.requires_grad_(wanted)
    return report


def _save(path: Path, fingerprint: str, masters: Masters, report: LoopReport) -> None:
    """Writes a checkpoint beside its place and renames it, so that a killed run leaves the last whole one."""
    # Through a file of Python's: torch's own says nothing of a full disk.
    with beside(path, "the checkpoint") as name, name.open("wb") as file:
        torch.save({"fingerprint": fingerprint, "report": asdict(report), **masters.state()}, file)


def _restore(path: Path, fingerprint: str, masters: Masters, report: LoopReport) -> None:
    damaged = f"the checkpoint {path} is damaged or isn't one: remove it or name another"
    try:
        with zipfile.ZipFile(path) as file:  # torch reads numbers with other bits than were written without a word
            if file.testzip() is not None:
                raise LincompileError(damaged)
        state = torch.load(path, weights_only=True, map_location="cpu")
        found = state["fingerprint"]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, *NO_ARCHIVE) as error:
        raise LincompileError(damaged) from error
    if found != fingerprint:
        raise LincompileError(
            f"the checkpoint {path} belongs to a run with other options, data or another model, or of a student that "
            "another adapter or earlier stage had trained: remove it or name another file"
        )
    try:
        masters.load(state)
        for name, value in state["report"].items():
            setattr(report, name, value)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise LincompileError(damaged) from error
    report.resumed_at = report.steps
