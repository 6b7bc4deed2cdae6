"""Make a small teacher unlike a DINOv2 ViT/14: patch 16, 256 wide, six blocks, and trained otherwise.

It learns from random weights to tell tiles apart under changes of crop, colour and stain (SimCLR: Chen et al. 2020),
and is written as a folder that timm reads. The experiment with two teachers in ``docs/results/scale.md`` uses it::

    python examples/make_second_teacher.py --tiles FOLDER --out FOLDER --steps 600

It is for experiments: it has seen some thousand tiles.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from rich.progress import track

from histill import config as configs
from histill.distill.precision import autocast_for, keep_freed_memory
from histill.distill.views import ViewConfig, make_views
from histill.models.bundle import write_bundle
from histill.tiles.loader import batches
from histill.tiles.open import open_tiles
from histill.tiles.order import positions_of

ARCHITECTURE = "vit_small_patch16_224"
MODEL_ARGS = {"img_size": 112, "dynamic_img_size": True, "embed_dim": 256, "depth": 6, "num_heads": 4}
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondTeacherConfig:
    """What the second teacher is made from."""

    tiles: Path
    """Folder of tiles."""
    out: Path
    """Folder of the bundle."""
    steps: int = 600
    """Steps of training."""
    batch_tiles: int = 128
    """Tiles of a step; each is told apart from all others."""
    learning_rate: float = 5e-4
    """AdamW; warmed up over a tenth of the steps, then a cosine to 0."""
    temperature: float = 0.2
    """Of the softmax over cosine similarities."""
    seed: int = 7
    """Seed of weights, order and views."""


def main(argv: list[str]) -> None:
    """Train, and write the bundle."""
    config = configs.parse(
        SecondTeacherConfig, argv, prog="make_second_teacher.py", description="Make a second teacher."
    )
    cpu = torch.device("cpu")
    keep_freed_memory(cpu)
    torch.manual_seed(config.seed)
    model = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
    width = model.embed_dim
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, 128))
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=config.learning_rate, weight_decay=0.05)
    warm = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps - warm),
        ],
        [warm],
    )
    views = ViewConfig(global_px=112, local_px=0, n_global=2, n_local=0, teacher_view="same")
    source = open_tiles(config.tiles)
    stream = batches(
        source, lambda step: positions_of(step * config.batch_tiles, config.batch_tiles), 0, config.steps, config.seed
    )
    for batch in track(stream, total=config.steps, description="training"):
        crops_GBCHW = make_views(batch.tiles_BCHW, batch.sizes_B2, batch.positions_B, views, config.seed).global_GBCHW
        with autocast_for(cpu, "auto"):
            codes_GBE = head(model((crops_GBCHW.flatten(0, 1) - 0.5) / 0.5)).unflatten(0, crops_GBCHW.shape[:2])
        codes_GBE = F.normalize(codes_GBE.float(), dim=-1)
        scores_BB = codes_GBE[0] @ codes_GBE[1].T / config.temperature
        which_B = torch.arange(len(scores_BB))
        loss = (F.cross_entropy(scores_BB, which_B) + F.cross_entropy(scores_BB.T, which_B)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    print(f"last loss {loss.item():.3f}")
    write_bundle(
        config.out,
        model.eval(),
        SimpleNamespace(architecture=ARCHITECTURE, model_args=MODEL_ARGS),
        mean=HALF,
        std=HALF,
        input_px=112,
        provenance={"made_by": "examples/make_second_teacher.py", "steps": config.steps, "last_loss": loss.item()},
        card="# A second teacher\n\nFor experiments with two teachers. Made by `examples/make_second_teacher.py`.\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
