"""Cuts attention sites apart by KV heads, so that some heads of a layer can stay softmax while the others don't.

Heads of one attention don't see each other: softmax over all of them is softmax over some and softmax over the rest,
side by side. A handful of a model's heads look things up in a long text (induction heads, arXiv 2209.11895; retrieval
heads, arXiv 2404.15574), and only their keys and values have to be kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch.fx import Node

from ..kernels import ops as _ops  # noqa: F401  (registers torch.ops.lincompile)
from .errors import LincompileError, RefusedError
from .graph import Builder, aten, finish
from .pipeline import PassResult, register
from .program import AttentionSite, Program

_PART = re.compile(r"(?P<path>.*)\.kv(?P<first>\d+)(?:_(?P<last>\d+))?")


@register("split-heads")
@dataclass(frozen=True)
class SplitHeads:
    """Makes proved sites several sites: one for each run of neighbouring KV heads that are named, or that aren't.

    A part's path is the site's with the KV heads after it (``….self_attn.kv0_1``, ``….self_attn.kv2``); its
    ``details["part"]`` says of which site, which KV heads, and whether they were named.

    Args:
        heads: (site, KV head), both from 0; sites as in ``LinearizeAttention(keep=…)``.

    Raises (when run):
        RefusedError: there is no such site or KV head, or the site isn't proved softmax or carries ALiBi.
    """

    heads: tuple[tuple[int, int], ...] = ()
    name: str = field(default="split-heads", init=False, metadata={"text": False})

    def run(self, program: Program) -> PassResult:
        named: dict[int, set[int]] = {}
        for index, head in self.heads:
            self._check(program, index, head)
            named.setdefault(index, set()).add(head)
        sites: list[AttentionSite] = []
        for index, site in enumerate(program.sites):
            sites += split(program, site, named[index]) if index in named else [site]
        parts = len(sites) - len(program.sites) + len(named)
        program.sites = sites
        finish(program.graph_module)
        return PassResult(program, bool(named), {"sites": len(named), "parts": parts})

    def _check(self, program: Program, index: int, head: int) -> None:
        number = len(program.sites)
        what = f"--keep-softmax {head_name(index, head)}"
        if not 0 <= index < number:
            raise RefusedError(f"{what}: the model has {number} attention sites (0 to {number - 1})")
        site = program.sites[index]
        if site.node is None or site.method != "softmax":
            raise RefusedError(f"{what}: '{site.path}' isn't proved softmax attention: {site.reason}")
        if site.bias == "alibi":
            raise RefusedError(f"{what}: '{site.path}' has ALiBi, whose heads aren't split: keep the whole site")
        assert site.kv_heads is not None
        if not 0 <= head < site.kv_heads:
            raise RefusedError(f"{what}: '{site.path}' has {site.kv_heads} KV heads (0 to {site.kv_heads - 1})")


def split(program: Program, site: AttentionSite, named: Iterable[int]) -> list[AttentionSite]:
    """Replaces a site's op by one for each run of KV heads; the sites they make, in order."""
    node = site.node
    assert node is not None and site.heads and site.kv_heads
    chosen = set(named)
    groups = site.heads // site.kv_heads
    make = Builder(program.graph_module, node)
    parts: list[AttentionSite] = []
    for softmax, run in groupby(range(site.kv_heads), key=chosen.__contains__):
        heads = list(run)
        first, end = heads[0], heads[-1] + 1
        part = copy.copy(site)
        part.path = f"{site.path}.kv{first}" + (f"_{end - 1}" if end - first > 1 else "")
        part.heads, part.kv_heads = (end - first) * groups, end - first
        part.details = site.details | {"part": {"of": site.path, "kv_heads": heads, "softmax": softmax}}
        q, k, v, *rest = node.args
        ranges = ((q, first * groups, end * groups), (k, first, end), (v, first, end))
        operands = [make(aten.slice.Tensor, operand, 1, begin, stop) for operand, begin, stop in ranges]
        part.node = make(torch.ops.lincompile.softmax_attention.default, *operands, *rest)
        parts.append(part)
    node.replace_all_uses_with(make(aten.cat.default, [part.node for part in parts], 1))
    program.graph_module.graph.erase_node(node)
    return parts


def whole(site: AttentionSite, operand: Node) -> tuple[Node, tuple[int, int] | None]:
    """An operand of a site's op before ``SplitHeads`` cut it, and which of its heads the site has (None: all)."""
    if "part" not in site.details:
        return operand, None
    source, _, first, end = operand.args
    assert isinstance(source, Node) and isinstance(first, int) and isinstance(end, int)
    return source, (first, end)


def named_parts(program: Program) -> tuple[int, ...]:
    """The sites that were split off by name."""
    return tuple(i for i, site in enumerate(program.sites) if site.details.get("part", {}).get("softmax", False))


def parse_heads(text: str | None) -> tuple[tuple[int, int], ...]:
    """The KV heads of ``--keep-softmax 17.1,18.2``: (site, KV head); none where the text names whole sites or a count.

    Raises:
        LincompileError: neither heads throughout nor none.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not any("." in part for part in parts):
        return ()
    try:
        pairs = [tuple(map(int, part.split("."))) for part in parts]
        return tuple((index, head) for index, head in pairs)
    except ValueError:
        raise LincompileError(
            f"--keep-softmax {text}: KV heads are written SITE.HEAD (17.1,18.2), and not beside whole sites"
        ) from None


def parse_head_count(text: str | None) -> int:
    """N of ``--keep-softmax heads:N``: KV heads to be chosen (``ChooseHeads``); 0 where the text names heads or sites.

    Raises:
        LincompileError: N isn't a whole number from 1.
    """
    if text is None or not text.startswith("heads:"):
        return 0
    number = text.removeprefix("heads:")
    if not number.isdecimal() or int(number) < 1:
        raise LincompileError(f"--keep-softmax {text}: write how many KV heads to keep, from 1 (heads:4)")
    return int(number)


def head_name(index: int, head: int) -> str:
    """A KV head of a site as ``parse_heads`` reads it."""
    return f"{index}.{head}"


def heads_text(paths: Sequence[str], kept: Sequence[bool]) -> str | None:
    """What ``parse_heads`` reads, for sites of which some are parts; None where none is."""
    found: list[str] = []
    index, before = -1, ""
    split_any = False
    for path, softmax in zip(paths, kept, strict=True):
        match = _PART.fullmatch(path)
        of = match["path"] if match else path
        index, before = index + (match is None or of != before), of
        if match:
            split_any = True
            first, last = int(match["first"]), int(match["last"] or match["first"])
            found += [head_name(index, head) for head in range(first, last + 1)] if softmax else []
    return ",".join(found) if split_any else None
