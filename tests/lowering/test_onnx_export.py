"""Exported step programs under stock onnxruntime: the same logits, states and tokens as torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from exported_models import CASES, Exported, batch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import lincompile  # noqa: E402
from lincompile.lowering.generate import Session, generate  # noqa: E402
from lincompile.lowering.onnx.export import DATA_FILE, GENAI_FILE, MODEL_FILE, export_onnx  # noqa: E402
from lincompile.lowering.onnx.session import OnnxSession  # noqa: E402
from lincompile.passes.canonicalize import Canonicalize  # noqa: E402
from lincompile.passes.capture import capture  # noqa: E402
from lincompile.passes.errors import ArtefactError, LincompileError  # noqa: E402
from lincompile.passes.identity import ProveAttention  # noqa: E402
from lincompile.passes.linearize import LinearizeAttention  # noqa: E402
from lincompile.passes.pipeline import Pipeline  # noqa: E402
from lincompile.passes.stateful import StateSpec, StepProgram, make_full  # noqa: E402


def in_chunks(
    run: Callable[..., tuple[Tensor, list[Tensor]]], states: list[Tensor], inputs: Sequence[Tensor], cuts: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    parts, start = [], 0
    for end in [*cuts, inputs[0].shape[1]]:
        logits, states = run(*(x[:, start:end] for x in inputs), states)
        parts.append(logits)
        start = end
    return torch.cat(parts, 1), states


QUANTIZED = ("int6", "delta-a6")


def close(name: str, difference: Tensor) -> bool:
    """Equal to rounding. With quantized activations, for most logits: a value on the edge between two codes may fall
    either way, in torch as here, and moves what follows it by a whole step."""
    error = difference.abs()
    return bool(torch.isfinite(error).all()) and float(error.median() if name in QUANTIZED else error.max()) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_logits_and_states_equal_torch(exported: Callable[[str], Exported], name: str) -> None:
    case = exported(name)
    inputs = batch(case.step)
    real = inputs[2]
    with torch.no_grad():
        wanted, _ = case.step(*inputs, case.step.initial_states(3))
    for cuts in ((), (5, 6)):  # at once; a chunk, a single token, the rest
        logits, states = in_chunks(case.session, case.session.initial_states(3), inputs, cuts)
        assert torch.isfinite(logits).all()
        difference = (logits - wanted)[real]
        assert close(name, difference)
        for spec, state in zip(case.session.states, states, strict=True):
            assert state.shape[0] == 3 and state.dtype == spec.dtype
            sizes = [size for size in spec.shape if size is not None]
            assert [n for n, size in zip(state.shape[1:], spec.shape, strict=True) if size is not None] == sizes


@pytest.mark.parametrize("name", ["hybrid", "int6", "hedgehog-sliding", "window-native", "window-rotated-native"])
def test_a_padded_batch_equals_single_runs(exported: Callable[[str], Exported], name: str) -> None:
    case = exported(name)
    tokens, positions, mask = batch(case.step)
    together, _ = in_chunks(case.session, case.session.initial_states(3), (tokens, positions, mask), (4,))
    for row in range(3):
        real = mask[row]
        single = (x[row : row + 1, real] for x in (tokens, positions, mask))
        alone, _ = case.session(*single, case.session.initial_states(1))
        difference = (together[row, real] - alone[0]).abs()
        assert close(name, difference)


@pytest.mark.parametrize("name", ["hybrid", "window", "hedgehog-sliding", "window-native", "window-rotated-native"])
def test_padding_on_the_right_of_a_chunk(exported: Callable[[str], Exported], name: str) -> None:
    """As onnxruntime-genai pads a batch: the next token must see each row's last real tokens, not the padding."""
    session = exported(name).session
    tokens = torch.randint(3, zoo.VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    positions = torch.arange(5) * mask
    _, states = session(tokens[:, :5], positions, mask, session.initial_states(2))
    after = torch.tensor([[5, 6, 7, 8], [2, 3, 4, 5]])
    together, _ = session(tokens[:, 5:], after, torch.ones(2, 4, dtype=torch.bool), states)
    for row, length in enumerate((5, 2)):
        kept = torch.cat([tokens[row, :length], tokens[row, 5:]])[None]
        every = torch.arange(length + 4)[None]
        alone, _ = session(kept, every, torch.ones_like(kept, dtype=torch.bool), session.initial_states(1))
        torch.testing.assert_close(together[row], alone[0, length:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_last_tokens_logits_alone(exported: Callable[[str], Exported], name: str) -> None:
    """What a prompt is read with: the same states, and the last row of the same logits."""
    case = exported(name)
    inputs = batch(case.step)
    states = case.session.initial_states(3)
    logits, wanted = case.session(*inputs, states)
    last, found = case.session.step_last(*inputs, states)
    assert list(last.shape) == [3, 1, zoo.VOCAB]
    torch.testing.assert_close(last, logits[:, -1:], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_fewer_positions_or_mask_columns_than_tokens_are_errors(exported: Callable[[str], Exported], name: str) -> None:
    """A loop of one's own can give these; a single position or column must not be stretched over all tokens."""
    case = exported(name)
    tokens, positions, mask = (x.numpy() for x in batch(case.step))
    run = case.session._session
    feed = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask.astype("int64")}
    states = [item for item in run.get_inputs() if item.name.startswith("past_key_values")]
    sizes = {item.name: [3, *(n if isinstance(n, int) else 0 for n in item.shape[1:])] for item in states}
    feed |= {key: torch.zeros(shape).numpy() for key, shape in sizes.items()}
    assert run.run(["logits"], feed)[0].shape[1] == 13
    read = ["attention_mask"] + ["position_ids"] * (name not in ("int6", "window", "window-native", "delta-a6"))
    for key, few in ((key, few) for key in read for few in (1, 12)):
        with pytest.raises(Exception, match="must be within the inclusive range"):
            run.run(["logits"], feed | {key: feed[key][:, :few].copy()})


def test_a_mask_without_the_past_is_an_error(exported: Callable[[str], Exported]) -> None:
    """Softmax layers would read it as that of a shorter past; positions tell."""
    for name in ("hybrid", "softmax"):
        case = exported(name)
        run = case.session._session
        inputs = {item.name: item for item in run.get_inputs()}
        tokens = torch.randint(1, zoo.VOCAB, (2, 9)).numpy()
        empty = {
            key: torch.zeros([2, *(n if isinstance(n, int) else 0 for n in item.shape[1:])]).numpy()
            for key, item in inputs.items()
            if key.startswith("past_key_values")
        }
        mask, positions = torch.ones(2, 9, dtype=torch.int64).numpy(), torch.arange(9).expand(2, -1).numpy()
        first = {"input_ids": tokens[:, :5], "attention_mask": mask[:, :5], "position_ids": positions[:, :5]}
        outputs = [item.name for item in run.get_outputs()]
        _, *states = run.run(outputs, first | empty)
        past = {key.replace("present", "past_key_values"): x for key, x in zip(outputs[1:], states, strict=True)}
        second = {"input_ids": tokens[:, 5:], "position_ids": positions[:, 5:]} | past
        run.run(outputs, second | {"attention_mask": mask})
        for columns in (4, 8):
            with pytest.raises(Exception, match="must be within the inclusive range"):
                run.run(outputs, second | {"attention_mask": mask[:, :columns]})


def test_a_batch_of_no_rows_is_an_error(exported: Callable[[str], Exported]) -> None:
    """GroupQueryAttention of onnxruntime 1.32 divides by it and ends the process."""
    session = exported("hybrid").session
    none = torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(LincompileError, match=r"tokens must be \[batch ≥ 1, time ≥ 1\], got \[0, 3\]"):
        session(none, none, none.bool(), session.initial_states(0))


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_torch(exported: Callable[[str], Exported], name: str) -> None:
    case = exported(name)
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    wanted = generate(Session(case.step), prompts, 24).tokens
    if name not in QUANTIZED:
        assert generate(case.session, prompts, 24).tokens == wanted
        return
    for prompt, continuation in zip(prompts, wanted, strict=True):  # one flipped code must not count 23 times
        tokens = torch.tensor([prompt + continuation[:-1]])
        positions = torch.arange(tokens.shape[1])[None]
        logits, _ = case.session(tokens, positions, torch.ones_like(tokens).bool(), case.session.initial_states(1))
        chosen = logits[0, len(prompt) - 1 :].argmax(-1)
        assert float((chosen == torch.tensor(continuation)).float().mean()) >= 0.9


def test_a_window_beside_linear_attention_is_part_of_a_constant_state(exported: Callable[[str], Exported]) -> None:
    case = exported("window")
    session = case.session
    assert not [spec for spec in session.states if spec.role in ("key", "value", "mask")]
    assert {len(spec.shape) for spec in session.states if spec.role == "recurrent"} == {1}
    inputs = batch(case.step, (50, 41, 3))  # two blocks of queries; a row shorter than the window
    with torch.no_grad():
        wanted, _ = case.step(*inputs, case.step.initial_states(3))
    for cuts in ((), (1, 2, 35), (47,)):
        logits, states = in_chunks(session, session.initial_states(3), inputs, cuts)
        assert close("window", (logits - wanted)[inputs[2]])
        assert [state.shape for state in states] == [(3, *spec.shape) for spec in session.states]


@pytest.mark.parametrize("name", ["hybrid", "int6", "window"])
def test_the_reference_evaluator_runs_the_bodies(exported: Callable[[str], Exported], name: str) -> None:
    from onnx.reference import ReferenceEvaluator

    case = exported(name)
    proto = onnx.load(case.folder / MODEL_FILE)
    onnx.checker.check_model(proto, full_check=True)
    assert [note for note in case.report.notes if "rounded to 8 bits" not in note] == []
    contrib = {node.op_type for node in proto.graph.node if node.domain == "com.microsoft"}
    assert {function.name for function in proto.functions} == contrib
    tokens, positions, mask = batch(case.step, (6, 4))
    states = case.session.initial_states(2)
    wanted, _ = case.session(tokens, positions, mask, states)
    feed = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask.long()}
    feed |= {spec.name: state for spec, state in zip(case.session.states, states, strict=True) if spec.role != "mask"}
    logits = ReferenceEvaluator(proto).run(["logits"], {key: value.numpy() for key, value in feed.items()})[0]
    assert close(name, torch.from_numpy(logits)[mask] - wanted[mask])


def test_standard_operators_only(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    case = exported("hybrid")
    report = export_onnx(case.step, tmp_path, opset="std")
    proto = onnx.load(tmp_path / MODEL_FILE)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    assert {item.domain: item.version for item in proto.opset_import} == {"": 27} and report.opset == 27
    assert report.operators["LinearAttention"] == 1 and report.operators["CausalConvWithState"] == 2
    inputs = batch(case.step)
    session = OnnxSession(tmp_path)
    wanted, _ = case.session(*inputs, case.session.initial_states(3))
    logits, _ = in_chunks(session, session.initial_states(3), inputs, (5, 6))
    assert close("hybrid", (logits - wanted)[inputs[2]])


def test_convolutions_of_wide_models(tmp_path: Path) -> None:
    """More than 8,192 taps: the exporter's optimizer leaves their reshaping in the graph."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    report = export_onnx(lincompile.compile(model, attn="lawcat").session.program, tmp_path)
    assert report.verified["max_error"] < 1e-4
    assert "conv" in [state["role"] for state in report.states]


def test_encoders(tmp_path: Path) -> None:
    """A bidirectional model: no states, whole sequences, padding on either side."""
    module, example = zoo.build("bert")
    step = make_full(
        Pipeline([Canonicalize(), ProveAttention(), LinearizeAttention("hedgehog")])(capture(module, example))
    )
    report = export_onnx(step, tmp_path)
    session = OnnxSession(tmp_path)
    assert report.verified["max_error"] < 1e-4 and not session.causal and session.states == []
    assert not (tmp_path / GENAI_FILE).exists()
    tokens, positions, mask = batch(step)
    with torch.no_grad():
        wanted, _ = step(tokens, positions, mask, [])
    got, _ = session(tokens, positions, mask, [])
    torch.testing.assert_close(got[mask], wanted[mask], atol=1e-4, rtol=1e-4)


def test_signature_and_genai_configuration(exported: Callable[[str], Exported]) -> None:
    case = exported("hybrid")
    proto = onnx.load(case.folder / MODEL_FILE)
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["past_key_values.0.recurrent_state"] == ["batch", 3, 16, 9]  # Hedgehog features, ones column
    assert inputs["past_key_values.0.conv_state"] == ["batch", (9 + 3) * 8, 3]  # query and key convolutions in one
    assert inputs["past_key_values.1.key"][:2] == ["batch", 3]
    assert [o.name for o in proto.graph.output][:3] == ["logits", "present.0.conv_state", "present.0.recurrent_state"]
    config = json.loads((case.folder / GENAI_FILE).read_text())["model"]
    assert config["decoder"]["inputs"]["past_conv_names"] == "past_key_values.%d.conv_state"
    assert config["decoder"]["outputs"]["present_key_names"] == "present.%d.key"
    assert (config["vocab_size"], config["context_length"]) == (zoo.VOCAB, case.step.max_positions or 2048)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["decoder"]["num_hidden_layers"] == 2
    assert (case.session.vocab_size, case.session.max_positions) == (zoo.VOCAB, case.step.max_positions)


def test_report_counts_what_was_lowered(exported: Callable[[str], Exported]) -> None:
    report = exported("int6").report
    assert report.operators["com.microsoft.LinearAttention"] == 2
    assert report.operators["com.microsoft.CausalConvWithState"] == 4
    assert report.operators["com.microsoft.MatMulNBits"] == 2 * report.quantized["linears"] == 28
    assert report.operators.get("Cos", 0) <= 1  # rotary caches are computed once, not once a layer
    assert report.bytes == sum(f.stat().st_size for f in exported("int6").folder.glob("model.onnx*"))
    assert json.dumps(report.record())


def test_the_normaliser_keeps_its_epsilon(exported: Callable[[str], Exported]) -> None:
    """A sequence of padding only leaves the normaliser at zero: 0 / (0 + 1e-10), not 0 / 0."""
    case = exported("hybrid")
    tokens, positions, mask = batch(case.step)
    logits, _ = case.session(tokens, positions, torch.zeros_like(mask), case.session.initial_states(3))
    assert torch.isfinite(logits).all()


class Tiny(nn.Module):
    """One linear-attention site with whatever ``middle`` does to the hidden state."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.middle = middle

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)[:, None] * mask[:, None, :, None]
        decay = nn.functional.logsigmoid(self.middle(x) * 40)
        o, state = torch.ops.lincompile.linear_attention(x, x, x, decay, state, 1.0, True, False)
        return nn.functional.linear(o[:, 0], self.embed.weight), state


def tiny_step(middle: Callable[[Tensor], Tensor] = torch.tanh, dtype: torch.dtype = torch.float32) -> StepProgram:
    torch.manual_seed(0)
    module: Any = Tiny(middle).eval().requires_grad_(False).to(dtype)
    return StepProgram(module, [StateSpec("state", "attention", "recurrent", (1, 8, 8), torch.float32)])


def test_strong_decay_and_external_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """log σ at ±40 stays finite (Log(Sigmoid) would not), and weights beside the graph load back."""
    step = tiny_step()
    step.graph_module.embed.weight.data = torch.randn(500, 8)  # type: ignore[union-attr]
    report = export_onnx(step, tmp_path, external_data=True, genai=False)
    assert (tmp_path / DATA_FILE).is_file() and not (tmp_path / GENAI_FILE).exists()
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    session = OnnxSession(tmp_path)
    tokens = torch.arange(12).reshape(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    wanted, state = step(tokens, tokens, mask, step.initial_states(2))
    logits, (new_state,) = session(tokens, tokens, mask, session.initial_states(2))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(new_state, state[0], atol=1e-4, rtol=1e-5)

    with pytest.raises(
        LincompileError, match=r"state 'past_key_values.0.recurrent_state' must be float32 \[2, 1, 8, 8\]"
    ):
        session(tokens, tokens, mask, [torch.zeros(2, 1, 8, 9)])
    with pytest.raises(LincompileError, match=r"mask must have the tokens' shape \[2, 6\], got \[2, 5\]"):
        session(tokens, tokens, mask[:, :5], session.initial_states(2))
    with pytest.raises(LincompileError, match="tokens must be int64, got float32"):
        session(tokens.float(), tokens, mask, session.initial_states(2))

    for name, ids in (("tokens", (tokens - 1, tokens)), ("positions", (tokens, tokens - 1))):
        with pytest.raises(LincompileError, match=f"{name} must be 0 or more, got -1"):
            session(*ids, mask, session.initial_states(2))
    with pytest.raises(LincompileError, match=r"can't run this call: indices element out of data bounds, idx=500 "):
        session(tokens + 500, tokens, mask, session.initial_states(2))

    for damage in (lambda file: file.write_bytes(file.read_bytes()[:4000]), Path.unlink):
        damage(tmp_path / DATA_FILE)
        with pytest.raises(ArtefactError, match="weights are missing or cut short"):
            OnnxSession(tmp_path)
    assert capfd.readouterr().err == ""  # onnxruntime prints nothing of its own


def test_six_bit_embeddings_are_verified_against_the_rounded_program(tmp_path: Path) -> None:
    step = tiny_step()
    table = step.graph_module.embed.weight
    before = table.clone()  # type: ignore[operator]
    report = export_onnx(step, tmp_path, embeddings="int6", genai=False)
    assert torch.equal(table, before)  # type: ignore[arg-type]  # the program itself is left alone
    assert report.operators["com.microsoft.GatherBlockQuantized"] == 2
    assert report.operators["com.microsoft.MatMulNBits"] == 2
    assert report.verified["rms_error"] < 0.02
    with pytest.raises(LincompileError, match="unknown embeddings 'int5'"):
        export_onnx(step, tmp_path, embeddings="int5")


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no ONNX model at"):
        OnnxSession(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"\x08\x0a\x12 not a model")
    with pytest.raises(ArtefactError, match="truncated or not an ONNX model"):
        OnnxSession(tmp_path)
    foreign = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["b"])],
        "g",
        [onnx.helper.make_tensor_value_info("a", 1, [1])],
        [onnx.helper.make_tensor_value_info("b", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(foreign, ir_version=10), tmp_path / MODEL_FILE)
    with pytest.raises(ArtefactError, match="wasn't exported by lincompile"):
        OnnxSession(tmp_path)


def test_a_file_that_an_old_runtime_refuses_names_the_version_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"\x08\x0a\x12 not a model")
    monkeypatch.setattr("onnxruntime.__version__", "1.22.0")
    with pytest.raises(ArtefactError, match=r"onnxruntime 1\.22\.0 is older than 1\.32, .*pip install -U onnxruntime"):
        OnnxSession(tmp_path)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(LincompileError, match=r"'embed.weight' is float64; .*--dtype float32"):
        export_onnx(tiny_step(dtype=torch.float64), tmp_path / "a")
    with pytest.raises(LincompileError, match=r"can't be exported to ONNX: .*special_airy_ai"):
        export_onnx(tiny_step(torch.special.airy_ai), tmp_path / "a")
    step = tiny_step(torch.special.airy_ai)
    traced = torch.export.export(
        step.graph_module, (*[torch.zeros(2, 3).long()] * 2, torch.ones(2, 3).bool(), torch.zeros(2, 1, 8, 8))
    )
    step.graph_module = traced.module(check_guards=False)
    with pytest.raises(LincompileError, match=r"aten.special_airy_ai.default has no ONNX form \(in .*--target aot"):
        export_onnx(step, tmp_path / "a")
    with pytest.raises(LincompileError, match="opset 9 is not supported"):
        export_onnx(tiny_step(), tmp_path / "a", opset=9)
    (tmp_path / "file").touch()
    with pytest.raises(LincompileError, match=r"file is a file: name a folder to write \(-o\)"):
        export_onnx(tiny_step(), tmp_path / "file")
    with pytest.raises(LincompileError, match="unknown int6 layout 'int4'"):
        export_onnx(tiny_step(), tmp_path / "a", layout="int4")
    with pytest.raises(LincompileError, match="--layout native has operators of its own, --opset std standard ones"):
        export_onnx(tiny_step(), tmp_path / "a", layout="native", opset="std")
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_clear_line(missing: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from lincompile.lowering.onnx.extra import require\n"
        "from lincompile.passes.errors import LincompileError\n"
        f"try: require({missing!r})\n"
        "except LincompileError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout == (
        f"the ONNX lowering needs the package '{missing}', which is not installed: pip install lincompile[onnx]\n"
    )


def test_importing_the_exporter_is_cheap() -> None:
    code = (
        "import sys, lincompile, lincompile.lowering.onnx.export, lincompile.lowering.onnx.session\n"
        "print([name for name in ('onnx', 'onnxscript', 'onnxruntime', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


_GROWTH = """
import sys, torch
from lincompile.lowering.onnx.session import OnnxSession
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
def call(tokens):
    ids = torch.ones(1, tokens, dtype=torch.int64)
    session(ids, torch.arange(tokens)[None], ids == 1, session.initial_states(1))
session = OnnxSession(sys.argv[1], threads=1)
call(1)
before = anonymous()
call(16000)
call(1)
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_session_gives_back_what_a_long_chunk_needed(exported: Callable[[str], Exported]) -> None:
    """onnxruntime's arena and glibc would keep 150 MB of these 16,000 tokens (236 MB of 512 tokens of SmolLM2)."""
    command = [sys.executable, "-c", _GROWTH, str(exported("window").folder)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 25e6


def test_the_loop_in_the_documentation(exported: Callable[[str], Exported]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    case = exported("hybrid")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=case.folder)
    assert json.loads(shown.stdout) == generate(case.session, [[5, 6, 7, 8, 9]], 24).tokens[0]
