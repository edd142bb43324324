"""Tokens that count as several: equal to their copies in a row, in modules, training graphs and compiled code."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distil_models import LENGTH, equal, linear, proved, text, trained, windows
from torch import Tensor

from lincompile.passes.distil import divergence
from lincompile.passes.distil.data import TokenWindows
from lincompile.passes.distil.logits import Distiller, LogitDistillation, distil_logits
from lincompile.passes.distil.packing import packed, unpacked
from lincompile.passes.distil.recipe import Extension, Recipe, run_recipe
from lincompile.passes.distil.replay import Replayed
from lincompile.passes.distil.retrieval import Needles, WithRetrieval
from lincompile.passes.errors import LincompileError
from lincompile.passes.linearization.alibi import AlibiGLA, AlibiShape
from lincompile.passes.linearization.methods import LinearMethod, SiteShape, method_class
from lincompile.passes.linearization.stretch import MOST, repeated
from lincompile.passes.program import Program

SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 4, "value_dim": 5, "hidden": 6, "scale": 0.5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(scope="module")
def teacher() -> Program:
    return proved()


def module(name: str, **options: Any) -> LinearMethod:
    torch.manual_seed(1)
    if name == "alibi":
        return AlibiGLA(AlibiShape(**SIZES, causal=True, slopes=(0.0, 0.3))).double()
    made = method_class(name)(SiteShape(**SIZES, causal=True, **options)).double()
    with torch.no_grad():
        for part, parameter in made.named_parameters():
            if part.startswith("conv"):  # which sees each token once: of copies it would see others
                parameter[:, :-1] = 0
            elif part.startswith("gate"):  # half-lives from a few tokens to thousands
                parameter.mul_(10 if "bias" not in part else 1).add_(torch.randn_like(parameter))
    return made


def operands(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, length, 4), (2, 2, length, 4), (2, 2, length, 5), (2, length, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# ---- modules


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["gla", "hedgehog", "lawcat", "alibi"])
def test_a_token_that_counts_several_times_is_its_copies(
    name: str, fuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read at the last copy; padded tokens stay nothing."""
    monkeypatch.setattr(LinearMethod, "fuse", fuse)
    site, values = module(name, lowest=None), operands(7)
    repeats = torch.tensor([1, 5, 1, 30, 2, 9, 1])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :2] = False
    copied = [value.repeat_interleave(repeats, value.dim() - 2) for value in values]
    with torch.no_grad():
        wanted = site(*copied, mask.repeat_interleave(repeats, 1))[:, :, repeats.cumsum(0) - 1]
        got = site(*values, mask, repeats=repeats.expand(2, -1))
        plain = site(*values, mask)
        once = site(*values, mask, repeats=torch.ones(2, 7, dtype=torch.int64))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1, :, 2:], wanted[1, :, 2:], rtol=1e-10, atol=1e-12)
    assert torch.equal(once, plain) and not torch.allclose(got, plain)


def test_the_window_and_its_shares_see_each_token_once() -> None:
    site, values = module("lawcat", window=3), operands(7)
    values += [values[0], values[1]]  # the window's own q and k
    repeats = torch.randint(1, 9, (2, 7))
    far, near, shares = site.parts(*values, repeats=repeats)
    plain_far, plain_near, plain_shares = site.parts(*values)
    assert near is not None and plain_near is not None and torch.equal(near, plain_near)
    assert shares is not None and plain_shares is not None and torch.equal(shares[0], plain_shares[0])
    assert not torch.allclose(far, plain_far)


def test_keys_and_decays_at_the_floor_and_without_decay() -> None:
    k = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    log_decay = torch.tensor([0.0, -1e-12, -0.03, -0.5, -1.0], dtype=torch.float64).view_as(k)
    keys, decays = (value.flatten().tolist() for value in repeated(k, log_decay, torch.tensor([[8]]), -1.0))
    assert decays == pytest.approx([0.0, -8e-12, -0.24, -1.0, -1.0])
    wanted = [8.0, 8.0, sum(math.exp(-0.03 * i) for i in range(8)), 1 + math.exp(-0.5), 1.0]
    assert keys == pytest.approx(wanted), "2 copies reach the floor from -0.5, 1 is there already"
    keys, decays = (value.flatten().tolist() for value in repeated(k, log_decay, torch.tensor([[8]]), None))
    assert decays[3:] == [-4.0, -8.0] and keys[3] == pytest.approx(sum(math.exp(-0.5 * i) for i in range(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_near_no_decay_are_those_of_the_sum(dtype: torch.dtype) -> None:
    """What rounding leaves of (eʳᵍ − 1) / (eᵍ − 1) has none; features of long half-lives are what is trained here."""
    log_decay = torch.tensor([0.0, -1e-30, -1e-9, -1e-6, -5e-4, -9e-3, -0.02, -0.2, -1.0]).to(dtype)
    for count in (1, 32, 1000, MOST):
        given = log_decay.clone().view(1, 1, 1, -1).requires_grad_()
        keys, decays = repeated(torch.ones_like(given), given, torch.tensor([[count]]), -1.0)
        (keys.sum() + decays.sum()).backward()
        assert given.grad is not None and given.grad.isfinite().all() and keys.isfinite().all()
        assert decays.min() >= -1 and (keys >= 0.99).all()
        if count > 1000:
            continue
        twin = log_decay.double().requires_grad_()
        total = sum((torch.exp(twin * i) for i in range(count)), torch.zeros_like(twin)) + count * twin
        total.sum().backward()
        free = log_decay * count > -1  # the others are at the floor
        assert twin.grad is not None
        torch.testing.assert_close(
            given.grad.flatten()[free].double(),
            twin.grad[free],
            rtol=1e-4 if dtype == torch.float32 else 2e-2,
            atol=1e-6,
        )


def test_gated_delta_has_no_copies(teacher: Program) -> None:
    with pytest.raises(LincompileError, match="gated-delta has no form for tokens that count as several"):
        module("gated-delta")(*operands(7), repeats=torch.ones(2, 7, dtype=torch.int64))
    message = r"--stretch 4: a token of gated-delta that comes again isn't .*: leave it out, or choose gla, hedgehog, l"
    with pytest.raises(LincompileError, match=message):
        distil_logits(teacher, linear(teacher, "gated-delta"), stretched(), LogitDistillation(steps=1))
    extension = Extension(4 * LENGTH, retrieval=0.5, needles=needles(), stretch=4)
    recipe = Recipe(train="full", tokens=4 * LENGTH, length=LENGTH, extension=extension)
    untouched = linear(teacher, "gated-delta")
    before = trained(untouched)
    with pytest.raises(LincompileError, match=message):
        run_recipe(teacher, untouched, text(), recipe, relinearize=lambda kept: untouched)
    assert equal(before, trained(untouched)), "refused before any stage"


# ---- training


def needles() -> Needles:
    return Needles([torch.tensor([1, 2]), torch.tensor([3, 4])], [torch.tensor([1, 2])] * 2, [1, 1])


def stretched(stretch: float = 4.0, **options: Any) -> WithRetrieval:
    base: TokenWindows = windows(ids=text() % 6, length=2 * LENGTH, batch=2, **options)
    return WithRetrieval(base, needles(), 1.0, stretch=stretch)


def probed(distiller: Distiller, student: Program, tokens: Tensor, compiled: bool = False) -> tuple[float, Tensor]:
    """The loss of a step, and the modules' gradients, one after another."""
    parameters = [p for n, p in student.graph_module.named_parameters() if n.startswith("lincompile_")]
    for parameter in parameters:
        parameter.grad = None
    loss = float(distiller.learn(tokens, 1.0, compiled))
    return loss, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def batches(count: int = 3) -> list[Tensor]:
    """Packed windows of a shape, alike but for their repeats: the first ones' are 1."""
    tokens = windows().step(0)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, -4:] = True
    generator = torch.Generator().manual_seed(0)
    return [packed(tokens, asked, torch.randint(1, 2 + 8 * i, tokens.shape, generator=generator)) for i in range(count)]


@pytest.mark.parametrize("attn", ["lawcat", "gla", "hedgehog"])
def test_repeats_reach_every_site_compiled_or_recomputed(
    teacher: Program, attn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's own, without compiling again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    divergence.compiled_rows.cache_clear()
    options = LogitDistillation(emphasis=3.0)
    student = linear(teacher, attn)
    plain = Distiller(teacher, student, options, stretched=True)
    wanted = [probed(plain, student, tokens) for tokens in batches()]
    assert len({loss for loss, _ in wanted}) == 3
    unstretched = probed(Distiller(teacher, student, options), student, batches()[0])
    assert wanted[0][0] == unstretched[0] and torch.allclose(wanted[0][1], unstretched[1], rtol=1e-5, atol=1e-7)
    seen: list[Tensor] = []
    for branch in plain.student.branches.values():
        branch.register_forward_pre_hook(lambda module, inputs, named: seen.append(named["repeats"]), with_kwargs=True)
    probed(plain, student, batches()[2])
    assert len(seen) == 2 and all(torch.equal(each, unpacked(batches()[2], 3.0, True)[2]) for each in seen)
    for branch in plain.student.branches.values():
        branch._forward_pre_hooks.clear()

    for recompute, compiled in ((True, False), (False, True), (True, True)):
        other = Distiller(teacher, student, LogitDistillation(emphasis=3.0, recompute=recompute), stretched=True)
        other.teacher.divide()
        other.student.divide()
        first, *later = batches()
        found = [probed(other, student, first, compiled)]
        with torch.compiler.set_stance("fail_on_recompile"):
            found += [probed(other, student, tokens, compiled) for tokens in later]
        for (loss, gradients), (loss_wanted, gradients_wanted) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(loss_wanted, rel=1e-5)
            torch.testing.assert_close(gradients, gradients_wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_recorded_steps_read_each_steps_repeats(device: str) -> None:
    teacher = proved(device)
    student = linear(teacher)
    distiller = Distiller(teacher, student, LogitDistillation(emphasis=3.0), stretched=True)
    replayed = Replayed(lambda tokens: distiller.learn(tokens, 1.0), list(student.graph_module.parameters()))
    wanted = [float(distiller.learn(tokens, 1.0)) for tokens in batches()]
    found = [float(replayed(tokens)) for tokens in batches()]
    assert found == pytest.approx(wanted, rel=1e-4) and len({round(loss, 5) for loss in wanted}) == 3
    assert replayed.enabled == (device == "cuda")


def test_steps_of_stretched_windows_resume_to_the_bit(teacher: Program, tmp_path: Path) -> None:
    """And a run with another stretch isn't theirs."""
    options = LogitDistillation(steps=5, save_every=2, train="lora:2", emphasis=5.0)
    whole, parted, fresh = linear(teacher), linear(teacher), linear(teacher)
    expected = distil_logits(teacher, whole, stretched(), options)

    def interrupt(step: int, *_: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        distil_logits(teacher, parted, stretched(), options, checkpoint=file, progress=interrupt)
    resumed = distil_logits(teacher, fresh, stretched(), options, checkpoint=file)
    assert resumed.resumed_at == 2 and all(map(math.isfinite, resumed.losses))
    assert resumed.losses == expected.losses and resumed.after == expected.after
    assert equal(trained(whole), trained(fresh))
    for other in (1.0, 8.0):
        with pytest.raises(LincompileError, match="belongs to a run with other options, data"):
            distil_logits(teacher, linear(teacher), stretched(other), options, checkpoint=file)
    assert distil_logits(teacher, linear(teacher), stretched(1.0), options).losses != expected.losses
