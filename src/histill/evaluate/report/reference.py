"""Published rows, typed off by hand: what others reported, not what histill measured.

Sources and dates stand beside the numbers. A date is that of the source where it is known, ``?`` otherwise:
leaderboards change without one. The pooling is ``?`` where the source's table does not name it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "SOURCES", "Published", "Source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where numbers come from."""

    text: str
    date: str
    """Of the source; ``?`` where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One encoder in one source's table."""

    benchmark: str
    """As in :class:`~histill.evaluate.results.Result`."""
    encoder: str
    pooling: str
    source: str
    """Key of :data:`SOURCES`."""
    scores: dict[str, float]
    """By the names of :class:`~histill.evaluate.results.Score`."""


_PAPER = "h0-mini"
SOURCES: dict[str, Source] = {
    "plism": Source(text="PLISM leaderboard of plismbench; the original computes in float16", date="?"),
    "hest": Source(text="HEST-Benchmark leaderboard of the HEST repository", date="?"),
    "eva": Source(text="EVA leaderboard of kaiko eva 0.4.5", date="?"),
    "pathorob": Source(text="PathoROB, robustness index averaged over its three data sets", date="?"),
    _PAPER: Source(
        text="Filiot et al., Distilling foundation models for robust and efficient models in digital pathology, "
        "arXiv 2501.16239",
        date="January 2025",
    ),
}
"""Everything that the rows below are taken from, as published, see source."""

_PLISM_SCORES = (
    "cosine_similarity/all",
    "top_10_accuracy/cross_scanner",
    "top_10_accuracy/cross_staining",
    "top_10_accuracy/both",
    "score",
)
_PLISM = {
    "H0-mini": (0.800, 0.864, 0.318, 0.183, 0.541),
    "GenBio-PathFM": (0.768, 0.709, 0.408, 0.203, 0.522),
    "CONCH": (0.846, 0.752, 0.241, 0.155, 0.498),
    "H-optimus-0": (0.685, 0.744, 0.327, 0.166, 0.480),
    "Virchow2": (0.777, 0.609, 0.306, 0.163, 0.464),
    "Midnight-12k": (0.748, 0.435, 0.200, 0.108, 0.373),
    "Prov-GigaPath": (0.570, 0.592, 0.118, 0.054, 0.333),
    "UNI2-h": (0.591, 0.501, 0.190, 0.046, 0.332),
    "UNI": (0.547, 0.532, 0.169, 0.053, 0.325),
    "Kaiko ViT-B/8": (0.764, 0.346, 0.147, 0.045, 0.325),
    "Phikon": (0.622, 0.125, 0.021, 0.004, 0.193),
    "Hibou-L": (0.490, 0.061, 0.030, 0.008, 0.147),
}
_HEST_TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "LUNG", "LYMPH_IDC")
_HEST_SCORES = ("pearson", *(f"pearson/{task}" for task in _HEST_TASKS))
# encoder, pooling, source -> mean and tasks
_HEST = {
    ("H-optimus-1", "?", "hest"): (0.4229, 0.6024, 0.3781, 0.4964, 0.6589, 0.3195, 0.2421, 0.2533, 0.5779, 0.2774),
    ("H-optimus-0", "?", "hest"): (0.4150, 0.5976, 0.3848, 0.4911, 0.6454, 0.3086, 0.2216, 0.2676, 0.5590, 0.2591),
    ("UNI2-h", "?", "hest"): (0.4141, 0.5898, 0.3569, 0.5001, 0.6606, 0.3015, 0.2223, 0.2640, 0.5587, 0.2727),
    ("Virchow2", "?", "hest"): (0.4034, 0.5971, 0.3529, 0.4779, 0.6402, 0.2581, 0.2074, 0.2719, 0.5685, 0.2568),
    ("H0-mini", "cls", "hest"): (0.3958, 0.5862, 0.3687, 0.4919, 0.6012, 0.2494, 0.1863, 0.2670, 0.5482, 0.2629),
    ("H0-mini", "cls+mean", _PAPER): (0.4044, 0.5909, 0.3633, 0.5068, 0.6125, 0.2700, 0.2047, 0.2643, 0.5633, 0.2640),
}
_EVA_TASKS = ("bach", "breakhis", "crc", "gleason", "mhist", "pcam", "cam16", "panda", "consep", "monusac")
_EVA_SCORES = tuple(f"{'dice' if task in ('consep', 'monusac') else 'balanced_accuracy'}/{task}" for task in _EVA_TASKS)
# as the original computes them: a clean score (balanced_accuracy_clean/bach) has no published row
_EVA: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("Virchow2", "eva"): (0.883, 0.821, 0.967, 0.783, 0.861, 0.938, 0.861, 0.646, 0.640, 0.669),
    ("UNI2-h", "eva"): (0.915, 0.859, 0.965, 0.775, 0.824, 0.950, 0.849, 0.657, 0.630, 0.642),
    ("H-optimus-0", "eva"): (0.759, 0.801, 0.955, 0.770, 0.843, 0.943, 0.827, 0.671, 0.644, 0.685),
    ("H0-mini", _PAPER): (0.774, None, 0.961, None, 0.790, 0.942, 0.842, 0.667, 0.629, 0.643),
}
_PATHOROB = {"Virchow2": 0.861, "H0-mini": 0.815, "H-optimus-0": 0.812, "UNI2-h": 0.757, "Phikon": 0.476}


PUBLISHED: tuple[Published, ...] = (
    *(
        Published(
            benchmark="plism",
            encoder=encoder,
            pooling="?",
            source="plism",
            scores=dict(zip(_PLISM_SCORES, values, strict=True)),
        )
        for encoder, values in _PLISM.items()
    ),
    *(
        Published(
            benchmark="hest",
            encoder=encoder,
            pooling=pooling,
            source=source,
            scores=dict(zip(_HEST_SCORES, values, strict=True)),
        )
        for (encoder, pooling, source), values in _HEST.items()
    ),
    *(
        Published(
            benchmark="eva",
            encoder=encoder,
            pooling="?",
            source=source,
            scores={score: value for score, value in zip(_EVA_SCORES, values, strict=True) if value is not None},
        )
        for (encoder, source), values in _EVA.items()
    ),
    *(
        Published(
            benchmark="pathorob", encoder=encoder, pooling="?", source="pathorob", scores={"robustness_index": value}
        )
        for encoder, value in _PATHOROB.items()
    ),
)
"""Every row of every source."""
