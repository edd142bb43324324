"""States on disk: a prompt cache, an interrupted prefill resumed, and files that belong to something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import full_disk
from safetensors.torch import load_file, save_file

from lincompile.lowering import package
from lincompile.lowering.artefact.state_file import running_hash
from lincompile.lowering.generate import Prefilled, generate, left_pad, prefill
from lincompile.passes.errors import ArtefactError, LincompileError

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def artefact(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> package.Artefact:
    folder = tmp_path_factory.mktemp("state") / "out"
    return package.open_artefact(package.save(toy.step, folder, manifest={"sites": toy.sites}))


def read(artefact: package.Artefact, prompt: list[int]) -> Prefilled:
    return prefill(artefact.session, *left_pad([prompt]))


def test_a_saved_prefix_continues_as_if_it_had_just_been_read(artefact: package.Artefact, tmp_path: Path) -> None:
    file = artefact.save_state(tmp_path / "s", read(artefact, PROMPT[:6]), [PROMPT[:6]])
    saved = artefact.load_state(file, batch=1)
    assert saved.complete and saved.state.lengths.tolist() == [6]
    whole = artefact.continue_ids([PROMPT], 8).tokens
    assert artefact.continue_ids([PROMPT[6:]], 8, after=saved.state).tokens == whole
    # Nothing left to read: the saved logits choose the next token.
    done = artefact.load_state(artefact.save_state(tmp_path / "t", read(artefact, PROMPT), [PROMPT]))
    assert artefact.continue_ids([[]], 8, after=done.state).tokens == whole


def test_what_of_a_prompt_is_unread(artefact: package.Artefact, tmp_path: Path) -> None:
    state = read(artefact, PROMPT[:6])
    finished = artefact.load_state(artefact.save_state(tmp_path / "s", state, [PROMPT[:6]]))
    assert finished.unread(PROMPT) == (PROMPT[6:], True)
    assert finished.unread([7, 8]) == ([7, 8], False)
    partial = artefact.load_state(artefact.save_state(tmp_path / "s", state, [PROMPT[:6]], complete=False))
    assert partial.unread(PROMPT) == (PROMPT[6:], True)
    with pytest.raises(LincompileError, match="saved 6 tokens into another prompt"):
        partial.unread([7, 8])
    with pytest.raises(LincompileError, match="saved 6 tokens into another prompt"):
        partial.unread([1, 2, 3, 4, 5, 7, 8])
    assert running_hash(PROMPT[6:], running_hash(PROMPT[:6])) == running_hash(PROMPT)


def test_each_chunk_of_a_prefill_can_be_resumed(artefact: package.Artefact) -> None:
    seen: list[Prefilled] = []
    whole = prefill(artefact.session, *left_pad([PROMPT]), chunk=4, on_state=seen.append)
    assert [int(state.lengths[0]) for state in seen] == [4, 8, 11]
    resumed = prefill(artefact.session, *left_pad([PROMPT[8:]]), after=seen[1], chunk=4)
    torch.testing.assert_close(resumed.logits, whole.logits)


def test_rows_that_ended_early_can_be_continued(artefact: package.Artefact) -> None:
    """The padding that a finished row is fed must not enter its convolution."""
    session = artefact.session
    prompts = [PROMPT, [5, 9]]
    free = generate(session, prompts, 10).tokens
    eos = next(token for token in free[1][:4] if token not in free[0][:8])
    together = generate(session, prompts, 10, eos_ids=[eos])
    alone = generate(session, [prompts[1]], 10, eos_ids=[eos])
    assert together.finish[1] == alone.finish[0] == "eos" and len(together.tokens[0]) > len(together.tokens[1])
    for spec, one, other in zip(session.states, together.state.states, alone.state.states, strict=True):
        if spec.role in ("recurrent", "conv"):
            torch.testing.assert_close(one[1], other[0])


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=header)

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "there is no state file"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "not a state file, or cut short"),
        (lambda file: save_file({"a": torch.zeros(1)}, file), "isn't a state file"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b'version\\": 1', b'version\\": 9')), "version 9"),
        (damaged(lambda tensors: tensors.pop("logits")), "lacks 'logits'"),
        (damaged(lambda tensors: tensors.update({"state.0.state": torch.zeros(1, 2)})), "'0.state' is"),
        (damaged(lambda tensors: tensors["logits"].neg_()), "don't match their hash"),
        (damaged(lambda tensors: tensors["lengths"].add_(1)), "don't match their hash"),
    ],
)
def test_damaged_files(artefact: package.Artefact, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    file = artefact.save_state(tmp_path / "s", read(artefact, PROMPT), [PROMPT])
    spoil(file)
    with pytest.raises(ArtefactError, match=message):
        artefact.load_state(file)


def test_other_files_are_not_overwritten(artefact: package.Artefact) -> None:
    weights = artefact.directory / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(LincompileError, match="exists and is no state file"):
        artefact.save_state(weights, read(artefact, PROMPT), [PROMPT])
    assert weights.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_state(artefact: package.Artefact, tmp_path: Path) -> None:
    state = read(artefact, PROMPT)
    file = artefact.save_state(tmp_path / "s", state, [PROMPT])
    before = file.read_bytes()
    with (
        full_disk(100),
        pytest.raises(LincompileError, match=r"state file .*s can't be written \(.*\): make room there"),
    ):
        artefact.save_state(file, state, [PROMPT])
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_states_of_something_else(artefact: package.Artefact, tmp_path: Path) -> None:
    two = prefill(artefact.session, *left_pad([PROMPT, PROMPT[::-1]]))
    file = artefact.save_state(tmp_path / "s", two)
    with pytest.raises(LincompileError, match="holds 2 sequences, 1 are wanted"):
        artefact.load_state(file, batch=1)
    with pytest.raises(LincompileError, match="the state holds 2 sequences, the prompt 1"):
        artefact.continue_ids([[1]], 3, after=two)
    with pytest.raises(LincompileError, match="prompts of one length"):
        artefact.continue_ids([[1, 2], [3]], 3, after=two)
    with pytest.raises(LincompileError, match="can't be written"):
        artefact.save_state(tmp_path / "no" / "s", two)
    other = package.Artefact(artefact.directory, {**artefact.manifest}, artefact.device)
    other.manifest["files"] = {name: {"sha256": "0" * 64} for name in artefact.manifest["files"]}
    with pytest.raises(LincompileError, match="the state of another model"):
        other.load_state(file)
    # In one process, too: the state that came with a generation knows whose it is.
    state = artefact.continue_ids([PROMPT], 1).state
    for use in (lambda: other.continue_ids([[1]], 3, after=state), lambda: other.save_state(tmp_path / "t", state)):
        with pytest.raises(LincompileError, match="the state is of another model"):
            use()
    state.states[2] = state.states[2][..., :-1]
    with pytest.raises(LincompileError, match="its tensors aren't those that this one carries"):
        artefact.continue_ids([[1]], 3, after=state)
