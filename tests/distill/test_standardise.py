from __future__ import annotations

import numpy as np
import pytest
import torch

from histill.distill.standardise import Moments, Standardiser, hadamard
from histill.errors import ModelError


def correlated(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator)
    return torch.randn(rows, channels, generator=generator) @ mix + 7 * torch.randn(channels, generator=generator)


def moments_of(*parts: torch.Tensor) -> Moments:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 192, 384, 768, 1024, 1280, 1536, 2560])
def test_hadamard_rows_are_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 6, 14, 15])
def test_sizes_without_a_hadamard_matrix_are_refused(size: int) -> None:
    with pytest.raises(ModelError, match="mean-std"):
        hadamard(size)


def test_moments_equal_numpy_and_do_not_depend_on_the_parts() -> None:
    tokens = correlated(500, 12)
    mean, covariance = moments_of(tokens[:100], tokens[100:101], tokens[101:]).mean_covariance()
    np.testing.assert_allclose(mean, tokens.double().mean(0), rtol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(tokens.double().numpy().T, bias=True), rtol=1e-3, atol=1e-3)


def test_moments_of_ranks_add_up() -> None:
    tokens = correlated(300, 12)
    other = moments_of(tokens[:120])
    extra = iter([other.count, other.sum_D, other.outer_DD])
    total = moments_of(tokens[120:]).reduced(lambda tensor: tensor + next(extra))
    for got, expected in zip(total.mean_covariance(), moments_of(tokens).mean_covariance(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_mean_std_gives_every_channel_zero_mean_and_unit_variance() -> None:
    tokens = correlated(800, 12)
    standardiser = Standardiser(12, "mean-std")
    standardiser.fit(moments_of(tokens))
    out = standardiser(tokens)
    torch.testing.assert_close(out.mean(0), torch.zeros(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(12), rtol=1e-3, atol=0)


def test_phi_s_gives_equal_variances_and_keeps_angles() -> None:
    tokens = correlated(800, 12)
    standardiser = Standardiser(12, "phi-s")
    standardiser.fit(moments_of(tokens))
    out = standardiser(tokens)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(12), rtol=2e-3, atol=0)
    centred = tokens - tokens.mean(0)
    torch.testing.assert_close(
        torch.pdist(out) / torch.pdist(centred),
        torch.full((800 * 799 // 2,), float(standardiser.scale_D[0])),
        rtol=2e-3,
        atol=0,
    )


def test_still_channel_is_silenced_not_blown_up() -> None:
    tokens = correlated(100, 12)
    tokens[:, 3] = 5.0
    standardiser = Standardiser(12, "mean-std")
    standardiser.fit(moments_of(tokens))
    out = standardiser(tokens)
    assert torch.isfinite(out).all()
    assert out[:, 3].abs().max() < 1e-3
