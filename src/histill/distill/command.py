"""``histill distill``."""

from __future__ import annotations

import dataclasses
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

histill distill PRESET --teacher NAME --plan   parameters, operations, memory, days and GPU-hours, before anything is
                                               loaded (--plan.world 8 --plan.gpu h100 --plan.utilisation 0.4)
histill distill PRESET --help          every option with the preset's values
histill distill PRESET --plan --help   the options of a plan
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
        if (Path(name).parent / "plan.json").exists():  # that run's own: its paths may be meant from another folder
            default = dataclasses.replace(default, out=Path(name).parent)
    else:
        raise ConfigError(
            "the first argument is a preset or a run's config.json",
            got=name,
            allowed=", ".join(PRESETS),
            remedy=nearest(name, PRESETS) or "see histill distill --help",
        )
    planning = "--plan" in rest
    if planning and {"-h", "--help"} & set(rest):
        return _plan_help(name)
    options, plan_options = _split(rest)
    config = configs.parse(
        DistillConfig,
        options,
        prog=f"histill distill {name}",
        description="Teach a small student from a large frozen teacher.",
        default=default,
    )
    if planning:
        return _plan(config, plan_options, name)
    if plan_options:
        raise ConfigError("options of a plan without --plan", got=" ".join(plan_options), remedy="add --plan")
    config.require_complete()
    from histill import distributed
    from histill.distill.precision import keep_freed_memory
    from histill.distill.run import distill
    from histill.distill.table import print_summary
    from histill.models.machine import pick_device

    keep_freed_memory(pick_device(config.device))  # of the program: callers of `histill.distill` keep their allocator
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


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options of the run, and those of the plan (``--plan.NAME VALUES``) without their prefix."""
    options: list[str] = []
    plan_options: list[str] = []
    values = options
    for argument in argv:
        if argument == "--plan":
            values = options
            continue
        if argument.startswith("--"):
            values = plan_options if argument.startswith("--plan.") else options
        values.append(argument.replace("--plan.", "--", 1) if values is plan_options else argument)
    return options, plan_options


def _plan_help(name: str) -> int:
    from histill.distill.plan_config import PlanConfig

    configs.parse(
        PlanConfig,
        ["--help"],
        prog=f"histill distill {name} --plan",
        description="What a run would cost. Write these options with plan. before the name, as --plan.world 8; those "
        f"of the run stand in histill distill {name} --help.",
    )
    return 0


def _plan(config: DistillConfig, argv: list[str], name: str) -> int:
    from rich.console import Console

    from histill.distill.plan import make_plan, print_plan
    from histill.distill.plan_config import PlanConfig

    if not config.teacher:
        raise ConfigError("the teacher is missing", where="--teacher", remedy="give --teacher NAME")
    wanted = configs.parse(
        PlanConfig, argv, prog=f"histill distill {name} --plan", description="What a run would cost."
    )
    print_plan(config, wanted, make_plan(config, wanted), Console())
    return 0
