"""The demo, step by step: draw, cut, distil, measure, run the benchmarks, report.

A demo's folder holds ``demo.json`` (its settings), ``slides/``, ``tiles/`` (as ``histill tile`` leaves it), ``checks/``
(labelled and paired tiles as files), ``run/`` (as ``histill distill`` leaves it), ``benchmarks/`` (small benchmark
folders, and their results), and at the end ``benchmarks.html``, ``report.html`` and ``summary.json``. Each of them is
whole or absent (tiles, run and results by their own records), so that a demo that was cut short goes on with the first
one that is missing.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from histill import config as configs
from histill import files
from histill.demo import prepare
from histill.demo.config import GLOBAL_PX, LOCAL_PX, STUDENT, DemoConfig
from histill.distill import PRESETS, DistillConfig
from histill.distill.record import one_process
from histill.errors import ConfigError, ModelError, RunError
from histill.synthetic import LABELS_CSV, PAIRED_CSV

__all__ = ["TEACHER", "demo", "distill_config"]

TEACHER = Path(__file__).parent / "assets" / "teacher"
"""The teacher that ships with the package: a model bundle."""


class _Stages:
    """Announces each stage and keeps its seconds."""

    names = ("draw slides", "cut tiles", "distil", "measure", "benchmarks", "report")

    def __init__(self, console: Console) -> None:
        self.console, self.seconds = console, dict[str, float]()

    @contextmanager
    def stage(self, number: int, text: str) -> Iterator[None]:
        self.console.print(f"[bold]{number + 1}/{len(self.names)} {text}[/]", highlight=False)
        began = time.monotonic()
        yield
        self.seconds[self.names[number]] = round(time.monotonic() - began, 1)


def demo(config: DemoConfig, *, console: Console | None = None) -> Path | None:
    """Run the demo, or what is left of it.

    Parameters
    ----------
    config
        Its settings.
    console
        Where progress is shown; standard error if None.

    Returns
    -------
    Path or None
        ``report.html``; None when training was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint.

    Raises
    ------
    ConfigError
        The folder cannot be written.
    RunError
        The folder holds something else, or a demo with other settings.
    ModelError
        The package lacks its teacher.
    """
    started = time.monotonic()
    console = console or Console(stderr=True)
    if not (TEACHER / "config.json").is_file():
        raise ModelError("the demo's teacher is missing from this installation", where=TEACHER, remedy="install again")
    config = dataclasses.replace(config, out=config.out.expanduser().resolve())
    _refuse(config)
    with _held(config.out):
        report, summary = config.out / "report.html", config.out / "summary.json"
        resumed = _claim(config)
        if report.exists() and summary.exists():
            console.print("this demo is finished already; give another --out for a new one")
            return report
        if resumed:
            console.print("going on with a demo that was cut short")
        return _run(config, _Stages(console), started, resumed)


def _run(config: DemoConfig, stages: _Stages, started: float, resumed: bool) -> Path | None:
    folder, console = config.out, stages.console
    with stages.stage(0, "drawing slides"):
        prepare.draw_slides(config, console)
    with stages.stage(1, "cutting tiles"):
        prepare.cut_tiles(config, console)
    with stages.stage(2, f"distilling the demo's teacher into a {STUDENT}"):
        from histill.distill.run import distill  # torch: only now, so that the first stage shows at once

        told = distill_config(config, prepare.held_out_slides(folder / "slides"))
        summary = distill(told, console=console)
    if summary is None:
        return None
    with stages.stage(3, "measuring speed and neighbours"):
        from histill.demo.measure import load_models, measure

        models = load_models(TEACHER, folder / "run" / "student", seed=config.seed)
        measured = measure(folder, models, seed=config.seed)
    with stages.stage(4, "running the benchmarks on small drawn folders"):
        from histill.demo.benchmarks import run_benchmarks

        benchmarks = run_benchmarks(folder, models, seed=config.seed, console=console)
    with stages.stage(5, "writing the report"):
        from histill.demo.report import render
        from histill.demo.summary import curves, summarise

        metrics = folder / "run" / "metrics.jsonl"
        facts = summarise(config, told, summary, measured, metrics)
        facts["benchmarks"] = benchmarks
        facts["resumed"] = resumed
        facts["seconds"] = {**stages.seconds, "total": round(time.monotonic() - started, 1)}
        files.write_text(folder / "report.html", render(facts, curves(metrics), measured.pictures))
        files.write_json(folder / "summary.json", facts)
    console.print(f"{facts['seconds']['total']:.0f} seconds in all", highlight=False)
    return folder / "report.html"


# ------------------------------------------------------------------ the folder


def _refuse(config: DemoConfig) -> None:
    """Touch no folder that is not a demo's."""
    folder = config.out
    try:
        if not folder.exists():
            return
        entries = {path.name for path in folder.iterdir() if path.name != ".lock" and not _is_stray(path)}
    except OSError as error:
        raise _unwritable(folder, error) from None
    if entries and "demo.json" not in entries:
        raise RunError(
            "this folder holds something that is not a demo",
            where=folder,
            got=", ".join(sorted(entries)[:5]),
            remedy="give --out a new or an empty folder",
        )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(one_process(folder))
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield


def _claim(config: DemoConfig) -> bool:
    """Write the settings into a fresh folder, or compare them with those that are there; True if there were some."""
    path = config.out / "demo.json"
    if not path.exists():
        try:
            configs.save(config, path)
        except OSError as error:
            raise _unwritable(config.out, error) from None
        return False
    for stray in config.out.iterdir():
        if _is_stray(stray):  # of a process that was killed: the folder is ours alone now
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    wanted, there = (configs.to_dict(value) for value in (config, configs.load(DemoConfig, path)))
    differing = [name for name in wanted if name != "out" and wanted[name] != there[name]]
    if differing:
        raise RunError(
            "this folder holds a demo with other settings",
            where=config.out,
            got="; ".join(f"{name}: {there[name]} there, {wanted[name]} now" for name in differing),
            remedy="give another --out, or the settings of that demo",
        )
    return True


def _is_stray(path: Path) -> bool:
    return path.name.startswith(".tmp-")


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "the demo's folder cannot be written",
        where=folder,
        got=error.strerror or error,
        remedy="give --out a folder that you may write to",
    )


# ------------------------------------------------------------------ the stages


def distill_config(config: DemoConfig, hold_out_slides: Sequence[str]) -> DistillConfig:
    """The preset `cpu` with token losses; a run that is there keeps its own."""
    folder = config.out / "run"
    if (folder / "config.json").exists():
        there = configs.load(DistillConfig, folder / "config.json")
        if there.out != folder:
            raise RunError(
                "this demo was moved since it began",
                where=folder,
                got=f"it began in {there.out}",
                remedy="move it back, or give a new --out",
            )
        return there
    base = PRESETS["cpu"]
    changed: dict[str, Any] = {
        "teacher": (f"local-dir:{TEACHER}",),
        "student": (STUDENT,),
        "tiles": config.out / "tiles",
        "hold_out_slides": tuple(hold_out_slides),
        "checks": dataclasses.replace(
            base.checks, tables=tuple(config.out / "checks" / name for name in (LABELS_CSV, PAIRED_CSV))
        ),
        "out": folder,
        "steps": config.steps,
        "seed": config.seed,
        "device": "cpu",  # the same demo everywhere
        "views": dataclasses.replace(base.views, global_px=GLOBAL_PX, local_px=LOCAL_PX),
        "objective": dataclasses.replace(base.objective, token_cls=1.0, token_patch=1.0),
    }
    return dataclasses.replace(base, **changed)
