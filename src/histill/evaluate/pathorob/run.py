"""PathoROB: data sets on the disk in, a result out.

Shapes: N rows of a metadata file, T different tiles, D features.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from histill.errors import ConfigError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.pathorob.drop import STRENGTH, average_performance_drop, confounded_probes
from histill.evaluate.pathorob.index import index_of, typed_neighbours
from histill.evaluate.pathorob.layout import (
    DATASETS,
    Dataset,
    Table,
    find_datasets,
    find_images,
    read_features,
    read_metadata,
)
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.statistics import Clusters, clusters_of, estimate

__all__ = ["REPEATS", "run_pathorob"]

REPEATS = 20
"""Repeats of the performance drop, as in the original."""
_INDEX = "pathorob index 1"
_DROP = f"pathorob drop 1, C = {STRENGTH}"
"""Change when a part's number would."""


def run_pathorob(
    *,
    root: Path,
    datasets: Sequence[str] | None = None,
    embedder: Embedder | None,
    cache: FeatureCache,
    out: Path,
    features: Path | None = None,
    repeats: int = REPEATS,
    console: Console,
) -> Result:
    """Measure the robustness index and the performance drop; finished parts in ``out`` are not computed again.

    Parameters
    ----------
    root
        The metadata and images, see :mod:`histill.evaluate.pathorob.layout`.
    datasets
        ``camelyon``, ``tolkach_esca``, ``tcga`` (all if None); those that are not there are named as missing.
    embedder, cache
        Who embeds the images; where features are kept (``out/features`` if the cache has no folder).
    out
        Gets ``parts/`` and ``results.json``.
    features
        Instead of an embedder: the folder of one encoder's feature files, as the original leaves them.
    repeats
        Draws of the performance drop; 0 leaves it out.

    Returns
    -------
    Result
        ``robustness_index`` (mean over the data sets on the disk; interval by slide) and per data set, and
        ``apd_id/<dataset>``, ``apd_ood/<dataset>``, partly ours (:mod:`histill.evaluate.pathorob.drop`).

    Raises
    ------
    ConfigError
        An unknown data set; both or neither of ``embedder`` and ``features``.
    DataError
        A missing or damaged file; a feature that is not finite.
    """
    if (embedder is None) == (features is None):
        raise ConfigError("PathoROB needs either an encoder or a folder of features")
    begun = time.monotonic()
    cache = cache if cache.folder else FeatureCache(out / "features")
    present, missing = find_datasets(root, datasets, features=features)
    found, keys = _measure_all(root, present, embedder, cache, features, repeats, out / "parts", console)
    result = Result(
        benchmark="pathorob",
        encoder=embedder.name if embedder else (features or root).name,
        encoder_key=embedder.key if embedder else digest(keys),
        pooling=embedder.pooling if embedder else "as extracted",
        headline="robustness_index",
        scores=_scores(found, missing),
        data=_data(root, present, missing, repeats),
        details=_details(found),
        seconds=time.monotonic() - begun,
    )
    write_result(result, out)
    return result


def _details(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each data set's parts, and the slides of the mean and of each index for paired tests."""
    each = {f"robustness_index/{name}": part["clusters"] for name, part in found.items()}
    return {"datasets": found, "clusters": {"robustness_index": _index_clusters(found).to_plain()} | each}


def _measure_all(
    root: Path,
    present: Sequence[Dataset],
    embedder: Embedder | None,
    cache: FeatureCache,
    features: Path | None,
    repeats: int,
    folder: Path,
    console: Console,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What was found, by data set, and the keys of encoder and tiles."""
    found, keys = {}, []
    with progress(console) as bar:
        step = bar.add_task("PathoROB", total=len(present) * (1 + repeats))
        for dataset in present:
            source = _open(root, dataset, embedder, cache, features, with_drop=repeats > 0)
            keys.append(source.key)
            found[dataset.name] = _measure(source, dataset, repeats, folder, lambda: bar.advance(step))
    return found, keys


def _data(root: Path, present: Sequence[Dataset], missing: dict[str, str], repeats: int) -> dict[str, Any]:
    return {
        "root": str(root),
        "datasets": {dataset.name: asdict(dataset) for dataset in present},
        "missing": missing,
        "drop": {"protocol": _DROP, "repeats": repeats, "seeds": list(range(repeats))},
        "interval": "bootstrap over slides",
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """Features of a data set's tiles, and what their rows mean."""

    index: Table
    drop: Table | None
    key: str
    """Encoder and tiles."""
    load: Callable[[], tuple[dict[str, int], NDArray[np.float32]]]
    """The row of each tile, and the features (T, D); called when a part is missing."""

    def rows(self, table: Table) -> NDArray[np.float32]:
        """Features of the rows of a metadata file (N, D)."""
        row_of, features_TD = self.load()
        return features_TD[[row_of[tile] for tile in table.tiles]]


def _open(
    root: Path,
    dataset: Dataset,
    embedder: Embedder | None,
    cache: FeatureCache,
    features: Path | None,
    *,
    with_drop: bool,
) -> _Source:
    index = read_metadata(root, dataset.index_metadata)
    drop = read_metadata(root, dataset.drop_metadata) if with_drop else None
    assert index is not None, "find_datasets has seen it"
    centre_of = {
        tile: centre
        for table in (index, drop)
        if table is not None
        for tile, centre in zip(table.tiles, table.columns["medical_center"].tolist(), strict=True)
    }
    if embedder is not None:
        images = find_images(root, dataset, centre_of)
        row_of = {tile: row for row, tile in enumerate(images.tiles)}

        def load() -> tuple[dict[str, int], NDArray[np.float32]]:
            return row_of, cache.features(embedder, images.key, len(images.tiles), images.read)

        return _Source(index=index, drop=drop, key=digest([embedder.key, images.key]), load=load)
    assert features is not None
    tiles = sorted(centre_of)
    features_TD = read_features(features / dataset.name, tiles, [centre_of[tile] for tile in tiles])
    row_of = {tile: row for row, tile in enumerate(tiles)}
    key = hashlib.sha256(features_TD.tobytes()).hexdigest()
    return _Source(index=index, drop=drop, key=key, load=lambda: (row_of, features_TD))


def _measure(source: _Source, dataset: Dataset, repeats: int, folder: Path, tell: Callable[[], None]) -> dict[str, Any]:
    """Both measures of one data set, part by part."""

    def index() -> dict[str, Any]:
        table = source.index
        so_N, os_N = typed_neighbours(source.rows(table), table.columns, dataset.k)
        query_N = np.isfinite(so_N)
        subsets = np.unique(table.columns["subset"][query_N])
        clusters = clusters_of(so_N[query_N], (so_N + os_N)[query_N], table.columns["slide_id"][query_N])
        by_subset = {
            str(name): [so_N[table.columns["subset"] == name].sum(), os_N[table.columns["subset"] == name].sum()]
            for name in subsets
        }
        return {
            "robustness_index": index_of(so_N, os_N),
            "tiles": int(query_N.sum()),
            "so": float(np.nansum(so_N)),
            "os": float(np.nansum(os_N)),
            "subsets": {name: {"so": float(so), "os": float(os)} for name, (so, os) in by_subset.items()},
            "clusters": clusters.to_plain(),
        }

    decides = {"protocol": _INDEX, "source": source.key, "metadata": source.index.key, "k": dataset.k}
    found: dict[str, Any] = dict(kept(folder, f"{dataset.name}-index", decides, index))
    tell()
    found["drop"] = []
    table = source.drop
    for seed in range(repeats if table is not None else 0):
        assert table is not None

        def drop(seed: int = seed, table: Table = table) -> dict[str, Any]:
            return asdict(confounded_probes(source.rows(table), table.columns, levels=dataset.levels, seed=seed))

        decides = {
            "protocol": _DROP,
            "source": source.key,
            "metadata": table.key,
            "levels": dataset.levels,
            "seed": seed,
        }
        found["drop"].append(kept(folder, f"{dataset.name}-drop-{seed}", decides, drop))
        tell()
    return found


def _index_clusters(found: dict[str, dict[str, Any]]) -> Clusters:
    """Slides of all data sets, drawn within their data set; one component per data set."""
    names = list(found)
    each = [Clusters.from_plain(found[name]["clusters"]) for name in names]
    above, below = (
        np.concatenate(
            [
                np.pad(getattr(clusters, side), ((0, 0), (column, len(names) - 1 - column)))
                for column, clusters in enumerate(each)
            ]
        )
        for side in ("numerator_SC", "denominator_SC")
    )
    strata = tuple(name for name, clusters in zip(names, each, strict=True) for _ in clusters.names)
    slides = tuple(slide for clusters in each for slide in clusters.names)
    return Clusters(
        names=tuple(f"{name}/{slide}" for name, slide in zip(strata, slides, strict=True)),
        numerator_SC=above,
        denominator_SC=below,
        strata=strata,
    )


def _scores(found: dict[str, dict[str, Any]], missing: dict[str, str]) -> tuple[Score, ...]:
    absent = [dataset.name for dataset in DATASETS if dataset.name not in found]
    note = f"mean over {', '.join(found)}; without {', '.join(absent)}" if absent else None
    mean = estimate(_index_clusters(found))
    scores = [Score(name="robustness_index", value=mean.value, low=mean.low, high=mean.high, note=note)]
    for name, part in found.items():
        own = estimate(Clusters.from_plain(part["clusters"]))
        scores.append(
            Score(name=f"robustness_index/{name}", value=part["robustness_index"], low=own.low, high=own.high)
        )
    scores += [
        Score(name=f"robustness_index/{name}", value=None, note=f"not on the disk: {what}")
        for name, what in missing.items()
    ]
    for name, part in found.items():
        for short, side in (("id", "in_domain"), ("ood", "out_of_domain")):
            runs = [repeat[side] for repeat in part["drop"] if repeat[side] is not None]
            if runs:
                value = average_performance_drop(np.array(runs).T)
                note = f"{len(runs)} repeats, slides and probe drawn our way; higher is better, 0 is no drop"
                note += "; no interval: the repeats draw from the same slides"
                scores.append(Score(name=f"apd_{short}/{name}", value=value, note=note))
    return tuple(scores)
