"""The comparison of a kernel with its reference before its first use: what is noticed, and what is used then."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lincompile.kernels import first_use, ops
from lincompile.kernels.decay_gate import op as gate_op
from lincompile.kernels.decay_gate import reference as gate_reference
from lincompile.kernels.gated_delta import op as delta_op
from lincompile.kernels.gated_delta import reference as delta_reference
from lincompile.kernels.hedgehog_features import op as features_op
from lincompile.kernels.hedgehog_features import reference as features_reference
from lincompile.kernels.linear_attention import op as linear_op
from lincompile.kernels.linear_attention import reference as linear_reference
from lincompile.kernels.short_conv import op as conv_op
from lincompile.kernels.short_conv import reference as conv_reference
from lincompile.kernels.softmax_attention import op as softmax_op
from lincompile.kernels.softmax_attention import reference as softmax_reference


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK", raising=False)
    first_use._KNOWN.clear()
    yield
    first_use._KNOWN.clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def linear() -> list[Tensor]:
    q, k, v = random(3, 4, 170, 8), random(3, 2, 170, 8, seed=1), random(3, 2, 170, 6, seed=2)
    decay = -random(3, 2, 170, 8, seed=3).detach().abs()
    return [*ops.linear_attention(q, k.softmax(-1), v, decay, None, 1.0, True, True)]


def softmax() -> list[Tensor]:
    q, k, v = random(3, 4, 170, 8), random(3, 2, 170, 8, seed=1), random(3, 2, 170, 6, seed=2)
    return [ops.softmax_attention(q, k, v, torch.ones(3, 170).bool(), "sliding", 16, 0.3, 0.0)]


def conv() -> list[Tensor]:
    return [*ops.short_conv(random(3, 170, 5), random(5, 4, seed=1), random(3, 5, 3, seed=2))]


def features() -> list[Tensor]:
    x, mask = random(3, 4, 170, 8), torch.ones(3, 170).bool()
    conv_weight, weight, bias = random(32, 4, seed=1), random(2, 8, 8, seed=2), random(2, 1, 8, seed=3)
    return [*ops.hedgehog_features(x, conv_weight, None, weight, bias, mask, True)]


def gate() -> list[Tensor]:
    return [ops.decay_gate(random(3, 170, 4), random(16, 4, seed=1), random(16, seed=2), None, 2, 16.0, -1.0)]


def delta() -> list[Tensor]:
    q, k, v = random(3, 4, 130, 8), random(3, 2, 130, 8, seed=1), random(3, 2, 130, 6, seed=2)
    beta, decay = random(3, 2, 130, seed=3).sigmoid(), -random(3, 2, 130, 1, seed=4).detach().abs()
    return [*ops.gated_delta(q, torch.nn.functional.normalize(k, dim=-1), v, beta, decay, None, 0.3)]


def kernels_of(reference: Any, wrong: str, by: float) -> SimpleNamespace:
    """The reference as if it were kernels; the first result of ``wrong`` is off by a factor in a few columns."""

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            first, *rest = [result] if isinstance(result, Tensor) else result
            first = first.clone()
            first[..., -1] *= by
            return first if isinstance(result, Tensor) else (first, *rest)

        return run

    names = ("forward", "backward", "chunkwise", "chunkwise_backward")
    found = {name: getattr(reference, name) for name in names if hasattr(reference, name)}
    if reference is linear_reference:
        plain = reference.chunkwise_backward
        found["chunkwise_backward"] = lambda grad, state, o, *rest, **_: plain(grad, state, *rest)
    if reference is delta_reference:
        found = {"scan_forward": reference.LOOPS.forward, "scan_backward": reference.LOOPS.backward}
    found[wrong] = broken(found[wrong])
    return SimpleNamespace(supports=lambda *_: True, **found)


def only(kernels: Any) -> Callable[..., Any]:
    """Finds these kernels, and none in another file of an op's folder."""
    return lambda folder, x, file="triton": kernels if file == "triton" else None


CASES = {
    "linear_attention": (linear, linear_op, linear_reference, "chunkwise"),
    "linear_attention_backward": (linear, linear_op, linear_reference, "chunkwise_backward"),
    "softmax_attention forward": (softmax, softmax_op, softmax_reference, "forward"),
    "softmax_attention backward": (softmax, softmax_op, softmax_reference, "backward"),
    "short_conv": (conv, conv_op, conv_reference, "forward"),
    "short_conv_backward": (conv, conv_op, conv_reference, "backward"),
    "hedgehog_features": (features, features_op, features_reference, "forward"),
    "hedgehog_features_backward": (features, features_op, features_reference, "backward"),
    "decay_gate": (gate, gate_op, gate_reference, "forward"),
    "decay_gate_backward": (gate, gate_op, gate_reference, "backward"),
    "gated_delta chunkwise": (delta, delta_op, delta_reference, "scan_forward"),
    "gated_delta chunkwise_backward": (delta, delta_op, delta_reference, "scan_backward"),
}


def results(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Outputs of a call, and the gradients of all the leaves behind it."""
    outputs = call()
    leaves: list[Tensor] = []
    pending = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while pending:
        node = pending.pop()
        if hasattr(node, "variable") and not any(node.variable is leaf for leaf in leaves):
            leaves.append(node.variable)
        pending += [step for step, _ in node.next_functions if step is not None]
    total = sum((x.square().sum() for x in outputs if x.requires_grad), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(total, sorted(leaves, key=lambda x: (x.shape, float(x.detach().sum()))))]


@pytest.mark.parametrize("name", CASES)
def test_wrong_kernels_are_found_and_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, module, reference, wrong = CASES[name]
    wanted = results(call)
    monkeypatch.setattr(module, "backend", only(kernels_of(reference, wrong, 1.5)))
    with pytest.warns(UserWarning, match="differ from the reference on cpu") as said:
        got = results(call)
    assert f"the kernels of {name} differ" in str(said[0].message)
    with warnings.catch_warnings(action="error"):  # said once
        again = results(call)
    for a, b, c in zip(wanted, got, again, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


@pytest.mark.filterwarnings("ignore:lincompile. the kernels of gated_delta")  # forward and backward, each once
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
@pytest.mark.parametrize("name", CASES)
def test_kernels_that_a_chip_has_no_room_for_are_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def refuse(*args: Any, **_: Any) -> None:
        raise OutOfResources(329728, 232448, "shared memory")

    call, module, reference, wrong = CASES[name]
    wanted = results(call)
    kernels = kernels_of(reference, wrong, 1.0)
    setattr(kernels, wrong, refuse)
    monkeypatch.setattr(module, "backend", only(kernels))
    with pytest.warns(UserWarning, match=rf"the kernels of {name} can't run on cpu \(.*shared memory.*329728"):
        got = results(call)
    with warnings.catch_warnings(action="error"):  # said once
        again = results(call)
    for a, b, c in zip(wanted, got, again, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


@pytest.mark.parametrize("name", CASES)
def test_right_kernels_are_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, module, reference, wrong = CASES[name]
    wanted = results(call)
    kernels = kernels_of(reference, wrong, 1.0)
    calls: list[Any] = []
    whole = getattr(kernels, wrong)
    setattr(kernels, wrong, lambda *args, **options: calls.append(args[0].shape) or whole(*args, **options))
    monkeypatch.setattr(module, "backend", only(kernels))
    with warnings.catch_warnings(action="error"):
        got = results(call)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a)
    assert len(calls) > 1
    assert calls[0][0] == first_use.ROWS and calls[-1][0] == 3, "the comparison takes the beginning of the inputs"
    assert all(first_use._KNOWN.values()) and name in {key[0] for key in first_use._KNOWN}


def test_a_kernel_that_is_wrong_only_where_decays_are_strong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_of(linear_reference, "chunkwise", 1.0)
    right = kernels.chunkwise

    def run(*args: Any) -> Any:
        o, state = right(*args)
        return (o * 1.5 if float(args[3].min()) < -20 else o), state

    kernels.chunkwise = run
    monkeypatch.setattr(linear_op, "backend", lambda *_: kernels)
    with pytest.warns(UserWarning, match="the kernels of linear_attention differ"):
        linear()


@pytest.mark.parametrize("many", [False, True])
def test_one_token_is_compared_with_few_and_with_many_programs(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's tile depends on how many rows there are, which a first use leaves out of account otherwise."""
    kernels = kernels_of(linear_reference, "chunkwise", 1.0)
    right = kernels.chunkwise

    def run(q: Tensor, *args: Any) -> Any:
        o, state = right(q, *args)
        return (o * 1.5 if (q.shape[0] >= 200) == many else o), state

    kernels.chunkwise = run
    monkeypatch.setattr(linear_op, "backend", lambda *_: kernels)
    q, k, v = random(3, 4, 1, 8), random(3, 2, 1, 8, seed=1), random(3, 2, 1, 6, seed=2)
    state = random(3, 2, 8, 6, seed=3)
    with pytest.warns(UserWarning, match="the kernels of linear_attention differ"):
        ops.linear_attention(q, k, v, None, state, 1.0, True, False)


def test_a_call_without_rows_says_nothing_about_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_of(linear_reference, "chunkwise", 1.5)
    monkeypatch.setattr(linear_op, "backend", lambda *_: kernels)
    q, k, v = random(2, 4, 1, 8), random(2, 2, 1, 8, seed=1), random(2, 2, 1, 6, seed=2)
    with warnings.catch_warnings(action="error"):
        ops.linear_attention(q[:0], k[:0], v[:0], None, None, 1.0, True, False)
    with pytest.warns(UserWarning, match="the kernels of linear_attention differ"):
        ops.linear_attention(q, k, v, None, None, 1.0, True, False)


def test_a_normaliser_near_zero_is_not_held_against_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (random(2, 4, 150, 32, seed=seed).detach() for seed in range(3))
    kernels = kernels_of(linear_reference, "chunkwise", 1.0)
    right = kernels.chunkwise
    kernels.chunkwise = lambda q, k, v, *rest: right(q.half().float(), k.half().float(), v, *rest)
    monkeypatch.setattr(linear_op, "backend", lambda *_: kernels)
    with warnings.catch_warnings(action="error"):
        ops.linear_attention(q, k, v, None, None, 1.0, True, True)


def test_other_types_sizes_and_single_tokens_are_compared_anew() -> None:
    seen: list[tuple[int, ...]] = []

    def double(x: Tensor) -> Tensor:
        return x * 2

    def kernel(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return double(x)

    for shape in ((4, 700, 8), (9, 900, 8), (4, 1, 8), (2, 1, 8), (4, 700, 16), (4, 300, 8)):
        assert first_use.trusted("double", kernel, double, ["bt."], [torch.randn(shape)])
    assert first_use.trusted("double", kernel, double, ["bt."], [torch.randn(4, 700, 8, dtype=torch.bfloat16)])
    assert seen == [(2, 580, 8), (2, 1, 8), (2, 580, 16), (2, 300, 8), (2, 580, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_wrong_value_among_thousands_is_found(dtype: torch.dtype) -> None:
    x = torch.randn(2, 500, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 300.0  # which may be rounded by more than others have
    x = x.to(dtype)

    def rounds(x: Tensor) -> Tensor:
        return (x.double() * (1 + torch.finfo(dtype).eps)).to(dtype)

    def errs(x: Tensor) -> Tensor:
        wrong = x.clone()
        wrong[1, 300, 7] += 4
        return wrong

    def right(x: Tensor) -> Tensor:
        return x

    with warnings.catch_warnings(action="error"):
        assert first_use.trusted("rounds", rounds, right, ["bt."], [x])
    with pytest.warns(UserWarning, match=r"errs differ from the reference on cpu \([1-9]"):
        assert not first_use.trusted("errs", errs, right, ["bt."], [x])


def test_what_begins_elsewhere_in_memory_is_other_code() -> None:
    memory = torch.zeros(9, 4)
    aligned, shifted = memory[:8], memory.view(-1)[1:33].view(8, 4)
    assert first_use._form(aligned, "t.") != first_use._form(shifted, "t.")
    assert first_use._form(aligned, "t.") == first_use._form(memory[4:8].new_zeros(8, 4), "t.")


def test_tensors_of_another_device_than_the_current_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    from lincompile.kernels import registration

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(registration, "triton_module", lambda *names: names)
    x: list[Any] = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1)]
    assert registration.backend("int6_linear", x[0]) == ("int6_linear", "triton")
    registration._elsewhere.cache_clear()
    with pytest.warns(UserWarning, match=r"set_device\(1\)"):
        assert registration.backend("int6_linear", x[1]) is None
    assert registration.backend("int6_linear", torch.zeros(1)) is None


def test_the_comparison_can_be_left_out_and_says_nothing_where_the_reference_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(x: Tensor) -> Tensor:
        return x + 1

    def right(x: Tensor) -> Tensor:
        return x

    x = torch.ones(2, 3)
    with warnings.catch_warnings(action="error"):
        assert first_use.trusted("one", wrong, right, ["b"], [torch.full((2, 3), torch.inf)])
        assert not first_use._KNOWN
        monkeypatch.setenv("LINCOMPILE_KERNEL_CHECK", "0")
        assert first_use.trusted("one", wrong, right, ["b"], [x])
        monkeypatch.delenv("LINCOMPILE_KERNEL_CHECK")
    with pytest.warns(UserWarning, match="one differ"):
        assert not first_use.trusted("one", wrong, right, ["b"], [x])
    with pytest.warns(UserWarning, match="two differ"):
        assert not first_use.trusted("two", lambda x: x * torch.nan, right, ["b"], [x])
