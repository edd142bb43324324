"""An artefact under transformers' own generation loop gives what lincompile's loop gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo

import lincompile
from lincompile.lowering import package
from lincompile.lowering.artefact.graph_file import move_constants
from lincompile.lowering.generate import Session, left_pad
from lincompile.passes.errors import LincompileError

hf = pytest.importorskip("lincompile.hf", reason="transformers isn't installed", exc_type=LincompileError)

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 9], [30, 3, 11, 20]]


@pytest.fixture(scope="module")
def artefact(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> package.Artefact:
    folder = tmp_path_factory.mktemp("hf") / "out"
    return package.open_artefact(package.save(toy.step, folder, manifest={"sites": toy.sites}))


@pytest.fixture(scope="module")
def model(artefact: package.Artefact) -> hf.LincompileForCausalLM:
    return hf.from_pretrained(artefact.directory)


def batch() -> dict[str, torch.Tensor]:
    tokens, mask = left_pad(PROMPTS)
    return {"input_ids": tokens, "attention_mask": mask.long()}


def test_greedy_batches_equal_our_own_loop(model: hf.LincompileForCausalLM, artefact: package.Artefact) -> None:
    ours = artefact.continue_ids(PROMPTS, 12).tokens
    theirs = model.generate(**batch(), max_new_tokens=12, do_sample=False)
    assert theirs[:, 9:].tolist() == ours


@pytest.mark.parametrize("keep", [1, 2, 5, 9, 0])
def test_only_logits_that_are_kept_are_computed(
    model: hf.LincompileForCausalLM, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """Read in chunks of four: nine tokens in three, whose last token's logits are all that most chunks need."""
    computed: list[int] = []
    advance = Session.advance

    def spied(self: Session, *given: Any) -> Any:
        logits, states = advance(self, *given)
        computed.append(logits.shape[1])
        return logits, states

    with torch.no_grad():
        whole = model(**batch()).logits
        monkeypatch.setattr(Session, "chunk", 4)
        monkeypatch.setattr(Session, "advance", spied)
        found = model(**batch(), logits_to_keep=keep).logits
    torch.testing.assert_close(found, whole[:, -keep:] if keep else whole)
    assert computed == {1: [1, 1, 1], 2: [1, 1, 1], 5: [1, 4, 1], 9: [4, 4, 1], 0: [4, 4, 1]}[keep]


def test_beams_equal_an_exhaustive_rescore(model: hf.LincompileForCausalLM) -> None:
    result = model.generate(
        **batch(), max_new_tokens=6, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    for row, (prompt, score) in enumerate(zip(PROMPTS, result.sequences_scores, strict=True)):
        new = result.sequences[row, 9:]
        whole = torch.tensor([prompt + new.tolist()])
        logits = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert float(logits.gather(1, new[:, None]).sum()) / len(new) == pytest.approx(float(score), abs=1e-4)


def test_sampling_is_seeded(model: hf.LincompileForCausalLM) -> None:
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        tokens: torch.Tensor = model.generate(**batch(), max_new_tokens=8, do_sample=True, temperature=2.0)
        return tokens.tolist()

    assert draw(1) == draw(1) != draw(2)


def test_a_conversation_continues_from_its_states(model: hf.LincompileForCausalLM) -> None:
    tokens = torch.tensor([PROMPTS[0]])
    first = model(tokens[:, :4])
    rest = model(tokens[:, 4:], past_key_values=hf.states_of(first))
    torch.testing.assert_close(rest.logits, model(tokens).logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_only_the_last_logits(model: hf.LincompileForCausalLM) -> None:
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])


def test_loss_and_gradients(model: hf.LincompileForCausalLM) -> None:
    tokens = torch.tensor([PROMPTS[0]])
    gate = dict(model.named_parameters())["gate.weight"].requires_grad_(True)
    try:
        output = model(tokens, labels=tokens)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:])
        torch.testing.assert_close(output.loss, expected)
        output.loss.backward()
        assert gate.grad is not None and float(gate.grad.abs().sum()) > 0
    finally:
        gate.requires_grad_(False)


def test_a_moved_model_creates_its_positions_where_its_weights_are(tmp_path: Path) -> None:
    """As if it came from the meta device, which stands for a GPU here."""
    module, example = zoo.build("nanogpt")
    model = hf.from_pretrained(lincompile.compile(module, example=example, attn="softmax").save(tmp_path / "out"))
    tokens = torch.tensor([[1, 2, 3]])
    wanted = model(tokens).logits
    move_constants(model.program.graph, torch.device("meta"))
    model.session.device = torch.device("meta")
    torch.testing.assert_close(model.to("cpu")(tokens).logits, wanted)


def test_saved_and_opened_again(model: hf.LincompileForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "copy")
    again = hf.from_pretrained(tmp_path / "copy")
    options = {"max_new_tokens": 5, "do_sample": False}
    assert again.generate(**batch(), **options).tolist() == model.generate(**batch(), **options).tolist()


def test_an_encoder_is_told_what_to_use_instead(artefact: package.Artefact) -> None:
    encoder = package.Artefact(artefact.directory, {**artefact.manifest, "states": []}, artefact.device)
    with pytest.raises(LincompileError, match=r"can't generate: lincompile.open\(DIR\).step\(tokens, positions, mask"):
        hf.LincompileForCausalLM(encoder)
    with pytest.raises(LincompileError, match=r"an encoder, or a model without a step form"):
        encoder.continue_ids([[1, 2]], 3)


def test_misuse_is_named(model: hf.LincompileForCausalLM, artefact: package.Artefact) -> None:
    states = hf.states_of(model(torch.tensor([[1, 2]])))
    with pytest.raises(LincompileError, match="past_key_values: the states hold 1 rows, the input has 2"):
        model(torch.tensor([[1], [2]]), past_key_values=states)
    with pytest.raises(LincompileError, match="at most 64 positions"):
        model(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(LincompileError, match="no option 'load_in_3bit'"):
        hf.from_pretrained(artefact.directory, load_in_3bit=True)
