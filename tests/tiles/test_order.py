from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from histill.tiles import order

_seeds = st.integers(min_value=0, max_value=2**63 - 1)
_sizes = st.integers(min_value=1, max_value=3000)


def _epoch(epoch: int, tiles: int, seed: int) -> NDArray[np.int64]:
    return order.tile_at(np.arange(epoch * tiles, (epoch + 1) * tiles), tiles, seed)


def _chi_square_is_usual(counts: NDArray[np.int64]) -> bool:
    """Whether counts of equally likely outcomes lie within 6 standard deviations of what chance gives."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)


# ------------------------------------------------------------------ the hash


def test_mix_of_zero_is_the_first_output_of_splitmix64() -> None:
    # Reference: java.util.SplittableRandom / Vigna's splitmix64.c, seed 0
    assert int(order.mix(0)) == 0xE220A8397B1DCDAF


def test_mix_broadcasts_and_a_row_does_not_depend_on_its_neighbours() -> None:
    grid = order.mix(3, np.arange(4)[:, None], np.arange(5)[None, :])
    assert grid.shape == (4, 5)
    assert grid.dtype == np.uint64
    assert int(grid[2, 4]) == int(order.mix(3, 2, 4))


def test_mix_takes_its_keys_in_order() -> None:
    assert int(order.mix(1, 2)) != int(order.mix(2, 1))
    assert int(order.mix(0)) != int(order.mix(0, 0))


@given(_seeds, st.integers(min_value=0, max_value=62))
def test_one_bit_of_a_key_changes_about_half_of_the_bits(seed: int, bit: int) -> None:
    positions = np.arange(64)
    changed = order.mix(seed, positions) ^ order.mix(seed ^ (1 << bit), positions)
    share = sum(int(word).bit_count() for word in changed) / (64 * 64)
    assert 0.4 < share < 0.6  # 13 standard deviations of a fair coin thrown 4,096 times


# ------------------------------------------------------------------ draws


def test_draws_are_uniform_on_the_half_open_interval() -> None:
    draws = order.uniforms(7, 1, np.arange(20_000), 5)
    assert draws.shape == (20_000, 5)
    assert draws.dtype == np.float64
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    for column in draws.T:
        assert _chi_square_is_usual(np.histogram(column, bins=50, range=(0, 1))[0])


def test_draws_of_one_position_are_not_correlated_with_each_other_or_with_the_next_position() -> None:
    draws = order.uniforms(7, 1, np.arange(20_000), 3)
    columns = np.column_stack([draws[:-1], draws[1:]])
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(6)
    assert np.abs(correlation).max() < 6 / np.sqrt(20_000)


@given(_seeds, st.integers(0, 2**40), st.integers(1, 8))
def test_a_draw_depends_on_seed_stream_and_its_own_position_alone(seed: int, start: int, count: int) -> None:
    positions = start + np.arange(9)
    together = order.uniforms(seed, 3, positions, count)
    alone = np.concatenate([order.uniforms(seed, 3, positions[index : index + 1], count) for index in range(9)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[::-1], order.uniforms(seed, 3, positions[::-1], count))
    np.testing.assert_array_equal(together, order.uniforms(seed, 3, positions, count + 2)[:, :count])
    assert (together != order.uniforms(seed, 4, positions, count)).all()
    assert (together != order.uniforms(seed + 1, 3, positions, count)).all()


# ------------------------------------------------------------------ order


@given(_seeds, _sizes, st.integers(0, 1000))
def test_each_epoch_holds_every_tile_exactly_once(seed: int, tiles: int, epoch: int) -> None:
    np.testing.assert_array_equal(np.sort(_epoch(epoch, tiles, seed)), np.arange(tiles))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 65_535, 65_536, 65_537])
def test_sizes_around_powers_of_two_are_permuted_too(tiles: int) -> None:
    np.testing.assert_array_equal(np.sort(_epoch(2, tiles, 5)), np.arange(tiles))


@given(_seeds, st.integers(50, 3000))
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, tiles: int) -> None:
    first = _epoch(0, tiles, seed)
    for other in (np.arange(tiles), _epoch(1, tiles, seed), _epoch(0, tiles, seed + 1)):
        # two independent permutations agree in one place on average; 15 places have a chance of 3e-13
        assert (first == other).sum() < 15


@settings(max_examples=30)
@given(_seeds, st.integers(1, 500), st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_a_position_has_its_tile_in_any_batch(seed: int, tiles: int, positions: list[int]) -> None:
    together = order.tile_at(np.array(positions), tiles, seed)
    alone = [int(order.tile_at(np.array([position]), tiles, seed)[0]) for position in positions]
    assert together.tolist() == alone


def test_many_ranks_see_what_one_rank_sees() -> None:
    whole = order.tile_at(np.arange(1000), 300, 11)
    for world in (2, 3, 4):
        dealt = np.empty_like(whole)
        for rank in range(world):
            dealt[rank::world] = order.tile_at(np.arange(rank, 1000, world), 300, 11)
        np.testing.assert_array_equal(dealt, whole)


@pytest.mark.parametrize("tiles", [5, 16, 100])
def test_every_tile_is_equally_likely_at_every_place(tiles: int) -> None:
    epochs = 4000
    orders = order.tile_at(np.arange(epochs * tiles), tiles, 3).reshape(epochs, tiles)
    for place in (0, tiles // 2, tiles - 1):
        assert _chi_square_is_usual(np.bincount(orders[:, place], minlength=tiles))


def test_the_tile_that_follows_a_tile_is_not_predictable() -> None:
    tiles, epochs = 16, 4000
    orders = order.tile_at(np.arange(epochs * tiles), tiles, 3).reshape(epochs, tiles)
    gaps = ((orders[:, 1:] - orders[:, :-1]) % tiles).ravel()
    assert gaps.min() > 0
    assert _chi_square_is_usual(np.bincount(gaps)[1:])


def test_a_billion_tiles_need_no_table() -> None:
    tiles = 43_374_634 * 30
    seen = order.tile_at(np.arange(10**12, 10**12 + 20_000), tiles, 1)
    assert seen.min() >= 0
    assert seen.max() < tiles
    assert np.unique(seen).size == 20_000
    assert _chi_square_is_usual(np.histogram(seen, bins=40, range=(0, tiles))[0])


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        order.tile_at(np.arange(3), 0, 1)
