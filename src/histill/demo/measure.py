"""What the demo measures once the student is there: size, arithmetic, speed, and who is like whom.

Shapes: N tiles, Q queries, K neighbours, D features, B tiles of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from histill.demo.config import GLOBAL_PX, STUDENT
from histill.demo.pictures import Pictures, draw_pictures
from histill.distill.precision import autocast_for, plain_attention_on_cpu
from histill.evaluate.checks import Check, load_check
from histill.models import build_student, load_encoder, wrap
from histill.models.encoder import Encoder
from histill.synthetic import LABELS_CSV

__all__ = ["Measured", "count_macs", "load_models", "measure", "nearest_elsewhere", "same_class_share", "speeds"]

NEIGHBOURS = 5
_BATCH, _WARM_ROUNDS, _ROUNDS = 32, 3, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Numbers for ``summary.json`` and pictures for the report."""

    models: dict[str, dict[str, Any]]
    """teacher, student -> params, macs (of one tile), embed_dim, tiles_per_s."""
    speed: dict[str, Any]
    """How the speeds were measured, and ``ratio``: student over teacher, with its quartiles over the rounds."""
    neighbours: dict[str, Any]
    """``k``, and for teacher, student and untrained the share of neighbours that show the query's class."""
    pictures: Pictures
    """For the report alone."""


def load_models(teacher: Path, student: Path, *, seed: int) -> dict[str, Encoder]:
    """Load the bundles ``teacher`` and ``student``, and make ``untrained``: the student's shape, never trained."""
    models = {"teacher": load_encoder(f"local-dir:{teacher}"), "student": load_encoder(f"local-dir:{student}")}
    known = models["student"]
    untrained = wrap(
        build_student(STUDENT, seed=seed), name="untrained", mean=known.mean, std=known.std, input_px=known.input_px
    )
    return {**models, "untrained": untrained.eval()}


def measure(demo: Path, all_models: Mapping[str, Encoder], *, seed: int) -> Measured:
    """Measure teacher and student on the drawn tiles, on the CPU.

    Parameters
    ----------
    demo
        The demo's folder, with ``tiles`` and ``checks``.
    all_models
        As :func:`load_models` gives them.
    seed
        Of the choice of queries.
    """
    cpu = torch.device("cpu")
    autocast = autocast_for(cpu, "auto")
    models = {name: all_models[name] for name in ("teacher", "student")}
    for model in all_models.values():
        plain_attention_on_cpu(model, cpu)
    rates, ratios = speeds(models, autocast)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    check = load_check(demo / "checks" / LABELS_CSV, GLOBAL_PX)
    queries_Q = np.flatnonzero(check.columns["split"] == "test")
    nearest: dict[str, NDArray[np.intp]] = {}
    shares: dict[str, Any] = {"k": NEIGHBOURS}
    for name, model in all_models.items():
        features_ND = _features(check, model, autocast)
        nearest[name] = nearest_elsewhere(features_ND, check.columns["slide"], queries_Q, NEIGHBOURS)
        shares[name] = same_class_share(nearest[name], check.columns["label"], queries_Q)
    return Measured(
        models={
            name: {
                "params": sum(parameter.numel() for parameter in model.parameters()),
                "macs": count_macs(model, GLOBAL_PX),
                "embed_dim": model.embed_dim,
                "tiles_per_s": round(rates[name], 1),
            }
            for name, model in models.items()
        },
        speed={
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "rounds": _ROUNDS,
            "batch_tiles": _BATCH,
            "input_px": GLOBAL_PX,
            "precision": str(autocast.fast_dtype) if autocast._enabled else "torch.float32",
        },
        neighbours=shares,
        pictures=draw_pictures(demo, check.columns, queries_Q, nearest, models, seed=seed),
    )


def _features(check: Check, model: Encoder, autocast: torch.autocast) -> NDArray[np.floating[Any]]:
    def embed(tiles_BCHW: torch.Tensor) -> torch.Tensor:
        with autocast:
            cls_BD: torch.Tensor = model(tiles_BCHW).cls_BD
        return cls_BD.float()

    return check.features(embed)


def count_macs(model: Encoder, image_px: int) -> int:
    """Multiply-accumulates of one image: half of the operations that torch counts in matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_px, image_px))
    return int(counter.get_total_flops() // 2)


def speeds(
    models: Mapping[str, Encoder], autocast: torch.autocast, *, batch: int = _BATCH, rounds: int = _ROUNDS
) -> tuple[dict[str, float], list[float]]:
    """Tiles per second of each model, and student over teacher in each round.

    The models take turns, so that whatever else the machine does weighs on all of them alike.

    Returns
    -------
    rates
        Model -> tiles / s, from its median round.
    ratios
        Per round, the teacher's seconds over the student's.
    """
    images_BCHW = torch.rand(batch, 3, GLOBAL_PX, GLOBAL_PX, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad(), autocast:
        for turn in range(_WARM_ROUNDS + rounds):
            for name, model in models.items():
                began = time.perf_counter()
                model(images_BCHW)
                if turn >= _WARM_ROUNDS:
                    seconds[name].append(time.perf_counter() - began)
    rates = {name: batch / float(np.median(values)) for name, values in seconds.items()}
    ratios = [teacher / student for teacher, student in zip(seconds["teacher"], seconds["student"], strict=True)]
    return rates, ratios


def nearest_elsewhere(
    features_ND: NDArray[np.floating[Any]], slide_N: Sequence[str] | NDArray[Any], queries_Q: NDArray[np.intp], k: int
) -> NDArray[np.intp]:
    """The k tiles nearest by cosine that lie on another slide than the query, nearest first: (Q, k)."""
    unit_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True).clip(1e-12)
    slides_N = np.asarray(slide_N)
    similarity_QN = unit_ND[queries_Q] @ unit_ND.T
    similarity_QN[slides_N[queries_Q][:, None] == slides_N[None, :]] = -np.inf
    return np.argsort(-similarity_QN, axis=1, kind="stable")[:, :k]


def same_class_share(nearest_QK: NDArray[np.intp], label_N: NDArray[Any], queries_Q: NDArray[np.intp]) -> float:
    """Share of the neighbours that show the class of their query."""
    return float((label_N[nearest_QK] == label_N[queries_Q][:, None]).mean())
