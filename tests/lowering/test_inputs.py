"""Padding masks of either polarity and token types, from compile to the opened artefact, its ONNX file and training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lincompile
from lincompile.lowering.evaluation.perplexity import logits_of_program
from lincompile.passes.capture import capture
from lincompile.passes.errors import RefusedError

VOCAB, T = 64, 9
IDS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(0))
NONE = torch.zeros(2, T, dtype=torch.bool)
LEFT = torch.arange(T)[None] < torch.tensor([[3], [0]])


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, whose ``src_key_padding_mask`` is True at padding."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        x = self.encoder(self.embed(tokens), mask, src_key_padding_mask, self.causal)
        logits: Tensor = self.head(x)
        return logits


EXAMPLE = {"tokens": IDS, "src_key_padding_mask": NONE}


@pytest.mark.parametrize(
    ("causal", "attn"),
    [(False, "softmax"), (False, "hedgehog"), (True, "softmax"), (True, "lawcat"), (True, "gla"), (True, "hedgehog")],
)
@torch.no_grad()
def test_torchs_key_padding_mask_in_an_opened_artefact_and_onnx(causal: bool, attn: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from lincompile.lowering.onnx.session import OnnxSession

    model = Encoder(causal).eval()
    compiled = lincompile.compile(model, example=EXAMPLE, attn=attn, target="onnx")
    assert compiled.step.causal is causal
    artefact = lincompile.open(compiled.save(tmp_path / "out"))
    session = OnnxSession(tmp_path / "out" / "onnx")
    for padding in (NONE, LEFT):
        real = ~padding
        wanted = compiled.program(IDS, padding)
        if attn == "softmax":
            count = int(padding[0].sum())  # torch gives NaN where a causal row sees nothing, and to all that see it
            alone = model(IDS[:1, count:], NONE[:1, count:])
            torch.testing.assert_close(wanted[:1, count:], alone, rtol=1e-4, atol=1e-5)
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        out, _ = artefact.step(IDS, positions, real, compiled.step.initial_states(2))
        torch.testing.assert_close(out[real], wanted[real], rtol=1e-4, atol=1e-5)
        exported, _ = session(IDS, positions, real, session.initial_states(2))
        torch.testing.assert_close(exported[real], wanted[real], rtol=1e-3, atol=1e-4)


def test_an_inverted_mask_is_learned_with_as_its_inverse_is() -> None:
    """Distillation, calibration and perplexity of a model are those of the model with its mask the other way round."""

    class Other(nn.Module):
        prefix = "model."

        def __init__(self) -> None:
            super().__init__()
            self.model = Encoder(causal=True)

        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.model(tokens, ~attention_mask)
            return out

    text = torch.randint(0, VOCAB, (2000,), generator=torch.Generator().manual_seed(1))
    same = {"attn": "gla", "distil": text, "tokens": 1024, "length": 32, "batch": 2, "quant": "w6a16"}
    inverted = lincompile.compile(Encoder(causal=True).eval(), example=EXAMPLE, **same)
    plain = lincompile.compile(Other().eval(), example={"tokens": IDS, "attention_mask": ~NONE}, **same)
    assert inverted.transfer is not None and plain.transfer is not None
    assert inverted.transfer.after == pytest.approx(plain.transfer.after, rel=1e-3)
    for made in (inverted.program, inverted.teacher, capture(Encoder(causal=True).eval(), EXAMPLE)):
        ((_, logits),) = logits_of_program(made)(IDS)
        with torch.no_grad():
            torch.testing.assert_close(logits, made(IDS, NONE))
    with torch.no_grad():
        torch.testing.assert_close(inverted.program(IDS, LEFT), plain.program(IDS, ~LEFT), rtol=1e-3, atol=1e-3)


def test_token_types_are_noted_and_other_inputs_refused() -> None:
    class Question(Encoder):
        def forward(self, tokens: Tensor, is_question: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.head(self.encoder(self.embed(tokens + is_question)))
            return out

    class Marks(Encoder):
        def forward(self, tokens: Tensor, token_type_ids: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.head(self.encoder(self.embed(tokens + token_type_ids)))
            return out

    compiled = lincompile.compile(Marks().eval(), example={"tokens": IDS, "token_type_ids": IDS * 0}, attn="softmax")
    assert "the artefact gives the model 0 for every 'token_type_ids': one segment" in compiled.notes
    with pytest.raises(RefusedError, match=r"also takes 'is_question', which an artefact can't give"):
        lincompile.compile(Question().eval(), example={"tokens": IDS, "is_question": ~NONE}, attn="softmax")
