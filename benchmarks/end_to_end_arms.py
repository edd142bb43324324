"""What ``end_to_end.py`` measures: one model in three forms, each with the same two calls.

``prefill(length)`` and ``decode(batch, context)`` give something to call again and again, and how many bytes of state
it holds. All are greedy and leave the chosen token on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DTYPE = torch.bfloat16
# Tokens that a static cache has room for while it is timed, which is more than timing takes.
SPARE = 192
EPSILON = 1e-6  # of the norms


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model; ``tied``: its output head is its embedding."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = True


@dataclass
class Runs:
    """``call()`` is a prefill or one decoding step; ``state_bytes`` what it carries from token to token."""

    call: Callable[[], Any]
    state_bytes: int = 0
    notes: dict[str, Any] | None = None


def llama(shape: Shape, positions: int) -> Any:
    """The Hugging Face model with random weights, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=positions, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_tokens(shape: Shape, batch: int, length: int) -> Tensor:
    return torch.randint(0, shape.vocabulary, (batch, length), device="cuda")


class Lincompile:
    """``lincompile.compile`` (LAWCAT at every site) and the session that its artefact gives on a GPU, whose graph is
    lowered to Triton kernels. ``compiled``: that graph under ``torch.compile``; otherwise as the session runs it.
    ``kept``: sites that stay softmax.

    Raises:
        RuntimeError: the model has no step form, or a chain of some site wasn't fused.
    """

    def __init__(
        self,
        shape: Shape,
        positions: int,
        compiled: bool,
        quant: dict[str, Any] | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        import lincompile
        from lincompile.lowering.generate import Session
        from lincompile.lowering.triton import lower
        from lincompile.passes.stepping.last_token import last_token_only

        # "cuda" is spelt out: dry runs put their own word in.
        device = str(torch.zeros(1, device="cuda").device)
        model = llama(shape, positions)
        built = lincompile.compile(
            model,
            attn="lawcat",
            target="triton",
            device=device,
            dtype=str(DTYPE).split(".")[1],
            keep_softmax="".join(f"{index}," for index in kept) or None,
            **(quant or {}),
        )
        # As an opened artefact's session: nobody else holds the weights.
        self.shape, self.session = shape, Session(lower(built.step, decoding=True, own=True)[0], plain=built.step)
        tensors = [*self.session.program.graph_module.parameters(), *self.session.program.graph_module.buffers()]
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.notes: dict[str, Any] = {
            "compile_s": built.seconds, "notes": built.notes[1:], "weights_gib": round(sum(stores.values()) / 2**30, 3),
        }  # fmt: skip
        if not self.session.states:
            raise RuntimeError(f"no step form: {built.notes}")
        targets = [str(node.target) for node in self.session.program.graph_module.graph.nodes]
        if targets.count("lincompile.lawcat_inputs.default") != (linear := shape.layers - len(kept)):
            raise RuntimeError(f"the stages of {linear} layers weren't all fused: {built.notes}")
        # Two graphs of the same weights: one that may be compiled, and one as it is, to compare it with.
        self.last, self.plain = (
            Session(last_token_only(self.session.program), vocab_size=shape.vocabulary)  # type: ignore[arg-type]
            for _ in range(2)
        )
        self.compiled = compiled
        if compiled:
            self.last = _compiled(self.last)
            self.session = _compiled(self.session)

    def _inputs(self, batch: int, length: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        tokens = random_tokens(self.shape, batch, length)
        positions = torch.arange(start, start + length, device="cuda").expand(batch, -1).contiguous()
        mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        if self.compiled and length > 1:  # one compilation for every length
            for tensor in (tokens, positions, mask):
                torch._dynamo.mark_dynamic(tensor, 1)
        return tokens, positions, mask

    def prefill(self, length: int) -> Runs:
        from lincompile.lowering.generate import prefill

        inputs, states = self._inputs(1, length), self.session.initial_states(1)
        notes = dict(self.notes)
        if not self.compiled:  # as a user's call reads a prompt: in chunks
            return Runs(lambda: prefill(self.session, inputs[0], inputs[2]).logits.argmax(-1), _bytes(states), notes)
        have, want = self.last.step(*inputs, states)[0], self.plain.step(*inputs, states)[0]
        notes["differs"] = float((have.double() - want.double()).norm() / want.double().norm())
        return Runs(lambda: self.last.step(*inputs, states)[0].argmax(-1), _bytes(states), notes)

    def decode(self, batch: int, context: int) -> Runs:
        token, positions, mask = self._inputs(batch, 1, context - 1)
        shapes = [(batch, *(context - 1 if n is None else n for n in spec.shape)) for spec in self.session.states]
        states = [
            (0.1 * torch.rand(size, device="cuda")).to(spec.dtype)  # of a mask, True
            for size, spec in zip(shapes, self.session.states, strict=True)
        ]

        def steps(count: int) -> None:
            carried = states
            for _ in range(count):
                logits, carried = self.session.step(token, positions, mask, carried)
                token.copy_(logits.argmax(-1))
            # To where the next replay reads them, a kernel for each type; caches that grow begin anew.
            same = [pair for pair in zip(states, carried, strict=True) if pair[0].shape == pair[1].shape]
            for dtype in {state.dtype for state, _ in same}:
                pairs = [pair for pair in same if pair[0].dtype == dtype]
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

        return Runs(lambda count=1: steps(count), _bytes(states))  # type: ignore[misc]

    def generate(self, prompt: int, tokens: int) -> None:
        from lincompile.lowering.generate import generate

        generate(self.session, [random_tokens(self.shape, 1, prompt)[0].tolist()], tokens)


def _compiled(session: Any) -> Any:
    session.program.graph_module.compile()
    return session


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


class HuggingFace:
    """The Hugging Face model with SDPA, its layers under ``torch.compile``, decoding over a full ``StaticCache``.

    Its own SDPA function is registered under another name, for which transformers makes no mask. A mask while a CUDA
    graph is recorded would have SDPA repeat the keys for every query head; over a full cache it would mask nothing.
    """

    def __init__(self, shape: Shape, positions: int, compiled: bool) -> None:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
        self.shape, self.model = shape, llama(shape, positions)
        self.model.config._attn_implementation = "sdpa_without_mask"
        if compiled:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        names = inspect.signature(self.model.forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in names else "cache"  # by transformers' version

    def prefill(self, length: int) -> Runs:
        tokens = random_tokens(self.shape, 1, length)
        return Runs(lambda: self.model(tokens, use_cache=False, logits_to_keep=1).logits.argmax(-1))

    def decode(self, batch: int, context: int) -> Runs:
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=context)
        filling = torch.randn(batch, self.shape.kv_heads, 1, self.shape.head_dim, device="cuda", dtype=DTYPE)
        for layer in cache.layers:
            layer.lazy_initialization(filling, filling)
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(max(0, context - SPARE))
        token = random_tokens(self.shape, batch, 1)

        def steps(count: int) -> None:
            for _ in range(count):
                logits = self.model(token, use_cache=True, **{self.cache_name: cache}).logits
                token.copy_(logits[:, -1:].argmax(-1))

        size = sum(_bytes([layer.keys, layer.values]) for layer in cache.layers)
        return Runs(lambda count=1: steps(count), size)  # type: ignore[misc]

    def generate(self, prompt: int, tokens: int) -> None:
        given = random_tokens(self.shape, 1, prompt)
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        self.model.generate(given, attention_mask=torch.ones_like(given), **length)


class Layer(nn.Module):
    """A decoder layer. ``context`` 0: all tokens at once; otherwise one token over a full cache of so many."""

    def __init__(self, shape: Shape, batch: int, context: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": "cuda", "dtype": DTYPE}
        self.shape, self.prefill = shape, context == 0
        self.sizes = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
        self.qkv = nn.Linear(shape.hidden, sum(self.sizes), **options)
        self.o_proj = nn.Linear(self.sizes[0], shape.hidden, **options)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, **options)
        self.down = nn.Linear(shape.intermediate, shape.hidden, **options)
        self.norms = nn.Parameter(torch.ones(2, shape.hidden, device="cuda", dtype=DTYPE))
        for name in ("keys", "values") if context else ():
            size = (batch, shape.kv_heads, context, shape.head_dim)
            self.register_buffer(name, torch.randn(size, device="cuda", dtype=DTYPE), persistent=False)

    def attend(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, attention: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """The heads' outputs side by side, of all projections side by side; ``attention`` in SDPA's place."""
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in qkv.split(self.sizes, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if not self.prefill:
            self.keys.index_copy_(2, position, k)
            self.values.index_copy_(2, position, v)
            k, v = self.keys, self.values
        if attention is None:
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=self.prefill, enable_gqa=True)
        else:
            o = attention(q, k, v)
        return o.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        h = functional.rms_norm(x, (self.shape.hidden,), self.norms[0], EPSILON)
        x = x + self.o_proj(self.attend(self.qkv(h), cos, sin, position))
        gate, up = self.gate_up(functional.rms_norm(x, (self.shape.hidden,), self.norms[1], EPSILON)).chunk(2, dim=-1)
        out: Tensor = x + self.down(functional.silu(gate) * up)
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Model(nn.Module):
    """Token ids ``[B, T]`` to the next token of each row ``[B, 1]``; ``context`` 0 is prefill."""

    def __init__(self, shape: Shape, batch: int, context: int, length: int) -> None:
        super().__init__()
        positions = torch.arange(length, device="cuda") if context == 0 else torch.tensor([context - 1], device="cuda")
        angles = positions[:, None] * 10000.0 ** -torch.arange(0, 1, 2 / shape.head_dim, device="cuda")
        self.cos, self.sin, self.position = angles.cos().to(DTYPE), angles.sin().to(DTYPE), positions[-1:]
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, device="cuda", dtype=DTYPE)
        self.norm = nn.Parameter(torch.ones(shape.hidden, device="cuda", dtype=DTYPE))
        self.layers = nn.ModuleList(Layer(shape, batch, context) for _ in range(shape.layers))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.position)
        x = functional.rms_norm(x[:, -1:], (x.shape[-1],), self.norm)
        return functional.linear(x, self.embedding.weight).argmax(dim=-1)


class Softmax:
    """The same decoder written for speed: fused projections, FlashAttention, no masks, a preallocated cache."""

    def __init__(self, shape: Shape, positions: int, compiled: bool) -> None:
        self.shape, self.compiled = shape, compiled

    def _model(self, batch: int, context: int, length: int) -> Model:
        model = Model(self.shape, batch, context, length)
        for layer in model.layers if self.compiled else ():
            layer.compile(fullgraph=True, dynamic=False)
        return model

    def prefill(self, length: int) -> Runs:
        model, tokens = self._model(1, 0, length), random_tokens(self.shape, 1, length)
        return Runs(lambda: model(tokens))

    def decode(self, batch: int, context: int) -> Runs:
        model, token = self._model(batch, context, 1), random_tokens(self.shape, batch, 1)

        def steps(count: int) -> None:
            for _ in range(count):
                token.copy_(model(token))

        return Runs(lambda count=1: steps(count), _bytes(list(model.buffers())))  # type: ignore[misc]


ARMS: dict[str, Callable[[Shape, int, bool], Any]] = {
    "lincompile": Lincompile,
    "hf": HuggingFace,
    "softmax": Softmax,
    "session": lambda shape, positions, compiled: Lincompile(shape, positions, False),
    # Which codes random weights get doesn't change what they cost.
    "int6": lambda shape, positions, compiled: Lincompile(
        shape, positions, False, {"quant": "w6a8", "quant_method": "rtn"}
    ),
    "hybrid": lambda shape, positions, compiled: Lincompile(
        shape, positions, False, kept=range(0, shape.layers, max(2, shape.layers // 6))
    ),
}
