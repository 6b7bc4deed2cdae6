"""Stateless randomness: the order of tiles and the draws for one tile are pure functions of integers.

A run can then stop at any tile and go on anywhere, with any number of processes: nothing has to be replayed.
Shapes: B positions, N draws per position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix", "tile_at", "uniforms"]

_U64 = NDArray[np.uint64]
_Integers = NDArray[np.uint64] | NDArray[np.int64] | NDArray[np.int_]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def mix(*keys: int | _Integers) -> _U64:
    """Hash integers (broadcast against each other) to 64 well-mixed bits: splitmix64, chained.

    Source: Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014, finaliser "mix13".
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            word = np.asarray(key).astype(np.uint64)
            state = state + word * _GOLDEN + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


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
    """
    if tiles < 1:
        raise ValueError("an order needs at least one tile")
    epoch_B, index_B = np.divmod(np.asarray(positions_B, dtype=np.int64), tiles)
    half_bits = max(1, ((tiles - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    value_B = index_B.astype(np.uint64)
    epoch_key_B = mix(seed, 0x0EDE, epoch_B)
    walking_B = np.ones(value_B.shape, dtype=bool)
    while walking_B.any():
        left, right = value_B[walking_B] >> shift, value_B[walking_B] & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (mix(epoch_key_B[walking_B], round_, right) & mask)
        value_B[walking_B] = (left << shift) | right
        walking_B = value_B >= tiles
    return value_B.astype(np.int64)
