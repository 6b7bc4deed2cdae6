"""Time of one fold of the HEST benchmark: ours, scikit-learn's own calls, and 20 strengths of the exact ridge.

9,000 spots (7,200 to fit on), 1,536 features, 50 genes. The regression is told apart from scaling and PCA, which both
solvers share, by fitting on the same components: the early stopped LSQR of the protocol against one decomposition for
20 strengths. Each time is the median of the repeats.

    python benchmarks/ridge.py [--threads 2] [--repeats 3] [--spots 9000] [--dims 1536] [--strengths 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from histill.evaluate.hest import exact_ridge_pearson, ridge_pearson
from histill.evaluate.hest.regression import pearson, solve_exactly

GENES = 50
Fold = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spots", type=int, default=9000, help="of the fold: four fifths to fit on")
    parser.add_argument("--dims", type=int, default=1536)
    parser.add_argument("--strengths", type=int, default=20)
    options = parser.parse_args()
    fold = make_fold(options.spots, options.dims)
    alphas = np.geomspace(1e-4, 1e4, options.strengths).tolist()
    with threadpool_limits(options.threads):
        train, test = components(fold)
        sides = (fold[2], fold[3])
        rows: dict[str, Callable[[], object]] = {
            "fold, scikit-learn's calls": lambda: by_scikit_learn(fold),
            "fold, ridge_pearson": lambda: ridge_pearson(*fold),
            f"fold, exact, {options.strengths} strengths": lambda: exact_ridge_pearson(*fold, alphas=alphas),
            "one LSQR fit on the components": lambda: lsqr(train, test, *sides),
            f"{options.strengths} exact strengths on them": lambda: exact(train, test, *sides, alphas),
        }
        seconds = measure(rows, options.repeats)
        equal = np.array_equal(by_scikit_learn(fold), ridge_pearson(*fold), equal_nan=True)
    print(f"{options.spots:,} spots x {options.dims:,} features, {GENES} genes, {options.threads} threads")
    for name, value in seconds.items():
        print(f"{name:<34}{value:>9.3f} s")
    reference, ours, _, one, many = seconds.values()
    print(f"ridge_pearson / scikit-learn's calls: {ours / reference:.2f} (same numbers: {equal})")
    verdict = "met" if many < one else "NOT MET"
    print(f"{options.strengths} exact strengths / one LSQR fit: {many / one:.3f} (demand: under 1: {verdict})")


def make_fold(spots: int, dims: int) -> Fold:
    """Features with a falling spectrum, as an encoder's, and counts that follow them."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(dims, dims)))[0] / np.sqrt(np.arange(1, dims + 1))[:, None]
    x = (rng.normal(size=(spots, dims)) @ basis).astype(np.float32)
    rate = np.exp(0.5 * x @ rng.normal(size=(dims, GENES)) / x.std() / np.sqrt(dims) + 1)
    counts = rng.poisson(rate)
    fit = spots * 4 // 5
    return x[:fit], x[fit:], counts[:fit], counts[fit:]


def measure(rows: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Take turns, so that a busy moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def components(fold: Fold) -> tuple[np.ndarray, np.ndarray]:
    scaler, pca = StandardScaler(), PCA(256, random_state=1)
    train = pca.fit_transform(scaler.fit_transform(fold[0])).astype(np.float32)
    return train.astype(np.float64), pca.transform(scaler.transform(fold[1])).astype(np.float32).astype(np.float64)


def lsqr(train: np.ndarray, test: np.ndarray, counts_train: np.ndarray, counts_test: np.ndarray) -> np.ndarray:
    alpha = 100 / (256 * GENES)
    model = Ridge(alpha=alpha, solver="lsqr", fit_intercept=False, max_iter=1000, random_state=1)
    model.fit(train, np.log1p(counts_train))
    return pearson(model.predict(test), np.log1p(counts_test))


def by_scikit_learn(fold: Fold) -> np.ndarray:
    return lsqr(*components(fold), fold[2], fold[3])


def exact(
    train: np.ndarray, test: np.ndarray, counts_train: np.ndarray, counts_test: np.ndarray, alphas: list[float]
) -> np.ndarray:
    return solve_exactly(train, test, np.log1p(counts_train), np.log1p(counts_test), alphas)


if __name__ == "__main__":
    main()
