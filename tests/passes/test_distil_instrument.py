"""Training graphs under autocast: what must not be rounded to bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.distil import instrument
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline


class Rotary(nn.Module):
    """One attention whose rotary angles are a matrix product of positions and frequencies."""

    inv_freq: Tensor

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(40, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("inv_freq", 1 / 10 ** torch.linspace(0, 1, width // heads // 2))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] → logits [B, T, 40]."""
        batch, length = input_ids.shape
        x = self.embed(input_ids)
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        with torch.autocast(x.device.type, enabled=False):  # as the model's author would, and no graph records
            positions = torch.arange(length, device=x.device).float()
            angles = positions[:, None] @ self.inv_freq[None, :]
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(y, self.embed.weight)


@torch.no_grad()
def test_positions_are_not_rounded_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Rotary()
    model.qkv.weight.mul_(6)  # scores that tell positions apart
    tokens = torch.randint(0, 40, (1, 700))
    program = Pipeline([Canonicalize(), ProveAttention()])(capture(model.eval(), {"input_ids": tokens[:, :9]}))
    assert [site.proved for site in program.sites] == [True]
    wanted = model(tokens)

    def error() -> float:
        got = instrument.unpadded(program)(tokens)
        assert isinstance(got, (Tensor, tuple))
        logits = got if isinstance(got, Tensor) else got[0]
        return float((logits.float() - wanted)[:, 300:].norm() / wanted[:, 300:].norm())

    monkeypatch.setattr(instrument, "_autocast", lambda program: torch.bfloat16)
    exact = error()
    monkeypatch.setattr(instrument, "_keep_positions_exact", lambda *_: None)
    assert exact < 0.03 < 10 * exact < error()
