from __future__ import annotations

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


def test_finds_separated_directions_whatever_their_lengths() -> None:
    tokens, centres = clustered(8, 50)
    found = spherical_kmeans(tokens, 16, seed=1, iterations=50)
    # More prototypes than directions, so that a start that misses one cannot hide: each has one close to it.
    assert ((centres @ found.T).max(1).values > 0.98).all()


def test_rows_have_length_one_and_no_prototype_is_dead_or_doubled() -> None:
    tokens, _ = clustered(4, 100)
    found = spherical_kmeans(tokens, 32, seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(32))
    assigned = (F.normalize(tokens, dim=-1) @ found.T).argmax(1)
    assert len(assigned.unique()) >= 30


def test_a_fit_is_better_than_its_start_and_repeats() -> None:
    tokens, _ = clustered(20, 30)
    unit = F.normalize(tokens, dim=-1)

    def fit(iterations: int) -> float:
        return float((unit @ spherical_kmeans(tokens, 20, seed=2, iterations=iterations).T).max(1).values.mean())

    assert fit(20) > fit(1) + 0.01
    assert torch.equal(spherical_kmeans(tokens, 20, seed=2), spherical_kmeans(tokens, 20, seed=2))


def test_a_second_rank_with_the_same_tokens_changes_nothing() -> None:
    tokens, _ = clustered(8, 30)
    alone = spherical_kmeans(tokens, 8, seed=3)
    both = spherical_kmeans(tokens, 8, seed=3, reduce=lambda tensor: tensor * 2)
    torch.testing.assert_close(both, alone)


def test_more_prototypes_than_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="5 tokens for 6"):
        spherical_kmeans(torch.randn(5, 4), 6, seed=0)


@pytest.mark.parametrize(
    ("wanted", "most", "expected"),
    [(1.2, 1000, 64), (512.0, 9000, 512), (625.0, 9000, 512), (5e6, 10**8, 131_072), (0.1, 10, 10)],
)
def test_counts_follow_the_data(wanted: float, most: int, expected: int) -> None:
    assert prototype_count(wanted, most=most) == expected
