"""Two layers of attention with weights set by hand, in which one head of four looks back by content."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, POSITIONS, HEADS, KV_HEADS = 128, 64, 4, 2
WIDTH = 2 * VOCAB + POSITIONS  # what a position holds: its token, its place, the token before it
TOKEN, PLACE, BEFORE = slice(0, VOCAB), slice(VOCAB, VOCAB + POSITIONS), slice(VOCAB + POSITIONS, WIDTH)
LOOKS_BACK = (1, 1)  # site and KV head; of its two query heads the second one
SHARP = 20.0  # a score, where all others are 0


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * VOCAB, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * VOCAB, bias=False) for _ in "kv")
        self.out = nn.Linear(HEADS * VOCAB, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, VOCAB)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Induction(nn.Module):
    """``forward(idx int64 [B, T]) -> [B, T, VOCAB]``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@torch.no_grad()
def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and an example of its input."""
    model = Induction()
    for parameter in model.parameters():
        parameter.zero_()
    model.tokens.weight[:, TOKEN] = torch.eye(VOCAB)
    model.places.weight[:, PLACE] = torch.eye(POSITIONS)
    first, second = model.layers
    # The first KV head of the first layer reads the token before, and its first query head writes that down.
    first.q.weight[:POSITIONS, PLACE] = SHARP * torch.eye(POSITIONS)
    first.k.weight[1:POSITIONS, PLACE] = torch.eye(POSITIONS)[:-1]
    first.v.weight[:VOCAB, TOKEN] = torch.eye(VOCAB)
    first.out.weight[BEFORE, :VOCAB] = torch.eye(VOCAB)
    # The second KV head of the second layer looks, in its last query head, for what came after the same token.
    second.q.weight[-VOCAB:, TOKEN] = SHARP * torch.eye(VOCAB)
    second.k.weight[-VOCAB:, BEFORE] = torch.eye(VOCAB)
    second.v.weight[-VOCAB:, TOKEN] = torch.eye(VOCAB)
    second.out.weight[TOKEN, -VOCAB:] = torch.eye(VOCAB)
    model.head.weight[:, TOKEN] = torch.eye(VOCAB)
    return model, {"idx": torch.arange(24).view(2, 12)}
