"""From sensitivity scores to a scheme per layer: budgets, the exact choice, and the check that it was worth it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LincompileError, RefusedError
from ..program import Program
from ..writing import beside
from .allocate import Frontier, Option
from .latency import Latencies, load_latencies, measure_latencies, shape_of
from .linear_layers import LinearLayer
from .schemes import SCHEMES, PlanSpec, Scheme
from .sensitivity import Batch, CodesOf, Scores, divergence, groups_of, measure

_PLAN_FORMAT = 1
_SLACK = 1.001  # float32 sums of the same plan differ by a thousandth between runs
INT6 = ("w6a6", "w6a8")
AUTO = ("w6a6", "w6a8", "w8a8", "float")
Cost = Callable[[LinearLayer, Scheme], int]


@dataclass(frozen=True)
class PlanOptions:
    """What a choice depends on besides the model; the fields of the same names of ``Quantize`` explain them."""

    group_size: int
    metric: str
    method: str
    activation_bits: float | None
    tolerance: float
    scores: str | None
    max_latency: float | None = None
    latencies: str | None = None


def choose(
    program: Program,
    layers: Sequence[LinearLayer],
    spec: PlanSpec,
    calibration: Sequence[Batch] | None,
    options: PlanOptions,
    codes_of: CodesOf,
) -> tuple[dict[str, Scheme], dict[str, Any]]:
    """A scheme for every layer, and the record of how it was chosen.

    Raises:
        LincompileError: ``auto`` without calibration, an empty calibration set, or a budget that no plan can meet.
        RefusedError: the measured divergence of the chosen plan exceeds that of the best uniform plan that costs no
            more; the message gives both.
    """
    if spec.scheme is not None:
        return {layer.name: spec.scheme for layer in layers}, {}
    if calibration is None:
        if spec.kind == "auto" or options.activation_bits is not None or options.max_latency is not None:
            raise LincompileError(
                "quantize: choosing schemes for a budget needs calibration batches: give calibration text (CLI:"
                " --distil FILE) or a uniform plan such as w6a8"
            )
        note = "no calibration batches: eight-bit activations everywhere (w6a8)"
        return {layer.name: SCHEMES["w6a8"] for layer in layers}, {"note": note}
    names = AUTO if spec.kind == "auto" else INT6
    cost = _costs(program, layers, spec, options)
    scored = [SCHEMES[name] for name in names if name != "float"]
    for layer in layers:  # now and in order: a rounder collects what it needs for a few neighbouring layers at a time
        for scheme in {scheme.weight_bits: scheme for scheme in scored}.values():
            codes_of(layer, scheme)
    scores = measure(
        program, layers, scored, calibration,
        codes_of=codes_of,
        method=options.method,
        metric=options.metric, group_size=options.group_size, path=options.scores,
    )  # fmt: skip
    groups = groups_of(layers)
    frontier = Frontier([[_option(group, SCHEMES[name], scores, cost) for name in names] for group in groups])
    bits = spec.effective_bits if spec.kind == "auto" else options.activation_bits
    asked = options.max_latency if options.max_latency is not None else bits
    if asked is not None:
        unit, what = _multiplications(layers), "activation bits"
        if spec.kind == "auto":
            unit, what = sum(layer.weights for layer in layers), "bits per weight"
        if options.max_latency is not None:
            unit, what = 1000, "microseconds per token"
        smallest = math.ceil(frontier.costs[0] / unit * 1000) / 1000
        budget = math.floor(asked * unit)
        index = frontier.within_cost(budget, f"{asked:g} {what} asked for, the smallest possible is {smallest:g}")
        plan = _plan(groups, frontier.choices(index))
        record = _check_against_uniform(
            program, layers, [scheme.name for scheme in scored], cost, plan, budget, calibration, options, codes_of
        )
        record["cost"] = {what: round(float(frontier.costs[index]) / unit, 4)}
    else:
        plan, record = _within_tolerance(program, layers, groups, frontier, scores, calibration, options, codes_of)
    record |= _predictions(layers, plan, scores)
    return plan, record | {"metric": scores.metric, "tokens": scores.tokens, "scores": _per_layer(scores)}


def check_given(
    program: Program,
    layers: Sequence[LinearLayer],
    plan: Mapping[str, Scheme],
    calibration: Sequence[Batch],
    group_size: int,
    codes_of: CodesOf,
) -> dict[str, Any]:
    """The measured divergence of a plan that was (partly) given, beside that of uniform W6A8.

    Raises:
        RefusedError: it diverges more than uniform W6A8 although it saves nothing against it.
    """
    uniform = {layer.name: SCHEMES["w6a8"] for layer in layers}
    measured = divergence(program, layers, {"plan": plan, "w6a8": uniform}, calibration, codes_of, group_size)
    saves = any(plan[layer.name].activation_bits < 8 for layer in layers)
    if not saves and measured["plan"] > measured["w6a8"] * _SLACK:
        raise RefusedError(
            f"quantize: the given plan diverges more (KL {measured['plan']:.3g}) than uniform w6a8 (KL"
            f" {measured['w6a8']:.3g}), which costs no more: use --quant w6a8, or edit the plan"
        )
    return {"kl": measured}


def _within_tolerance(
    program: Program,
    layers: Sequence[LinearLayer],
    groups: Sequence[Sequence[LinearLayer]],
    frontier: Frontier,
    scores: Scores,
    calibration: Sequence[Batch],
    options: PlanOptions,
    codes_of: CodesOf,
) -> tuple[dict[str, Scheme], dict[str, Any]]:
    """The cheapest plan whose *measured* divergence stays within ``tolerance`` times that of uniform W6A8.

    The scores propose; each proposal is measured, and the limit on the predicted loss lowered until one holds. Uniform
    W6A8 itself holds, so there always is an answer.
    """
    uniform = {layer.name: SCHEMES["w6a8"] for layer in layers}
    baseline = divergence(program, layers, {"w6a8": uniform}, calibration, codes_of, options.group_size)["w6a8"]
    allowed = options.tolerance * baseline
    limit = options.tolerance * sum(scores.of(layer.name, "w6a8") for layer in layers)
    tried: list[dict[str, float]] = []
    for _ in range(6):
        index = frontier.within_score(limit)
        plan = _plan(groups, frontier.choices(index))
        found = divergence(program, layers, {"plan": plan}, calibration, codes_of, options.group_size)["plan"]
        tried.append({"predicted": float(frontier.scores[index]), "measured": found})
        if found <= allowed:
            break
        floor = float(frontier.scores[-1])
        limit = floor + (float(frontier.scores[index]) - floor) * min(0.9, allowed / found)
    else:
        plan, found = uniform, baseline
    return plan, {"kl": {"plan": found, "w6a8": baseline}, "tolerance": options.tolerance, "tried": tried}


def _check_against_uniform(
    program: Program,
    layers: Sequence[LinearLayer],
    names: Sequence[str],
    cost: Cost,
    plan: dict[str, Scheme],
    budget: int,
    calibration: Sequence[Batch],
    options: PlanOptions,
    codes_of: CodesOf,
) -> dict[str, Any]:
    uniform = {
        name: {layer.name: SCHEMES[name] for layer in layers}
        for name in names
        if sum(cost(layer, SCHEMES[name]) for layer in layers) <= budget
    }
    measured = divergence(program, layers, {"plan": plan} | uniform, calibration, codes_of, options.group_size)
    if not uniform:
        return {"kl": measured, "budget": budget}
    best = min(uniform, key=lambda name: measured[name])
    if measured["plan"] > measured[best] * _SLACK:
        raise RefusedError(
            f"quantize: the chosen plan diverges more (KL {measured['plan']:.3g}) than uniform {best} (KL"
            f" {measured[best]:.3g}), which costs no more: use --quant {best}, or calibrate on more text"
        )
    return {"kl": measured, "budget": budget}


def _option(group: Sequence[LinearLayer], scheme: Scheme, scores: Scores, cost: Cost) -> Option:
    total = sum(cost(layer, scheme) for layer in group)
    return Option(scheme.name, total, sum(scores.of(layer.name, scheme.name) for layer in group))


def _costs(program: Program, layers: Sequence[LinearLayer], spec: PlanSpec, options: PlanOptions) -> Cost:
    """Cost of a layer under a scheme in whole units: nanoseconds where there is a limit on time, otherwise bits stored
    for ``auto``, and for ``int6`` activation bits weighted by the layer's multiplications.
    """
    if options.max_latency is not None:
        table = _latencies(program, layers, AUTO if spec.kind == "auto" else INT6, options)
        return lambda layer, scheme: round(1000 * table[shape_of(layer)][scheme.name]) * len(layer.calls)
    if spec.kind == "auto":
        return lambda layer, scheme: 8 * scheme.weight_bytes(layer.out_features, layer.in_features, options.group_size)
    return lambda layer, scheme: scheme.activation_bits * _multiplications([layer])


def _latencies(
    program: Program, layers: Sequence[LinearLayer], names: Sequence[str], options: PlanOptions
) -> Latencies:
    if options.latencies is not None and Path(options.latencies).exists():
        table = load_latencies(options.latencies)
        for layer in layers:
            lacking = [name for name in names if name not in table.get(shape_of(layer), {})]
            if lacking:
                raise LincompileError(
                    f"latencies '{options.latencies}' lack {lacking[0]} for {shape_of(layer)} ('{layer.name}'): delete"
                    " the file to measure again"
                )
        return table
    weight = layers[0].matrix(program.graph_module)
    table = measure_latencies(layers, names, options.group_size, weight.device, weight.dtype)
    if options.latencies is not None:
        with beside(Path(options.latencies), "the latencies") as file:
            file.write_text(json.dumps(table, indent=1) + "\n")
    return table


def _plan(groups: Sequence[Sequence[LinearLayer]], choices: Sequence[str]) -> dict[str, Scheme]:
    return {layer.name: SCHEMES[name] for group, name in zip(groups, choices, strict=True) for layer in group}


def _predictions(layers: Sequence[LinearLayer], plan: Mapping[str, Scheme], scores: Scores) -> dict[str, Any]:
    bits = sum(plan[layer.name].activation_bits * _multiplications([layer]) for layer in layers)
    return {
        "predicted_kl": sum(scores.of(layer.name, plan[layer.name].name) for layer in layers),
        "activation_bits": bits / _multiplications(layers),
    }


def _multiplications(layers: Sequence[LinearLayer]) -> int:
    """Per token."""
    return sum(layer.weights * len(layer.calls) for layer in layers)


def _per_layer(scores: Scores) -> dict[str, dict[str, float]]:
    return {layer: {scheme: scores.of(layer, scheme) for scheme in per} for layer, per in scores.sums.items()}


def save_plan(path: str | os.PathLike[str], plan: Mapping[str, Scheme]) -> None:
    """Write ``{"layers": {name: scheme}}`` as JSON, to be edited and given back.

    Raises:
        LincompileError: the file can't be written.
    """
    record = {"format": _PLAN_FORMAT, "layers": {name: scheme.name for name, scheme in plan.items()}}
    with beside(Path(path), "the plan") as file:
        file.write_text(json.dumps(record, indent=1) + "\n")


def load_plan(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what :func:`save_plan` wrote; layers and schemes are checked by the pass.

    Raises:
        LincompileError: not such a file.
    """
    try:
        record = json.loads(Path(path).read_text())
        layers = record["layers"]
        if record["format"] != _PLAN_FORMAT or not isinstance(layers, dict):
            raise ValueError("another format version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LincompileError(f"quantization plan '{path}' can't be read ({error}); delete or repair it") from error
    return {str(name): str(scheme) for name, scheme in layers.items()}


__all__ = ["PlanOptions", "check_given", "choose", "load_plan", "save_plan"]
