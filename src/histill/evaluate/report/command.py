"""``histill report``."""

from __future__ import annotations

from histill import config as configs
from histill.evaluate.report.config import ReportConfig

__all__ = ["run"]

_DESCRIPTION = """Put every results.json below the given folders on one page that opens offline: encoders by benchmarks
with 95 % intervals beside the published rows, the PLISM matrix, tasks, retention and cost. What was not run is shown as
missing. Beside the page comes the headline table in Markdown, for a model card; --card BUNDLE writes a bundle's own
scores into its card."""


def run(argv: list[str]) -> int:
    """Run the command; 0 when the page stands."""
    config = configs.parse(ReportConfig, argv, prog="histill report", description=_DESCRIPTION, flags=True)
    from histill.evaluate.report.render import write_report

    page = write_report(config)
    print(f"report: {page}")
    print(f"table for a model card: {page.with_suffix('.md')}")
    if config.card is not None:
        print(f"card: {config.card / 'README.md'}")
    return 0
