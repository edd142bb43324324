"""The zoo itself: every model runs, is deterministic, and its spellings of one computation agree."""

from __future__ import annotations

import pytest
import torch
import zoo


def first(value: object) -> torch.Tensor:
    out = value[0] if isinstance(value, tuple) else value
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("name", zoo.NAMES)
def test_builds_the_same_model_twice(name: str) -> None:
    if name in zoo.HUGGINGFACE:
        pytest.importorskip("transformers")
    outputs = []
    for _ in range(2):
        module, example = zoo.build(name)
        assert not module.training
        with torch.no_grad():
            outputs.append(first(module(**example)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert outputs[0].isfinite().all()
    assert outputs[0].shape[0] == zoo.BATCH


def test_the_causal_spellings_are_one_computation() -> None:
    different = {"nanogpt-bidirectional", "nanogpt-sliding"}
    multi_head = [n for n in zoo.NANOGPT if "gqa" not in n and n not in different] + ["torch-flex"]
    for group in (multi_head, [n for n in zoo.NANOGPT if "gqa" in n]):
        results = []
        for name in group:
            module, example = zoo.build(name)
            with torch.no_grad():
                results.append(module(**example))
        for name, result in zip(group, results, strict=True):
            torch.testing.assert_close(result, results[0], rtol=0, atol=2e-5, msg=name)
    reference = zoo.build("nanogpt")
    for name in different:
        module, example = zoo.build(name)
        assert (module(**example) - reference[0](**reference[1])).abs().max() > 0.1, name
