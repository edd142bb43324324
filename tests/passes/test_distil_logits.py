"""Logit distillation, low-rank additions, layer choice, adapters and the recipe that strings them together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from distil_models import LENGTH, equal, linear, proved, text, trained, windows
from torch import Tensor
from torch.nn import functional

from lincompile.passes.capture import capture
from lincompile.passes.distil import echo
from lincompile.passes.distil.adapter import Settings, apply_adapter, save_adapter
from lincompile.passes.distil.choose import choose
from lincompile.passes.distil.divergence import ROWS, divergence
from lincompile.passes.distil.echo import from_afar
from lincompile.passes.distil.instrument import either, instead
from lincompile.passes.distil.logits import Distiller, LogitDistillation, distil_logits, lora_rank
from lincompile.passes.distil.lora import add_lora
from lincompile.passes.distil.packing import packed, unpacked
from lincompile.passes.distil.recipe import Recipe, run_recipe, with_branches_of
from lincompile.passes.distil.retrieval import Needles, WithRetrieval
from lincompile.passes.distil.transfer import Transfer
from lincompile.passes.errors import LincompileError
from lincompile.passes.program import Program

FAST: dict[str, Any] = {"rate": 3e-3, "lora_rate": 1e-2, "attention_rate": 1e-2}


@pytest.fixture(scope="module")
def teacher() -> Program:
    return proved()


def weights(program: Program) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in program.graph_module.named_parameters()}


@torch.no_grad()
def kl(student: Program, teacher: Program, tokens: Tensor) -> float:
    """KL by torch's own function, on the programs as they run."""
    got, wanted = (program(tokens).double().log_softmax(-1).flatten(0, 1) for program in (student, teacher))
    return float(functional.kl_div(got, wanted, reduction="batchmean", log_target=True))


# ---- the loss


@pytest.mark.parametrize("rows", [7, ROWS + 3])
def test_divergence_and_its_gradient_are_those_of_torch(rows: int) -> None:
    student = torch.randn(1, rows, 11, dtype=torch.float32).requires_grad_()
    teacher = 3 * torch.randn(1, rows, 11)
    loss = divergence(student, teacher)
    (2.5 * loss).backward()
    twin = student.detach().double().requires_grad_()
    logs = twin.log_softmax(-1).flatten(0, 1), teacher.double().log_softmax(-1).flatten(0, 1)
    expected = functional.kl_div(*logs, reduction="batchmean", log_target=True)
    (2.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad, twin.grad.float(), atol=1e-6, rtol=1e-4)
    assert float(divergence(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_weights_multiply_divergences_and_their_gradients() -> None:
    student = torch.randn(2, ROWS // 2 + 3, 11).requires_grad_()
    teacher, each = torch.randn(2, ROWS // 2 + 3, 11), torch.rand(2, ROWS // 2 + 3)
    loss = divergence(student, teacher, weights=each)
    loss.backward()
    twin = student.detach().double().requires_grad_()
    rows = functional.kl_div(twin.log_softmax(-1), teacher.double().log_softmax(-1), reduction="none", log_target=True)
    expected = (rows.sum(-1) * each.double()).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad, twin.grad.float(), atol=1e-6, rtol=1e-4)


def test_the_texts_own_next_tokens_have_their_share() -> None:
    """And none where there is no next token; at a share of 1 the loss is torch's cross-entropy."""
    student, teacher = torch.randn(2, 9, 11).requires_grad_(), torch.randn(2, 9, 11)
    following = functional.pad(torch.randint(0, 11, (2, 8)), (0, 1), value=-1)
    each = torch.rand(2, 9)
    for share, weights in ((0.3, None), (0.3, each), (1.0, None)):
        student.grad = None
        loss = divergence(student, teacher, weights=weights, following=following, share=share)
        loss.backward()
        twin = student.detach().double().requires_grad_()
        logs, wanted = twin.log_softmax(-1), teacher.double().log_softmax(-1)
        rows = functional.kl_div(logs, wanted, reduction="none", log_target=True).sum(-1)
        own = functional.nll_loss(logs.transpose(1, 2), following, reduction="none", ignore_index=-1)
        mixed = torch.where(following < 0, rows, (1 - share) * rows + share * own)
        expected = (mixed if weights is None else mixed * weights.double()).mean()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(student.grad, twin.grad.float(), atol=1e-6, rtol=1e-4)


def test_a_student_of_the_text_gets_better_at_it_than_at_the_teacher(teacher: Program) -> None:
    """The same steps with and without the text's share: the loss on the text against the divergence."""

    def nats(program: Program, tokens: Tensor) -> float:
        with torch.no_grad():
            logs = program(tokens).log_softmax(-1)[:, :-1]
        return float(functional.nll_loss(logs.flatten(0, 1), tokens[:, 1:].flatten()))

    data = windows(ids=torch.arange(2400) % 7 + 3)
    found = {}
    for share in (0.0, 1.0):
        student = linear(teacher)
        report = distil_logits(teacher, student, data, LogitDistillation(steps=15, cross_entropy=share, **FAST))
        found[share] = report.after, nats(student, data.measure(4))
    assert found[0.0][0] < found[1.0][0] and found[1.0][1] < 0.5 * found[0.0][1]


def test_marks_survive_and_weigh_the_logits_before_them() -> None:
    tokens = torch.tensor([[0, 5, 0, 7], [3, 2, 1, 0]])
    asked = torch.tensor([[False, True, True, False], [True, False, False, False]])
    repeats = torch.tensor([[1, 32, 1 << 20, 2], [1, 1, 7, 1]])
    for copies in (None, repeats):
        found, weight, times = unpacked(packed(tokens, asked, copies), 4.0, copies is not None)
        assert torch.equal(found, tokens) and weight is not None
        assert weight.tolist() == [[4.0, 4.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], (
            "nothing predicts a window's first token"
        )
        assert times is copies is None or torch.equal(times, copies)
    found, weight, times = unpacked(packed(tokens, None, repeats), 1.0, True)
    assert torch.equal(found, tokens) and weight is None and torch.equal(times, repeats)
    assert unpacked(packed(tokens))[0] is tokens, "where there is nothing to say nothing is computed"


@torch.no_grad()
def by_hand(student: Program, teacher: Program, tokens: Tensor, weight: Tensor) -> float:
    got, wanted = (program(tokens).double().log_softmax(-1) for program in (student, teacher))
    rows = functional.kl_div(got, wanted, reduction="none", log_target=True).sum(-1)
    return float((rows * weight).mean())


def test_answers_weigh_more_in_retrieval_examples_and_recurring_pairs_in_text(
    teacher: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's loss, before any weight has moved, in one piece."""
    monkeypatch.setattr(echo, "FAR", 8)
    student, plain = linear(teacher), windows(ids=text() % 6, length=2 * LENGTH, batch=2)
    needles = Needles([torch.tensor([1, 2]), torch.tensor([3, 4])], [torch.tensor([1, 2])] * 2, [1, 1])
    asking = WithRetrieval(plain, needles, 1.0)
    recurring = torch.stack([from_afar(row) for row in plain.step(0).tolist()])
    assert recurring.any() and asking.made(0).asked.any()
    for data, tokens, asked in (
        (asking, *asking.made(0)[:2]),
        (plain, plain.step(0), recurring),
    ):
        weight = 1 + 4 * functional.pad(asked[:, 1:], (0, 1)).double()
        expected = by_hand(student, teacher, tokens, weight)
        fresh = linear(teacher)
        report = distil_logits(teacher, fresh, data, LogitDistillation(steps=1, emphasis=5.0))
        assert report.losses[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("emphasis", [0.0, -1.0, math.inf, math.nan])
def test_an_emphasis_that_is_none(emphasis: float) -> None:
    with pytest.raises(LincompileError, match="the weight of answers is above 0"):
        LogitDistillation(emphasis=emphasis)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(LincompileError, match="the text's own share is from 0 to 1"):
        LogitDistillation(cross_entropy=share)


# ---- training


@pytest.mark.parametrize("train", ["full", "lora:4"])
def test_the_divergence_falls_and_the_teacher_stays(teacher: Program, train: str) -> None:
    student, data = linear(teacher), windows()
    own = weights(teacher)
    report = distil_logits(teacher, student, data, LogitDistillation(steps=25, train=train, **FAST))
    assert report.after < 0.9 * report.before
    assert equal(own, weights(teacher))
    held_out = data.measure(8)
    assert kl(student, teacher, held_out) == pytest.approx(report.after, rel=1e-3), (
        "the program computes what was trained"
    )
    assert kl(linear(teacher), teacher, held_out) == pytest.approx(report.before, rel=1e-3)
    assert weights(student).keys() == weights(linear(teacher)).keys(), "tied weights stay tied"
    assert not any(p.grad is not None for p in student.graph_module.parameters())


def test_lora_starts_as_the_model_and_leaves_embeddings_alone(teacher: Program) -> None:
    student = linear(teacher)
    tokens = windows().step(0)
    graph = instead(teacher, student)
    with torch.no_grad():
        before = graph(tokens)
        additions = add_lora(graph.graph_module, 3)
        after = graph(tokens)
    assert torch.equal(before[0], after[0]) if isinstance(before, tuple) else torch.equal(before, after)
    names = {addition.name for addition in additions}
    assert len(names) == 8 and all(name.startswith("h.") for name in names), names
    assert all(addition.up.shape[1] == addition.down.shape[0] == 3 for addition in additions)


def test_an_interrupted_run_resumes_to_the_bit(teacher: Program, tmp_path: Path) -> None:
    options = LogitDistillation(steps=6, save_every=2, train="lora:2", **FAST)
    whole, parted, fresh = linear(teacher), linear(teacher), linear(teacher)
    expected = distil_logits(teacher, whole, windows(), options)

    def interrupt(step: int, *_: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        distil_logits(teacher, parted, windows(), options, checkpoint=file, progress=interrupt)
    resumed = distil_logits(teacher, fresh, windows(), options, checkpoint=file)
    assert resumed.resumed_at == 4
    assert resumed.losses == expected.losses and resumed.after == expected.after
    assert equal(weights(whole), weights(fresh))


def test_running_out_of_memory_takes_smaller_pieces_and_says_so(
    teacher: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Distiller.learn

    def tight(self: Distiller, tokens: Tensor, share: float, compiled: bool) -> Tensor:
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return learn(self, tokens, share, compiled)

    notes: list[str] = []
    whole, pieces = linear(teacher), linear(teacher)
    options = LogitDistillation(steps=2, **FAST)
    expected = distil_logits(teacher, whole, windows(), options)
    monkeypatch.setattr(Distiller, "learn", tight)
    report = distil_logits(teacher, pieces, windows(), options, note=notes.append)
    assert report.piece_tokens == LENGTH
    assert notes == [f"out of memory at step 0: now {n} windows of {LENGTH} tokens at a time" for n in (2, 1)]
    assert report.losses == pytest.approx(expected.losses, rel=1e-4)


def test_nan_weights_are_refused(teacher: Program) -> None:
    broken = proved()
    student = linear(broken)
    with torch.no_grad():
        dict(broken.graph_module.named_parameters())["ln_f.weight"][0] = math.nan
    with pytest.raises(LincompileError, match="isn't finite before any training"):
        distil_logits(broken, student, windows(), LogitDistillation(steps=1))


def test_divergence_names_the_layer_and_keeps_the_checkpoint(
    teacher: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, file = linear(teacher), tmp_path / "run.ckpt"
    learn = Distiller.learn
    steps: list[int] = []

    def breaking(self: Distiller, tokens: Tensor, share: float, compiled: bool) -> Tensor:
        steps.append(len(steps))
        if len(steps) == 4:
            with torch.no_grad():
                dict(student.graph_module.named_parameters())["h.1.mlp.0.weight"][0, 0] = math.nan
        return learn(self, tokens, share, compiled)

    monkeypatch.setattr(Distiller, "learn", breaking)
    options = LogitDistillation(steps=9, save_every=1, **FAST)
    with pytest.raises(LincompileError, match=r"diverged at step 3: the loss .* isn't finite, first in 'h\.1\.mlp"):
        distil_logits(teacher, student, windows(), options, checkpoint=file)
    assert torch.load(file, weights_only=True)["report"]["steps"] == 3
    monkeypatch.setattr(Distiller, "learn", learn)
    resumed = distil_logits(teacher, linear(teacher), windows(), options, checkpoint=file)
    assert (resumed.resumed_at, resumed.steps) == (3, 9) and math.isfinite(resumed.after)


def test_a_gradient_that_is_not_finite_names_its_parameter() -> None:
    from torch import nn

    from lincompile.passes.distil.loop import Masters, Part

    weights = {name: nn.Parameter(torch.ones(2)) for name in ("a", "b")}
    masters = Masters([Part("the logits", weights, dict.fromkeys(weights, 1.0))], 0.0)
    weights["a"].grad, weights["b"].grad = torch.ones(2), torch.tensor([1.0, math.inf])
    with pytest.raises(LincompileError, match="step 7: the gradient at 'the logits' isn't finite, first in 'b'"):
        masters.step(1.0, 1.0, 7)
    assert torch.equal(weights["a"], torch.ones(2))


def test_a_model_without_logits_for_every_token_is_refused() -> None:
    from lincompile.passes.canonicalize import Canonicalize
    from lincompile.passes.identity import ProveAttention
    from lincompile.passes.pipeline import Pipeline

    module = zoo.NanoGPT(last_only=True).eval()
    program = Pipeline([Canonicalize(), ProveAttention()])(capture(module, {"idx": zoo.tokens()}))
    with pytest.raises(LincompileError, match="needs a model that returns logits for every token"):
        distil_logits(program, linear(program), windows(), LogitDistillation(steps=1))


@pytest.mark.parametrize(("value", "rank"), [("full", 0), ("lora:8", 8)])
def test_ranks(value: str, rank: int) -> None:
    assert lora_rank(value) == rank


@pytest.mark.parametrize("value", ["lora", "lora:0", "lora:x", "half", "lora:-1"])
def test_wrong_ranks_are_refused(value: str) -> None:
    with pytest.raises(LincompileError, match=f"--train {value}: write"):
        LogitDistillation(train=value)


# ---- layer choice


def test_the_choice_is_the_layer_that_helps_most(teacher: Program) -> None:
    student, tokens = linear(teacher), windows().measure(4)
    choice = choose(teacher, student, tokens, 1)
    measured = [kl(linear(teacher, keep=(index,)), teacher, tokens) for index in range(2)]
    assert list(choice.restored.values()) == pytest.approx(measured, rel=1e-3)
    assert choice.linear == pytest.approx(kl(student, teacher, tokens), rel=1e-3)
    assert choice.kept == (measured.index(min(measured)),)
    assert choice.chosen == pytest.approx(min(measured), rel=1e-3)


def test_all_sites_set_back_is_the_teacher(teacher: Program) -> None:
    tokens = windows().step(0)
    graph, switches = either(teacher, linear(teacher))
    for switch in switches.values():
        switch.softmax = True
    with torch.no_grad():
        result = graph(tokens)
    got = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(got, teacher(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 3])
def test_more_sites_than_there_are_cannot_be_chosen(teacher: Program, count: int) -> None:
    with pytest.raises(LincompileError, match=f"auto:{count}: the model has 2 sites"):
        choose(teacher, linear(teacher), windows().measure(2), count)


# ---- adapters


@pytest.fixture(scope="module")
def adapted(teacher: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    student = linear(teacher)
    distil_logits(teacher, student, windows(), LogitDistillation(steps=10, train="lora:2", **FAST))
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_adapter(path, teacher, student, source_hash="abc", record={"tokens": 960})
    return path, student


def test_an_adapter_makes_a_fresh_student_the_trained_one(teacher: Program, adapted: tuple[Path, Program]) -> None:
    path, student = adapted
    own, fresh, tokens = weights(teacher), linear(teacher), windows().measure(2)
    assert apply_adapter(path, teacher, fresh) == {"tokens": 960}
    assert kl(fresh, student, tokens) < 1e-5 < 1e-2 < kl(linear(teacher), student, tokens)
    assert equal(own, weights(teacher))


def test_an_adapter_of_another_teacher_is_refused(teacher: Program, adapted: tuple[Path, Program]) -> None:
    other = proved()
    with torch.no_grad():
        next(other.graph_module.parameters())[0] += 1
    student = linear(other)
    before = weights(student)
    with pytest.raises(LincompileError, match="trained for another model: its teacher's hash differs"):
        apply_adapter(adapted[0], other, student, source_hash="another")
    assert equal(before, weights(student))
    assert apply_adapter(adapted[0], other, student, source_hash="abc"), "the same source file, loaded differently"


@pytest.mark.parametrize(
    ("options", "without"),
    [({"attn": "gla"}, ""), ({"keep": (0,)}, " without --keep-softmax"), ({"window": 8}, " without --window")],
)
def test_an_adapter_of_other_sites_is_refused(
    teacher: Program, adapted: tuple[Path, Program], options: dict[str, Any], without: str
) -> None:
    with pytest.raises(LincompileError, match=rf"is for 2 sites with lawcat: give --attn lawcat{without}$"):
        apply_adapter(adapted[0], teacher, linear(teacher, **options))


def test_settings_are_read_off_all_sites() -> None:
    """A first layer without positions, or with a narrower window of its own, doesn't speak for the others."""
    found = Settings.of({"a": "lawcat+512 none", "b": "lawcat+1024 kept", "c": "softmax"})
    assert (found.window, found.rotary, found.keep_softmax) == (1024, "keep", "2,")
    assert str(found) == "--attn lawcat --window 1024 --rotary keep --keep-softmax 2,"
    assert Settings.of({"a": "gla removed"}) == Settings("gla", None, "remove", None)


def test_a_file_that_is_no_adapter_is_refused(teacher: Program, adapted: tuple[Path, Program], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cut, plain = tmp_path / "cut.safetensors", tmp_path / "plain.safetensors"
    cut.write_bytes(adapted[0].read_bytes()[:200])
    save_file({"x": torch.zeros(2)}, str(plain))
    for path, message in (
        (cut, "is damaged or isn't a safetensors file"),
        (plain, "holds no adapter; this version reads"),
        (tmp_path / "none", "doesn't exist"),
    ):
        with pytest.raises(LincompileError, match=message):
            apply_adapter(path, teacher, linear(teacher))


def test_no_adapter_of_a_fully_trained_model(teacher: Program, tmp_path: Path) -> None:
    student = linear(teacher)
    distil_logits(teacher, student, windows(), LogitDistillation(steps=1))
    with pytest.raises(LincompileError, match="was trained whole; train with --train lora:R"):
        save_adapter(tmp_path / "a.safetensors", teacher, student)
    assert not (tmp_path / "a.safetensors").exists()


# ---- the recipe


def test_the_recipe_runs_its_stages_in_order(teacher: Program, tmp_path: Path) -> None:
    stages: list[str] = []
    from lincompile.passes.distil.recipe import Listener

    recipe = Recipe(
        train="full", keep=1, tokens=40 * 2 * LENGTH, length=LENGTH, batch=2, logits=LogitDistillation(**FAST)
    )
    done = run_recipe(
        teacher,
        linear(teacher),
        text(),
        recipe,
        relinearize=lambda kept: linear(teacher, keep=kept),
        checkpoint=tmp_path / "c",
        listener=Listener(stage=stages.append),
    )
    assert stages == ["choose layers", "distil logits"]
    assert done.choice is not None and done.logits is not None
    assert [site.method for site in done.student.sites].count("softmax") == 1
    assert done.student.sites[done.choice.kept[0]].method == "softmax"
    assert done.logits.before == pytest.approx(done.choice.chosen, rel=0.5), "it starts from the transferred modules"
    assert sum(done.logits.losses[-8:]) < sum(done.logits.losses[:8])
    assert (done.transfer.steps, done.logits.steps) == (14, 26)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.logits"]
    record = done.record()
    assert record["logits"]["tokens"] == 26 * 2 * LENGTH and record["tokens"] == 14 * 2 * LENGTH


def test_a_time_budget_covers_both_stages(teacher: Program) -> None:
    recipe = Recipe(train="lora:2", seconds=3.0, length=LENGTH, batch=2)
    done = run_recipe(teacher, linear(teacher), text(), recipe, relinearize=lambda kept: linear(teacher))
    assert done.logits is not None
    assert 0.9 <= done.transfer.seconds < 2.9
    assert done.transfer.steps >= 1 and done.logits.steps >= 1


def test_branches_move_to_a_student_with_fewer_of_them(teacher: Program) -> None:
    full = linear(teacher)
    with torch.no_grad():
        for name, parameter in full.graph_module.named_parameters():
            if name.startswith("lincompile_attention"):
                parameter.add_(1.0)
    fewer = with_branches_of(full, linear(teacher, keep=(0,)))
    got, source = trained(fewer), trained(full)
    assert got and all(name.startswith("lincompile_attention.1") for name in got)
    assert all(torch.equal(got[name], source[name]) for name in got)


@pytest.mark.parametrize("value", ["lora", "some"])
def test_an_unknown_second_stage_is_refused(value: str) -> None:
    with pytest.raises(LincompileError, match=f"--train {value}: write none, full, or lora:R"):
        Recipe(train=value, transfer=Transfer())
