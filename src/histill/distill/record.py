"""What a run writes while it goes on, and how it is asked to stop."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from histill import config as configs
from histill import files
from histill.distill.config import DistillConfig
from histill.errors import MissingExtraError, RunError
from histill.files import lock

__all__ = ["MetricsLog", "Stop", "StoppedAtOnce", "claim", "one_process", "read_rows", "require_tensorboard"]


class StoppedAtOnce(BaseException):
    """A signal came while nothing can be lost. Like KeyboardInterrupt no ``except Exception`` holds it up."""


@dataclass(slots=True)
class Stop:
    """Whether the run was asked to stop: SIGTERM, or Ctrl-C."""

    asked: bool = False
    at_once: bool = False
    """Raise :class:`StoppedAtOnce` in the main thread instead of waiting to be looked at."""

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Take the signals while the block runs; outside of the main thread nothing is changed."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt  # a second Ctrl-C does not wait for the end of the step
            self.asked = True
            if self.at_once:
                raise StoppedAtOnce

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: signals are the caller's affair
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Hold a run folder; a second process gets an error instead of mixing its files in.

    Raises
    ------
    RunError
        Another process holds it.
    """
    with lock(folder / ".lock", wait=False) as ours:
        if not ours:
            raise RunError(
                "another process works in this run folder",
                where=folder,
                remedy="wait until it ends, or give another --out",
            )
        yield


def claim(config: DistillConfig, folder: Path) -> None:
    """Write the config into a fresh folder; refuse a folder that holds another run, or something else.

    Where it lies and how it is laid out over processes do not count as settings: a run may move.

    Raises
    ------
    RunError
        The folder holds a run with other settings, or a summary or plan without a run's config.
    """
    path, wanted = folder / "config.json", configs.to_dict(config)
    foreign = [name for name in ("summary.json", "plan.json") if (folder / name).exists() and not path.exists()]
    if foreign:
        raise RunError(
            "this folder holds something else than a run", where=folder, got=foreign[0], remedy="give another --out"
        )
    if path.exists():
        for stray in (*folder.rglob(".tmp-*"), *folder.rglob(".old-*")):  # a killed process's: only we write here
            shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink(missing_ok=True)
        there = configs.to_dict(configs.load(DistillConfig, path))
        differing = [name for name in wanted if _learning(wanted)[name] != _learning(there)[name]]
        if not differing:
            return
        if (folder / "plan.json").exists():
            raise RunError(
                "this folder holds a run with other settings",
                where=folder,
                got="; ".join(f"{name}: {there[name]} there, {wanted[name]} now" for name in differing),
                remedy="give another --out, or the settings of that run",
            )
        # A run that never got as far as its plan (a wrong path, say) has nothing to lose, and its statistics are stale.
        for stale in (*folder.glob("teacher_statistics*.safetensors"), *folder.rglob("baseline.json")):
            stale.unlink()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    configs.save(config, path)


_LAYOUT = ("out", "loader_threads", "device", "checkpoint_minutes", "keep_checkpoints", "tensorboard")


def _learning(values: dict[str, Any]) -> dict[str, Any]:
    """Of a config what decides the losses, the rest made equal: a run may move to other machines and layouts."""
    scale = {"micro_tiles": values["scale"]["micro_tiles"]}
    return {name: None if name in _LAYOUT else scale if name == "scale" else value for name, value in values.items()}


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, each step once; written by the first rank.

    Opening it for a run that goes on from ``first_step`` drops the rows of later steps, which will come again.

    Parameters
    ----------
    folder
        Of the student; ``tensorboard`` becomes a folder in it.
    first_step
        The step that comes first, from 0.
    tensorboard
        Also write for TensorBoard.
    writes
        Off on all ranks but the first: nothing is then opened or written.

    Raises
    ------
    MissingExtraError
        TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool, *, writes: bool = True) -> None:
        self._path, self._first_step, self._writes = folder / "metrics.jsonl", first_step, writes
        self._file: TextIO | None = None
        self._board = require_tensorboard()(str(folder / "tensorboard")) if tensorboard and writes else None

    def __enter__(self) -> MetricsLog:
        if not self._writes:
            return self
        kept = [line for line in read_rows(self._path) if line["step"] < self._first_step]
        files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it has a ``step``. Only the first rank writes."""
        if self._file is None:
            return
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _flat(row):
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; the torn last line of a killed process is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def require_tensorboard() -> Any:
    """TensorBoard's writer class, or an error that says what to install.

    Raises
    ------
    MissingExtraError
        TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "TensorBoard is not installed", where="--tensorboard", remedy="pip install 'histill[tensorboard]'"
        ) from None
    return SummaryWriter
