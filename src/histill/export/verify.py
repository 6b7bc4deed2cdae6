"""Is the export still the same model? Tokens against the bundle's, on real tiles, with bounds.

Shape legend: N tiles, D width of a token, H and W rows and columns of patches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from histill.errors import DataError, ModelError
from histill.evaluate.checks import load_check
from histill.evaluate.retention import report
from histill.evaluate.table_tiles import resized
from histill.models.bundle import Bundle
from histill.models.encoder import Encoder, Tokens, wrap
from histill.models.engines import Engine
from histill.tiles.images import UnreadableTileError
from histill.tiles.tile_set import TileSource

__all__ = ["BOUNDS", "Bounds", "Difference", "check", "compare", "difference", "draw_tiles", "scores"]

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an engine must keep to, for the class tokens and for the patch tokens."""

    max_difference: float | None = None
    """Largest absolute difference of a number; None: not bounded."""
    mean_cosine: float
    """Least mean cosine of a token to the bundle's."""
    min_cosine: float
    """Least cosine of any token to the bundle's."""
    retention: float
    """Least retention on the main metric of a table, where one is given."""


_EXACT = Bounds(max_difference=1e-4, mean_cosine=0.9999, min_cosine=0.9999, retention=0.99)

BOUNDS: dict[str, Bounds] = {
    "onnxruntime": _EXACT,
    "openvino-fp32": _EXACT,
    "openvino-bf16": Bounds(mean_cosine=0.999, min_cosine=0.98, retention=0.95),
    "openvino-int8": Bounds(mean_cosine=0.99, min_cosine=0.9, retention=0.9),
}
"""Each engine that an export is verified with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Tokens of an export against those of the bundle."""

    max_difference: float
    """Largest absolute difference of a number."""
    mean_cosine: float
    """Mean over the tokens."""
    min_cosine: float
    """Worst token."""
    centred_cosine: float
    """Mean cosine after the mean token was taken off both. Tokens of a trained transformer share a large part, which
    alone makes plain cosines high; this one has no such floor."""


def draw_tiles(source: TileSource, wanted: int, px: int) -> NDArray[np.uint8]:
    """Read tiles in a shuffled order that is the same in every run: uint8 (N, px, px, 3), N at most ``wanted``.

    Raises
    ------
    DataError
        If not even two can be read.
    """
    tiles: list[NDArray[np.uint8]] = []
    for position in range(len(source)):
        if len(tiles) == wanted:
            break
        (index,) = source.tile_at(np.array([position]), 0)
        try:
            tiles.append(source.read(int(index)))
        except UnreadableTileError:
            continue
    if len(tiles) < 2:
        raise DataError("too few readable tiles to verify an export", where=source.root, got=len(tiles), allowed=">= 2")
    return resized(tiles, px)


def difference(tokens_ND: torch.Tensor, bundle_ND: torch.Tensor) -> Difference:
    """Compare tokens row by row; float32 (N, D). A number that is not finite makes the cosines NaN."""
    cosines_N = F.cosine_similarity(tokens_ND, bundle_ND, dim=1)
    centred_N = F.cosine_similarity(tokens_ND - tokens_ND.mean(dim=0), bundle_ND - bundle_ND.mean(dim=0), dim=1)
    return Difference(
        max_difference=float((tokens_ND - bundle_ND).abs().max()),
        mean_cosine=float(cosines_N.mean()),
        min_cosine=float(cosines_N.min()),
        centred_cosine=float(centred_N.mean()),
    )


def compare(encoder: Encoder, engine: Engine, tiles_NHW3: NDArray[np.uint8]) -> dict[str, Difference]:
    """Run both on the same tiles: the differences of the class tokens (``cls``) and of all patch tokens.

    Parameters
    ----------
    encoder
        What was exported, on the processor.
    engine
        The export.
    tiles_NHW3
        uint8 RGB, H and W the size that the engine takes.
    """
    expected, got = [], []
    with torch.no_grad():
        for start in range(0, len(tiles_NHW3), _BATCH):
            images_BCHW = torch.from_numpy(tiles_NHW3[start : start + _BATCH]).permute(0, 3, 1, 2)
            expected.append(encoder(images_BCHW))
            got.append(engine(images_BCHW))

    def rows(found: list[Tokens], name: str) -> torch.Tensor:
        if name == "cls":
            return torch.cat([tokens.cls_BD for tokens in found])
        return torch.cat([tokens.patches_BHWD.flatten(0, 2) for tokens in found])

    return {name: difference(rows(got, name), rows(expected, name)) for name in ("cls", "patches")}


def scores(bundle: Bundle, engine: Engine, table: Path) -> dict[str, dict[str, float | None]]:
    """Score bundle and export on a table, with an untrained network of the same architecture as the floor.

    Parameters
    ----------
    bundle, engine
        What was exported, and the export.
    table
        CSV with labels, as for the checks of ``histill distill``.

    Returns
    -------
    dict
        Metric -> bundle, export, untrained, retention (None where the bundle has no lead over the untrained network).
    """
    encoder = bundle.encoder
    held = load_check(table, encoder.input_px)
    arguments = {"num_classes": 0, "dynamic_img_size": True} | bundle.model_args
    model = timm.create_model(bundle.architecture, pretrained=False, **arguments).eval()
    untrained = wrap(model, name="untrained", mean=encoder.mean, std=encoder.std, input_px=encoder.input_px)
    of_bundle, of_export, of_untrained = (
        held.score(held.features(lambda images_BCHW, run=run: run(images_BCHW).cls_BD))  # type: ignore[misc]
        for run in (encoder, engine, untrained)
    )
    return {
        row.metric: {
            "bundle": row.teacher,
            "export": row.student,
            "untrained": row.untrained,
            "retention": row.retention,
        }
        for row in report(of_bundle, of_export, of_untrained)
    }


def check(engine: str, found: dict[str, Difference], scored: dict[str, dict[str, float | None]] | None) -> None:
    """Refuse an export that is out of bounds.

    Parameters
    ----------
    engine
        Its name; the bounds are :data:`BOUNDS`.
    found
        As of :func:`compare`.
    scored
        As of :func:`scores`; only the first metric counts. None without a table.

    Raises
    ------
    ModelError
        Naming the engine, the tokens, the number and its bound.
    """
    bounds = BOUNDS[engine]
    for name, each in found.items():
        # "not within" instead of "beyond", so that NaN is refused
        if bounds.max_difference is not None and not each.max_difference <= bounds.max_difference:
            raise _refused(engine, name, f"largest difference {each.max_difference:.3g}", bounds.max_difference)
        for measure in ("mean_cosine", "min_cosine"):
            if not getattr(each, measure) >= getattr(bounds, measure):
                words = f"{measure.replace('_', ' ')} {getattr(each, measure):.6f}"
                raise _refused(engine, name, words, getattr(bounds, measure))
    if scored:
        metric, row = next(iter(scored.items()))
        if row["retention"] is not None and not row["retention"] >= bounds.retention:
            raise _refused(engine, metric, f"retention {row['retention']:.3f}", bounds.retention)


def _refused(engine: str, what: str, got: str, bound: float) -> ModelError:
    return ModelError(
        "the export does not agree with the bundle, and was not kept",
        where=f"{engine}, {what}",
        got=got,
        allowed=bound,
        remedy="for int8: calibrate on more tiles, or on tiles more like those of its use"
        if "int8" in engine
        else None,
    )


def as_record(found: dict[str, Difference]) -> dict[str, Any]:
    """Write differences as JSON-ready numbers."""
    return {name: asdict(each) for name, each in found.items()}
