"""Shows how the demo goes on: a progress bar where rich and a terminal are there, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from toque.chaos.verdicts import Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_EVERY_S = 2.0


@dataclass(frozen=True)
class Figures:
    """How far the census is."""

    done: int
    total: int
    per_second: float
    running: int
    pods: int

    def __str__(self) -> str:
        return f"{self.per_second:,.0f} files/s, {self.running} running, {self.pods} pods"


class Show(Protocol):
    """Where the demo tells what happens."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def progress(self, figures: Figures) -> None:
        """Called often; shows what has changed."""
        ...

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """The table of what held."""
        ...

    def close(self) -> None: ...


def make_show(console: Console | None) -> Show:
    """A rich one for a console on a terminal, a plain one otherwise."""
    if console is not None and console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # an extra

        columns = (TextColumn("census"), BarColumn(bar_width=None), MofNCompleteColumn(),
                   TextColumn("{task.fields[figures]}"), TimeElapsedColumn())
        return RichShow(console, Progress(*columns, console=console, transient=True, redirect_stderr=False))
    return PlainShow()


class PlainShow:
    """Lines on standard output, flushed at once."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._shown_at = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, figures: Figures) -> None:
        now = time.monotonic()
        if now - self._shown_at < PLAIN_EVERY_S and figures.done < figures.total:
            return
        self._shown_at = now
        self.say(f"[{now - self._begun:5.1f} s] {figures.done}/{figures.total} files done, {figures}")

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        width = max(len(verdict.promise) for verdict in verdicts)
        for verdict in verdicts:
            self.say(f"  {verdict.word:<8}  {verdict.id:<7}{verdict.promise:<{width}}  {verdict.checked:>7,} checked"
                     + (f", {verdict.note}" if verdict.note else ""))

    def close(self) -> None:
        sys.stdout.flush()


class RichShow:
    """A live bar at the bottom of a terminal, lines above it."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console = console
        self._bar = bar
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def progress(self, figures: Figures) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("census", total=figures.total, figures="")
        self._bar.update(self._task, completed=figures.done, figures=str(figures))
        if figures.done >= figures.total:
            self._bar.stop()

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "", "promise", "checked", "", box=None, padding=(0, 2, 0, 0))
        for verdict in verdicts:
            word = Text(verdict.word, "green" if verdict.holds else "bold red")
            table.add_row(word, verdict.id, Text(verdict.promise), f"{verdict.checked:,}", Text(verdict.note))
        self._console.print(table, highlight=False)

    def close(self) -> None:
        self._bar.stop()
