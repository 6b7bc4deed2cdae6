"""``histill evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from histill import config as configs
from histill.errors import ConfigError, nearest
from histill.evaluate.config import BENCHMARKS, AllConfig, BenchmarkConfig

if TYPE_CHECKING:
    from histill.evaluate.headlines import Headline

__all__ = ["run"]

_USAGE = """usage: histill evaluate BENCHMARK --encoder NAME --root DATA --out OUT [OPTIONS]
       histill evaluate all --encoder NAME --encoder NAME --roots FILE --out OUT [OPTIONS]

Score an encoder. The same command again does only what is missing.

benchmarks:
  plism     the same tissue under 13 stainings and 7 scanners: do features stay the same?
  hest      gene expression from patches, nine tasks
  eva       the EVA protocol: patch and slide classification, segmentation (--task)
  pathorob  is an embedding ordered by biology or by the hospital?
  tiles     probes on your own labelled tiles (--table CSV); on labelled slides (--level slide --features DIR)
  paired    PLISM's metrics on your own fields under several scanners (--table CSV)
  all       all whose data are there (--roots FILE); exit status 2 when one of them fails

histill evaluate BENCHMARK --help   every option
"""

_SOME_FAILED = 2


def run(argv: list[str]) -> int:
    """Run the command; 0 when all is done, 2 when `all` has no result for something that it was asked for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    known = (*BENCHMARKS, "all")
    if name not in known:
        raise ConfigError(
            "the first argument is a benchmark",
            got=name,
            allowed=", ".join(known),
            remedy=nearest(name, known) or "see histill evaluate --help",
        )
    prog = f"histill evaluate {name}"
    if name == "all":
        everything = configs.parse(
            AllConfig, _joined(AllConfig, rest), prog=prog, description=_first_line(AllConfig), flags=True
        )
        everything.require_complete()
        return _run_all(everything)
    kind = BENCHMARKS[name]
    config = configs.parse(kind, _joined(kind, rest), prog=prog, description=_first_line(kind), flags=True)
    config.require_complete()
    return _run_one(config)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0]


def _joined(kind: type[Any], argv: Sequence[str]) -> list[str]:
    """Gather the values of a list option that comes several times, in the singular or the plural, into one option."""
    spelled: dict[str, str] = {}
    for entry in fields(kind):
        if isinstance(entry.default, tuple):
            singular = f"--{entry.name.removesuffix('s')}"
            spelled |= {singular: f"--{entry.name}", f"{singular}s": f"--{entry.name}"}
    others: list[str] = []
    gathered: dict[str, list[str]] = {}
    values = others
    for argument in argv:
        option, equals, value = argument.partition("=")
        if option in spelled:
            values = gathered.setdefault(spelled[option], [])
            values += [value] if equals else []
        elif argument.startswith("-"):
            values = others
            others.append(argument)
        else:
            values.append(argument)
    return [*others, *(text for option, values in gathered.items() for text in (option, *values))]


def _run_one(config: BenchmarkConfig) -> int:
    from rich.console import Console

    from histill.evaluate.encoders import check_names, embedders_of, open_encoder
    from histill.evaluate.headlines import Headline
    from histill.evaluate.jobs import jobs_of
    from histill.models.machine import pick_device

    console, found = Console(stderr=True), []
    jobs = jobs_of(config)
    for job in jobs:
        if job.data is not None and not job.data.exists():
            raise ConfigError(f"the data of {job.title} are not there", where=job.data)
    pick_device(config.device)
    check_names(config.encoder)
    if not config.encoder:
        found = [(job, *job.run(None, console)) for job in jobs]
    for name in dict.fromkeys(config.encoder):
        for embedder in embedders_of(config, open_encoder(config, name)):
            found += [(job, *job.run(embedder, console)) for job in jobs]
    _print([Headline.of(job.title, result, str(folder)) for job, result, folder in found])
    print("\n".join(f"results: {folder}" for _, _, folder in found))
    return 0


def _run_all(config: AllConfig) -> int:
    from rich.console import Console

    from histill.evaluate.all import evaluate_all

    outcome = evaluate_all(config, Console(stderr=True))
    _print(outcome.done)
    for name, absent in (("failed", outcome.failed), ("missing", outcome.missing)):
        for each in absent:
            print(f"{name}: {each.title}: {each.reason.splitlines()[0]}")
    print(f"results: {config.out}/results.json, results.md, summary.json")
    return _SOME_FAILED if outcome.incomplete else 0


def _print(headlines: Sequence[Headline]) -> None:
    from histill.evaluate.headlines import as_text

    if not headlines:
        print("no results", file=sys.stderr)
        return
    print(as_text(headlines))
    for each in headlines:
        if each.note:
            print(f"{each.benchmark}, {each.encoder}, {each.pooling}: {each.note}")
