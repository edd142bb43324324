"""The identity proof on the whole zoo: the proved program is the model, in outputs and gradients, at other shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline

# (kind of every site, or the pair of alternating kinds; window; query heads; KV heads; head_dim)
KINDS: dict[str, str] = {
    "nanogpt-bidirectional": "full",
    "nanogpt-sliding": "sliding",
    "mistral": "sliding",
    "gemma2": "sliding causal",
    "gemma3": "sliding causal",
    "bert": "full",
    "bert-eager": "full",
    "roberta": "full",
    "vit": "full",
    "t5": "learned learned learned full learned full",
    "torch-encoder": "full",
    "torch-decoder": "causal full",
    "torch-multihead": "full",
    "torch-multihead-weights": "escapes",
}
KV_HEADS = dict.fromkeys(("llama", "llama-eager", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), 2)
KV_HEADS |= {name: 2 for name in zoo.NANOGPT if "gqa" in name} | {"llama-gqa": 3}
SHAPES = [(1, 1), (3, 1), (3, 19)]


def resized(example: dict[str, Tensor], batch: int, length: int) -> dict[str, Tensor]:
    """Inputs like the example's, of another batch and length; with left padding in the first of several rows."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    result: dict[str, Tensor] = {}
    for name, value in example.items():
        if value.dim() == 4:
            result[name] = torch.randn(batch, *value.shape[1:], generator=generator)
        elif value.is_floating_point():
            result[name] = torch.randn(
                batch, length if name == "x" else length + 3, value.shape[2], generator=generator
            )
        elif "mask" in name:
            result[name] = torch.ones(batch, length, dtype=value.dtype)
            if batch > 1 and length > 3:
                result[name][0, : length // 3] = 0
        elif "position" in name:
            result[name] = torch.arange(length).expand(batch, length).clone()
        elif "type" in name:
            result[name] = torch.zeros(batch, length, dtype=value.dtype)
        else:
            result[name] = torch.randint(3, zoo.VOCAB, (batch, length), generator=generator)
    return result


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [item for item in value if isinstance(item, Tensor)]


def run(model: Callable[..., Any], given: dict[str, Tensor], parameters: list[Tensor], real: Tensor | None) -> Any:
    """(outputs at real tokens, gradients of a fixed projection of them)."""
    outputs = tensors(model(**given))
    if real is not None:
        outputs = [value[real] if value.shape[:2] == real.shape else value for value in outputs]
    loss = sum((value * torch.linspace(-1, 1, value.numel()).reshape(value.shape)).sum() for value in outputs)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else []
    return outputs, gradients


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_site_is_found_and_named(proved: Callable[[str], SimpleNamespace], name: str) -> None:
    model = proved(name)
    kinds = KINDS.get(name, "causal").split()
    sites = model.program.sites
    wanted = kinds * (len(sites) // len(kinds)) if name != "t5" else None
    if wanted is not None:
        assert [site.kind for site in sites] == wanted and sites
    for site in sites:
        if site.kind in ("full", "causal", "sliding"):
            assert site.verdict == "rewrite", site.reason
            assert (site.heads, site.kv_heads) == (9 if name == "llama-gqa" else 4, KV_HEADS.get(name, 4))
            assert site.head_dim == 8 and site.window == (5 if site.kind == "sliding" else None)
            assert site.scale == pytest.approx(_scale(name)) and site.softcap == (50.0 if name == "gemma2" else None)
        else:
            assert site.verdict == "refuse" and site.reason
        assert site.path and site.source.rpartition(":")[2].isdigit()


def _scale(name: str) -> float:
    return 1.0 if name in ("t5", "nanogpt-einsum-bhtd") else 0.25 if name.startswith("gemma") else 8**-0.5


def test_t5_refuses_its_learned_bias_and_proves_the_rest(proved: Callable[[str], SimpleNamespace]) -> None:
    sites = proved("t5").program.sites
    assert {s.kind for s in sites if "SelfAttention" in s.path} == {"learned"}
    assert {s.kind for s in sites if "EncDecAttention" in s.path} == {"full"}
    assert len(sites) == 6


@pytest.mark.parametrize("name", zoo.NAMES)
def test_outputs_and_gradients_at_shapes_never_seen(proved: Callable[[str], SimpleNamespace], name: str) -> None:
    model = proved(name)
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    for batch, length in SHAPES:
        given = resized(model.example, batch, length)
        mask = given.get("attention_mask")
        real = mask.bool() if mask is not None and name != "t5" else None
        outputs, gradients = run(model.module, given, parameters, real)
        same, same_gradients = run(model.program, given, parameters, real)
        for a, b in zip(outputs, same, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * max(1.0, float(a.abs().max())))
        largest = max((float(g.abs().max()) for g in gradients if g is not None), default=0.0)
        for a, b in zip(gradients, same_gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6 * max(1.0, largest))


def test_proving_twice_changes_nothing(proved: Callable[[str], SimpleNamespace]) -> None:
    program = proved("llama").program.clone()
    before, records = str(program.graph_module.graph), [site.record() for site in program.sites]
    again = Pipeline([Canonicalize(), ProveAttention()])(program)
    assert str(again.graph_module.graph) == before
    assert [site.record() for site in again.sites] == records
    assert not again.history[-1]["modified"]
