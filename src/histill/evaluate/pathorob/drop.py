"""PathoROB's average performance drop: what a probe loses when class and hospital go together in its training.

A linear probe learns the biological class on training sets in which the class is ever more tied to the centre, from
balanced to wholly confounded, and is tested on rows that stay the same: held-out slides of the same centres (ID) and
other centres (OOD). The drop of a level is accuracy over the balanced one's, minus 1.

What is the original's: balanced accuracy, level 0 balanced and the last wholly confounded, 20 repeats, test rows that
stay, and :func:`average_performance_drop` (it gives the published drops from the published accuracies). What is ours,
since the descriptions do not fix it: how many rows are drawn, which slides are held out, and the probe's strength. So
the drops of two encoders that were measured here compare; those of the paper are near, but not the same.

Shapes: L levels, R repeats, N tiles, D features, K classes, C centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError
from histill.evaluate.features import Array
from histill.evaluate.pathorob.index import OUT_OF_DOMAIN, Metadata, columns_of
from histill.evaluate.probes import balanced_accuracy, linear_probe

__all__ = ["STRENGTH", "Repeat", "average_performance_drop", "cell_shares", "confounded_probes"]

STRENGTH = 1e-2
"""Inverse L2 strength of the probe on standardised features, the same for all levels."""
TEST_SHARE = 0.15
"""Share of each cell's slides that is held out, at least one slide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One draw of slides: balanced accuracy per level."""

    in_domain: tuple[float, ...]
    out_of_domain: tuple[float, ...] | None
    """None when the metadata have no OOD rows."""
    rows: int
    """Training rows of each level."""


def average_performance_drop(accuracy_LR: Array) -> float:
    """Mean over repeats and confounded levels of ``accuracy / accuracy at level 0 - 1``.

    Parameters
    ----------
    accuracy_LR
        Balanced accuracies; row 0 is the balanced training set.

    Returns
    -------
    float
        0: no drop; -0.05: 5 % lost.

    Raises
    ------
    DataError
        It has not two dimensions, fewer than two levels, or an accuracy of level 0 that is not above 0.

    References
    ----------
    Koemen et al. 2025, arXiv 2507.17845 (average performance drop).
    """
    accuracy_LR = np.asarray(accuracy_LR, np.float64)
    if accuracy_LR.ndim != 2 or len(accuracy_LR) < 2 or not (accuracy_LR[0] > 0).all():
        raise DataError(
            "a performance drop needs accuracies above 0 at level 0 and at one further level",
            got=f"shape {accuracy_LR.shape}",
        )
    return float((accuracy_LR[1:] / accuracy_LR[0] - 1).mean())


def cell_shares(classes: int, centres: int, level: float) -> NDArray[np.float64]:
    """Which share of a class's training rows comes from which centre: (K, C), rows sum to 1.

    At level 0 each centre gives the same, at level 1 a class comes from one centre alone: class i from centre
    ``i * C // K``, so that centres have as many classes as can be.

    Parameters
    ----------
    classes, centres
        K and C.
    level
        0 (balanced) to 1 (wholly confounded).
    """
    home_K = np.arange(classes) * centres // classes
    at_home_KC = (home_K[:, None] == np.arange(centres)[None]).astype(np.float64)
    share_KC: NDArray[np.float64] = (1 - level) / centres + level * at_home_KC
    return share_KC


def _held_out(slide_M: Array, cell_M: Array, names: list[str], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose test slides so that each cell has some. A slide is held out with all of its tiles, of whatever class."""
    test: set[str] = set()
    slides_of = [np.unique(slide_M[cell_M == cell]).tolist() for cell in range(len(names))]
    for slides in slides_of:
        lacking = max(1, round(TEST_SHARE * len(slides))) - len(test & set(slides))
        free = [slide for slide in slides if slide not in test]
        test |= {free[i] for i in rng.permutation(len(free))[: max(0, lacking)]}
    for name, slides in zip(names, slides_of, strict=True):
        if set(slides) <= test:
            raise DataError(
                "a class of a centre has too few slides: none is left to train on",
                where=name,
                got=f"{len(slides)} slides",
                remedy="leave that class or that centre out of the metadata",
            )
    return np.isin(slide_M, sorted(test))


def _by_slide(rows: NDArray[np.intp], slide_N: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """Order rows slide after slide, slides shuffled: a prefix then holds few slides whole rather than all in part."""
    names, code = np.unique(slide_N[rows], return_inverse=True)
    return rows[np.argsort(rng.permutation(len(names))[code], kind="stable")]


def _counts(share_KC: NDArray[np.float64], rows: int) -> NDArray[np.intp]:
    """Round shares of ``rows`` so that each class keeps exactly ``rows``: the largest remainders go up."""
    exact_KC = share_KC * rows
    count_KC = np.floor(exact_KC + 1e-9).astype(np.intp)
    order_KC = np.argsort(count_KC - exact_KC, axis=1, kind="stable")
    for k, left in enumerate(rows - count_KC.sum(axis=1)):
        count_KC[k, order_KC[k, :left]] += 1
    return count_KC


def confounded_probes(features_ND: Array, metadata: Metadata, *, levels: int, seed: int) -> Repeat:
    """Run one repeat: draw test slides, then train a probe at each level and test it.

    Every level trains on the same number of rows of each class, taken from the front of the same shuffled cells.

    Parameters
    ----------
    features_ND, metadata
        As :func:`histill.evaluate.pathorob.index.robustness_index`; the subset ``OOD`` holds the other centres.
    levels
        Number of levels, evenly from balanced to wholly confounded; two or more.
    seed
        Of the draw; equal arguments give equal numbers.

    Raises
    ------
    DataError
        A class is missing in a centre or has a single slide there; a feature is not finite.
    """
    columns = columns_of(metadata)
    biology_N, slide_N = columns["biological_class"], columns["slide_id"]
    rng = np.random.default_rng(seed)
    ood = np.flatnonzero(columns["subset"] == OUT_OF_DOMAIN)
    inside = np.flatnonzero(columns["subset"] != OUT_OF_DOMAIN)
    classes, class_M = np.unique(biology_N[inside], return_inverse=True)
    centres, centre_M = np.unique(columns["medical_center"][inside], return_inverse=True)
    cell_M = class_M * len(centres) + centre_M
    names = [f"{biology} from {centre}" for biology in classes for centre in centres]
    test_M = _held_out(slide_N[inside], cell_M, names, rng)
    cells = [_by_slide(inside[~test_M & (cell_M == cell)], slide_N, rng) for cell in range(len(names))]
    rows = min(len(cell) for cell in cells)
    tests = [inside[test_M], ood]
    tested = np.concatenate(tests)
    found: list[list[float]] = [[], []]
    for level in np.linspace(0, 1, levels):
        counts = _counts(cell_shares(len(classes), len(centres), float(level)), rows).reshape(-1)
        chosen = np.concatenate([cell[:n] for cell, n in zip(cells, counts, strict=True)])
        probe = linear_probe(
            features_ND[chosen], biology_N[chosen], features_ND[tested], biology_N[tested], c_grid=(STRENGTH,)
        )
        scores = np.split(probe.scores_MC, [len(inside[test_M])])
        for side, (part, scores_MC) in enumerate(zip(tests, scores, strict=True)):
            if len(part):
                found[side].append(balanced_accuracy(biology_N[part], scores_MC, probe.classes))
    return Repeat(in_domain=tuple(found[0]), out_of_domain=tuple(found[1]) or None, rows=rows * len(classes))
