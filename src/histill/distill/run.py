"""A run from its folder's point of view: start or go on, plan, train, check, write the student."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from histill import __version__, distributed, files
from histill import config as configs
from histill.distill import checkpoint
from histill.distill.checking import retentions
from histill.distill.config import DistillConfig
from histill.distill.loop import LEAST_TILES, step_batches, train, train_step
from histill.distill.parts import Parts, build, untrained_student
from histill.distill.progress import Stopwatch
from histill.distill.record import Stop, one_process, read_rows, require_tensorboard
from histill.errors import RunError
from histill.models import STUDENTS
from histill.models.bundle import teacher_record, write_bundle
from histill.models.card import licence_notice
from histill.tiles.online import OnlineTiles, online_notice

__all__ = ["distill"]

_WARM_STEPS, _TIMED_STEPS = 3, 8
_CHECKS = 6


def distill(config: DistillConfig, *, console: Console | None = None) -> dict[str, Any] | None:
    """Distil a teacher into a student; the same call again goes on where the last one stopped.

    Parameters
    ----------
    config
        The run; ``config.out`` becomes a folder with ``config.json``, ``plan.json``, ``metrics.jsonl``,
        ``checkpoints/``, and at the end ``summary.json`` and ``student/`` (a model bundle).
    console
        Where progress is shown; standard error if None.

    Returns
    -------
    dict or None
        The summary; None when the run was asked to stop (SIGTERM) and has written a checkpoint.

    Raises
    ------
    HistillError
        One of the tree in :mod:`histill.errors`.
    """
    config.require_complete()
    assert config.out is not None
    console = console or Console(stderr=True)
    if distributed.join().world > 1:
        raise RunError("a run on several processes is not built yet", remedy="start it without torchrun")
    if config.tensorboard:
        require_tensorboard()
    with one_process(config.out), Stop().listening() as stop:
        _claim(config, config.out)
        summary = config.out / "summary.json"
        if summary.exists():
            console.print(f"{config.out} is finished already")
            finished: dict[str, Any] = files.read_json(summary)
            return finished
        return _Run(config, config.out, console, stop).go()


def _claim(config: DistillConfig, folder: Path) -> None:
    """Write the config into a fresh folder; refuse a folder that holds another run."""
    path, wanted = folder / "config.json", configs.to_dict(config)
    if path.exists():
        there = configs.to_dict(configs.load(DistillConfig, path))
        differing = [name for name in wanted if wanted[name] != there[name]]
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
        for name in ("teacher_statistics.safetensors", "baseline.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    configs.save(config, path)


class _Run:
    def __init__(self, config: DistillConfig, folder: Path, console: Console, stop: Stop) -> None:
        self.folder, self.console, self.stop = folder, console, stop
        self.started = time.monotonic()
        console.print(f"teacher {config.teacher}, student {config.student}", highlight=False)
        # A checkpoint without a plan is what a measurement left.
        self.newest = checkpoint.latest(folder / "checkpoints") if (folder / "plan.json").exists() else None
        self.parts = build(config, folder / "teacher_statistics.safetensors", fresh=self.newest is None)
        notice = licence_notice(teacher_record(self.parts.teacher.encoder))
        if notice:
            console.print(f"[bold yellow]{notice}[/]")
        if isinstance(self.parts.source, OnlineTiles):
            console.print(f"[bold yellow]{online_notice(self.parts.source)}[/]")
        for note in self.parts.checker.notes():
            console.print(f"note: {note}", highlight=False)
        self.baseline: dict[str, Any] = {}

    def go(self) -> dict[str, Any] | None:
        parts = self.parts
        views = parts.config.views
        self.console.print(f"start of the student: {parts.init}", highlight=False)
        self.console.print(
            f"{len(parts.source)} tiles ({parts.source.held_out} held out as test tiles), "
            f"{views.n_global} x {views.global_px} px + {views.n_local} x {views.local_px} px views"
        )
        if parts.init.startswith("random, since"):
            self.console.print("note: from random weights a higher --optimiser.base-lr (4e-3) may learn faster")
        self.baseline = self._baseline()
        first_step = 0
        if self.newest is not None:
            first_step = checkpoint.load(self.newest, parts.modules, parts.optimiser)
            self.console.print(f"going on from step {first_step}")
        plan = self._plan()
        next_step = train(
            parts,
            self.folder,
            first_step=first_step,
            steps=plan["steps"],
            check_every=plan["check_every_steps"],
            check=self._check,
            stop=self.stop,
            console=self.console,
        )
        if next_step < plan["steps"]:
            self.console.print(f"stopped before step {next_step}; the same command goes on from there")
            return None
        return self._finish(plan)

    def _baseline(self) -> dict[str, Any]:
        """Scores of the teacher, an untrained student and the student's start: measured once, kept in the folder."""
        path = self.folder / "baseline.json"
        if path.exists():
            stored: dict[str, Any] = files.read_json(path)
            return stored
        checker = self.parts.checker
        before = time.monotonic()
        untrained = checker.scores(untrained_student(self.parts))
        check_seconds = time.monotonic() - before
        measured = {
            "teacher": checker.scores(self.parts.teacher.encoder),
            "untrained": untrained,
            "start": untrained if self.parts.init == "random" else checker.scores(self.parts.average),
            "check_seconds": check_seconds,
        }
        files.write_json(path, measured)
        return measured

    def _plan(self) -> dict[str, Any]:
        """The length of the run in steps and all else that is fixed at its start; kept in the run folder."""
        path = self.folder / "plan.json"
        parts, config = self.parts, self.parts.config
        fingerprint, teacher_hash = parts.source.fingerprint(), parts.teacher.encoder.content_hash()
        tables = parts.checker.fingerprint()
        if path.exists():
            plan: dict[str, Any] = files.read_json(path)
            for what, where, now, then in (
                ("tiles have", parts.source.root, fingerprint, plan["tiles_fingerprint"]),
                ("teacher's weights have", config.teacher, teacher_hash, plan["teacher_hash"]),
                ("tables of the checks have", "--checks.tables", tables, plan["tables_fingerprint"]),
            ):
                if now != then:
                    raise RunError(
                        f"the {what} changed since this run began",
                        where=where,
                        got=f"fingerprint {now[:12]}, {then[:12]} at the start",
                        remedy="restore them, or start a run in another folder",
                    )
            return plan
        steps, step_seconds = config.steps, None
        if config.minutes:
            step_seconds = self._measure()
            # Each check takes its time; with --checks.every-steps there are left / (every * step) of them.
            every, check_seconds = config.checks.every_steps, self.baseline["check_seconds"]
            left = 60 * config.minutes - (time.monotonic() - self.started) - check_seconds
            left -= 0 if every else (_CHECKS - 1) * check_seconds
            steps = int(left / (step_seconds + (check_seconds / every if every else 0.0)))
            if steps < 1:
                steps = 1
                self.console.print("note: setting up took all of --minutes; the run is one step long")
            self.console.print(f"{config.minutes:g} minutes are {steps} steps of {step_seconds:.2f} s")
        plan = {
            "steps": steps,
            "step_seconds": step_seconds,
            "check_every_steps": config.checks.every_steps or max(1, -(-steps // _CHECKS)),
            "tiles": len(parts.source),
            "tiles_held_out": parts.source.held_out,
            "tiles_fingerprint": fingerprint,
            "teacher_hash": teacher_hash,
            "tables_fingerprint": tables,
            "global_px": config.views.global_px,
            "local_px": config.views.local_px,
            "cls_prototypes": _rows(parts.teacher.cls_prototypes_KE),
            "patch_prototypes": _rows(parts.teacher.patch_prototypes_KE),
            "autocast": str(parts.autocast.fast_dtype)
            if parts.autocast.fast_dtype and parts.autocast._enabled
            else "off",
            "init": parts.init,
            "device": str(parts.device),
            "histill": __version__,
        }
        files.write_json(path, plan)
        return plan

    def _measure(self) -> float:
        """Seconds a step, over some real steps from which the run then goes back to its start."""
        parts = self.parts
        start = checkpoint.save(self.folder / "checkpoints", 0, parts.modules, parts.optimiser, keep=1)
        steps = _WARM_STEPS + _TIMED_STEPS
        began = 0.0
        with closing(step_batches(parts, 0, steps)) as stream:
            for step, batch in enumerate(stream):
                if step == _WARM_STEPS:
                    began = time.monotonic()
                if len(batch.positions_B) >= LEAST_TILES:
                    train_step(parts, batch, step, steps, Stopwatch(parts.device))
        seconds = (time.monotonic() - began) / _TIMED_STEPS
        checkpoint.load(start, parts.modules, parts.optimiser)
        return seconds

    def _check(self, step: int) -> dict[str, Any]:
        """What is looked at during the run and at its end, shown in a line."""
        parts = self.parts
        agreement, warning = parts.checker.agreement(parts.average, parts.teacher.encoder)
        scores = parts.checker.scores(parts.average)
        kept = retentions(scores, self.baseline["teacher"], self.baseline["untrained"])
        shown = [f"CKA {agreement['cka']:.3f}", f"rank {agreement['student_rank']:.0f}/{agreement['teacher_rank']:.0f}"]
        shown += [
            f"{table} {metric} {value:.0%}" for table, metrics in kept.items() for metric, value in metrics.items()
        ]
        self.console.print(f"after {step} steps: " + ", ".join(shown), highlight=False)
        if warning:
            self.console.print(f"[bold red]COLLAPSE: {warning}[/]")
        return {"agreement": agreement, "scores": scores, "retention": kept, "warning": warning}

    def _finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        parts = self.parts
        final = self._check(plan["steps"])
        rows = read_rows(self.folder / "metrics.jsonl")
        unreadable = {path: reason for row in rows for path, reason in row.get("unreadable", {}).items()}
        rows = [row for row in rows if "loss" in row]
        seconds = {name: sum(row["seconds"][name] for row in rows) for name in rows[-1]["seconds"]}
        summary = {
            "steps": plan["steps"],
            "tiles_seen": sum(row["tiles"] for row in rows),
            "seconds": round(sum(seconds.values()), 1),
            "shares": {name: round(part / sum(seconds.values()), 4) for name, part in seconds.items()},
            "last_losses": {key: value for key, value in rows[-1].items() if isinstance(value, float)},
            "teacher": self.baseline["teacher"],
            "untrained": self.baseline["untrained"],
            "start": self.baseline["start"],
            "student": final["scores"],
            "retention": final["retention"],
            "agreement": final["agreement"],
            "warning": final["warning"],
            "unreadable": unreadable,
            "plan": plan,
        }
        write_student(parts, self.folder / "student", summary)
        files.write_json(self.folder / "summary.json", summary)
        if unreadable:
            self.console.print(f"{len(unreadable)} tiles could not be read: " + ", ".join(list(unreadable)[:5]))
        self.console.print(f"student written to {self.folder / 'student'}")
        return summary


def _rows(tensor: Any) -> int | None:
    return None if tensor is None else len(tensor)


def write_student(parts: Parts, folder: Path, summary: dict[str, Any]) -> None:
    """Write the moving average as a model bundle, with its provenance."""
    encoder = parts.teacher.encoder
    metrics = {
        f"{table}: {metric}{suffix}": value
        for key, suffix in (("student", ""), ("retention", ", retention"))
        for table, values in summary[key].items()
        for metric, value in values.items()
    }
    write_bundle(
        folder,
        parts.average.model,
        STUDENTS[parts.config.student],
        mean=encoder.mean,
        std=encoder.std,
        input_px=parts.config.views.global_px,
        provenance={
            "teacher": teacher_record(encoder),
            "config": configs.to_dict(parts.config),
            "data": {"tiles": summary["plan"]["tiles"], "fingerprint": summary["plan"]["tiles_fingerprint"]},
            "steps": summary["steps"],
            "metrics": metrics | summary["agreement"],
        },
    )
