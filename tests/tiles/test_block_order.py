"""The orders beside the plain shuffle, and who reads which position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from histill.tiles import order

_seeds = st.integers(0, 2**63 - 1)
_patient = settings(deadline=None, max_examples=60)


def _epoch(epoch: int, tiles: int, seed: int, block_tiles: int, window_blocks: int) -> NDArray[np.int64]:
    positions = np.arange(epoch * tiles, (epoch + 1) * tiles)
    return order.block_tile_at(positions, tiles, seed, block_tiles=block_tiles, window_blocks=window_blocks)


def _is_usual(counts: NDArray[np.int64]) -> bool:
    """Whether counts of equally likely outcomes lie within 6 standard deviations of what chance gives."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - (counts.size - 1)) < 6 * np.sqrt(2 * (counts.size - 1))


def test_the_plain_shuffle_and_its_hash_are_what_they_were_when_runs_began_to_depend_on_them() -> None:
    positions = np.array([0, 1, 2, 999, 1000, 10**12])
    assert order.tile_at(positions, 1000, 7).tolist() == [826, 361, 713, 893, 510, 544]
    assert order.tile_at(np.arange(5), 5, 2**62).tolist() == [4, 1, 0, 3, 2]
    assert order.tile_at(np.array([0, 10**9]), 43_374_634, 1).tolist() == [11_686_091, 14_255_798]
    assert int(order.mix(1, 2, 3)) == 0x27D1DADE99DDF6A4
    assert order.uniforms(3, 1, np.array([5]), 2).tolist() == [[0.00466430096206516, 0.7651985269456925]]


# ------------------------------------------------------------------ block shuffle


@_patient
@given(_seeds, st.integers(1, 3000), st.integers(0, 1000), st.integers(1, 70), st.integers(1, 40))
@example(0, 1, 0, 1, 1)
@example(0, 2, 0, 2, 1)
@example(0, 4, 0, 2, 1)
@example(0, 5, 3, 2, 1)
@example(0, 65, 3, 8, 3)
def test_each_epoch_holds_every_tile_exactly_once(
    seed: int, tiles: int, epoch: int, block_tiles: int, window_blocks: int
) -> None:
    np.testing.assert_array_equal(np.sort(_epoch(epoch, tiles, seed, block_tiles, window_blocks)), np.arange(tiles))


@_patient
@given(_seeds, st.integers(1, 2000), st.integers(0, 5), st.integers(1, 50))
def test_blocks_of_one_tile_and_a_window_of_all_are_the_plain_shuffle(
    seed: int, tiles: int, epoch: int, size: int
) -> None:
    plain = order.tile_at(np.arange(epoch * tiles, (epoch + 1) * tiles), tiles, seed)
    np.testing.assert_array_equal(_epoch(epoch, tiles, seed, 1, size), plain)
    np.testing.assert_array_equal(_epoch(epoch, tiles, seed, size, -(-tiles // size)), plain)


@_patient
@given(_seeds, st.integers(200, 3000), st.integers(0, 50), st.integers(2, 40), st.integers(1, 10))
def test_a_reader_is_at_few_places_at_a_time(
    seed: int, tiles: int, epoch: int, block_tiles: int, window_blocks: int
) -> None:
    """At any time the reader stands in one window; what a window holds forms at most so many runs of neighbours."""
    seen = _epoch(epoch, tiles, seed, block_tiles, window_blocks)
    blocks = -(-tiles // block_tiles)
    windows = -(-blocks // window_blocks)
    edges = [min(window * blocks // windows * block_tiles, tiles) for window in range(windows + 1)]
    for first, last in pairwise(edges):
        assert 0 < last - first <= window_blocks * block_tiles
        inside = np.sort(seen[first:last])
        gaps = np.count_nonzero(np.diff(inside) != 1)
        on_the_ring = gaps + int((inside[0] - inside[-1]) % tiles != 1)
        assert on_the_ring <= window_blocks
    sizes = np.diff(edges)
    assert sizes.max() - sizes.min() < 2 * block_tiles


@_patient
@given(_seeds, st.integers(1, 500), st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 20))
def test_a_position_has_its_tile_in_any_batch(seed: int, tiles: int, positions: list[int], block_tiles: int) -> None:
    together = order.block_tile_at(np.array(positions), tiles, seed, block_tiles=block_tiles, window_blocks=3)
    for position, tile in zip(positions, together, strict=True):
        alone = order.block_tile_at(np.array([position]), tiles, seed, block_tiles=block_tiles, window_blocks=3)
        assert alone.tolist() == [tile]


@pytest.mark.parametrize(("tiles", "block_tiles", "window_blocks"), [(100, 8, 3), (97, 16, 2), (30, 3, 1)])
def test_every_tile_is_equally_likely_at_every_place(tiles: int, block_tiles: int, window_blocks: int) -> None:
    epochs = 4000
    positions = np.arange(epochs * tiles)
    seen = order.block_tile_at(positions, tiles, 3, block_tiles=block_tiles, window_blocks=window_blocks)
    for place in (0, 1, tiles // 2, tiles - 2, tiles - 1):  # the ragged last block is no exception
        assert _is_usual(np.bincount(seen.reshape(epochs, tiles)[:, place], minlength=tiles))


def test_tiles_that_share_a_window_are_others_in_each_epoch() -> None:
    tiles, block_tiles, window_blocks = 4096, 16, 16
    companions = []
    for epoch in range(2):
        place = np.argsort(_epoch(epoch, tiles, 5, block_tiles, window_blocks)) // (block_tiles * window_blocks)
        companions.append(place[:, None] == place[None, :])
    both = np.count_nonzero(companions[0] & companions[1]) / np.count_nonzero(companions[0])
    # chance is 1/16; blocks that overlap (half of a block on average) keep some neighbours together
    assert both < 0.15


def test_43_million_tiles_need_no_table() -> None:
    tiles = 43_374_634
    positions = np.arange(10 * tiles + 10**7, 10 * tiles + 10**7 + 64 * 512)
    seen = order.block_tile_at(positions, tiles, 1, block_tiles=64, window_blocks=512)
    assert np.unique(seen).size == len(positions)
    # 32,768 tiles in a row come from two windows of 512 blocks: some 1,000 runs of neighbours, spread over the set
    assert 400 < np.count_nonzero(np.diff(np.sort(seen)) > 1000) < 1100
    assert seen.min() < tiles // 50
    assert seen.max() > tiles - tiles // 50


@pytest.mark.parametrize(("block_tiles", "window_blocks", "tiles"), [(0, 1, 5), (2, 0, 5), (1, 1, 0), (2, 1, 0)])
def test_an_order_of_nothing_is_refused(block_tiles: int, window_blocks: int, tiles: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        order.block_tile_at(np.arange(3), tiles, 1, block_tiles=block_tiles, window_blocks=window_blocks)


# ------------------------------------------------------------------ slide-balanced

_sets = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def _balanced(positions: NDArray[np.int64], tiles_S: list[int], seed: int) -> NDArray[np.int64]:
    first = np.cumsum([0, *tiles_S[:-1]])
    return order.balanced_tile_at(positions, first, np.array(tiles_S), seed)


@_patient
@given(_seeds, _sets, st.integers(0, 1000))
def test_in_a_round_every_slide_comes_once(seed: int, tiles_S: list[int], round_: int) -> None:
    edges = np.cumsum([0, *tiles_S])
    count = len(tiles_S)
    seen = _balanced(np.arange(round_ * count, (round_ + 1) * count), tiles_S, seed)
    slides = np.searchsorted(edges, seen, side="right") - 1
    assert sorted(slides.tolist()) == list(range(count))


@_patient
@given(_seeds, _sets, st.integers(0, 20))
def test_a_slide_repeats_no_tile_before_all_have_come(seed: int, tiles_S: list[int], pass_: int) -> None:
    edges = np.cumsum([0, *tiles_S])
    rounds = (pass_ + 1) * max(tiles_S)
    seen = _balanced(np.arange(rounds * len(tiles_S)), tiles_S, seed)
    for slide, tiles in enumerate(tiles_S):
        own = seen[(seen >= edges[slide]) & (seen < edges[slide + 1])]
        assert len(own) == rounds
        passes = own[: rounds // tiles * tiles].reshape(-1, tiles)
        np.testing.assert_array_equal(
            np.sort(passes, axis=1), np.arange(edges[slide], edges[slide + 1])[None] + 0 * passes
        )
        rest = own[rounds // tiles * tiles :]
        assert len(set(rest.tolist())) == len(rest)


def test_rounds_and_passes_have_orders_of_their_own() -> None:
    tiles_S = [50] * 40
    seen = _balanced(np.arange(40 * 100), tiles_S, 9).reshape(100, 40)
    slides = seen // 50
    assert len({tuple(row) for row in slides.tolist()}) == 100
    for slide in range(40):
        first, second = np.split(seen[slides == slide], 2)
        assert np.count_nonzero(first == second) < 12  # 1 on average
    orders = [tuple(seen[slides == slide][:50] % 50) for slide in range(40)]
    assert len(set(orders)) == 40


def test_the_first_slide_of_a_round_is_any() -> None:
    rounds = np.arange(6000) * 7
    assert _is_usual(np.bincount(_balanced(rounds, [3] * 7, 2) // 3, minlength=7))


def test_a_slide_without_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        _balanced(np.arange(3), [2, 0], 1)
    with pytest.raises(ValueError, match="at least one"):
        order.balanced_tile_at(np.arange(3), np.array([], dtype=np.int64), np.array([], dtype=np.int64), 1)


# ------------------------------------------------------------------ ranks, workers, resume


def _read_by_all(first: int, batch: int, world: int, workers: int) -> list[NDArray[np.int64]]:
    return [
        order.positions_of(first, batch, rank=rank, world=world, worker=worker, workers=workers)
        for rank in range(world)
        for worker in range(max(1, workers))
    ]


@_patient
@given(
    _seeds,
    st.integers(1, 400),
    st.integers(1, 20),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 3), st.integers(0, 4), st.integers(1, 12)), max_size=12),
)
def test_a_run_resumed_with_any_world_and_workers_reads_each_tile_once_an_epoch(
    seed: int, tiles: int, block_tiles: int, window_blocks: int, legs: list[tuple[int, int, int, int]]
) -> None:
    """Each leg: a batch size, a world, workers, and how many steps until the run is stopped and resumed."""
    consumed, positions = 0, [np.array([], dtype=np.int64)]
    for batch, world, workers, steps in legs:
        for _ in range(steps):
            shares = _read_by_all(consumed, batch, world, workers)
            positions += shares
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            consumed += batch
    stream = order.block_tile_at(
        np.concatenate(positions), tiles, seed, block_tiles=block_tiles, window_blocks=window_blocks
    )
    assert len(stream) == consumed
    for epoch in range(consumed // tiles):
        assert sorted(stream[epoch * tiles : (epoch + 1) * tiles].tolist()) == list(range(tiles))
    unfinished = stream[consumed // tiles * tiles :].tolist()
    assert len(set(unfinished)) == len(unfinished)


@_patient
@given(st.integers(0, 10**12), st.integers(1, 300), st.integers(1, 9), st.integers(0, 9))
def test_shares_are_the_step_in_order(first: int, batch: int, world: int, workers: int) -> None:
    shares = _read_by_all(first, batch, world, workers)
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(first, first + batch))
    of_ranks = [order.positions_of(first, batch, rank=rank, world=world) for rank in range(world)]
    assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1
    inside = [shares[rank * max(1, workers) :][: max(1, workers)] for rank in range(world)]
    for rank, parts in zip(of_ranks, inside, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), rank)


@pytest.mark.parametrize(
    ("rank", "world", "worker", "workers"), [(1, 1, 0, 0), (-1, 2, 0, 0), (0, 1, 2, 2), (0, 1, 1, 0)]
)
def test_a_rank_or_worker_that_is_none_is_refused(rank: int, world: int, worker: int, workers: int) -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        order.positions_of(0, 8, rank=rank, world=world, worker=worker, workers=workers)
