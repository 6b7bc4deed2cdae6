"""The regression of the HEST benchmark: embeddings of patches -> log expression of genes, Pearson per gene.

Shapes: N training and M test spots, D features, P principal components, G genes, A strengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from histill.errors import ConfigError, DataError
from histill.evaluate.features import Array

__all__ = ["COMPONENTS", "exact_ridge_pearson", "pearson", "protocol_alpha", "ridge_pearson", "solve_exactly"]

COMPONENTS = 256
"""Principal components of the protocol."""
_ITERATIONS = 1000
_SEED = 1


def protocol_alpha(components: int, genes: int) -> float:
    """Ridge strength of the protocol: 100 / (components x genes), 100 / (256 x 50) in its tasks."""
    return 100 / (components * genes)


_Fold = tuple[Array, Array, Array, Array]


def _checked(x_train_ND: Array, x_test_MD: Array, counts_train_NG: Array, counts_test_MG: Array) -> _Fold:
    """Refuse what is no fold; half precision, which would not bear the sums, becomes float32."""
    x_train_ND, x_test_MD, counts_train_NG, counts_test_MG = (
        np.asarray(x) for x in (x_train_ND, x_test_MD, counts_train_NG, counts_test_MG)
    )
    shapes = [x.shape for x in (x_train_ND, x_test_MD, counts_train_NG, counts_test_MG)]
    (n, d), (m, e), (cn, g), (cm, h) = (s if len(s) == 2 else (-1, -1) for s in shapes)
    if (cn, cm, e, h) != (n, m, d, g) or min(n, m, d, g) < 1:
        raise DataError(
            "features and counts do not belong together",
            got=f"shapes {', '.join(map(str, shapes))}",
            allowed="(N, D), (M, D), (N, G), (M, G)",
        )
    if n < 2:
        raise DataError("a fold needs two training spots", got=n)
    for name, values in (("training features", x_train_ND), ("test features", x_test_MD)):
        if not np.isfinite(values).all():
            raise DataError(f"{name} are not finite", got=f"{(~np.isfinite(values)).any(axis=1).sum()} rows")
    for name, values in (("training counts", counts_train_NG), ("test counts", counts_test_MG)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(
                f"{name} are not counts", got="negative or not finite", allowed="0 and above, not yet logged"
            )
    x_train_ND, x_test_MD = (x.astype(np.float32) if x.dtype == np.float16 else x for x in (x_train_ND, x_test_MD))
    return x_train_ND, x_test_MD, counts_train_NG, counts_test_MG


def _project(x_train_ND: Array, x_test_MD: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Standardise and reduce, both fitted on the training spots, in the precision of ``x``; cast to float32.

    An encoder that is narrower than 256, or a fold with fewer spots, keeps as many components as there are (the
    original stops with an error there). Features that are the same for all training spots leave one component of zeros.
    """
    if not np.ptp(x_train_ND, axis=0).any():
        return np.zeros((len(x_train_ND), 1), np.float32), np.zeros((len(x_test_MD), 1), np.float32)
    components = min(COMPONENTS, *x_train_ND.shape)
    scaler = StandardScaler()
    pca = PCA(n_components=components, random_state=_SEED)
    train_NP = pca.fit_transform(scaler.fit_transform(x_train_ND))
    test_MP = pca.transform(scaler.transform(x_test_MD))
    # astype keeps the memory order that PCA leaves: another one sums in another order, and LSQR stops elsewhere
    return train_NP.astype(np.float32), test_MP.astype(np.float32)


def pearson(predicted_MG: Array, target_MG: Array) -> NDArray[np.float64]:
    """Pearson correlation per column, float64 (G,); NaN where either side is constant."""
    varies_G = (np.ptp(predicted_MG, axis=0) > 0) & (np.ptp(target_MG, axis=0) > 0)
    p_MG, t_MG = (np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64) for x in (predicted_MG, target_MG))
    p_MG /= np.where(varies_G, np.linalg.norm(p_MG, axis=0), 1.0)
    t_MG /= np.where(varies_G, np.linalg.norm(t_MG, axis=0), 1.0)
    r_G: NDArray[np.float64] = np.where(varies_G, np.clip((p_MG * t_MG).sum(axis=0), -1.0, 1.0), np.nan)
    return r_G


def ridge_pearson(
    x_train_ND: Array, x_test_MD: Array, counts_train_NG: Array, counts_test_MG: Array
) -> NDArray[np.float64]:
    """Score one fold as the HEST benchmark does.

    Targets are ``log1p`` of the counts. ``StandardScaler`` and ``PCA(256, random_state=1)`` are fitted on the training
    spots, in float32 when the features are; the components are rounded to float32 and regressed in float64 (the
    original hands scikit-learn float32 torch tensors, which it computes with in float64) by ``Ridge(alpha=100 / (256 *
    50), solver="lsqr", fit_intercept=False, max_iter=1000, random_state=1)``.

    LSQR stops at its tolerance of 1e-4, long before it has converged, and at which step it does depends on the last
    bits of its products: with other BLAS kernels or another number of threads, single genes move by up to 3e-3 and
    the mean by 1e-4. With the same kernels and threads the original's numbers come out to 1e-14.
    :func:`exact_ridge_pearson` has no such spread.

    Parameters
    ----------
    x_train_ND, x_test_MD
        Embeddings, float32 or float64 (float16 is taken as float32).
    counts_train_NG, counts_test_MG
        Raw counts, any number type.

    Returns
    -------
    ndarray
        float64 (G,); NaN for a gene whose test counts or predictions are constant.

    Raises
    ------
    DataError
        Shapes do not match, there is one training spot, a feature is not finite, a count is negative.

    References
    ----------
    Jaume et al., HEST-1k, NeurIPS 2024, section 4.2.
    """
    x_train_ND, x_test_MD, counts_train_NG, counts_test_MG = _checked(
        x_train_ND, x_test_MD, counts_train_NG, counts_test_MG
    )
    train_NP, test_MP = _project(x_train_ND, x_test_MD)
    model = Ridge(
        alpha=protocol_alpha(train_NP.shape[1], counts_train_NG.shape[1]),
        solver="lsqr",
        fit_intercept=False,
        max_iter=_ITERATIONS,
        random_state=_SEED,
    )
    model.fit(train_NP.astype(np.float64), np.log1p(counts_train_NG, dtype=np.float64))
    predicted_MG = model.predict(test_MP.astype(np.float64)).reshape(counts_test_MG.shape)
    return pearson(predicted_MG, np.log1p(counts_test_MG, dtype=np.float64))


def exact_ridge_pearson(
    x_train_ND: Array,
    x_test_MD: Array,
    counts_train_NG: Array,
    counts_test_MG: Array,
    alphas: Sequence[float] | None = None,
) -> NDArray[np.float64]:
    """Score one fold with the ridge's exact solution, for any number of strengths from one decomposition.

    Same targets, scaling and components as :func:`ridge_pearson`, from whose numbers it differs by about 1e-3. The
    eigenvectors of the components' Gram matrix (P x P) are shared by all strengths, so that a further one costs a
    product of (M, P) with (P, G).

    Parameters
    ----------
    x_train_ND, x_test_MD, counts_train_NG, counts_test_MG
        See :func:`ridge_pearson`.
    alphas
        Strengths, 0 and above; None: the protocol's alone.

    Returns
    -------
    ndarray
        float64 (A, G), NaN as there.

    Raises
    ------
    ConfigError
        A strength is negative or not finite, or there is none.
    DataError
        As :func:`ridge_pearson`.
    """
    x_train_ND, x_test_MD, counts_train_NG, counts_test_MG = _checked(
        x_train_ND, x_test_MD, counts_train_NG, counts_test_MG
    )
    train_NP, test_MP = (x.astype(np.float64) for x in _project(x_train_ND, x_test_MD))
    if alphas is None:
        alphas = (protocol_alpha(train_NP.shape[1], counts_train_NG.shape[1]),)
    strengths_A = np.asarray(alphas, np.float64)
    if strengths_A.ndim != 1 or not strengths_A.size or not (np.isfinite(strengths_A) & (strengths_A >= 0)).all():
        raise ConfigError("these are no ridge strengths", got=list(alphas), allowed="one or more numbers, 0 and above")
    target_NG, target_MG = (np.log1p(counts, dtype=np.float64) for counts in (counts_train_NG, counts_test_MG))
    return solve_exactly(train_NP, test_MP, target_NG, target_MG, strengths_A)


def solve_exactly(
    train_NP: Array, test_MP: Array, target_NG: Array, target_MG: Array, alphas: Sequence[float] | Array
) -> NDArray[np.float64]:
    """Ridge without intercept at every strength from one decomposition: Pearson on the test spots, float64 (A, G).

    Parameters
    ----------
    train_NP, test_MP
        Components of both sides, float64.
    target_NG, target_MG
        Log expression of both sides, float64.
    alphas
        Strengths, 0 and above.

    Returns
    -------
    ndarray
        float64 (A, G); NaN where predictions or targets are constant.
    """
    eigen_P, vectors_PP = np.linalg.eigh(train_NP.T @ train_NP)
    # directions without variance carry nothing; without a strength they would divide 0 by 0
    real_P = eigen_P > len(eigen_P) * np.finfo(np.float64).eps * eigen_P[-1]
    projected_PG = vectors_PP.T @ (train_NP.T @ target_NG)
    rotated_MP = test_MP @ vectors_PP
    found = []
    for alpha in alphas:
        shrink_P = np.divide(1.0, eigen_P + alpha, out=np.zeros_like(eigen_P), where=real_P)
        found.append(pearson(rotated_MP @ (shrink_P[:, None] * projected_PG), target_MG))
    return np.stack(found)
