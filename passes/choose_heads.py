"""Which KV heads to keep softmax: those of the heads that look back by content, as seen on random tokens said twice.

A head that looks things up (an induction head, arXiv 2209.11895) puts its weight on the token that came next the last
time. In random tokens nothing but having stood there before says where that is, and neither text nor training is
needed to see it: the measure is taken on the proved softmax model alone, before anything is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from .distil.instrument import model_inputs
from .distil.weights import mean_weights, teacher_weights
from .errors import LincompileError, RefusedError
from .graph import same_dim, tensor_of
from .pipeline import PassResult, register
from .program import AttentionSite, Program
from .quantization.embeddings import vocabulary
from .split_heads import SplitHeads, head_name
from .stepping.offsets import position_limit

APART = 256  # tokens between the two times a token stands in a window
WINDOWS = 4
LEAD = 8  # tokens of the second time until a model can know that it is one
FAINT = 0.1  # of a row's weight; where less goes to the one key, a head has other things to do


@register("choose-heads")
@dataclass(frozen=True)
class ChooseHeads:
    """Cuts the KV heads whose heads look back by content most from their sites, as ``SplitHeads`` does by name.

    A query head's score is its mean softmax weight on the key after the one where the row's token stood before, in
    windows of random tokens said twice; a KV head's is the largest of its query heads'. The report holds all scores,
    and the program gets a note of what was chosen.

    Args:
        count: KV heads to choose.
        window: of the softmax that stands beside linear attention (0 = none): what it covers needs no head.
        seed: of the random tokens.

    Raises (when run):
        RefusedError: there are fewer KV heads to choose from, the program takes no tokens or too few of them, or its
            weights are missing or give NaN.
    """

    count: int = 1
    window: int = 0
    seed: int = 0
    name: str = field(default="choose-heads", init=False, metadata={"text": False})

    def run(self, program: Program) -> PassResult:
        places = self._places(program)
        limits = [limit for limit in (program.max_positions, position_limit(program)) if limit is not None]
        apart = self._apart(min(limits, default=None))
        scores = {index: found.tolist() for index, found in self._scores(program, places, apart).items()}
        ranked = sorted((-score, index, head) for index, found in scores.items() for head, score in enumerate(found))
        chosen = {(index, head): -score for score, index, head in ranked[: self.count]}
        program.notes.append(self._note({head_name(*pair): score for pair, score in chosen.items()}, sorted(chosen)))
        report: dict[str, Any] = {
            "chosen": {head_name(*pair): round(score, 4) for pair, score in chosen.items()},
            "scores": {program.sites[i].path: [round(score, 4) for score in found] for i, found in scores.items()},
            "tokens_apart": apart,
        }
        split = SplitHeads(tuple(sorted(chosen))).run(program)
        return PassResult(split.program, split.modified, report | split.report)

    @property
    def _asked(self) -> str:
        return f"--keep-softmax heads:{self.count}"

    def _places(self, program: Program) -> list[int]:
        """The sites whose KV heads are there to choose from."""
        reasons = [why_not(site) for site in program.sites]
        places = [index for index, reason in enumerate(reasons) if reason is None]
        there_are = sum(program.sites[index].kv_heads or 0 for index in places)
        if 0 < self.count <= there_are:
            return places
        left_out = [f"'{site.path}' {why}" for site, why in zip(program.sites, reasons, strict=True) if why is not None]
        more = f" (and {len(left_out) - 1} more take no part)" if len(left_out) > 1 else ""
        why = f"; {left_out[0]}{more}" if left_out else ""
        advice = f"write a number from 1 to {there_are}" if there_are else "leave --keep-softmax out"
        raise RefusedError(f"{self._asked}: the model has {there_are} KV heads to choose from{why}: {advice}")

    def _apart(self, limit: int | None) -> int:
        """Tokens from one time to the next: farther than the window that stands beside reaches."""
        apart = max(APART, self.window + 1)
        if limit is not None:
            apart = min(apart, limit // 2)
        least = max(2 * LEAD, self.window + 1)
        if apart < least:
            window = f" beyond --window {self.window}" if self.window else ""
            raise RefusedError(
                f"{self._asked}: what looks back{window} is seen on {2 * least:,} tokens or more, and the model takes "
                f"{limit:,}: name KV heads (17.1,18.2){', or give a smaller window' if self.window else ''}"
            )
        return apart

    @torch.no_grad()
    def _scores(self, program: Program, places: list[int], apart: int) -> dict[int, Tensor]:
        """Scores ``[Hkv]`` of the sites by index."""
        tokens = vocabulary(program)
        if tokens is None:
            raise RefusedError(
                f"{self._asked} reads random tokens, and the model takes none: name KV heads (17.1,18.2)"
            )
        device = next(program.graph_module.parameters()).device
        if device.type == "meta":
            raise RefusedError(
                f"{self._asked} looks at what the weights do, and --plan reads none: name as many KV heads (17.1,18.2)"
            )
        looking = _Looking(program, [program.sites[index] for index in places], apart)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(WINDOWS):
            window = torch.randint(tokens, (1, apart), generator=generator).repeat(1, 2).to(device)
            try:
                inputs = model_inputs(program, window)
            except LincompileError:
                raise RefusedError(
                    f"{self._asked} reads tokens alone, and the model takes more: name KV heads (17.1,18.2)"
                ) from None
            looking.look(inputs)
        found: dict[int, Tensor] = {}
        for index, total in zip(places, looking.total.values(), strict=True):
            site = program.sites[index]
            if not bool(total.isfinite().all()):
                raise RefusedError(f"{self._asked}: '{site.path}' gives NaN or infinity; check the model's weights")
            found[index] = (total / WINDOWS).view(site.kv_heads or 1, -1).amax(1)
        return found

    def _note(self, scores: dict[str, float], chosen: list[tuple[int, int]]) -> str:
        names = ",".join(head_name(*pair) for pair in chosen)
        weights = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        note = f"{self._asked} keeps {names} (weight on what came next the last time: {weights})"
        if faint := [name for name, score in scores.items() if score < FAINT]:
            note += (
                f"; {', '.join(faint)} hardly look{'s' if len(faint) == 1 else ''} back by content: a smaller N may do"
            )
        return note


def why_not(site: AttentionSite) -> str | None:
    """Why a site's KV heads aren't among those to choose from; None where they are."""
    if site.node is None or site.method != "softmax":
        return f"isn't proved softmax attention: {site.reason}"
    if site.bias == "alibi":
        return "has ALiBi, whose heads aren't split"
    if site.kind == "sliding":
        return f"is a sliding window of {site.window} tokens, which doesn't look farther back"
    if site.kind != "causal":
        return "isn't causal"
    q, k = tensor_of(site.node.args[0]), tensor_of(site.node.args[1])
    return None if same_dim(q.shape[2], k.shape[2]) else "is cross-attention"


class _Looking(Interpreter):
    """Runs a program up to the last of some sites; adds up where each of their heads looks, one site after the other.

    Attributes:
        total: for the sites' ops, the sum over windows of the mean weights ``[H]``.
    """

    def __init__(self, program: Program, sites: list[AttentionSite], apart: int) -> None:
        super().__init__(program.graph_module)
        self.total: dict[Node, Tensor] = {
            site.node: torch.zeros(site.heads or 0) for site in sites if site.node is not None
        }
        self.rows = torch.arange(apart + LEAD, 2 * apart - 1)
        self.keys = self.rows - apart + 1
        self.left: set[Node] = set()

    def look(self, inputs: list[Tensor]) -> None:
        """Adds a window of ``2 * apart`` tokens, given as the program's inputs."""
        self.left = set(self.total)
        self.run(*inputs)

    def run_node(self, n: Node) -> Any:
        if not self.left:
            return None  # neither the rest nor the logits of a large vocabulary are needed
        if n in self.left:
            self.left.remove(n)
            self.total[n] += self._weights(*self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def _weights(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, *softmax: Any) -> Tensor:
        def attend(columns: Tensor, rows: Tensor) -> Tensor:
            # Only the rows that are asked for, which follow one another: the last of them sees all keys it is given.
            begin, end = int(rows[0]), int(rows[-1]) + 1
            mask = None if padding is None else padding[:, :end]
            return teacher_weights(softmax, q[:, :, begin:end], k[:, :, :end], columns[:, :, :end], mask)

        wide = v.to(torch.promote_types(v.dtype, torch.float32))  # bfloat16 would tell heads apart to two digits
        return mean_weights(attend, wide, v.shape[3], self.rows, self.keys)
