from __future__ import annotations

import json

import numpy as np
import pytest

from histill.errors import DataError
from histill.evaluate.retrieval import COSINE_RESOLUTION, paired_retrieval, twins


def at(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def by_loop(x: np.ndarray, scanner: np.ndarray, key: np.ndarray, k: int) -> float:
    """The definition, tile by tile; needs features without ties."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = []
    names = sorted(set(scanner))
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            directions = []
            for one, other in ((a, b), (b, a)):
                hits = []
                for query in np.flatnonzero(scanner == one):
                    twin = [j for j in np.flatnonzero(scanner == other) if key[j] == key[query]]
                    if twin:
                        pool = [j for j in np.flatnonzero((scanner == a) | (scanner == b)) if j != query]
                        nearest = sorted(pool, key=lambda j: -(unit[query] @ unit[j]))[:k]
                        hits.append(twin[0] in nearest)
                if hits:
                    directions.append(np.mean(hits))
            if directions:
                pairs.append(np.mean(directions))
    return float(np.mean(pairs))


def test_a_small_case_by_hand():
    #              a: p  q   r    b: p  q   r
    x = at(0, 20, 90, 12, 60, 95)
    scanner = np.array(["a"] * 3 + ["b"] * 3)
    key = np.array(["p", "q", "r"] * 2)
    # a to b: p (0): nearest is b.p (12): found. q (20): b.p (8 off), a.p (20), b.q (40): rank 3. r: b.r: found.
    # b to a: p (12): a.q (8 off), a.p (12 off): rank 2. q (60): a.r (30), b.r (35), a.q (40): rank 3. r: found.
    found = paired_retrieval(x, scanner, key, top=(1, 2, 3))
    assert found.top == pytest.approx({1: (2 / 3 + 1 / 3) / 2, 2: (2 / 3 + 2 / 3) / 2, 3: 1.0})
    assert found.cosine == pytest.approx(np.cos(np.radians([12, 40, 5])).mean())
    assert found.pairs == 1
    assert found.top_1 == found.top[1]


def messy(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four scanners of which one has seen few fields, another some that no one else has; shuffled."""
    rng = np.random.default_rng(seed)
    rows = [
        (s, k)
        for s, fields in zip("abcd", (range(20), range(20), range(5, 9), range(15, 40)), strict=True)
        for k in fields
    ]
    order = rng.permutation(len(rows))
    scanner, key = (np.array(column)[order] for column in zip(*rows, strict=True))
    field = rng.normal(size=(40, 6))
    return field[key] + 0.7 * rng.normal(size=(len(rows), 6)), scanner, key


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_definition_tile_by_tile(seed):
    x, scanner, key = messy(seed)
    found = paired_retrieval(x.astype(np.float32), scanner, key, top=(1, 3, 10))
    for k, share in found.top.items():
        assert share == pytest.approx(by_loop(x, scanner, key, k), abs=1e-9)
    assert found.pairs == 5  # c and d share no field
    assert 0 < found.top[1] < found.top[3] < found.top[10]


def test_order_scale_and_rotation_do_not_matter():
    x, scanner, key = messy(3)
    expected = paired_retrieval(x, scanner, key)
    order = np.random.default_rng(4).permutation(len(x))
    turned = x @ np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0] * np.arange(1, len(x) + 1)[:, None]
    found = paired_retrieval(turned[order], scanner[order], key[order])
    assert found.top == pytest.approx(expected.top)
    assert found.cosine == pytest.approx(expected.cosine)


def test_perfect_twins_are_always_found():
    field = np.random.default_rng(6).normal(size=(30, 8))
    found = paired_retrieval(np.tile(field, (3, 1)), np.repeat(["a", "b", "c"], 30), np.tile(np.arange(30), 3))
    assert (found.top_1, found.top_10, found.pairs) == (1.0, 1.0, 3)
    assert found.cosine == pytest.approx(1.0)


def test_a_collapsed_encoder_is_at_chance():
    scanner, key = np.repeat(["a", "b"], 30), np.tile(np.arange(30), 2)
    found = paired_retrieval(np.ones((60, 4)), scanner, key)
    assert found.top == pytest.approx({1: 1 / 59, 10: 10 / 59})
    rounding = 1 + 1e-5 * np.random.default_rng(7).normal(size=(60, 4))  # cosines differ by 1e-10: none in float32
    assert paired_retrieval(rounding, scanner, key).top == pytest.approx({1: 1 / 59, 10: 10 / 59})


def test_ties_share_their_ranks():
    # the twin of the first tile is as near as two others, one further tile is nearer
    x = at(0, 10, 30, 5, 10, 10)
    scanner, key = np.array(["a"] * 3 + ["b"] * 3), np.array(["p", "s", "t", "u", "p", "v"])
    found = paired_retrieval(x, scanner, key, top=(1, 2, 3, 4))
    # a.p: b.u is nearer; a.s, b.p, b.v tie. b.p (10): a.s and b.v are nearer (0), then b.u (5), then a.p (10).
    assert found.top == pytest.approx({1: 0.0, 2: (1 / 3 + 0) / 2, 3: (2 / 3 + 0) / 2, 4: (1 + 1) / 2})


def test_a_lead_above_the_resolution_counts():
    step = np.sqrt(8 * COSINE_RESOLUTION)  # its cosine is 4 resolutions below 1
    x = np.array([[1.0, 0.0], [np.cos(step), np.sin(step)], [1.0, 0.0]])
    assert paired_retrieval(x, np.array(["a", "a", "b"]), np.array([0, 1, 0]), top=(1,)).top_1 == 1.0


@pytest.mark.parametrize("index", range(15))
def test_equals_the_exact_numbers_of_the_plism_benchmark(shared_parity, index):
    folder = shared_parity / "plism"
    pair = json.loads((folder / "expected.json").read_text())["pairs"][index]
    both = [np.load(folder / "features" / pair[name] / "features.npy") for name in ("slide_a", "slide_b")]
    rows = np.concatenate(both)
    found = paired_retrieval(
        rows[:, 3:],
        np.repeat(["a", "b"], [len(x) for x in both]),
        np.array([str(place) for place in rows[:, :3].tolist()]),
        top=(1, 3, 5, 10),
    )
    np.testing.assert_allclose([found.cosine, *found.top.values()], pair["exact"], atol=1e-6)


def test_twins_names_rows_of_equal_fields():
    found = twins(np.array(["b", "a", "b", "a", "c"]), np.array([7, 8, 8, 7, 9]))
    assert list(found) == [("a", "b")]
    rows_a, rows_b = found["a", "b"]
    assert dict(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == {1: 2, 3: 0}


def test_wrong_arguments():
    x = np.eye(4)
    with pytest.raises(DataError, match=r"one field twice(.|\n)*rows 0 and 2"):
        paired_retrieval(x, np.array(["a", "b", "a", "b"]), np.array([1, 1, 1, 2]))
    with pytest.raises(DataError, match=r"no field(.|\n)*a, b"):
        paired_retrieval(x, np.array(["a", "a", "b", "b"]), np.arange(4))
    with pytest.raises(DataError, match="4 rows, 3 scanners"):
        paired_retrieval(x, np.array(["a", "a", "b"]), np.arange(4))
    with pytest.raises(DataError, match="not finite"):
        paired_retrieval(x * np.nan, np.array(["a", "a", "b", "b"]), np.array([0, 1, 0, 1]))
