"""``lincompile inspect``: tree, explanation and diff, for people and as JSON, and what it says to bad input."""

from __future__ import annotations

import re

import pytest

from lincompile.cli.inspect import ranges

from .conftest import Run


def test_the_tree_follows_module_paths_and_folds_layers_that_are_alike(cli: Run) -> None:
    result = cli("inspect", "small_model:build", "--tree")
    assert result.code == 0, result.err
    assert "└── blocks" in result.out and "0 … 1 (2 alike) causal 2/2 × 16 rewrite" in result.out
    tree = cli("inspect", "small_model:build", "--tree", "--json").json["tree"]
    assert tree["blocks"]["1"]["verdict"] == "rewrite" and tree["blocks"]["0"]["kind"] == "causal"


def test_kv_heads_that_look_back_are_shown(cli: Run) -> None:
    result = cli("inspect", "small_model:build", "--passes", "choose-heads{count=1}")
    assert result.code == 0, result.err
    assert re.search(r"--keep-softmax heads:1 keeps (\d)\.(\d) \(weight .*hardly looks back", result.err)
    assert re.search(r"blocks\.\d\.kv\d", result.out)


def test_explain_shows_form_findings_and_slice(cli: Run) -> None:
    result = cli("inspect", "small_model:build", "--explain", "1")
    assert result.code == 0, result.err
    assert "softmax_attention(q = transpose_4 [B, 2, T, 16]" in result.out
    assert "o = softmax(0.25·q·kᵀ over j ≤ i) · v" in result.out
    assert "■ ■ ■ · · · · · · · · ·" in result.out
    assert "small_model.py:20" in result.out and "aten.scaled_dot_product_attention(" in result.out
    document = cli("inspect", "small_model:build", "--explain", "blocks.1", "--json").json["explanation"]
    assert document["site"]["path"] == "blocks.1" and document["findings"]["kind"] == "causal"
    assert document["mask"][0] == "■ · · · · · · · · · · ·" and len(document["mask"]) == 12
    assert any("scaled_dot_product_attention(q, k, v" in line["code"] for line in document["slice"])


def test_explain_a_refused_site(cli: Run) -> None:
    result = cli("inspect", "small_model:backwards", "--explain", "0")
    assert result.code == 0, result.err
    assert "refuse: the mask is anticausal" in result.out
    assert "none: the site stays as it is" in result.out
    assert "· · · · · · · · · · · ■" in result.out


def test_neighbouring_sites_are_named_as_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == ""


def test_the_table_says_what_a_site_became(cli: Run) -> None:
    shown = cli("inspect", "small_model:build", "--passes", "linearize{attn=gla,keep=1}").out
    assert (
        re.search(r"blocks\.0  causal  2/2 × 16  rewrite as gla +\d", shown)
        and "keep  1  kept softmax on request" in shown
    )
    assert (
        cli("inspect", "small_model:build", "--passes", "linearize{attn=gla,keep=0}", "--tree").out.count("as gla") == 1
    )


def test_what_isnt_known_about_a_refused_site_isnt_said(cli: Run) -> None:
    result = cli("inspect", "small_model:learned", "-v")
    assert result.code == 0, result.err
    reason = r"refuse  0-1  the parameter 'blocks\.[01]\.bias' changes the scores \(a learned bias or scale\)"
    assert re.search(reason, result.out) and result.out.count("changes the scores") == 1, result.out
    assert result.out.count("2/2 × 16") == 2 and result.out.count("small_model.py:") == 1
    record = cli("inspect", "small_model:learned", "--json").json["sites"][0]
    assert (record["heads"], record["kv_heads"], record["head_dim"]) == (2, 2, 16)
    assert (record["kind"], record["scale"], record["bias"]) == ("learned", None, "unknown")
    explained = cli("inspect", "small_model:learned", "--explain", "1").out
    assert "kind     learned: nothing else could be found out" in explained and "scale " not in explained


def test_diff_lists_what_the_passes_changed(cli: Run) -> None:
    lines = cli("inspect", "small_model:build", "--diff", "--json").json["diff"]
    removed = [line for line in lines if line.startswith("-") and "aten.scaled_dot_product_attention" in line]
    added = [line for line in lines if line.startswith("+") and "lincompile.softmax_attention" in line]
    assert len(removed) == len(added) == 2
    shown = cli("inspect", "small_model:build", "--diff", "--passes", "linearize{attn=gla,keep=0}")
    assert "lincompile.linear_attention(" in shown.out and "lincompile.softmax_attention(" in shown.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--explain", "7"), 1, "no attention site 7: the model has 2"),
        (("--explain", "blocks.9"), 1, "no attention site 'blocks.9'; the sites are: blocks.0, blocks.1"),
        (("--passes", "linearise"), 2, "unknown pass 'linearise'"),
    ],
)
def test_bad_input(cli: Run, arguments: tuple[str, str], code: int, message: str) -> None:
    result = cli("inspect", "small_model:build", *arguments)
    assert result.code == code and message in result.error
