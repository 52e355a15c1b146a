"""What a run prints: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Reporter:
    """Prints lines, and on a terminal a bar for the epoch in progress.

    Args:
        console: where to; None prints nothing, as on all processes but the main one.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether a bar can be shown."""
        return self.console is not None and self.console.is_terminal

    def say(self, text: str) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def begin(self, title: str, steps: int, done: int) -> None:
        """Start the bar of an epoch."""
        if self.console is not None and self.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(title, total=steps, completed=done)

    def advance(self) -> None:
        """One step further."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
