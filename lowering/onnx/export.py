"""Writing a step program as an ONNX model that stock onnxruntime runs, state in and state out."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from ...passes.errors import LincompileError
from ...passes.graph import module_path, uncached_fakes
from ..artefact.graph_file import Positional, example_inputs
from .extra import require

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...passes.stateful import StepProgram

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
GENAI_FILE = "genai_config.json"
DEFAULT_OPSET = 21
EMBEDDINGS = ("float", "int6")
STANDARD = "std"
OPSETS = range(21, 24)  # what the bodies are written for, up to what the exporter converts to
DEFAULT_CONTEXT = 2048  # for genai, where the model doesn't bound it
IR_VERSION = 10  # onnxruntime ≥ 1.20 reads it; newer IR versions add nothing used here
# protobuf stops at 2 GiB; above this the weights lie beside the graph.
_EXTERNAL_THRESHOLD = 1 << 30
_EXTERNAL_TENSOR_BYTES = 1024
_UNKNOWN_OP = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>")


@dataclass
class OnnxReport:
    """What was written.

    Attributes:
        path: the model file.
        bytes: model and external data together.
        parameters: weights stored, a quantized one counting once.
        operators: how many nodes of each operator, contrib ones with their domain.
        states: name, role and shape (batch left out) of each state.
        quantized: linears lowered from six or eight bits, their weights and activations.
        verified: largest and root mean square difference of the logits from the program's, relative; ``sensitivity``
            is how far the program's own move with the last bits of its weights (quantized activations only).
        notes: what a user should know (no portable body, genai can't load it …).
    """

    path: str
    bytes: int
    opset: int
    layout: str
    seconds: float
    parameters: int
    operators: dict[str, int]
    states: list[dict[str, Any]]
    quantized: dict[str, Any]
    verified: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The JSON-able form."""
        return asdict(self)


def export_onnx(
    step: StepProgram,
    folder: str | Path,
    *,
    layout: str = "planes",
    opset: int | str = DEFAULT_OPSET,
    genai: bool = True,
    bodies: bool = True,
    context_length: int | None = None,
    special_tokens: Mapping[str, int | list[int]] | None = None,
    embeddings: str = "float",
    external_data: bool | None = None,
    verify: bool = True,
) -> OnnxReport:
    """Write ``model.onnx`` (with ``model.onnx.data`` when big) and ``genai_config.json`` into ``folder``.

    Args:
        step: the stateful program. In bfloat16 or float16 it is computed in float32 and its weights are stored in
            their 16 bits (:mod:`.half`).
        folder: made when missing; files of the same names are replaced, each only once it is complete.
        layout: ``planes`` (six bits in memory), ``int8`` (eight in memory, faster) or ``native`` (six, with kernels of
            the native library where it runs, for linear attention too); see :mod:`.quantized`, :mod:`.native`.
        opset: 21 to 23; or ``"std"``: operators of ai.onnx alone (opset 27), which any runtime of that opset runs.
            onnxruntime runs the linear attention of such a file several times slower.
        genai: also write onnxruntime-genai's configuration, and dummy conv states where it needs them.
        bodies: attach portable bodies to the contrib operators (:mod:`.functions`).
        context_length: the longest sequence, for genai; by default the program's bound, or 2048.
        special_tokens: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` for genai.
        embeddings: ``float``, or ``int6`` to round the embedding (and a head tied to it) to six bits: a smaller file
            of a slightly different model.
        external_data: None lets the size decide.
        verify: run the file against the program before it is put into place (skipped, with a note, where onnxruntime
            isn't installed).

    Raises:
        LincompileError: a package is missing, an option is unknown, ``folder`` is a file, an op has no ONNX form (the
            message names it), or the file's logits aren't the program's.
    """
    require("onnx", "onnxscript")
    from ..verify import holding
    from .chosen_rows import choose_logits
    from .embeddings import lower_embeddings, lower_packed_embeddings
    from .functions import STANDARD_OPSET, attach_bodies, standard_operators_only
    from .genai import genai_config, genai_obstacles, shares_cache
    from .half import store_in_half, widened
    from .lawcat import lower_sites
    from .layers import fuse_layers
    from .metadata import Signature
    from .native import lower_attention
    from .quantized import LAYOUTS, QuantizedReport, lower_quantized
    from .signature import bind_signature
    from .simplify import simplify
    from .sites import fuse_sites
    from .verify import verify as compare
    from .verify import verify_widened
    from .windows import constant_windows

    standard = opset == STANDARD
    version = DEFAULT_OPSET if standard else opset
    if version not in OPSETS:
        raise LincompileError(f"opset {opset} is not supported (choose {OPSETS[0]} to {OPSETS[-1]}, or {STANDARD})")
    if layout not in LAYOUTS:
        raise LincompileError(f"unknown int6 layout '{layout}' (choose from: {', '.join(LAYOUTS)})")
    if standard and layout == "native":
        raise LincompileError(
            f"--layout native has operators of its own, --opset {STANDARD} standard ones: leave out one"
        )
    if embeddings not in EMBEDDINGS:
        raise LincompileError(f"unknown embeddings '{embeddings}' (choose from: {', '.join(EMBEDDINGS)})")
    destination = Path(folder)
    if destination.exists() and not destination.is_dir():
        raise LincompileError(f"{destination} is a file: name a folder to write (-o)")
    started = time.perf_counter()
    given, (step, halves) = step, widened(step)
    notes: list[str] = []
    fused, unfused = step, ""
    if layout == "native":
        fused, _, unfused = fuse_sites(step)
        if unfused:
            notes.append(f"attention beside a window stays in stock operators: {unfused}")
    model = _translate(fused, int(version))
    quantized = QuantizedReport()
    packed = lower_packed_embeddings(model, quantized)
    lower_quantized(model, layout, quantized)
    rounded = lower_embeddings(model, model.graph.inputs[0], quantized) if embeddings == "int6" and not packed else None
    states = constant_windows(model, lower_sites(model, step.states), step.windows)
    growing = {state.site for state in states if state.role == "key"}
    windows = {site: window for site, window in step.windows.items() if site in growing}
    bound = bind_signature(model, states, dummy_conv=genai, whole_mask=bool(growing - set(windows)))
    signature = Signature(
        bound,
        _vocabulary(model),
        causal=step.causal,
        max_positions=step.max_positions,
        uniform_positions=step.uniform_positions,
        windows=windows,
    )
    signature.store(model)
    _clean(model)
    simplify(model)
    _clean(model)
    if layout == "native":
        lower_attention(model)
        fuse_layers(model)
    if standard:
        standard_operators_only(model)
        _clean(model)
    elif bodies:
        notes += attach_bodies(model)
    store_in_half(model, halves)
    if step.causal:
        choose_logits(model)
    if halves:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
        notes.append(
            f"{names} weights are stored as they are and computed with in float32, onnxruntime's type on a CPU"
        )
    genai = genai and step.causal
    obstacles = genai_obstacles(bound) if genai else []
    rounding = sorted(set(quantized.activations) - {"a16"})
    if rounding:
        notes.append(
            f"activations are rounded to {' and '.join(name[1:] for name in rounding)} bits: greedy tokens can differ "
            "from torch's at near ties, as torch's own do between two orders of summation (w6a16 doesn't have this)"
        )
    notes += [f"onnxruntime-genai can't load this model: {reason}" for reason in obstacles]
    destination.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {}

    def check(file: Path) -> None:
        if not verify:
            return
        if find_spec("onnxruntime") is None:
            notes.append("not run against the program: onnxruntime isn't installed")
            return
        with holding(*rounded) if rounded else nullcontext():
            measured.update(compare(step, file, bool(rounding)))
        if halves:
            measured.update(verify_widened(given, step, signature.vocabulary))

    size = _save(model, destination, external_data, check)
    if genai and not obstacles:
        context = context_length or step.max_positions or DEFAULT_CONTEXT
        config = genai_config(
            bound, signature.vocabulary, context, special_tokens or {}, MODEL_FILE, shares_cache(model)
        )
        (destination / GENAI_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return OnnxReport(
        path=str(destination / MODEL_FILE),
        bytes=size,
        opset=STANDARD_OPSET if standard else int(version),
        layout=layout,
        seconds=round(time.perf_counter() - started, 1),
        parameters=sum(_elements(value) for value in _float_weights(model)) + quantized.weights,
        operators=_operators(model),
        states=[{"name": s.past, "role": s.role, "shape": list(s.shape)} for s in bound],
        quantized=asdict(quantized),
        verified=measured,
        notes=notes,
    )


def _translate(step: StepProgram, opset: int) -> ir.Model:
    from .translations import translation_table

    module = step.graph_module
    _require_float32(module)
    example, axes = example_inputs(step.states)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)  # it warns that torchvision's operators are missing
        with warnings.catch_warnings(), uncached_fakes():
            warnings.simplefilter("ignore")  # deprecations inside the exporter itself
            program = torch.export.export(
                Positional(module), tuple(example), dynamic_shapes=(tuple(axes),), strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translation_table(),
                verbose=False,
                report=False,
                verify=False,
                optimize=False,
            )
    except LincompileError:
        raise
    except Exception as error:
        own = _own_error(error)
        if own is not None:
            raise own from error
        reason = _unsupported(module, error) or _reason(error)
        raise LincompileError(f"the step program can't be exported to ONNX: {reason}") from error
    finally:
        exporter.setLevel(level)
    assert exported is not None
    model = exported.model
    _inline_and_fold(model)
    model.ir_version = IR_VERSION
    return model


def _inline_and_fold(model: ir.Model) -> None:
    """Inline torch's function library and fold small constants.

    Not the exporter's ``optimize=True``: its rewrite rules match constants with a tolerance of 1e-8, so that "+ 1e-10"
    counts as "+ 0" and disappears, and the normaliser then divides by zero.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer

    common.InlinePass()(model)
    # A transposed weight stays a node (onnxruntime folds it when it loads): a tied table is then stored once.
    optimizer.fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _require_float32(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        packed_scale = tensor.dtype == torch.float16 and name.endswith("scale")
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and not packed_scale:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise LincompileError(
                f"'{name}' is {dtype}; onnxruntime's CPU kernels for these operators compute in float32: "
                "compile the model with --dtype float32 (or call .float() before capturing it)"
            )


def _own_error(error: BaseException) -> LincompileError | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LincompileError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _unsupported(module: nn.Module, error: BaseException) -> str | None:
    """The op that has no ONNX form, where the model uses it, and what to do; None where that isn't the trouble."""
    found = _UNKNOWN_OP.search(_reason(error))
    if found is None or not isinstance(module, GraphModule):
        return None
    op = f"{found[1]}.{found[2]}"
    users = [node for node in module.graph.nodes if node.op == "call_function" and str(node.target) == op]
    places = list(dict.fromkeys(module_path(node) or f"node '{node.name}'" for node in users))
    where = (
        f" (in {', '.join(places[:3])}{'' if len(places) < 4 else f' and {len(places) - 3} more'})" if places else ""
    )
    return f"the op {op} has no ONNX form{where}; write it with other ops, or use --target aot, which runs every op"


def _reason(error: BaseException) -> str:
    """The innermost cause in one line, with the op and where it came from when the exporter names them."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(cause).split())[:400] or type(cause).__name__


def _clean(model: ir.Model) -> None:
    """Share equal subexpressions (the exporter repeats rotary caches and masks in each layer); drop what is unused."""
    import onnx_ir.passes.common as common

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.TopologicalSortPass()(model)
    common.NameFixPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)


def _save(model: ir.Model, folder: Path, external_data: bool | None, check: Callable[[Path], None]) -> int:
    """Write, check and move into place; returns the bytes written."""
    import onnx
    import onnx_ir as ir

    if external_data is None:
        external_data = sum(_bytes(value) for value in model.graph.initializers.values()) > _EXTERNAL_THRESHOLD
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
        path = Path(scratch) / MODEL_FILE
        if external_data:
            ir.save(model, path, external_data=DATA_FILE, size_threshold_bytes=_EXTERNAL_TENSOR_BYTES)
        else:
            ir.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        check(path)
        stale = folder / DATA_FILE
        if not external_data and stale.exists():
            stale.unlink()
        written = sorted(Path(scratch).iterdir(), reverse=True)  # the data first, then the file that refers to it
        total = sum(item.stat().st_size for item in written)
        for item in written:
            os.replace(item, folder / item.name)
    return total


def _vocabulary(model: ir.Model) -> int:
    logits = model.graph.outputs[0]
    size = logits.shape[-1] if logits.shape is not None else None
    if not isinstance(size, int):
        raise LincompileError("the last axis of the model's output isn't a fixed size: not the logits of a vocabulary?")
    return size


def _float_weights(model: ir.Model) -> list[ir.Value]:
    """Stored weights that aren't quantized (single numbers and the scales of quantized ones left out)."""
    return [
        value
        for name, value in model.graph.initializers.items()
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and _elements(value) > 1
        and "onnx_scale" not in name
    ]


def _elements(value: ir.Value) -> int:
    return int(value.const_value.size) if value.const_value is not None else 0


def _bytes(value: ir.Value) -> int:
    return int(value.const_value.nbytes) if value.const_value is not None else 0


def _operators(model: ir.Model) -> dict[str, int]:
    names = (f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes())
    return dict(sorted(Counter(names).items()))
