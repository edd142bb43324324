"""Tiny models for the tests: every spelling of softmax attention that lincompile claims to read.

``build(name)`` returns ``(module, example)``: a module in evaluation mode with seeded random weights large enough
that attention is far from uniform, and the keyword arguments of one call (batch 2, sequence 12). ``NAMES`` lists
everything; ``NANOGPT``, ``HUGGINGFACE`` and ``TORCH`` are its three parts. To add a model, write a builder and enter
it in ``_BUILDERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, LENGTH, VOCAB, BLOCK = 2, 12, 97, 64

Model = tuple[nn.Module, dict[str, Tensor]]


# --- nanoGPT-like: no Hugging Face code anywhere, one spelling of causal attention each -----------------------------


def _bias(q: Tensor) -> Tensor:
    length = q.shape[2]
    return torch.tril(torch.ones(length, length, dtype=torch.bool, device=q.device))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    score = score.masked_fill(_bias(q) == 0, float("-inf"))
    return F.softmax(score, dim=-1) @ v


def _where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(k.shape[-1])
    return torch.where(_bias(q), score, torch.finfo(score.dtype).min).softmax(-1) @ v


def _triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = torch.full((length, length), float("-inf"), device=q.device).triu(1)
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask, dim=-1), v)


def _einsum_bhtd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhqk,bhkd->bhqd", score.masked_fill(~_bias(q), -1e9).softmax(dim=-1), v)


def _einsum_bthd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    length = q.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weight = torch.softmax(score.masked_fill(mask, float("-inf")), dim=3)
    return torch.einsum("bhqk,bkhd->bqhd", weight, v).transpose(1, 2)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    mask = torch.zeros(length, length, device=q.device).masked_fill(~_bias(q), float("-inf"))
    q, k, v = (x.reshape(batch * heads, length, dim) for x in (q, k, v))
    score = torch.baddbmm(mask.expand(batch * heads, length, length), q, k.transpose(1, 2), alpha=dim**-0.5)
    return torch.bmm(score.softmax(-1), v).view(batch, heads, length, dim)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (x.transpose(0, 1).reshape(heads * batch, length, dim) for x in (q, k, v))
    score = (torch.bmm(q, k.transpose(1, 2)) * dim**-0.5).masked_fill(~_bias(q[None]), float("-inf"))
    return torch.bmm(score.softmax(-1), v).view(heads, batch, length, dim).transpose(0, 1)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(batch, kv_heads, heads // kv_heads, length, dim)
    score = torch.einsum("bkgqd,bksd->bkgqs", grouped, k) * dim**-0.5
    weight = score.masked_fill(~_bias(q), float("-inf")).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", weight, v).reshape(batch, heads, length, dim)


def _repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return _sdpa(q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def _enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _handwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    score = score.masked_fill(~_bias(q), float("-inf"))
    weight = torch.exp(score - score.max(dim=-1, keepdim=True).values)
    return (weight / weight.sum(dim=-1, keepdim=True)) @ v


def _float32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    score = score.masked_fill(~_bias(q), torch.finfo(score.dtype).min)
    return F.softmax(score, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _sliding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 5))


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def causal(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(query >= key, score, -float("inf"))

    out = flex_attention(q, k, v, score_mod=causal)
    assert isinstance(out, Tensor)
    return out


class SelfAttention(nn.Module):
    """Fused qkv projection, a spelling of attention (None: an additive mask in a buffer), output projection."""

    mask: Tensor

    def __init__(self, width: int, heads: int, kv_heads: int, attend: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.attend = attend
        self.c_attn = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.c_proj = nn.Linear(width, width)
        if attend is None:
            self.register_buffer("mask", torch.full((BLOCK, BLOCK), float("-inf")).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        batch, length, width = x.shape
        kv_width = self.kv_heads * self.head_dim
        q, k, v = self.c_attn(x).split((width, kv_width, kv_width), dim=2)
        q = q.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        y = self._buffered(q, k, v) if self.attend is None else self.attend(q, k, v)
        projected: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))
        return projected

    def _buffered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        score = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim) + self.mask[:length, :length]
        return F.softmax(score, dim=-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class NanoGPT(nn.Module):
    """A decoder in the manner of nanoGPT: learned positions, tied head, ``forward(idx, targets=None)``.

    Returns logits [B, T, V], or ``(logits, loss)`` when it gets targets. With ``last_only`` it behaves as the
    original does: always a pair, and without targets only the logits [B, 1, V] of the last position.
    """

    def __init__(
        self,
        attend: Callable[..., Tensor] | None = _sdpa,
        kv_heads: int = 4,
        layers: int = 2,
        width: int = 32,
        last_only: bool = False,
    ) -> None:
        super().__init__()
        self.block_size, self.last_only = BLOCK, last_only
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(BLOCK, width)
        self.h = nn.ModuleList(Block(width, SelfAttention(width, 4, kv_heads, attend)) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        """idx and targets int64 [B, T]."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            return logits, F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))
        return (self.lm_head(x[:, [-1], :]), None) if self.last_only else self.lm_head(x)


def tokens(batch: int = BATCH, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Random token ids, int64 [batch, length]; 3 and above, so that no special token of a tiny config is hit."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def _nanogpt(attend: Callable[..., Tensor] | None, kv_heads: int = 4) -> Callable[[], Model]:
    return lambda: (NanoGPT(attend, kv_heads), {"idx": tokens()})


# --- Hugging Face, random tiny configurations ------------------------------------------------------------------------

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": BLOCK,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def huggingface_config(name: str, **changes: Any) -> Any:
    """A tiny transformers configuration by the zoo's name of the model (without ``-eager``)."""
    import transformers

    gemma = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": BLOCK, "vocab_size": VOCAB}
    gpt2 |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    wide = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
    bert = wide | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vit = {k: v for k, v in bert.items() if k.endswith(("size", "prob", "range", "heads", "layers"))}
    vit |= {"image_size": 32, "patch_size": 8}
    t5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    table: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", _DECODER),
        "llama-gqa": (
            "LlamaConfig",
            _DECODER | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
        ),
        "mistral": ("MistralConfig", _DECODER | {"sliding_window": 5, "head_dim": 8}),
        "qwen2": ("Qwen2Config", _DECODER),
        "qwen3": ("Qwen3Config", _DECODER | {"head_dim": 8}),
        "gemma2": ("Gemma2Config", _DECODER | gemma | {"query_pre_attn_scalar": 16}),
        "gemma3": ("Gemma3TextConfig", _DECODER | gemma | {"query_pre_attn_scalar": 16}),
        "gpt2": ("GPT2Config", gpt2),
        "gpt-neox": ("GPTNeoXConfig", wide),
        "bert": ("BertConfig", bert),
        "roberta": ("RobertaConfig", bert | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}),
        "vit": ("ViTConfig", vit),
        "t5": ("T5Config", t5 | {"decoder_start_token_id": 0, "initializer_factor": 1.0}),
    }
    class_name, fields = table[name]
    return getattr(transformers, class_name)(**(fields | changes))


def token_example(kind: type[nn.Module]) -> dict[str, Tensor]:
    """The example of a wrapper that reads tokens: ids, a mask of ones, consecutive positions, first segment."""
    import inspect

    ids = tokens()
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH).clone(),
        "token_type_ids": torch.zeros_like(ids),
        "decoder_input_ids": tokens(seed=1),
    }
    return {name: known[name] for name in inspect.signature(kind.forward).parameters if name != "self"}


def _huggingface(name: str, auto: str = "AutoModelForCausalLM", attention: str = "sdpa") -> Callable[[], Model]:
    def builder() -> Model:
        import transformers

        from lincompile.passes.formats import wrap

        model = getattr(transformers, auto).from_config(huggingface_config(name), attn_implementation=attention)
        if name == "vit":
            pixels = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            return wrap.Vision(model), {"pixel_values": pixels}
        kinds: dict[str, type[wrap.Wrapper]] = {
            "bert": wrap.EncoderWithTypes,
            "roberta": wrap.Encoder,
            "t5": wrap.EncoderDecoder,
        }
        kind = kinds.get(name, wrap.CausalLM)
        return kind(model), token_example(kind)

    return builder


# --- torch's own attention modules -----------------------------------------------------------------------------------


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` over embedded tokens, int64 [B, T] -> [B, T, V]; causal or bidirectional."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [B, T] -> [B, T, V]."""
        length = input_ids.shape[1]
        mask = torch.full((length, length), float("-inf"), device=input_ids.device).triu(1) if self.causal else None
        logits: Tensor = self.head(self.encoder(self.embed(input_ids), mask=mask, is_causal=self.causal))
        return logits


class TorchDecoder(nn.Module):
    """``nn.TransformerDecoder``: causal self-attention and cross-attention to a memory float [B, S, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, input_ids: Tensor, memory: Tensor) -> Tensor:
        """input_ids int64 [B, T], memory [B, S, 32] -> [B, T, V]."""
        length = input_ids.shape[1]
        mask = torch.full((length, length), float("-inf"), device=input_ids.device).triu(1)
        logits: Tensor = self.head(self.decoder(self.embed(input_ids), memory, tgt_mask=mask, tgt_is_causal=True))
        return logits


class TorchMultihead(nn.Module):
    """One residual ``nn.MultiheadAttention``; with ``need_weights`` its probabilities are returned too."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        """x [B, T, 32] -> [B, T, 32] (and weights [B, T, T])."""
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return (x + y, weights) if self.need_weights else x + y


def _features(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, 32, generator=torch.Generator().manual_seed(seed))


_NANOGPT: dict[str, Callable[[], Model]] = {
    "nanogpt": _nanogpt(_sdpa),
    "nanogpt-masked-fill": _nanogpt(_masked_fill),
    "nanogpt-where": _nanogpt(_where),
    "nanogpt-triu": _nanogpt(_triu),
    "nanogpt-additive-buffer": _nanogpt(None),
    "nanogpt-einsum-bhtd": _nanogpt(_einsum_bhtd),
    "nanogpt-einsum-bthd": _nanogpt(_einsum_bthd),
    "nanogpt-baddbmm": _nanogpt(_baddbmm),
    "nanogpt-heads-first": _nanogpt(_heads_first),
    "nanogpt-gqa-5d": _nanogpt(_grouped, kv_heads=2),
    "nanogpt-gqa-repeat": _nanogpt(_repeat_interleave, kv_heads=2),
    "nanogpt-gqa-flag": _nanogpt(_enable_gqa, kv_heads=2),
    "nanogpt-handwritten": _nanogpt(_handwritten),
    "nanogpt-float32-softmax": _nanogpt(_float32_softmax),
    "nanogpt-bidirectional": _nanogpt(_full),
    "nanogpt-sliding": _nanogpt(_sliding),
}
_HUGGINGFACE: dict[str, Callable[[], Model]] = {
    "llama": _huggingface("llama"),
    "llama-eager": _huggingface("llama", attention="eager"),
    "llama-gqa": _huggingface("llama-gqa"),
    "mistral": _huggingface("mistral"),
    "qwen2": _huggingface("qwen2"),
    "qwen3": _huggingface("qwen3"),
    "gemma2": _huggingface("gemma2", attention="eager"),  # only eager has the softcap of the scores
    "gemma3": _huggingface("gemma3"),
    "gpt2": _huggingface("gpt2"),
    "gpt2-eager": _huggingface("gpt2", attention="eager"),
    "gpt-neox": _huggingface("gpt-neox"),
    "bert": _huggingface("bert", "AutoModel"),
    "bert-eager": _huggingface("bert", "AutoModel", "eager"),
    "roberta": _huggingface("roberta", "AutoModel"),
    "vit": _huggingface("vit", "AutoModel"),
    "t5": _huggingface("t5", "AutoModelForSeq2SeqLM"),
}
_TORCH: dict[str, Callable[[], Model]] = {
    "torch-encoder": lambda: (TorchEncoder(), {"input_ids": tokens()}),
    "torch-encoder-causal": lambda: (TorchEncoder(causal=True), {"input_ids": tokens()}),
    "torch-decoder": lambda: (TorchDecoder(), {"input_ids": tokens(), "memory": _features(length=7)}),
    "torch-multihead": lambda: (TorchMultihead(), {"x": _features()}),
    "torch-multihead-weights": lambda: (TorchMultihead(need_weights=True), {"x": _features()}),
    # flex_attention on the CPU has no backward: capture it without gradients
    "torch-flex": lambda: (NanoGPT(_flex).requires_grad_(False), {"idx": tokens()}),
}
_BUILDERS = _NANOGPT | _HUGGINGFACE | _TORCH

NANOGPT, HUGGINGFACE, TORCH = list(_NANOGPT), list(_HUGGINGFACE), list(_TORCH)
NAMES = list(_BUILDERS)


def build(name: str, seed: int = 0) -> Model:
    """Build one model of the zoo. The ``HUGGINGFACE`` ones need transformers; the rest needs torch alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, example = _BUILDERS[name]()
    return module.eval(), example
