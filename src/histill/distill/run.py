"""A run from its folder's point of view: start or go on, plan, train, check, write the student."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from histill import __version__, distributed, files
from histill import config as configs
from histill.distill import checkpoint
from histill.distill.checking import retentions
from histill.distill.config import DistillConfig
from histill.distill.learner import Learner
from histill.distill.loop import step_batches, train
from histill.distill.parts import Parts, build, untrained_student
from histill.distill.progress import Stopwatch
from histill.distill.record import Stop, StoppedAtOnce, claim, one_process, read_rows, require_tensorboard
from histill.distill.share import StepShare
from histill.distill.step import train_step
from histill.distributed import Ranks
from histill.errors import ConfigError, DataError, RunError
from histill.models import STUDENTS
from histill.models.bundle import write_bundle
from histill.models.card import licence_notice
from histill.models.encoder import Encoder
from histill.tiles.online import OnlineTiles, online_notice
from histill.tiles.tile_set import TileSet

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
        The summary; of several students ``{"students": {name: summary}, "failed": {name: reason}, "plan": ...}``. None
        when the run was asked to stop (SIGTERM, Ctrl-C) and has written a checkpoint.

    Raises
    ------
    HistillError
        One of the tree in :mod:`histill.errors`.
    """
    config.require_complete()
    assert config.out is not None
    ranks = distributed.join()
    console = console or Console(stderr=True, quiet=not ranks.first)
    if config.tensorboard:
        require_tensorboard()
    # Before the first step and after the last nothing is lost, and the wait could be long. Several ranks stop together.
    stop = Stop(at_once=ranks.world == 1)
    try:
        with distributed.others_may_end(ranks), stop.listening(), ExitStack() as stack:
            if ranks.first:
                _hold(config, stack)
            ranks.wait()
            summary = config.out / "summary.json"
            if ranks.gather_json(summary.exists())[0]:
                console.print(f"{config.out} is finished already")
                finished: dict[str, Any] = files.read_json(summary)
                return finished
            return _Run(config, config.out, console, stop, ranks).go()
    except StoppedAtOnce:
        console.print("stopped; the same command goes on from the last checkpoint")
        return None


def _hold(config: DistillConfig, stack: ExitStack) -> None:
    assert config.out is not None
    try:
        stack.enter_context(one_process(config.out))
        claim(config, config.out)
    except OSError as error:
        raise ConfigError("the run's folder cannot be written", where=f"--out {config.out}", got=error) from None


class _Run:
    def __init__(self, config: DistillConfig, folder: Path, console: Console, stop: Stop, ranks: Ranks) -> None:
        self.folder, self.console, self.stop, self.ranks = folder, console, stop, ranks
        self.started = time.monotonic()
        console.print(
            f"teacher {', '.join(config.teacher)}, student {', '.join(config.student)}"
            + (f", {ranks.world} processes" if ranks.world > 1 else ""),
            highlight=False,
        )
        # A checkpoint without a plan is what a measurement left.
        newest = checkpoint.latest(folder / "checkpoints") if (folder / "plan.json").exists() else None
        (name,) = set(ranks.gather_json(newest.name if newest else None))
        self.newest = None if name is None else folder / "checkpoints" / name
        self.parts = build(config, folder, ranks=ranks, fresh=self.newest is None)
        for record in self.parts.teacher_records:
            notice = licence_notice(record)
            if notice:
                console.print(f"[bold yellow]{notice}[/]")
        if isinstance(self.parts.source, OnlineTiles):
            console.print(f"[bold yellow]{online_notice(self.parts.source)}[/]")
        for note in self.parts.checker.notes():
            console.print(f"note: {note}", highlight=False)
        self.baselines: dict[str, dict[str, Any]] = {}

    def go(self) -> dict[str, Any] | None:
        parts = self.parts
        views = parts.config.views
        for learner in parts.learners:
            name = f"{learner.name}: " if len(parts.learners) > 1 else ""
            self.console.print(f"{name}start of the student: {learner.init}", highlight=False)
        self.console.print(
            f"{len(parts.source)} tiles ({parts.source.held_out} held out as test tiles), "
            f"{views.n_global} x {views.global_px} px + {views.n_local} x {views.local_px} px views"
        )
        for labelled in parts.labelled:
            self.console.print(f"labelled: {labelled.name}, {len(labelled.source)} tiles", highlight=False)
        if any(learner.init.startswith("random, since") for learner in parts.learners):
            self.console.print("note: from random weights a higher --optimiser.base-lr (4e-3) may learn faster")
        self.baselines = {learner.name: self._baseline(learner) for learner in parts.learners}
        first_step = 0
        if self.newest is not None:
            first_step, failed = checkpoint.load(self.newest, parts.state)
            for learner in parts.learners:
                learner.failed = failed.get(learner.name)
            self.console.print(f"going on from step {first_step}")
        plan = self._plan()
        at_once, self.stop.at_once = self.stop.at_once, False
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
        self.stop.at_once = at_once
        if next_step < plan["steps"]:
            self.console.print(f"stopped before step {next_step}; the same command goes on from there")
            return None
        return self._finish(plan)

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        """Write a file of the run; the first rank does."""
        if self.ranks.first:
            files.write_json(path, values)
        self.ranks.wait()

    def _shared(self, path: Path) -> dict[str, Any] | None:
        """A file of the run, if the first rank sees one."""
        found: dict[str, Any] | None = files.read_json(path) if self.ranks.first and path.exists() else None
        shared: dict[str, Any] | None = self.ranks.gather_json(found)[0]
        return shared

    def _baseline(self, learner: Learner) -> dict[str, Any]:
        """Scores of teachers, an untrained student and the student's start: measured once, kept in the folder."""
        path = learner.folder / "baseline.json"
        stored = self._shared(path)
        if stored is not None:
            return stored
        checker, teachers = self.parts.checker, self.parts.teachers
        before = time.monotonic()
        untrained = checker.scores(untrained_student(self.parts, learner))
        check_seconds = time.monotonic() - before
        earlier = next(iter(self.baselines.values()), None)
        scores = (
            earlier["teachers"] if earlier else {each.encoder.name: checker.scores(each.encoder) for each in teachers}
        )
        measured = {
            "teacher": scores[teachers[0].encoder.name],
            "teachers": scores,
            "untrained": untrained,
            "start": untrained if learner.init == "random" else checker.scores(learner.product()),
            "check_seconds": check_seconds,
        }
        self._write(path, measured)
        return measured

    def _plan(self) -> dict[str, Any]:
        """The length of the run in steps and all else that is fixed at its start; kept in the run folder."""
        path = self.folder / "plan.json"
        parts, config = self.parts, self.parts.config
        fingerprint, tables = parts.source.fingerprint(), parts.checker.fingerprint()
        teacher_hash = " ".join(record["content_hash"] for record in parts.teacher_records)
        known = self._shared(path)
        if known is not None:
            plan = known
            for what, where, now, then in (
                ("tiles have", parts.source.root, fingerprint, plan["tiles_fingerprint"]),
                ("teacher's weights have", ", ".join(config.teacher), teacher_hash, plan["teacher_hash"]),
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
            every = config.checks.every_steps
            check_seconds = sum(baseline["check_seconds"] for baseline in self.baselines.values())
            left = 60 * config.minutes - (time.monotonic() - self.started) - check_seconds
            left -= 0 if every else (_CHECKS - 1) * check_seconds
            steps = int(left / (step_seconds + (check_seconds / every if every else 0.0)))
            if steps < 1:
                steps = 1
                self.console.print("note: setting up took all of --minutes; the run is one step long")
            steps = self.ranks.gather_json(steps)[0]
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
            "cls_prototypes": _rows(parts.teachers[0].cls_prototypes_KE),
            "patch_prototypes": _rows(parts.teachers[0].patch_prototypes_KE),
            "autocast": str(parts.autocast.fast_dtype)
            if parts.autocast.fast_dtype and parts.autocast._enabled
            else "off",
            "init": ", ".join(learner.init for learner in parts.learners),
            "device": str(parts.device),
            "processes": self.ranks.world,
            "histill": __version__,
        }
        self._write(path, plan)
        return plan

    def _measure(self) -> float:
        """Seconds a step, over some real steps from which the run then goes back to its start."""
        parts = self.parts
        folder = self.folder / "checkpoints"
        start = checkpoint.save(folder, 0, parts.state, keep=1, ranks=self.ranks)
        steps = _WARM_STEPS + _TIMED_STEPS
        began = 0.0
        with closing(step_batches(parts, 0, steps)) as stream:
            for step, (batch, labelled) in enumerate(stream):
                if step == _WARM_STEPS:
                    began = time.monotonic()
                share = StepShare.agreed(parts, batch, labelled, asked=False, due=False)
                if share.enough:
                    train_step(parts, batch, labelled, share, step, steps, Stopwatch(parts.device))
        seconds = (time.monotonic() - began) / _TIMED_STEPS
        checkpoint.load(start, parts.state)
        for learner in parts.learners:
            learner.failed = None
        return seconds

    def _check(self, step: int) -> dict[str, dict[str, Any]]:
        """What is looked at during the run and at its end, for each student, shown in a line."""
        return {learner.name: self._check_of(learner, step) for learner in self.parts.alive}

    def _check_of(self, learner: Learner, step: int) -> dict[str, Any]:
        checker, product, baseline = self.parts.checker, learner.product(), self.baselines[learner.name]
        looked = {each.encoder.name: checker.agreement(product, each.encoder) for each in self.parts.teachers}
        agreement, warning = next(iter(looked.values()))
        scores = checker.scores(product)
        kept = retentions(scores, baseline["teacher"], baseline["untrained"])
        shown = [f"CKA {agreement['cka']:.3f}", f"rank {agreement['student_rank']:.0f}/{agreement['teacher_rank']:.0f}"]
        shown += [f"CKA {found['cka']:.3f} with {name}" for name, (found, _) in list(looked.items())[1:]]
        shown += [
            f"{table} {metric} {value:.0%}" for table, metrics in kept.items() for metric, value in metrics.items()
        ]
        name = f"{learner.name}, " if len(self.parts.learners) > 1 else ""
        self.console.print(f"{name}after {step} steps: " + ", ".join(shown), highlight=False)
        if warning:
            self.console.print(f"[bold red]{warning}[/]")
        return {
            "agreement": agreement,
            "agreements": {name: found for name, (found, _) in looked.items()},
            "scores": scores,
            "retention": kept,
            "warning": warning,
        }

    def _finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Write each student's bundle and summary; the run's own summary comes last, and says that it is finished."""
        parts = self.parts
        final = self._check(plan["steps"])
        products = {learner.name: learner.product() for learner in parts.alive}
        heads = {learner.name: learner.heads() for learner in parts.alive}
        written: dict[str, Any] = {}
        if self.ranks.first:
            for learner in parts.alive:
                summary = self._summary(learner, final[learner.name], plan)
                written[learner.name] = summary
                write_student(parts, learner, products[learner.name], heads[learner.name], summary)
                if len(parts.learners) > 1:
                    files.write_json(learner.folder / "summary.json", summary)
                self.console.print(f"student written to {learner.folder / 'student'}")
            unreadable = {path for summary in written.values() for path in summary["unreadable"]}
            if unreadable:
                self.console.print(f"{len(unreadable)} tiles could not be read: " + ", ".join(sorted(unreadable)[:5]))
            failed = {learner.name: learner.failed for learner in parts.learners if learner.failed}
            whole = {"students": written, "failed": failed, "plan": plan}
            files.write_json(
                self.folder / "summary.json", whole if len(parts.learners) > 1 else written[parts.learners[0].name]
            )
        self.ranks.wait()
        result: dict[str, Any] = files.read_json(self.folder / "summary.json")
        return result

    def _summary(self, learner: Learner, final: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
        rows = read_rows(learner.folder / "metrics.jsonl")
        unreadable = {path: reason for row in rows for path, reason in row.get("unreadable", {}).items()}
        rows = [row for row in rows if "loss" in row]
        if not rows:
            raise DataError(
                "no step could be taken: too few of the tiles can be read",
                where=self.parts.source.root,
                got=f"{len(unreadable)} unreadable, as {next(iter(unreadable.items()), ('', ''))}",
            )
        seconds = {name: sum(row["seconds"][name] for row in rows) for name in rows[-1]["seconds"]}
        baseline = self.baselines[learner.name]
        return {
            "steps": plan["steps"],
            "steps_passed_over": plan["steps"] - len(rows),
            "tiles_seen": sum(row["tiles"] for row in rows),
            "seconds": round(sum(seconds.values()), 1),
            "shares": {name: round(part / sum(seconds.values()), 4) for name, part in seconds.items()},
            "last_losses": {key: value for key, value in rows[-1].items() if isinstance(value, float)},
            "teacher": baseline["teacher"],
            "teachers": baseline["teachers"],
            "untrained": baseline["untrained"],
            "start": baseline["start"],
            "student": final["scores"],
            "retention": final["retention"],
            "agreement": final["agreement"],
            "agreements": final["agreements"],
            "warning": final["warning"],
            "unreadable": unreadable,
            "plan": plan,
        }


def _rows(tensor: Any) -> int | None:
    return None if tensor is None else len(tensor)


def write_student(
    parts: Parts, learner: Learner, product: Encoder, heads: dict[str, Tensor], summary: dict[str, Any]
) -> None:
    """Write the moving average as a model bundle, with its provenance, and the heads of labelled sets beside it."""
    folder = learner.folder / "student"
    metrics = {
        f"{table}: {metric}{suffix}": value
        for key, suffix in (("student", ""), ("retention", ", retention"))
        for table, values in summary[key].items()
        for metric, value in values.items()
    }
    first, *further = parts.teacher_records
    write_bundle(
        folder,
        product.model,
        STUDENTS[learner.name],
        mean=product.mean,
        std=product.std,
        input_px=parts.config.views.global_px,
        provenance={
            "teacher": first,
            **({"further_teachers": further} if further else {}),
            "config": configs.to_dict(parts.config),
            "data": {"tiles": summary["plan"]["tiles"], "fingerprint": summary["plan"]["tiles_fingerprint"]},
            "steps": summary["steps"],
            "metrics": metrics | summary["agreement"],
        },
        mpp=parts.source.selection.settings["mpp"] if isinstance(parts.source, TileSet | OnlineTiles) else None,
    )
    if parts.labelled:
        told = {x.name: {"column": x.task.column, "classes": x.classes, "mean_std": x.mean_std} for x in parts.labelled}
        with files.atomic_path(folder / "labelled_heads.safetensors") as temporary:
            own = {key: value.cpu().contiguous() for key, value in heads.items()}
            save_file(own, temporary, metadata={"sets": json.dumps(told)})
