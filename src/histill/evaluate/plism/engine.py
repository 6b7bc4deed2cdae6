"""The exact engine: cosine and top-k accuracy of two slides from one product.

For tile i of slide A with twin i in slide B, by cosine similarity s:

    rank_i = #{j != i: s(A_i, B_j) > s(A_i, B_i)} + #{j != i: s(A_i, A_j) > s(A_i, B_i)}

and the twin is among the k nearest of all other tiles of both slides when rank_i < k. The first term of both
directions comes from the rows and the columns of one product A B^T. The second needs a slide's ten largest
similarities with itself, once per slide, since a rank of ten or more is a miss for every k. Nothing is sorted and
nothing larger than a chunk of rows is held.

The product is in float32, and still the ranks are those of float64: a float32 cosine is wrong by at most
:func:`float32_error`, so that two counts, with the twin's similarity raised and lowered by it, enclose a rank. The few
tiles for which the two give other hits are counted again, with those similarities in float64 that lie between.
Similarities that differ by less than float64 can tell (copies of a tile) are ties; the definition's ``>`` counts them
for the twin, and ``tied`` says how many hits hang on that.

Shapes: N tiles, D features, P = N rounded up to PAD, R tiles of a chunk, Q tiles to settle, C columns, K = KEPT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from histill.errors import DataError
from histill.evaluate.features import Array

__all__ = [
    "TOP",
    "PairMetrics",
    "Slide",
    "check_features",
    "compare",
    "float32_error",
    "full_precision",
    "prepare",
    "self_top",
]

TOP = (1, 3, 5, 10)
"""The values of k."""
KEPT = max(TOP)
"""Similarities within a slide that can matter."""
PAD = 16
"""Rows of a slide come in multiples of this: products with odd widths take 1.5 times as long."""
CHUNK_ENTRIES = {"cpu": 2**21, "cuda": 2**25}
"""Entries of a product at once: on a CPU 8 MiB, so that the counting passes find it in the cache."""
LENGTHS = (1e-140, 1e140)
"""Of features: their squares and products stay within float64. All float32 features are within."""
ABSENT = -4.0
"""Stands for a similarity that does not count: below every cosine."""
SPARE = 6
"""Further candidates beside the ten when a float32 order is refined."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slide:
    """One slide, ready to be compared."""

    name: str
    raw_ND: torch.Tensor
    """Features as they came."""
    norm_N: torch.Tensor
    """Their lengths, float64; 1 for a row of zeros, whose cosine with everything is then 0."""
    unit_PD: torch.Tensor
    """Rows of length 1, float32, followed by rows of zeros."""
    self_top_NK: torch.Tensor
    """:func:`self_top`."""

    def __len__(self) -> int:
        return len(self.raw_ND)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in (self.raw_ND, self.norm_N, self.unit_PD, self.self_top_NK))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMetrics:
    """What PLISM says of two slides; every top-k accuracy is the mean of both directions."""

    cosine_similarity: float
    """Mean cosine of twins, -1 to 1."""
    top_1_accuracy: float
    top_3_accuracy: float
    top_5_accuracy: float
    top_10_accuracy: float
    """Share of tiles whose twin is among the k nearest, 0 to 1."""
    tied: float = 0.0
    """Share of tiles whose hits hang on a tie that was decided for the twin; near 1 when all features are the same."""


def float32_error(dim: int) -> float:
    """Bound on the error of a cosine from unit rows in float32.

    Rounding the rows costs at most 2u, a sum of D products in any order, fused or not, Du / (1 - Du) (Higham, Accuracy
    and Stability of Numerical Algorithms, section 3.1), both times sum |a_k b_k| <= 1; u = 2^-24. The margin covers the
    rounding of the thresholds. Never less than 2^-20, so that short features keep that margin too.
    """
    unit = 2.0**-24
    return max(1.01 * (dim + 6) * unit / (1 - dim * unit), 2.0**-20)


def float64_error(dim: int) -> float:
    """Bound on the difference of two float64 evaluations of one cosine: less is a tie."""
    return 4.0 * (dim + 8) * 2.0**-53


def prepare(
    features_ND: Array | torch.Tensor,
    *,
    name: str,
    device: str | torch.device = "cpu",
    self_top_NK: torch.Tensor | None = None,
) -> Slide:
    """Normalise a slide (in float64) and find its largest similarities with itself.

    Parameters
    ----------
    features_ND
        One row per tile, any float type; twins have the same row in all slides.
    name
        For messages.
    device
        Where it is compared.
    self_top_NK
        From an earlier call with the same features; computed if None.

    Raises
    ------
    DataError
        The table is empty or not two-dimensional, or holds a value that is not finite or out of all proportion.
    """
    if isinstance(features_ND, np.ndarray):  # torch takes no foreign byte order, and warns of mapped files
        native = features_ND.dtype.newbyteorder("=")
        features_ND = np.require(features_ND, dtype=native, requirements=["C_CONTIGUOUS", "WRITEABLE"])
    raw_ND = torch.as_tensor(features_ND).to(device)
    check_features(raw_ND, name)
    norm_N = torch.cat([part_RD.double().norm(dim=1) for part_RD in raw_ND.split(1024)])
    extreme_N = ((norm_N > LENGTHS[1]) | (norm_N < LENGTHS[0])) & (raw_ND != 0).any(dim=1)
    if extreme_N.any():
        row = int(extreme_N.int().argmax())
        raise DataError(
            f"{int(extreme_N.sum())} of {len(raw_ND)} tiles have features whose cosines float64 cannot hold",
            where=f"slide {name}, first in row {row}",
            got=f"length {float(norm_N[row]):g}",
            allowed=f"{LENGTHS[0]:g} to {LENGTHS[1]:g}, or all 0",
        )
    norm_N[norm_N == 0] = 1.0
    unit_PD = torch.zeros((-(-len(raw_ND) // PAD) * PAD, raw_ND.shape[1]), device=device)
    for start in range(0, len(raw_ND), 1024):
        rows = slice(start, min(start + 1024, len(raw_ND)))
        unit_PD[rows] = raw_ND[rows].double() / norm_N[rows, None]
    if self_top_NK is None:
        self_top_NK = _self_top(raw_ND, norm_N, unit_PD)
    return Slide(name=name, raw_ND=raw_ND, norm_N=norm_N, unit_PD=unit_PD, self_top_NK=self_top_NK.to(device))


def check_features(raw_ND: torch.Tensor, name: str) -> None:
    """Refuse what is no table of numbers.

    Raises
    ------
    DataError
        As :func:`prepare`.
    """
    if raw_ND.ndim != 2 or 0 in raw_ND.shape:
        raise DataError("features are a table of one row per tile", where=name, got=f"shape {tuple(raw_ND.shape)}")
    broken_N = ~torch.isfinite(raw_ND).all(dim=1)
    if broken_N.any():
        raise DataError(
            f"{int(broken_N.sum())} of {len(raw_ND)} tiles have features that are not finite",
            where=f"slide {name}, first in row {int(broken_N.int().argmax())}",
            remedy="extract this slide again; if it stays so, the encoder overflows: use float32",
        )


def self_top(features_ND: Array | torch.Tensor) -> NDArray[np.float64]:
    """Find the ten largest cosines of each tile with the other tiles of its slide.

    Returns
    -------
    ndarray
        (N, 10) float64, falling; minus infinity where there are fewer than ten other tiles.
    """
    found: NDArray[np.float64] = prepare(features_ND, name="features").self_top_NK.cpu().numpy()
    return found


@torch.no_grad()
def compare(a: Slide, b: Slide) -> PairMetrics:
    """Compare two slides with the same tiles in the same order; exact, see the module.

    Raises
    ------
    DataError
        They differ in tiles or features.
    """
    if a.raw_ND.shape != b.raw_ND.shape:
        raise DataError(
            "two slides of a pair must have the same tiles and features",
            where=f"{a.name}, {b.name}",
            got=f"(tiles, features) {tuple(a.raw_ND.shape)} and {tuple(b.raw_ND.shape)}",
        )
    twin_N = _twin_cosines(a, b)
    with full_precision():
        forth, back = _enclose(a, b, twin_N)
        hits_forth, tied_forth = _hits(a, b, twin_N, *forth)
        hits_back, tied_back = _hits(b, a, twin_N, *back)
    top_1, top_3, top_5, top_10 = ((hits_forth + hits_back).double() / (2 * len(a))).tolist()
    return PairMetrics(
        cosine_similarity=float(twin_N.mean()),
        top_1_accuracy=top_1,
        top_3_accuracy=top_3,
        top_5_accuracy=top_5,
        top_10_accuracy=top_10,
        tied=(tied_forth + tied_back) / (2 * len(a)),
    )


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in true float32: the error bound does not hold for TF32 or bf16, which a process may have allowed.

    The setting is the process's: whoever compares in several threads holds this around all of them.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _twin_cosines(a: Slide, b: Slide) -> torch.Tensor:
    """(N,) float64."""
    parts = [
        (x_RD.double() * y_RD.double()).sum(dim=1)
        for x_RD, y_RD in zip(a.raw_ND.split(1024), b.raw_ND.split(1024), strict=True)
    ]
    return torch.cat(parts) / (a.norm_N * b.norm_N)


def _chunk_rows(unit_PD: torch.Tensor) -> int:
    return max(PAD, CHUNK_ENTRIES[unit_PD.device.type] // len(unit_PD))


_Bounds = tuple[torch.Tensor, torch.Tensor]
"""(N,) int: at least so many, and at most so many, tiles of the other slide are nearer than the twin."""


def _enclose(a: Slide, b: Slide, twin_N: torch.Tensor) -> tuple[_Bounds, _Bounds]:
    """Count the tiles of B nearer to a tile of A than its twin, and those of A for B, from the one product."""
    tiles, rows, error = len(a), _chunk_rows(b.unit_PD), float32_error(a.raw_ND.shape[1])
    product_RP = a.unit_PD.new_empty((rows, len(b.unit_PD)))
    mask_RP = torch.empty_like(product_RP, dtype=torch.bool)
    count_2N = torch.zeros((2, tiles), dtype=torch.int32, device=a.unit_PD.device)
    column_2N = torch.zeros_like(count_2N)
    bars_2N = torch.stack([twin_N + error, twin_N - error]).float()
    bars_2P = torch.nn.functional.pad(bars_2N, (0, len(b.unit_PD) - tiles))
    for start in range(0, tiles, rows):
        stop = min(start + rows, tiles)
        part_RP, hit_RP = product_RP[: stop - start], mask_RP[: stop - start]
        torch.mm(a.unit_PD[start:stop], b.unit_PD.T, out=part_RP)
        part_RP.diagonal(start).fill_(ABSENT)
        part_RP[:, tiles:] = ABSENT
        for side in range(2):
            torch.gt(part_RP, bars_2N[side, start:stop, None], out=hit_RP)
            count_2N[side, start:stop] = hit_RP.sum(dim=1, dtype=torch.int32)
            torch.gt(part_RP, bars_2P[side], out=hit_RP)
            column_2N[side] += hit_RP.sum(dim=0, dtype=torch.int32)[:tiles]
    return (count_2N[0], count_2N[1]), (column_2N[0], column_2N[1])


def _hits(
    a: Slide, b: Slide, twin_N: torch.Tensor, least_N: torch.Tensor, most_N: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Turn bounds on the ranks of A's twins into hits per k, and count the tiles whose hits hang on a tie."""
    tie = float64_error(a.raw_ND.shape[1])
    top = torch.tensor(TOP, device=twin_N.device)
    own_least_N = (a.self_top_NK > twin_N[:, None] + tie).sum(dim=1)
    own_most_N = (a.self_top_NK > twin_N[:, None] - tie).sum(dim=1)

    def missed(rank_N: torch.Tensor) -> torch.Tensor:
        """How many of the values of k miss a twin of this rank: all that its hits depend on."""
        return torch.bucketize(rank_N, top, right=True)

    open_Q = (missed(own_least_N + least_N) != missed(own_most_N + most_N)).nonzero().squeeze(1)
    least_N, most_N = least_N.clone(), most_N.clone()
    for some_R in open_Q.split(_chunk_rows(b.unit_PD)):
        least_N[some_R], most_N[some_R] = _settle(a, b, twin_N, some_R, tie)
    missed_N = missed(own_least_N + least_N)
    hits = torch.stack([(missed_N <= place).sum() for place in range(len(TOP))])
    return hits, int((missed_N != missed(own_most_N + most_N)).sum())


def _settle(a: Slide, b: Slide, twin_N: torch.Tensor, some_R: torch.Tensor, tie: float) -> _Bounds:
    """Count again for some tiles of A, with the similarities that float32 cannot tell from the twin's in float64."""
    error, bar_R1 = float32_error(a.raw_ND.shape[1]), twin_N[some_R, None]
    product_RP = a.unit_PD[some_R] @ b.unit_PD.T
    product_RP[torch.arange(len(some_R), device=some_R.device), some_R] = ABSENT
    product_RP[:, len(b) :] = ABSENT
    nearer_RP = product_RP > (bar_R1 + error).float()
    close_RP = (product_RP > (bar_R1 - error).float()) & ~nearer_RP
    least_R = nearer_RP.sum(dim=1, dtype=torch.int32)
    most_R = least_R.clone()
    exact_RD = _exact_rows(a.raw_ND, a.norm_N, some_R)
    for some_C in close_RP.any(dim=0).nonzero().squeeze(1).split(2048):
        lead_RC = exact_RD @ _exact_rows(b.raw_ND, b.norm_N, some_C).T - bar_R1
        close_RC = close_RP[:, some_C]
        least_R += ((lead_RC > tie) & close_RC).sum(dim=1, dtype=torch.int32)
        most_R += ((lead_RC > -tie) & close_RC).sum(dim=1, dtype=torch.int32)
    return least_R, most_R


def _exact_rows(raw_ND: torch.Tensor, norm_N: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Unit rows in float64."""
    return raw_ND[rows].double() / norm_N[rows, None]


@torch.no_grad()
def _self_top(raw_ND: torch.Tensor, norm_N: torch.Tensor, unit_PD: torch.Tensor) -> torch.Tensor:
    """(N, K): candidates by float32, their values in float64, and all in float64 where candidates may be missing."""
    tiles, error, rows = len(raw_ND), float32_error(raw_ND.shape[1]), _chunk_rows(unit_PD)
    found_NK = torch.full((tiles, KEPT), -torch.inf, dtype=torch.float64, device=raw_ND.device)
    candidates = min(KEPT + SPARE, tiles - 1)
    kept = min(KEPT, candidates)
    for start in range(0, tiles, rows) if kept else ():
        some_R = torch.arange(start, min(start + rows, tiles), device=raw_ND.device)
        with full_precision():
            product_RP = unit_PD[some_R] @ unit_PD.T
        product_RP.diagonal(start).fill_(ABSENT)
        product_RP[:, tiles:] = ABSENT
        rough_RC, place_RC = product_RP.topk(candidates, dim=1)
        values_RC = torch.cat(
            [
                torch.einsum("rd,rcd->rc", _exact_rows(raw_ND, norm_N, some), _exact_candidates(raw_ND, norm_N, place))
                for some, place in zip(some_R.split(32), place_RC.split(32), strict=True)
            ]
        ).sort(dim=1, descending=True)[0]
        found_NK[some_R, :kept] = values_RC[:, :kept]
        if candidates < tiles - 1:  # the others are at most the last candidate, give or take the error
            unsure_R = some_R[values_RC[:, kept - 1] < rough_RC[:, -1].double() + error]
            found_NK[unsure_R] = _self_top_exact(raw_ND, norm_N, unsure_R)
    return found_NK


def _exact_candidates(raw_ND: torch.Tensor, norm_N: torch.Tensor, place_RC: torch.Tensor) -> torch.Tensor:
    """(R, C, D) unit rows in float64."""
    return raw_ND[place_RC].double() / norm_N[place_RC][..., None]


def _self_top_exact(raw_ND: torch.Tensor, norm_N: torch.Tensor, some_R: torch.Tensor) -> torch.Tensor:
    """(R, K) in float64 throughout."""
    exact_RD = _exact_rows(raw_ND, norm_N, some_R)
    best_RK = exact_RD.new_full((len(some_R), KEPT), -torch.inf)
    for some_C in torch.arange(len(raw_ND), device=raw_ND.device).split(2048) if len(some_R) else ():
        cosine_RC = exact_RD @ _exact_rows(raw_ND, norm_N, some_C).T
        cosine_RC[some_R[:, None] == some_C] = -torch.inf
        best_RK = torch.cat([best_RK, cosine_RC], dim=1).topk(KEPT, dim=1)[0]
    return best_RK
