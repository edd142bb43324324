"""What a linear student looks up: weights on the token to be copied, head by head, and what copying costs.

    python benchmarks/recall.py MODEL --adapter FILE --window 64 --text TEXT --json recall.json

Windows of the text end with spans that stood in them before, 64 tokens each and more than 128 tokens ago. An induction
head (arXiv 2209.11895) puts its weight on the token that came next the first time. For the heads of the teacher that do
so most, their softmax weight there is printed, and the weight of the student's linear attention in their place (its
output for values that are one at one key: gates, feature maps and normaliser as they run, on the student's own hidden
states). The loss on the copied tokens goes with them; the first eight of a span don't count.

``--restore 4,8 --eval TEXT`` sets the student's KV heads in whose place the teacher looks back most to softmax, without
training, and measures perplexity: how few heads it is that a linear student lacks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from distil_measure import perplexity
from torch import Tensor, nn
from versions import versions

from lincompile.lowering.compiler import capture_loaded, prove, rewrite
from lincompile.lowering.options import Options
from lincompile.lowering.text import read_tokens
from lincompile.passes.distil.adapter import apply_adapter
from lincompile.passes.distil.echo import FAR
from lincompile.passes.distil.instrument import TrainingGraph, beside, instead, unpadded
from lincompile.passes.distil.weights import check_weights, mean_weights, teacher_weights
from lincompile.passes.errors import LincompileError
from lincompile.passes.formats.load import load_model
from lincompile.passes.linearization.methods import LinearMethod
from lincompile.passes.program import Program

Windows = list[tuple[Tensor, Tensor, Tensor]]
SPAN = 64
SPANS = 4
LEAD = 8  # tokens of a span until both models can know what comes


class Looks(nn.Module):
    """Beside or instead of a site: notes the mean weights ``[H]`` on the tokens that were copied.

    Args:
        softmax: kind, window, scale and softcap of the teacher's site, to note its weights; None for the student's.
    """

    def __init__(self, branch: LinearMethod, softmax: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.branch, self.softmax = branch, softmax
        self.rows = self.keys = torch.zeros(0)
        self.sums: list[Tensor] = []

    def forward(self, *operands: Tensor) -> Tensor:
        if self.softmax is None:
            result, (q, k, v, x) = self.branch(*operands), operands[:4]
        else:
            result, site_q, site_k, q, k, v, x = operands[:7]

        def attend(columns: Tensor, rows: Tensor) -> Tensor:
            if self.softmax is None:
                return self.branch.attend(q, k, columns, x, None)[:, :, rows]
            return teacher_weights(self.softmax, site_q, site_k, columns, None)[:, :, rows]

        self.sums.append(mean_weights(attend, v, self.branch.shape.value_dim, self.rows, self.keys))
        return result


class Restored(nn.Module):
    """Instead of a site: the student's module, with softmax over all keys in some of its KV heads."""

    def __init__(self, branch: LinearMethod, softmax: tuple[Any, ...]) -> None:
        super().__init__()
        self.branch, self.softmax = branch, softmax
        self.kv_heads: list[int] = []

    def forward(self, *operands: Tensor) -> Tensor:
        result: Tensor = self.branch(*operands)
        if not self.kv_heads:
            return result
        v, site_q, site_k = operands[2], *operands[4:6]
        full = torch.ops.lincompile.softmax_attention(site_q, site_k, v, None, *self.softmax)
        groups = self.branch.shape.groups
        heads = [head * groups + i for head in self.kv_heads for i in range(groups)]
        result = result.clone()
        result[:, heads] = full[:, heads]
        return result


def copied(ids: Tensor, length: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """A window ``[T]`` whose end repeats spans of it; the rows that copy, and the keys of what they copy."""
    generator = torch.Generator().manual_seed(index)
    plain = length - SPANS * SPAN
    begin = int(torch.randint(0, len(ids) - plain, (1,), generator=generator))
    window = [ids[begin : begin + plain].long()]
    rows, keys = [], []
    for span in range(SPANS):
        source = int(torch.randint(1, plain - SPAN - 2 * FAR, (1,), generator=generator))
        window.append(window[0][source : source + SPAN])
        place = torch.arange(LEAD, SPAN - 1)
        rows.append(plain + span * SPAN + place)
        keys.append(source + place + 1)
    return torch.cat(window), torch.cat(rows), torch.cat(keys)


def looks(graph: TrainingGraph, sites: list[Looks], windows: Windows) -> tuple[list[Tensor], float]:
    """Mean weights ``[H]`` of each site on the copied tokens, and the graph's loss on them where it returns logits."""
    losses = []
    for window, rows, keys in windows:
        for site in sites:
            site.rows, site.keys = rows, keys
        with torch.no_grad():
            result = graph(window[None].to(graph.device))
        first = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(first, Tensor) and first.dim() == 3:
            logits = first[0, rows.to(graph.device)].float()
            losses.append(nn.functional.cross_entropy(logits, window[rows + 1].to(graph.device)).item())
    return [torch.stack(site.sums).mean(0) for site in sites], sum(losses) / max(1, len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--attn", default="lawcat")
    parser.add_argument("--window", type=int)
    parser.add_argument("--keep-softmax")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--top", type=int, default=8, help="heads to print")
    parser.add_argument("--restore", type=lambda text: [int(n) for n in text.split(",")], default=[], metavar="N,N")
    parser.add_argument("--eval", help="text for --restore, which needs a student with a --window")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=8192, help="tokens of --eval")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.restore and not (asked.eval and asked.window):
        parser.error(
            "--restore needs --eval TEXT, and a student with a --window (whose sites see the softmax's q and k)"
        )
    loaded = load_model(asked.model, dtype=torch.float32, device=asked.device)
    options = Options(attn=asked.attn, window=asked.window, keep_softmax=asked.keep_softmax, adapter=str(asked.adapter))
    teacher = prove(capture_loaded(loaded), options)
    ids = read_tokens(asked.text, loaded.tokenizer)
    windows = [copied(ids, asked.length, index) for index in range(asked.windows)]
    softmax = {site.path: tuple(site.node.args[4:8]) for site in teacher.sites if site.node is not None}
    sites: dict[str, list[Looks]] = {"teacher": [], "student": []}

    def wrap(side: str) -> Any:
        def put(path: str, branch: LinearMethod) -> nn.Module:
            check_weights(branch, path)
            sites[side].append(Looks(branch, softmax[path] if side == "teacher" else None))
            return sites[side][-1]

        return put

    student = rewrite(teacher, options)
    graph = beside(teacher, student, wrap("teacher"), with_scores=True)
    paths = list(graph.branches)
    by_teacher, _ = looks(graph, sites["teacher"], windows)
    _, teacher_nats = looks(unpadded(teacher), [], windows)
    apply_adapter(asked.adapter, teacher, student, source_hash=loaded.source_hash)
    by_student, student_nats = looks(instead(teacher, student, wrap("student")), sites["student"], windows)
    heads = [
        {"site": path, "head": head, "teacher": float(mine[head]), "student": float(other[head])}
        for path, mine, other in zip(paths, by_teacher, by_student, strict=True)
        for head in range(len(mine))
    ]
    heads.sort(key=lambda row: -row["teacher"])
    found = {
        "command": " ".join(sys.argv),
        "versions": versions(),
        "copied_tokens": sum(len(rows) for _, rows, _ in windows),
        "teacher_nats": teacher_nats,
        "student_nats": student_nats,
        "largest_of_the_student": max(row["student"] for row in heads),
        "heads": heads[: asked.top],
    }
    print(f"what is copied costs {teacher_nats:.3f} nats a token, the student {student_nats:.3f}")
    for row in heads[: asked.top]:
        print(f"  {row['site']} head {row['head']}: weight {row['teacher']:.3f}, the student's {row['student']:.4f}")
    print(f"  largest weight of any of the student's heads: {found['largest_of_the_student']:.4f}")
    if asked.restore:
        found["restored"] = restored(
            asked, teacher, student, by_teacher, softmax, read_tokens(asked.eval, loaded.tokenizer)
        )
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def restored(
    asked: argparse.Namespace,
    teacher: Program,
    student: Program,
    weights: list[Tensor],
    softmax: dict[str, tuple[Any, ...]],
    ids: Tensor,
) -> dict[str, Any]:
    """Perplexities with the KV heads restored in whose place the teacher's ``weights`` are largest."""
    sites: dict[str, Restored] = {}

    def wrap(path: str, branch: LinearMethod) -> nn.Module:
        sites[path] = Restored(branch, softmax[path])
        return sites[path]

    graph = instead(teacher, student, wrap)
    largest = [
        (float(weight), path, head)
        for (path, site), mine in zip(sites.items(), weights, strict=True)
        for head, weight in enumerate(mine.unflatten(0, (site.branch.shape.kv_heads, -1)).amax(1))
    ]
    largest.sort(reverse=True)
    found: dict[str, Any] = {"teacher": perplexity(unpadded(teacher), ids, asked.context, asked.limit)}
    for count in asked.restore:
        for path, site in sites.items():
            site.kv_heads = [head for _, of, head in largest[:count] if of == path]
        figures = perplexity(graph, ids, asked.context, asked.limit)
        ratio = figures["perplexity"] / found["teacher"]["perplexity"]
        chosen = [f"{path} {head}" for path, site in sites.items() for head in site.kv_heads]
        found[str(count)] = figures | {"ratio": ratio, "kv_heads": chosen}
        print(f"{count} of {len(largest)} KV heads softmax: {ratio:.3f} times the teacher's perplexity")
    return found


if __name__ == "__main__":
    try:
        main()
    except LincompileError as error:
        sys.exit(f"recall: {error}")
