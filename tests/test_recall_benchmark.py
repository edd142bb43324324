"""``benchmarks/recall.py``: what a copying token looks back to, with which weights; and recall in ``distil.py``."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from distil_models import linear, proved, text

from lincompile.passes.distil.echo import FAR, from_afar
from lincompile.passes.distil.instrument import beside, instead
from lincompile.passes.distil.logits import logits_of

pytest.importorskip("jinja2")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recall as script

    return script


def test_a_copying_token_looks_at_what_came_next(recall: ModuleType) -> None:
    ids = torch.arange(5000)
    for index in range(3):
        window, rows, keys = recall.copied(ids, 700, index)
        assert len(window) == 700 and len(rows) == len(keys) == recall.SPANS * (recall.SPAN - 1 - recall.LEAD)
        assert torch.equal(window[keys], window[rows + 1]) and torch.equal(window[keys - 1], window[rows])
        assert int((rows - keys).min()) > 2 * recall.FAR - recall.SPAN and int(rows.max()) < 699
    assert torch.equal(recall.copied(ids, 700, 1)[0], recall.copied(ids, 700, 1)[0])


def test_weights_are_those_of_both_sides(recall: ModuleType) -> None:
    """The teacher's by their definition; the student's such that all keys' weights sum to one."""
    teacher = proved()
    student = linear(teacher)
    window = text(20)
    row = 13
    site = teacher.sites[0]
    assert site.node is not None
    softmax = tuple(site.node.args[4:8])
    seen: list[torch.Tensor] = []

    class Probe(recall.Looks):  # type: ignore[misc, name-defined]
        def forward(self, *operands: torch.Tensor) -> torch.Tensor:
            if self.softmax is not None:
                q, k = operands[1][0], operands[2][0]
                k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
                scores = torch.einsum("hd,hkd->hk", q[:, row], k[:, : row + 1]) * softmax[2]
                seen.append(scores.softmax(-1))
            return super().forward(*operands)  # type: ignore[no-any-return]

    teachers: list[Probe] = []
    students: list[Probe] = []

    def put(found: list[Probe], told: object) -> object:
        def wrap(path: str, branch: object) -> Probe:
            found.append(Probe(branch, told))
            return found[-1]

        return wrap

    one = beside(teacher, student, put(teachers, softmax), with_scores=True)
    other = instead(teacher, student, put(students, None))
    plain = logits_of(instead(teacher, student), window[None])
    sums = torch.zeros(len(students), 4)
    for key in range(row + 1):
        case = [(window, torch.tensor([row]), torch.tensor([key]))]
        for probe in (*teachers, *students):
            probe.sums.clear()
        seen.clear()
        weights, _ = recall.looks(one, teachers, case)
        assert torch.allclose(torch.stack(weights), torch.stack(seen)[:, :, key], atol=1e-5)
        weights, nats = recall.looks(other, students, case)
        sums += torch.stack(weights)
        expected = torch.nn.functional.cross_entropy(plain[0, row][None], window[row + 1][None])
        assert math.isclose(nats, float(expected.detach()), rel_tol=1e-4)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def test_which_tokens_count_as_recalled() -> None:
    """Those after the same token as before, last more than 64 tokens ago."""
    far, near = FAR, 9
    tokens = [1, 2, *range(100, 100 + far), 1, 2, *range(300, 300 + near), 1, 2, 7, 2]
    found = from_afar(tokens)[1:].nonzero().flatten().tolist()
    assert found == [far + 2], "the first repetition; the second is near, and a lone token is no pair"
    assert len(from_afar(tokens)) == len(tokens) and from_afar([5]).tolist() == [False]
