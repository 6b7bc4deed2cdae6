"""The exact engine against float64 evaluations of the definition, and the original's float16 numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histill.errors import DataError
from histill.evaluate.plism import engine
from histill.evaluate.plism.engine import TOP, compare, prepare, self_top
from histill.evaluate.plism.fp16 import compare_fp16


def definition(a_ND: np.ndarray, b_ND: np.ndarray, tie: float = 1e-13) -> list[float]:
    """The definition, written down: one 2n x 2n matrix in float64; cosines as near as ``tie`` are equal."""
    unit_MD = np.concatenate([a_ND, b_ND]).astype(np.float64)
    norm_M1 = np.linalg.norm(unit_MD, axis=1, keepdims=True)
    unit_MD = unit_MD / np.where(norm_M1 == 0, 1, norm_M1)
    tiles = len(a_ND)
    cosine_MM = unit_MD @ unit_MD.T
    twin_M = np.roll(np.arange(2 * tiles), -tiles)
    bar_M = (unit_MD * unit_MD[twin_M]).sum(axis=1)
    cosine_MM[np.arange(2 * tiles), twin_M] = -9
    np.fill_diagonal(cosine_MM, -9)
    rank_M = (cosine_MM > bar_M[:, None] + tie).sum(axis=1)
    return [bar_M.mean(), *((rank_M < k).mean() for k in TOP)]


def measured(a_ND: np.ndarray, b_ND: np.ndarray) -> list[float]:
    return list(astuple(compare(prepare(a_ND, name="a"), prepare(b_ND, name="b"))))[:5]


def agree(a_ND: np.ndarray, b_ND: np.ndarray) -> None:
    got, want = measured(a_ND, b_ND), definition(a_ND, b_ND)
    assert got[0] == pytest.approx(want[0], abs=1e-12)
    assert got[1:] == pytest.approx(want[1:], abs=1e-9)


def noisy(seed: int, tiles: int, dim: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    field_ND = rng.normal(size=(tiles, dim))
    both = [field_ND + noise * rng.normal(size=(tiles, dim)) for _ in range(2)]
    return both[0].astype(np.float32), both[1].astype(np.float32)


@pytest.fixture(params=[None, 64], ids=["whole", "small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param:
        monkeypatch.setitem(engine.CHUNK_ENTRIES, "cpu", request.param)
    return


class TestParity:
    def pairs(self, shared_parity: Path) -> tuple[dict[str, engine.Slide], list[dict[str, object]]]:
        folder = shared_parity / "plism"
        names = sorted(path.parent.name for path in folder.glob("features/*/features.npy"))
        tables = {name: np.load(folder / "features" / name / "features.npy")[:, 3:] for name in names}
        pairs = json.loads((folder / "expected.json").read_text())["pairs"]
        return {name: prepare(table, name=name) for name, table in tables.items()}, pairs

    def test_exact(self, shared_parity: Path) -> None:
        slides, pairs = self.pairs(shared_parity)
        assert len(pairs) == 15
        for pair in pairs:
            got = astuple(compare(slides[pair["slide_a"]], slides[pair["slide_b"]]))
            assert got[0] == pytest.approx(pair["exact"][0], abs=1e-12)
            assert got[1:5] == pytest.approx(pair["exact"][1:], abs=1e-9)
            assert got[5] == 0.0

    def test_fp16(self, shared_parity: Path) -> None:
        slides, pairs = self.pairs(shared_parity)
        for pair in pairs:
            got = astuple(compare_fp16(slides[pair["slide_a"]], slides[pair["slide_b"]]))
            assert got[0] == pytest.approx(pair["reference_fp16"][0], abs=1e-6)  # the tolerance is 5e-4
            assert got[1:5] == pytest.approx(pair["reference_fp16"][1:], abs=0.0022)  # the tolerance is 0.004


@pytest.mark.usefixtures("chunks")
class TestExact:
    @pytest.mark.parametrize("tiles", [1, 2, 5, 11, 12, 16, 17, 100])
    @pytest.mark.parametrize("noise", [0.3, 2.0])
    def test_any_number_of_tiles(self, tiles: int, noise: float) -> None:
        agree(*noisy(tiles, tiles, 8, noise))

    def test_both_directions_count(self) -> None:
        a_ND, b_ND = noisy(0, 60, 4, 0.8)
        assert measured(a_ND, b_ND) == pytest.approx(measured(b_ND, a_ND), abs=1e-12)

    def test_lengths_do_not_matter(self) -> None:
        a_ND, b_ND = noisy(1, 90, 16, 1.0)
        scale_N1 = np.float32(2.0) ** np.random.default_rng(0).integers(-60, 60, size=(90, 1)).astype(np.float32)
        assert measured(a_ND * scale_N1, b_ND) == measured(a_ND, b_ND)
        agree(a_ND * np.float32(1000), b_ND)

    def test_perfect_twins(self) -> None:
        a_ND, _ = noisy(2, 90, 16, 1.0)
        assert measured(a_ND, a_ND) == pytest.approx([1.0] * 5, abs=1e-12)
        assert measured(a_ND * np.float32(1000), a_ND)[1:] == [1.0] * 4

    def test_leads_that_float32_cannot_see(self) -> None:
        rng = np.random.default_rng(3)
        centre_D = rng.normal(size=12)
        a_ND, b_ND = (
            np.float32(centre_D) + np.float32(1e-3) * rng.normal(size=(120, 12)).astype(np.float32) for _ in range(2)
        )
        agree(a_ND, b_ND)
        single = (a_ND / np.linalg.norm(a_ND, axis=1, keepdims=True)) @ (
            b_ND / np.linalg.norm(b_ND, axis=1, keepdims=True)
        ).T
        lead_NN = np.abs(single - np.diag(single)[:, None])
        assert (lead_NN < 1e-7).sum() > 2 * len(a_ND)  # so float32 alone could not have told

    def test_copies_are_ties_and_count_for_the_twin(self) -> None:
        # entries of +-1 and 16 features: every cosine is a multiple of 1/16, exact in float64
        a_ND = np.random.default_rng(4).choice([-1.0, 1.0], size=(40, 16)).astype(np.float32)
        a_ND[20:] = a_ND[:20]
        b_ND = a_ND.copy()
        b_ND[:, 0] = 1
        got = measured(a_ND, b_ND)
        assert got[1:] == pytest.approx(definition(a_ND, b_ND, tie=0.0)[1:], abs=1e-9)
        assert compare(prepare(a_ND, name="a"), prepare(a_ND, name="a")).tied == 1.0  # all have a copy

    def test_copies_with_rounded_cosines(self) -> None:
        a_ND, b_ND = noisy(5, 40, 7, 0.7)
        agree(np.tile(a_ND, (4, 1)), np.tile(b_ND, (4, 1)))

    def test_collapsed_features_are_told(self) -> None:
        one_ND = np.tile(noisy(6, 1, 7, 0.0)[0], (50, 1))
        found = compare(prepare(one_ND, name="a"), prepare(one_ND, name="b"))
        assert found.top_1_accuracy == 1.0
        assert found.tied == 1.0

    def test_rows_of_zeros(self) -> None:
        a_ND, b_ND = noisy(7, 40, 5, 0.7)
        a_ND[3] = b_ND[5] = 0
        agree(a_ND, b_ND)

    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_against_exact_fractions(self, data: st.DataObject) -> None:
        """Small whole numbers: ranks by comparing signed squares of cosines as fractions, with no rounding at all."""
        tiles, dim = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 3))
        cell = st.integers(-2, 2)
        table = data.draw(st.lists(st.lists(cell, min_size=dim, max_size=dim), min_size=2 * tiles, max_size=2 * tiles))
        both = np.array(table, dtype=np.float32)
        ranks = []
        for i in range(2 * tiles):
            twin = (i + tiles) % (2 * tiles)
            bar = signed_square(table[i], table[twin])
            others = (j for j in range(2 * tiles) if j not in (i, twin))
            ranks.append(sum(signed_square(table[i], table[j]) > bar for j in others))
        want = [np.mean([rank < k for rank in ranks]) for k in TOP]
        assert measured(both[:tiles], both[tiles:])[1:] == pytest.approx(want, abs=1e-9)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_case_is_the_definition(data: st.DataObject) -> None:
    """Copies within a slide, perfect twins, rows of zeros, lengths of 1,000, any dtype, odd chunks."""
    tiles, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    both = rng.normal(size=(2, tiles, dim))
    place = st.integers(0, tiles - 1)
    for copy, original in data.draw(st.lists(st.tuples(place, place), max_size=8)):
        both[:, copy] = both[:, original]
    for row in data.draw(st.lists(place, max_size=4)):
        both[1, row] = both[0, row]  # a perfect twin
    for side, row in data.draw(st.lists(st.tuples(st.integers(0, 1), place), max_size=3)):
        both[side, row] = 0
    both *= data.draw(st.sampled_from([1e-3, 1.0, 1000.0]))
    a_ND, b_ND = both.astype(data.draw(st.sampled_from([np.float16, np.float32, np.float64])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.CHUNK_ENTRIES, "cpu", data.draw(st.sampled_from([1, 97, 331, 2**21])))
        agree(a_ND, b_ND)
        assert measured(b_ND, a_ND) == pytest.approx(measured(a_ND, b_ND), abs=1e-12)


def signed_square(x: list[int], y: list[int]) -> Fraction:
    """Grows with the cosine."""
    dot, lengths = sum(p * q for p, q in zip(x, y, strict=True)), sum(p * p for p in x) * sum(q * q for q in y)
    return Fraction(dot * abs(dot), lengths) if lengths else Fraction(0)


class TestSelfTop:
    @pytest.mark.parametrize("tiles", [1, 4, 10, 11, 17, 90])
    def test_values(self, tiles: int) -> None:
        x_ND = noisy(8, tiles, 6, 0.0)[0]
        unit_ND = x_ND.astype(np.float64) / np.linalg.norm(x_ND.astype(np.float64), axis=1, keepdims=True)
        cosine_NN = unit_ND @ unit_ND.T
        np.fill_diagonal(cosine_NN, -np.inf)
        want_NK = np.full((tiles, 10), -np.inf)
        want_NK[:, :tiles] = -np.sort(-cosine_NN, axis=1)[:, :10]
        np.testing.assert_allclose(self_top(x_ND), want_NK, atol=1e-14, rtol=0)

    def test_more_near_copies_than_candidates(self) -> None:
        rng = np.random.default_rng(9)
        x_ND = (rng.normal(size=8) + 1e-4 * rng.normal(size=(200, 8))).astype(np.float32)
        unit_ND = x_ND.astype(np.float64) / np.linalg.norm(x_ND.astype(np.float64), axis=1, keepdims=True)
        cosine_NN = unit_ND @ unit_ND.T
        np.fill_diagonal(cosine_NN, -np.inf)
        np.testing.assert_allclose(self_top(x_ND), -np.sort(-cosine_NN, axis=1)[:, :10], atol=1e-14, rtol=0)

    def test_mapped_files(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", noisy(8, 20, 6, 0.0)[0])
        mapped_ND = np.load(tmp_path / "x.npy", mmap_mode="r")
        np.testing.assert_array_equal(self_top(mapped_ND), self_top(np.array(mapped_ND)))


@pytest.mark.parametrize("lay", [np.asfortranarray, lambda x: x.astype(">f4"), lambda x: x[::-1][::-1]])
def test_arrays_in_any_layout(lay: Callable[[np.ndarray], np.ndarray]) -> None:
    a_ND, b_ND = noisy(18, 50, 6, 0.8)
    assert measured(lay(a_ND), b_ND) == measured(a_ND, b_ND)
    assert measured(a_ND[::-1], b_ND[::-1]) == pytest.approx(measured(a_ND, b_ND), abs=1e-12)


class TestErrorBound:
    @pytest.mark.parametrize("dim", [3, 64, 768, 2560])
    def test_float32_products_keep_to_it(self, dim: int) -> None:
        a_ND, b_ND = (prepare(x, name="x") for x in noisy(10, 64, dim, 0.1))
        exact = engine._exact_rows(a_ND.raw_ND, a_ND.norm_N, torch.arange(64)) @ (
            engine._exact_rows(b_ND.raw_ND, b_ND.norm_N, torch.arange(64)).T
        )
        worst = ((a_ND.unit_PD[:64] @ b_ND.unit_PD[:64].T).double() - exact).abs().max()
        assert 0 < worst < engine.float32_error(dim) < 3e-4

    def test_allowed_shortcuts_are_undone_and_put_back(self) -> None:
        a_ND, b_ND = noisy(11, 200, 32, 1.0)
        want = measured(a_ND, b_ND)
        torch.set_float32_matmul_precision("medium")
        try:
            with engine.full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
            assert measured(a_ND, b_ND) == want
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")


class TestFp16:
    def test_long_features_overflow(self) -> None:
        a_ND, b_ND = noisy(12, 60, 16, 0.3)
        a, b = (prepare(x * np.float32(1000), name="x") for x in (a_ND, b_ND))
        assert compare_fp16(a, b).cosine_similarity == 0.0
        assert compare(a, b).cosine_similarity > 0.8

    def test_features_beyond_float16_are_not_a_number(self) -> None:
        a, b = (prepare(x * np.float32(1e6), name="x") for x in noisy(13, 20, 16, 0.3))
        assert np.isnan(compare_fp16(a, b).cosine_similarity)

    @pytest.mark.parametrize("scale", [1.0, 20.0, 1000.0])
    @pytest.mark.parametrize("noise", [0.0, 1e-3, 0.5])
    def test_it_is_the_original_written_down(self, scale: float, noise: float) -> None:
        """Half precision throughout; order all tiles of both slides by similarity and drop the first."""
        a_ND, b_ND = (x * np.float32(scale) for x in noisy(17, 70, 24, noise))
        half_MD = np.concatenate([a_ND, b_ND]).astype(np.float16)
        with np.errstate(over="ignore"):  # squared lengths above 65,504 are infinite
            square_M = (half_MD * half_MD).astype(np.float32).sum(axis=1).astype(np.float16)
        unit_MD = half_MD / np.sqrt(square_M)[:, None]
        cosine_MM = (unit_MD.astype(np.float32) @ unit_MD.astype(np.float32).T).astype(np.float16)
        order_MM = np.argsort(-cosine_MM.astype(np.float32), axis=1, kind="stable")[:, 1:]
        twin_M1 = np.roll(np.arange(140), -70)[:, None]
        want = [float((order_MM[:, :k] == twin_M1).any(axis=1).mean()) for k in TOP]
        got = astuple(compare_fp16(prepare(a_ND, name="a"), prepare(b_ND, name="b")))
        products = unit_MD[:70] * unit_MD[70:]
        assert got[0] == pytest.approx(products.astype(np.float32).sum(axis=1).mean(), abs=5e-4)
        assert got[1:5] == pytest.approx(want, abs=2.1 / 140)  # a product may round to the next half

    def test_near_perfect_twins_are_dropped(self) -> None:
        a_ND, b_ND = noisy(14, 200, 64, 1e-3)
        a, b = prepare(a_ND, name="a"), prepare(b_ND, name="b")
        assert compare(a, b).top_1_accuracy == 1.0
        assert 0.4 < compare_fp16(a, b).top_10_accuracy < 0.8

    def test_small_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = (prepare(x, name="x") for x in noisy(15, 50, 8, 0.7))
        want = compare_fp16(a, b)
        monkeypatch.setitem(engine.CHUNK_ENTRIES, "cpu", 300)
        assert compare_fp16(a, b) == want


class TestRefused:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value: float) -> None:
        a_ND = noisy(16, 30, 4, 1.0)[0]
        a_ND[17, 2] = value
        with pytest.raises(DataError, match=r"(?s)not finite.*slide GIV_AT2, first in row 17"):
            prepare(a_ND, name="GIV_AT2")

    @pytest.mark.parametrize("scale", [1e200, 1e-200])
    def test_lengths_that_float64_cannot_square(self, scale: float) -> None:
        a_ND = noisy(16, 30, 4, 1.0)[0].astype(np.float64)
        a_ND[11] *= scale
        with pytest.raises(DataError, match=r"(?s)float64 cannot hold.*slide GIV_AT2, first in row 11"):
            prepare(a_ND, name="GIV_AT2")

    def test_shapes(self) -> None:
        with pytest.raises(DataError, match="one row per tile"):
            prepare(np.zeros(3, np.float32), name="a")
        slides = [prepare(noisy(0, tiles, 4, 1.0)[0], name=f"slide {tiles}") for tiles in (5, 6)]
        with pytest.raises(DataError, match="slide 5, slide 6"):
            compare(*slides)
