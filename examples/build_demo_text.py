"""Builds the demo's text (``cli/data``) from two public-domain files of the Canterbury compression corpus.

    pip download --no-deps --no-binary :all: brotli==1.2.1
    tar xzf brotli-1.2.1.tar.gz
    python examples/build_demo_text.py brotli-1.2.1/tests/testdata cli/data

Removed: the lines that Project Gutenberg added, tables of contents, and the proceedings' appendices (programme,
speakers' own abstracts, directory of participants). Hard line breaks inside paragraphs become spaces, as in the text
that language models are trained on. The last part of the proceedings is the held-out text: nothing of it is in the
training text. (The last part of the novel is in neither: the shipped adapter was trained on it.)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def paragraphs(text: str) -> list[str]:
    """Paragraphs with their line breaks taken out; rules and page furniture dropped."""
    found = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [line.strip() for line in block.split("\n")]
        joined = re.sub(r"\s+", " ", " ".join(lines)).strip()
        joined = re.sub(r"(\w)- (\w)", r"\1-\2", joined)  # a hyphen at a line's end
        if joined and not re.fullmatch(r"[*\-=+ ]+", joined):
            found.append(joined)
    return found


def between(text: str, start: str, end: str) -> str:
    """The text from the first line that is ``start`` up to the last line that is ``end``."""
    first = re.search(rf"^\s*{re.escape(start)}\s*$", text, re.MULTILINE)
    last = list(re.finditer(rf"^\s*{re.escape(end)}\s*$", text, re.MULTILINE))[-1]
    assert first is not None
    return text[first.end() : last.start()]


def split_at(items: list[str], share: float) -> tuple[list[str], list[str]]:
    """The first ``share`` of the characters, and the rest."""
    total, count = sum(map(len, items)), 0
    for index, item in enumerate(items):
        count += len(item)
        if count >= share * total:
            return items[: index + 1], items[index + 1 :]
    return items, []


def main(source: Path, target: Path) -> None:
    """Writes ``demo-train.txt`` and ``demo-heldout.txt``."""
    alice = (source / "alice29.txt").read_text(encoding="ascii").replace("\r\n", "\n")
    workshop = (source / "lcet10.txt").read_text(encoding="ascii").replace("\r\n", "\n")
    books = [
        paragraphs(between(workshop, "INTRODUCTION", "Appendix I:  PROGRAM")),
        paragraphs(between(alice, "CHAPTER I", "THE END")),
    ]
    parts = [split_at(book, 0.88) for book in books]
    target.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("demo-train.txt", [part[0] for part in parts]), ("demo-heldout.txt", [parts[0][1]])):
        text = "\n\n".join("\n\n".join(part) for part in chosen) + "\n"
        (target / name).write_text(text, encoding="ascii")
        print(f"{name}: {len(text):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
