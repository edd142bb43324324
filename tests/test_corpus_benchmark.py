"""``benchmarks/corpus.py``: packages as documents, nothing twice, and nothing of what is measured on."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LONG = "Rivers carry sediment from the mountains to the plains and leave it where they slow down, year after year. " * 3


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import corpus

    return corpus


@pytest.fixture
def spacing(corpus: Any) -> Any:
    import spacing

    return spacing


def numbered(topic: str, count: int = 20) -> str:
    """Paragraphs that repeat no run of words."""
    pool = "amber basin canyon delta estuary fjord glacier harbour island jungle".split()  # noqa: SIM905
    lines = []
    for i in range(count):
        order = [pool[(i * step + i // 10 + step) % 10] for step in range(1, 16)]
        lines.append(f"{topic} {chr(97 + i)}{chr(97 + i % 7)} tells of the " + f" {topic} and the ".join(order) + ".")
    return "\n\n".join(lines)


def test_a_source_becomes_documents_without_what_was_seen_or_is_excluded(
    corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "pypi-some"
    folder.mkdir(parents=True)
    module = f'"""{numbered("north")}"""\n\ndef f():\n    """{LONG}"""\n'
    leaked = numbered("south")
    with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/a.py", module)
        archive.writestr("some/b.py", module)
        archive.writestr("some/c.py", f'"""{leaked}"""')
        archive.writestr("some/tests/d.py", f'"""{numbered("west")}"""')
        archive.writestr("some/e.py", "x = (")
        archive.writestr("some/f.txt", numbered("east"))
    held = tmp_path / "held.jsonl"
    inside = " ".join(corpus.words(leaked)[100:120])
    held.write_text(json.dumps({"question": inside, "answer": 1}) + "\n")
    monkeypatch.setattr(corpus, "SOURCES", corpus.pypi("some", "MIT"))
    output = tmp_path / "out.jsonl"
    arguments = ["corpus.py", "-o", str(output), "--cache", str(tmp_path / "cache"), "--exclude", str(held)]
    monkeypatch.setattr(sys, "argv", arguments)
    corpus.main()
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["source"] == "some/some/a.py" and row["licence"] == "MIT"
    assert "north" in row["text"] and LONG.strip() in row["text"]
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    (source,) = manifest["sources"]
    assert source["package"] == "some-1.0-py3-none-any.whl" and source["documents"] == 1
    assert source["excluded"] == 1 and source["repeated_paragraphs"] == 21 and not source["error"]
    assert manifest["characters"] == len(row["text"]) and manifest["excluded_files"] == ["held.jsonl"]
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "none.txt")])
    (tmp_path / "none.txt").write_text("")
    corpus.main()
    assert len(output.read_text().splitlines()) == 2, "the third module was only kept out by the file"


def test_readers(corpus: Any) -> None:
    page = "<head><title>t</title></head><nav>menu</nav><h1>Title</h1><p>One &amp; two.</p><script>x()</script>"
    assert next(iter(corpus.read_html(page))).split() == ["Title", "One", "&", "two."]
    api = {"operations": {"A": {"documentation": f"<p>{LONG}</p>", "name": LONG}}, "version": "1"}
    assert next(iter(corpus.read_descriptions(json.dumps(api)))).strip() == LONG.strip()
    assert LONG in next(iter(corpus.read_strings(json.dumps([{"a": [LONG, "short", 3]}]))))
    assert list(corpus.read_entries("amber\n  a resin\nbasin\n  a bowl\n")) == ["amber a resin\n\nbasin a bowl "]
    assert corpus._unpacked("a.gz", gzip.compress(b"x")) == b"x" == corpus._unpacked("a.txt", b"x")


def test_a_package_that_cannot_be_had_is_said(corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        return type("Done", (), {"stderr": "ERROR: no such package\n", "stdout": "", "returncode": 1})

    monkeypatch.setattr(corpus.subprocess, "run", refused)
    (source,) = corpus.pypi("some", "MIT")
    kept = corpus.collect(source, tmp_path, corpus.Filter(set()), 1000)
    assert kept.error == "RuntimeError: ERROR: no such package" and not kept.documents


EXPORT = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="en">
<page><title>River</title><ns>0</ns><revision><text>{{Infobox|length=1}}
A '''river''' ({{IPA|x}}) is a [[stream]]<ref>A book, p. 3</ref> of ''water''.<ref name="a/b" />
[[File:Rhine.jpg|thumb|The [[Rhine]] in spring]]
== Course ==
It begins at a [[Spring (hydrology)|spring]] .<ref>Another, p. 4</ref>
=== Notes ===
It ends in the sea.

==References==
&lt;references/&gt;
[[Category:Water]]</text></revision></page>
<page><title>Stream</title><ns>0</ns><redirect title="River" />
<revision><text>#REDIRECT [[River]]</text></revision></page>
<page><title>Talk:River</title><ns>1</ns><revision><text>Is it long?</text></revision></page>
</mediawiki>"""


NOTES = ["=== Notes ===", "It ends in the sea."]  # a section of the text, not what stands after it


def test_articles_come_without_markup_references_and_redirects(corpus: Any) -> None:
    text = EXPORT.replace("<ref>", "&lt;ref&gt;").replace("</ref>", "&lt;/ref&gt;")
    (article,) = corpus.read_wiki(text.replace('<ref name="a/b" />', '&lt;ref name="a/b" /&gt;'))
    lines = [line.strip() for line in article.splitlines() if line.strip()]
    assert lines == ["= River =", "A river is a stream of water.", "== Course ==", "It begins at a spring.", *NOTES]


def test_spacing_sets_tokens_apart_and_undo_joins_them(spacing: Any) -> None:
    moses, back = spacing.MosesTokenizer(lang="en"), spacing.MosesDetokenizer(lang="en")
    text = '= River =\n\nThe river hadn\'t, in 1,000 half-hearted\ntries, found "the sea" (3.5 km).\n\n'
    text += "== Bob's car, the film ==\n"
    apart = spacing.spaced(text, moses)
    assert apart == (
        " = River = \n\n"
        ' The river hadn \'t , in 1 @,@ 000 half @-@ hearted tries , found " the sea " ( 3 @.@ 5 km ) . \n\n'
        " = = Bob 's car , the film = = \n"
    )
    assert spacing.joined(apart, back).split() == text.split()


def test_spacing_takes_a_share_of_what_the_sources_name(
    spacing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"Well, {i}.", "source": f"{kind}/{i}", "licence": "MIT"} for kind in "ab" for i in range(40)]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def written(*options: str) -> list[dict[str, str]]:
        output = tmp_path / "out.jsonl"
        monkeypatch.setattr(sys, "argv", ["spacing.py", str(given), "-o", str(output), *options])
        spacing.main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    half = written("--share", "0.5", "--sources", "^a/")
    assert 10 < len(half) < 30 and all(row["source"].startswith("a/") for row in half)
    assert half[0]["text"].startswith(" Well , ") and half == written("--share", "0.5", "--sources", "^a/")
    for options in (("--share", "0"), ("--sources", "nothing")):
        with pytest.raises(SystemExit):
            written(*options)
    assert "none was chosen" in capsys.readouterr().err
