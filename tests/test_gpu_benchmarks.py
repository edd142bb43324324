"""Scripts that measure on a GPU, as far as a CPU can tell: what runs when, what tables say, and nothing made up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A benchmark by its file: a module called ``kernels`` may have come from elsewhere before."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def both(forward: float, backward: float, gib: float = 1.0) -> dict[str, float]:
    return {"forward_ms": forward, "forward_backward_ms": backward, "peak_gib": gib}


SHAPE = [16, 2048, 16, 128]
TIMES = {
    "command": "linear_attention.py --time",
    "versions": {"gpu": "NVIDIA H200"},
    "copy_gb_s": 4000.0,
    "times": [
        {
            "shape": SHAPE,
            "floor_ms": [0.2, 0.5],
            "ours": both(0.5, 2.0),
            "fla chunk_gla": both(1.5, 7.0, 3.0),
            "sdpa cudnn": {"ok": False, "error": "RuntimeError: no kernel"},
            "ours, 4 query heads per kv head": both(0.4, 1.6),
            "ours, heads repeated": both(1.0, 2.4),
        },
        {},
    ],
    "decode": [{"batch": 1, "floor_us": 1.0, "ours": {"us": 4.0, "eager_us": 30.0}}],
    "growth": [{"length": 2048, "floor_ms": [0.01, 0.03], "ours": both(0.05, 0.2)}],
}
BLOCK = {
    "command": "lawcat_block.py --time",
    "copy_gb_s": 4000.0,
    "times": [
        {
            "shape": SHAPE,
            "floor_ms": [0.2, 0.5],
            "ours": both(2.0, 8.0),
            "fla compiled": {**both(5.0, 30.0), "differs": 0.003},
            "fla compiled, hgrn": {**both(6.0, 24.0), "differs": 0.004},
            "fla": {**both(0.5, 0.6), "differs": 0.73},
            "fla compiled, no normaliser": both(1.0, 2.0),
        }
    ],
}


@pytest.fixture
def tables(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs ``kernels.py`` on runs, each a file; returns what it wrote."""

    def run(*runs: dict[str, Any]) -> dict[str, Any]:
        for number, content in enumerate(runs):
            (tmp_path / f"{number}.json").write_text(json.dumps(content))
        out = tmp_path / "out" / "kernels.json"
        command = ["kernels.py", str(tmp_path), "--json", str(out), "--plot", str(tmp_path / "out" / "kernels.svg")]
        monkeypatch.setattr(sys, "argv", command)
        assert script("kernels").main() == 0
        return json.loads(out.read_text())  # type: ignore[no-any-return]

    return run


def test_ratios_are_of_one_row(tables: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    result = tables(TIMES, BLOCK)
    first = result["gla"][0]
    assert first["shape"] == SHAPE and first["ours_ms"] == [0.5, 2.0]
    assert first["FLA chunk_gla"]["times_ours"] == [3.0, 3.5] and first["FLA chunk_gla"]["memory_times_ours"] == 3.0
    assert first["share_of_floor"] == [0.4, 0.25] and first["one_pass_mib"][0] == pytest.approx(0.2 * 4e9 / 2**20, 1e-3)
    assert result["gqa"][0]["times_grouped"] == [2.5, 1.5]
    best = result["block"][0]["best_of_fla"]
    # Forward by one variant, with the backward by the other; what leaves the normaliser out isn't among them, nor what
    # computed something else.
    assert best["ms"] == [5.0, 24.0] and best["times_ours"] == [2.5, 3.0] and best["variant"] == "fla compiled, hgrn"
    assert best["differs"] == 0.004
    assert result["decode"][0]["share_of_floor"] == 0.25
    assert result["growth"][0]["us_per_1k_tokens"] == [25.0, 100.0]
    printed = capsys.readouterr().out
    assert "| 16, 2048, 16, 128 | 0.5 / 2 | 3 / 3.5 |" in printed
    assert "Measured on: NVIDIA H200; without a GPU, so figures mean nothing: 1.json" in printed


def test_what_is_missing_is_said(tables: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = tables(TIMES)
    assert result["gla"][0]["cuDNN"]["times_ours"] == ["failed: RuntimeError: no kernel"] * 2
    assert result["gla"][0]["SDPA flash"]["times_ours"] == ["not measured"] * 2
    assert result["gla"][1]["ours_ms"] == ["not measured"] * 2 == result["gla"][1]["share_of_floor"]
    assert result["block"][0]["best_of_fla"]["variant"] == "not measured"
    assert result["decode"][0]["fla_us"] == result["decode"][1]["ours_us"] == "not measured"
    numbers = re.findall(r"\d", json.dumps(result["growth"][1:]).replace('"us_per_1k_tokens"', ""))
    assert "".join(numbers) == "819232768131072"  # the lengths, and nothing else
    drawing = ElementTree.parse(tmp_path / "out" / "kernels.svg").getroot()
    words = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    assert "lincompile" in words and "one pass over memory" in words and "FLA chunk_gla" not in words


def test_a_run_with_fewer_peers_replaces_nothing(tables: Callable[..., dict[str, Any]]) -> None:
    alone = {**TIMES, "times": [{"shape": SHAPE, "floor_ms": [0.2, 0.5], "ours": both(0.1, 0.1)}]}
    again = {**BLOCK, "times": [{**BLOCK["times"][0], "ours": both(4.0, 8.0)}]}  # type: ignore[index]
    result = tables({"runs": [TIMES, alone]}, BLOCK, again)
    assert result["gla"][0]["ours_ms"] == [0.5, 2.0]
    assert result["block"][0]["ours_ms"] == [4.0, 8.0]  # the later of two that have as much
    assert [source["used"] for source in result["sources"]][-1] == ["block"]


def test_a_folder_that_is_not_there_is_an_error(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "no-such-folder"])
    with pytest.raises(SystemExit) as ended:
        script("kernels").main()
    assert ended.value.code == 2


def test_whole_models_are_put_together(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(what: str, arm: str, batch: int, tokens: int, **more: Any) -> dict[str, Any]:
        return {"model": "m", "what": what, "arm": arm, "batch": batch, "tokens": tokens, **more}

    one = [row("prefill", "lincompile", 1, 8192, ms=2.0), row("decode", "lincompile", 1, 2048, ms=0.5)]
    two = [
        row("prefill", "hf", 1, 8192, ms=5.0),
        row("prefill", "hf", 1, 32768, error="OutOfMemoryError"),
        row("decode", "hf", 1, 2048, ms=1.0),
        row("decode", "hf", 1, 32768, ms=3.0),
    ]
    for name, rows in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "models": []}))
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    out, drawing = tmp_path / "all.json", tmp_path / "all.svg"
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--table", *files, "--json", str(out), "--plot", str(drawing)])
    module = script("end_to_end")
    assert module.main() == 1  # a row failed
    rows = json.loads(out.read_text())["rows"]
    assert [r.get("÷ lincompile") for r in rows] == [None, None, 2.5, None, 2.0, 6.0]
    lines = module.table(rows).splitlines()
    assert "| m | prefill | 1 | 32768 | not measured | not measured |" in lines
    assert "| m | decode | 1 | 32768 | 0.5 | 3 (6.00×) |" in lines  # a linear state is as large at any context
    assert ElementTree.parse(drawing).getroot().tag.endswith("svg")


def test_empty_and_single_points_are_drawn(script: Script, tmp_path: Path) -> None:
    plot = script("log_plot")
    panels = [plot.Panel("a & b", "x", "y"), plot.Panel("c", "x", "y", {"one": [(2048.0, 3.0)]})]
    plot.save(panels, tmp_path / "plot.svg")
    words = [element.text for element in ElementTree.parse(tmp_path / "plot.svg").iter()]
    assert {"a & b", "not measured", "one", "2K"} <= set(words)
    assert plot.ticks(0.5, 800.0) == [1.0, 10.0, 100.0] and plot.ticks(3.0, 30.0) == [5.0, 10.0, 20.0]


@pytest.fixture
def session(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """``gpu_session.py`` with scripts of this test's own."""
    module = script("gpu_session")
    (tmp_path / "good.py").write_text("import sys; open(sys.argv[-1], 'w').write('{}')")
    (tmp_path / "bad.py").write_text("raise ValueError('wrong')")
    (tmp_path / "slow.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_a_section_that_fails_or_hangs_costs_itself(session: ModuleType, tmp_path: Path) -> None:
    section = session.Section
    sections = [
        section("slow", "slow.py", [], 2.0),
        section("bad", "bad.py", [], 20.0, beside=True),
        section("good", "good.py", [], 20.0),
    ]
    ended = session.run(sections, 100.0, tmp_path, False)
    assert ended["slow"]["exit"] == "stopped: no time left" and ended["slow"]["last lines"] == ["begun"]
    assert ended["bad"]["exit"] == 1 and ended["good"]["exit"] == 0
    assert (tmp_path / "good.json").read_text() == "{}"
    assert json.loads((tmp_path / "session.json").read_text()) == ended
    left = session.run(sections[2:], 10.0, tmp_path, False)
    assert left["good"]["exit"] == "left out: no time left"


def test_sections_by_name_keep_beside_each_other(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, bool]] = []
    monkeypatch.setattr(session, "run", lambda sections, *_: ran.extend((s.name, s.beside) for s in sections) or {})
    command = ["gpu_session.py", "--part", "kernels", "--out", str(tmp_path), "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "warm_128,warm_64,times"])
    assert session.main() == 0 and ran == [("warm_128", False), ("warm_64", True), ("times", False)]
    monkeypatch.setattr(sys, "argv", [*command, "warm_129"])
    with pytest.raises(SystemExit):
        session.main()


def test_sections_give_arguments_that_their_scripts_take(script: Script) -> None:
    """Every option of every section is one that its script declares, and every section of the front is there."""
    module = script("gpu_session")
    sections = [section for part in module.PARTS.values() for section in part(4)]
    for section in sections:
        source = (BENCHMARKS / section.script).read_text()
        for option in [*section.arguments, *(section.dry or []), section.option]:
            if option.startswith("--"):
                assert f'"{option}"' in source, f"{section.script} has no {option}"
    assert set(script("kernels").SECTIONS.split(",")) <= {section.name for section in sections}


def test_every_way_of_an_output_head_is_timed_with_its_own_kernel(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton isn't installed")
    tiles = script("int6_tiles")
    timed: list[tuple[str, Any]] = []

    def narrow_us(site: Any, config: dict[str, Any]) -> float:
        assert site == (49152, 576, True, False, False)
        timed.append((tiles.way(config).__name__, config.get("WALKS")))
        return 1.0

    monkeypatch.setattr(tiles, "narrow_us", narrow_us)
    monkeypatch.setattr(tiles, "cublas_us", lambda *shape: 3.0)
    out = tmp_path / "tiles.json"
    monkeypatch.setattr(sys, "argv", ["int6_tiles.py", "--paths", "head", "--out", str(out)])
    assert tiles.main() == 0
    found = json.loads(out.read_text())["sweep"]
    assert len(found) == 2 + len(tiles.HEAD_TILES) + len(tiles.HEAD_VECTOR) and found["head vector 16/8/4"] == 1.0
    assert timed[0] == ("narrow", 4) and set(timed[1:]) == {
        ("vector", None),
        *(("narrow", n) for n in (None, 2, 3, 4, 6, 8)),
    }


def dry(*command: str) -> None:
    """A script on a CPU, by ``benchmarks/dry.py``."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "dry.py"), *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_arm_of_six_bit_models_in_a_dry_run(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    dry("int6_end_to_end.py", "--eager", "--tokens", "2", "--context", "5", "--out", str(file))
    models = json.loads(file.read_text())["models"]
    assert [model["shape"]["tied"] for model in models] == [False, True]
    for model in models:
        assert [arm["arm"] for arm in model["arms"]] == ["bf16", "w8a8", "int6 apart", "int6", "int6 embeddings"]
        assert all(arm["tokens_per_second"] > 0 for arm in model["arms"]), model["arms"]


def test_the_parts_of_six_bit_arms_are_those_of_the_others(script: Script) -> None:
    """What is inside of packed layers, attention and the chosen token."""
    torch = pytest.importorskip("torch")
    module = script("int6_end_to_end")
    logits = torch.randint(0, 9, (2, 3, 5 * 128)).bfloat16()  # with ties
    assert torch.equal(module.chosen(logits), logits.argmax(-1))
    planes = module.Table(torch.randn(96, 128)).planes
    x, norm = torch.randn(1, 1, 128, dtype=module.DTYPE), torch.rand(128, dtype=module.DTYPE)
    apart = torch.nn.functional.rms_norm(x, (128,), norm, module.EPSILON)
    want = torch.ops.lincompile.int6_linear(apart, *planes, None, 128, "a8")
    assert torch.equal(module.whole(planes, x, norm=norm), want)
    q, k, v = (torch.randn(1, heads, count, 32) for heads, count in ((4, 1), (2, 7), (2, 7)))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(module.attention(q, k, v), want)


def test_the_fastest_tiles_of_each_kernel_run_through_a_whole_model(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton isn't installed")
    tiles = script("int6_tiles")
    chains: list[list[tuple[int, int]]] = []

    def narrow_us(site: Any, config: dict[str, Any]) -> float:
        if config["BN"] == 16:
            raise RuntimeError("no room")
        return float(config["BN"] + config["num_warps"] + (100 if config["GLUON"] else 0))

    def chain_us(configs: list[dict[str, Any]]) -> float:
        chains.append([(config["BN"], config["num_warps"]) for config in configs])
        return 1.0

    monkeypatch.setattr(tiles, "narrow_us", narrow_us)
    monkeypatch.setattr(tiles, "chain_us", chain_us)
    monkeypatch.setattr(tiles, "cublas_us", lambda *shape: 3.0)
    today = [dict(tiles.rules.narrow_config(-(-width // 128), rows, True)) for rows, width, *_ in tiles.NARROW]
    out = tmp_path / "tiles.json"
    monkeypatch.setattr(sys, "argv", ["int6_tiles.py", "--paths", "narrow", "--out", str(out)])
    assert tiles.main() == 0
    found = json.loads(out.read_text())
    assert found["command"] == "int6_tiles.py --paths narrow" and "torch" in found["versions"]
    assert found["sweep"]["narrow 960x576 gluon 16/4"] == "RuntimeError: no room"
    assert found["sweep"]["cublas 576x1536"] == 3.0 and not any(name.startswith("large") for name in found["sweep"])
    assert chains == [[(tile["BN"], tile["num_warps"]) for tile in today], [(1, 1)] * 4, [(4, 4)] * 4]
    kept = [dict(tiles.rules.narrow_config(-(-width // 128), rows, True)) for rows, width, *_ in tiles.NARROW]
    assert kept == today, "the kernels' own tiles were changed"
    monkeypatch.setattr(sys, "argv", ["int6_tiles.py", "--paths", "narow"])
    with pytest.raises(SystemExit):
        tiles.main()


def test_rows_of_linear_attention_in_a_dry_run(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    dry("linear_attention.py", "--time", "--growth", "--peers", "fla,sdpa flash", "--json", str(file))
    result = json.loads(file.read_text())
    (row,) = result["times"]
    names = ["ours", "sdpa flash", "ours, 4 query heads per kv head", "ours, heads repeated", "ours normalised"]
    assert all(row[name]["forward_backward_ms"] > 0 for name in names), row
    assert [row["length"] for row in result["growth"]] == [64, 128]
    for entry in (row, *result["growth"]):  # FLA is measured, or says why not; it never takes another's row along
        assert "error" in entry["fla chunk_gla"] or "forward_ms" in entry["fla chunk_gla"]
        assert len(entry["floor_ms"]) == 2 and "sdpa flash" in entry


@pytest.mark.slow
def test_whole_models_in_a_dry_run(tmp_path: Path) -> None:
    """Through ``lincompile.compile`` and the session it gives, beside Hugging Face's model."""
    pytest.importorskip("transformers")
    file = tmp_path / "models.json"
    arms = ("lincompile", "hf", "softmax", "hybrid")
    dry(
        "end_to_end.py",
        "--eager",
        "--arms",
        ",".join(arms),
        "--json",
        str(file),
        "--plot",
        str(tmp_path / "models.svg"),
    )
    rows = json.loads(file.read_text())["rows"]
    points = {(row["arm"], row["what"]) for row in rows}
    both = {(arm, what) for arm in arms for what in ("prefill", "decode")}
    assert points == both | {("hf", "generate"), ("hybrid", "generate")}
    assert not [row for row in rows if "error" in row]
    states = {row["batch"]: row["state_gib"] for row in rows if row["arm"] == "lincompile" and "state_gib" in row}
    assert set(states) == {1, 2} and (tmp_path / "models.svg").exists()
