from __future__ import annotations

import csv
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from histill.errors import ConfigError, DataError
from histill.synthetic import KINDS, SCANNERS, STAINS, write_tile_set
from histill.synthetic import tiles as tiles_module

TILES, SLIDES, FIELDS = 240, 15, 6


@pytest.fixture(scope="module")
def tile_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    write_tile_set(folder, tiles=TILES, slides=SLIDES, fields=FIELDS, tile_px=96, seed=1)
    return folder


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _image(path: Path) -> np.ndarray:
    return simplejpeg.decode_jpeg(path.read_bytes(), colorspace="RGB")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_tables_list_every_file_once(tile_set: Path) -> None:
    labels, paired = _table(tile_set / "labels.csv"), _table(tile_set / "paired.csv")
    assert tuple(labels[0]) == ("path", "label", "slide", "scanner", "split")
    assert tuple(paired[0]) == ("path", "slide", "scanner", "x", "y")
    assert len(labels) == TILES
    assert len(paired) == FIELDS * 4
    listed = [row["path"] for row in labels + paired]
    assert sorted([*listed, "labels.csv", "paired.csv"]) == sorted(_files(tile_set))


def test_files_are_full_colour_jpeg_of_the_stated_size(tile_set: Path) -> None:
    for row in _table(tile_set / "labels.csv")[:4] + _table(tile_set / "paired.csv")[:4]:
        data = (tile_set / row["path"]).read_bytes()
        assert simplejpeg.decode_jpeg_header(data) == (96, 96, "YCbCr", "444")
        with Image.open(tile_set / row["path"]) as image:
            # the luminance table of the IJG code at quality 92 starts with round(16 * 16 / 100)
            assert image.quantization[0][0] == 3


def test_labels_are_balanced_and_agree_with_the_path(tile_set: Path) -> None:
    labels = _table(tile_set / "labels.csv")
    assert set(Counter(row["label"] for row in labels).values()) == {TILES // len(KINDS)}
    assert set(Counter((row["slide"], row["label"]) for row in labels).values()) == {TILES // len(KINDS) // SLIDES}
    for row in labels:
        assert row["path"].startswith(f"tiles/{row['label']}/{row['slide']}_")


def test_split_is_by_slide_and_every_appearance_is_in_both(tile_set: Path) -> None:
    labels, paired = _table(tile_set / "labels.csv"), _table(tile_set / "paired.csv")
    slides = {split: {row["slide"] for row in labels if row["split"] == split} for split in ("train", "test")}
    assert len(slides["train"]) == 10
    assert len(slides["test"]) == 5
    assert not slides["train"] & slides["test"]
    assert not (slides["train"] | slides["test"]) & {row["slide"] for row in paired}
    for split in slides:
        assert len({row["scanner"] for row in labels if row["split"] == split}) == 4
    assert set(Counter((row["slide"], row["scanner"]) for row in labels).values()) == {TILES // SLIDES}


def test_pairs_are_registered(tile_set: Path) -> None:
    fields: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for row in _table(tile_set / "paired.csv"):
        image = _image(tile_set / row["path"]).astype(np.float64)
        fields.setdefault((row["slide"], row["x"], row["y"]), []).append(-np.log10((image + 1) / 256).sum(-1).ravel())
    assert len(fields) == FIELDS
    for (slide, x, y), densities in fields.items():
        assert len(densities) == 4
        assert np.corrcoef(densities).min() > 0.9, (slide, x, y)
    first = [densities[0] for densities in fields.values()]
    assert np.abs(np.corrcoef(first) - np.eye(FIELDS)).max() < 0.6, "different fields are different"


def _accuracy(features: np.ndarray, rows: list[dict[str, str]]) -> float:
    label = np.array([row["label"] for row in rows])
    train = np.array([row["split"] == "train" for row in rows])
    scaled = StandardScaler().fit(features[train]).transform(features)
    probe = LogisticRegression(max_iter=2000).fit(scaled[train], label[train])
    return float(balanced_accuracy_score(label[~train], probe.predict(scaled[~train])))


def _morphology(image_HWC: np.ndarray) -> list[float]:
    """Contrast of density at five scales, and how parallel the edges are: blind to the mean colour."""
    density_HW = -np.log10((image_HWC[..., 0].astype(np.float64) + 1) / 256)
    density_HW = (density_HW - density_HW.mean()) / density_HW.std()
    scales = [gaussian_filter(density_HW, sigma) for sigma in (0.7, 1.4, 2.8, 5.6, 11.2)]
    bands = [float(np.log((a - b).std())) for a, b in pairwise(scales)]
    gy, gx = np.gradient(scales[1])
    xx, yy, xy = ((a * b).mean() for a, b in ((gx, gx), (gy, gy), (gx, gy)))
    coherence = np.hypot(xx - yy, 2 * xy) / (xx + yy)
    skew = float((density_HW**3).mean())
    return [*bands, float(coherence), skew]


def test_classes_need_morphology_not_colour(tile_set: Path) -> None:
    rows = _table(tile_set / "labels.csv")
    images = [_image(tile_set / row["path"]) for row in rows]
    colour = _accuracy(np.array([image.mean((0, 1)) for image in images]), rows)
    morphology = _accuracy(np.array([_morphology(image) for image in images]), rows)
    assert colour < 0.6, "chance is 0.25"
    assert morphology > colour + 0.1


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    arguments = {"tiles": 12, "slides": 3, "fields": 2, "tile_px": 48}
    seen: list[tuple[int, int]] = []
    write_tile_set(tmp_path / "a", **arguments, seed=9, progress=lambda done, total: seen.append((done, total)))
    write_tile_set(tmp_path / "b", **arguments, seed=9, workers=2)
    write_tile_set(tmp_path / "c", **arguments, seed=10)
    first = _files(tmp_path / "a")
    assert first == _files(tmp_path / "b")
    other = _files(tmp_path / "c")
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))
    assert [done for done, _ in seen] == [*range(1, 13), 16, 20]
    assert {total for _, total in seen} == {20}


def test_an_interrupted_set_is_absent(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tile_set(tmp_path / "set", tiles=12, slides=3, fields=0, tile_px=32, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(tiles_module, "draw_tile", None)  # refused before anything is drawn
    with pytest.raises(DataError, match="not empty"):
        write_tile_set(tmp_path, tiles=12, slides=3)
    with pytest.raises(DataError, match="not empty"):
        write_tile_set(tmp_path / "thesis.txt", tiles=12, slides=3)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tiles": 12, "slides": 2}, "too few slides"),
        ({"tiles": 11, "slides": 3}, "12 or more with 3 slides"),
        ({"tiles": 12, "slides": 3, "fields": -1}, "fields -1"),
        ({"tiles": 12, "slides": 3, "workers": 0}, "workers 0"),
        ({"tiles": 12, "slides": 3, "stains": ()}, "at least one"),
        ({"tiles": 12, "slides": 3, "stains": (STAINS["gill"],) * 2}, "gill-aurora"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_tile_set(tmp_path / "set", **arguments)  # type: ignore[arg-type]


def test_the_scanner_column_names_stain_and_scanner(tmp_path: Path) -> None:
    write_tile_set(
        tmp_path / "set", tiles=12, slides=3, fields=2, tile_px=32,
        stains=[STAINS["gill"]], scanners=[SCANNERS["dusk"], SCANNERS["boreas"]],
    )  # fmt: skip
    assert {row["scanner"] for row in _table(tmp_path / "set" / "paired.csv")} == {"gill-dusk", "gill-boreas"}
    assert (tmp_path / "set" / "paired" / "gill-dusk").is_dir()
