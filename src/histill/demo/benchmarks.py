"""The benchmarks, run for real, on small folders of drawn tissue in the layouts of the originals.

``benchmarks/data`` holds the folders, ``benchmarks/results`` what ``histill evaluate`` makes of them; both are kept, so
that a demo that was cut short does only what is missing. CoNSeP is left out, since its decoder trains for many minutes,
and Camelyon16, since the few slides that the demo has time to draw teach no model more than chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from histill.evaluate.all import read_roots
from histill.evaluate.config import AllConfig
from histill.evaluate.encoders import embedders_of
from histill.evaluate.headlines import Headline
from histill.evaluate.report.config import ReportConfig
from histill.evaluate.report.render import write_report
from histill.models.encoder import Encoder
from histill.synthetic.benchmarks import BENCHMARKS, ROOTS_JSON, write_benchmarks
from histill.tiles.pool import cores

__all__ = ["NAMES", "PAGE", "TILES", "run_benchmarks"]

NAMES = tuple(name for name in BENCHMARKS if name not in ("eva/consep", "eva/cam16"))
"""The benchmarks of the demo."""
TILES = 32
"""How large they are, as :func:`histill.synthetic.benchmarks.write_benchmarks` counts."""
PAGE = "benchmarks.html"
"""The page of ``histill report``, beside the demo's own."""

_TITLE = "Benchmarks on drawn tissue: a demo, not comparable with published numbers"
_MOST_WORKERS = 8


def run_benchmarks(demo: Path, models: Mapping[str, Encoder], *, seed: int, console: Console) -> dict[str, Any]:
    """Draw the folders, run every benchmark on every model, and write the page.

    Parameters
    ----------
    demo
        The demo's folder; gets ``benchmarks/`` and :data:`PAGE`.
    models
        ``teacher``, ``student`` and ``untrained``; they are called so on the page.
    seed
        Of what is drawn.
    console
        For progress.

    Returns
    -------
    dict
        JSON-ready: ``names``, ``tiles``, and ``headlines``: benchmark, score, and of each model value, low, high and
        note of the score that stands for the benchmark.
    """
    data, results = demo / "benchmarks" / "data", demo / "benchmarks" / "results"
    if not data.exists():
        write_benchmarks(data, seed=seed, tiles=TILES, names=NAMES, workers=min(_MOST_WORKERS, cores()))
    config = AllConfig(encoder=tuple(models), roots=data / ROOTS_JSON, out=results, device="cpu")
    jobs, _ = read_roots(data / ROOTS_JSON, config)
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        model.name = name
        (embedder,) = embedders_of(config, model)
        for job in jobs:
            result, folder = job.run(embedder, console)
            found = Headline.of(job.title, result, folder.relative_to(demo).as_posix())
            row = rows.setdefault(job.title, {"benchmark": job.title, "score": found.score})
            row[name] = {"value": found.value, "low": found.low, "high": found.high, "note": found.note}
    write_report(
        ReportConfig(
            folders=(results,),
            out=demo / PAGE,
            title=_TITLE,
            student="student",
            teacher="teacher",
            untrained="untrained",
        )
    )
    return {"names": list(NAMES), "tiles": TILES, "headlines": list(rows.values())}
