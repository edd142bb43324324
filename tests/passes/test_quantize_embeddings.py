"""Packed embeddings: one copy for a table and its head, the same rows everywhere, refused where it can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import lincompile
from lincompile.kernels.int6_linear.codes import dequantize, quantize_weight
from lincompile.kernels.int6_linear.pack import pack
from lincompile.passes.capture import capture
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.program import Program
from lincompile.passes.quantization.embeddings import table_codes
from lincompile.passes.quantize import Quantize
from lincompile.passes.verify import op_name, verify

ops = torch.ops.lincompile


def packed(rows: int, width: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    codes, scale = quantize_weight(torch.randn(rows, width))
    return dequantize(codes, scale), (*pack(codes), scale)


def program_of(name: str) -> Program:
    return capture(*zoo.build(name))


def output(program: Program) -> Tensor:
    value: Any = program(**program.example)
    found: Tensor = value if isinstance(value, Tensor) else value[0]
    return found


@pytest.mark.parametrize("width", [32, 50, 64, 300])
def test_a_lookup_reads_the_dequantized_rows(width: int) -> None:
    table, planes = packed(40, width)
    ids = torch.tensor([[0, 39, 7], [7, 7, 1]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = ops.int6_embedding(ids, *planes, width, 128, dtype)
        assert found.dtype == dtype and torch.equal(found, table[ids].to(dtype))
    assert ops.int6_embedding(ids[:, :0], *planes, width, 128, torch.float32).shape == (2, 0, width)


def test_the_op_is_sound_under_tracing() -> None:
    _, planes = packed(16, 64)
    torch.library.opcheck(ops.int6_embedding.default, (torch.tensor([[3, 5]]), *planes, 64, 128, torch.float32))


def test_ids_outside_the_table_and_wrong_planes_are_refused() -> None:
    _, planes = packed(16, 64)
    for bad in (-1, 16):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            ops.int6_embedding(torch.tensor([bad]), *planes, 64, 128, torch.float32)
    with pytest.raises(ValueError, match=r"int6_embedding: planes and scales of widths .* don't hold rows of 96"):
        ops.int6_embedding(torch.tensor([1]), *planes, 96, 128, torch.float32)
    with pytest.raises(ValueError, match=r"int6_embedding: ids must be integers, got torch\.float32"):
        ops.int6_embedding(torch.tensor([1.0]), *planes, 64, 128, torch.float32)


def test_a_tied_table_is_stored_once_and_its_float_weights_leave() -> None:
    program = program_of("gpt2")
    table = program.graph_module.get_parameter("transformer.wte.weight").detach().clone()
    plain = program.clone()
    Quantize("w6a16").run(plain)
    report = Quantize("w6a16", embeddings=True).run(program).report
    (record,) = report["embeddings"]
    assert record["head"] == "lm_head" and record["rows"] == len(table) and record["bytes_per_weight"] < 0.82
    assert "lm_head" in [layer["name"] for layer in report["layers"]]
    state = program.graph_module.state_dict()
    assert not any(value.is_floating_point() and value.numel() == table.numel() for value in state.values())
    assert len([name for name in state if "wte" in name or "lm_head" in name]) == 3  # two planes and the scales
    # The position table is indexed by positions: it stays as it was.
    assert any(str(node.target) == "aten.embedding.default" for node in program.graph_module.graph.nodes)
    assert verify(program) is None
    # Rounding the table by hand in the program without packed embeddings gives the same logits.
    rounded = dequantize(*quantize_weight(table))
    plain.graph_module.get_parameter("transformer.wte.weight").data.copy_(rounded)
    torch.testing.assert_close(output(program), output(plain), atol=1e-5, rtol=1e-5)
    again = Quantize("w6a16", embeddings=True).run(program)
    assert again.modified is False
    assert program.metadata["quantization"]["embeddings"] == [record]


def test_an_untied_table_and_head_are_packed_each() -> None:
    program = program_of("llama-gqa")
    report = Quantize("w6a8", embeddings=True, lm_head=True).run(program).report
    (record,) = report["embeddings"]
    heads = [layer for layer in report["layers"] if layer["name"] == "lm_head"]
    if record["head"] is None:
        assert record["weight"].endswith("embed_tokens.weight") and len(heads) == 1
    names = [name for name, _ in program.graph_module.named_parameters()]
    assert not [name for name in names if "embed_tokens" in name or "lm_head" in name]
    assert [op_name(node) for node in program.graph_module.graph.nodes].count("int6_embedding") == 1


def test_scales_of_least_error_beat_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 64)
    to_nearest, searched = (dequantize(*table_codes(weight, method, 128)) for method in ("rtn", "gptq"))
    assert float((searched - weight).norm()) < 0.98 * float((to_nearest - weight).norm())


def test_the_head_follows_a_uniform_plan_and_rounds_to_eight_bits_otherwise() -> None:
    for plan, expected in (("w6a6", "w6a6"), ("w8a8", "w6a8"), ("int6", "w6a8")):
        report = Quantize(plan, embeddings=True).run(program_of("gpt2")).report
        schemes = {layer["name"]: layer["scheme"] for layer in report["layers"]}
        assert schemes["lm_head"] == expected


class Reads(nn.Module):
    """Logits through the embedding's own weight, written as a sum over features that no linear layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 64), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.embed(tokens))) + self.embed.weight.sum(dim=0)


def test_what_cannot_be_packed_is_refused_with_the_reason() -> None:
    program = capture(Reads().eval(), torch.randint(0, 50, (2, 8)))
    with pytest.raises(RefusedError, match=r"the embedding 'embed\.weight' can't be packed: aten\.sum.* reads it, too"):
        Quantize("w6a8", embeddings=True).run(program)
    assert "embed.weight" in program.graph_module.state_dict()
    no_tokens = capture(nn.Linear(64, 64).eval(), torch.randn(2, 5, 64))
    with pytest.raises(RefusedError, match="no embedding table that its tokens index"):
        Quantize("w6a8", embeddings=True).run(no_tokens)
    skipped = program_of("gpt2")
    with pytest.raises(RefusedError, match=r"can't be packed: left in float as asked \(skip\)"):
        Quantize("w6a8", embeddings=True, skip=("lm_head",)).run(skipped)
    broken = program_of("gpt2")
    broken.graph_module.get_parameter("transformer.wte.weight").data[3, 3] = float("nan")
    with pytest.raises(LincompileError, match="NaN or infinity"):
        Quantize("w6a8", embeddings=True).run(broken)


def test_an_artefact_holds_the_table_at_six_bits_and_gives_the_same_tokens(tmp_path: Path) -> None:
    model, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(model, example=example, attn="softmax", quant="w6a16", quant_embeddings=True)
    before = compiled.generate([1, 2, 3, 4], max_new_tokens=8)
    compiled.save(tmp_path / "it")
    artefact = lincompile.open(tmp_path / "it")
    assert "int6_embedding" in str(artefact.step.graph_module.graph)
    assert artefact.generate([1, 2, 3, 4], max_new_tokens=8) == before


class Headless(nn.Module):
    """An encoder of 50 token ids whose output is 128 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.inner = nn.Linear(128, 128)

    def forward(self, idx: Tensor) -> Tensor:
        return torch.relu(self.inner(self.embed(idx)))


def test_the_vocabulary_is_the_rows_of_the_packed_table() -> None:
    example = {"idx": torch.randint(0, 50, (2, 9))}
    compiled = lincompile.compile(Headless(), example=example, attn="softmax", quant="w6a16", quant_embeddings=True)
    assert "int6_embedding" in str(compiled.step.graph_module.graph)
    assert compiled.session.vocab_size == 50


def test_a_packed_embedding_goes_to_onnx_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from lincompile.lowering.onnx.export import export_onnx

    model, example = zoo.build("llama-gqa")
    compiled = lincompile.compile(model, example=example, attn="softmax", quant="w6a16", quant_embeddings=True)
    report = export_onnx(compiled.step, tmp_path, embeddings="int6", genai=False)
    assert report.operators["com.microsoft.GatherBlockQuantized"] == 2
    assert report.verified["rms_error"] < 1e-4
