"""The control of a distilled model: the softmax model itself, trained on the same text for as many steps.

A student that was trained on some text is nearer to other text of that kind, whatever its attention: what the same
training does to the softmax model tells that apart. It has no teacher, so the text's own next tokens are its targets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lincompile.passes.distil.data import Batches
from lincompile.passes.distil.instrument import unpadded, weights_checksum
from lincompile.passes.distil.logits import LogitDistillation, LogitReport, logits_of, lora_rank, own_parameters
from lincompile.passes.distil.loop import Part, Progress, train
from lincompile.passes.distil.lora import PREFIX, add_lora, merge_lora
from lincompile.passes.distil.pieces import Pieces
from lincompile.passes.program import Program

ROWS = 2048  # tokens whose logits are held in float32 at a time


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens, in nats, of logits ``[B, T, V]`` for targets ``[B, T]``."""
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    parts = [
        functional.cross_entropy(flat[start : start + ROWS].float(), wanted[start : start + ROWS], reduction="sum")
        for start in range(0, len(flat), ROWS)
    ]
    return torch.stack(parts).sum() / len(flat)


def train_control(
    teacher: Program,
    data: Batches,
    options: LogitDistillation,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Program, LogitReport]:
    """A copy of the teacher after training, and a report whose figures are cross-entropies, not divergences."""
    control = teacher.clone()
    own_parameters(control, teacher)
    for parameter in control.graph_module.parameters():
        parameter.requires_grad_(False)
    graph = unpadded(control)
    rank = lora_rank(options.train)
    additions = add_lora(graph.graph_module, rank) if rank else []
    trained = {
        name: parameter
        for name, parameter in control.graph_module.named_parameters()
        if parameter.is_floating_point() and (not rank or parameter.dim() == 1)
    }
    trained |= {f"{PREFIX}.{a.name}.{part}": p for a in additions for part, p in (("up", a.up), ("down", a.down))}

    def loss_of(tokens: Tensor, compiled: bool = False) -> Tensor:
        tokens = tokens.to(graph.device)
        return cross_entropy(logits_of(graph, tokens, compiled)[:, :-1], tokens[:, 1:])

    def learn(tokens: Tensor, share: float, compiled: bool) -> Tensor:
        loss = loss_of(tokens, compiled)
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def measure() -> float:
        windows = data.measure(8)
        return sum(float(loss_of(window[None])) for window in windows) / len(windows)

    report = LogitReport()
    if checkpoint is None or not checkpoint.exists():
        report.before = measure()
    compile = options.compiles(graph.device)
    if compile:
        graph.divide()
    pieces = Pieces(learn, list(trained.values()), compile=compile, replay=options.replays, report=report, note=note)

    def losses_of(step: int) -> tuple[Tensor, int]:
        tokens = data.step(step)
        return pieces(tokens, step)[None], tokens.numel()

    identity = {"stage": "control", "data": data.fingerprint(), "model": weights_checksum(teacher)}
    parts = [Part("the logits", trained, {name: options.rate_of(name) for name in trained})]
    train(parts, losses_of, options, checkpoint=checkpoint, identity=identity, report=report, progress=progress)
    report.after = measure()
    merge_lora(control, additions)
    control.metadata["low_rank"] = additions
    return control, report
