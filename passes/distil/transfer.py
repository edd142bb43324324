"""Attention transfer: every linear site learns to give what its softmax site gave, all sites from one teacher forward.

The teacher's graph is instrumented: beside each softmax site stands the student's module on the same q, k, v, hidden
states and padding mask. Running it costs one teacher forward; at each site the student's output, its relative squared
error and its gradients are computed at once and freed, so memory stays that of one site. (The output-matching stage
of LoLCATs, arXiv 2410.10254, and LAWCAT, arXiv 2509.18467, with a relative error instead of a scaled one.)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter

from ..errors import LincompileError
from ..graph import Builder, finish, tensor_of
from ..linearize import content_nodes, find_operands
from ..methods import LinearMethod, method_class
from ..program import Program
from .data import TokenWindows

SLOW_PARAMETERS = ("conv", "gate", "beta")


@dataclass(frozen=True)
class Transfer:
    """Options of attention transfer.

    Args:
        steps: optimizer steps at most.
        seconds: time budget; the schedule follows whichever of steps and seconds is further along.
        rate: peak learning rate of feature maps and output scales.
        slow_rate: peak learning rate of convolutions and gates.
        clip: largest gradient norm of one site.
        warmup: share of the run over which the rate rises.
        save_every: steps between checkpoints.
    """

    steps: int = 200
    seconds: float | None = None
    rate: float = 1e-2
    slow_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    save_every: int = 50


@dataclass
class TransferReport:
    """What a run did. ``before`` and ``after`` map site paths to relative errors ‖student − teacher‖² / ‖teacher‖²."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0


Progress = Callable[[int, int, float, float], None]  # step, steps expected, mean loss, tokens per second


class _Instrumented(Interpreter):
    """Runs the teacher without gradients and each student module with them, one site at a time."""

    def __init__(self, teacher: Program, student: Program) -> None:
        program = teacher.clone()
        module = program.graph_module
        content = content_nodes(program)
        self.modules_by_path: dict[str, LinearMethod] = {}
        results = []
        for site, twin in zip(program.sites, student.sites, strict=True):
            if twin.method == "softmax" or site.node is None:
                continue
            branch = student.graph_module.get_submodule(twin.details["module"])
            assert isinstance(branch, LinearMethod)
            self.modules_by_path[site.path] = branch
            make = Builder(module, site.node)
            operands = find_operands(site, method_class(twin.method), make, content)
            assert not isinstance(operands, str), operands
            module.add_submodule(twin.details["module"], branch)
            with module.graph.inserting_after(site.node):
                call = module.graph.call_module(twin.details["module"], (site.node, *operands.arguments()))
            results.append(call)
        if not results:
            raise LincompileError("nothing to distil: no site was rewritten to a linear attention")
        output = next(node for node in module.graph.nodes if node.op == "output")
        output.args = (tuple(results),)  # the head of the model isn't needed, and dead code goes
        finish(module)
        super().__init__(module, garbage_collect_values=True)
        self.program = program
        self.train = False

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        branch = self.submodules[target] if hasattr(self, "submodules") else self.module.get_submodule(target)
        wanted, *operands = args
        mask = operands[4] if len(operands) > 4 else None
        with torch.set_grad_enabled(self.train):
            got = branch(*operands)
            difference = (got - wanted).float().square()
            reference = wanted.float().square()
            if mask is not None:
                weight = mask[:, None, :, None]
                difference, reference = difference * weight, reference * weight
            loss = difference.sum() / reference.sum().clamp(min=1e-12)
            if self.train:
                loss.backward()
        return loss.detach()

    def errors(self, tokens: Tensor, train: bool) -> Tensor:
        """Relative error of every student site ``[sites]``; with ``train`` also adds to the gradients."""
        self.train = train
        with torch.no_grad():
            losses = self.run(*model_inputs(self.program, tokens))
        return torch.stack([loss.float().cpu() for loss in losses])


def model_inputs(program: Program, tokens: Tensor) -> list[Tensor]:
    """The program's inputs for unpadded token windows ``[B, T]``.

    Raises:
        LincompileError: the program takes something that tokens don't determine.
    """
    values = []
    for item in program.inputs:
        fake = tensor_of(program.placeholder(item.name))
        if item.role == "tokens":
            value = tokens
        elif item.role == "mask":
            value = torch.ones_like(tokens)
        elif item.role == "positions":
            value = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).contiguous()
        elif fake.dim() == 2 and not fake.is_floating_point():
            value = torch.zeros_like(tokens)  # token types
        else:
            raise LincompileError(f"the model takes '{item.name}', which token text doesn't give: distil it from Python with your own data")
        values.append(value.to(fake.dtype))
    return values


def transfer(
    teacher: Program,
    student: Program,
    data: TokenWindows,
    options: Transfer = Transfer(),
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    measure_windows: int = 4,
) -> TransferReport:
    """Trains the student's linear sites in place.

    Args:
        teacher: the proved program, all sites softmax (the student was made from it).
        student: the rewritten program; only the parameters of its ``lincompile_attention`` modules change.
        data: token windows.
        checkpoint: file that the run saves itself to, and continues from if it exists.

    Returns:
        A report with per-site errors on held-out windows before and after.

    Raises:
        LincompileError: nothing to distil, a loss that isn't finite, or a checkpoint of another run.
    """
    runner = _Instrumented(teacher, student)
    branches = runner.modules_by_path
    optimizer = make_optimizer(branches, options)
    report = TransferReport()
    fingerprint = json.dumps({"options": asdict(options), "sites": list(branches), "length": data.length, "batch": data.batch, "seed": data.seed})
    device = next(iter(branches.values())).parameters().__next__().device
    held_out = data.measure(measure_windows).to(device)
    requires_grad = {p: p.requires_grad for branch in branches.values() for p in branch.parameters()}
    for parameter in requires_grad:
        parameter.requires_grad_(True)
    try:
        spent = 0.0
        if checkpoint is not None and checkpoint.exists():
            report, spent = _resume(checkpoint, fingerprint, branches, optimizer)
        else:
            report.before = _measure(runner, held_out)
        started = time.monotonic() - spent
        step = report.resumed_at
        while step < options.steps:
            elapsed = time.monotonic() - started
            done = max(step / options.steps, elapsed / options.seconds if options.seconds else 0.0)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(done, options.warmup)
            optimizer.zero_grad(set_to_none=True)
            losses = runner.errors(data.step(step).to(device), train=True)
            _check(losses, list(branches), step)
            for branch in branches.values():
                nn.utils.clip_grad_norm_(branch.parameters(), options.clip)
            optimizer.step()
            step += 1
            report.losses.append(float(losses.mean()))
            report.tokens += data.step(step - 1).numel()
            if progress:
                elapsed = time.monotonic() - started
                expected = min(options.steps, int(step * options.seconds / elapsed)) if options.seconds else options.steps
                progress(step, max(step, expected), report.losses[-1], report.tokens / max(elapsed, 1e-9))
            report.steps, report.seconds = step, time.monotonic() - started
            if checkpoint is not None and step % options.save_every == 0:
                _save(checkpoint, fingerprint, branches, optimizer, report)
        report.after = _measure(runner, held_out)
        if checkpoint is not None:
            _save(checkpoint, fingerprint, branches, optimizer, report)
    finally:
        for parameter, wanted in requires_grad.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None
    return report


def make_optimizer(branches: dict[str, LinearMethod], options: Transfer) -> torch.optim.AdamW:
    """AdamW with a high rate for feature maps and a low one for convolutions and gates."""
    fast, slow = [], []
    for branch in branches.values():
        for name, parameter in branch.named_parameters():
            (slow if name.startswith(SLOW_PARAMETERS) else fast).append(parameter)
    groups = [{"params": fast, "peak": options.rate}, {"params": slow, "peak": options.slow_rate}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.rate, betas=(0.9, 0.95), weight_decay=options.weight_decay)


def schedule(done: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` of the run, cosine fall to a tenth over the rest."""
    if done < warmup:
        return max(done / warmup, 0.1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))


def _measure(runner: _Instrumented, windows: Tensor) -> dict[str, float]:
    return dict(zip(runner.modules_by_path, runner.errors(windows, train=False).tolist(), strict=True))


def _check(losses: Tensor, paths: list[str], step: int) -> None:
    bad = [path for path, loss in zip(paths, losses.tolist(), strict=True) if not math.isfinite(loss)]
    if bad:
        raise LincompileError(f"distillation diverged at step {step}: the error at '{bad[0]}' isn't finite (lower the learning rate, or check the model's weights)")


def _save(path: Path, fingerprint: str, branches: dict[str, LinearMethod], optimizer: torch.optim.Optimizer, report: TransferReport) -> None:
    """Writes a checkpoint beside its place and renames it, so that a killed run leaves the last whole one."""
    temporary = path.with_suffix(path.suffix + ".partial")
    state = {
        "fingerprint": fingerprint,
        "branches": {name: branch.state_dict() for name, branch in branches.items()},
        "optimizer": optimizer.state_dict(),
        "report": asdict(report),
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def _resume(path: Path, fingerprint: str, branches: dict[str, LinearMethod], optimizer: torch.optim.Optimizer) -> tuple[TransferReport, float]:
    state = torch.load(path, weights_only=True)
    if state["fingerprint"] != fingerprint:
        raise LincompileError(f"the checkpoint {path} belongs to a run with other options or another model: remove it or name another file")
    for name, branch in branches.items():
        branch.load_state_dict(state["branches"][name])
    optimizer.load_state_dict(state["optimizer"])
    report = TransferReport(**state["report"])
    report.resumed_at = report.steps
    return report, report.seconds
