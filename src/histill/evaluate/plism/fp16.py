"""The original's float16 numbers (``--compat fp16``), with its defects; for comparison with published tables only.

Features, their lengths, their cosines and the mean are float16. For each tile all tiles of both slides are put in order
of similarity and the first of that order is taken for the tile itself and dropped. So

- a length above 256 overflows: all its cosines are 0 (above 65,504, where a feature itself overflows, NaN);
- a twin as near as the tile itself may come first: it is dropped and counts as missed, whatever k.

The original leaves the order of equal similarities to its sort; here they come in the order of the tiles, the first
slide's before the second's, which gives the same numbers on every machine. Against the original's: the same cosine, and
top-k accuracies within 0.0022 on the reference of 460 tiles.

Shapes: N tiles, D features, M = 2 N tiles of both slides, R of them at once.
"""

from __future__ import annotations

import torch

from histill.evaluate.plism.engine import CHUNK_ENTRIES, TOP, PairMetrics, Slide, full_precision

__all__ = ["compare_fp16"]


@torch.no_grad()
def compare_fp16(a: Slide, b: Slide) -> PairMetrics:
    """Compare two slides as the original does; metrics may be NaN."""
    tiles = len(a)
    halves = [_unit_half(slide.raw_ND) for slide in (a, b)]
    cosine = (halves[0] * halves[1]).sum(dim=1).mean()  # float16, added up in float32
    both_MD = torch.cat(halves).float()
    place_M = torch.arange(2 * tiles, device=both_MD.device)
    found = torch.zeros(len(TOP), dtype=torch.int64, device=both_MD.device)
    rows = max(1, CHUNK_ENTRIES[both_MD.device.type] // len(both_MD))
    with full_precision():
        for some_R in place_M.split(rows):
            similarity_RM = (both_MD[some_R] @ both_MD.T).half().float()
            twin_R1 = ((some_R + tiles) % (2 * tiles))[:, None]
            bar_R1 = similarity_RM.gather(1, twin_R1)
            rank_R = (similarity_RM > bar_R1).sum(dim=1)
            rank_R += ((similarity_RM == bar_R1) & (place_M < twin_R1)).sum(dim=1)
            found += torch.stack([((rank_R >= 1) & (rank_R <= k)).sum() for k in TOP])
    top_1, top_3, top_5, top_10 = (found.double() / (2 * tiles)).tolist()
    return PairMetrics(
        cosine_similarity=float(cosine),
        top_1_accuracy=top_1,
        top_3_accuracy=top_3,
        top_5_accuracy=top_5,
        top_10_accuracy=top_10,
    )


def _unit_half(raw_ND: torch.Tensor) -> torch.Tensor:
    half_ND = raw_ND.half()
    return half_ND / (half_ND * half_ND).sum(dim=1, keepdim=True).sqrt()
