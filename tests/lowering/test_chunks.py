"""How long the chunks of a prompt are: by the model's width on a GPU, and without changing what is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lincompile
from lincompile.lowering import chunks
from lincompile.lowering.chunks import GPU_CHUNK, LONGEST, PREFILL_CHUNK, gpu_chunk
from lincompile.lowering.evaluation.score import Scorer
from lincompile.lowering.generate import Session, chunk_of, generate, left_pad, prefill
from lincompile.lowering.sharded import ShardedSession
from lincompile.lowering.triton import lower
from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.quantize import Quantize
from lincompile.passes.stateful import StepProgram, make_stateful
from lincompile.passes.stepping.last_token import widest

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 9], [30, 3, 11, 20]]


class Layer(nn.Module):
    """A language model of one layer, gated as Llama's are."""

    def __init__(self, width: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (-1, 64)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return self.head(x + self.down(functional.silu(self.gate(x)) * self.up(x)))


def stepped(
    width: int, inner: int, *passes: object, attn: str = "lawcat", vocabulary: int = 49152, device: str = "meta"
) -> StepProgram:
    """A step program, by default without weights."""
    with torch.device(device):
        module = Layer(width, inner, vocabulary).eval()
        ids = torch.zeros(2, 12, dtype=torch.int64)
    rewrite = [] if attn == "softmax" else [LinearizeAttention(attn)]
    program = Pipeline([Canonicalize(), ProveAttention(), *rewrite, *passes])(lincompile.capture(module, {"ids": ids}))
    return make_stateful(program, check=False)


@pytest.mark.parametrize(
    ("width", "inner", "attn", "numbers", "chunk"),
    [
        (576, 1536, "lawcat", 3 * 576, 16384),  # q, k and v in one are wider than the feed-forward layer
        (576, 1536, "softmax", 3 * 576, 16384),  # keys and values of the past aren't the chunk's
        (2048, 8192, "lawcat", 8192, 4096),
        (4096, 14336, "lawcat", 14336, 2048),
        (4096, 40960, "lawcat", 40960, 2048),
        (64, 64, "lawcat", 192, 16384),
    ],
)
def test_the_narrower_the_model_the_longer_the_chunk(
    width: int, inner: int, attn: str, numbers: int, chunk: int
) -> None:
    step = stepped(width, inner, attn=attn)
    assert widest(step) == numbers
    assert gpu_chunk(step) == chunk
    assert chunk in (GPU_CHUNK, LONGEST) or chunk * numbers <= chunks.ROOM < 2 * chunk * numbers


def test_packed_weights_and_the_vocabulary_change_nothing() -> None:
    packed = stepped(64, 320, Quantize("w6a8", embeddings=True), vocabulary=2000, device="cpu")
    assert "int6_linear" in packed.graph_module.code and "int6_embedding" in packed.graph_module.code
    assert widest(packed) == widest(stepped(64, 320, vocabulary=2000)) == widest(stepped(64, 320)) == 320


def on_a_gpu(session: Session) -> Session:
    """As if its weights lay there: only the choice is asked for."""
    session.device = torch.device("cuda")
    return session


def test_a_session_asks_the_graph_before_it_was_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "ROOM", 4096 * 320)
    step = stepped(64, 320, vocabulary=100, device="cpu")
    lowered = lower(step, decoding=True, own=True)[0]
    assert widest(lowered) == 2 * 320, "gate and up are one layer"
    session = Session(lowered, vocab_size=100, plain=step)
    assert session.chunk == chunk_of(session) == PREFILL_CHUNK, "not on a GPU"
    assert chunk_of(on_a_gpu(session)) == 4096


def test_where_all_logits_are_computed_chunks_stay_short(toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(toy.step)
    assert chunk_of(on_a_gpu(session)) == LONGEST
    monkeypatch.setattr("lincompile.lowering.generate.last_token_only", lambda step: None)
    assert chunk_of(on_a_gpu(Session(toy.step))) == GPU_CHUNK
    package = StepProgram(lambda *arguments: arguments, toy.states)  # type: ignore[arg-type]
    assert widest(package) is None and gpu_chunk(package) == GPU_CHUNK
    sharded = ShardedSession.__new__(ShardedSession)
    Session.__init__(sharded, toy.step, vocab_size=40)
    assert chunk_of(on_a_gpu(sharded)) == GPU_CHUNK


def test_whoever_asks_for_all_logits_gets_them_in_short_chunks(
    toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lincompile.lowering.generate.GPU_CHUNK", 4)
    monkeypatch.setattr("lincompile.lowering.evaluation.score.GPU_CHUNK", 4)
    monkeypatch.setattr(Session, "chunk", 16)
    session, widths = Session(toy.step), []
    tokens, mask = left_pad([[index % 40 for index in range(11)]])
    prefill(session, tokens, mask, collect=lambda start, logits: widths.append(logits.shape[1]))
    assert widths == [4, 4, 3]
    read: list[int] = []
    prefill(session, tokens, mask, on_chunk=lambda done, total: read.append(done))
    assert read == [11], "one chunk where only the last token's logits are wanted"
    plain, seen = session.step, []

    def counted(*arguments: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen.append(arguments[0].shape[1])
        return plain(*arguments)

    session.step = counted  # type: ignore[method-assign]
    list(Scorer(session, 32, session.chunk).score([([1, 2, 3, 4, 5], [6, 7, 8])], 4))
    assert seen and max(seen) == 4


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_a_prompt_in_chunks_of_any_length_is_the_same_prompt(
    toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Chunks by the session's choice, a shorter one at the end, against one chunk."""
    session = Session(toy.step)
    whole = generate(session, PROMPTS, 6, chunk=1000)
    monkeypatch.setattr(Session, "chunk", chunk)
    parts = generate(session, PROMPTS, 6)
    assert parts.tokens == whole.tokens
    torch.testing.assert_close(parts.state.states, whole.state.states, atol=1e-5, rtol=1e-5)
