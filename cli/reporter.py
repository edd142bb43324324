"""The compiler's stages as progress bars on stderr (as plain lines where stderr isn't a terminal)."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..lowering.options import Reporter
from .common import note, stderr

LINE_EVERY = 10.0  # seconds between progress lines without a terminal


class BarReporter(Reporter):
    """Use as a context manager; each stage is a line with its time, the running one has a bar."""

    def __init__(self) -> None:
        self.console = stderr()
        self.bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[text]}[/]"),
            console=self.console,
        )
        self._task: TaskID | None = None
        self._said = self._began = 0.0
        self._stage = ""

    def __enter__(self) -> BarReporter:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if kind is None:
            self._finish()
        self.bars.stop()

    def stage(self, text: str) -> None:
        """A new stage begins; the one before it is done."""
        self._finish()
        self._stage, self._said = text, time.monotonic()
        self._began = self._said
        if self.console.is_terminal:
            self._task = self.bars.add_task(text, total=None, text="")
        else:
            self.console.print(f"{text} …")

    def advance(self, done: int, total: int, text: str) -> None:
        """The current stage got to ``done`` of ``total``."""
        if self._task is not None:
            self.bars.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            left = (self._said - self._began) * (total - done) / max(done, 1)
            clock = f"{int(left) // 60}:{int(left) % 60:02d} left"
            self.console.print(f"{self._stage}: {done} of {total}, {text}, {clock}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A remark the user should see."""
        note(text)

    def _finish(self) -> None:
        if self._task is not None:
            task = next(task for task in self.bars.tasks if task.id == self._task)
            self.bars.update(self._task, total=task.total or 1, completed=task.total or 1)
            self._task = None
