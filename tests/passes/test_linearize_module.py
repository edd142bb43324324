"""``linearize_`` on plain modules: in place, under the teacher's names, for every way the module is called."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.errors import CaptureError, LincompileError, RefusedError
from lincompile.passes.identity import ProveAttention
from lincompile.passes.linearization.module import linearize_
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline


@pytest.fixture
def model() -> nn.Module:
    return zoo.build("nanogpt")[0]


def test_in_place_under_the_teachers_names_and_equal_to_the_program(model: nn.Module) -> None:
    teacher = dict(model.named_parameters())
    tokens = zoo.tokens(3, 17)
    program = Pipeline([Canonicalize(), ProveAttention(), LinearizeAttention("gla", keep=(0,), seed=5)])(
        capture(copy.deepcopy(model), {"idx": zoo.tokens()})
    )
    report = linearize_(model, "gla", example=zoo.tokens(), keep=(0,), seed=5)
    assert report["rewritten"] == 1 and report["kept"] == {"h.0.attn": "kept softmax on request"}
    assert [site["path"] for site in report["sites"]] == ["h.0.attn", "h.1.attn"]
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in teacher.items())
    added = set(own) - set(teacher)
    assert {name.rsplit(".", 1)[0] for name in added} == {"lincompile_attention.1", "lincompile_attention.1.gate"}
    assert sum(own[name].numel() for name in added) == report["parameters_added"]
    assert set(program.graph_module.state_dict()) <= set(model.state_dict())
    torch.testing.assert_close(model(tokens), program(tokens), rtol=0, atol=0)


def test_it_trains(model: nn.Module) -> None:
    linearize_(model, "lawcat", example={"idx": zoo.tokens()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = zoo.tokens(4, 16)
    losses = []
    for _ in range(4):
        _, loss = model(tokens, targets=tokens.roll(-1, 1))  # another way to call it: captured on its own
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(model.forward.calls) == 2  # type: ignore[union-attr]
    with torch.inference_mode():
        logits = model(tokens[:1, :1])
        torch.testing.assert_close(logits, model(tokens[:1])[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict"])
def test_copies_and_saved_states(model: nn.Module, way: str) -> None:
    linearize_(model, "gla", example=zoo.tokens())
    tokens = zoo.tokens(2, 9)
    wanted = model(tokens).detach()
    if way == "state dict":
        twin, _ = zoo.build("nanogpt", seed=3)
        linearize_(twin, "gla", example=zoo.tokens(), seed=3)
        twin.load_state_dict(model.state_dict())
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(tokens), wanted, rtol=0, atol=1e-6)
    with torch.no_grad():
        twin.get_parameter("lincompile_attention.0.out_scale").mul_(3)
    assert (twin(tokens) - wanted).abs().max() > 1e-3, "the copy doesn't run on its own parameters"
    torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=0)


def test_a_layer_exchanged_afterwards_is_seen(model: nn.Module) -> None:
    linearize_(model, "gla", example=zoo.tokens())
    before = model(zoo.tokens())
    model.h[0].mlp[0] = nn.Sequential(model.h[0].mlp[0], nn.Tanh())  # type: ignore[index, union-attr]
    after = model(zoo.tokens())
    assert (after - before).abs().max() > 1e-3
    model.double()
    assert model(zoo.tokens()).dtype == torch.float64


def test_hugging_face_models_keep_their_calls_and_outputs() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(zoo.huggingface_config("llama"))
    ids = zoo.tokens()
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(LincompileError, match=r"DynamicCache.*use_cache = False"):
        linearize_(model, "lawcat", example=example)
    assert "lincompile_attention" not in dict(model.named_children())
    model.config.use_cache = False
    assert linearize_(model, "lawcat", example=example)["rewritten"] == 2
    out = model(**example, labels=ids)
    assert type(out).__name__ == "CausalLMOutputWithPast" and out.logits.shape == (2, 12, 97)
    out.loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    with pytest.raises(LincompileError, match=r"called with input_ids, the site 'model\.layers\.0\.self_attn'"):
        model(input_ids=ids)  # without its mask, transformers looks for packed sequences
    with pytest.raises(LincompileError, match=r"'(cache|past_key_values)' is a DynamicCache"):
        model.generate(ids, max_new_tokens=2)


class Odd(nn.Module):
    """One input of features; anticausal attention, or none."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends, self.project = attends, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.project(x)
        if not self.attends:
            return y
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu()
        return nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], attn_mask=mask)


def test_bad_requests_change_nothing(model: nn.Module) -> None:
    x = torch.randn(2, 5, 8)
    for attends, message in ((True, "can be rewritten to gla.*anticausal"), (False, "no softmax")):
        odd = Odd(attends)
        with pytest.raises(RefusedError, match=message):
            linearize_(odd, "gla", example=x)
        assert "forward" not in vars(odd) and len(list(odd.children())) == 1
    with pytest.raises(LincompileError, match="unknown attention method 'mamba'"):
        linearize_(model, "mamba", example=zoo.tokens())
    with pytest.raises(LincompileError, match="would change nothing"):
        linearize_(model, "softmax", example=zoo.tokens())
    with pytest.raises(CaptureError, match="takes 2 inputs"):
        linearize_(model, "gla", example=[zoo.tokens()] * 3)
    linearize_(model, "gla")  # the example is inferred
    with pytest.raises(LincompileError, match="linearized before"):
        linearize_(model, "gla")
