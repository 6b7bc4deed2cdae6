"""Groups, score and intervals, against numpy on small tables."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from histill.errors import DataError
from histill.evaluate.plism import groups, layout
from histill.evaluate.plism.engine import PairMetrics
from histill.evaluate.plism.groups import SCORE_PARTS as PARTS
from histill.evaluate.plism.groups import Pair
from histill.evaluate.plism.layout import SlideName
from histill.evaluate.statistics import paired_test, retention_percent


def pairs_of(stainings: tuple[str, ...], scanners: tuple[str, ...], seed: int = 0, tied: float = 0.0) -> list[Pair]:
    names = [f"{staining}_{scanner}_to_GMH_S60.tif" for staining in stainings for scanner in scanners]
    slides = [SlideName.of(name, Path(name)) for name in names]
    rng = np.random.default_rng(seed)
    found = []
    for a, b in combinations(slides, 2):
        numbers = dict(zip(groups.METRICS, rng.uniform(size=5).tolist(), strict=True))
        found.append(Pair(a=a, b=b, metrics=PairMetrics(**numbers, tied=tied)))
    return found


def by_name(pairs: list[Pair]) -> dict[str, groups.Score]:
    return {score.name: score for score in groups.scores(pairs)}


def test_group_sizes_of_the_whole_set() -> None:
    counts = {s.group: s.pairs for s in groups.summarise(pairs_of(layout.STAININGS, layout.SCANNERS))}
    assert counts == {"cross_scanner": 273, "cross_staining": 546, "both": 3276, "all": 4095}


def test_numbers_of_a_group() -> None:
    pairs = pairs_of(("GM", "GV", "HR"), ("P", "SQ"))
    chosen = [p.metrics.top_3_accuracy for p in pairs if p.a.staining == p.b.staining]
    assert len(chosen) == 3
    (found,) = [s for s in groups.summarise(pairs) if (s.group, s.metric) == ("cross_scanner", "top_3_accuracy")]
    low, middle, high = np.quantile(chosen, (0.25, 0.5, 0.75))
    assert (found.mean, found.std) == (pytest.approx(np.mean(chosen)), pytest.approx(np.std(chosen)))
    assert (found.median, found.iqr) == (pytest.approx(middle), pytest.approx(high - low))


def test_score_is_the_mean_of_four_medians() -> None:
    pairs = pairs_of(("GM", "GV", "HR"), ("P", "SQ", "S60"))
    scanner = [p.metrics.top_10_accuracy for p in pairs if p.a.staining == p.b.staining]
    staining = [p.metrics.top_10_accuracy for p in pairs if p.a.scanner == p.b.scanner]
    both = [p.metrics.top_10_accuracy for p in pairs if p.a.staining != p.b.staining and p.a.scanner != p.b.scanner]
    cosine = [p.metrics.cosine_similarity for p in pairs]
    want = np.mean([np.median(values) for values in (cosine, scanner, staining, both)])
    found = by_name(pairs)["score"]
    assert found.value == pytest.approx(want)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.note is None


def test_empty_groups_are_said() -> None:
    found = by_name(pairs_of(("GM",), ("P", "SQ", "S60")))
    assert found["score"].value is None
    assert "cross_staining" in (found["score"].note or "")
    assert found["top_10_accuracy/cross_staining"].value is None
    assert found["top_10_accuracy/cross_scanner"].value is not None


def test_not_a_number_is_said_and_not_hidden() -> None:
    pairs = pairs_of(("GM", "GV"), ("P", "SQ"))
    numbers = dict.fromkeys(groups.METRICS, 0.5) | {"cosine_similarity": math.nan}
    pairs[2] = Pair(a=pairs[2].a, b=pairs[2].b, metrics=PairMetrics(**numbers))
    found = by_name(pairs)
    assert found["score"].value is None
    assert pairs[2].b.name in (found["cosine_similarity/all"].note or "")
    assert found["top_10_accuracy/both"].value is not None
    assert groups.pair_rows(pairs)[2]["cosine_similarity"] is None


def test_ties_are_said() -> None:
    assert "collapsed" in (by_name(pairs_of(("GM", "GV"), ("P", "SQ"), tied=1.0))["score"].note or "")


def test_constant_metrics_have_intervals_of_no_width() -> None:
    pairs = pairs_of(("GM", "GV", "HR"), ("P", "SQ", "S60"))
    same = [Pair(a=p.a, b=p.b, metrics=PairMetrics(**dict.fromkeys(groups.METRICS, 0.25))) for p in pairs]
    found = by_name(same)["score"]
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


def test_intervals_follow_slides_not_pairs() -> None:
    """Four bad slides of 21 spoil 35 % of the pairs together: pairs drawn one by one would never see a bad median."""
    pairs = pairs_of(("GM", "GV", "HR", "KR", "LM", "MY", "GIV"), ("P", "SQ", "S60"))
    bad = {pair.b.name for pair in pairs[:4]}
    values = [0.1 if bad & {p.a.name, p.b.name} else 0.9 for p in pairs]
    spoiled = [
        Pair(a=p.a, b=p.b, metrics=PairMetrics(**dict.fromkeys(groups.METRICS, value)))
        for p, value in zip(pairs, values, strict=True)
    ]
    found = by_name(spoiled)["cosine_similarity/all"]
    assert (found.low, found.value, found.high) == (0.1, 0.9, 0.9)
    independent = np.median(np.random.default_rng(0).choice(values, size=(1000, len(values))), axis=1)
    assert np.percentile(independent, 2.5) == 0.9


@pytest.mark.parametrize("seed", range(5))
def test_weighted_medians_are_those_of_repeated_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values_P = rng.normal(size=9)
    weights_BP = rng.integers(0, 3, size=(40, 9)).astype(np.int32)
    weights_BP[0] = 0
    found_B = groups._weighted_medians(values_P, weights_BP)
    assert np.isnan(found_B[0])
    for found, weights_P in zip(found_B[1:], weights_BP[1:], strict=True):
        assert found == pytest.approx(np.median(np.repeat(values_P, weights_P)))


def test_matrix() -> None:
    pairs = pairs_of(("GM", "GV"), ("P", "SQ"))
    found = groups.details(pairs)
    slides, cosine = found["matrix"]["slides"], found["matrix"]["cosine_similarity"]
    assert slides == sorted(slides)
    for pair in pairs:
        row, column = slides.index(pair.a.name), slides.index(pair.b.name)
        assert cosine[row][column] == cosine[column][row] == pair.metrics.cosine_similarity
    assert [cosine[place][place] for place in range(4)] == [None] * 4
    assert found["groups"]["both"]["top_10_accuracy"]["pairs"] == 2
    assert list(found["pairs"][0]) == ["slide_a", "slide_b", *groups.METRICS]


def test_resamples_draw_slides() -> None:
    pairs = pairs_of(("GM", "GV", "HR"), ("P", "SQ"))
    names = sorted({slide.name for pair in pairs for slide in (pair.a, pair.b)})
    drawn = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=100)
    parts = ("cosine_similarity/all", "top_10_accuracy/cross_scanner", "top_10_accuracy/cross_staining")
    for name in (*parts, "top_10_accuracy/both"):
        metric, _, group = name.partition("/")
        measure = groups.slide_medians(pairs, name)
        assert measure is not None
        assert measure.names == tuple(names)
        for got, counts in zip(measure.values(drawn), drawn, strict=True):
            times = dict(zip(names, counts.tolist(), strict=True))
            weights = [(p, times[p.a.name] * times[p.b.name]) for p in pairs if p.within(group)]
            values = [getattr(p.metrics, metric) for p, count in weights for _ in range(count)]
            assert got == pytest.approx(np.median(values) if values else np.nan, nan_ok=True)
    whole, each = (
        groups.slide_medians(pairs, "score"),
        [groups.slide_medians(pairs, "/".join(part)) for part in PARTS],
    )
    np.testing.assert_allclose(whole.values(drawn), np.mean([part.values(drawn) for part in each], axis=0))


def test_pairs_come_back_from_a_result() -> None:
    pairs = pairs_of(("GM", "GV", "HR"), ("P", "SQ"))
    numbers = dict.fromkeys(groups.METRICS, 0.5) | {"cosine_similarity": math.nan}
    pairs[2] = Pair(a=pairs[2].a, b=pairs[2].b, metrics=PairMetrics(**numbers))
    again = groups.read_pairs(groups.pair_rows(pairs))
    assert groups.pair_rows(again) == groups.pair_rows(pairs)
    assert groups.slide_medians(again, "score") is None
    assert groups.slide_medians(again, "top_10_accuracy/both").value == by_name(pairs)["top_10_accuracy/both"].value


def test_encoders_are_compared_and_retained_by_slide() -> None:
    """B is A with a tenth off everywhere: the difference is sure although each score alone is not."""
    better = pairs_of(("GM", "GV", "HR", "KR"), ("P", "SQ", "S60"))
    worse = [
        Pair(a=p.a, b=p.b, metrics=PairMetrics(**{m: getattr(p.metrics, m) - 0.1 for m in groups.METRICS}))
        for p in better
    ]
    a, b = (groups.slide_medians(pairs, "score") for pairs in (better, worse))
    found = paired_test(a, b)
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found.p < 0.01
    kept = retention_percent(b, a)
    assert kept.value == pytest.approx(100 * b.value / a.value)
    assert kept.low < kept.value < kept.high < 100
    with pytest.raises(DataError, match="same slides"):
        paired_test(a, groups.slide_medians(pairs_of(("GM", "GV", "HR"), ("P", "SQ")), "score"))
