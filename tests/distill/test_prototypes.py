from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from histill.distill.prototypes import prototype_count, spherical_kmeans
from histill.errors import DataError


def clustered(clusters: int, each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(clusters, 16, generator=generator), dim=-1)
    noise = 0.05 * torch.randn(clusters * each, 16, generator=generator)
    lengths = torch.rand(clusters * each, 1, generator=generator) + 0.5
    return (centres.repeat_interleave(each, 0) + noise) * lengths, centres


def fitted(tokens: torch.Tensor, count: int, *, seed: int, **options: Any) -> torch.Tensor:
    lots = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return spherical_kmeans(tokens, count, lots, **options)


def test_finds_separated_directions_whatever_their_lengths() -> None:
    tokens, centres = clustered(8, 50)
    found = fitted(tokens, 40, seed=1, iterations=50)
    # More prototypes than directions, so that a start that misses one cannot hide: each has one close to it.
    assert ((centres @ found.T).max(1).values > 0.98).all()


def test_rows_have_length_one_and_no_prototype_is_dead_or_doubled() -> None:
    tokens, _ = clustered(4, 100)
    found = fitted(tokens, 32, seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(32))
    assigned = (F.normalize(tokens, dim=-1) @ found.T).argmax(1)
    assert len(assigned.unique()) >= 30


def test_a_fit_is_better_than_its_start_and_repeats() -> None:
    tokens, _ = clustered(20, 30)
    unit = F.normalize(tokens, dim=-1)

    def fit(iterations: int) -> float:
        return float((unit @ fitted(tokens, 20, seed=2, iterations=iterations).T).max(1).values.mean())

    assert fit(20) > fit(1) + 0.01
    assert torch.equal(fitted(tokens, 20, seed=2), fitted(tokens, 20, seed=2))


def test_ranks_that_share_the_tokens_find_the_same_prototypes() -> None:
    """Three ranks as three threads, with other numbers of tokens each; one of them has none."""
    tokens, _ = clustered(8, 30)
    lots = torch.rand(len(tokens), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alone = spherical_kmeans(tokens, 24, lots)
    bounds = [slice(0, 90), slice(90, 90), slice(90, 240)]
    meeting = ThreadRanks(len(bounds))

    def rank(number: int) -> torch.Tensor:
        reduce, gather = meeting.collectives(number)
        own = bounds[number]
        return spherical_kmeans(tokens[own], 24, lots[own], reduce=reduce, gather=gather)

    with ThreadPoolExecutor(len(bounds)) as pool:
        for found in pool.map(rank, range(len(bounds))):
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


class ThreadRanks:
    """Collectives between threads."""

    def __init__(self, world: int) -> None:
        self.rows: list[torch.Tensor] = [torch.empty(0)] * world
        self.barrier = threading.Barrier(world)

    def collectives(self, rank: int) -> tuple[Any, Any]:
        def exchange(tensor: torch.Tensor) -> list[torch.Tensor]:
            self.rows[rank] = tensor.clone()
            self.barrier.wait()
            found = list(self.rows)
            self.barrier.wait()
            return found

        return (lambda tensor: torch.stack(exchange(tensor)).sum(0)), (lambda rows: torch.cat(exchange(rows)))


def test_more_prototypes_than_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="5 tokens for 6"):
        fitted(torch.randn(5, 4), 6, seed=0)


@pytest.mark.parametrize(
    ("wanted", "most", "expected"),
    [(1.2, 1000, 64), (512.0, 9000, 512), (625.0, 9000, 512), (5e6, 10**8, 131_072), (0.1, 10, 10)],
)
def test_counts_follow_the_data(wanted: float, most: int, expected: int) -> None:
    assert prototype_count(wanted, most=most) == expected
