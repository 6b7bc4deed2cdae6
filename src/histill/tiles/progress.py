"""How far a command has come: slides, tiles, rate and the time that is left."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from histill.tiles.slide_folder import SlideRecord

__all__ = ["TilingProgress"]


class TilingProgress:
    """A bar on a terminal, a line a slide elsewhere. Safe to tell from many threads."""

    def __init__(self, console: Console, slides: int, task: str = "tiling") -> None:
        self._console, self._slides = console, slides
        self._mutex, self._began = threading.Lock(), time.monotonic()
        self._finished = self._opened = self._found = self._done = 0
        columns = ("{task.description}", "{task.fields[rate]}", "{task.fields[eta]}")
        self._bar = Progress(
            TextColumn(columns[0]),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("slides"),
            TimeElapsedColumn(),
            TextColumn(columns[1]),
            TextColumn(columns[2]),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(task, total=slides, rate="", eta="")

    def __enter__(self) -> TilingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tell(self, found: int, done: int) -> None:
        """Further tiles were found, or done."""
        with self._mutex:
            self._found += found
            self._done += done
            self._opened += found > 0
            rate = self._done / max(time.monotonic() - self._began, 1e-6)
            # Slides that nobody has opened yet are taken to be like those that were.
            unopened = max(0, self._slides - max(self._opened, self._finished))
            left = self._found - self._done + unopened * self._found / max(self._opened, 1)
            eta = f"ETA {left / rate / 60:.0f} min" if rate > 0 else ""
            self._bar.update(self._task, rate=f"{self._done} tiles, {rate:.0f}/s", eta=eta)

    def slide(self, record: SlideRecord) -> None:
        """One slide is finished."""
        with self._mutex:
            self._finished += 1
            self._bar.update(self._task, completed=self._finished)
            if record.status == "failed":
                first_line = (record.error or "").splitlines()[0]
                self._console.print(
                    f"[bold red]failed[/] {escape(record.slide)}: {escape(first_line)}", highlight=False
                )
            elif not self._console.is_terminal or record.unreadable:
                left_out = record.white + record.black + record.blur + record.pen
                self._console.print(
                    f"{self._finished}/{self._slides} {record.slide}: {record.tiles} tiles of {record.grid_tiles}, "
                    f"{left_out} left out by filters, {record.unreadable} unreadable, {record.seconds:.1f} s",
                    highlight=False,
                    markup=False,
                )
