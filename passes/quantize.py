"""Replaces linear layers by packed six-bit ones (and eight-bit ones where a plan says so).

Formats follow FlexQ (arXiv 2508.04405): symmetric round-to-nearest weights, one float16 scale per 128 input features,
dynamic symmetric activations per token and group. A layer's *scheme* is one of ``w6a6``, ``w6a8``, ``w6a16``, ``w8a8``
or ``float``; a *plan* is a name of what to do with all of them (:func:`parse_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import ops as _ops  # noqa: F401  registers torch.ops.lincompile
from ..kernels.int6_linear.codes import dequantize, quantize_weight, sqnr_db
from ..kernels.int6_linear.pack import GROUP_SIZE, pack
from .distil.loop import Progress
from .errors import LincompileError, RefusedError
from .graph import Builder, finish, get_attribute, parent_of, set_tensor, target_of
from .pipeline import PassResult, register
from .program import Program
from .quantization.embeddings import LOOKUP, Table, find_tables, pack_table, table_codes, token_lookups
from .quantization.linear_layers import LinearLayer, find_linears
from .quantization.plan import PlanOptions, check_given, choose, load_plan, save_plan
from .quantization.schemes import CHOICES, FLOAT, SCHEMES, PlanSpec, Scheme, parse_plan
from .quantization.sensitivity import Batch, CodesOf
from .quantization.tune import TuneOptions, options_for, tune
from .quantization.tuned_layers import stored_codes
from .quantization.weight_methods import WeightRounder

QUANTIZED_OPS = (torch.ops.lincompile.int6_linear.default, torch.ops.lincompile.int8_linear.default)
_PACKED_OPS = (*QUANTIZED_OPS, LOOKUP)
_CHOICE = {  # what says how schemes are chosen, and the kinds of plan that read it
    "effective_bits": ("auto",),
    "activation_bits": ("int6",),
    "max_latency": ("int6", "auto"),
    "latencies": ("int6", "auto"),
    "scores": ("int6", "auto"),
    "metric": ("int6", "auto"),
    "tolerance": ("int6",),
}


@register("quantize")
@dataclass(frozen=True)
class Quantize:
    """Quantizes a program's linear layers in place; the float weights leave the graph module and its state dict.

    Attributes:
        plan: a ``--quant`` value (:func:`parse_plan`).
        effective_bits: bits per weight of ``plan="auto"``.
        group_size: input features per weight and activation scale.
        lm_head: also the output head, unless tied to an embedding.
        embeddings: also the embedding table that the tokens index, in six bits, and with it a head tied to it (with the
            activations of a uniform plan, otherwise of eight bits).
        skip: ``fnmatch`` patterns of layer names to leave in float, for example ``("*.down_proj",)``.
        min_in_features: layers with fewer input features stay in float.
        method: how weights are rounded: ``rtn``, or with calibration ``clip`` or ``gptq`` (:mod:`.weight_methods`);
            ``auto`` is ``gptq`` with calibration and ``rtn`` without.
        smooth: with calibration, how strongly inputs and weights are balanced first, where that is free and exact
            (:mod:`.smooth`): 0 (not) to 1. By default 1 for activations of at most seven bits on average, otherwise ½.
        metric: sensitivity of the ``int6`` and ``auto`` plans, ``fisher`` or ``kl`` (:mod:`.sensitivity`).
        tolerance: ``int6`` gives a layer six-bit activations as long as the measured divergence of the outputs stays
            within this multiple of what uniform W6A8 causes.
        activation_bits: instead, the average activation bits (weighted by multiplications) that ``int6`` may use.
        max_latency: instead of bits, microseconds per token that the quantized layers may take together (``int6`` and
            ``auto``), by the time of each shape and scheme on the program's device.
        latencies: a JSON file of those times, ``{"NxK": {scheme: microseconds}}``: written once measured; if it is
            there it is used instead.
        calibration: batches (input name → tensor) for ``int6`` and ``auto``. Without them ``int6`` uses eight-bit
            activations everywhere and says so; ``auto`` refuses.
        scores: a JSON file for the sensitivity scores: written as they come, resumed if it is there.
        plan_file: a JSON file of layer → scheme: written once chosen; if it is there it is followed instead.
        schemes: a scheme name per layer name, as a saved plan gives it; layers that it doesn't name follow ``plan``.
        tune: at last, train the stored numbers against the float model (:mod:`.tune`): ``scales`` (and norms and
            biases) or ``codes`` (those as well); nothing is added at run time.
        tune_steps: optimizer steps; with ``tune_time`` alone as many as it has time for, otherwise 200.
        tune_time: seconds.
        tune_batch: batches of calibration per step.
        tune_rate: of the learning rates, a multiple of those that tuning chooses.
        tune_seed: of the order of batches.
        tune_checkpoint: a file that tuning saves itself to and resumes from.
        tune_data: batches to tune on (one in eight is held out to judge the result), by default ``calibration``.
        tune_progress: called after every step with (step, steps expected, loss, tokens per second).

    Raises (from :meth:`run`):
        LincompileError: NaN or infinite weights, unknown layers or schemes in ``schemes`` or ``skip``, options that the
            plan doesn't read; or tuning without text, or one that diverged: the program is quantized then, its codes
            not tuned.
        RefusedError: nothing could be quantized (the message gives the reasons), ``embeddings`` where the table can't
            be packed, or a plan worse than a uniform one that costs no more.
    """

    plan: str = "int6"
    effective_bits: float | None = None
    group_size: int = GROUP_SIZE
    lm_head: bool = False
    embeddings: bool = False
    skip: tuple[str, ...] = ()
    min_in_features: int = 32
    method: str = "auto"
    smooth: float | None = None
    metric: str = "fisher"
    tolerance: float = 1.25
    activation_bits: float | None = None
    max_latency: float | None = None
    latencies: str | None = None
    scores: str | None = None
    plan_file: str | None = None
    calibration: Sequence[Batch] | None = field(default=None, metadata={"text": False}, repr=False)
    schemes: Mapping[str, str] | None = field(default=None, metadata={"text": False})
    tune: str | None = None
    tune_steps: int | None = None
    tune_time: float | None = None
    tune_batch: int = 8
    tune_rate: float = 1.0
    tune_seed: int = 0
    tune_checkpoint: str | None = None
    tune_data: Sequence[Batch] | None = field(default=None, metadata={"text": False}, repr=False)
    tune_progress: Progress | None = field(default=None, metadata={"text": False}, repr=False)

    @property
    def name(self) -> str:
        return "quantize"

    def run(self, program: Program) -> PassResult:
        timed = self.plan.strip().lower() == "auto" and self.max_latency is not None
        spec = PlanSpec("auto") if timed else parse_plan(self.plan, self.effective_bits)
        self._check_choice(spec)
        if spec.kind == "none":
            return PassResult(program, modified=False, report={"plan": self.plan, "layers": [], "skipped": []})
        if self.calibration is not None and not len(self.calibration):
            raise LincompileError(
                "quantize: the calibration set is empty: give at least one batch of the model's inputs, or None"
            )
        tuning, strength = self._tuning(), self._strength(spec)
        module = program.graph_module
        module.graph.eliminate_dead_code()  # an unused layer is no layer
        lookups = token_lookups(program) if self.embeddings else []
        layers = find_linears(
            module, lm_head=self.lm_head, skip=self.skip, min_in_features=self.min_in_features, lookups=lookups
        )
        tables = find_tables(program, lookups, layers) if self.embeddings else []
        heads = {table.head.name for table in tables if table.head is not None}
        todo = [layer for layer in layers if layer.reason is None and layer.name not in heads]
        done = sum(target_of(node) in _PACKED_OPS for node in module.graph.nodes)
        if not todo and not done and not tables:
            raise RefusedError(f"quantize: no layer of the model can be quantized to {self.plan}: {_reasons(layers)}")
        if self.calibration is not None:
            todo = [layer for layer in todo if self._representable(program, layer)]
        given = self.schemes or self.plan_file is not None
        alike = spec.kind != "auto" and not given  # all layers of ``todo`` will have six bits, or all eight
        codes_of = WeightRounder(program, todo, self.method, self.calibration, self.group_size, compensate=alike)
        smoothed = codes_of.smooth(layers, strength) if strength and self.calibration and todo else {}
        chosen, choice = self._choose(program, spec, todo, codes_of)
        teacher = program.clone() if tuning else None  # still in float
        packed = [self._pack(module, table, codes_of.method) for table in tables]
        chosen |= dict.fromkeys(heads, spec.scheme if spec.scheme and spec.scheme.weight_bits == 6 else SCHEMES["w6a8"])
        held = {str(item["head"]): codes for item, codes in packed}

        def rounded(layer: LinearLayer, scheme: Scheme) -> tuple[Tensor, Tensor]:
            return held[layer.name] if layer.name in held else codes_of(layer, scheme)

        report: dict[str, Any] = {"plan": self.plan, "method": codes_of.method, "group_size": self.group_size}
        report |= {"smoothing": {"strength": strength, "layers": len(smoothed)}} if self.calibration else {}
        report |= {"already_quantized_calls": done} | quantize_graph(module, layers, chosen, rounded, self.group_size)
        if self.embeddings:
            report["embeddings"] = [item for item, _ in packed]
            _drop_unused(module, {table.weight for table in tables if table.head is None})
        report |= {"choice": choice} if choice else {}
        if not report["layers"] and not done and not packed and not any(scheme.is_float for scheme in chosen.values()):
            raise RefusedError(f"quantize: no layer of the model can be quantized to {self.plan}: {_reasons(layers)}")
        earlier = program.metadata.get("quantization")
        program.metadata["quantization"] = _with_earlier(earlier, report)
        if tuning is not None and teacher is not None:
            text = self.tune_data or self.calibration or ()
            saved = None if self.tune_checkpoint is None else Path(self.tune_checkpoint)
            by_weight = {str(record["weight"]): record for record in report["layers"]}
            progress = self.tune_progress
            report["tuning"] = tune(teacher, program, by_weight, text, tuning, checkpoint=saved, progress=progress)
            for layer in layers:
                if (record := by_weight.get(layer.weight)) is not None:
                    codes = stored_codes(module, layer.weight, layer.in_features, self.group_size)
                    quality = sqnr_db(layer.matrix(teacher.graph_module), dequantize(*codes, self.group_size))
                    record["sqnr_db"] = round(quality, 2)
            program.metadata["quantization"] = _with_earlier(earlier, report)
        return PassResult(program, modified=bool(report["layers"] or packed), report=report)

    def _pack(self, module: GraphModule, table: Table, method: str) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        try:
            codes = table_codes(get_attribute(module, table.weight).detach(), method, self.group_size)
        except ValueError as error:
            raise RefusedError(f"quantize: the embedding '{table.weight}' can't be packed: {error}") from error
        return pack_table(module, table, *codes, self.group_size), codes

    def _tuning(self) -> TuneOptions | None:
        """The options of tuning, checked before anything is changed; None where it isn't asked for."""
        if self.tune is None:
            names = ("tune_steps", "tune_time", "tune_batch", "tune_rate", "tune_checkpoint", "tune_data")
            unused = [
                item.name for item in fields(self) if item.name in names and getattr(self, item.name) != item.default
            ]
            if unused:
                raise LincompileError(f"quantize: {unused[0]} is about tuning: give tune='scales' or tune='codes', too")
            return None
        if not self.tune_data and not self.calibration:
            raise LincompileError("quantize: tuning needs text: give calibration batches (CLI: --calibrate FILE)")
        return options_for(self.tune, self.tune_steps, self.tune_time, self.tune_batch, self.tune_rate, self.tune_seed)

    def _check_choice(self, spec: PlanSpec) -> None:
        """Every option about choosing schemes needs a plan that chooses by it, and there is one budget at most."""
        defaults = {item.name: item.default for item in fields(self)}
        given = [name for name in _CHOICE if getattr(self, name) != defaults[name]]
        for name in given:
            if spec.kind not in _CHOICE[name]:
                raise LincompileError(
                    f"quantize: {name} has no effect on the plan {self.plan}: it is for {' and '.join(_CHOICE[name])}"
                )
        budgets: list[str] = [name for name in ("effective_bits", "activation_bits", "max_latency") if name in given]
        if ":" in self.plan:
            budgets.insert(0, f"the plan {self.plan}")
        if len(budgets) > 1:
            raise LincompileError(f"quantize: {budgets[0]} and {budgets[1]} are two budgets: give one of them")
        if "latencies" in given and self.max_latency is None:
            raise LincompileError("quantize: latencies are read for max_latency alone: give that, too")
        if "tolerance" in given and budgets:
            raise LincompileError(f"quantize: tolerance is how int6 chooses without a budget: leave out {budgets[0]}")
        measured = [name for name in ("scores", "metric", "tolerance") if name in given]
        if measured and spec.kind == "int6" and not budgets and self.calibration is None:
            raise LincompileError(
                f"quantize: {measured[0]} needs calibration batches: without them int6 has eight-bit activations"
            )

    def _strength(self, spec: PlanSpec) -> float:
        if self.smooth is not None:
            if not 0 <= self.smooth <= 1:
                raise LincompileError(f"quantize: smooth {self.smooth:g}: give a strength from 0 (off) to 1")
            if self.smooth and self.calibration is None:
                raise LincompileError(
                    "quantize: smooth goes by the inputs that calibration shows: give batches of it or leave smooth out"
                )
            return self.smooth
        bits = self.activation_bits if spec.scheme is None else spec.scheme.activation_bits
        return 1.0 if bits is not None and bits <= 7 else 0.5

    def _choose(
        self, program: Program, spec: PlanSpec, layers: list[LinearLayer], codes_of: WeightRounder
    ) -> tuple[dict[str, Scheme], dict[str, Any]]:
        given = dict(self.schemes or {})
        if self.plan_file is not None and Path(self.plan_file).exists():
            given = load_plan(self.plan_file) | given
        names = {layer.name for layer in layers}
        for name, scheme in given.items():
            if name not in names:
                raise LincompileError(f"quantize: the plan names '{name}', which is no quantizable layer of this model")
            if scheme not in SCHEMES:
                raise LincompileError(
                    f"quantize: the plan gives '{name}' the scheme '{scheme}'; the schemes are {', '.join(SCHEMES)}"
                )
        fixed = {name: SCHEMES[scheme] for name, scheme in given.items()}
        free = [layer for layer in layers if layer.name not in fixed]
        options = PlanOptions(
            self.group_size,
            self.metric,
            codes_of.method,
            self.activation_bits,
            self.tolerance,
            self.scores,
            self.max_latency,
            self.latencies,
        )
        chosen, record = fixed, {"note": "every layer's scheme was given"}
        if free:
            chosen, record = choose(program, free, spec, self.calibration, options, codes_of)
            chosen = fixed | chosen
        if fixed and self.calibration:
            record |= check_given(program, layers, chosen, self.calibration, self.group_size, codes_of)
        if self.plan_file is not None and free:
            save_plan(self.plan_file, chosen)
        return chosen, record

    def _representable(self, program: Program, layer: LinearLayer) -> bool:
        """Whether the weights fit float16 scales; otherwise the layer gets the reason and stays in float."""
        try:
            quantize_weight(layer.matrix(program.graph_module), self.group_size)
        except ValueError as error:
            layer.reason = str(error)
        return layer.reason is None


def quantize_graph(
    graph_module: GraphModule,
    layers: Sequence[LinearLayer],
    schemes: Mapping[str, Scheme],
    codes_of: CodesOf,
    group_size: int = GROUP_SIZE,
) -> dict[str, Any]:
    """Rewrite ``layers`` (from :func:`find_linears` on the same graph) in place, each by its scheme and its codes.

    Buffers are registered beside the weight they replace: ``<weight>_hi``, ``<weight>_lo`` and ``<weight>_scale``, or
    ``<weight>_int8`` and ``<weight>_scale``, where ``<weight>`` is the parameter's dotted name. The parameter goes.

    Returns:
        The report: ``layers`` and ``skipped`` (one record each) and ``totals``.
    """
    done: list[dict[str, Any]] = []
    skipped = [_record(layer) | {"reason": layer.reason} for layer in layers if layer.reason is not None]
    for layer in layers:
        scheme = schemes.get(layer.name, FLOAT)
        if layer.reason is not None:
            continue
        if scheme.is_float:
            skipped.append(_record(layer) | {"reason": "kept in float by the plan"})
            continue
        parameter = get_attribute(graph_module, layer.weight)
        weight = layer.matrix(graph_module)
        try:
            codes, scale = codes_of(layer, scheme)
        except ValueError as error:
            layer.reason = str(error)
            skipped.append(_record(layer) | {"reason": layer.reason})
            continue
        quality = sqnr_db(weight, dequantize(codes, scale, group_size))
        buffers = _buffers(codes, scale, scheme, group_size)
        if taken := [suffix for suffix, value in buffers.items() if _taken(graph_module, layer.weight + suffix, value)]:
            layer.reason = f"the model has a tensor '{layer.weight}{taken[0]}' of its own"
            skipped.append(_record(layer) | {"reason": layer.reason})
            continue
        for suffix, tensor in buffers.items():
            set_tensor(graph_module, layer.weight + suffix, tensor)
        for call in layer.calls:
            _replace(graph_module, call.node, call.x, call.bias, layer.weight, buffers, scheme, group_size)
        packed = sum(tensor.numel() * tensor.element_size() for tensor in buffers.values())
        done.append(
            _record(layer)
            | {
                "scheme": scheme.name,
                "bytes_before": parameter.numel() * parameter.element_size(),
                "bytes_after": packed,
                "bytes_per_weight": round(packed / layer.weights, 5),
                "sqnr_db": round(quality, 2),
            }
        )
    finish(graph_module)
    _drop_unused(graph_module, {str(record["weight"]) for record in done})
    return {"layers": done, "skipped": skipped, "totals": _totals(done, skipped)}


def _taken(module: GraphModule, path: str, value: Tensor) -> bool:
    """Whether something else than ``value`` has that name (an embedding's planes may be a tied head's)."""
    try:
        found = get_attribute(module, path)
    except AttributeError:
        return False
    same = isinstance(found, Tensor) and found.dtype == value.dtype and found.shape == value.shape
    return not (same and torch.equal(found, value))


def _buffers(codes: Tensor, scale: Tensor, scheme: Scheme, group_size: int) -> dict[str, Tensor]:
    if scheme.weight_bits == 8:
        return {"_int8": codes, "_scale": scale}
    hi, lo = pack(codes, group_size)
    return {"_hi": hi, "_lo": lo, "_scale": scale}


def _replace(
    module: GraphModule,
    node: Node,
    x: Node,
    bias: Node | None,
    weight: str,
    buffers: Mapping[str, Tensor],
    scheme: Scheme,
    group_size: int,
) -> None:
    build = Builder(module, node)
    operands = [build.attribute(weight + suffix, tensor) for suffix, tensor in buffers.items()]
    op = QUANTIZED_OPS[0] if scheme.weight_bits == 6 else QUANTIZED_OPS[1]
    node.replace_all_uses_with(build(op, x, *operands, bias, group_size, scheme.activation))
    module.graph.erase_node(node)


def _drop_unused(module: GraphModule, weights: set[str]) -> None:
    """Delete the float parameters that no node reads any more, under every name they are registered by."""
    dropped = {id(get_attribute(module, path)) for path in weights}
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in dropped]
    for name in names:
        assert name not in read, f"{name} is still read after quantization"
        owner, leaf = parent_of(module, name)
        delattr(owner, leaf)


def _record(layer: LinearLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "weight": layer.weight,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "calls": len(layer.calls),
    }


def _totals(done: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(record["out_features"] * record["in_features"] for record in done)
    after = sum(record["bytes_after"] for record in done)
    schemes: dict[str, int] = {}
    for record in done:
        schemes[record["scheme"]] = schemes.get(record["scheme"], 0) + 1
    return {
        "layers": len(done),
        "skipped": len(skipped),
        "schemes": schemes,
        "weights": weights,
        "bytes_before": sum(record["bytes_before"] for record in done),
        "bytes_after": after,
        "bytes_per_weight": round(after / weights, 5) if weights else None,
    }


def _with_earlier(earlier: Mapping[str, Any] | None, report: dict[str, Any]) -> dict[str, Any]:
    """The record of a program that an earlier pass has quantized in part: ``report``, with what that pass packed.

    ``earlier`` then lists how (plan, method, choice, tuning). What a pass skipped, the next one packs or skips anew.
    """
    if earlier is None:
        return report
    packed = bool(report["layers"] or report.get("embeddings"))
    layers = [*earlier["layers"], *report["layers"]]
    merged = dict(report if packed else earlier)
    merged |= {"layers": layers, "skipped": report["skipped"], "totals": _totals(layers, report["skipped"])}
    if tables := [*earlier.get("embeddings", []), *report.get("embeddings", [])]:
        merged["embeddings"] = tables
    if packed:
        about_layers = ("layers", "skipped", "totals", "embeddings", "earlier")
        how = {key: value for key, value in earlier.items() if key not in about_layers}
        merged["earlier"] = [*earlier.get("earlier", []), how]
        choices = [record.get("choice", {}) for record in (earlier, report)]
        if scores := {name: score for choice in choices for name, score in choice.get("scores", {}).items()}:
            merged["choice"] = choices[-1] | {"scores": scores}
    return merged


def _reasons(layers: Sequence[LinearLayer]) -> str:
    if not layers:
        return "it has no linear layer with a parameter"
    counts: dict[str, list[str]] = {}
    for layer in layers:
        counts.setdefault(str(layer.reason), []).append(layer.name)
    return "; ".join(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
                     for reason, names in counts.items())  # fmt: skip


__all__ = [
    "CHOICES",
    "FLOAT",
    "SCHEMES",
    "PlanSpec",
    "Quantize",
    "Scheme",
    "parse_plan",
    "quantize_graph",
]
