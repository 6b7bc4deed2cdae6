"""All views of a batch of tiles, made on the tiles' device.

Each draw is a hash of (seed, stream, position), so the views of a sample depend on its position in the run alone:
not on the other tiles of its batch, on the number of processes or on where a run was resumed.

Shapes: B tiles; G global and L local crops per tile, K either of them; N = B * K crops, tile by tile; C colours; H and
W of the padded tiles or of the crops; P side of a crop; S side of the square that holds a tile; U draws per crop; 34:
a matrix and a constant.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histill.distill.views.colour import (
    COLOUR_DRAWS,
    DARKEST,
    SCANNER_DRAWS,
    STAIN_DRAWS,
    add_noise,
    apply_affine,
    apply_stain,
    draw_look,
)
from histill.distill.views.config import ViewConfig
from histill.distill.views.geometry import GEOMETRY_DRAWS, Resampler, draw_boxes, line_tables
from histill.errors import ConfigError
from histill.tiles.order import uniforms

__all__ = ["Views", "make_views"]

GLOBAL_STREAM = 0x61000
LOCAL_STREAM = 0x62000
"""Crop k of a kind draws from stream + k."""
OTHER_STREAM = 0x63000
"""The teacher's rendering of global crop k, where it has one of its own."""

BLUR_DRAWS = 2
"""Uniform draws per crop: whether, and how much."""

CPU_CHUNK = 2**20
GPU_CHUNK = 2**25
"""Numbers in the largest array of one step. On a CPU a step must stay in the cache: that is half of its speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """The views of a batch: float32, 0 to 1, not normalised."""

    global_GBCHW: Tensor
    """Global crops, as the student sees them."""
    local_LBCHW: Tensor
    """Local crops."""
    clean_GBCHW: Tensor
    """Global crops as the teacher sees them: ``global_GBCHW`` itself, the same crops unchanged, or otherwise."""


def make_views(
    tiles_BCHW: Tensor,
    sizes_B2: NDArray[np.int64],
    positions_B: NDArray[np.int64],
    config: ViewConfig,
    seed: int,
    *,
    out: Views | None = None,
) -> Views:
    """Cut and change all global and local crops of a batch of tiles.

    Blur comes first, then stain and gamma, then colour and mixing, then noise; values are cut to 0..1 once, at the end.

    Parameters
    ----------
    tiles_BCHW
        uint8, RGB, on the device that shall do the work; smaller tiles stand at the top left, the rest is never read.
    sizes_B2
        True height and width of each tile, pixels.
    positions_B
        Each tile's position in the run.
    config
        With ``global_px``, and ``local_px`` if there are local crops, chosen: not 0.
    seed
        The run's seed.
    out
        Views that are no longer needed: their memory is used again where the shapes agree (fresh memory is slow).

    Raises
    ------
    ConfigError
        If a crop size has not been chosen.
    """
    for name, needed in (("global_px", True), ("local_px", config.n_local > 0)):
        if needed and getattr(config, name) == 0:
            raise ConfigError("the size of the crops is not chosen", where=f"views.{name}", got=0, allowed="1 or more")
    B, C, _, _ = tiles_BCHW.shape
    assert (tiles_BCHW.dtype, C) == (torch.uint8, 3), "tiles are uint8, (B, 3, H, W)"
    assert len(sizes_B2) == len(positions_B) == B, "one size and one position for each tile"
    views = _allocate(B, config, tiles_BCHW.device, out)
    allowed = torch.get_num_threads()
    threads = min(B, allowed) if tiles_BCHW.device.type == "cpu" else 1
    if threads == 1:
        _fill(views, tiles_BCHW, sizes_B2, positions_B, config, seed)
        return views

    # On a CPU each thread makes the views of its own tiles. Threads inside each operation would wait for one another a
    # hundred times per batch, which costs a factor of ten where other processes use the same cores.
    def part(tiles: slice) -> None:
        torch.set_num_threads(1)
        own = Views(**{name: getattr(views, name)[:, tiles] for name in Views.__slots__})
        _fill(own, tiles_BCHW[tiles], sizes_B2[tiles], positions_B[tiles], config, seed)

    edges = [B * part // threads for part in range(threads + 1)]
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, map(slice, edges, edges[1:])))
    finally:
        torch.set_num_threads(allowed)
    return views


def _allocate(B: int, config: ViewConfig, device: torch.device, out: Views | None) -> Views:
    """Memory for the views of B tiles, that of ``out`` where it fits."""

    def memory(count: int, crop_px: int, used: Tensor | None) -> Tensor:
        shape = (count, B, 3, crop_px, crop_px)
        fits = used is not None and used.shape == shape and used.device == device
        return used if used is not None and fits else torch.empty(shape, device=device)

    global_GBCHW = memory(config.n_global, config.global_px, None if out is None else out.global_GBCHW)
    local_LBCHW = memory(config.n_local, config.local_px, None if out is None else out.local_LBCHW)
    clean_GBCHW = global_GBCHW
    if config.teacher_view != "same":
        usable = out is not None and out.clean_GBCHW is not out.global_GBCHW
        clean_GBCHW = memory(config.n_global, config.global_px, out.clean_GBCHW if out is not None and usable else None)
    return Views(global_GBCHW=global_GBCHW, local_LBCHW=local_LBCHW, clean_GBCHW=clean_GBCHW)


@torch.no_grad()
def _fill(
    views: Views,
    tiles_BCHW: Tensor,
    sizes_B2: NDArray[np.int64],
    positions_B: NDArray[np.int64],
    config: ViewConfig,
    seed: int,
) -> None:
    """Make the views, in steps that are small enough for the cache."""
    B, _, H, W = tiles_BCHW.shape
    tile_px = max(H, W)

    def kind(
        config: ViewConfig, out_KBCHW: Tensor, area: tuple[float, float], stream: int, look_stream: int | None = None
    ) -> _Kind:
        return _Kind(out_KBCHW, sizes_B2, positions_B, config, seed, area, stream, look_stream or stream, tile_px)

    kinds = [kind(config, views.global_GBCHW, config.global_area, GLOBAL_STREAM)]
    if config.n_local:
        kinds.append(kind(config, views.local_LBCHW, config.local_area, LOCAL_STREAM))
    if config.teacher_view == "clean":
        unchanged = replace(config, colour=0.0, stain=0.0, scanner=0.0, blur_probability=0.0)
        kinds.append(kind(unchanged, views.clean_GBCHW, config.global_area, GLOBAL_STREAM))
    elif config.teacher_view == "other":
        kinds.append(kind(config, views.clean_GBCHW, config.global_area, GLOBAL_STREAM, OTHER_STREAM))
    budget = CPU_CHUNK if tiles_BCHW.device.type == "cpu" else GPU_CHUNK
    chunk = max(1, budget // max(each.numbers_per_tile for each in kinds))
    for first in range(0, B, chunk):
        stop = min(first + chunk, B)
        tables_B2SCS = line_tables(tiles_BCHW[first:stop])
        for each in kinds:
            each.write(tables_B2SCS, first, stop)


class _Kind:
    """The crops of one kind (global, local, clean) of some tiles: what is drawn for them, and where they go."""

    def __init__(
        self,
        out_KBCHW: Tensor,
        sizes_B2: NDArray[np.int64],
        positions_B: NDArray[np.int64],
        config: ViewConfig,
        seed: int,
        area: tuple[float, float],
        first_stream: int,
        look_stream: int,
        tile_px: int,
    ) -> None:
        self._out_KBCHW, device = out_KBCHW, out_KBCHW.device
        self._work: Tensor | None = None  # kept from step to step: fresh memory is slow on a CPU
        K, B, C, _, P = out_KBCHW.shape
        self.numbers_per_tile = K * P * C * tile_px
        parts = np.cumsum([GEOMETRY_DRAWS, BLUR_DRAWS, COLOUR_DRAWS, STAIN_DRAWS, SCANNER_DRAWS])

        def draws(stream: int) -> list[NDArray[np.float64]]:
            uniform_KBU = np.stack([uniforms(seed, stream + k, positions_B, int(parts[-1])) for k in range(K)])
            return np.split(uniform_KBU.swapaxes(0, 1).reshape(K * B, -1), parts[:-1], axis=1)

        geometry_NU, *rest = draws(first_stream)
        if look_stream != first_stream:
            _, *rest = draws(look_stream)
        blur_NU, colour_NU, stain_NU, scanner_NU = rest
        tile_N = np.repeat(np.arange(B), K)
        boxes = draw_boxes(
            geometry_NU,
            tile_N,
            sizes_B2[tile_N],
            area=area,
            aspect=config.aspect,
            flips=config.flips,
            rotations=config.rotations,
        )
        low, high = config.blur_sigma_px
        sigma_px_N = np.where(blur_NU[:, 0] < config.blur_probability, low + blur_NU[:, 1] * (high - low), 0.0)
        self._resampler = Resampler(boxes, sigma_px_N, crop_px=P, tile_px=tile_px, device=device)
        strengths = {"colour": config.colour, "stain": config.stain, "scanner": config.scanner}
        self._look = draw_look(colour_NU, stain_NU, scanner_NU, **strengths)
        self._colour_N34 = None if self._look.colour_N34 is None else _to(self._look.colour_N34, device)
        self._stain_N34 = None if self._look.stain_N34 is None else _to(self._look.stain_N34, device)

    def write(self, tables_B2SCS: Tensor, first: int, stop: int) -> None:
        """Make the crops of tiles ``first`` to ``stop`` from the tables of these tiles."""
        K = len(self._out_KBCHW)
        crops = slice(first * K, stop * K)
        made_NCPP = self._resampler.crops(tables_B2SCS, first, crops).transpose(1, 2)
        if self._work is None or self._work.shape[1] < len(made_NCPP):
            self._work = torch.empty((2, *made_NCPP.shape), device=made_NCPP.device)
        image_NCPP, other_NCPP = self._work[:, : len(made_NCPP)]
        torch.clamp(made_NCPP, min=0.0 if self._stain_N34 is None else DARKEST, out=image_NCPP)
        if self._stain_N34 is not None:
            apply_stain(image_NCPP, self._stain_N34[crops], other_NCPP)
            image_NCPP, other_NCPP = other_NCPP, image_NCPP
        if self._colour_N34 is not None:
            apply_affine(image_NCPP, self._colour_N34[crops], other_NCPP)
            image_NCPP, other_NCPP = other_NCPP, image_NCPP
        if self._look.noise_N is not None and self._look.place_N4 is not None:
            add_noise(image_NCPP, self._look.noise_N[crops], self._look.place_N4[crops])
        image_KBCPP = image_NCPP.view(stop - first, K, *image_NCPP.shape[1:]).transpose(0, 1)
        torch.clamp(image_KBCPP, 0, 1, out=self._out_KBCHW[:, first:stop])


def _to(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, torch.float32)
