"""What reads positions, masks along the sequence or across rows has no step form; what keeps them apart has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.functional import pad, scaled_dot_product_attention

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.errors import RefusedError
from lincompile.passes.graph import fake_mode_of
from lincompile.passes.identity import ProveAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.shard import splittable
from lincompile.passes.stateful import make_stateful
from lincompile.passes.stepping.offsets import continue_positions, sequence_symbol

Change = Callable[[Tensor, Tensor], Tensor]


class Plain(nn.Module):
    """One causal attention over tokens that ``change`` gets as ``[B, T, 32]``, with positions or a mask along them."""

    table: Tensor

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change
        self.embed, self.qkv, self.head = nn.Embedding(97, 32), nn.Linear(32, 96), nn.Linear(32, 97)
        self.register_buffer("table", torch.randn(512, 32))

    def attend(self, x: Tensor, along: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.change(x, along)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        seen = None
        if mask is not None:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & (mask[:, None, None] != 0)
        y = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=mask is None)
        return self.head(x + y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, idx: Tensor) -> Tensor:
        """idx [B, T]; ``along`` is a table of 512 rows."""
        return self.attend(self.embed(idx), self.table)


class Placed(Plain):
    def forward(self, idx: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        """``along`` are the positions ``[B, T]``."""
        return self.attend(self.embed(idx), position_ids)


class Masked(Plain):
    def forward(self, idx: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """``along`` is the padding mask ``[B, T]``."""
        return self.attend(self.embed(idx), attention_mask, attention_mask)


def program_of(kind: type[Plain], change: Change) -> Program:
    torch.manual_seed(0)
    return proved(kind(change))


def proved(module: nn.Module) -> Program:
    ids = zoo.tokens()
    example = {"idx": ids}
    if isinstance(module, (Placed, Longrope)):
        example["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape).clone()
    if isinstance(module, Masked):
        example["attention_mask"] = torch.ones_like(ids)
    return Pipeline([Canonicalize(), ProveAttention()])(capture(module.eval(), example))


def count(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1])


def dynamic(x: Tensor, _: Tensor) -> Tensor:
    """Rotary frequencies that depend on the longest position, as dynamic scaling (and longrope) has them."""
    base = torch.where(count(x).float().max() + 1 > 64, 40_000.0, 10_000.0)
    return x + (count(x)[:, None] / base ** (torch.arange(32) / 32)).sin()


def last(x: Tensor, _: Tensor) -> Tensor:
    at = count(x).float()
    return x + torch.where(at[-1:] > 64, at / 4, at)[:, None].sin()


def complex_rotary(x: Tensor, _: Tensor) -> Tensor:
    angles = torch.outer(count(x).float(), torch.linspace(0, 1, 16))
    turned = torch.view_as_complex(x.unflatten(-1, (16, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(2)


def written(x: Tensor, _: Tensor) -> Tensor:
    late = torch.zeros(x.shape[1], 2)
    late[:, 1].add_(count(x) > 64)
    return x * (1 + late[:, 1:])


class Longrope(Plain):
    """Rotary frequencies in a buffer that the forward writes, as transformers does for longrope."""

    frequencies: Tensor

    def __init__(self, kept: bool) -> None:
        super().__init__(self.rotated if kept else lambda x, _: x)
        self.register_buffer("frequencies", torch.linspace(0, 1, 32))

    def rotated(self, x: Tensor, _: Tensor) -> Tensor:
        return x + (torch.arange(x.shape[1])[:, None] * self.frequencies).cos()

    def forward(self, idx: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        long = position_ids.max() + 1 > 64
        self.frequencies.copy_(torch.where(long, torch.linspace(0, 0.25, 32), torch.linspace(0, 1, 32)))
        return self.attend(self.embed(idx), position_ids)


REFUSED: dict[str, tuple[type[Plain], Change, str]] = {
    # every one gave the full forward's numbers at the lengths that were run, and others past 40 to 100 tokens
    "dynamic-base": (Plain, dynamic, r"aten.max.default\) reads the positions or mask of all tokens at once"),
    "last-position": (Plain, last, r"aten.slice.Tensor\) reads the positions or mask of all tokens at once"),
    "flipped-count": (
        Plain,
        lambda x, _: x * (1 + (ones(x).cumsum(0).flip(0) > 100)[:, None]),
        r"aten.flip.default\) runs along the tokens",
    ),
    "mean": (
        Plain,
        lambda x, _: x * (1 + (count(x).float().mean() > 50)),
        r"aten.mean.default\) reads the positions or mask of all tokens at once",
    ),
    "summed-ones": (
        Plain,
        lambda x, _: x * (1 + torch.relu(ones(x).sum() - 40) / 40),
        r"aten.sum.default\) reads the positions or mask of all tokens at once",
    ),
    "largest-position": (
        Placed,
        lambda x, at: x * (1 + (at.amax(-1) > 64)[:, None, None]),
        r"aten.amax.default\) reads the positions or mask of all tokens at once",
    ),
    "last-given": (
        Placed,
        lambda x, at: x * (1 + (at[:, -1:] > 64)[..., None]),
        r"aten.slice.Tensor\) reads the positions or mask of all tokens at once",
    ),
    "real-tokens": (
        Masked,
        lambda x, mask: x * (1 + (mask.sum(-1) > 64)[:, None, None]),
        r"aten.sum.dim_IntList\) reads the positions or mask of all tokens at once",
    ),
    "shifted-mask": (
        Masked,
        lambda x, mask: x * (1 + mask.roll(1, 1)[..., None]),
        r"aten.roll.default\) runs along the tokens",
    ),
    # and others of their kind
    "counted-mask": (
        Masked,
        lambda x, mask: x * (1 + (mask.cumsum(1) > 64)[..., None]),
        r"aten.cumsum.default\) runs along the tokens",
    ),
    "first-position": (
        Placed,
        lambda x, at: x * (1 + (at - at.select(1, 0)[:, None] > 64)[..., None]),
        r"aten.select.int\) reads the positions or mask of all tokens at once",
    ),
    "largest-of-all": (
        Placed,
        lambda x, at: x * (1 + (at.max() > 64)),
        r"aten.max.default\) reads the positions or mask of all tokens at once",
    ),
    "any-padding": (
        Masked,
        lambda x, mask: x * (1 + (mask == 0).sum(1, keepdim=True).gt(20)[..., None]),
        r"aten.sum.dim_IntList\) reads the positions or mask of all tokens at once",
    ),
    "number": (Placed, lambda x, at: x * (1 + at.max().item() // 64), "reads a number out of the whole sequence"),
    "row-of-length": (
        Plain,
        lambda x, table: x + table[x.shape[1] - 1],
        r"aten.select.int\) computes with the sequence length",
    ),
    "last-rows": (
        Plain,
        lambda x, table: x + table[512 - x.shape[1] :],
        r"aten.slice.Tensor\) computes with the sequence length",
    ),
    "later-rows": (
        Plain,
        lambda x, table: x + (table > 9)[2 : x.shape[1] + 2],
        r"aten.slice.Tensor\) takes other rows of a table than the first ones",
    ),
    "rows-of-rows": (
        Placed,
        lambda x, at: x + (torch.arange(600)[: x.shape[1]] > 64)[at][..., None],
        r"aten.index.Tensor\) picks tokens by position",
    ),
    "padded": (
        Plain,
        lambda x, _: x * (1 + pad(count(x), (40, 0))[: x.shape[1]][:, None]),
        r"aten.*pad.*isn't known to keep tokens apart|aten.cat.default\) runs along the tokens",
    ),
    "steps": (
        Plain,
        lambda x, _: x * (1 + (torch.arange(0, 2 * x.shape[1], 2) > 100)[:, None]),
        r"aten.arange.start_step\) counts something other than tokens",
    ),
    "counted-late": (
        Plain,
        lambda x, _: x * (1 + ((count(x) < 64).long().cumsum(0) > 60)[:, None]),
        r"aten.cumsum.default\) runs along the tokens",
    ),
    "folded": (
        Plain,
        lambda x, _: x * (1 + (torch.arange(2 * x.shape[1]).view(2, -1)[1] > 100)[:, None]),
        r"aten.arange.default\) counts something other than tokens",
    ),
    "unfolded": (
        Placed,
        lambda x, at: x * (1 + (at.reshape(at.shape[1], at.shape[0]).t() > 64)[..., None]),
        r"aten.reshape.default\) puts tokens elsewhere",
    ),
    "periodic": (
        Plain,
        lambda x, _: x * (1 + torch.tensor([0.0, 1.0]).repeat(x.shape[1]).view(2, -1)[0][:, None]),
        r"aten.repeat.default\) repeats a table along the tokens",
    ),
    "einsum": (
        Placed,
        lambda x, at: x * (1 + (torch.einsum("...t,...s->...t", at.float(), at.float()) > 1e5)[..., None]),
        r"aten.einsum.default\) .*sums over tokens",
    ),
    "buckets": (
        Placed,
        lambda x, at: x * (1 + (torch.bucketize(at, torch.arange(at.shape[1])) > 64)[..., None]),
        r"aten.bucketize.Tensor\) .*looks up in a table made from tokens",
    ),
    "written": (Plain, written, r"aten.add_.Tensor\) writes into a part of a tensor of positions"),
}


def without_a_step_form(kind: type[Plain], change: Change, reason: str) -> Program:
    """The program, of which no step form is made, for a reason and a line of this file."""
    program = program_of(kind, change)
    with pytest.raises(RefusedError, match=f"no step form: '.*({reason}).*test_tokenwise.py:"):
        make_stateful(program)
    return program


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_the_whole_sequence_is_refused(name: str) -> None:
    kind, change, reason = REFUSED[name]
    program = without_a_step_form(kind, change, reason)
    with pytest.raises(RefusedError, match=f"shard: '.*({reason})"):
        splittable(program)


def test_longrope_is_refused_while_its_frequencies_are_read() -> None:
    """A rewrite that removes the rotary embedding leaves the writing of its frequencies behind."""
    with pytest.raises(RefusedError, match=r"no step form: 'max.*aten.max.default\) reads the positions"):
        make_stateful(proved(Longrope(kept=True)))
    assert make_stateful(proved(Longrope(kept=False))).max_error is not None


def test_a_buffer_that_counts_calls_is_refused() -> None:
    class Counting(Plain):
        def forward(self, idx: Tensor) -> Tensor:
            self.table.add_(1)
            return self.attend(self.embed(idx), self.table)

    program = proved(Counting(lambda x, table: x + table[: x.shape[1]]))
    with pytest.raises(RefusedError, match=r"aten.add_.Tensor\) changes a stored tensor"):
        make_stateful(program)


ACROSS_ROWS: dict[str, tuple[type[Plain], Change, str]] = {
    "rows-maximum": (
        Placed,
        lambda x, at: x * (1 + (at.amax(0) > 64)[:, None]),
        r"aten.amax.default\) .* reads all rows of a batch at once",
    ),
    "first-row": (
        Placed,
        lambda x, at: x * (1 + (at[0] > 64)[:, None]),
        r"aten.select.int\) .* reads all rows of a batch at once",
    ),
    "rows-rolled": (
        Masked,
        lambda x, mask: x * (1 + (mask.roll(1, 0) - 1)[..., None]),
        r"aten.roll.default\) .* runs along the rows of a batch",
    ),
    "far-norm": (
        Plain,
        lambda x, _: x * (1 + (x.square().sum(0, keepdim=True) > 1e9)),
        r"aten.sum.dim_IntList\) .* reads all rows of a batch at once",
    ),
    "batch-size": (
        Plain,
        lambda x, _: x * (1 + torch.relu(ones(x) * x.shape[0] - 8)[:, None]),
        r"aten.mul.Tensor\) computes with the batch size",
    ),
}


@pytest.mark.parametrize("name", ACROSS_ROWS)
def test_what_reads_other_rows_of_a_batch_is_refused(name: str) -> None:
    """A session takes prompts together that have nothing to do with each other; sharding leaves batches whole."""
    splittable(without_a_step_form(*ACROSS_ROWS[name]))


def test_a_count_by_twos_is_refused_where_it_shows_late() -> None:
    """Short tables of it are all alike: the counter itself is compared."""
    program = program_of(Plain, lambda x, _: x * (1 + (torch.full((x.shape[1],), 2).cumsum(0) > 100)[:, None]))
    with pytest.raises(RefusedError, match="'cumsum' can't be continued from an offset"):
        make_stateful(program)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dynamic-base", "changes with the sequence length"),
        ("last-position", "changes with the sequence length"),
        ("counted-late", "can't be continued from an offset"),
        ("steps", "can't be continued from an offset"),
    ],
)
def test_tables_are_also_compared_far_out(name: str, reason: str) -> None:
    """Without the reading of ops, what tables show at 100 tokens and more would be found as well."""
    program = program_of(*REFUSED[name][:2])

    def offset() -> Node:
        with program.graph_module.graph.inserting_before(next(iter(program.graph_module.graph.nodes))):
            node = program.graph_module.graph.placeholder("offset")
        node.meta["val"] = fake_mode_of(program.graph_module).from_tensor(torch.tensor(0))
        return node

    with pytest.raises(RefusedError, match=f"the position table '.*' {reason}"):
        continue_positions(program, sequence_symbol(program.placeholder("idx")), offset)


ACCEPTED: dict[str, tuple[type[Plain], Change]] = {
    "table": (Plain, lambda x, table: x + table[: x.shape[1]]),
    "table-looked-up": (Plain, lambda x, table: x + table[count(x)]),
    "counted-ones": (Plain, lambda x, table: x + table[ones(x).long().cumsum(0) - 1]),
    "from-two": (Plain, lambda x, table: x + table[torch.arange(2, x.shape[1] + 2)]),
    "scaled-late": (Plain, lambda x, _: x + torch.where(count(x) > 64, count(x) / 4, count(x))[:, None].sin()),
    "outer": (Plain, lambda x, _: x + torch.outer(count(x).float(), torch.linspace(0, 1, 32)).cos()),
    "einsum": (Plain, lambda x, _: x + torch.einsum("i,j->ij", count(x).float(), torch.linspace(0, 1, 32)).cos()),
    "einsum-rest": (
        Plain,
        lambda x, _: x + torch.einsum("..., j -> ... j", count(x).float(), torch.linspace(0, 1, 32)).cos(),
    ),
    "einsum-both": (Plain, lambda x, table: x + torch.einsum("...ij,ij->...ij", x, table[: x.shape[1]])),
    "tile": (Plain, lambda x, table: x + torch.tile(table[: x.shape[1], :16], (1, 2))),
    "broadcast": (Plain, lambda x, table: x + torch.broadcast_to(table[: x.shape[1]], x.shape)),
    "one-hot": (Plain, lambda x, _: x + torch.nn.functional.one_hot(count(x) % 32, 32)),
    "bucketize": (Plain, lambda x, table: x + table[torch.bucketize(count(x), torch.tensor([3, 20, 90]))]),
    "complex": (Plain, complex_rotary),
    "channels": (Plain, lambda x, _: x + x[..., torch.arange(31, -1, -1)]),
    "summed-channels": (Plain, lambda x, table: x + table[: x.shape[1]].cumsum(1) / 9),
    "given": (Placed, lambda x, at: x + (at[..., None] / 9).sin()),
    "given-late": (Placed, lambda x, at: x * (1 + (at > 64)[..., None])),
    "given-product": (
        Placed,
        lambda x, at: x + (torch.linspace(0, 1, 32)[None, :, None] @ at[:, None].float()).transpose(1, 2).cos(),
    ),
    "given-row-sums": (Placed, lambda x, at: x + torch.stack([at, at * 2], -1).sum(-1, keepdim=True) / 99),
    "flattened": (Placed, lambda x, at: x + (at.reshape(-1) / 9).sin().view(at.shape)[..., None]),
    "masked": (Masked, lambda x, mask: x * mask[..., None]),
    "mask-whole": (Masked, lambda x, mask: x * (mask[:, -x.shape[1] :] != 0)[..., None]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_keeps_tokens_apart_has_a_step_form_at_every_length(name: str) -> None:
    kind, change = ACCEPTED[name]
    program = program_of(kind, change)
    splittable(program)
    step = make_stateful(program)
    length, begin = 130, 0
    tokens, at = torch.randint(3, 97, (1, length)), torch.arange(length)[None]
    mask = torch.ones(1, length, dtype=torch.bool)
    values = {"tokens": tokens, "positions": at, "mask": mask.long()}
    with torch.no_grad():
        whole = program(*(values[item.role] for item in program.inputs))
        states, parts = step.initial_states(1), []
        for size in (67, 1, 1, 61):
            piece = slice(begin, begin + size)
            out, states = step(tokens[:, piece], at[:, piece], mask[:, piece], states)
            parts.append(out)
            begin += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
