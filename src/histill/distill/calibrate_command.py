"""``histill calibrate``: fold a per-channel standardisation of the class token into a finished student."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from histill import config as configs
from histill.errors import ConfigError

__all__ = ["CalibrateConfig", "calibrate", "run"]

_BATCH = 64
_LARGEST_SAMPLE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """Which bundle, on which tiles, and where the calibrated one is written."""

    bundle: Path | None = None
    """Folder of the finished model bundle."""
    tiles: Path | None = None
    """Tile images (a folder of them, or a set of histill tile) on which mean and variance are measured."""
    out: Path | None = None
    """Folder of the new bundle; the old one stays as it is."""
    tables: tuple[Path, ...] = ()
    """CSV tables to report on, before and after. None given: those that lie directly in the folder of tiles."""
    input_px: int = 0
    """Side to which tiles are resized; 0: the bundle's own input size."""

    def __post_init__(self) -> None:
        """Check the size."""
        if self.input_px < 0:
            raise ConfigError("a size cannot be negative", where="--input-px", got=self.input_px, allowed="0 or more")


def run(argv: list[str]) -> int:
    """Run the command."""
    config = configs.parse(
        CalibrateConfig,
        argv,
        prog="histill calibrate",
        description="Fold a per-channel standardisation of the class token into a finished student. Linear probes "
        "do not change; cosines between unlike tiles fall, and retrieval usually gains. Both scores are shown.",
    )
    for name, value in (("bundle", config.bundle), ("tiles", config.tiles), ("out", config.out)):
        if value is None:
            raise ConfigError(f"the {name} is missing", where=f"--{name}", remedy="see histill calibrate --help")
    print_calibration(calibrate(config), sys.stdout)
    return 0


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Write a calibrated copy of a bundle; returns its scores before and after.

    Raises
    ------
    ConfigError
        The new bundle would replace the old one, that one is calibrated already, or ``tiles`` are slides.
    ModelError, DataError
        A bundle, tiles or tables that cannot be used.
    """
    import torch

    from histill.distill.checking import Checker, check_tables, held_out_paths, sample_tiles
    from histill.models import channel_statistics, fold_standardisation, read_bundle, write_bundle
    from histill.tiles.open import open_tiles

    assert config.bundle is not None
    assert config.tiles is not None
    assert config.out is not None
    if config.out.resolve() == config.bundle.resolve():
        raise ConfigError("the new bundle would replace the old one", where="--out", remedy="give another folder")
    bundle = read_bundle(config.bundle)
    if "calibration" in bundle.provenance:
        raise ConfigError("this bundle is calibrated already", where=config.bundle, remedy="give the original bundle")
    encoder = bundle.encoder
    tables = config.tables or check_tables(config.tiles)
    source = open_tiles(config.tiles, hold_out=held_out_paths(config.tiles, tables))
    side = config.input_px or encoder.input_px
    autocast = torch.autocast("cpu", enabled=False)
    checker = Checker(tables, source, side, min(len(source), 512), autocast)
    before = checker.scores(encoder)
    ranks = [checker.rank(encoder)]
    tiles_NCHW = sample_tiles(source, _LARGEST_SAMPLE, side)
    mean_D, std_D = channel_statistics(encoder, tiles_NCHW.split(_BATCH))
    fold_standardisation(encoder.model, mean_D, std_D)
    after = checker.scores(encoder)
    ranks.append(checker.rank(encoder))
    report = {"tiles": len(tiles_NCHW), "before": before, "after": after, "effective_rank": ranks}
    write_bundle(
        config.out,
        encoder.model,
        bundle,
        mean=encoder.mean,
        std=encoder.std,
        input_px=encoder.input_px,
        embedding=encoder.embedding,
        licence=encoder.licence,
        provenance=bundle.provenance | {"calibration": report},
    )
    return report


def print_calibration(report: dict[str, Any], file: TextIO) -> None:
    """Show each metric before and after."""
    from rich.console import Console
    from rich.table import Table

    table = Table("table", "metric", "before", "after", title=f"calibrated on {report['tiles']} tiles")
    for name, metrics in report["before"].items():
        for metric, value in metrics.items():
            table.add_row(name, metric, f"{value:.3f}", f"{report['after'][name][metric]:.3f}")
    table.add_row("training tiles", "effective_rank", *(f"{rank:.1f}" for rank in report["effective_rank"]))
    Console(file=file).print(table)
