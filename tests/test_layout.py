"""The repository's layout: four root folders, linked into one package, and nothing else installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("passes", "lowering", "kernels", "cli")


@pytest.mark.parametrize("part", PARTS)
def test_package_links_to_the_root_folder(part: str) -> None:
    link = ROOT / "lincompile" / part
    assert link.is_symlink()
    assert os.readlink(link) == f"../{part}", "the link must be relative, or a clone elsewhere breaks"
    assert (ROOT / part).is_dir()


@pytest.mark.parametrize("part", PARTS)
def test_root_folders_are_namespace_portions(part: str) -> None:
    assert not list((ROOT / part).rglob("__init__.py")), "an __init__.py would make a second top-level package"


def test_wheel_installs_only_lincompile(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-c", BUILD_WHEEL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if "No module named 'setuptools'" in built.stderr:
        pytest.skip("setuptools is not installed here; .ci/run builds the wheel in isolation")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lincompile"}
    for source in (*ROOT.glob("lincompile/*.py"), *(file for part in PARTS for file in (ROOT / part).rglob("*.py"))):
        relative = source.relative_to(ROOT).as_posix()
        installed = relative if relative.startswith("lincompile/") else f"lincompile/{relative}"
        assert installed in names, f"{installed} is missing from the wheel"
    assert "lincompile/py.typed" in names


# In a copy without build/ and egg-info of its own, so that an earlier build leaves nothing stale in the wheel.
BUILD_WHEEL = """
import shutil, sys, tempfile, pathlib, os
source, out = pathlib.Path.cwd(), sys.argv[1]
copy = pathlib.Path(tempfile.mkdtemp(dir=out))
skip = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "demo-out", ".*_cache")
shutil.copytree(source, copy / "src", symlinks=True, ignore=skip)
os.chdir(copy / "src")
from setuptools import build_meta
build_meta.build_wheel(out)
shutil.rmtree(copy)
"""


@pytest.mark.parametrize("module", ["lincompile", "lincompile.cli.main"])
def test_cold_import_is_light(module: str) -> None:
    script = (
        f"import sys, {module}\n"
        "heavy = {'triton', 'onnx', 'onnxscript', 'onnxruntime', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"import {module} pulled in {run.stderr.strip()}"


def test_passes_never_import_a_backend() -> None:
    """``kernels <- passes <- lowering <- cli``: no import points the other way, and passes know no backend."""
    allowed = {"kernels": (), "passes": ("kernels",), "lowering": ("kernels", "passes"), "cli": PARTS}
    for part, may in allowed.items():
        for file in (ROOT / part).rglob("*.py"):
            for target in imported_modules(file):
                head, _, rest = target.partition(".")
                if head == "lincompile" and rest.split(".")[0] in PARTS:
                    assert rest.split(".")[0] in (part, *may), f"{file.relative_to(ROOT)} imports {target}"
                if part == "passes":
                    assert head not in ("triton", "onnx", "onnxruntime", "onnxscript"), f"{file} imports {target}"


def imported_modules(file: Path) -> list[str]:
    """Absolute names of what a source file imports; relative imports are resolved against its place in lincompile."""
    import ast

    package = ["lincompile", *file.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{stem}.{alias.name}" for alias in node.names]
    return found


def test_the_map_of_folders_is_whole() -> None:
    """``docs/architecture.md`` names every folder of passes and lowering, and where to start reading in it."""
    rows = re.findall(r"^\| (`\S+/`.*?) \| .*? \| (`.*?`) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    mapped = {
        folder: re.findall(r"`(\S+)`", starts) for names, starts in rows for folder in re.findall(r"`(\S+)/`", names)
    }
    folders = {
        path.relative_to(ROOT).as_posix()
        for part in ("passes", "lowering")
        for path in (ROOT / part, *(ROOT / part).iterdir())
        if path.is_dir() and path.name != "__pycache__"
    }
    assert set(mapped) == folders | {"kernels", "cli"}
    for folder, starts in mapped.items():
        assert any((ROOT / folder / start).is_file() for start in starts), (folder, starts)
