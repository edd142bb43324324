"""The step program compiled ahead of time by AOTInductor: one ``.pt2`` package, weights and machine code inside.

The package runs in any process that has this torch and lincompile's ops (``lincompile.kernels.ops``, which needs torch
alone): neither transformers, nor the model's code, nor the artefact's other files are imported. ``aot/model.pt2`` takes
what the step graph takes, ``(tokens, positions, mask, *states)``, and gives ``(logits, *states)``; batch, chunk and
cache lengths stay dynamic. It is made for one kind of device, and for the processor's own vector instructions.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..passes.errors import ArtefactError, LincompileError
from ..passes.graph import argument, uncached_fakes
from ..passes.stateful import StepProgram
from .artefact.graph_file import Positional, example_inputs
from .generate import Session
from .triton import lower
from .verify import compare

if TYPE_CHECKING:
    from .package import Artefact

FOLDER, MODEL_FILE = "aot", "model.pt2"


@dataclass(frozen=True)
class AotReport:
    """What was written: the file, its size, how long it took, and the largest relative difference of the logits."""

    path: str
    bytes: int
    seconds: float
    max_error: float

    def record(self) -> dict[str, Any]:
        """The JSON-able form."""
        return asdict(self)


def export_aot(step: StepProgram, folder: str | Path) -> AotReport:
    """Compiles a step program into ``folder/model.pt2`` for the device its weights are on.

    For a GPU its stages are fused first, as a session there runs them (see :mod:`.triton`). The package is run against
    the program before it is put into place.

    Raises:
        LincompileError: no C++ compiler, a graph that AOTInductor can't compile, or logits that differ.
    """
    started = time.perf_counter()
    tensors = [*step.graph_module.parameters(), *step.graph_module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    inputs, axes = example_inputs(step.states, device)
    compiled = lower(step)[0] if device.type == "cuda" else step
    destination = Path(folder)
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination, prefix=".aot-") as scratch:
        path = Path(scratch) / MODEL_FILE
        try:
            with torch.no_grad():
                with uncached_fakes():
                    exported = torch.export.export(
                        Positional(compiled.graph_module), tuple(inputs), dynamic_shapes=(tuple(axes),), strict=False
                    )
                torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
        except LincompileError:
            raise
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LincompileError(f"AOTInductor can't compile the step program: {first.strip()}") from error
        package = _load(path)

        def run(tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            logits, *new = package(*(tensor.contiguous() for tensor in (tokens, positions, mask, *states)))
            return logits, new

        worst = compare(
            step,
            run,
            vocabulary=Session(step).vocab_size,
            quantized=rounds_activations(step.graph_module),
            states=lambda rows: step.initial_states(rows, device),
            device=device,
        )["max_error"]
        os.replace(path, destination / MODEL_FILE)
    final = destination / MODEL_FILE
    return AotReport(str(final), final.stat().st_size, round(time.perf_counter() - started, 1), worst)


def rounds_activations(graph_module: GraphModule) -> bool:
    """Whether a graph has quantized linears that round their inputs, too."""
    activation = {torch.ops.lincompile.int6_linear.default: 6, torch.ops.lincompile.int8_linear.default: 5}
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function" and node.target in activation]
    return any(argument(node, activation[node.target], "activation") != "a16" for node in nodes)


class AotSession(Session):
    """A compiled package as a runtime of the generation loop; see :class:`.generate.StepSession`.

    Args:
        artefact: the folder it was exported from, which says what the states are.

    Raises:
        ArtefactError: no package there, or one that this torch can't load.
    """

    def __init__(self, artefact: Artefact) -> None:
        path = artefact.directory / FOLDER / MODEL_FILE
        if not path.is_file():
            raise ArtefactError(
                f"{artefact.directory} has no compiled package: "
                f"run 'lincompile export {artefact.directory} --target aot'"
            )
        # The package is called as the graph module would be.
        self.program = artefact.around(cast(GraphModule, _load(path)))
        self.device = artefact.device
        self.vocab_size = artefact.manifest["vocab_size"]

    def advance(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk, without gradients. Compiled code takes the layout it was compiled for: contiguous."""
        plain = [tensor.contiguous() for tensor in (tokens, positions, mask, *states)]
        with torch.no_grad():
            return super().advance(plain[0], plain[1], plain[2], plain[3:])


def _load(path: Path) -> Any:
    import lincompile.kernels.ops  # noqa: F401  (declares the ops that the package calls)

    try:
        return torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtefactError(
            f"{path}: torch {torch.__version__} can't load the package ({first.strip()}): export it again here"
        ) from error
