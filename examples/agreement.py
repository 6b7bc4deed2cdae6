"""Linear CKA between the class tokens of models, each pair of them, on the tiles of one split of a table.

python examples/agreement.py --models local-dir:A local-dir:B RUN/student --table TILES/mitosis.csv --split test
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from histill import config as configs
from histill.distill.checking import sample_tiles
from histill.distill.precision import autocast_for, plain_attention_on_cpu
from histill.evaluate.agreement import linear_cka
from histill.evaluate.embedding import EncoderEmbedder
from histill.models import load_encoder
from histill.tiles.images import ImageFolder, read_table


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementConfig:
    """Which models, on which tiles."""

    models: tuple[str, ...]
    """Names as `histill distill --teacher` takes them."""
    table: Path
    """CSV with path and split, beside the tiles."""
    split: str = "test"
    """Which rows; empty: all of them."""
    input_px: int = 112
    """Side of the tiles; each model gets the nearest multiple of its patch."""


def main(argv: list[str]) -> None:
    """Embed the tiles with each model, and print CKA of every pair."""
    config = configs.parse(AgreementConfig, argv, prog="agreement.py", description="CKA between models.")
    rows = read_table(config.table, ["path", "split"]) if config.split else []
    others = [row["path"] for row in rows if row["split"] != config.split]
    source = ImageFolder.scan(config.table.parent, table=config.table, hold_out=others)
    tiles_NCHW = sample_tiles(source, len(source), config.input_px)
    tiles_NHWC = tiles_NCHW.permute(0, 2, 3, 1).numpy()
    features = {}
    for name in config.models:
        encoder = load_encoder(name)
        plain_attention_on_cpu(encoder, torch.device("cpu"))
        embedder = EncoderEmbedder(
            encoder=encoder,
            name=name,
            pooling="cls",
            input_px=max(1, round(config.input_px / encoder.patch_px)) * encoder.patch_px,
            autocast=autocast_for(torch.device("cpu"), "auto"),
            batch=64,
        )
        features[name] = np.concatenate(
            [embedder.embed(tiles_NHWC[first : first + 64]) for first in range(0, len(tiles_NHWC), 64)]
        )
    print(f"{len(tiles_NHWC)} tiles of {config.table.name}, split {config.split or 'any'}; linear CKA of class tokens")
    for name, own in features.items():
        print(f"{name:50}", *(f"{linear_cka(own, other):.3f}" for other in features.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
