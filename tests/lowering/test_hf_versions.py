"""States under both of the names that transformers has had for them: ``cache`` (5.24) and ``past_key_values``."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lincompile.lowering import package
from lincompile.passes.errors import LincompileError

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("lincompile.hf", reason="transformers isn't installed", exc_type=LincompileError)
versions = pytest.importorskip("lincompile.lowering.huggingface.versions")

PROMPT = torch.tensor([[4, 5, 6, 7, 8, 9, 10]])
TURN = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11, 12]])
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BOTH = pytest.mark.parametrize("name", versions.NAMES)


@pytest.fixture(scope="module")
def model(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> hf.LincompileForCausalLM:
    folder = tmp_path_factory.mktemp("names") / "out"
    return hf.from_pretrained(package.save(toy.step, folder, manifest={"sites": toy.sites}, eos_ids=[39]))


def test_the_name_is_the_one_that_generation_uses() -> None:
    """Found from an output class, which must agree with the loop that reads it."""
    prepare = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation)
    assert versions.CACHE in prepare.parameters
    assert versions.CACHE in transformers.generation.GenerateDecoderOnlyOutput.__dataclass_fields__


@BOTH
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_generate_continues_from_either(
    model: hf.LincompileForCausalLM, name: str, options: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a word from transformers: what it warns of today, it will refuse one day."""
    whole = model.generate(TURN, **GREEDY, **options)
    transformers.logging.get_logger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", FutureWarning)
        first = model.generate(PROMPT, **GREEDY, **options, return_dict_in_generate=True)
        again = model.generate(TURN, **{name: hf.states_of(model(PROMPT))}, **GREEDY, **options)
    assert again.tolist() == whole.tolist()
    assert "deprecated" not in caplog.text
    assert isinstance(hf.states_of(first), hf.StateCache)


@BOTH
def test_forward_and_saving_take_either(model: hf.LincompileForCausalLM, name: str, tmp_path: Path) -> None:
    states = hf.states_of(model(PROMPT))
    rest = model(TURN[:, 7:], **{name: states})
    torch.testing.assert_close(rest.logits, model(TURN).logits[:, 7:], atol=1e-5, rtol=1e-5)
    file = model.save_states(tmp_path / "states", **{name: states}, input_ids=PROMPT)
    assert model.load_states(file).columns == 7
    assert hf.states_of(model(PROMPT, use_cache=False)) is None


@BOTH
def test_messages_say_the_name_that_was_used(model: hf.LincompileForCausalLM, name: str, tmp_path: Path) -> None:
    states = hf.states_of(model(PROMPT))
    for call, message in (
        (lambda: model.generate(PROMPT + 1, **{name: states}, **GREEDY), f"the 7 tokens that {name} has read"),
        (lambda: model.generate(PROMPT[:, :3], **{name: states}, **GREEDY), f"has 3 tokens, {name} has read 7"),
        (lambda: model.generate(PROMPT, **{name: 3}, **GREEDY), f"^{name} is a int: a compiled model continues only"),
        (lambda: model.generate(TURN, **{name: states}, **GREEDY, use_cache=False), f"leave it or {name} out"),
        (lambda: model(PROMPT, **{name: {}}), f"^{name} is a dict"),
        (lambda: model(PROMPT.repeat(2, 1), **{name: states}), f"^{name}: the states hold 1 rows, the input has 2"),
        (lambda: model.save_states(tmp_path / "x", **{name: 3}), f"^{name} is a int"),
        (lambda: model.save_states(tmp_path / "x", **{name: states}, input_ids=PROMPT + 1), f"that {name} has read"),
    ):
        with pytest.raises(LincompileError, match=message):
            call()


def test_one_name_at_a_time(model: hf.LincompileForCausalLM, tmp_path: Path) -> None:
    both = dict.fromkeys(versions.NAMES, hf.states_of(model(PROMPT)))
    for call in (
        lambda: model(TURN, **both),
        lambda: model.generate(TURN, **both),
        lambda: model.save_states(tmp_path / "x", **both),
    ):
        with pytest.raises(LincompileError, match="two names of the same argument: give one of them"):
            call()
    with pytest.raises(LincompileError, match="give save_states the cache"):
        model.save_states(tmp_path / "x")
    assert model.generate(PROMPT, **dict.fromkeys(versions.NAMES), **GREEDY).shape == (1, 13)
