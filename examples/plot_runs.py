"""Draw the curves of one or more runs: loss, probe, scanner retrieval, agreement and effective rank over tiles seen.

``python examples/plot_runs.py RUN [RUN ...] --out curves.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from histill import files
from histill.distill.record import read_rows

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Read the runs' metrics and write one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for run in arguments.runs:
        _draw(run, axes)
    for axis in axes.flat:
        axis.set_xlabel("tiles seen, thousands")
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.suptitle("dashed: teacher, dotted: untrained student", fontsize=10, color="0.3")
    figure.savefig(arguments.out, dpi=110)


def _draw(run: Path, axes: Any) -> None:
    rows = read_rows(run / "metrics.jsonl")
    baseline = files.read_json(run / "baseline.json")
    steps = [row for row in rows if "loss" in row]
    seen = np.cumsum([row["tiles"] for row in steps]) / 1000
    window = max(1, len(steps) // 30)
    smooth = np.convolve([row["loss"] for row in steps], np.ones(window) / window, mode="valid")
    (line,) = axes[0, 0].plot(seen[window - 1 :], smooth, label=run.name)
    axes[0, 0].set_title(f"loss (mean over {window} steps)")
    checks = [row for row in rows if "check" in row]
    if (run / "summary.json").exists():
        summary = files.read_json(run / "summary.json")
        checks.append({"step": len(steps) - 1, "check": summary | {"scores": summary["student"]}})
    places = [seen[row["step"]] for row in checks]
    start = baseline.get("start")  # the scores of a pruned start, before any step
    curves = [
        (axes[0, 1], "mitosis", "linear_auc", "mitosis: AUC of the linear probe"),
        (axes[0, 2], "multiscanner", "top_10", "scanner retrieval: top-10"),
        (axes[1, 2], "multiscanner", "top_1", "scanner retrieval: top-1"),
    ]
    for axis, table, metric, title in curves:
        axis.set_title(title)
        values = [row["check"]["scores"][table][metric] for row in checks]
        axis.plot(
            [0, *places] if start else places,
            [start[table][metric], *values] if start else values,
            "o-",
            color=line.get_color(),
        )
        axis.axhline(baseline["teacher"][table][metric], ls="--", color="0.3", lw=1)
        axis.axhline(baseline["untrained"][table][metric], ls=":", color="0.3", lw=1)
    for axis, name, title in (
        (axes[1, 0], "cka", "linear CKA with the teacher"),
        (axes[1, 1], "student_rank", "effective rank of the class token"),
    ):
        axis.set_title(title)
        axis.plot(places, [row["check"]["agreement"][name] for row in checks], "o-", color=line.get_color())
    if checks:
        axes[1, 1].axhline(checks[-1]["check"]["agreement"]["teacher_rank"], ls="--", color="0.3", lw=1)


if __name__ == "__main__":
    main()
