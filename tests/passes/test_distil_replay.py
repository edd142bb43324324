"""Recorded training steps: the same losses and gradients as steps that are run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lincompile.passes.distil.replay import Replayed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("enabled", [True, False])
def test_replayed_steps_equal_steps(device: str, enabled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 11)).to(device)

    def learn(tokens: Tensor) -> Tensor:
        loss: Tensor = model(tokens.to(device)).logsumexp(-1).mean()
        loss.backward()
        return loss.detach()

    replayed = Replayed(learn, list(model.parameters()), enabled)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step, (batch, pieces) in enumerate([(2, 1), (2, 1), (4, 2), (4, 2), (3, 1), (2, 2)]):
        tokens = torch.randint(0, 11, (batch, 5 if step % 3 else 7))  # two sizes of windows in turn
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        wanted = [learn(piece) for piece in tokens.chunk(pieces)]
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        got = [replayed(piece) for piece in tokens.chunk(pieces)]
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
        optimizer.step()
