"""Spellings that only some models of transformers have: proved, and equal to the model under every kind of padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lincompile.passes.capture import capture
from lincompile.passes.formats import wrap
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.proof.classify import padding_patterns

SIZES = {"vocab_size": 97, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4}
SIZES |= {"hidden_size": 32, "d_model": 32, "ffn_dim": 48, "attention_dropout": 0.0, "hidden_dropout": 0.0}
LAYERS = {"n_layer": 1, "n_layers": 1, "num_layers": 1, "dropout": 0.0, "activation_dropout": 0.0}


@pytest.mark.parametrize(
    ("name", "more", "bias"),
    [
        # ALiBi over the real tokens (a cumulated sum of the padding mask), added by baddbmm to fused batch and heads
        ("Bloom", {}, "alibi"),
        # ALiBi as the last positions of a table
        ("Mpt", {"max_seq_len": 128}, "alibi"),
        # padding in scores that fuse batch and heads, and a maximum with the lowest number
        ("XGLM", {}, "none"),
    ],
)
def test_proved_under_padding(name: str, more: dict[str, Any], bias: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")
    known = {key: value for key, value in (SIZES | LAYERS).items() if hasattr(config(), key)}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**(known | more | {"initializer_range": 0.2}))).eval()
    module = (wrap.CausalLM if name == "XGLM" else wrap.CausalLMWithoutPositions)(model)
    ids = torch.randint(3, 97, (2, 11))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "XGLM":
        example["position_ids"] = torch.arange(11).expand(2, 11).clone()
    program = Pipeline("canonicalize,prove{alibi=true}")(capture(module, example))
    (site,) = program.sites
    assert (site.verdict, site.kind, site.bias) == ("rewrite", "causal", bias), site.reason
    assert site.padding == "attention_mask"
    ids = torch.randint(3, 97, (3, 17))
    for real in padding_patterns(3, 17).values():
        given = {"input_ids": ids, "attention_mask": real.long()}
        if name == "XGLM":
            given["position_ids"] = torch.arange(17).expand(3, 17).clone()
        with torch.no_grad():
            torch.testing.assert_close(program(**given)[real], module(**given)[real], rtol=1e-4, atol=1e-5)
