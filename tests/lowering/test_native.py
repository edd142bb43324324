"""The native library: the same values as torch on each of its kernels, and files that run as well without it."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import native_kernels  # noqa: E402
from quantized_models import expected, lowered, placeholder_model, weights  # noqa: E402

from lincompile.lowering.native import library  # noqa: E402
from lincompile.lowering.onnx.functions import attach_bodies  # noqa: E402
from lincompile.lowering.onnx.native import lower_attention  # noqa: E402
from lincompile.passes.errors import LincompileError  # noqa: E402


@pytest.fixture(scope="module")
def built() -> Path:
    try:
        return library.build()
    except LincompileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of six-bit LAWCAT with a six-bit embedding and head, exported for the library."""
    import zoo

    from lincompile.lowering.onnx.export import export_onnx
    from lincompile.passes.canonicalize import Canonicalize
    from lincompile.passes.capture import capture
    from lincompile.passes.identity import ProveAttention
    from lincompile.passes.linearize import LinearizeAttention
    from lincompile.passes.pipeline import Pipeline
    from lincompile.passes.quantize import Quantize
    from lincompile.passes.stateful import make_stateful

    passes = [Canonicalize(), ProveAttention(), LinearizeAttention("lawcat"), Quantize("w6a8")]
    step = make_stateful(Pipeline(passes)(capture(*zoo.build("llama-gqa"))), check=False)
    folder = tmp_path_factory.mktemp("model")
    report = export_onnx(step, folder, layout="native", embeddings="int6")
    assert (
        report.quantized["native"] == report.quantized["linears"] >= 14  # gate and up of both layers are one node
        and report.operators["lincompile.Int6LinearA8"] == report.quantized["linears"] - 2
    )
    assert report.operators["lincompile.GatedLinearAttention"] == 2 and "com.microsoft.LinearAttention" not in (
        node.op_type for node in onnx.load(report.path).graph.node
    )
    return folder


@pytest.fixture(params=native_kernels.KERNELS)
def kernels(request: pytest.FixtureRequest, built: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return native_kernels.use(request.param, monkeypatch)


def session(proto: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    assert library.register(options) is not None
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(native: ort.InferenceSession, x: Tensor) -> Tensor:
    return torch.from_numpy(native.run(None, {"x": x.numpy()})[0])


def assert_close(y: Tensor, wanted: Tensor) -> None:
    """Each token to a few units in the last place of its largest output: the order of summation."""
    error = (y - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp(min=1e-30)
    assert y.shape == wanted.shape and float(error.max()) < 2e-6, error


def operators(proto: onnx.ModelProto, folder: Path, native: bool) -> list[str]:
    """What a session keeps of a model once it has inlined functions and folded constants."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    if native:
        library.register(options)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


# Partial groups that end inside a byte of either plane, one input, blocks of rows that aren't full; 1 to 4 tokens take
# the kernels for a few, 5 and more those for many, 300 more than one chunk of them.
@pytest.mark.parametrize(("rows", "columns"), [(40, 70), (33, 131), (1, 1), (65, 576), (96, 2176)])
def test_equals_the_torch_op(kernels: str, rows: int, columns: int) -> None:
    tensors, bias = weights(rows, columns, 6), torch.randn(rows)
    native = session(lowered(placeholder_model(tensors, columns, rows, "a8", bias), "native"))
    for shape in ((1, 1), (1, 3), (2, 2), (1, 5), (3, 11), (1, 300)):
        x = torch.randn(*shape, columns)
        assert_close(run(native, x), expected(tensors, x, bias, "a8"))


def test_two_threads_and_concurrent_calls(kernels: str) -> None:
    rows, columns = 700, 640
    tensors = weights(rows, columns, 6)
    native = session(lowered(placeholder_model(tensors, columns, rows, "a8"), "native"), threads=2)
    inputs = [torch.randn(1, 1 + 7 * index, columns) for index in range(4)]
    wanted = [expected(tensors, x, None, "a8") for x in inputs]
    worst: list[float] = []

    def calls(index: int) -> None:
        for _ in range(5):
            worst.append(float((run(native, inputs[index]) - wanted[index]).abs().max()))

    threads = [threading.Thread(target=calls, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 20 and max(worst) < 5e-6


def test_odd_values(kernels: str) -> None:
    """NaN and infinity never look finite and stay in their token; zeros, tiny and huge values, zero scales."""
    rows, columns = 40, 300
    tensors = weights(rows, columns, 6)
    tensors["fc.weight_scale"][:, 1] = 0
    native = session(lowered(placeholder_model(tensors, columns, rows, "a8"), "native"))
    for tokens in (4, 9):
        x = torch.randn(1, tokens, columns)
        x[0, 0, 7], x[0, 1, 290], x[0, 2] = float("nan"), float("-inf"), 0
        x[0, 3, :128], x[0, 3, 128:] = 1e-42, 1e30
        y, wanted = run(native, x), expected(tensors, x, None, "a8")
        assert not torch.isfinite(y[0, :2]).any()
        assert torch.equal(y[0, 2], torch.zeros(rows))
        assert_close(y[0, 2:], wanted[0, 2:])
    assert run(native, torch.zeros(1, 0, columns)).shape == (1, 0, rows)
    assert run(native, torch.zeros(0, 3, columns)).shape == (0, 3, rows)


def attention_model(heads: int, kv_heads: int, keys: int, values: int, decay_keys: int) -> onnx.ModelProto:
    """One gated linear attention, as the translation leaves it and then for the library."""
    sizes = {"q": heads * keys, "k": kv_heads * keys, "v": kv_heads * values}
    shapes: dict[str, list[Any]] = {name: ["B", "T", size] for name, size in sizes.items()}
    shapes |= {"s": ["B", kv_heads, keys, values], "g": ["B", "T", kv_heads * decay_keys]}
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x)) for n, x in shapes.items()]
    attributes = {"update_rule": "gated", "q_num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.5}
    node = ir.node("LinearAttention", inputs, attributes, domain="com.microsoft", num_outputs=2)
    results = {"o": ["B", "T", heads * values], "state": shapes["s"]}
    for output, (name, shape) in zip(node.outputs, results.items(), strict=True):
        output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 21}, name="attention")
    model = ir.Model(graph, ir_version=10)
    assert lower_attention(model) == 1 and lower_attention(model) == 0
    assert attach_bodies(model) == []
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return proto


def attention_inputs(batch: int, time: int, heads: int, kv_heads: int, keys: int, values: int, decay_keys: int) -> Any:
    generator = torch.Generator().manual_seed(time)
    q, k = (torch.randn(batch, count, time, keys, generator=generator) for count in (heads, kv_heads))
    v = torch.randn(batch, kv_heads, time, values, generator=generator)
    state = torch.randn(batch, kv_heads, keys, values, generator=generator)
    decay = -torch.rand(batch, kv_heads, time, decay_keys, generator=generator) * 2
    if time > 3:
        decay[:, :, 2, :1], decay[:, 0, 3] = float("-inf"), -200
    return q, k, v, state, decay


def run_attention(native: ort.InferenceSession, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> list[Tensor]:
    packed = {n: x.transpose(1, 2).flatten(2) for n, x in {"q": q, "k": k, "v": v, "g": g}.items()}
    feed = {name: x.numpy() for name, x in (packed | {"s": s}).items()}
    return [torch.from_numpy(x) for x in native.run(None, feed)]


# Columns and rows that fill no vector, groups of more than four heads, one decay a head; lengths around the 64 tokens
# that are read at a time.
@pytest.mark.parametrize(
    "sizes", [(9, 3, 128, 65, 128), (5, 1, 7, 33, 1), (2, 2, 22, 16, 22), (6, 1, 1, 1, 1)], ids=str
)
def test_attention_equals_the_torch_op(kernels: str, sizes: tuple[int, ...]) -> None:
    native = session(attention_model(*sizes), threads=2)
    for batch, time in ((1, 1), (2, 5), (1, 64), (2, 131)):
        q, k, v, state, decay = attention_inputs(batch, time, *sizes)
        wide = (x.double() for x in (q, k, v, decay, state))
        wanted, last = torch.ops.lincompile.linear_attention(*wide, 0.5, True, False)
        o, present = run_attention(native, q, k, v, state, decay)
        for found, exact in ((o, wanted.transpose(1, 2).flatten(2)), (present, last)):
            error = (found - exact).abs().max() / exact.abs().max()
            assert found.shape == exact.shape and float(error) < 2e-6
    q, k, v, state, decay = attention_inputs(1, 5, *sizes)
    v[0, 0, 4, 0] = float("nan")
    o, present = run_attention(native, q, k, v, state, decay)
    assert torch.isnan(o[0, 4, 0]) and torch.isfinite(o[0, :4]).all() and torch.isnan(present[0, 0, :, 0]).all()
    o, present = run_attention(native, *(x[:, :, :0] for x in (q, k, v)), state, decay[:, :, :0])
    assert o.shape[1] == 0 and torch.equal(present, state)


def test_attention_of_wrong_shapes_is_an_error(kernels: str, tmp_path: Path) -> None:
    proto = attention_model(4, 2, 8, 9, 8)
    assert operators(proto, tmp_path, native=True) == ["GatedLinearAttention"]
    assert operators(proto, tmp_path, native=False) == ["LinearAttention"]
    for value in proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"any_{value.name}_{axis}"
    native = session(proto)
    q, k, v, state, decay = attention_inputs(1, 3, 4, 2, 8, 9, 8)
    with pytest.raises(Exception, match=r"key must be \[1, 3, 16\], got \[1, 2, 16\]"):
        run_attention(native, q, k[:, :, :2], v, state, decay)
    with pytest.raises(Exception, match=r"decay must be \[1, 3, 16\], got \[1, 3, 14\]"):
        run_attention(native, q, k, v, state, decay[..., :7])
    with pytest.raises(Exception, match=r"past_state must be \[1, 2, 8, 9\], got \[1, 1, 8, 9\]"):
        run_attention(native, q, k, v, state[:, :1], decay)
    next(item for item in proto.graph.node[0].attribute if item.name == "kv_num_heads").i = 3
    with pytest.raises(Exception, match="4 query heads can't be divided among 3 key heads"):
        session(proto)


def test_a_file_runs_with_and_without_the_library(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node with it; the two products of the planes layout, folded when loaded, without."""
    monkeypatch.setenv("LINCOMPILE_NATIVE", "portable")
    tensors = weights(24, 200, 6)
    proto = lowered(placeholder_model(tensors, 200, 24, "a8"), "native")
    assert operators(proto, tmp_path, native=True) == ["Int6LinearA8"]
    assert operators(proto, tmp_path, native=False) == ["MatMulNBits", "MatMulNBits", "Add"]


def test_an_exported_model_decodes_the_same_with_and_without_it(kernels: str, model: Path, monkeypatch: Any) -> None:
    """Prefill in two chunks, then tokens, with left padding; logits equal but where a code falls the other way."""
    from lincompile.lowering.onnx.session import OnnxSession

    native = OnnxSession(model, threads=2)
    monkeypatch.setenv("LINCOMPILE_NATIVE", "0")
    stock = OnnxSession(model)
    assert (native.native, stock.native) == (kernels, None)
    tokens = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    inputs = tokens, (mask.long().cumsum(1) - 1).clamp(min=0), mask
    ours, theirs = native.initial_states(2), stock.initial_states(2)
    for part in (slice(0, 6), slice(6, 8), slice(8, 9)):
        y, ours = native(*(value[:, part] for value in inputs), ours)
        wanted, theirs = stock(*(value[:, part] for value in inputs), theirs)
        assert torch.isfinite(y).all() and float((y - wanted).abs().median()) < 1e-4


def test_wrong_shapes_are_errors(kernels: str) -> None:
    tensors = weights(24, 200, 6)
    proto = lowered(placeholder_model(tensors, 200, 24, "a8"), "native")
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "any"
    with pytest.raises(Exception, match=r"x must be \[\.\.\., 200\], got \[1, 2, 199\]"):
        run(session(proto), torch.randn(1, 2, 199))
    for name, dims, message in (
        ("fc.onnx_lo", [24, 49], r"low must be \[24, 50\] for K = 200, got \[24, 49\]"),
        ("fc.onnx_scale", [23, 2], r"scale must be \[24, 2\] for K = 200, got \[23, 2\]"),
    ):
        broken = lowered(placeholder_model(tensors, 200, 24, "a8"), "native")
        plane = next(item for item in broken.graph.initializer if item.name == name)
        count = len(plane.raw_data) // (plane.dims[0] * plane.dims[1]) * dims[0] * dims[1]
        del plane.dims[:]
        plane.dims.extend(dims)
        plane.raw_data = plane.raw_data[:count]
        with pytest.raises(Exception, match=message):
            session(broken)
    negative = lowered(placeholder_model(tensors, 200, 24, "a8"), "native")
    next(item for item in negative.graph.node[0].attribute if item.name == "K").i = -1
    with pytest.raises(Exception, match="K and N must be positive, got -1 and 24"):
        session(negative)


def test_planes_that_the_graph_computes_are_checked_at_each_run(kernels: str) -> None:
    tensors = weights(24, 200, 6)
    proto = lowered(placeholder_model(tensors, 200, 24, "a8"), "native")
    low = next(item for item in proto.graph.initializer if item.name == "fc.onnx_lo")
    given = onnx.numpy_helper.to_array(low)
    proto.graph.initializer.remove(low)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("fc.onnx_lo", onnx.TensorProto.UINT8, ["a", "b"]))
    native, x = session(proto), torch.randn(1, 3, 200)
    y = torch.from_numpy(native.run(None, {"x": x.numpy(), "fc.onnx_lo": given})[0])
    assert_close(y, expected(tensors, x, None, "a8"))
    with pytest.raises(Exception, match=r"low must be \[24, 50\]"):
        native.run(None, {"x": x.numpy(), "fc.onnx_lo": given[:, :9]})


def test_switched_off_or_without_a_compiler_the_stock_kernels_run(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.compiled, "processor_flags", lambda: frozenset({"avx512_vnni"}))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert library.register(ort.SessionOptions()) is None
    assert "no C++ compiler" in caplog.text and "g++" in caplog.text
    monkeypatch.setenv("LINCOMPILE_NATIVE", "1")  # asked for: not silently something else
    with pytest.raises(LincompileError, match=r"can't be compiled: no C\+\+ compiler"):
        library.register(ort.SessionOptions())
    monkeypatch.setenv("LINCOMPILE_NATIVE", "0")
    assert library.register(ort.SessionOptions()) is None
    with pytest.raises(LincompileError, match="LINCOMPILE_NATIVE=0"):
        library.library_path()


def test_by_default_a_processor_with_avx2_runs_our_linears_and_the_stock_attention(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LINCOMPILE_NATIVE", raising=False)
    try:
        kernels = library.register(ort.SessionOptions())
    except LincompileError as error:
        pytest.skip(str(error))
    if kernels != "avx2":
        pytest.skip(f"this processor runs {kernels}")
    assert operators(attention_model(4, 2, 8, 9, 8), tmp_path, native=True) == ["LinearAttention"]
    tensors = weights(24, 200, 6)
    linear = lowered(placeholder_model(tensors, 200, 24, "a8"), "native")
    assert operators(linear, tmp_path, native=True) == ["Int6LinearA8"]


_GROWTH = """
import sys
from lincompile.lowering.onnx.session import OnnxSession
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import lincompile.lowering.native.library, lincompile.lowering.onnx.metadata, onnxruntime  # imported by a session
before = anonymous()
session = OnnxSession(sys.argv[1], threads=1)
print(session.native, anonymous() - before)
assert not {"onnx", "onnx_ir", "onnxscript"} & set(sys.modules), "reading a file imports what writes one"
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("layout", "kernels", "most"), [("planes", "", 1.5), ("native", "avx2", 0.95)])
def test_memory_of_a_loaded_model(built: Path, tmp_path: Path, layout: str, kernels: str, most: float) -> None:
    """Bytes per weight: stock kernels keep copies of their own, ours read the six bits of the file."""
    from lincompile.lowering.onnx.metadata import Signature

    size = 4096
    model = ir.serde.deserialize_model(lowered(placeholder_model(weights(size, size, 6), size, size, "a8"), layout))
    Signature([], size, causal=False).store(model)
    ir.save(model, tmp_path / "model.onnx")
    environment = os.environ | {"LINCOMPILE_NATIVE": kernels}
    command = [sys.executable, "-c", _GROWTH, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split()
    if kernels and shown[0] != kernels:
        pytest.skip(f"this processor runs no {kernels} kernels")
    assert int(shown[1]) < most * size * size


def test_refusals_say_what_to_do(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LINCOMPILE_NATIVE", "neon")
    with pytest.raises(LincompileError, match="LINCOMPILE_NATIVE=neon names no kernels"):
        library.library_path()
    monkeypatch.delenv("LINCOMPILE_NATIVE")
    with monkeypatch.context() as other:
        other.setattr(library.compiled, "processor_flags", lambda: frozenset({"sse4_2"}))
        with pytest.raises(LincompileError, match=r"no kernels for this processor.*LINCOMPILE_NATIVE=portable"):
            library.library_path()
    for version in ("1.31.9", "2.0.0"):
        with monkeypatch.context() as other:
            other.setattr(ort, "__version__", version)
            with pytest.raises(LincompileError, match=rf"written for onnxruntime ≥ 1.32, < 2.0, this is {version}"):
                library.library_path()
    monkeypatch.setattr(library, "_FLAGS", ("-DT=", "-std=c++17", "-include", "missing.h"))
    with pytest.raises(LincompileError, match=r"can't be compiled: .*missing\.h"):
        library.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_without_the_interface_is_refused_not_crashed(built: Path) -> None:
    """What the library itself does under a runtime whose interface stops before the version that it needs."""
    said: list[bytes] = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda _code, text: said.append(text) or 1  # type: ignore[func-returns-value]
    )
    table = (ctypes.c_void_p * 280)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version < 20 else None
    )
    version_string = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(name))
    name = ctypes.create_string_buffer(b"1.19.2")
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(version_string, ctypes.c_void_p))
    register = ctypes.CDLL(str(built)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert said == [b"lincompile's native library needs onnxruntime 1.20 or newer, this is 1.19.2"]


def test_only_native_files_ask_for_the_library(tmp_path: Path) -> None:
    tensors, found = weights(24, 200, 6), {}
    for layout in ("planes", "native"):
        path = tmp_path / f"{layout}.onnx"
        onnx.save(lowered(placeholder_model(tensors, 200, 24, "a8"), layout), str(path))
        found[layout] = library.calls_native_operators(path)
    assert found == {"planes": False, "native": True}
    whole = (tmp_path / "native.onnx").read_bytes()
    # The last two begin a field that is longer than any memory, or than a file can be.
    long = bytes.fromhex("42b2e88c90bb132ab82e"), bytes.fromhex("a27df58ad1d4b8d098c5526854d59824a00e7671")
    for damaged in (b"", b"\xff" * 40, b"no model at all", whole[:40], *long):
        path.write_bytes(damaged)
        assert not library.calls_native_operators(path)


def test_the_wheel_carries_the_sources() -> None:
    """All of them, as package data; tests/test_layout.py looks into a wheel for the Python files."""
    root = Path(__file__).resolve().parents[2]
    listed = (root / "pyproject.toml").read_text().split("[tool.setuptools.package-data]")[1].split("[tool")[0]
    assert '"*.h"' in listed and '"*.cpp"' in listed
    here = {path.name for path in (root / "lowering/native").iterdir() if path.suffix in (".h", ".cpp")}
    assert here == set(library._SOURCES)
