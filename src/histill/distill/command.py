"""``histill distill``."""

from __future__ import annotations

import sys
from pathlib import Path

from histill import config as configs
from histill.distill.config import DistillConfig
from histill.distill.presets import PRESETS
from histill.errors import ConfigError, nearest

__all__ = ["run"]

_USAGE = """usage: histill distill PRESET --teacher NAME --tiles FOLDER --out RUN (--steps N | --minutes M) [OPTIONS]
       histill distill RUN/config.json [OPTIONS]
       torchrun --nproc-per-node 8 -m histill distill ...      one process for each GPU; the losses stay the same

Teach a small student from a large frozen teacher. The same command again goes on where the last one stopped.

presets:
  h0-mini   the paper's architecture (ViT-B/14) with DINOv2's recipe: DINO + iBOT + KoLeo, for GPUs
  tokens    no heads: cosine + smooth-L1 on standardised teacher tokens
  cpu       DINO + iBOT + KoLeo with a ViT-Ti student and small crops, sized for 2 cores

histill distill PRESET --help   every option with the preset's values
"""


def run(argv: list[str]) -> int:
    """Run the command; 0 when the run is finished or was stopped in good order."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name in PRESETS:
        default = PRESETS[name]
    elif name.endswith(".json"):
        default = configs.load(DistillConfig, Path(name))
    else:
        raise ConfigError(
            "the first argument is a preset or a run's config.json",
            got=name,
            allowed=", ".join(PRESETS),
            remedy=nearest(name, PRESETS) or "see histill distill --help",
        )
    config = configs.parse(
        DistillConfig,
        rest,
        prog=f"histill distill {name}",
        description="Teach a small student from a large frozen teacher.",
        default=default,
    )
    config.require_complete()
    from histill import distributed
    from histill.distill.run import distill
    from histill.distill.table import print_summary

    ranks = distributed.join()
    try:
        summary = distill(config)
        if summary is None or not ranks.first:
            return 0
        several = summary.get("students")
        for name, each in several.items() if several is not None else [(config.student[0], summary)]:
            print_summary(each, sys.stdout, title=name if several is not None else None)
        for name, reason in summary.get("failed", {}).items():
            print(f"error: {name} learnt no more from {reason}", file=sys.stderr)
        return 1 if summary.get("failed") else 0
    finally:
        distributed.leave(ranks)
