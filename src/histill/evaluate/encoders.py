"""From an encoder's name to embedders, file-safe names, and the tiles of a slide.

Shapes: N tiles, D features.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.errors import ConfigError, DataError
from histill.evaluate.config import EncoderConfig
from histill.evaluate.embedding import Embedder, EncoderEmbedder
from histill.evaluate.eva.embedded import EmbedSlide
from histill.models.encoder import Embedding, Encoder, load_encoder
from histill.models.machine import pick_device
from histill.models.sources import resolve
from histill.slides.grid import tile_origins, tissue_shares
from histill.slides.open import open_slide
from histill.slides.options import TissueOptions
from histill.slides.render import TileRenderer
from histill.slides.scale import resolve_scale
from histill.slides.tissue import tissue_mask

__all__ = ["check_names", "embedders_of", "open_encoder", "safe_name", "slide_embedder"]

_LONGEST = 120
"""Characters of a folder's name; file systems take 255 bytes."""
_TISSUE_LEAST = 0.4
"""Share of tissue of a slide's tile at least, as in a tile set."""


def safe_name(name: str) -> str:
    """Make a folder's name of an encoder's: letters, digits, ``.``, ``-``; ``_`` for the rest.

    A long one keeps its end and gets the start of its SHA-256.
    """
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "_"
    if len(safe) <= _LONGEST:
        return safe
    return f"{hashlib.sha256(name.encode()).hexdigest()[:8]}_{safe[9 - _LONGEST :]}"


def check_names(names: Sequence[str]) -> None:
    """Refuse names that mean no model, or that share a folder, before anything is loaded.

    Raises
    ------
    ModelError
        Unknown or ambiguous.
    ConfigError
        Two names whose results would lie in one folder.
    """
    taken: dict[str, str] = {}
    for name in dict.fromkeys(names):
        resolve(name)
        if (safe := safe_name(name)) in taken:
            raise ConfigError(
                "the results of two encoders would lie in one folder",
                where="--encoder",
                got=f"{taken[safe]} and {name}, both {safe}",
                remedy="rename one, or evaluate it into another --out",
            )
        taken[safe] = name


def open_encoder(config: EncoderConfig, name: str) -> Encoder:
    """Load one of the encoders of a command onto its device."""
    return load_encoder(name, input_px=config.input_px or None, device=pick_device(config.device))


def embedders_of(config: EncoderConfig, encoder: Encoder) -> list[EncoderEmbedder]:
    """One embedder per pooling; ``auto`` and the pooling that it means are one."""
    poolings: list[Embedding] = [encoder.embedding if each == "auto" else each for each in config.pooling]
    first = EncoderEmbedder.of(
        encoder,
        name=encoder.name,
        pooling=poolings[0],
        input_px=config.input_px or None,
        precision=config.precision,
        batch=config.batch,
    )
    others = [pooling for pooling in dict.fromkeys(poolings) if pooling != poolings[0]]
    return [first, *(replace(first, pooling=pooling) for pooling in others)]  # the weights are hashed once


def slide_embedder(embedder: Embedder, *, block: int = 64) -> EmbedSlide:
    """Embed the tiles of a slide that have tissue: a grid without overlap at an exact scale.

    Tiles with at least 40 % tissue; where a small piece fills none so far, the tile with the most. Where a slide has
    more than ``max_tiles``, as many are drawn with seed 0. Bare TIFF tags count as a scale: the sets of the protocol
    are known, and those of PANDA say it nowhere else.

    Parameters
    ----------
    embedder
        Who embeds.
    block
        Tiles in memory at once.

    Returns
    -------
    EmbedSlide
        Gives float32 (N, D) for a slide's path, with N at most ``max_tiles``.

    Raises
    ------
    DataError
        When it is called: a slide that cannot be read, states no scale, is coarser than asked for, or has no tissue.
    """

    def embed(path: Path, *, mpp: float, tile_px: int, max_tiles: int) -> NDArray[np.float32]:
        slide = open_slide(path)
        try:
            slide_mpp = resolve_scale(slide.scale_facts, trust_tiff=True, where=path).mpp
            renderer = TileRenderer(slide, slide_mpp, mpp, tile_px)
            full, options = slide.levels[0], TissueOptions()
            longest = max(full.width, full.height)
            small = slide.thumbnail(max(1, round(longest * slide_mpp / options.mpp)))
            thumbnail_mpp = slide_mpp * longest / max(small.present_HW.shape)
            mask_HW = tissue_mask(small.image_HW3, small.present_HW, thumbnail_mpp, options)
            origins_N2 = tile_origins(full.width, full.height, renderer.extent_px, renderer.extent_px)
            tissue_N = tissue_shares(mask_HW, full.width, full.height, origins_N2, renderer.extent_px)
            if not (tissue_N > 0).any():
                raise DataError("this slide has no tile with tissue", where=path, got=f"{len(origins_N2)} tiles")
            chosen_N2 = origins_N2[tissue_N >= min(_TISSUE_LEAST, tissue_N.max())]
            order_N = np.sort(np.random.default_rng(0).permutation(len(chosen_N2))[:max_tiles])
            found = []
            for start in range(0, len(order_N), block):
                places = chosen_N2[order_N[start : start + block]]
                found.append(embedder.embed(np.stack([renderer.read(int(x), int(y)) for x, y in places])))
            return np.concatenate(found)
        finally:
            slide.close()

    return embed
