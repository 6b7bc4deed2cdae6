"""``histill demo``."""

from __future__ import annotations

from histill import config as configs
from histill.demo.config import DemoConfig

__all__ = ["run"]

_DESCRIPTION = """Draw slides, cut them into tiles, teach a small student from the teacher that ships with histill,
check it, run every benchmark on small drawn folders, and write report.html, benchmarks.html and summary.json. Needs no
network and no GPU; about 4 minutes on 2 cores. The same command again says that the demo is finished, or goes on where
it was cut short."""


def run(argv: list[str]) -> int:
    """Run the command; 0 when the demo is finished or was stopped in good order."""
    config = configs.parse(DemoConfig, argv, prog="histill demo", description=_DESCRIPTION)
    from histill.demo.run import demo

    report = demo(config)
    if report is None:
        print("stopped; the same command goes on from there")
    else:
        print(f"report: {report}")
    return 0
