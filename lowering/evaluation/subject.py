"""What is measured: an artefact or an uncompiled model, behind the same session, so that both run the same code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.fx import Node

from ...passes.canonicalize import Canonicalize
from ...passes.errors import LincompileError, RefusedError
from ...passes.formats.load import load_model
from ...passes.formats.loaded import LoadedModel
from ...passes.graph import aten, target_of
from ...passes.identity import ProveAttention
from ...passes.pipeline import Pipeline
from ...passes.program import Program
from ...passes.stateful import StepProgram, make_stateful
from ..artefact.files import MANIFEST
from ..generate import Session, StepSession, chunk_of
from ..package import Artefact, open_artefact
from ..tokenizer import TextCodec, codec_of
from ..triton import lower

LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.slice.Tensor)


@dataclass
class Subject:
    """A language model to measure.

    Attributes:
        name: what reports call it.
        session: the runtime of its step program.
        codec: its tokenizer; None where it has none.
        eos_ids: tokens that end a text.
        step: the step program, whose graph says what bounds the positions; None on other runtimes than torch.
    """

    name: str
    session: StepSession
    codec: TextCodec | None
    eos_ids: Sequence[int]
    step: StepProgram | None

    @property
    def chunk(self) -> int:
        """Tokens of a prompt to read at a time."""
        return chunk_of(self.session)

    def tokenizer(self, purpose: str) -> TextCodec:
        """The tokenizer; a ``LincompileError`` that names the purpose where there is none."""
        if self.codec is None:
            raise LincompileError(f"{self.name} has no tokenizer, and {purpose} needs text: add tokenizer.json")
        return self.codec

    def beyond_configuration(self) -> Subject:
        """The subject without the bound on positions that its configuration names.

        Raises:
            LincompileError: a table of positions ends there, so nothing lies beyond.
        """
        if self.session.max_positions is None:
            return self
        if self.step is None or not isinstance(self.session, Session):
            raise LincompileError("--extrapolate goes with --runtime torch: exported programs hold rotary tables")
        if (lookup := position_lookup(self.step)) is not None:
            raise LincompileError(
                f"{self.name} looks its positions up in a table ('{lookup.name}'), which ends at "
                f"{self.session.max_positions}: leave --extrapolate out"
            )
        session = Session(replace(self.session.program, max_positions=None), vocab_size=self.session.vocab_size)
        return replace(self, session=session)


def position_lookup(step: StepProgram) -> Node | None:
    """The first op that picks rows by position: a table that ends somewhere. None where positions only enter sums."""
    nodes: list[Node] = list(step.graph_module.graph.nodes)
    reached = {[node for node in nodes if node.op == "placeholder"][1]}  # (tokens, positions, mask, …)
    for node in nodes:
        if node.op != "call_function" or reached.isdisjoint(node.all_input_nodes):
            continue
        picked: list[Node] = []
        torch.fx.map_arg(node.args[1:], picked.append)
        if target_of(node) in LOOKUPS and not reached.isdisjoint(picked):
            return node
        reached.add(node)
    return None


def of_artefact(artefact: Artefact, session: StepSession | None = None) -> Subject:
    """An artefact on the torch runtime, or on the runtime of ``session``."""
    session = session or artefact.session
    codec = artefact.tokenizer if artefact.has_tokenizer else None
    step = artefact.step if isinstance(session, Session) and session.program is artefact.session.program else None
    return Subject(str(artefact.directory), session, codec, tuple(artefact.eos_ids), step)


def of_model(loaded: LoadedModel, program: Program, name: str | None = None) -> Subject:
    """A captured model as it is, its softmax attention with a KV cache.

    Raises:
        RefusedError: no step form: an encoder, or attention that isn't proved.
    """
    return of_program(Pipeline([Canonicalize(), ProveAttention()])(program), loaded, name)


def of_program(program: Program, loaded: LoadedModel, name: str | None = None) -> Subject:
    """A proved, rewritten or quantized program of a loaded model.

    Raises:
        RefusedError: no step form.
    """
    name = name or str(loaded.source)
    try:
        step = make_stateful(program, check=program.metadata.get("quantization") is None)
    except RefusedError as error:
        raise RefusedError(f"{name} can't be read token by token: {error}") from error
    on_gpu = any(parameter.is_cuda for parameter in program.graph_module.parameters())
    session = Session(lower(step, decoding=True)[0] if on_gpu else step, plain=step)
    codec = None if loaded.tokenizer is None else codec_of(loaded.tokenizer)
    return Subject(name, session, codec, tuple(loaded.eos_token_ids), step)


def open_subject(
    model: str,
    *,
    runtime: str = "torch",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    note: Callable[[str], None] = lambda text: None,
) -> Subject:
    """Opens MODEL_OR_DIR.

    Raises:
        LincompileError: it can't be loaded, has no step form, or has no such runtime.
    """
    if (Path(model) / MANIFEST).is_file():
        artefact = open_artefact(model, device=device)
        return of_artefact(artefact, session_of(artefact, runtime))
    if runtime != "torch":
        raise LincompileError(f"runtime {runtime} needs an artefact folder, and {model} is none")
    from ..compiler import capture_loaded

    loaded = load_model(model, device=device, dtype=dtype)
    for remark in loaded.notes:
        note(remark)
    return of_model(loaded, capture_loaded(loaded), model)


def session_of(artefact: Artefact, runtime: str) -> StepSession:
    """The artefact's program on a runtime: ``torch``, ``onnx`` (after an export) or ``aot``.

    Raises:
        LincompileError: another name, or nothing was exported.
    """
    if runtime == "torch":
        return artefact.session
    if runtime == "aot":
        from ..aot import AotSession

        return AotSession(artefact)
    if runtime != "onnx":
        raise LincompileError(f"runtime={runtime}: the runtimes are torch and onnx")
    from ..onnx.session import OnnxSession

    folder = artefact.directory / "onnx"
    if not folder.is_dir():
        raise LincompileError(f"{artefact.directory} has no ONNX program: run 'lincompile export {artefact.directory}'")
    if artefact.device.type != "cpu":
        raise LincompileError("--runtime onnx runs on the CPU: leave --device out")
    return OnnxSession(folder)
