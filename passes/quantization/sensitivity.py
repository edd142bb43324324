"""How much each linear layer minds each quantization scheme, from calibration batches on the float graph.

``fisher`` (default): one forward and one backward pass per batch. With ``y`` drawn from the model's own prediction,
``½ E[(∂ log p(y)/∂Y · ΔY)²]`` is the second-order estimate of the KL divergence that replacing a layer's output Y by
``Y + ΔY`` causes; ΔY is replayed locally for every scheme when the gradient passes the layer, so memory stays at one
batch's activations. ``kl``: each group of layers is quantized alone and the divergence of the outputs measured.
Scores are in nats per token; an output that isn't logits over a vocabulary is read as the mean of a unit Gaussian.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.nn import functional as F

from ...kernels.int6_linear.codes import dequantize, fake_quantize_activation, quantize_weight
from ..distil.instrument import checksum
from ..errors import LincompileError
from ..program import Program
from ..writing import beside
from .linear_layers import LinearLayer, token_tables
from .schemes import Scheme

Batch = Mapping[str, Tensor]
Compute = Callable[[], Tensor]
OnLinear = Callable[[LinearLayer, Tensor, "Tensor | None", Compute], Tensor]
CodesOf = Callable[[LinearLayer, Scheme], "tuple[Tensor, Tensor]"]
METRICS = ("fisher", "kl")
_FORMAT = 1


@dataclass
class Scores:
    """Loss per layer and scheme in nats, summed over ``tokens`` tokens of ``batches`` calibration batches."""

    metric: str
    fingerprint: str
    batches: int = 0
    tokens: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, layer: str, scheme: str) -> float:
        """Mean loss per token of a layer under a scheme; 0 for ``float``."""
        return 0.0 if scheme == "float" else self.sums[layer][scheme] / max(self.tokens, 1)

    def add(self, layer: str, scheme: str, value: float) -> None:
        per_scheme = self.sums.setdefault(layer, {})
        per_scheme[scheme] = per_scheme.get(scheme, 0.0) + value

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, through a temporary file so that an interrupted run leaves the last whole one.

        Raises:
            LincompileError: the file can't be written.
        """
        with beside(Path(path), "the scores") as file:
            file.write_text(json.dumps({"format": _FORMAT} | asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            LincompileError: the file isn't such a record.
        """
        try:
            record = json.loads(Path(path).read_text())
            if record.pop("format") != _FORMAT:
                raise ValueError("another format version")
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LincompileError(f"sensitivity scores '{path}' can't be read ({error}): delete the file") from error


def measure(
    program: Program,
    layers: Sequence[LinearLayer],
    schemes: Sequence[Scheme],
    calibration: Sequence[Batch],
    *,
    metric: str = "fisher",
    group_size: int = 128,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    codes_of: CodesOf | None = None,
    method: str = "rtn",
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores of every layer under every scheme.

    Args:
        program: a captured program whose ``layers`` (from ``find_linears``) are still in float.
        schemes: the quantized schemes to score.
        calibration: batches, each a mapping from the program's input names to tensors.
        metric: ``fisher`` or ``kl``.
        path: a JSON file: scores are saved there after every batch, and a file of the same model, schemes and batches
            is resumed.
        codes_of: the weight codes to score (default: round to nearest, afresh each time), made by ``method``.
        progress: called with (batches done, batches) after every batch.

    Raises:
        LincompileError: unknown metric, no calibration batch, a batch without an input of the program, or a file of
            scores that belongs to something else.
    """
    if metric not in METRICS:
        raise LincompileError(f"quantize: unknown sensitivity metric '{metric}'; the choices are {', '.join(METRICS)}")
    if not calibration:
        raise LincompileError("quantize: the calibration set is empty: give at least one batch of the model's inputs")
    options = repr((metric, method, group_size, seed, [scheme.name for scheme in schemes]))
    fingerprint = _fingerprint(program, layers, calibration, options)
    codes_of = codes_of or rtn_codes(program, group_size)
    scores = Scores(metric, fingerprint)
    if path is not None and Path(path).exists():
        scores = Scores.load(path)
        if scores.fingerprint != fingerprint:
            raise LincompileError(
                f"sensitivity scores '{path}' belong to another model, calibration set or metric: delete the file or"
                " name another"
            )
    step = _fisher_batch if metric == "fisher" else _kl_batch
    for index in range(scores.batches, len(calibration)):
        with frozen(program):
            scores.tokens += step(
                program, layers, schemes, calibration[index], codes_of, group_size, seed + index, scores
            )
        scores.batches = index + 1
        if path is not None:
            scores.save(path)
        if progress:
            progress(index + 1, len(calibration))
    return scores


def groups_of(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Layers tied to one scheme: those that read the same node (q, k and v; gate and up), quantized once for all."""
    groups: dict[tuple[Node, ...], list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(tuple(call.x for call in layer.calls), []).append(layer)
    return list(groups.values())


def divergence(
    program: Program,
    layers: Sequence[LinearLayer],
    plans: Mapping[str, Mapping[str, Scheme]],
    calibration: Sequence[Batch],
    codes_of: CodesOf,
    group_size: int,
) -> dict[str, float]:
    """Measured divergence of the outputs (nats per token) under each named plan (layer name → scheme)."""
    totals, tokens = dict.fromkeys(plans, 0.0), 0
    with frozen(program), torch.no_grad():
        for batch in calibration:
            reference = run(program, batch, [], _float)
            for name, plan in plans.items():
                output = run(program, batch, layers, emulate(plan, codes_of, group_size))
                totals[name] += _divergence(program, batch, reference, output)
            tokens += int(real_tokens(program, batch, reference).sum())
    if not tokens:
        raise LincompileError("quantize: the calibration set holds padding alone: give text with real tokens")
    return {name: total / tokens for name, total in totals.items()}


def rtn_codes(program: Program, group_size: int) -> CodesOf:
    """Round-to-nearest codes of a layer, computed afresh at each call so that no second copy of the model is kept."""
    module = program.graph_module
    return lambda layer, scheme: quantize_weight(layer.matrix(module), group_size, bits=scheme.weight_bits)


def emulate(plan: Mapping[str, Scheme], codes_of: CodesOf, group_size: int) -> OnLinear:
    """``on_linear`` that computes the layers of ``plan`` as their quantized op does on a CPU, the others in float."""

    def on_linear(layer: LinearLayer, x: Tensor, bias: Tensor | None, compute: Compute) -> Tensor:
        scheme = plan.get(layer.name)
        if scheme is None or scheme.is_float:
            return compute()
        wide = x if x.dtype == torch.float64 else x.float()
        weight = dequantize(*codes_of(layer, scheme), group_size, wide.dtype)
        rounded = fake_quantize_activation(wide, group_size, scheme.activation)
        return F.linear(rounded, weight, None if bias is None else bias.to(wide.dtype)).to(x.dtype)

    return on_linear


class LinearInterpreter(Interpreter):
    """Runs a program's graph and hands every call of ``layers`` to ``on_linear(layer, x, bias, compute)``."""

    def __init__(self, program: Program, layers: Sequence[LinearLayer], on_linear: OnLinear) -> None:
        super().__init__(program.graph_module)
        self._calls = {call.node: (layer, call) for layer in layers for call in layer.calls}
        self._on_linear = on_linear

    def run_node(self, n: Node) -> Any:
        if n not in self._calls:
            return super().run_node(n)
        layer, call = self._calls[n]
        bias = None if call.bias is None else self.env[call.bias]
        compute = super().run_node
        return self._on_linear(layer, self.env[call.x], bias, lambda: compute(n))


def run(program: Program, batch: Batch, layers: Sequence[LinearLayer], on_linear: OnLinear) -> Tensor:
    """The program's first floating-point output on a batch."""
    missing = [item.name for item in program.inputs if item.name not in batch]
    if missing:
        raise LincompileError(f"calibration: a batch lacks the input '{missing[0]}' (it has {', '.join(batch)})")
    result = LinearInterpreter(program, layers, on_linear).run(*(batch[item.name] for item in program.inputs))
    values = result if isinstance(result, (tuple, list)) else (result,)
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


@contextmanager
def frozen(program: Program) -> Iterator[None]:
    """Switches the parameters' gradients off for a while: only activations are differentiated here."""
    parameters = [p for p in program.graph_module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _float(layer: LinearLayer, x: Tensor, bias: Tensor | None, compute: Compute) -> Tensor:
    return compute()


def _fisher_batch(
    program: Program,
    layers: Sequence[LinearLayer],
    schemes: Sequence[Scheme],
    batch: Batch,
    codes_of: CodesOf,
    group_size: int,
    seed: int,
    scores: Scores,
) -> int:
    module = program.graph_module

    def replay(layer: LinearLayer, x: Tensor, grad: Tensor) -> None:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        exact = F.linear(wide, layer.matrix(module).to(wide.dtype))
        weights: dict[int, Tensor] = {}
        for scheme in schemes:
            if scheme.weight_bits not in weights:
                weights[scheme.weight_bits] = dequantize(*codes_of(layer, scheme), group_size, wide.dtype)
            rounded = fake_quantize_activation(wide, group_size, scheme.activation)
            change = F.linear(rounded, weights[scheme.weight_bits]) - exact
            per_token = (grad.to(wide.dtype) * change).sum(dim=-1)
            scores.add(layer.name, scheme.name, 0.5 * float(per_token.double().square().sum()))

    real = backward(program, layers, batch, seed, replay)
    for layer in layers:  # a layer whose output doesn't reach the model's still has a score: none
        for scheme in schemes:
            scores.add(layer.name, scheme.name, 0.0)
    return real


def backward(
    program: Program,
    layers: Sequence[LinearLayer],
    batch: Batch,
    seed: int,
    visit: Callable[[LinearLayer, Tensor, Tensor], None],
) -> int:
    """One forward and one backward pass; the number of real tokens.

    ``visit(layer, x, gradient)`` gets every call's input ``[…, K]`` and, of its output ``[…, N]``, the gradient of the
    log-likelihood of ``y`` drawn from the model's own prediction. Memory: one batch's activations.
    """
    roots: list[Tensor] = []

    def on_linear(layer: LinearLayer, x: Tensor, bias: Tensor | None, compute: Compute) -> Tensor:
        y = compute()
        if not y.requires_grad:  # the first layers: gradients need not go further back
            y = y.detach().requires_grad_()
            roots.append(y)
            y = y.view_as(y)
        x = x.detach()

        def hook(grad: Tensor) -> None:
            with torch.no_grad():
                visit(layer, x, grad)

        y.register_hook(hook)  # type: ignore[no-untyped-call]
        return y

    with torch.enable_grad():
        output = run(program, batch, layers, on_linear)
        real = real_tokens(program, batch, output)
        torch.autograd.grad(_log_likelihood(program, output, real, seed), roots, allow_unused=True)
    return int(real.sum())


def _kl_batch(
    program: Program,
    layers: Sequence[LinearLayer],
    schemes: Sequence[Scheme],
    batch: Batch,
    codes_of: CodesOf,
    group_size: int,
    seed: int,
    scores: Scores,
) -> int:
    with torch.no_grad():
        reference = run(program, batch, [], _float)
        for group in groups_of(layers):
            for scheme in schemes:
                plan = {layer.name: scheme for layer in group}
                output = run(program, batch, group, emulate(plan, codes_of, group_size))
                for layer in group:
                    share = _divergence(program, batch, reference, output) / len(group)
                    scores.add(layer.name, scheme.name, share)
    return int(real_tokens(program, batch, reference).sum())


def is_logits(program: Program, output: Tensor) -> bool:
    """Whether an output is one row of logits over the vocabulary for each token."""
    return output.dim() >= 2 and output.shape[-1] in token_tables(program.graph_module)


def _log_likelihood(program: Program, output: Tensor, real: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(output.device).manual_seed(seed)
    if not is_logits(program, output):
        noise = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
        return (output * noise * real.unsqueeze(-1)).sum()
    log_p = output.float().log_softmax(dim=-1)
    drawn = _draw(log_p.detach().flatten(0, -2), generator)
    chosen = log_p.flatten(0, -2).gather(1, drawn).squeeze(1)
    return (chosen * real.flatten()).sum()


def _draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row ``[rows, 1]`` from log-probabilities ``[rows, V]``.

    By the cumulative distribution: one random number a row, where ``multinomial`` draws one for every entry, which on a
    CPU takes a seventh of a whole calibration pass over a vocabulary of 49,152.
    """
    cumulative = log_p.exp().cumsum(dim=-1)
    uniform = torch.rand(len(log_p), 1, generator=generator, device=log_p.device, dtype=log_p.dtype)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.clamp_(max=log_p.shape[1] - 1)


def _divergence(program: Program, batch: Batch, reference: Tensor, output: Tensor) -> float:
    real = real_tokens(program, batch, reference)
    if not is_logits(program, reference):
        return float(((output - reference).double().square().sum(dim=-1) * real).sum() / 2)
    log_p, log_q = reference.float().log_softmax(dim=-1), output.float().log_softmax(dim=-1)
    # A token that the float model excludes (−inf) counts nothing, however sure the other is of that.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return float((terms.sum(dim=-1).double() * real).sum())


def real_tokens(program: Program, batch: Batch, output: Tensor) -> Tensor:
    """1 for each output position that counts, 0 for padding: the shape of ``output`` without its last axis."""
    mask = program.input_with_role("mask")
    shape = output.shape[:-1]
    if mask is not None and batch[mask.name].shape == shape:
        return mask.real(batch[mask.name]).to(torch.float64)
    return torch.ones(shape, dtype=torch.float64, device=output.device)


def _fingerprint(program: Program, layers: Sequence[LinearLayer], calibration: Sequence[Batch], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for layer in layers:
        digest.update(repr((layer.name, layer.out_features, layer.in_features)).encode())
    # All that the scores depend on: a converted model shares its linear layers with the one it came from.
    digest.update(" ".join(str(node.target) for node in program.graph_module.graph.nodes).encode())
    tensors = [*program.graph_module.parameters(), *program.graph_module.buffers()]
    digest.update(str(checksum(tensors)).encode())
    for batch in calibration:
        for name in sorted(batch):
            value = batch[name].detach().cpu().contiguous()
            digest.update(
                repr((name, value.dtype, value.shape)).encode() + value.flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:32]
