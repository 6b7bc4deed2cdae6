from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from histill.errors import ConfigError, DataError
from histill.evaluate import hest
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.hest.layout import TASKS, find_tasks, read_counts, read_patches, read_task
from histill.evaluate.hest.regression import pearson
from histill.evaluate.hest.run import run_hest
from histill.evaluate.results import Result, read_result

# ------------------------------------------------------------------ regression


@pytest.fixture(scope="module")
def reference(shared_parity: Path) -> dict[str, np.ndarray]:
    with np.load(shared_parity / "hest_regression.npz") as stored:
        return dict(stored)


def fold_of(stored: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(stored[name] for name in ("x_train", "x_test", "counts_train", "counts_test"))


def small_fold(seed: int = 0, spots: int = 300, dims: int = 64, genes: int = 5) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dims, genes))
    x = [rng.normal(size=(n, dims)).astype(np.float32) for n in (spots, spots // 2)]
    return (*x, *(rng.poisson(np.exp(0.1 * features @ mixing + 1)) for features in x))


def by_scikit_learn(x_train, x_test, counts_train, counts_test, **ridge: Any) -> np.ndarray:
    """The calls of the protocol one by one, Pearson by scipy, gene by gene."""
    scaler = StandardScaler().fit(x_train)
    pca = PCA(min(256, *x_train.shape), random_state=1)
    train = np.float64(pca.fit_transform(scaler.transform(x_train)).astype(np.float32))
    test = np.float64(pca.transform(scaler.transform(x_test)).astype(np.float32))
    options = {"alpha": 100 / (train.shape[1] * counts_train.shape[1]), "solver": "lsqr", "max_iter": 1000} | ridge
    model = Ridge(fit_intercept=False, random_state=1, **options)
    model.fit(train, np.log1p(counts_train))
    predicted, target = model.predict(test), np.log1p(counts_test)
    return np.array([stats.pearsonr(predicted[:, g], target[:, g])[0] for g in range(target.shape[1])])


def from_scratch(x_train, x_test, counts_train, counts_test) -> np.ndarray:
    """The exact ridge by singular values and normal equations in float64, Pearson by numpy."""
    mean, std = x_train.mean(axis=0, dtype=np.float64), x_train.std(axis=0, dtype=np.float64)
    train, test = ((x - mean) / np.where(std > 1e-6, std, 1) for x in (x_train, x_test))
    axes = np.linalg.svd(train, full_matrices=False)[2][: min(256, *train.shape)]
    train, test = train @ axes.T, test @ axes.T
    alpha = 100 / (len(axes) * counts_train.shape[1])
    weights = np.linalg.solve(train.T @ train + alpha * np.eye(len(axes)), train.T @ np.log1p(counts_train))
    predicted, target = test @ weights, np.log1p(counts_test)
    flat = (np.ptp(predicted, axis=0) < 1e-12) | (np.ptp(target, axis=0) == 0)
    found = [np.nan if flat[g] else np.corrcoef(predicted[:, g], target[:, g])[0, 1] for g in range(len(flat))]
    return np.array(found)


ODD_FOLDS = {
    "as usual": lambda x_train, x_test, y_train, y_test: None,
    "a constant feature": lambda x_train, x_test, y_train, y_test: (x_train[:, 3].fill(7), x_test[:, 3].fill(7)),
    "constant in training": lambda x_train, x_test, y_train, y_test: x_train[:, 2].fill(1),
    "a constant gene": lambda x_train, x_test, y_train, y_test: y_test[:, 1].fill(4),
    "a gene that is not expressed": lambda x_train, x_test, y_train, y_test: y_train[:, 0].fill(0),
    "a feature twice": lambda x_train, x_test, y_train, y_test: (
        x_train[:, 4].__setitem__(slice(None), x_train[:, 5]),
        x_test[:, 4].__setitem__(slice(None), x_test[:, 5]),
    ),
    "features of 1,000": lambda x_train, x_test, y_train, y_test: (
        x_train.__imul__(x_train.dtype.type(1000)),
        x_test.__imul__(x_test.dtype.type(1000)),
    ),
}


@pytest.mark.parametrize("fold", ODD_FOLDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("spots", "dims", "genes"), [(150, 20, 3), (150, 20, 2), (12, 30, 3)])
def test_odd_folds_have_the_numbers_of_a_plain_ridge(fold: str, dtype: Any, spots: int, dims: int, genes: int) -> None:
    x_train, x_test, *counts = small_fold(7, spots, dims, genes)
    data = (x_train.astype(dtype), x_test.astype(dtype), *(c.astype(np.float32) for c in counts))
    ODD_FOLDS[fold](*data)
    want, exact = from_scratch(*data), hest.exact_ridge_pearson(*data)
    assert exact.dtype == np.float64
    assert exact.shape == (1, genes)
    np.testing.assert_allclose(exact[0], want, atol=2e-4)  # components are rounded to float32
    found = hest.ridge_pearson(*data)
    assert (found.dtype, found.shape) == (np.dtype(np.float64), (genes,))
    assert np.isnan(found).tolist() == np.isnan(want).tolist()
    np.testing.assert_allclose(found, want, atol=0.03)  # its solver stops early


def test_one_gene_half_precision_and_anything_that_is_an_array() -> None:
    fold = small_fold(8, genes=1)
    found = hest.ridge_pearson(*fold)
    assert found.shape == (1,)
    np.testing.assert_array_equal(hest.ridge_pearson(*(torch.from_numpy(part) for part in fold)), found)
    half = [part.astype(np.float16) for part in fold[:2]]
    single = [part.astype(np.float32) for part in half]
    np.testing.assert_array_equal(hest.ridge_pearson(*half, *fold[2:]), hest.ridge_pearson(*single, *fold[2:]))


def test_features_that_are_all_the_same_predict_nothing() -> None:
    x_train, x_test, *counts = small_fold(9)
    for found in (
        hest.ridge_pearson(x_train * 0 + 3, x_test, *counts),
        hest.exact_ridge_pearson(x_train * 0 + 3, x_test, *counts)[0],
    ):
        assert found.shape == (5,)
        assert np.isnan(found).all()
    with pytest.raises(DataError, match="two training spots"):
        hest.ridge_pearson(x_train[:1], x_test, counts[0][:1], counts[1])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs the reference's BLAS kernels")
def test_the_original_s_numbers_come_out_with_its_kernels_and_threads(shared_parity: Path) -> None:
    """LSQR stops early, and where it does hangs on the last bits: the kernels and threads must be the reference's."""
    code = f"""
import numpy as np
from threadpoolctl import threadpool_limits
from histill.evaluate import hest
stored = np.load({str(shared_parity / "hest_regression.npz")!r})
with threadpool_limits(2):
    found = hest.ridge_pearson(*(stored[name] for name in ("x_train", "x_test", "counts_train", "counts_test")))
print(found.dtype, found.shape, np.abs(found - stored["pearson_per_gene"]).max())
"""
    environment = os.environ | {"OPENBLAS_CORETYPE": "Haswell"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *kind, error = done.stdout.split()
    assert kind == ["float64", "(50,)"]
    assert float(error) < 1e-6


def test_with_other_kernels_the_original_s_numbers_come_out_within_the_spread_of_its_solver(reference) -> None:
    found = hest.ridge_pearson(*fold_of(reference))
    assert np.abs(found - reference["pearson_per_gene"]).max() < 5e-3
    assert found.mean() == pytest.approx(float(reference["pearson_mean"]), abs=5e-4)


def test_it_makes_exactly_the_calls_of_the_protocol(reference) -> None:
    fold = fold_of(reference)
    np.testing.assert_allclose(hest.ridge_pearson(*fold), by_scikit_learn(*fold), atol=1e-12)
    fold = small_fold()
    np.testing.assert_allclose(hest.ridge_pearson(*fold), by_scikit_learn(*fold), atol=1e-12)


@pytest.mark.parametrize("alpha", [1e-4, 100 / (64 * 5), 10.0, 1e4])
def test_the_exact_ridge_is_the_exact_ridge_at_every_strength(alpha: float) -> None:
    fold = small_fold(1)
    found = hest.exact_ridge_pearson(*fold, alphas=[0.5, alpha])
    assert found.shape == (2, 5)
    np.testing.assert_allclose(found[1], by_scikit_learn(*fold, solver="svd", alpha=alpha), atol=1e-9)


def test_the_exact_ridge_is_near_the_original_and_defaults_to_its_strength(reference) -> None:
    exact = hest.exact_ridge_pearson(*fold_of(reference))
    assert exact.shape == (1, 50)
    assert np.abs(exact[0] - reference["pearson_per_gene"]).max() < 5e-3
    np.testing.assert_array_equal(exact, hest.exact_ridge_pearson(*fold_of(reference), alphas=[100 / (256 * 50)]))


def test_the_exact_ridge_survives_directions_without_variance() -> None:
    x_train, x_test, *counts = small_fold(2)
    x_train, x_test = (np.concatenate([x, x[:, :8]], axis=1) for x in (x_train, x_test))
    assert np.isfinite(hest.exact_ridge_pearson(x_train, x_test, *counts, alphas=[0.0, 1.0])).all()


def test_a_constant_gene_is_nan_and_leaves_the_others_alone() -> None:
    x_train, x_test, counts_train, counts_test = small_fold(3)
    before = hest.exact_ridge_pearson(x_train, x_test, counts_train, counts_test)[0]
    counts_test = counts_test.copy()
    counts_test[:, 2] = 7
    for found in (
        hest.ridge_pearson(x_train, x_test, counts_train, counts_test),
        hest.exact_ridge_pearson(x_train, x_test, counts_train, counts_test)[0],
    ):
        assert np.isnan(found).tolist() == [False, False, True, False, False]
        np.testing.assert_allclose(np.delete(found, 2), np.delete(before, 2), atol=0.01)


def test_pearson_of_constants_is_nan_even_where_rounding_would_give_a_number() -> None:
    constant = np.full((30, 1), 0.1)
    assert np.isnan(pearson(constant, np.arange(30.0)[:, None])).all()
    assert pearson(np.arange(30.0)[:, None], 1e8 + np.arange(30.0)[:, None]) == pytest.approx([1.0])


def test_an_encoder_narrower_than_the_components_keeps_what_it_has() -> None:
    fold = small_fold(4, dims=16)
    np.testing.assert_allclose(hest.ridge_pearson(*fold), by_scikit_learn(*fold), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f[0], f[1][:, :-1], f[2], f[3]), "do not belong together"),
        (lambda f: (f[0], f[1], f[2][:-1], f[3]), "do not belong together"),
        (lambda f: (f[0], f[1], f[2], f[3][:, :-1]), "do not belong together"),
        (lambda f: (f[0] * np.nan, f[1], f[2], f[3]), "training features are not finite"),
        (lambda f: (f[0], f[1], f[2], f[3] - 100), "test counts are not counts"),
    ],
)
def test_a_fold_that_cannot_be_right_is_refused(change, message: str) -> None:
    for regression in (hest.ridge_pearson, hest.exact_ridge_pearson):
        with pytest.raises(DataError, match=message):
            regression(*change(small_fold()))


@pytest.mark.parametrize("alphas", [[], [-1.0], [np.nan]])
def test_strengths_are_numbers_from_0(alphas: list[float]) -> None:
    with pytest.raises(ConfigError, match="ridge strengths"):
        hest.exact_ridge_pearson(*small_fold(), alphas=alphas)


# ------------------------------------------------------------------ layout

GENES = ["ACTB", "EPCAM", "KRT8", "PTPRC"]
OTHER_GENES = ["GAPDH", "CD3E"]


def write_index(file: h5py.File, axis: str, names: Sequence[str], column: str) -> None:
    group = file.create_group(axis)
    group.attrs.update({"_index": column, "encoding-type": "dataframe", "encoding-version": "0.2.0"})
    group.attrs["column-order"] = np.array([], dtype=h5py.string_dtype())
    group[column] = np.array(names, dtype=object)
    group[column].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def write_h5ad(path: Path, counts: np.ndarray, spots: Sequence[str], genes: Sequence[str], kind: str = "csr") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_index(file, "obs", spots, "barcode")
        write_index(file, "var", genes, "_index")
        if kind == "dense":
            file["X"] = counts.astype(np.float32)
            file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            return
        matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](counts.astype(np.float32))
        group = file.create_group("X")
        group.attrs.update({"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0", "shape": matrix.shape})
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)


def write_patches(path: Path, tiles: np.ndarray, barcodes: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["img"] = tiles
        file["barcode"] = np.array([[b.encode()] for b in barcodes], dtype=object).astype(h5py.string_dtype())
        file["coords"] = np.zeros((len(tiles), 2), int)


def write_task(root: Path, name: str, samples: Sequence[str], seed: int, spots: int = 24, px: int = 16) -> None:
    """A task whose genes follow the colour of the patches; every sample is the test of one fold."""
    rng = np.random.default_rng(seed)
    folder = root / name
    (folder / "splits").mkdir(parents=True)
    (folder / "var_50genes.json").write_text(json.dumps({"genes": GENES}))
    kinds = ["csr", "csc", "dense"]
    mixing = rng.normal(size=(3, len(GENES) + len(OTHER_GENES)))
    for number, sample in enumerate(samples):
        barcodes = [f"{sample}-{i:03d}" for i in range(spots)]
        tiles = rng.integers(0, 256, (spots, 1, 1, 3)).astype(np.uint8) * np.ones((1, px, px, 1), np.uint8)
        tiles[:, : px // 2] //= 2
        write_patches(folder / "patches" / f"{sample}.h5", tiles, barcodes)
        colour = tiles.mean(axis=(1, 2)) / 255
        counts = rng.poisson(np.exp(1 + 2 * colour @ mixing))
        everyone = [*barcodes, "unseen"]
        counts = np.concatenate([counts, np.full((1, counts.shape[1]), 99)])
        order = rng.permutation(len(everyone))  # the order of either file means nothing
        genes = rng.permutation(len(GENES) + len(OTHER_GENES))
        names = np.array(GENES + OTHER_GENES)[genes].tolist()
        write_h5ad(
            folder / "adata" / f"{sample}.h5ad",
            counts[order][:, genes],
            [everyone[i] for i in order],
            names,
            kinds[number % 3],
        )
    for number, sample in enumerate(samples):
        for side, members in (("test", [sample]), ("train", [s for s in samples if s != sample])):
            lines = ["sample_id,patches_path,expr_path", *(f"{s},patches/{s}.h5,adata/{s}.h5ad" for s in members)]
            (folder / "splits" / f"{side}_{number}.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_counts_come_by_barcode_and_by_gene(tmp_path: Path, kind: str) -> None:
    counts = np.arange(12).reshape(3, 4) % 7
    write_h5ad(tmp_path / "a.h5ad", counts, ["s", "t", "u"], ["a", "b", "c", "d"], kind)
    found = read_counts(tmp_path / "a.h5ad", ["u", "s"], ["d", "a", "b"])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, counts[[2, 0]][:, [3, 0, 1]])


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_anndata_s_own_files_are_read(tmp_path: Path, kind: str) -> None:
    anndata = pytest.importorskip("anndata", reason="anndata is not among the dependencies; it is the reference here")
    import pandas as pd

    counts = np.arange(12).reshape(3, 4).astype(np.float32) % 5
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[kind](counts)
    names = {"obs": pd.DataFrame(index=["s", "t", "u"]), "var": pd.DataFrame(index=["a", "b", "c", "d"])}
    anndata.AnnData(matrix, **names).write_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(read_counts(tmp_path / "a.h5ad", ["t", "s"], ["c", "a"]), counts[[1, 0]][:, [2, 0]])
    write_h5ad(tmp_path / "b.h5ad", counts, ["s", "t", "u"], ["a", "b", "c", "d"], kind)
    ours = anndata.read_h5ad(tmp_path / "b.h5ad")  # what these tests write is an h5ad file
    assert ours.obs_names.tolist() == ["s", "t", "u"]
    np.testing.assert_array_equal(np.asarray(ours.to_df()), counts)


def test_what_a_count_file_lacks_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    write_h5ad(path, np.ones((2, 2)), ["s", "t"], ["a", "a"])
    with pytest.raises(DataError, match=r"lacks 1 of 2 barcodes(.|\n)*nobody"):
        read_counts(path, ["s", "nobody"], ["a"])
    with pytest.raises(DataError, match=r"lacks 1 of 1 genes(.|\n)*TP53"):
        read_counts(path, ["s"], ["TP53"])
    with pytest.raises(DataError, match=r"names some genes twice(.|\n)*a"):
        read_counts(path, ["s"], ["a"])
    with pytest.raises(DataError, match="is missing"):
        read_counts(tmp_path / "b.h5ad", ["s"], ["a"])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="cannot be read"):
        read_counts(path, ["s"], ["b"])


def test_counts_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    write_h5ad(path, np.ones((2, 2)), ["s", "t"], ["a", "b"])
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = "coo_matrix"
    with pytest.raises(DataError, match="coo_matrix"):
        read_counts(path, ["s"], ["a"])
    write_h5ad(path, np.ones((3, 2)), ["s", "t"], ["a", "b"], "dense")
    with pytest.raises(DataError, match="do not match"):
        read_counts(path, ["s"], ["a"])


def test_patches_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    tiles = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    write_patches(path, tiles, ["s", "t"])
    found = read_patches(path)
    assert found.barcodes == ("s", "t")
    np.testing.assert_array_equal(found.read(1, 2), tiles[1:])
    write_patches(path, tiles + 1, ["s", "t"])
    assert read_patches(path).key != found.key
    write_patches(path, tiles, ["s", "s"])
    with pytest.raises(DataError, match="a barcode of its own"):
        read_patches(path)
    write_patches(path, tiles.astype(np.float32), ["s", "t"])
    with pytest.raises(DataError, match=r"no patches(.|\n)*float32"):
        read_patches(path)


def test_a_task_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    write_task(tmp_path, "IDC", ["A", "B"], 0)
    task = read_task(tmp_path / "IDC")
    assert task.genes == tuple(GENES)
    assert [[s.name for s in (*fold.train, *fold.test)] for fold in task.folds] == [["B", "A"], ["A", "B"]]
    (tmp_path / "IDC" / "adata" / "B.h5ad").unlink()
    with pytest.raises(DataError, match=r"is missing(.|\n)*B\.h5ad"):
        read_task(tmp_path / "IDC")
    split = tmp_path / "IDC" / "splits" / "train_0.csv"
    split.write_text((tmp_path / "IDC" / "splits" / "test_0.csv").read_text())
    with pytest.raises(DataError, match="in training and test"):
        read_task(tmp_path / "IDC")
    split.unlink()
    with pytest.raises(DataError, match="does not exist"):
        read_task(tmp_path / "IDC")
    (tmp_path / "IDC" / "var_50genes.json").write_text("{}")
    with pytest.raises(DataError, match="genes of a task cannot be read"):
        read_task(tmp_path / "IDC")


def test_tasks_that_are_not_there_are_missing(tmp_path: Path) -> None:
    for name in ("PRAD", "IDC", "HCC"):
        (tmp_path / name).mkdir()
    present, missing = find_tasks(tmp_path)
    assert present == ["IDC", "PRAD"]
    assert missing == [name for name in TASKS if name not in present]
    with pytest.raises(ConfigError, match=r"no such task(.|\n)*CCRCC"):
        find_tasks(tmp_path, ["CCRC"])
    with pytest.raises(DataError, match="no task of the HEST benchmark is here"):
        find_tasks(tmp_path, ["SKCM"])


# ------------------------------------------------------------------ run


@dataclass
class ColourEmbedder:
    """The mean colour of the two halves of a tile, and products of these."""

    name: str = "colour"
    key: str = "c0"
    pooling: str = "cls"
    dim: int = 12
    calls: list[int] = field(default_factory=list)

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        self.calls.append(len(tiles))
        half = tiles.shape[1] // 2
        colour = np.concatenate([tiles[:, :half].mean(axis=(1, 2)), tiles[:, half:].mean(axis=(1, 2))], axis=1) / 255
        return np.concatenate([colour, colour**2], axis=1).astype(np.float32)

    def patch_tokens(self, tiles: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def run(root: Path, out: Path, embedder: ColourEmbedder | None = None, **options: Any) -> Result:
    return run_hest(
        root=root,
        embedder=embedder or ColourEmbedder(),
        cache=FeatureCache(None),
        out=out,
        console=Console(file=StringIO()),
        **options,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hest")
    write_task(folder, "IDC", ["A", "B", "C"], 1)
    write_task(folder, "PRAD", ["D", "E"], 2)
    return folder


def by_hand(root: Path, task: str, test: str, train: Sequence[str]) -> np.ndarray:
    """One fold from the files, with loops and names."""

    def side(samples: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        x, y = [], []
        for sample in samples:
            with h5py.File(root / task / "patches" / f"{sample}.h5") as file:
                x.append(ColourEmbedder().embed(file["img"][()]))
                barcodes = [b.decode() for b in file["barcode"][:, 0]]
            y.append(read_counts(root / task / "adata" / f"{sample}.h5ad", barcodes, GENES))
        return np.concatenate(x), np.concatenate(y)

    (x_train, y_train), (x_test, y_test) = side(train), side([test])
    return by_scikit_learn(x_train, x_test, y_train, y_test)


def score(result: Result, name: str) -> Any:
    return next(s for s in result.scores if s.name == name)


def test_the_mean_is_over_genes_then_folds_then_tasks(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path)
    idc = [by_hand(root, "IDC", t, [s for s in "ABC" if s != t]).mean() for t in "ABC"]
    prad = [by_hand(root, "PRAD", t, [s for s in "DE" if s != t]).mean() for t in "DE"]
    assert result.headline == "pearson"
    assert score(result, "pearson/IDC").value == pytest.approx(np.mean(idc), abs=1e-9)
    assert f"std over 3 folds {np.std(idc):.4f}" in score(result, "pearson/IDC").note
    mean = score(result, "pearson")
    assert mean.value == pytest.approx((np.mean(idc) + np.mean(prad)) / 2, abs=1e-9)
    assert mean.low <= mean.value <= mean.high
    assert mean.value > 0.3, "the genes follow the colour"
    assert "2 of 9 tasks (IDC, PRAD)" in mean.note
    assert "missing on the disk: PAAD" in mean.note
    assert score(result, "pearson/SKCM").value is None
    assert result.data["missing"] == [name for name in TASKS if name not in ("IDC", "PRAD")]
    assert read_result(tmp_path) == result


def test_a_lone_task_is_marked_and_nothing_else_is_called_missing(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path, tasks=["PRAD"], exact=True)
    assert [s.name for s in result.scores] == ["pearson_exact", "pearson_exact/PRAD"]
    assert score(result, "pearson_exact").note == "mean over 1 of 9 tasks (PRAD)"


def test_each_section_is_embedded_once_and_finished_folds_stay(root: Path, tmp_path: Path) -> None:
    embedder = ColourEmbedder()
    first = run(root, tmp_path, embedder)
    assert sum(embedder.calls) == 5 * 24
    folds = sorted((tmp_path / "folds").iterdir())
    assert len(folds) == 5
    before = {path: path.stat().st_mtime_ns for path in folds}
    folds[0].unlink()
    again = run(root, tmp_path, embedder)
    assert sum(embedder.calls) == 5 * 24, "features come from the cache"
    after = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "folds").iterdir())}
    assert [path for path in before if after[path] != before[path]] == folds[:1]
    assert again.scores == first.scores
    assert again.details == first.details
    run(root, tmp_path, ColourEmbedder(key="another"))
    assert len(list((tmp_path / "folds").iterdir())) == 10, "another encoder, other folds"


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_hest
from pathlib import Path

class Killed(test_hest.ColourEmbedder):
    def embed(self, tiles):
        if len(self.calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(tiles)

test_hest.run(Path({root!r}), Path({out!r}), Killed())
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(root: Path, tmp_path: Path) -> None:
    whole = run(root, tmp_path / "whole")
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(root), out=str(tmp_path / "cut"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "cut" / "folds").iterdir())) == 3
    embedder = ColourEmbedder()
    result = run(root, tmp_path / "cut", embedder)
    assert embedder.calls == [24], "the other sections were kept"
    # the processes may differ in BLAS threads, and the solver stops early
    for ours, theirs in zip(result.scores, whole.scores, strict=True):
        assert (ours.name, ours.value is None) == (theirs.name, theirs.value is None)
        if ours.value is not None:
            assert ours.value == pytest.approx(theirs.value, abs=5e-3)


def test_a_constant_gene_leaves_no_mean_and_is_named(tmp_path: Path) -> None:
    write_task(tmp_path / "data", "IDC", ["A", "B"], 3)
    write_task(tmp_path / "data", "PRAD", ["D", "E"], 2)
    path = tmp_path / "data" / "IDC" / "adata" / "B.h5ad"
    with h5py.File(path) as file:
        spots, genes = ([n.decode() for n in file[a][c][()]] for a, c in (("obs", "barcode"), ("var", "_index")))
    counts = read_counts(path, spots, genes)
    counts[:, genes.index("KRT8")] = 3
    write_h5ad(path, counts, spots, genes)
    result = run(tmp_path / "data", tmp_path / "out")
    for name in ("pearson", "pearson/IDC"):
        assert score(result, name).value is None
        assert "IDC fold 1: KRT8 constant in the test spots (mean of the other 3 genes " in score(result, name).note
    assert score(result, "pearson/PRAD").value is not None
    fold = result.details["folds"][1]
    assert fold["constant_in_test"] == ["KRT8"]
    assert fold["pearson"][GENES.index("KRT8")] is None
    assert read_result(tmp_path / "out") == result


def test_a_damaged_fold_is_an_error_and_not_a_number(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path, tasks=["PRAD"])
    path = sorted((tmp_path / "folds").iterdir())[0]
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match="damaged"):
        run(root, tmp_path, tasks=["PRAD"])
