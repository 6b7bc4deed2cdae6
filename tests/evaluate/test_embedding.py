"""Embeddings of many tiles: the right numbers, computed once, and on from where a run was killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from histill.errors import DataError
from histill.evaluate.embedding import BLOCK_TILES, EncoderEmbedder, FeatureCache
from histill.evaluate.results import Result, Score, read_result, write_result
from histill.models import build_student, wrap

COUNT = BLOCK_TILES + 100
MEAN, STD = (0.7, 0.58, 0.7), (0.21, 0.23, 0.18)


class MeanColour:
    """Features one can compute by hand; counts what it is asked."""

    name, key, pooling, dim = "mean colour", "k", "cls", 3

    def __init__(self) -> None:
        self.seen = 0

    def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        self.seen += len(tiles_NHW3)
        return tiles_NHW3.reshape(len(tiles_NHW3), -1, 3).mean(axis=1).astype(np.float32)

    def patch_tokens(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def tiles(first: int, last: int) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), (n % 250, n // 250, 7), np.uint8) for n in range(first, last)])


EXPECTED = np.array([(n % 250, n // 250, 7) for n in range(COUNT)], np.float32)


@pytest.mark.parametrize("cached", [True, False])
def test_rows_are_in_order(cached: bool, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache" if cached else None)
    np.testing.assert_array_equal(cache.features(MeanColour(), "d", COUNT, tiles), EXPECTED)


def test_the_same_is_computed_once_and_other_data_anew(tmp_path: Path) -> None:
    cache, embedder = FeatureCache(tmp_path), MeanColour()
    cache.features(embedder, "d", COUNT, tiles)
    cache.features(embedder, "d", COUNT, tiles)
    assert embedder.seen == COUNT
    cache.features(embedder, "other", COUNT, tiles)
    assert embedder.seen == 2 * COUNT
    assert not list(tmp_path.glob("*.lock"))
    assert not list(tmp_path.glob("*.part*"))


def test_a_run_that_died_goes_on_at_the_next_block(tmp_path: Path) -> None:
    class Dying(MeanColour):
        def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
            if self.seen:
                raise KeyboardInterrupt
            return super().embed(tiles_NHW3)

    cache, told = FeatureCache(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        cache.features(Dying(), "d", COUNT, tiles)
    embedder = MeanColour()
    np.testing.assert_array_equal(cache.features(embedder, "d", COUNT, tiles, progress=told.append), EXPECTED)
    assert embedder.seen == COUNT - BLOCK_TILES
    assert told == [BLOCK_TILES, COUNT - BLOCK_TILES]


def test_a_feature_that_is_not_finite_is_named_and_not_kept(tmp_path: Path) -> None:
    class Broken(MeanColour):
        def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
            features = super().embed(tiles_NHW3)
            features[:, 1][features[:, 0] == 42] = np.nan
            return features

    with pytest.raises(DataError, match="tile 42"):
        FeatureCache(tmp_path).features(Broken(), "d", COUNT, tiles)
    np.testing.assert_array_equal(FeatureCache(tmp_path).features(MeanColour(), "d", COUNT, tiles), EXPECTED)


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    return wrap(build_student("vit-nano", seed=1), name="nano", mean=MEAN, std=STD, input_px=56).eval()


def test_an_encoder_is_asked_as_it_wants_to_be(encoder: torch.nn.Module) -> None:
    rng = np.random.default_rng(0)
    images_NHW3 = rng.integers(0, 256, (5, 56, 56, 3), np.uint8)
    with torch.no_grad():
        tokens = encoder(torch.from_numpy(images_NHW3).permute(0, 3, 1, 2))
    cls = EncoderEmbedder.of(encoder, name="n", precision="fp32", batch=2)
    both = EncoderEmbedder.of(encoder, name="n", pooling="cls+mean", precision="fp32", batch=2)
    np.testing.assert_allclose(cls.embed(images_NHW3), tokens.cls_BD, rtol=1e-4, atol=1e-5)
    mean = tokens.patches_BHWD.mean(dim=(1, 2))
    np.testing.assert_allclose(both.embed(images_NHW3), torch.cat([tokens.cls_BD, mean], 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cls.patch_tokens(images_NHW3), tokens.patches_BHWD, rtol=1e-4, atol=1e-5)
    assert (cls.dim, both.dim) == (encoder.embed_dim, 2 * encoder.embed_dim)


def test_the_key_tells_all_that_decides(encoder: torch.nn.Module) -> None:
    other = wrap(build_student("vit-nano", seed=2), name="nano", mean=MEAN, std=STD, input_px=56).eval()
    keys = {
        EncoderEmbedder.of(encoder, name="a", precision="fp32").key,
        EncoderEmbedder.of(encoder, name="a", precision="bf16").key,
        EncoderEmbedder.of(encoder, name="a", precision="fp32", pooling="cls+mean").key,
        EncoderEmbedder.of(encoder, name="a", precision="fp32", input_px=112).key,
        EncoderEmbedder.of(other, name="a", precision="fp32").key,
    }
    assert len(keys) == 5
    assert EncoderEmbedder.of(encoder, name="b", precision="fp32", batch=3).key in keys  # names and batches do not


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    result = Result(
        benchmark="plism",
        encoder="e",
        encoder_key="k",
        pooling="cls",
        headline="score",
        scores=(Score(name="score", value=0.5, low=0.4, high=0.6), Score(name="x", value=None, note="no pairs")),
        data={"n": 3},
        details={"pairs": [{"slide_a": "a"}]},
        seconds=1.5,
    )
    write_result(result, tmp_path)
    assert read_result(tmp_path) == result
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_result(tmp_path)
