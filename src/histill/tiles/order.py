"""Stateless randomness: the order of tiles and the draws for one tile are pure functions of integers.

A run can then stop at any tile and go on anywhere, with any number of processes: nothing has to be replayed.
Shapes: B positions, N draws per position, S slides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["balanced_tile_at", "block_tile_at", "mix", "positions_of", "tile_at", "uniforms"]

_U64 = NDArray[np.uint64]
_Integers = NDArray[np.uint64] | NDArray[np.int64] | NDArray[np.int_]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6
# One number for each use of the hash, so that no two uses share their draws.
_EPOCH, _BLOCKS, _SHIFT, _WINDOW, _SLIDES, _PASS = 0x0EDE, 0x0B10, 0x5417, 0x0817, 0x51DE, 0x0A55


def mix(*keys: int | _Integers) -> _U64:
    """Hash integers (broadcast against each other) to 64 well-mixed bits: splitmix64, chained.

    Source: Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014, finaliser "mix13".
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _absorb(state, np.asarray(key).astype(np.uint64))
    return state


def _absorb(state: _U64, word: _U64) -> _U64:
    """Hash one more key; overflow is meant."""
    state = state + word * _GOLDEN + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, stream: int, positions_B: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), shape (B, count), for given positions.

    Parameters
    ----------
    seed, stream
        The run's seed, and a number that separates uses of it.
    positions_B
        Which sample of the run each row is for; a row depends on its own position only.
    count
        Draws per position.
    """
    bits_BN = mix(seed, stream, positions_B[:, None], np.arange(count)[None, :])
    return (bits_BN >> np.uint64(11)).astype(np.float64) * 2.0**-53


def tile_at(positions_B: NDArray[np.int64], tiles: int, seed: int) -> NDArray[np.int64]:
    """Which tile stands at each position of the endless shuffled stream, shape (B,) int64.

    Position p belongs to epoch ``p // tiles``; in each epoch every tile comes exactly once, in an order of its own.
    The permutation is a balanced Feistel network over the next even power of two, walked until it falls inside
    (Black and Rogaway, *Ciphers with arbitrary finite domains*, CT-RSA 2002), so no table of N entries is needed.

    Parameters
    ----------
    positions_B
        Positions in the stream, from 0, int64.
    tiles
        Number of tiles in the set.
    seed
        The run's seed.

    Returns
    -------
    ndarray
        int64, shape (B,): numbers of tiles, from 0.

    Raises
    ------
    ValueError
        ``tiles`` is below 1.
    """
    if tiles < 1:
        raise ValueError("an order needs at least one tile")
    epoch_B, index_B = np.divmod(np.asarray(positions_B, dtype=np.int64), tiles)
    half_bits = max(1, ((tiles - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    value_B = index_B.astype(np.uint64)
    # All of the hash that does not depend on the value: mix(epoch_key, round, right) is _absorb(state, right).
    states_RB = mix(mix(seed, _EPOCH, epoch_B), np.arange(_ROUNDS)[:, None])
    walking_B = np.arange(len(value_B))
    while len(walking_B):
        left, right = value_B[walking_B] >> shift, value_B[walking_B] & mask
        for state_B in states_RB[:, walking_B]:
            left, right = right, left ^ (_absorb(state_B, right) & mask)
        value_B[walking_B] = (left << shift) | right
        walking_B = walking_B[value_B[walking_B] >= np.uint64(tiles)]
    return value_B.astype(np.int64)


def block_tile_at(
    positions_B: NDArray[np.int64], tiles: int, seed: int, *, block_tiles: int, window_blocks: int
) -> NDArray[np.int64]:
    """Which tile stands at each position of a stream that stays near a few places at a time, shape (B,) int64.

    As in :func:`tile_at`, every epoch holds each tile exactly once. The set is cut into blocks of neighbouring tiles,
    the blocks are permuted, and the tiles of up to ``window_blocks`` consecutive permuted blocks are permuted among
    themselves. A reader is then busy with that many runs of neighbours at once, which suits disks and page caches.

    Where the cuts lie is drawn anew for each epoch (the set is seen as a ring), so that neighbours are not tied to
    each other for ever, and that the last, ragged block is another one each time. All windows are of almost equal
    size. With one tile to a block, or when one window holds all, the order is that of :func:`tile_at`, bit for bit.

    Parameters
    ----------
    positions_B
        Positions in the stream, from 0, int64.
    tiles
        Number of tiles in the set.
    seed
        The run's seed.
    block_tiles
        Neighbouring tiles to a block.
    window_blocks
        Blocks that are mixed with each other.

    Returns
    -------
    ndarray
        int64, shape (B,): numbers of tiles, from 0.

    Raises
    ------
    ValueError
        ``tiles``, ``block_tiles`` or ``window_blocks`` is below 1.
    """
    if block_tiles < 1 or window_blocks < 1:
        raise ValueError("a block needs at least one tile, a window at least one block")
    blocks = -(-tiles // block_tiles)
    if block_tiles == 1 or blocks <= window_blocks:
        return tile_at(positions_B, tiles, seed)
    windows = -(-blocks // window_blocks)
    epoch_B, place_B = np.divmod(np.asarray(positions_B, dtype=np.int64), tiles)
    # Window w holds the permuted blocks from w * blocks // windows on; all blocks but the very last are full.
    window_B = ((place_B // block_tiles + 1) * windows - 1) // blocks
    first_B = window_B * blocks // windows * block_tiles
    last_B = np.minimum((window_B + 1) * blocks // windows * block_tiles, tiles)
    place_B = first_B + _permuted(place_B - first_B, last_B - first_B, mix(seed, _WINDOW, epoch_B, window_B))
    slot_B, within_B = np.divmod(place_B, block_tiles)
    full = tiles // block_tiles
    block_B = slot_B.copy()
    is_full_B = slot_B < full
    block_B[is_full_B] = _permuted(slot_B[is_full_B], full, mix(seed, _BLOCKS, epoch_B[is_full_B]))
    shift_B = (mix(seed, _SHIFT, epoch_B) % np.uint64(tiles)).astype(np.int64)
    return (block_B * block_tiles + within_B + shift_B) % tiles


def balanced_tile_at(
    positions_B: NDArray[np.int64], first_row_S: NDArray[np.int64], tiles_S: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Which tile stands at each position of a stream in which every slide comes equally often, shape (B,) int64.

    The stream is made of rounds; in a round every slide comes once, in an order of its own, with one tile. A slide of
    n tiles has shown each of them once after n rounds (a pass), and starts again in another order. Memory is O(S).

    Parameters
    ----------
    positions_B
        Positions in the stream, from 0, int64.
    first_row_S
        First tile of each slide; a slide's tiles are neighbours.
    tiles_S
        Number of tiles of each slide, at least 1.
    seed
        The run's seed.

    Returns
    -------
    ndarray
        int64, shape (B,): numbers of tiles, from 0.

    Raises
    ------
    ValueError
        There is no slide, or a slide has no tile.
    """
    first_row_S, tiles_S = np.asarray(first_row_S, dtype=np.int64), np.asarray(tiles_S, dtype=np.int64)
    if len(tiles_S) < 1 or tiles_S.min() < 1:
        raise ValueError("an order needs at least one slide, and each slide at least one tile")
    round_B, place_B = np.divmod(np.asarray(positions_B, dtype=np.int64), len(tiles_S))
    slide_B = _permuted(place_B, len(tiles_S), mix(seed, _SLIDES, round_B))
    pass_B, turn_B = np.divmod(round_B, tiles_S[slide_B])
    return first_row_S[slide_B] + _permuted(turn_B, tiles_S[slide_B], mix(seed, _PASS, slide_B, pass_B))


def positions_of(
    first_position: int, batch_tiles: int, *, rank: int = 0, world: int = 1, worker: int = 0, workers: int = 0
) -> NDArray[np.int64]:
    """Positions of the stream that one rank, or one of its workers, takes of a step, shape (B,) int64.

    The step takes ``batch_tiles`` positions from ``first_position`` on, whoever reads them: a run that has consumed n
    positions goes on with ``first_position=n`` and any ``world`` and ``workers``. The shares are runs of neighbouring
    positions, in the order of ranks and then of workers, and differ by at most one tile.

    Parameters
    ----------
    first_position
        Positions consumed before this step, by all ranks together.
    batch_tiles
        Tiles of the step, over all ranks.
    rank, world
        Which of how many processes.
    worker, workers
        Which of how many readers inside the process; with 0 workers the process reads its whole share itself.

    Raises
    ------
    ValueError
        ``rank`` or ``worker`` is negative, or not below ``world`` or ``workers``.
    """
    workers = max(1, workers)
    if not (0 <= rank < world and 0 <= worker < workers):
        raise ValueError(f"rank {rank} of {world}, worker {worker} of {workers}: counted from 0")
    start, stop = (batch_tiles * edge // world for edge in (rank, rank + 1))
    low, high = (start + (stop - start) * edge // workers for edge in (worker, worker + 1))
    return np.arange(first_position + low, first_position + high, dtype=np.int64)


def _permuted(index_B: NDArray[np.int64], sizes_B: int | NDArray[np.int64], keys_B: _U64) -> NDArray[np.int64]:
    """Permute each index among ``range(size)``, with a size and a key of its own.

    A Feistel network over Z_a x Z_b with a, b the nearest to the square root (generalised by Black and Rogaway, 2002):
    a * b exceeds the size by less than a, so that hardly any index has to be walked. With the power of two of
    :func:`tile_at`, which must keep its results, one of a batch walks often, and the whole batch waits for it.
    """
    sizes_B = np.broadcast_to(np.asarray(sizes_B, dtype=np.int64), index_B.shape)
    rows_B = np.maximum(np.ceil(np.sqrt(sizes_B)).astype(np.int64), 1)
    columns_B = -(-sizes_B // rows_B)
    value_B = index_B.copy()
    todo_B = np.arange(len(value_B))
    while len(todo_B):
        rows, columns = rows_B[todo_B].astype(np.uint64), columns_B[todo_B].astype(np.uint64)
        key, value = keys_B[todo_B], value_B[todo_B].astype(np.uint64)
        left, right = value // columns, value % columns
        for round_ in range(_ROUNDS):
            # The key is a hash already, and values are below 2^32: what is absorbed, value * odd + round * 2^32 + key
            # (modulo 2^64), is another number for each round and value.
            round_key = key + np.uint64(round_ << 32)
            if round_ % 2 == 0:
                left = (left + _absorb(round_key, right) % rows) % rows
            else:
                right = (right + _absorb(round_key, left) % columns) % columns
        value_B[todo_B] = (left * columns + right).astype(np.int64)
        todo_B = todo_B[value_B[todo_B] >= sizes_B[todo_B]]
    return value_B
