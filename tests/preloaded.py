"""Python commands without the seconds of importing torch: one process has imported it, forks of it run the commands.

``preloaded(folder, …)`` gives an environment in which ``python``, ``lincompile`` and ``torchrun`` are clients of such a
process: they send it their arguments, folder, environment and standard files, and end as the fork that it makes of
itself ends. The fork runs what the interpreter would (``-c``, ``-m``, a script, which an entry point is, too); what it
can't take over it runs as a process of its own. Nothing of lincompile, and nothing optional, is imported beforehand:
a command that forgets an import fails here as it fails for a reader.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("python", "lincompile", "torchrun")
MODULES = (
    "click",
    "rich.progress",
    "rich.table",
    "safetensors.torch",
    "sympy.tensor.tensor",
    "torch._functorch.aot_autograd",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.export.pt2_archive",
)
# What a shell or torchrun changes in a command's environment. Any other variable may matter to an import.
HARMLESS = r"_|PWD|OLDPWD|SHLVL|(\w+_)?RANK|(\w+_)?WORLD_SIZE|ROLE_NAME|MASTER_\w+|TORCHELASTIC_\w+|TORCH_NCCL_\w+"


@contextmanager
def preloaded(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """``environment`` with the clients first on its PATH, and for the ranks that torchrun starts."""
    import subprocess

    commands = Path(sys.executable).parent
    for name in NAMES:
        client = folder / name
        script = "" if name == "python" else f"'{commands / name}'"
        client.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -IS '{__file__}' '{folder / 'socket'}' {script} \"$@\"\n"
        )
        client.chmod(0o755)
    environment = {
        **environment,
        "PATH": f"{folder}{os.pathsep}{environment['PATH']}",
        "PYTHON_EXEC": str(folder / "python"),
    }
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(16)  # before the imports: the first client waits for them
        number = listener.fileno()
        command = [sys.executable, __file__, str(number)]
        server = subprocess.Popen(command, env=environment, pass_fds=[number], start_new_session=True)
    try:
        yield environment
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with every command that is left
        server.wait()


def ask(address: str, arguments: list[str]) -> int:
    """The client: the exit code of ``python ARGUMENTS``."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"files"], [0, 1, 2])
        with server.makefile("rw") as stream:
            print(json.dumps(request), file=stream, flush=True)
            pid = int(stream.readline())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: os.kill(pid, number))
            code = int(stream.readline())
    if code < 0:  # ended by a signal: so does the client
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(listener: socket.socket) -> list[str]:
    """Forks for each client; returns its arguments, in the fork alone."""
    import atexit
    import gc
    import importlib

    atexit.register(_leave)  # first, so that it is called last
    own = dict(os.environ)
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every collection in a fork copies all memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that wait
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _command(client, own)
        client.close()


def _command(client: socket.socket, own: dict[str, str]) -> list[str]:
    """Forks once more and tells the client how that ends; the fork takes over all that the client is."""
    import re

    _, files, _, _ = socket.recv_fds(client, len(b"files"), 3)
    stream = client.makefile("rw")
    request = json.loads(stream.readline())
    command = os.fork()
    if command:
        for file in files:
            os.close(file)  # a reader of the command's output sees its end
        print(command, file=stream, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]), file=stream, flush=True)
        os._exit(0)
    stream.close()
    client.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    arguments, environment = request["arguments"], request["environment"]
    changed = {name for name, _ in own.items() ^ environment.items()}
    changed = {name for name in changed if environment.get(name) != os.environ.get(name)}  # by the imports
    known = bool(arguments) and (arguments[0] in ("-c", "-m", "-u") or not arguments[0].startswith("-"))
    if not known or not all(re.fullmatch(HARMLESS, name) for name in changed):
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    for name in changed:
        os.environ.pop(name, None)
        os.environ.update({name: environment[name]} if name in environment else {})
    return arguments


_code = 1  # until a command has run: a fork that never came to it isn't one that went well


def _leave() -> None:
    """Ends a fork after its exit handlers: taking torch apart, module by module, would copy all memory, too."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(_code)


def take_over(arguments: list[str]) -> None:
    """Runs ``python ARGUMENTS`` and keeps its exit code for ``_leave``."""
    global _code
    try:
        run(arguments)
        _code = 0
    except SystemExit as end:
        _code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def run(arguments: list[str]) -> None:
    """What ``python ARGUMENTS`` does once it is up."""
    import runpy
    from types import ModuleType

    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    kind, *rest = arguments
    safe = getattr(sys.flags, "safe_path", False)  # from Python 3.11 on
    if kind == "-m":
        sys.argv = rest
        sys.path[:0] = [] if safe else [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    main = sys.modules["__main__"] = ModuleType("__main__")
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[:0] = [] if safe else [""]
        source, name = rest[0], "<string>"
    else:
        sys.path[:0] = [] if safe else [str(Path(kind).resolve().parent)]
        source, name = Path(kind).read_text(encoding="utf-8"), kind
        main.__file__ = kind
    exec(compile(source, name, "exec"), main.__dict__)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].isdecimal():
        if not getattr(sys.flags, "safe_path", False):
            del sys.path[0]  # the tests' folder
        take_over(serve(socket.socket(fileno=int(sys.argv[1]))))
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
