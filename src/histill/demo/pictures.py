"""The report's pictures, as data URIs: slides, tiles by class, one field under every look, neighbours, patch tokens.

Shapes: N tiles, Q queries, K neighbours, I images, H and W rows and columns (of patches in tokens), D width of a token,
T tokens.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from histill.models.encoder import Encoder
from histill.synthetic import KINDS, LABELS_CSV, PAIRED_CSV, SCANNERS, STAINS, draw_tile, render, slide_effects
from histill.tiles.folder import SetFolder
from histill.tiles.images import decode, read_table

__all__ = ["Field", "Neighbour", "Pictures", "Query", "Slide", "Tile", "align", "colours", "draw_pictures"]

TOKEN_PX = 224
"""Side of the fields of which patch tokens are shown."""

_SLIDES, _SLIDE_PX = 4, 512
_PER_CLASS = 8
_QUALITY = 82
_LOOKS = tuple(product(("harris", "mayer"), ("aurora", "cinder")))
_TOKEN_LOOKS = (_LOOKS[0], _LOOKS[-1])  # they differ in stain and scanner


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """A slide with its kept tiles outlined."""

    image: str
    """Data URI."""
    name: str
    look: str
    """Stain and scanner."""
    tiles: int
    """Tiles that were kept."""
    grid_tiles: int
    """Places of the grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A picture with what it shows."""

    image: str
    """Data URI."""
    name: str
    """Slide, or stain and scanner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A tile that a model finds similar."""

    image: str
    label: str
    slide: str
    same: bool
    """Whether it shows the query's class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A tile and its nearest tiles on other slides."""

    image: str
    label: str
    slide: str
    nearest: dict[str, list[Neighbour]]
    """teacher, student -> nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field under several looks, with both models' patch tokens as colours."""

    label: str
    looks: list[dict[str, str]]
    """name, image, teacher, student: the look's name and data URIs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """All of them."""

    slides: list[Slide]
    """Of different looks."""
    classes: dict[str, list[Tile]]
    """Class -> tiles of different slides."""
    paired: list[Tile]
    """One field under every stain and scanner."""
    queries: list[Query]
    fields: list[Field]


def draw_pictures(
    demo: Path,
    columns: Mapping[str, NDArray[Any]],
    queries_Q: NDArray[np.intp],
    nearest: Mapping[str, NDArray[np.intp]],
    models: Mapping[str, Encoder],
    *,
    seed: int,
) -> Pictures:
    """Make the pictures.

    Parameters
    ----------
    demo
        The demo's folder, with ``tiles`` and ``checks``.
    columns
        path, label, slide of the labelled tiles, (N,).
    queries_Q
        Which of them are queries.
    nearest
        Model -> neighbours of the queries, (Q, K).
    models
        teacher and student.
    seed
        Of the choice of queries and of the fields whose tokens are shown.
    """
    rng = np.random.default_rng([seed, 11])
    checks = demo / "checks"
    return Pictures(
        slides=_slides(demo),
        classes={kind: _of_class(checks, columns, kind) for kind in KINDS},
        paired=_paired(checks),
        queries=[
            _query(
                checks,
                columns,
                queries_Q,
                nearest,
                int(rng.choice(np.flatnonzero(columns["label"][queries_Q] == kind))),
            )
            for kind in KINDS
        ],
        fields=_token_fields(models, seed),
    )


def _jpeg(image_HWC: NDArray[np.uint8]) -> str:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image_HWC), quality=_QUALITY, colorspace="RGB")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _png(image_HWC: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file(path: Path) -> str:
    return _jpeg(decode(path.read_bytes(), path.name))


def _slides(demo: Path) -> list[Slide]:
    """The first slide of each look, with the grid of its kept tiles."""
    looks: dict[str, str] = {}
    for row in read_table(demo / "checks" / LABELS_CSV, ["slide", "scanner"]):
        looks.setdefault(row["scanner"], row["slide"])
    folder, slides = SetFolder(demo / "tiles"), []
    records = {record.slide: record for record in folder.records()}
    for look, slide in list(looks.items())[:_SLIDES]:
        with Image.open(folder.thumbnail(slide)) as picture:
            picture.thumbnail((_SLIDE_PX, _SLIDE_PX), Image.Resampling.BOX)
            image = _jpeg(np.asarray(picture.convert("RGB")))
        record = records[slide]
        slides.append(Slide(image=image, name=slide, look=look, tiles=record.tiles, grid_tiles=record.grid_tiles))
    return slides


def _of_class(checks: Path, columns: Mapping[str, NDArray[Any]], kind: str) -> list[Tile]:
    """A tile of a class from the middle of each of some evenly spaced slides."""
    rows = np.flatnonzero(columns["label"] == kind)
    _, first, count = np.unique(columns["slide"][rows], return_index=True, return_counts=True)
    middle = rows[first + count // 2]  # the rows of a slide are neighbours, from top to bottom
    chosen = middle[np.linspace(0, len(middle) - 1, min(_PER_CLASS, len(middle))).round().astype(int)]
    return [Tile(image=_file(checks / columns["path"][row]), name=str(columns["slide"][row])) for row in chosen]


def _paired(checks: Path) -> list[Tile]:
    """The field nearest to the middle of the first section, under every look."""
    rows = read_table(checks / PAIRED_CSV, ["path", "slide", "scanner", "x", "y"])
    section = [row for row in rows if row["slide"] == rows[0]["slide"]]
    places_N2 = np.array([[int(row["x"]), int(row["y"])] for row in section])
    away_N = np.square(places_N2 - places_N2.mean(axis=0)).sum(axis=1)
    same = [row for row, away in zip(section, away_N, strict=True) if away == away_N.min()][: len(_LOOKS)]
    return [Tile(image=_file(checks / row["path"]), name=row["scanner"]) for row in same]


def _query(
    checks: Path,
    columns: Mapping[str, NDArray[Any]],
    queries_Q: NDArray[np.intp],
    nearest: Mapping[str, NDArray[np.intp]],
    number: int,
) -> Query:
    def shown(row: int) -> dict[str, str]:
        return {
            "image": _file(checks / columns["path"][row]),
            "label": str(columns["label"][row]),
            "slide": str(columns["slide"][row]),
        }

    query = shown(int(queries_Q[number]))
    found = {name: [shown(int(row)) for row in nearest[name][number]] for name in ("teacher", "student")}
    return Query(
        image=query["image"],
        label=query["label"],
        slide=query["slide"],
        nearest={
            name: [Neighbour(same=tile["label"] == query["label"], **tile) for tile in shown_tiles]
            for name, shown_tiles in found.items()
        },
    )


# ------------------------------------------------------------------ patch tokens


def _token_fields(models: Mapping[str, Encoder], seed: int) -> list[Field]:
    """Draw one field of each class and show what the patch tokens of both models say of it."""
    effects = slide_effects(9_000 + seed)  # of a slide that is in none of the tables
    fields = []
    for number, kind in enumerate(KINDS):
        concentrations_HWS = draw_tile(kind, TOKEN_PX, 7_000 + number, effects)
        images_IHWC = np.stack(
            [render(concentrations_HWS, STAINS[stain], SCANNERS[scanner], number) for stain, scanner in _TOKEN_LOOKS]
        )
        tokens = {name: _tokens(model, images_IHWC) for name, model in models.items()}
        scores = {name: _components(tokens_IHWD) for name, tokens_IHWD in tokens.items()}
        scores["student"] = align(scores["student"], scores["teacher"])
        painted = {name: colours(scores[name]).reshape(*tokens[name].shape[:3], 3) for name in models}
        looks = [
            {"name": "-".join(look), "image": _jpeg(images_IHWC[index])}
            | {name: _png(painted[name][index]) for name in models}
            for index, look in enumerate(_TOKEN_LOOKS)
        ]
        fields.append(Field(label=kind, looks=looks))
    return fields


def _tokens(model: Encoder, images_IHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Patch tokens, (I, H, W, D)."""
    with torch.no_grad():
        tokens_IHWD: torch.Tensor = model(torch.from_numpy(images_IHWC).permute(0, 3, 1, 2)).patches_BHWD
    return tokens_IHWD.float().numpy()


def _components(tokens_IHWD: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The first three principal components of all tokens, each with mean 0 and variance 1, (T, 3)."""
    tokens_TD = tokens_IHWD.reshape(-1, tokens_IHWD.shape[-1]).astype(np.float64)
    left_TR = np.linalg.svd(tokens_TD - tokens_TD.mean(axis=0), full_matrices=False)[0]
    scores_T3: NDArray[np.floating[Any]] = left_TR[:, :3] * np.sqrt(len(left_TR))
    return scores_T3


def align(scores_T3: NDArray[np.floating[Any]], target_T3: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Turn (or mirror) one model's components so that they come nearest to another's (orthogonal Procrustes)."""
    left, _, right = np.linalg.svd(scores_T3.T @ target_T3)
    turned_T3: NDArray[np.floating[Any]] = scores_T3 @ (left @ right)
    return turned_T3


def colours(scores_T3: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Show components of variance 1 as red, green and blue: -2 is dark, 2 is bright."""
    return (np.clip(scores_T3 / 4 + 0.5, 0, 1) * 255).round().astype(np.uint8)
