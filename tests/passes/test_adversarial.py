"""Attention written to fool the prover: each site is rewritten exactly, or refused for the right reason.

All cases are sites of one module, so that one export serves them. Outputs and gradients of program and module are
compared at lengths far from the example's, since what these cases hide only shows there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program

HEADS, DIM, INF = 4, 4, float("inf")
Case = Callable[["Site", Tensor, Tensor, Tensor, Tensor], Tensor]


def distance(q: Tensor) -> Tensor:
    position = torch.arange(q.shape[2])
    return position[:, None] - position[None, :]


def masked_scores(q: Tensor, k: Tensor, seen: Tensor | None = None) -> Tensor:
    allowed = distance(q) >= 0
    return (q @ k.transpose(-2, -1) * 0.5).masked_fill(~(allowed if seen is None else allowed & seen), -INF)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    return masked_scores(q, k, seen).softmax(-1) @ v


def hole_in_a_table(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q, k, v, site.holed[(distance(q).clamp(min=0) // 100).clamp(max=63)])


def hole_in_a_counter(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q, k, v, torch.arange(64)[(distance(q).clamp(min=0) // 100).clamp(max=63)] != 5)


def columns_of_a_table(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q, k, v, site.holed[None][:, (torch.arange(q.shape[2]) // 100).clamp(max=63)])


def late_keys_clamped(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    last = torch.arange(q.shape[2]).clamp(max=100)
    k, v = (x[:, :2].repeat_interleave(2, 1)[:, :, last] for x in (k, v))
    return attend(q, k, v)


def picked_heads(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q, k[:, torch.tensor([0, 0, 1, 1])], v[:, torch.tensor([0, 0, 1, 1])])


def padding_after_softmax(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return masked_scores(q, k).softmax(-1) * pad[:, None, None, :] @ v


def padding_on_both_sides(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    real = pad[:, None, None, :].bool()
    return masked_scores(q, k, real).softmax(-1).masked_fill(~real, 0.0) @ v


def queries_silenced(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return masked_scores(q, k).softmax(-1) * pad[:, None, :, None] @ v


def tiny_slope(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (masked_scores(q, k) - 3e-8 * distance(q)).softmax(-1) @ v


def rounded_scores(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return masked_scores(q, k).to(torch.bfloat16).softmax(-1).float() @ v


def rounded_probabilities(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return torch.softmax(masked_scores(q, k), -1, dtype=torch.float16).float() @ v


def rolled_scores(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return masked_scores(q, k).roll(1, -2).softmax(-1) @ v


def flipped_probabilities(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return masked_scores(q, k).softmax(-1).flip(-1) @ v


def inside_autocast(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v)
    return out.float()


def partly_inside_autocast(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = masked_scores(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scores.softmax(-1) @ v
    return out.float()


def values_first(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    p = masked_scores(q, k).softmax(-1)
    return (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2)


def values_first_moved_by_permute(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    p = masked_scores(q, k).softmax(-1)
    return torch.matmul(v.permute(0, 1, 3, 2), p.permute(0, 1, 3, 2)).permute(0, 1, 3, 2)


def keys_first(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (k @ q.transpose(-1, -2)).transpose(-1, -2) * 0.5
    return scores.masked_fill(distance(q) < 0, -INF).softmax(-1) @ v


def einsum_keys_first(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q).masked_fill(distance(q) < 0, -INF)
    return torch.einsum("bhkd,bhqk->bhqd", v, scores.softmax(-1))


def einsum_with_dots(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.einsum("...id, ...jd -> ...ij", q, k).masked_fill(distance(q) < 0, -INF)
    return torch.einsum("...ij, ...jd -> ...id", scores.softmax(-1), v)


def einsum_values_turned(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(distance(q) < 0, -INF)
    return torch.einsum("bhqk,bhkd->bhdq", scores.softmax(-1), v).transpose(-1, -2)


def attention_of_attention(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(attend(q, k, v), k, v)


def written_through_another_name(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2])
    mask.type_as(q).masked_fill_(distance(q) < 0, -INF)
    return (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v


def written_through_swapped_axes(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(distance(q) < 0, -INF)
    mask.swapaxes(0, 1)[:1].zero_()
    mask.mT[2:3].fill_(-1.0)
    return (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v


def keys_written_in_parts(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    both = k.new_empty(k.shape)
    both[..., :2] = k[..., 2:]
    both[..., 2:] = k[:, :1, :, :2]
    return attend(q, both, v)


def scores_summed(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1)
    return scores.masked_fill(distance(q) < 0, -INF).softmax(-1) @ v


def values_summed(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (masked_scores(q, k).softmax(-1)[..., None] * v[:, :, None]).sum(-2)


def euclidean(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (-((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1)).masked_fill(distance(q) < 0, -INF).softmax(-1) @ v


def powers_of_two(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    p = torch.exp2(masked_scores(q, k))
    return (p / p.sum(-1, keepdim=True)) @ v


def exponentials_cut(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    p = torch.exp(q @ k.transpose(-2, -1)).tril()
    return (p / p.sum(-1, keepdim=True)) @ v


def over_all_pairs(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return scores.flatten(-2).softmax(-1).view(scores.shape) @ v


def bytes_that_wrap(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q, k, v, distance(q).to(torch.uint8) < 200)


def gradient_doubled(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    p = masked_scores(q, k).softmax(-1)
    return (2 * p - p.detach()) @ v


def mask_by_products(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    seen = (distance(q) >= 0).float() * (distance(q) < 5000).float()
    return (q @ k.transpose(-2, -1) * seen - 1e9 * (1 - seen)).softmax(-1) @ v


def logarithm_of_a_mask(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) + ((distance(q) >= 0) & (distance(q) < 5000)).float().log()).softmax(-1) @ v


def output_turned(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    # SqueezeBERT: channels before positions, which looks like keys before queries
    return attend(q, k, v).transpose(-1, -2).tanh().permute(0, 1, 3, 2)


def keys_rolled_over_heads(site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q, k.roll(1, 1), v.flip(1))


REFUSED: dict[Case, tuple[str, str]] = {
    hole_in_a_table: ("unprovable", "past the probed lengths"),
    hole_in_a_counter: ("unprovable", "past the probed lengths"),
    columns_of_a_table: ("unprovable", "past the probed lengths"),
    padding_after_softmax: ("post-softmax", "between softmax and p·v"),
    queries_silenced: ("unknown-mask", "'pad_mask' reaches the attention, but left padding"),
    tiny_slope: ("causal", "position bias .*alibi"),
    rounded_scores: ("low-precision", "rounded to torch.bfloat16"),
    rounded_probabilities: ("low-precision", "rounded to torch.float16"),
    rolled_scores: ("unknown-scores", "the scores go through 'roll'"),
    flipped_probabilities: ("post-softmax", "the probabilities go through 'flip"),
    inside_autocast: ("nested", "wrap_with_autocast"),
    partly_inside_autocast: ("nested", "wrap_with_autocast"),
    scores_summed: ("unknown-scores", "not from a product q·k"),
    values_summed: ("post-softmax", "the probabilities go through 'sum"),
    euclidean: ("unknown-scores", "not from a product q·k"),
    powers_of_two: ("not-softmax", "exp2, not softmax"),
    exponentials_cut: ("not-softmax", "exp, not softmax"),
    over_all_pairs: ("unknown-scores", "change shape"),
    bytes_that_wrap: ("unprovable", "past the probed lengths"),
    gradient_doubled: ("causal", "not canonical softmax attention"),
    written_through_another_name: ("unprovable", "masked_fill_"),
    written_through_swapped_axes: ("causal", "changed in place"),
}
PROVED: dict[Case, str] = {
    late_keys_clamped: "causal",
    picked_heads: "causal",
    padding_on_both_sides: "causal",
    values_first: "causal",
    values_first_moved_by_permute: "causal",
    keys_first: "causal",
    einsum_keys_first: "causal",
    einsum_with_dots: "causal",
    einsum_values_turned: "causal",
    attention_of_attention: "causal",
    keys_written_in_parts: "causal",
    mask_by_products: "sliding",
    logarithm_of_a_mask: "sliding",
    output_turned: "causal",
    keys_rolled_over_heads: "causal",
}
CASES = [*REFUSED, *PROVED]


class Site(nn.Module):
    holed: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("holed", torch.arange(64) != 5, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return self.case(self, q, k, v, pad)


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.sites = nn.ModuleDict({case.__name__: Site(case) for case in CASES})  # type: ignore[attr-defined]

    def forward(self, x: Tensor, pad_mask: Tensor) -> tuple[Tensor, ...]:
        heads = [part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        return tuple(site(*heads, pad_mask) for site in self.sites.values())


@pytest.fixture(scope="module")
def compiled() -> tuple[Many, Program]:
    torch.manual_seed(0)
    module = Many().eval()
    example = {"x": torch.randn(2, 12, HEADS * DIM), "pad_mask": torch.ones(2, 12, dtype=torch.long)}
    return module, Pipeline([Canonicalize(), ProveAttention()])(capture(module, example))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_refused_with_the_reason(compiled: tuple[Many, Program], case: Case) -> None:
    kind, reason = REFUSED[case]
    (site,) = [s for s in compiled[1].sites if s.path.startswith(f"sites.{case.__name__}")]  # type: ignore[attr-defined]
    assert (site.verdict, site.kind) == ("refuse", kind), site.reason
    assert re.search(reason, site.reason), site.reason
    assert site.source.rpartition(":")[0] == __file__


@pytest.mark.parametrize("case", PROVED, ids=lambda case: case.__name__)
def test_proved(compiled: tuple[Many, Program], case: Case) -> None:
    sites = [s for s in compiled[1].sites if s.path.partition("#")[0] == f"sites.{case.__name__}"]  # type: ignore[attr-defined]
    assert len(sites) == (2 if case is attention_of_attention else 1)
    for site in sites:
        assert (site.verdict, site.kind) == ("rewrite", PROVED[case]), site.reason


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 48), (1, 130), (1, 560)])
def test_outputs_and_gradients_are_the_modules(compiled: tuple[Many, Program], batch: int, length: int) -> None:
    module, program = compiled
    x = torch.randn(batch, length, HEADS * DIM, requires_grad=True)
    pad = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        pad[0, -2:] = 0
    rows = pad.bool()[:, None, :, None]  # queries of padding are nobody's result
    for name, a, b in zip(module.sites, module(x, pad), program(x, pad), strict=True):
        a, b = a.where(rows, 0.0), b.where(rows, 0.0)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")
        (ga,), (gb,) = (torch.autograd.grad((y * y.detach().cos()).sum(), x, retain_graph=True) for y in (a, b))
        torch.testing.assert_close(gb, ga, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


class Groups(nn.Module):
    """One head over an image's pixels, as auto-encoders of images write it: ``v·pᵀ`` over flattened axes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        q, k, v = self.q(x).permute(0, 2, 1), self.k(x), self.v(x)
        p = (torch.bmm(q, k) * 8**-0.5).softmax(2)
        return torch.bmm(v, p.permute(0, 2, 1)).transpose(1, 2)


def test_one_head_over_pixels_is_proved() -> None:
    module = Groups().eval()
    program = Pipeline([Canonicalize(), ProveAttention()])(capture(module, torch.randn(2, 9, 8)))
    (site,) = program.sites
    assert (site.verdict, site.kind, site.heads, site.head_dim) == ("rewrite", "full", 1, 8), site.reason
    x = torch.randn(3, 30, 8)
    torch.testing.assert_close(program(x), module(x), rtol=1e-4, atol=1e-5)
