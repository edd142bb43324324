"""Writes a share of a corpus's documents as machine translation's corpora are written, every token between spaces.

    python benchmarks/spacing.py corpus.parquet -o spaced.parquet --share 0.4 --sources 'openstax|classic-books'
    python benchmarks/spacing.py wikitext2-test.txt -o joined.txt --undo     # such text with ordinary spacing

``He hadn't, in 1,000 half-hearted tries.`` becomes ``He hadn 't , in 1 @,@ 000 half @-@ hearted tries .``, a paragraph
a line: Moses' tokenizer (sacremoses, MIT; ``pip install sacremoses``) does it. Much published text, and most text that
language models are compared on, comes so. A teacher that was trained on the web reads it well; a student that has only
been shown ordinary spacing copies its teacher less well there. Documents are chosen by the seed, among those whose
source matches ``--sources``; their licences stay theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import write_rows
from sacremoses import MosesDetokenizer, MosesTokenizer

HEADING = re.compile(r"^(=+) (.*) \1$")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a .parquet or .jsonl file, each with ``text``."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def spaced(text: str, moses: MosesTokenizer) -> str:
    """The text with its tokens apart; paragraphs, which blank lines part, on a line each."""

    def lines() -> Iterator[str]:
        for paragraph in re.split(r"\n\s*\n", text):
            flat = " ".join(paragraph.split())
            if not flat:
                continue
            if heading := HEADING.match(flat):
                marks = " ".join(heading[1])
                yield f" {marks} {apart(heading[2], moses)} {marks} \n"
            else:
                yield f" {apart(flat, moses)} \n"

    return "\n".join(lines())


def apart(text: str, moses: MosesTokenizer) -> str:
    """Tokens of one paragraph with single spaces between; what was joined without one is marked by ``@``."""
    found = str(moses.tokenize(text, aggressive_dash_splits=True, escape=False, return_str=True))
    return re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", found)


def joined(text: str, moses: MosesDetokenizer) -> str:
    """Such text with ordinary spacing."""

    def line(tokens: str) -> str:
        tokens = re.sub(r" @([-,.])@ ", r"\1", tokens)
        tokens = re.sub(r'" ([^"]*) "', r'"\1"', tokens)
        if marked := re.fullmatch(r"\s*((?:= )+)(.*?)((?: =)+)\s*", tokens):
            marks = marked[1].replace(" ", "")
            return f"{marks} {line(marked[2])} {marks}"
        return str(moses.detokenize(re.sub(r" (['’]\w)", r"\1", tokens).split()))

    return re.sub(r"\n{3,}", "\n\n", "\n".join(map(line, text.split("\n"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="+", help=".parquet (needs pyarrow) or .jsonl, as corpus.py's")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".parquet or .jsonl")
    parser.add_argument("--share", type=float, default=0.4, help="of the documents (default 0.4)")
    parser.add_argument("--sources", default="", help="a regular expression that a document's source matches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undo", action="store_true", help="write one text file's with ordinary spacing instead")
    asked = parser.parse_args()
    if asked.undo:
        if len(asked.corpus) != 1:
            parser.error("--undo takes one text file")
        text = asked.corpus[0].read_text(encoding="utf-8")
        asked.output.write_text(joined(text, MosesDetokenizer(lang="en")), encoding="utf-8")
        return
    if not 0 < asked.share <= 1:
        parser.error("--share is above 0 and at most 1")
    draw, moses = random.Random(asked.seed), MosesTokenizer(lang="en")
    rows = [row for path in asked.corpus for row in rows_of(path) if re.search(asked.sources, row.get("source", ""))]
    chosen = [row | {"text": spaced(row["text"], moses)} for row in rows if draw.random() < asked.share]
    if not chosen:
        parser.error(f"of {len(rows):,} documents that match --sources none was chosen")
    write_rows(asked.output, chosen)
    print(f"{len(chosen):,} of {len(rows):,} documents, {sum(len(row['text']) for row in chosen):,} characters")


if __name__ == "__main__":
    main()
