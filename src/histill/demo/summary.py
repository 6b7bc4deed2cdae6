"""``summary.json``: every number of a demo, its settings, and the machine that it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from histill import __version__
from histill import config as configs
from histill.demo.config import DemoConfig
from histill.demo.measure import Measured
from histill.demo.prepare import data_facts
from histill.distill import DistillConfig
from histill.distill.record import read_rows
from histill.evaluate import retention
from histill.synthetic import LABELS_CSV, PAIRED_CSV

__all__ = ["LABELS", "PAIRED", "curves", "summarise"]

LABELS, PAIRED = Path(LABELS_CSV).stem, Path(PAIRED_CSV).stem
"""The names of the two tables in the scores."""


def summarise(
    config: DemoConfig, told: DistillConfig, run: dict[str, Any], measured: Measured, metrics: Path
) -> dict[str, Any]:
    """Gather the numbers.

    Parameters
    ----------
    config
        The demo's settings.
    told
        Those of its distillation.
    run
        What :func:`histill.distill.run.distill` returned.
    measured
        What :func:`histill.demo.measure.measure` returned.
    metrics
        ``metrics.jsonl`` of the run.

    Returns
    -------
    dict
        JSON-ready. ``headline`` holds the three numbers of the report's first sentence; a retention that does not
        exist is None, with its reason in ``no_retention``.
    """
    scores = {name: run[name] for name in ("teacher", "student", "untrained")}
    rows = {table: retention.report(*(scores[name][table] for name in scores)) for table in scores["student"]}
    kept = {table: {row.metric: row.retention for row in found} for table, found in rows.items()}
    return {
        "headline": {
            "retention": kept[LABELS]["linear_auc"],
            "scanner_top_1": {name: scores[name][PAIRED]["top_1"] for name in scores},
            "speed_ratio": measured.speed["ratio"],
        },
        "scores": scores,
        "retention": kept,
        "no_retention": {
            table: {row.metric: row.reason for row in found if row.reason} for table, found in rows.items()
        },
        "agreement": run["agreement"],
        "collapse_warning": run["warning"],
        "models": measured.models,
        "speed": measured.speed,
        "neighbours": measured.neighbours,
        "start": run["start"],
        "training": _training(run, metrics),
        "data": data_facts(config.out),
        "seed": config.seed,
        "config": {"demo": configs.to_dict(config), "distill": configs.to_dict(told)},
        **_surroundings(),
    }


def _training(run: dict[str, Any], metrics: Path) -> dict[str, Any]:
    """What the run did, and its checks, the final one included."""
    checks = [
        {"step": row["step"] + 1, **row["check"]["agreement"], "scores": row["check"]["scores"]}
        for row in read_rows(metrics)
        if "check" in row
    ]
    checks.append({"step": run["steps"], **run["agreement"], "scores": run["student"]})
    return {name: run[name] for name in ("steps", "tiles_seen", "seconds", "shares", "plan")} | {"checks": checks}


def _surroundings() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "versions": {"histill": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def curves(metrics: Path) -> dict[str, list[float]]:
    """Read step, learning rate, loss and its terms from ``metrics.jsonl``, one entry per step."""
    rows = [row for row in read_rows(metrics) if "loss" in row]
    names = [
        name for name in ("step", "lr", "loss", "dino", "ibot", "token_cls", "token_patch", "koleo") if name in rows[0]
    ]
    return {name: [float(f"{row[name]:.6g}") for row in rows] for name in names}


def _processor() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
