"""A whole attention site as one native operator: torch's numbers, its body's, any chunks, padding, and wrong shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import lawcat_models  # noqa: E402
import native_kernels  # noqa: E402
from lawcat_models import Site, fresh, in_torch, site, tokens  # noqa: E402

from lincompile.lowering.native import library  # noqa: E402

STATES = {"present_conv": "past_conv", "present_state": "past_state"}


@pytest.fixture(params=[*native_kernels.KERNELS, native_kernels.BODY])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return native_kernels.use(request.param, monkeypatch)


@pytest.fixture(params=[0, 1], ids=["before", "rotated"])
def rotated(request: pytest.FixtureRequest) -> Any:
    """Whether LAWCAT reads queries and keys before or after their rotary embedding."""
    return request.param


class Runner:
    def __init__(self, case: Site, threads: int = 1, model: Any = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        library.register(options)
        self.case = case
        model = model or lawcat_models.model(case)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, feed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        given = {name: value.numpy() for name, value in (feed | self.case.weights).items()}
        output, *states = (torch.from_numpy(value) for value in self.session.run(None, given))
        return output, dict(zip(STATES.values(), states, strict=True))

    def chunks(self, feed: dict[str, Tensor], cuts: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        states, parts = fresh(self.case, feed["mask"].shape[0]), []
        for start, end in zip([0, *cuts], [*cuts, feed["mask"].shape[1]], strict=True):
            output, states = self({name: value[:, start:end] for name, value in feed.items()} | states)
            parts.append(output)
        return torch.cat(parts, 1), states


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# SmolLM2's heads; heads that fill no vector, groups of five and one, other numbers of taps, windows longer and shorter
# than a block of queries, softcap.
SIZES: list[dict[str, Any]] = [
    {"heads": 9, "kv_heads": 3, "size": 64},
    {"heads": 5, "kv_heads": 1, "size": 22, "taps": 3, "rank": 3, "window": 5, "softcap": 2.0},
    {"heads": 2, "kv_heads": 2, "size": 8, "taps": 2, "rank": 1, "window": 2},
    {"heads": 8, "kv_heads": 2, "size": 16, "window": 70},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_torch_in_any_chunks(kernels: str, sizes: dict[str, Any], rotated: int) -> None:
    case = site(**sizes, rotated=rotated)
    run = Runner(case, threads=2)
    for batch, time, cuts in ((2, 1, []), (1, 37, [1]), (2, 131, [5, 6, 70]), (1, 131, [])):
        feed = tokens(case, batch, time)
        wanted, conv, state = in_torch(case, feed | fresh(case, batch))
        output, states = run.chunks(feed, cuts)
        assert far(output, wanted) < 5e-6
        assert far(states["past_conv"], conv) < 1e-6
        assert far(states["past_state"][:, : case.sizes.state[0]], state) < 5e-6


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_padding_on_either_side_is_not_there(kernels: str, sizes: dict[str, Any], rotated: int) -> None:
    """Rows of a batch with a prompt padded on the left, then a chunk padded on the right, then one more token."""
    case = site(**sizes, rotated=rotated)
    run = Runner(case)
    lengths, then = torch.tensor([[19], [4], [0]]), torch.tensor([[3], [40], [1]])
    feed = tokens(case, 3, 60)
    left = torch.arange(19) >= 19 - lengths
    right = torch.arange(40) < then
    feed["mask"] = torch.cat([left, right, torch.ones(3, 1).bool()], 1).float()
    feed = {name: value[:, :60] for name, value in feed.items()}
    output, states = run.chunks(feed, [19, 59])
    for row in range(3):
        real = feed["mask"][row] > 0
        alone = {name: value[row : row + 1, real] for name, value in feed.items()}
        wanted, _, state = in_torch(case, alone | fresh(case, 1))
        assert far(output[row, real], wanted[0]) < 5e-6
        assert torch.equal(output[row, ~real], torch.zeros_like(output[row, ~real]))
        assert far(states["past_state"][row, : case.sizes.state[0]], state[0]) < 5e-6
        _, own = run(alone | fresh(case, 1))
        for one, other in zip(_carried(case, states, row), _carried(case, own, 0), strict=True):
            assert float((one - other).abs().max()) < 1e-5


def _carried(case: Site, states: dict[str, Tensor], row: int) -> list[Tensor]:
    """The convolutions' inputs, and the real ones of the window's tokens: what others hold is never read."""
    _, cache, real = torch.split(states["past_state"][row], case.sizes.state)
    return [states["past_conv"][row], cache.unflatten(0, (case.sizes.window - 1, -1)) * real[:, None], real]


def test_the_two_forms_differ(kernels: str) -> None:
    """So a test of one can't pass on the other, and both are the same where the rotation is by nothing."""
    plain, turned = (site(6, 3, 16, window=4, rotated=rotated) for rotated in (0, 1))
    feed = tokens(plain, 1, 20) | fresh(plain, 1)
    (one, states), (other, turned_states) = Runner(plain)(feed), Runner(turned)(feed)
    assert far(one, other) > 1e-3 and far(states["past_conv"], turned_states["past_conv"]) > 1e-3
    feed |= {"cos": torch.ones_like(feed["cos"]), "sin": torch.zeros_like(feed["sin"])}
    assert far(Runner(plain)(feed)[0], Runner(turned)(feed)[0]) < 1e-6


def test_decays_of_any_strength(kernels: str, rotated: int) -> None:
    """Channels that forget everything beside some that keep all: −∞ and ∞ are gates that are shut and open."""
    case = site(6, 3, 16, window=4, rotated=rotated)
    bias = case.weights["gate_bias"]
    bias[::4], bias[1::4], bias[2::4] = float("-inf"), float("inf"), -3000.0
    feed = tokens(case, 1, 50)
    finite = {name: value.clamp(-1e4, 1e4) for name, value in case.weights.items()}
    wanted, _, state = in_torch(Site(case.sizes, case.width, finite), feed | fresh(case, 1))
    output, states = Runner(case)(feed | fresh(case, 1))
    assert far(output, wanted) < 5e-6
    assert far(states["past_state"][:, : case.sizes.state[0]], state) < 5e-6


def test_decays_have_a_floor_where_the_file_gives_one(kernels: str, rotated: int) -> None:
    case = site(6, 3, 16, window=4, rotated=rotated, lowest=-1.0)
    bias = case.weights["gate_bias"]
    bias[::4], bias[2::4] = float("-inf"), -40.0
    feed = tokens(case, 1, 50)
    finite = {name: value.clamp(-1e4, 1e4) for name, value in case.weights.items()}
    wanted, _, state = in_torch(Site(case.sizes, case.width, finite), feed | fresh(case, 1))
    output, states = Runner(case)(feed | fresh(case, 1))
    assert far(output, wanted) < 5e-6
    assert far(states["past_state"][:, : case.sizes.state[0]], state) < 5e-6
    without = Site(replace(case.sizes, lowest=0.0), case.width, case.weights)
    plain, _ = Runner(without)(feed | fresh(case, 1))
    assert far(plain, wanted) > 1e-3
    old = lawcat_models.model(without)  # as it was written before there was a floor
    attributes = old.graph.node[0].attribute
    attributes.remove(next(item for item in attributes if item.name == "lowest"))
    next(function for function in old.functions if "lowest" in function.attribute).attribute.remove("lowest")
    assert torch.equal(Runner(without, model=old)(feed | fresh(case, 1))[0], plain)


def test_what_is_not_a_number_shows_and_stays_in_its_future(kernels: str, rotated: int) -> None:
    case = site(6, 3, 16, rotated=rotated)
    feed = tokens(case, 2, 40)
    feed["qkv"][0, 20, 3] = float("nan")
    output, states = Runner(case)(feed | fresh(case, 2))
    assert torch.isnan(output[0, 20]).any()
    assert torch.isfinite(output[0, :20]).all() and torch.isfinite(output[1]).all()
    assert torch.isfinite(states["past_state"][1]).all()


def test_one_buffer_for_the_old_and_the_new_state(kernels: str, rotated: int) -> None:
    """As onnxruntime-genai and the benchmarks bind them."""
    if kernels == "body":
        pytest.skip("onnxruntime's own kernels")
    case = site(9, 3, 64, rotated=rotated)
    run, feed = Runner(case), tokens(case, 2, 30)
    _, states = run.chunks({name: value[:, :29] for name, value in feed.items()}, [])
    last = {name: value[:, 29:] for name, value in feed.items()}
    wanted, after = run(last | states)
    binding = run.session.io_binding()
    given = {name: value.contiguous().numpy() for name, value in (last | case.weights).items()}
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(state.numpy()) for name, state in states.items()}
    for new, old in STATES.items():
        binding.bind_ortvalue_input(old, buffers[old])
        binding.bind_ortvalue_output(new, buffers[old])
    binding.bind_output("output", "cpu")
    run.session.run_with_iobinding(binding)
    assert torch.equal(torch.from_numpy(binding.copy_outputs_to_cpu()[2]), wanted)
    for name, buffer in buffers.items():
        assert torch.equal(torch.from_numpy(buffer.numpy()), after[name])


def test_wrong_shapes_are_errors(kernels: str) -> None:
    if kernels == "body":
        pytest.skip("onnxruntime's own messages")
    case = site(4, 2, 8, window=6)
    run = Runner(case)
    feed = tokens(case, 2, 5) | fresh(case, 2)
    for name, wrong, message in (
        ("qkv", feed["qkv"][..., :-1], r"qkv must be \[2, 5, 64\], got \[2, 5, 63\]"),
        ("hidden", feed["hidden"][:, :4], r"hidden must be \[2, 5, 37\], got \[2, 4, 37\]"),
        ("cos", feed["cos"][..., :6], r"cos must be \[2, 5, 8\], got \[2, 5, 6\]"),
        ("past_state", feed["past_state"][:, 1:], r"past_state must be \[2, \d+\], got"),
        ("past_conv", feed["past_conv"][..., :2], r"past_conv must be \[2, 48, 3\], got \[2, 48, 2\]"),
        ("mask", feed["mask"][0], r"mask must have|[Ii]nvalid rank"),
    ):
        with pytest.raises(Exception, match=message):
            run(feed | {name: wrong.contiguous()})
    proto = lawcat_models.model(case)
    options = ort.SessionOptions()
    library.register(options)
    for name, value, message in (
        ("kv_num_heads", 3, "4 query heads can't be divided among 3 key heads"),
        ("window", 0, "window and temperature must be positive, got 0 and 16"),
        ("rotated", 2, "rotated must be 0 or 1, got 2"),
        ("lowest", 1, r"lowest must be negative \(0: none\), got 1"),
    ):
        broken = onnx.ModelProto()
        broken.CopyFrom(proto)
        attribute = next(item for item in broken.graph.node[0].attribute if item.name == name)
        setattr(attribute, "f" if attribute.type == onnx.AttributeProto.FLOAT else "i", value)
        with pytest.raises(Exception, match=message):
            ort.InferenceSession(broken.SerializeToString(), options)


@pytest.fixture(scope="module", params=["remove", "keep"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two layers of six-bit LAWCAT beside a window, for the library."""
    from exported_models import step_program

    from lincompile.lowering.onnx.export import export_onnx

    step = step_program("llama-gqa", "lawcat", quant="w6a8", window=4, rotary=request.param)
    folder = tmp_path_factory.mktemp("site")
    return step, folder, export_onnx(step, folder, layout="native", embeddings="int6")


def test_a_layer_is_eight_nodes(exported: Any) -> None:
    """Norm, projections, attention, projection, norm, gate and up, silu, down; and nothing that the layers repeat."""
    report = exported[2]
    library_nodes = {name: count for name, count in report.operators.items() if name.startswith("lincompile.")}
    assert library_nodes == {
        "lincompile.AddRmsNorm": 4,
        "lincompile.Int6LinearA8": 8,
        "lincompile.Int6Rows": 1,
        "lincompile.LawcatWindow": 2,
        "lincompile.RmsNorm": 1,
        "lincompile.SwiGlu": 2,
    }
    assert sum(report.operators.values()) <= 36 and report.quantized["native"] == 14


def test_an_exported_site_runs_with_and_without_the_library(
    kernels: str, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, with padding, and the last token's logits alone. (The export itself compares with torch.)"""
    from exported_models import batch

    from lincompile.lowering.onnx.session import OnnxSession

    step, folder, report = exported
    assert report.verified["rms_error"] < 1e-5
    session = OnnxSession(folder)
    assert session.native == (None if kernels == "body" else kernels)
    monkeypatch.setenv("LINCOMPILE_NATIVE", "0")
    stock = OnnxSession(folder)
    inputs = batch(step)
    states, stock_states = session.initial_states(3), stock.initial_states(3)
    for part in (slice(0, 5), slice(5, 6), slice(6, 13)):
        ids, positions, mask = (x[:, part] for x in inputs)
        last, also = session.step_last(ids, positions, mask, states)
        logits, states = session(ids, positions, mask, states)
        wanted, stock_states = stock(ids, positions, mask, stock_states)
        assert last.shape[1] == 1 and torch.allclose(last, logits[:, -1:], atol=1e-5)
        assert all(torch.equal(one, other) for one, other in zip(states, also, strict=True))
        error = (logits - wanted)[mask].abs()  # a code on the edge between two may fall either way
        assert torch.isfinite(error).all() and (not len(error) or float(error.median()) < 1e-4)


@pytest.mark.parametrize("rotary", ["remove", "keep"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_sites_of_other_families(tmp_path: Any, name: str, rotary: str) -> None:
    """Norms on queries and keys, several rotary embeddings: the export compares the file with torch."""
    from exported_models import step_program

    from lincompile.lowering.onnx.export import export_onnx

    report = export_onnx(step_program(name, "lawcat", window=4, rotary=rotary), tmp_path, layout="native")
    assert report.operators["lincompile.LawcatWindow"] >= 1 and report.verified["max_error"] < 1e-5


def test_sites_without_a_floor(tmp_path: Any) -> None:
    """Students made before gates had one: their files are as they were, but for an attribute that says so."""
    from exported_models import step_program

    from lincompile.lowering.onnx.export import export_onnx

    step = step_program("llama-gqa", "lawcat", window=4, lowest=None)
    report = export_onnx(step, tmp_path, layout="native")
    assert report.operators["lincompile.LawcatWindow"] == 2 and report.verified["max_error"] < 1e-5
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    floors = [item.f for node in nodes for item in node.attribute if item.name == "lowest"]
    assert floors == [0.0, 0.0]


def test_the_proof_refuses_another_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    from exported_models import step_program

    from lincompile.lowering.onnx import sites

    step = step_program("llama-gqa", "lawcat", window=4)
    right = sites.lawcat_window
    monkeypatch.setattr(sites, "lawcat_window", lambda *args: right(*args[:-1], None))
    same, count, reason = sites.fuse_sites(step)
    assert same is step and count == 0 and "differs from the op by" in reason


def test_a_site_that_is_spelled_otherwise_stays_in_stock_operators(tmp_path: Any) -> None:
    from exported_models import step_program

    from lincompile.lowering.onnx.export import export_onnx

    step = step_program("gpt2", "lawcat", window=4)
    report = export_onnx(step, tmp_path, layout="native")
    assert "lincompile.LawcatWindow" not in report.operators and report.verified["max_error"] < 1e-4
    assert any("beside a window stays in stock operators: " in note for note in report.notes)


@pytest.mark.parametrize("rotary", ["remove", "keep"])
def test_the_proof_refuses_the_other_form(monkeypatch: pytest.MonkeyPatch, rotary: str) -> None:
    """A match that took rotated queries and keys for plain ones, or the reverse, is no match."""
    from exported_models import step_program

    from lincompile.lowering.onnx import sites

    step = step_program("llama-gqa", "lawcat", window=4, rotary=rotary)
    assert sites.fuse_sites(step)[1:] == (2, "")
    right = sites.lawcat_window
    monkeypatch.setattr(sites, "lawcat_window", lambda *args: right(*args[:-2], not args[-2], args[-1]))
    same, count, reason = sites.fuse_sites(step)
    assert same is step and count == 0 and "differs from the op by" in reason
