"""The documentation's commands and code, run as a reader would run them.

A page is one session: its ```sh and ```python blocks run in order in one folder, which holds ``examples/nano.py`` and a
``text.txt``. A block that starts with ``# exit code N`` must exit with N; one that starts with ``# file: NAME`` is also
written to that file. Blocks take seconds each and need ``--run-docs`` (continuous integration gives it).

README.md's commands are processes of their own; those of the other pages are forks of one that has imported torch
(``preloaded.py``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from preloaded import preloaded

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "docs/getting_started.md",
    "docs/cli.md",
    "docs/evaluation.md",
    "docs/kernels.md",
    "docs/pytorch.md",
    "docs/transformers.md",
    "docs/writing_a_pass.md",
    "docs/sequence_parallel.md",
]
# Pages whose code a test of their own runs.
ELSEWHERE = {
    "docs/onnx.md": "tests/lowering/test_onnx_export.py",
    "docs/quantization.md": "tests/passes/test_quantize_docs.py",
}
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Environment = dict[str, str]


def plain() -> Environment:
    """What a reader's shell has: the installed commands on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def forking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment whose Python commands start preloaded, where forks are safe."""
    if not request.config.getoption("--run-docs"):
        pytest.skip("minutes of commands: give --run-docs")
    if sys.platform == "linux":
        with preloaded(tmp_path_factory.mktemp("bin"), plain()) as environment:
            yield environment
    else:
        yield plain()


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, source) of a page's fenced blocks, in order."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def test_every_page_with_code_is_run() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} | {"README.md"}
    with_code = {page for page in pages if blocks(page)}
    assert with_code <= {*PAGES, *ELSEWHERE}, "a page with code that no test runs"
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.timeout(1200)
def test_page_runs(page: str, tmp_path: Path, forking: Environment) -> None:
    shutil.copy(ROOT / "examples" / "nano.py", tmp_path)
    held_out = (ROOT / "cli" / "data" / "demo-heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(held_out[:20_000], encoding="utf-8")
    environment = plain() if page == "README.md" else forking
    for number, (language, source) in enumerate(blocks(page), 1):
        expected = int(match[1]) if (match := re.match(r"# exit code (\d+)\n", source)) else 0
        if named := re.match(r"# file: (\w+\.py)\n", source):
            (tmp_path / named[1]).write_text(source, encoding="utf-8")
        command = ["bash", "-euc", source] if language == "sh" else ["python", "-c", source]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1000)
        assert done.returncode == expected, f"{page}, block {number}:\n{source}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "script",
    [
        "import os, sys; print(sys.argv, sys.path, __name__, os.getcwd(), os.environ.get('MORE')); sys.exit(3)",
        "import sys; print(sys.stdin.read()); print('to stderr', file=sys.stderr)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit, sys; atexit.register(print, 'at the end'); sys.exit('a message')",
    ],
)
@pytest.mark.parametrize("how", ["-c", "-u -c", "-m", "script", "-B -c", "MORE"])
def test_preloaded_commands_are_as_others(forking: Environment, tmp_path: Path, script: str, how: str) -> None:
    (tmp_path / "a.py").write_text(script, encoding="utf-8")
    target = [*how.replace("MORE", "-c").split(), script, "one", "two words"]
    target = {"-m": ["-m", "ast", "a.py"], "script": ["a.py", "one"]}.get(how, target)
    more = {"PYTHONPATH": str(tmp_path), "MORE": "more"} if how == "MORE" else {}

    def done(environment: Environment) -> tuple[int, str, str]:
        settings = {**environment, **more}
        found = subprocess.run(
            ["python", *target], cwd=tmp_path, env=settings, input="from stdin", capture_output=True, text=True
        )
        return found.returncode, found.stdout, found.stderr

    assert done(forking) == done(plain())


def test_a_preloaded_command_that_never_ran_has_failed(forking: Environment, tmp_path: Path) -> None:
    """A fork that couldn't take over what its client is ended with 0, and the documentation's test saw no failure."""
    if forking == plain():
        pytest.skip("no forks here")
    (tmp_path / "client.py").write_text(
        "import os, sys\nsys.path.insert(0, sys.argv[1])\nimport preloaded\nos.getcwd = lambda: '/no/such/folder'\n"
        "sys.exit(preloaded.ask(sys.argv[2], ['-c', 'print(1)']))\n",
        encoding="utf-8",
    )
    address = Path(forking["PYTHON_EXEC"]).parent / "socket"
    command = [sys.executable, str(tmp_path / "client.py"), str(Path(__file__).parent), str(address)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and "/no/such/folder" in done.stderr
