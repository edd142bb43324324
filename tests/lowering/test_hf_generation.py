"""transformers' own generation tests, as far as they apply to a compiled model.

``GenerationTesterMixin`` (tests/generation/test_utils.py in transformers' repository, not in its wheel) builds models
from a configuration, which a compiled program can't be. Its cases are written here against an artefact:

* greedy, sampling, beams, sampled beams, each with dictionary outputs, with and without a cache: ``test_modes``
* generate_without_input_ids: ``test_without_a_prompt``
* assisted decoding (same and other assistant), prompt lookup, its stop at EOS, assisted sampling: ``test_assist…``
* left_padding_compatibility: ``test_padding_on_the_left…``
* generate_continue_from_past_key_values: ``test_continuing…`` and tests/lowering/test_hf_auto.py
* generate_methods_with_logits_to_keep, inherits_generation_mixin, prefill chunks: ``test_same_tokens_with…``

Not applicable, and refused where asked for (``test_what_a_program_has_not``): attentions and hidden states as outputs,
and inputs_embeds (the graph has token ids and logits only). Static, quantized and offloaded caches, the format of
past_key_values and attention implementations concern KV caches; model parallelism splits modules; contrastive, DoLa,
group and constrained search left transformers for the Hub.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lincompile.lowering import package
from lincompile.lowering.generate import left_pad
from lincompile.passes.errors import LincompileError

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("lincompile.hf", reason="transformers isn't installed", exc_type=LincompileError)

PROMPT = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3]])
EOS, NEW = 39, 6


@pytest.fixture(scope="module")
def folder(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.save(
        toy.step, tmp_path_factory.mktemp("modes") / "out", manifest={"sites": toy.sites}, eos_ids=[EOS]
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> hf.LincompileForCausalLM:
    return hf.from_pretrained(folder)


def greedy(model: hf.LincompileForCausalLM, tokens: Tensor = PROMPT, **options: Any) -> list[list[int]]:
    result = model.generate(tokens, **{"max_new_tokens": NEW, "do_sample": False, **options})
    ids: list[list[int]] = result.tolist()
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"do_sample": False}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"do_sample": False, "num_beams": 3, "num_return_sequences": 2}, 2),
        ({"do_sample": True, "num_beams": 2}, 1),
    ],
)
def test_modes(model: hf.LincompileForCausalLM, options: dict[str, Any], rows: int, use_cache: bool) -> None:
    torch.manual_seed(3)
    output = model.generate(
        PROMPT,
        **options,
        max_new_tokens=NEW,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert output.sequences.shape == (rows, PROMPT.shape[1] + NEW)
    assert len(output.scores) == len(output.logits) == NEW
    beams = options.get("num_beams", 1) if "num_beams" in options else rows
    assert output.logits[0].shape == (beams, model.config.vocab_size)
    assert (hf.states_of(output) is None) == (not use_cache)
    if "num_beams" not in options:  # each step's logits are those of the whole sequence
        with torch.no_grad():
            whole = model(output.sequences).logits[:, PROMPT.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits, 1), whole, atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    again = model.generate(PROMPT, **options, max_new_tokens=NEW)
    assert again.tolist() == output.sequences.tolist(), "a cache changes nothing"


def test_without_a_prompt(model: hf.LincompileForCausalLM) -> None:
    assert greedy(model, torch.tensor([[7]])) == model.generate(bos_token_id=7, max_new_tokens=NEW).tolist()
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(max_new_tokens=NEW)


def test_padding_on_the_left_changes_nothing(model: hf.LincompileForCausalLM) -> None:
    tokens, mask = left_pad([PROMPT[0].tolist(), [0] * 20])
    rows = greedy(model, tokens[:1], attention_mask=mask[:1].long())
    assert rows[0][20 - PROMPT.shape[1] :] == greedy(model)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"logits_to_keep": 3},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"attention_mask": torch.ones_like(PROMPT)},
        {"repetition_penalty": 1.0, "renormalize_logits": True},
    ],
)
def test_same_tokens_with(model: hf.LincompileForCausalLM, options: dict[str, Any]) -> None:
    assert isinstance(model, transformers.GenerationMixin) and model.can_generate()
    assert greedy(model, **options) == greedy(model)


def test_guidance_keeps_states_of_its_own(model: hf.LincompileForCausalLM) -> None:
    assert greedy(model, guidance_scale=1.5) == greedy(model, guidance_scale=1.5, use_cache=False)


@pytest.fixture
def other(folder: Path) -> hf.LincompileForCausalLM:
    """An assistant that is often wrong."""
    assistant = hf.from_pretrained(folder)
    assistant.head.weight.data = assistant.head.weight + 0.3 * torch.randn_like(assistant.head.weight)
    return assistant


def test_assistance_changes_nothing(
    model: hf.LincompileForCausalLM, other: hf.LincompileForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates that aren't accepted are taken back; what was read of them is read again, not taken for read."""
    plain = greedy(model, max_new_tokens=24)
    chunks: list[int] = []
    advance = model.session.advance
    monkeypatch.setattr(
        model.session, "advance", lambda tokens, *rest: chunks.append(tokens.shape[1]) or advance(tokens, *rest)
    )
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": model}, {"assistant_model": other}):
        chunks.clear()
        result = model.generate(PROMPT, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, **options)
        # transformers 5.12 gives one token too many at times.
        assert result.sequences[:, : PROMPT.shape[1] + 24].tolist() == plain, options
        if "assistant_model" not in options:
            assert len(chunks) < 24, "fewer calls than tokens"
        # The states that assisted generation leaves continue like any others.
        turn = torch.cat([result.sequences, torch.tensor([[7, 8, 9]])], 1)
        continued = greedy(model, turn, past_key_values=hf.states_of(result))
        assert continued == greedy(model, turn)


def test_an_artefact_assists_another_model(model: hf.LincompileForCausalLM) -> None:
    """transformers hands the main model's positions on to its assistant."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=model.config.vocab_size, eos_token_id=EOS, **sizes)
    main = transformers.LlamaForCausalLM(config).eval()
    assisted = main.generate(PROMPT, max_new_tokens=12, do_sample=False, assistant_model=model)
    assert assisted[:, :25].tolist() == main.generate(PROMPT, max_new_tokens=12, do_sample=False).tolist()


def test_assisted_sampling_and_stopping(model: hf.LincompileForCausalLM, other: hf.LincompileForCausalLM) -> None:
    torch.manual_seed(1)
    tokens = model.generate(PROMPT, do_sample=True, max_new_tokens=12, assistant_model=other)
    assert PROMPT.shape[1] < tokens.shape[1] <= PROMPT.shape[1] + 13
    stop = greedy(model, max_new_tokens=24)[0][-1]  # the last of a run that begins somewhere before
    short = greedy(model, max_new_tokens=24, eos_token_id=stop)
    assert greedy(model, max_new_tokens=24, eos_token_id=stop, prompt_lookup_num_tokens=4) == short
    assert short[0][-1] == stop and len(short[0]) < PROMPT.shape[1] + 24


def test_continuing_after_all_of_the_prompt_was_read(model: hf.LincompileForCausalLM) -> None:
    """A prompt cache of exactly this prompt: the first token comes from its logits."""
    cache = hf.states_of(model(PROMPT))
    for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        again = greedy(model, past_key_values=cache, **options)
        assert again[0][: PROMPT.shape[1] + NEW] == greedy(model, **{"num_beams": 1, **options})[0][:19]
    assert cache.columns == PROMPT.shape[1], "the caller's cache stays as it was"
    new = torch.tensor([[7, 8, 9]])
    mask = torch.ones(1, PROMPT.shape[1] + 3, dtype=torch.long)
    rest = greedy(model, new, attention_mask=mask, past_key_values=cache)
    assert rest[0][3:] == greedy(model, torch.cat([PROMPT, new], 1))[0][-NEW:]


def test_states_of_another_text_or_model_are_refused(
    model: hf.LincompileForCausalLM, toy: SimpleNamespace, tmp_path: Path
) -> None:
    cache = hf.states_of(model(PROMPT))
    wrong = PROMPT.clone()
    wrong[0, 4] = 9
    with pytest.raises(LincompileError, match="row 0 of input_ids doesn't begin with the 13 tokens"):
        greedy(model, torch.cat([wrong, PROMPT], 1), past_key_values=cache)
    with pytest.raises(LincompileError, match=r"past_key_values has read 13: give all ids so far"):
        greedy(model, torch.tensor([[7, 8]]), past_key_values=cache)
    package.save(toy.step, tmp_path / "b", manifest={"sites": []})
    twin = hf.from_pretrained(tmp_path / "b")
    greedy(twin, past_key_values=cache)  # the same weights and program are the same model
    trained = hf.from_pretrained(tmp_path / "b")
    trained.head.weight.data = trained.head.weight + 1
    trained.save_pretrained(tmp_path / "c")
    with pytest.raises(LincompileError, match="the states of another model"):
        greedy(hf.from_pretrained(tmp_path / "c"), past_key_values=cache)
    with pytest.raises(LincompileError, match="past_key_values is a DynamicCache"):
        greedy(model, past_key_values=transformers.DynamicCache())
    with pytest.raises(LincompileError, match="use_cache=False reads everything again"):
        greedy(model, torch.cat([PROMPT, PROMPT], 1), past_key_values=cache, use_cache=False)
    two = hf.states_of(model(PROMPT.repeat(2, 1)))
    with pytest.raises(LincompileError, match="hold 2 rows, the input has 1"):
        model(PROMPT, past_key_values=two)
    with pytest.raises(LincompileError, match="can't go back from 13 tokens to 11"):
        cache.crop(-2)


def test_what_a_program_has_not(model: hf.LincompileForCausalLM) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(LincompileError, match=f"takes no '{name}'"):
            greedy(model, return_dict_in_generate=True, **{name: True})
    with pytest.raises(LincompileError, match="continuous batching"):
        model.generate_batch([[1, 2]])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 24), max_new_tokens=NEW)
    with pytest.raises(LincompileError, match="position_ids: a compiled model counts tokens from 0"):
        model(PROMPT, position_ids=torch.arange(13)[None] + 1)
    with pytest.raises(ValueError, match="`max_new_tokens` must be greater than 0"):
        greedy(model, max_new_tokens=0)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([[1, 2], [0, 0]], [[1, 1], [0, 0]], "row 1 of the batch is empty"),
        ([[1, 2, 3]], [[1, 0, 1]], "row 0 has padding between its tokens"),
        ([[1, 2, 3]], [[1, 1]], r"attention_mask is \[1, 2\], input_ids \[1, 3\]"),
        ([[40]], None, "token id 40 is outside the model's vocabulary"),
        ([[]], None, "at least one in each row"),
        ([[1.5]], None, "give input_ids: a tensor of int64"),
        ([1, 2], None, "give input_ids: a tensor of int64"),
        ([[True, False]], None, "give input_ids: a tensor of int64"),
        ([[1, 2]], [[0.0, float("-inf")]], r"other numbers than 0 \(padding\) and 1 \(a token\)"),
        ([[1, 2]], [[2, 2]], "other numbers than 0"),
        ([[1, 2]], [[float("nan"), 1.0]], "other numbers than 0"),
    ],
)
def test_bad_batches(model: hf.LincompileForCausalLM, tokens: list[Any], mask: list[Any] | None, message: str) -> None:
    with pytest.raises(LincompileError, match=message):
        model(torch.tensor(tokens), attention_mask=None if mask is None else torch.tensor(mask))


def test_what_is_no_tensor_or_no_token_is_named(model: hf.LincompileForCausalLM) -> None:
    cache = hf.states_of(model(PROMPT))
    for call, message in (
        (lambda: model([[1, 2]]), "give input_ids: a tensor"),
        (lambda: greedy(model, [[1, 2]]), "give input_ids: a tensor"),
        (lambda: greedy(model, PROMPT[0]), "give input_ids: a tensor"),
        (lambda: model(PROMPT, attention_mask=[[1] * 13]), "attention_mask has no dimensions: give a tensor"),
        (lambda: model(torch.tensor([[-5]]), cache=cache), "token id -5 is outside"),
        (lambda: greedy(model, PROMPT.repeat(3, 2), cache=cache), "^cache: the states hold 1 rows, the input has 3"),
        (lambda: model(PROMPT, labels=PROMPT.float()), r"labels must be token ids like input_ids, \[1, 13\]"),
        (lambda: model(PROMPT, labels=PROMPT[:, 1:]), r"labels must be token ids like input_ids, \[1, 13\]"),
        (lambda: model(PROMPT, labels=PROMPT + 90), r"label 91 is no token id \(0 to 39\)"),
        (lambda: model(PROMPT, labels=PROMPT, logits_to_keep=torch.tensor([1])), "labels need all the last logits"),
        (lambda: model(PROMPT, logits_to_keep=-1), "logits_to_keep=-1: give the number of last positions"),
        (lambda: model.to("meta"), "can't go to the meta device"),
    ):
        with pytest.raises(LincompileError, match=message):
            call()
    for other in (torch.uint8, torch.int32):  # ids are counted in int64, whatever they come in
        torch.testing.assert_close(model(PROMPT.to(other)).logits, model(PROMPT).logits)


def test_padding_on_the_right_is_read_but_not_continued(model: hf.LincompileForCausalLM) -> None:
    """Training batches are padded there; generation can't be, since states would have read the padding."""
    tokens, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    output = model(tokens, attention_mask=mask)
    torch.testing.assert_close(output.logits[:1, :3], model(tokens[:1, :3]).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(LincompileError, match="padded on the right, which can't go on"):
        greedy(model, tokens, attention_mask=mask)
    with pytest.raises(LincompileError, match="can't be continued"):
        model.save_states("never-written", hf.states_of(output))


def test_a_model_that_counts_positions_takes_no_padding_on_the_left(toy: SimpleNamespace, tmp_path: Path) -> None:
    """Rows of equal lengths, all padded alike, would be read at positions that count the padding."""
    step = replace(toy.step, uniform_positions=True)
    model = hf.from_pretrained(package.save(step, tmp_path / "out", manifest={"sites": toy.sites}))
    tokens, mask = torch.tensor([[0, 0, 1, 2], [0, 0, 3, 4]]), torch.tensor([[0, 0, 1, 1]] * 2)
    for given in (mask, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])):
        with pytest.raises(LincompileError, match="must have equal lengths, without padding"):
            model.generate(tokens, attention_mask=given, max_new_tokens=2)
    assert model.generate(tokens[:, 2:], attention_mask=mask[:, 2:], max_new_tokens=2).shape == (2, 4)
