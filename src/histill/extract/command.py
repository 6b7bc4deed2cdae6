"""``histill extract``."""

from __future__ import annotations

import sys

from rich.console import Console

from histill import config as configs
from histill.errors import ConfigError
from histill.extract.config import ExtractConfig

__all__ = ["run"]

_DESCRIPTION = """Slides and a model -> one feature file a slide, as TRIDENT's and CLAM's tools read them. The same
command again does only what is missing, also inside a slide. Exit status: 0 all slides done, 2 some slides failed
(slides.csv says why), 1 the run could not be carried out.

histill extract SLIDES... --model BUNDLE --out OUT

histill extract SLIDES... --model BUNDLE --out OUT --coords PATCHES: tiles as TRIDENT or CLAM placed them"""

_SOME_FAILED = 2


def run(argv: list[str]) -> int:
    """Run the command; the exit status tells whether slides failed."""
    config = configs.parse(ExtractConfig, argv, prog="histill extract", description=_DESCRIPTION, flags=True)
    if not config.slides:
        raise ConfigError("no slides are given", remedy="histill extract SLIDES... --model M --out OUT")
    from histill.extract.run import extract_slides

    outcome = extract_slides(config, Console(stderr=True))
    tiles = sum(record.tiles for record in outcome.done)
    unreadable = sum(record.unreadable for record in outcome.done)
    there = f"; {outcome.there} there already" if outcome.there else ""
    print(f"{len(outcome.done)} slides done, {tiles} tiles{there}")
    if unreadable:
        print(f"{unreadable} tiles could not be read and have no feature: {config.out}/unreadable.csv")
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} slides were taken by another process")
    if outcome.failed:
        print(f"{len(outcome.failed)} slides failed; why is in {config.out}/slides.csv:")
        for record in outcome.failed:
            print(f"{record.slide}: {record.error}", file=sys.stderr)
    print(f"features: {config.out}")
    return _SOME_FAILED if outcome.failed else 0
