"""All benchmarks whose data are there, with any number of encoders; what has no result is said."""

from __future__ import annotations

import json
import sys
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from histill import config as configs
from histill import files
from histill.errors import ConfigError, HistillError, nearest
from histill.evaluate.config import BENCHMARKS, AllConfig, BenchmarkConfig, EncoderConfig
from histill.evaluate.encoders import check_names, embedders_of, open_encoder
from histill.evaluate.eva.tasks import TASKS
from histill.evaluate.headlines import Absent, Headline, as_json, as_markdown
from histill.evaluate.jobs import Job, jobs_of
from histill.models.machine import pick_device

__all__ = ["Outcome", "evaluate_all", "read_roots"]

_PATHS = ("root", "table")
_COMMON = tuple(entry.name for entry in fields(EncoderConfig))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of every benchmark."""

    done: list[Headline] = field(default_factory=list)
    failed: list[Absent] = field(default_factory=list)
    missing: list[Absent] = field(default_factory=list)
    """Without data; those that the file names come with a path that is not there."""
    incomplete: bool = False
    """Whether something that was asked for has no result."""


def evaluate_all(config: AllConfig, console: Console) -> Outcome:
    """Run every benchmark of the file with every encoder; one that fails does not stop the others.

    Parameters
    ----------
    config
        Encoders, roots and the folder for results, complete.
    console
        For progress.

    Returns
    -------
    Outcome
        Also written to ``OUT/summary.json`` after each result, and at the end to ``OUT/results.json`` and
        ``OUT/results.md``.

    Raises
    ------
    ConfigError
        A wrong file, option or device.
    ModelError
        A name that means no model. Weights that cannot be loaded are a failure of that encoder alone.
    """
    config.require_complete()
    assert config.roots is not None
    out = config.require_out()
    jobs, missing = read_roots(config.roots, config)
    pick_device(config.device)
    check_names(config.encoder)
    there = [job for job in jobs if job.data is not None and job.data.exists()]
    outcome = Outcome(missing=missing, incomplete=len(there) < len(jobs))
    outcome.missing += [
        Absent(benchmark=job.title, reason=f"there is no {job.data}") for job in jobs if job not in there
    ]
    _write_summary(outcome, config, out, finished=False)
    for name in dict.fromkeys(config.encoder):
        _run_encoder(name, there, config, outcome, console)
    outcome.incomplete |= bool(outcome.failed)
    files.write_json(out / "results.json", as_json(outcome.done, outcome.failed, outcome.missing))
    files.write_text(out / "results.md", as_markdown(outcome.done, outcome.failed, outcome.missing))
    _write_summary(outcome, config, out, finished=True)
    return outcome


def _run_encoder(name: str, jobs: list[Job], config: AllConfig, outcome: Outcome, console: Console) -> None:
    try:
        embedders = embedders_of(config, open_encoder(config, name)) if jobs else []
    except Exception as error:
        reason = _reason(error)
        outcome.failed += [Absent(benchmark=job.title, encoder=name, reason=reason) for job in jobs]
        print(f"{name}: {reason}", file=sys.stderr)
        return
    for embedder in embedders:
        for job in jobs:
            console.print(f"{job.title}: {name}, {embedder.pooling}", style="bold", markup=False, highlight=False)
            try:
                result, folder = job.run(embedder, console)
                place = folder.relative_to(config.require_out()).as_posix()
                outcome.done.append(Headline.of(job.title, result, place))
            except Exception as error:  # hours of other benchmarks must not be lost to one
                absent = Absent(benchmark=job.title, encoder=name, pooling=embedder.pooling, reason=_reason(error))
                outcome.failed.append(absent)
                print(f"{absent.title}: {absent.reason}", file=sys.stderr)
            _write_summary(outcome, config, config.require_out(), finished=False)


def _reason(error: Exception) -> str:
    """What the user is told; an error that is not the user's comes with its traceback on the terminal."""
    if isinstance(error, HistillError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _write_summary(outcome: Outcome, config: AllConfig, out: Path, *, finished: bool) -> None:
    files.write_json(
        out / "summary.json",
        {
            "finished": finished,
            "config": configs.to_dict(config),
            "done": [
                {name: getattr(each, name) for name in ("benchmark", "encoder", "pooling", "folder", "seconds")}
                for each in outcome.done
            ],
            "failed": [asdict(each) for each in outcome.failed],
            "missing": [asdict(each) for each in outcome.missing],
        },
    )


def read_roots(path: Path, config: AllConfig) -> tuple[list[Job], list[Absent]]:
    """Read the table of roots; paths in it are relative to its folder.

    Parameters
    ----------
    path
        JSON, or TOML if its name ends so. Benchmark -> folder or table; or a group with ``root`` (``table``) and the
        benchmark's options; ``eva`` -> a group task -> folder, beside ``runs`` and ``quick``.
    config
        What all benchmarks share.

    Returns
    -------
    tuple
        The jobs, and the benchmarks and tasks that the file does not name.

    Raises
    ------
    ConfigError
        The file is missing, damaged or empty, or names an unknown benchmark, task or option.
    """
    table = _read_table(path)
    common = {name: value for name, value in configs.to_dict(config).items() if name in _COMMON}
    jobs: list[Job] = []
    for name, entry in table.items():
        if name not in BENCHMARKS:
            allowed = ", ".join(BENCHMARKS)
            raise ConfigError(
                f"there is no benchmark '{name}'", where=path, allowed=allowed, remedy=nearest(name, BENCHMARKS)
            )
        jobs += _jobs(name, entry, common, path)
    missing = [Absent(benchmark=name, reason=f"not in {path.name}") for name in BENCHMARKS if name not in table]
    if "eva" in table:
        named = {job.task for job in jobs}
        missing += [
            Absent(benchmark=f"eva/{task}", reason=f"not in {path.name}") for task in TASKS if task not in named
        ]
    return jobs, missing


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError("the table of roots cannot be read", where=path, got=error.strerror) from None
    except ValueError as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ConfigError(f"the table of roots is not valid {kind}", where=path, got=error) from None
    if not isinstance(table, dict) or not table:
        example = '{"plism": "/data/plism", "eva": {"mhist": "/data/mhist"}, "tiles": "labels.csv"}'
        raise ConfigError("the table of roots names no benchmark", where=path, allowed=example)
    return table


def _jobs(name: str, entry: Any, common: Mapping[str, Any], path: Path) -> list[Job]:
    where = f"{path}: {name}"
    own = "table" if name in ("tiles", "paired") else "root"
    options = {own: entry} if isinstance(entry, str) else entry
    if not isinstance(options, dict) or (name == "eva" and isinstance(entry, str)):
        allowed = 'a group such as {"mhist": "/data/mhist"}' if name == "eva" else "a path, or a group of options"
        raise ConfigError("a benchmark's data are not said", where=where, got=repr(entry), allowed=allowed)
    if shared := sorted(set(options) & set(_COMMON)):
        raise ConfigError(
            "this option is the same for all benchmarks", where=where, got=shared[0], remedy="give it with the command"
        )
    if name != "eva":
        return jobs_of(_config(name, options, common, path, where))
    tasks = {key: root for key, root in options.items() if key in TASKS}
    rest = {key: value for key, value in options.items() if key not in TASKS}
    if unknown := [key for key in rest if key not in ("runs", "quick")]:
        allowed = f"{', '.join(TASKS)}; runs, quick"
        raise ConfigError(
            "neither a task of EVA nor an option",
            where=where,
            got=unknown[0],
            allowed=allowed,
            remedy=nearest(unknown[0], TASKS),
        )
    if not tasks:
        raise ConfigError("no task of EVA is named", where=where, allowed=", ".join(TASKS))
    each = ({"task": [task], "root": root, **rest} for task, root in tasks.items())
    return [job for chosen in each for job in jobs_of(_config(name, chosen, common, path, where))]


def _config(
    name: str, options: Mapping[str, Any], common: Mapping[str, Any], path: Path, where: str
) -> BenchmarkConfig:
    """Build a benchmark's config; its errors name the file."""
    placed = {
        key: str(path.parent / Path(value).expanduser()) if key in _PATHS and isinstance(value, str) else value
        for key, value in options.items()
    }
    config = configs.from_dict(BENCHMARKS[name], {**common, **placed}, where=where)
    try:
        config.require_complete()
    except ConfigError as error:
        raise ConfigError(error.what, where=where, got=", ".join(options), remedy="name its root or table") from None
    return config
