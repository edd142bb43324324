"""What is given to a model's inputs other than tokens: padding masks of either polarity, token types, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

from lincompile.passes.canonicalize import Canonicalize
from lincompile.passes.capture import capture
from lincompile.passes.distil.instrument import model_inputs, unpadded
from lincompile.passes.errors import LincompileError, RefusedError
from lincompile.passes.identity import ProveAttention
from lincompile.passes.inputs import model_values, settle
from lincompile.passes.linearize import LinearizeAttention
from lincompile.passes.pipeline import Pipeline
from lincompile.passes.program import Program
from lincompile.passes.quantization.sensitivity import real_tokens
from lincompile.passes.sharding.batch import shard_batch
from lincompile.passes.sharding.check import example as shard_example
from lincompile.passes.stateful import StepProgram, make_full, make_stateful
from lincompile.passes.stepping.offsets import position_limit

VOCAB, T = 64, 9
IDS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(0))
NONE = torch.zeros(2, T, dtype=torch.bool)
LEFT = torch.arange(T)[None] < torch.tensor([[3], [0]])
RIGHT = LEFT.flip(1)


class Attention(nn.Module):
    """One attention by hand over tokens, its padding mask read by ``hide`` (True = not to be seen)."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.embed, self.qkv, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, 96), nn.Linear(32, VOCAB)
        self.extra = nn.Embedding(5, 32)

    def attend(self, x: Tensor, hide: Tensor | None, bias: Tensor | float = 0.0) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (y.view(batch, length, 4, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 8**0.5 + bias
        hidden = torch.zeros(length, length, dtype=torch.bool)
        hidden = ~torch.ones_like(hidden).tril() if self.causal else hidden
        scores = scores.masked_fill(hidden if hide is None else hide[:, None, None, :] | hidden, -1e9)
        return x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)


class Inverted(Attention):
    def forward(self, tokens: Tensor, key_padding_mask: Tensor) -> Tensor:
        return self.head(self.attend(self.embed(tokens), key_padding_mask))


def prove(model: nn.Module, **example: Tensor) -> Program:
    return Pipeline([Canonicalize(), ProveAttention()])(capture(model.eval(), example))


def run(step: StepProgram, padding: Tensor, sizes: tuple[int, ...] = (T,)) -> Tensor:
    """What a step program gives, read in pieces, with ``padding`` (True) as an artefact says it."""
    real = ~padding
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    states, parts, begin = step.initial_states(2), [], 0
    with torch.no_grad():
        for size in sizes:
            piece = slice(begin, begin + size)
            out, states = step(IDS[:, piece], positions[:, piece], real[:, piece], states)
            parts.append(out)
            begin += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("attn", ["softmax", "gla", "lawcat", "hedgehog", "gated-delta"])
@pytest.mark.parametrize("window", [0, 4])
def test_an_inverted_mask_of_a_causal_model_is_given_the_right_way_round(attn: str, window: int) -> None:
    model = Inverted(causal=True)
    program = prove(model, tokens=IDS, key_padding_mask=NONE)
    student = Pipeline([LinearizeAttention(attn, window=window)])(program.clone())
    assert [(item.role, item.inverted) for item in student.inputs] == [("tokens", None), ("mask", True)]
    step = make_stateful(student)
    for padding in (NONE, LEFT):
        with torch.no_grad():
            wanted = student(IDS, padding)
            if attn == "softmax":
                torch.testing.assert_close(wanted[~padding], model(IDS, padding)[~padding], rtol=1e-5, atol=1e-5)
        got = run(step, padding, (5, 1, 3))
        torch.testing.assert_close(got[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn", ["softmax", "hedgehog"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_an_inverted_mask_of_an_encoder_is_given_the_right_way_round(attn: str, dtype: torch.dtype) -> None:
    class Typed(Attention):
        def forward(self, tokens: Tensor, key_padding_mask: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens), key_padding_mask != 0))

    program = prove(Typed(), tokens=IDS, key_padding_mask=NONE.to(dtype))
    student = Pipeline([LinearizeAttention(attn)])(program)
    step = make_full(student)
    for padding in (NONE, LEFT, RIGHT):
        with torch.no_grad():
            wanted = student(IDS, padding.to(dtype))
        torch.testing.assert_close(run(step, padding)[~padding], wanted[~padding], rtol=1e-5, atol=1e-5)


def test_a_mask_is_known_by_what_attention_reads_and_not_by_its_name() -> None:
    class Unnamed(Attention):
        def forward(self, tokens: Tensor, ignored: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens), ignored))

    program = prove(Unnamed(), tokens=IDS, ignored=NONE)
    assert (program.inputs[1].role, program.inputs[1].inverted) == ("mask", True)
    torch.testing.assert_close(run(make_full(program), LEFT)[~LEFT], program(IDS, LEFT)[~LEFT])


def test_what_trains_and_measures_gives_inverted_masks_the_right_way_round() -> None:
    program = prove(Inverted(causal=True), tokens=IDS, key_padding_mask=NONE)
    assert torch.equal(model_inputs(program, IDS)[1], NONE)
    batch = model_values(program, IDS)
    with torch.no_grad():
        torch.testing.assert_close(unpadded(program)(IDS)[0], program(**batch))  # type: ignore[index]
    assert torch.equal(
        real_tokens(program, {"tokens": IDS, "key_padding_mask": LEFT}, program(IDS, LEFT)), (~LEFT) * 1.0
    )
    sharded = shard_example(program, T)
    assert sharded is not None and torch.equal(sharded["key_padding_mask"], LEFT)
    last = shard_batch({"tokens": IDS, "key_padding_mask": NONE}, 1, 2, program=program)["key_padding_mask"]
    assert last[:, -1].all() and not last[:, :-1].any()


def test_a_batch_is_not_padded_where_nobody_knows_what_1_means() -> None:
    inputs = {"tokens": IDS, "key_padding_mask": NONE}
    with pytest.raises(LincompileError, match=r"1 in 'key_padding_mask' may say padding or a real token: give program"):
        shard_batch(inputs, 0, 2)
    assert shard_batch({"tokens": IDS, "attention_mask": ~NONE}, 1, 2)["attention_mask"][0].tolist() == [True] * 4 + [
        False
    ]


def test_attention_that_reads_one_mask_both_ways_gets_none() -> None:
    class Both(Attention):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.attend(self.attend(self.embed(tokens), mask), ~mask))

    program = prove(Both(causal=True), tokens=IDS, mask=NONE)
    assert sum(site.proved for site in program.sites) == 2
    reason = "is a real token for the attention at 'attention#2' and padding for that at 'attention'"
    for refused in (
        lambda: make_full(program),
        lambda: make_stateful(program),
        lambda: model_inputs(program, IDS),
        lambda: shard_example(program, T),
        lambda: shard_batch({"tokens": IDS, "mask": NONE}, 0, 2, program=program),
    ):
        with pytest.raises(RefusedError, match=reason):
            refused()


class Zeroing(Attention):
    """Padding is taken out of the hidden states, too."""

    def forward(self, tokens: Tensor, pads: Tensor) -> Tensor:
        x = self.embed(tokens).masked_fill(pads[..., None], 0.0)
        return self.head(self.attend(x, pads))


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(tokens, attention_mask == 0)


def test_an_inverted_mask_that_others_read_is_refused_and_its_inverse_is_not() -> None:
    class Masked(Zeroing):
        def forward(self, tokens: Tensor, pad_mask: Tensor) -> Tensor:
            return super().forward(tokens, pad_mask)

    program = prove(Masked(), tokens=IDS, pad_mask=NONE)
    with pytest.raises(RefusedError, match=r"padding for the attention at 'attention', and 'unsqueeze' reads it, too"):
        make_full(program)
    with pytest.raises(RefusedError, match="also takes 'pads'"):
        make_full(prove(Zeroing(), tokens=IDS, pads=NONE))
    program = prove(Around(Zeroing()), tokens=IDS, attention_mask=(~NONE).long())
    got = run(make_full(program), LEFT)
    torch.testing.assert_close(got[~LEFT], Zeroing().eval()(IDS, LEFT)[~LEFT], rtol=1e-5, atol=1e-5)


class Biased(Attention):
    """Attention that no proof covers: a parameter is added to its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.5))
        self.hide: Callable[[Tensor], Tensor] = lambda mask: mask == 0

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.attend(x, self.hide(mask), self.bias * torch.arange(x.shape[1])))


@pytest.mark.parametrize("inverted", [False, True])
def test_a_mask_of_unproved_attention_is_known_by_what_it_hides(inverted: bool) -> None:
    model = Biased()
    model.hide = (lambda mask: mask != 0) if inverted else (lambda mask: mask == 0)
    program = prove(model, tokens=IDS, mask=NONE.long())
    assert not program.sites[0].proved
    step = make_full(program)
    assert program.inputs[1].inverted is inverted
    wanted = model(IDS, (LEFT if inverted else ~LEFT).long())
    torch.testing.assert_close(run(step, LEFT)[~LEFT], wanted[~LEFT], rtol=1e-5, atol=1e-5)


def test_a_mask_is_known_where_a_row_gives_its_first_token_alone() -> None:
    class Pooled(Biased):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return super().forward(tokens, mask)[:, 0]

    program = prove(Pooled(), tokens=IDS, mask=NONE.long())
    assert not program.sites[0].proved
    settle(program)
    assert program.inputs[1].inverted is False and not program.inputs[1].problem


def test_an_additive_mask_is_refused() -> None:
    class Additive(Attention):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens), None, mask[:, None, None, :]))

    with pytest.raises(RefusedError, match=r"also takes 'mask', and no proved attention reads it as a padding mask"):
        make_full(prove(Additive(), tokens=IDS, mask=torch.zeros(2, T)))


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_that_is_no_padding_mask_is_refused(causal: bool) -> None:
    class Images(Attention):
        def forward(self, tokens: Tensor, image_mask: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens) + self.extra(image_mask), None))

    program = prove(Images(causal), tokens=IDS, image_mask=NONE.long())
    for make in (make_full, make_stateful) if causal else (make_full,):
        with pytest.raises(RefusedError, match=r"also takes 'image_mask', and no proved attention reads it"):
            make(program)
    settle(program)
    with pytest.raises(RefusedError, match=r"also takes 'image_mask'"):
        model_inputs(program, IDS)


def test_a_bool_mask_whose_both_values_are_sequences_is_no_padding_mask() -> None:
    class Apart(Attention):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            apart = (mask[:, None, :, None] != mask[:, None, None, :]) * -1e9
            return self.head(self.attend(self.embed(tokens), None, apart))

    for causal in (False, True):
        program = prove(Apart(causal), tokens=IDS, mask=NONE)
        assert (program.sites[0].kind, program.sites[0].verdict) == ("packed", "refuse")
        assert "the values in 'mask' separate packed sequences" in program.sites[0].reason


def test_a_mask_that_packs_sequences_by_both_its_values_is_refused() -> None:
    class Packed(Biased):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(tokens) + self.extra(mask)
            apart = (mask[:, None, :, None] != mask[:, None, None, :]) * -1e9
            return self.head(self.attend(x, None, self.bias * torch.arange(x.shape[1]) + apart))

    with pytest.raises(RefusedError, match="also takes 'mask'"):
        make_full(prove(Packed(), tokens=IDS, mask=NONE.long()))


def test_token_types_are_one_segment_and_other_inputs_are_refused() -> None:
    class Marked(Attention):
        def embedded(self, tokens: Tensor, marks: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens) + self.extra(marks.long()), None))

    class Types(Marked):
        def forward(self, tokens: Tensor, segment_ids: Tensor) -> Tensor:
            return self.embedded(tokens, segment_ids)

    class Question(Marked):
        def forward(self, tokens: Tensor, is_question: Tensor) -> Tensor:
            return self.embedded(tokens, is_question)

    class Languages(Marked):
        def forward(self, tokens: Tensor, lang_ids: Tensor) -> Tensor:
            return self.embedded(tokens, lang_ids)

    program = prove(Types(), tokens=IDS, segment_ids=torch.ones_like(IDS))
    torch.testing.assert_close(run(make_full(program), NONE), program(IDS, torch.zeros_like(IDS)))
    assert torch.equal(model_inputs(program, IDS)[1], torch.zeros_like(IDS))
    given = "which an artefact can't give .*fixed value in a module around the model"
    for model, name, example in ((Question(), "is_question", ~NONE), (Languages(), "lang_ids", torch.ones_like(IDS))):
        program = prove(model, **{"tokens": IDS, name: example})
        with pytest.raises(RefusedError, match=f"the model also takes '{name}', {given}"):
            make_full(program)
        with pytest.raises(LincompileError, match=f"the model takes '{name}', which text doesn't give"):
            model_inputs(program, IDS)


def test_an_input_that_nothing_reads_needs_no_value() -> None:
    class Labelled(Attention):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens), None))

    program = prove(Labelled(), tokens=IDS, labels=IDS)
    torch.testing.assert_close(run(make_full(program), NONE), program(IDS, IDS))


def test_positions_with_axes_of_their_own_are_refused() -> None:
    class Grid(Attention):
        def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
            return self.head(self.attend(self.embed(tokens) + self.extra(position_ids % 5).sum(2), None))

    program = prove(Grid(), tokens=IDS, position_ids=torch.zeros(2, T, 2, dtype=torch.int64))
    with pytest.raises(RefusedError, match="also takes 'position_ids', which an artefact can't give"):
        make_full(program)


def test_tables_of_positions_counted_in_an_inverted_mask_are_bounded() -> None:
    class Counted(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(40, 32)

        def forward(self, tokens: Tensor, pad_mask: Tensor) -> Tensor:
            places = ((~pad_mask).long().cumsum(1) - 1).clamp(min=0)
            return self.head(self.attend(self.embed(tokens) + self.places(places), pad_mask))

    assert position_limit(capture(Counted().eval(), {"tokens": IDS, "pad_mask": NONE})) == 40


def test_what_a_mask_holds_is_the_programs_own_and_proving_again_keeps_it() -> None:
    raw = capture(Inverted(causal=True).eval(), {"tokens": IDS, "key_padding_mask": NONE})
    twin = raw.clone()
    proved = Pipeline([Canonicalize(), ProveAttention()])(twin)
    assert raw.inputs[1].inverted is None and proved.inputs[1].inverted is True
    before = copy.copy(proved.inputs)
    assert Pipeline([ProveAttention()])(proved).inputs == before


def test_every_encoder_of_the_zoo_keeps_its_mask() -> None:
    pytest.importorskip("transformers")
    for name in ("bert", "bert-eager", "roberta"):
        program = prove(*[zoo.build(name)[0]], **zoo.build(name)[1])
        make_full(program)
        assert [item.inverted for item in program.inputs if item.role == "mask"] == [False], name
