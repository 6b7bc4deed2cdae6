"""Headline scores into the card of the model that they were measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from histill.errors import DataError, ModelError
from histill.evaluate.report.collect import Collection, find_score
from histill.evaluate.report.tables import NAMES, subset_notes, words
from histill.evaluate.results import Result
from histill.models.bundle import read_bundle, write_benchmarks

__all__ = ["card_rows", "write_card"]


def write_card(found: Collection, bundle: Path) -> list[dict[str, Any]]:
    """Write the scores of a bundle's own weights into its ``README.md`` and ``histill.json``.

    Returns
    -------
    list
        What was written, a row for each headline score.

    Raises
    ------
    ModelError
        No bundle of histill stands there, or none of the results was measured on its weights.
    DataError
        Two results of the same score and pooling.
    """
    weights = read_bundle(bundle).encoder.content_hash()
    rows = card_rows(found, bundle, weights)
    write_benchmarks(bundle, rows)
    return rows


def card_rows(found: Collection, bundle: Path, weights: str) -> list[dict[str, Any]]:
    """Rows of the results that were measured on these weights, under whatever name.

    Parameters
    ----------
    found
        The results.
    bundle
        Its folder, for the error.
    weights
        Content hash of its encoder.

    Returns
    -------
    list
        As of :func:`write_card`: JSON-ready, a row for each headline score and pooling.

    Raises
    ------
    ModelError
        None of the results was measured on these weights.
    DataError
        Two results of the same score and pooling.
    """
    own = {place: result for place, result in found.results.items() if result.weights == weights}
    if not own:
        scored = sorted({f"{encoder.name}: {r.weights or 'not stated'}" for (encoder, _), r in found.results.items()})
        raise ModelError(
            "these results were measured on other weights than those of this bundle",
            where=bundle,
            got=f"content hash {weights}",
            allowed="; ".join(scored),
            remedy="evaluate this bundle, or name the one that was evaluated",
        )
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (encoder, column), result in own.items():
        key = (column.benchmark, column.score, encoder.pooling)
        if key in rows:
            raise DataError(
                "two results of the same score on the same weights",
                where=f"{column.benchmark}, {words(column.score)}, {encoder.pooling}",
                remedy="give only the folder that counts",
            )
        rows[key] = _row(result)
    return list(rows.values())


def _row(result: Result) -> dict[str, Any]:
    score = find_score(result, result.headline)
    assert score is not None, "collect looked at this"
    notes = [*subset_notes(result), *([score.note] if score.note else [])]
    return {
        "benchmark": NAMES.get(result.benchmark, result.benchmark),
        "data": _data(result),
        "score": words(result.headline),
        "pooling": result.pooling,
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "note": "; ".join(notes) or None,
        "date": result.date,
        "histill": result.histill,
    }


def _data(result: Result) -> str:
    """The set in a few words: its folder or table, how much of it, and how its tiles entered."""
    data, asked = result.data, result.settings
    counts = data.get("counts")
    parts = [Path(str(data["root"])).name] if data.get("root") else []
    parts += [f"{data['slides']:,} slides"] if isinstance(data.get("slides"), int) else []
    parts += [f"{data['tiles']:,} tiles"] if isinstance(data.get("tiles"), int) else []
    parts += [f"{split} {count:,}" for split, count in counts.items()] if isinstance(counts, dict) else []
    parts += [", ".join(data[name]) for name in ("tasks", "datasets", "scanners") if data.get(name)]
    parts += [f"{asked['input_px']} px"] if asked.get("input_px") else []
    parts += [asked["precision"]] if asked.get("precision") else []
    return ", ".join(parts)
