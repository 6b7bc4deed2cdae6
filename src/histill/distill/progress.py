"""What a person sees while a run goes on: a bar with rate, ETA and shares, or a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Stopwatch", "TrainingProgress"]

_LOG_SECONDS = 30.0


class Stopwatch:
    """Where the time goes: seconds by name, in all (``seconds``) and in the last step (``step_seconds``)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.step_seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin a step: what passed since the last mark belongs to nobody."""
        self.step_seconds = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """Book the time since the last mark under ``name``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        for seconds in (self.seconds, self.step_seconds):
            seconds[name] = seconds.get(name, 0.0) + now - self._last
        self._last = now

    def shares(self) -> dict[str, float]:
        """Share of each name in the booked time."""
        total = sum(self.seconds.values()) or 1.0
        return {name: seconds / total for name, seconds in self.seconds.items()}


class TrainingProgress:
    """A rich progress bar on a terminal; elsewhere a plain line every half minute."""

    def __init__(self, console: Console, first_step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._first_step, self._started = first_step, time.monotonic()
        self._logged = self._started
        self._tiles = 0
        self._bar = Progress(
            TextColumn("[bold]distilling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[shares]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=steps, completed=first_step, rate="", shares="")

    def __enter__(self) -> TrainingProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, value, trace)

    def update(self, step: int, losses: dict[str, float], tiles: int, watch: Stopwatch) -> None:
        """Show that ``step`` is done; ``losses`` by student."""
        self._tiles += tiles
        now = time.monotonic()
        tiles_per_s = self._tiles / (now - self._started)
        parts = " ".join(f"{name} {share:.0%}" for name, share in watch.shares().items())
        loss = " ".join(f"{loss:.4f}" for loss in losses.values())
        self._bar.update(self._task, completed=step + 1, rate=f"{tiles_per_s:.0f} tiles/s  loss {loss}", shares=parts)
        if not self._console.is_terminal and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            left = (now - self._started) / (step + 1 - self._first_step) * (self._steps - step - 1)
            self._console.print(
                f"step {step + 1}/{self._steps}  loss {loss}  {tiles_per_s:.0f} tiles/s  "
                f"ETA {left / 60:.0f} min  {parts}"
            )
