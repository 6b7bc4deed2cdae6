from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openslide
import pytest
import tifffile
from matplotlib.path import Path as Outline
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter, label

from histill.errors import ConfigError, DataError
from histill.synthetic import KINDS, SCANNERS, STAINS, ScannerSpec, draw_tile
from histill.synthetic.layout import TissuePlan, annotation, lay_out
from histill.synthetic.section import _turned, _weights, _window, scan
from histill.synthetic.slides import (
    slide_set_truths,
    slide_truth,
    write_ruler_slide,
    write_slide,
    write_slide_set,
)

WIDTH, HEIGHT, SEED = 1010, 830, 5


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_slide(path, width_px=WIDTH, height_px=HEIGHT, seed=SEED, levels=(1, 4, 6))
    return path


def _read(path: Path, level: int = 0) -> np.ndarray:
    with openslide.OpenSlide(path) as source:
        return np.asarray(source.read_region((0, 0), level, source.level_dimensions[level]).convert("RGB"))


# ------------------------------------------------------------------ the file


def test_the_file_names_no_time_and_no_tool(slide: Path) -> None:
    with tifffile.TiffFile(slide) as tif:
        names = {tag.name for page in tif.pages for tag in page.tags}  # type: ignore[union-attr]
        texts = [page.description for page in tif.pages]  # type: ignore[union-attr]
    assert not names & {"DateTime", "Software", "HostComputer", "Artist"}
    assert (
        texts[0]
        == "Aperio Image Library v12.0.15\r\n1010x830 [0,0 1010x830] (240x240) JPEG/YCC Q=90|AppMag = 20|MPP = 0.5"
    )
    assert texts[3].startswith("Aperio Image Library v12.0.15\r\n1010x830 [0,0 1010x830] (240x240) -> 168x138 ")


def test_same_arguments_same_bytes(slide: Path, tmp_path: Path) -> None:
    for name, seed in (("b", SEED), ("c", SEED + 1)):
        write_slide(tmp_path / f"{name}.svs", width_px=WIDTH, height_px=HEIGHT, seed=seed, levels=(1, 4, 6))
    assert (tmp_path / "b.svs").read_bytes() == slide.read_bytes()
    assert (tmp_path / "b.geojson").read_bytes() == slide.with_suffix(".geojson").read_bytes()
    assert (tmp_path / "c.svs").read_bytes() != slide.read_bytes()
    assert (tmp_path / "c.geojson").read_bytes() != slide.with_suffix(".geojson").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.geojson", "b.svs", "c.geojson", "c.svs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mpp": 0.01}, "no scale"),
        ({"width_px": 200}, "too small"),
        ({"levels": (2, 4)}, "begin with 1"),
        ({"levels": (1, 4, 4)}, "begin with 1"),
        ({"levels": (1, 512)}, "empty"),
        ({"tile_px": 100}, "multiples of 16"),
        ({"jpeg_quality": 0}, "quality"),
        ({"compression": "lzw"}, "unknown compression"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_slide(tmp_path / "a.svs", **{"width_px": 300, "height_px": 300, **arguments})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ what is drawn


def test_tissue_is_where_the_truth_says_and_glass_is_the_scanners(slide: Path) -> None:
    truth = slide_truth(width_px=WIDTH, height_px=HEIGHT, seed=SEED)
    assert truth.cell_px == 16
    image = _read(slide).astype(np.float64)
    rows, columns = HEIGHT // 16, WIDTH // 16
    cells = image[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16, 3).mean((1, 3))
    tissue = truth.grid_HW[:rows, :columns] >= 0
    assert 0.25 < tissue.mean() < 0.7
    white = 255 * np.array(SCANNERS["aurora"].white)
    far_glass = binary_erosion(~tissue, iterations=2, border_value=1)
    assert np.abs(cells[far_glass] - white).max() < 3
    assert not far_glass[binary_erosion(tissue)].any()
    inside = binary_erosion(tissue)
    pink = (cells.max(-1) - cells.min(-1) > 15)[inside]
    assert pink.mean() > 0.8, "the rest is fat, clefts and lumina"


def _coherence(image_HWC: np.ndarray) -> float:
    """How parallel the edges are within 16 pixels, from 0 to 1."""
    gy, gx = np.gradient(gaussian_filter(image_HWC[..., 0].astype(np.float64), 1.0))
    xx, yy, xy = (gaussian_filter(a * b, 8.0) for a, b in ((gx, gx), (gy, gy), (gx, gy)))
    return float((np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-6)).mean())


def test_regions_hold_their_kind_of_tissue(tmp_path: Path) -> None:
    plan = TissuePlan(kinds=("stroma", "lymphoid"))
    truth = write_slide(tmp_path / "a.svs", width_px=1500, height_px=1200, seed=2, tissue=plan)
    image = _read(tmp_path / "a.svs")
    found: dict[str | None, list[float]] = {"stroma": [], "lymphoid": [], None: []}
    for y in range(0, 1200 - 96, 96):
        for x in range(0, 1500 - 96, 96):
            found[truth.kind_of(x, y, 96, share=1.0)].append(_coherence(image[y : y + 96, x : x + 96]))
    fibrous, round_ = np.array(found["stroma"]), np.array(found["lymphoid"])
    assert min(len(fibrous), len(round_)) > 10
    assert (fibrous[:, None] > round_[None]).mean() > 0.95


def test_stain_and_scanner_change_the_colour_only(slide: Path, tmp_path: Path) -> None:
    write_slide(
        tmp_path / "b.svs", width_px=WIDTH, height_px=HEIGHT, seed=SEED, levels=(1, 4, 6),
        stain=STAINS["mayer"], scanner=SCANNERS["cinder"],
    )  # fmt: skip
    first, second = (_read(path).astype(np.float64) for path in (slide, tmp_path / "b.svs"))
    assert np.abs(first.mean((0, 1)) - second.mean((0, 1))).max() > 5
    density = [-np.log((image[200:600, 300:700] + 1) / 256).sum(-1).ravel() for image in (first, second)]
    assert np.corrcoef(density)[0, 1] > 0.9
    assert (tmp_path / "b.geojson").read_bytes() == slide.with_suffix(".geojson").read_bytes()


def test_a_finer_scale_shows_the_same_section_larger(tmp_path: Path) -> None:
    coarse = write_slide(tmp_path / "a.svs", width_px=500, height_px=400, mpp=0.5, seed=4, scanner=SCANNERS["ideal"])
    fine = write_slide(tmp_path / "b.svs", width_px=1000, height_px=800, mpp=0.25, seed=4, scanner=SCANNERS["ideal"])
    assert (coarse.grid_HW == fine.grid_HW).all()
    assert fine.cell_px == 2 * coarse.cell_px
    halved = np.asarray(Image.fromarray(_read(tmp_path / "b.svs")).reduce(2)).astype(np.float64)
    plain = _read(tmp_path / "a.svs").astype(np.float64)
    assert np.abs(halved - plain).mean() < 4
    for axis in (0, 1):
        left, right = (((np.roll(halved, step, axis=axis) - plain) ** 2).mean() for step in (-1, 1))
        middle = ((halved - plain) ** 2).mean()
        assert abs(left - right) / (2 * (left + right - 2 * middle)) < 0.03, "pixels from one to the other"


@pytest.mark.parametrize("mpp", [0.25, 0.265, 0.5, 0.8])
def test_bands_leave_no_seam(monkeypatch: pytest.MonkeyPatch, mpp: float) -> None:
    scanner = ScannerSpec(name="soft", blur_px=1.0)
    rng = np.random.default_rng(1)
    _, truth = lay_out(width_px=300, height_px=350, mpp=mpp, seed=4)
    drawing = (math.ceil(350 * mpp / 0.5), math.ceil(300 * mpp / 0.5), 3)
    section = np.abs(gaussian_filter(rng.standard_normal(drawing).astype(np.float32), (1.0, 1.0, 0)))
    whole = scan(section, truth, mpp, STAINS["harris"], scanner, 1).astype(int)
    monkeypatch.setattr("histill.synthetic.section._BAND_PX", 100)
    bands = scan(section, truth, mpp, STAINS["harris"], scanner, 1).astype(int)
    assert whole.std() > 10
    assert np.abs(whole - bands).max() <= 1


def test_fields_fade_into_one_another_without_gaps() -> None:
    layout, _ = lay_out(width_px=1200, height_px=900, mpp=0.5, seed=1)
    everywhere = dataclasses.replace(layout, depth_HW=np.full_like(layout.depth_HW, 1000))
    depth = Image.fromarray(everywhere.depth_HW)
    total = np.zeros((layout.height, layout.width))
    for site, place in enumerate(layout.sites_N2):
        near = np.argsort(((layout.sites_N2 - place) ** 2).sum(1))[1:10]
        window = _window(everywhere, site)
        if window is not None:
            part, weight = _weights(everywhere, depth, site, near, window)
            total[part] += weight
    assert np.abs(total - 1).max() < 0.06
    assert np.abs(total - 1).mean() < 0.002


def test_a_field_can_lie_in_eight_ways() -> None:
    square = np.random.default_rng(0).random((5, 5, 3)).astype(np.float32)
    ways = [_turned(square, turn) for turn in range(8)]
    assert len({way.tobytes() for way in ways}) == 8
    for way in ways:
        assert np.array_equal(np.sort(way[..., 0], axis=None), np.sort(square[..., 0], axis=None))


def test_a_large_slide_draws_no_more_than_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def count(kind: str, *args: Any) -> Any:
        drawn.append(kind)
        return draw_tile(kind, *args)

    monkeypatch.setattr("histill.synthetic.section.draw_tile", count)
    monkeypatch.setattr("histill.synthetic.section._FIELDS", 2)
    write_slide(tmp_path / "a.svs", width_px=1000, height_px=900, seed=3)
    assert sorted(drawn) == sorted(KINDS * 2)


# ------------------------------------------------------------------ the annotation


def _filled(rings: list[Any], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Even-odd rule, by matplotlib."""
    points = np.stack([xs.ravel(), ys.ravel()], axis=1)
    inside = np.zeros(len(points), dtype=bool)
    for ring in rings:
        inside ^= Outline(np.asarray(ring, dtype=np.float64)).contains_points(points)
    return inside.reshape(xs.shape)


def test_the_annotation_says_what_the_truth_says(slide: Path) -> None:
    truth = slide_truth(width_px=WIDTH, height_px=HEIGHT, seed=SEED)
    collection = json.loads(slide.with_suffix(".geojson").read_text())
    assert collection == json.loads(json.dumps(annotation(truth)))
    assert collection["type"] == "FeatureCollection"
    regions = sum(label(truth.grid_HW == index)[1] for index in range(len(truth.kinds)))
    assert len(collection["features"]) == regions >= 4
    rng = np.random.default_rng(0)
    xs, ys = rng.uniform(0, WIDTH, 2000), rng.uniform(0, HEIGHT, 2000)
    told = np.full(2000, None, dtype=object)
    for feature in collection["features"]:
        assert feature["properties"]["objectType"] == "annotation"
        inside = _filled(feature["geometry"]["coordinates"], xs, ys)
        assert (told[inside] == None).all(), "regions do not overlap"  # noqa: E711
        told[inside] = feature["properties"]["classification"]["name"]
    assert list(told) == [truth.kind_at(x, y) for x, y in zip(xs, ys, strict=True)]
    assert set(told) == {None, *KINDS}


# ------------------------------------------------------------------ the ruler


def _line_centres(profile: np.ndarray) -> np.ndarray:
    """Centres of dark lines in pixels from the left side: centroids of darkness."""
    dark = np.clip(np.median(profile) - profile - 8, 0, None)
    lines, count = label(dark > 0)
    centres = [np.average(np.arange(len(dark)) + 0.5, weights=dark * (lines == n)) for n in range(1, count + 1)]
    return np.array(centres)


@pytest.mark.parametrize(
    ("mpp", "compression", "level"), [(0.25, "jpeg", 0), (0.265, "jpeg", 0), (0.265, "jpeg2000", 1), (0.5, "jpeg", 0)]
)
def test_lines_of_a_ruler_lie_at_multiples_of_its_period(
    tmp_path: Path, mpp: float, compression: Literal["jpeg", "jpeg2000"], level: int
) -> None:
    write_ruler_slide(
        tmp_path / "r.svs", mpp=mpp, width_px=1500, height_px=1300, period_um=50.0, line_um=2.0, levels=(1, 2),
        compression=compression,
    )  # fmt: skip
    image = _read(tmp_path / "r.svs", level).astype(np.float64)[..., 1]
    scale = mpp * 2**level
    margin = 65 // 2**level + 2
    for axis, whole in enumerate((1500, 1300)):
        profile = np.median(image, axis=axis)[margin : whole // 2**level - margin]
        at_um = (_line_centres(profile) + margin) * scale
        inside = [
            k * 50.0
            for k in range(1, 100)
            if margin * scale < k * 50.0 - 3 and k * 50.0 + 3 < whole * mpp - margin * scale
        ]
        assert len(inside) >= 4
        at_um = at_um[[np.abs(at_um - wanted).argmin() for wanted in inside]]
        assert np.abs(at_um - inside).max() < 0.05 * scale + 0.01
        assert (at_um[-1] - at_um[0]) / (inside[-1] - inside[0]) == pytest.approx(1, abs=2e-4)


def test_a_ruler_has_ink_for_its_lines_width(tmp_path: Path) -> None:
    write_ruler_slide(tmp_path / "r.svs", mpp=0.265, width_px=1200, height_px=1200, period_um=40.0, line_um=3.0)
    with openslide.OpenSlide(tmp_path / "r.svs") as source:
        assert float(source.properties["openslide.mpp-x"]) == 0.265
        between = round(60.0 / 0.265)  # halfway between two horizontal lines
        row = np.asarray(source.read_region((0, between - 20), 0, (1200, 40)).convert("RGB")).astype(np.float64)
    green = row[..., 1].mean(0)
    assert np.abs(green[:60] - 244).mean() < 2, "the margin is glass"
    period = slice(round(100.0 / 0.265), round(100.0 / 0.265) + 604)  # 604 pixels are 4.0015 periods
    ink = (190 - green[period]).sum() / (190 - 48) * 0.265
    assert ink == pytest.approx(4 * 3.0, rel=0.03)
    with pytest.raises(ConfigError, match="narrower"):
        write_ruler_slide(tmp_path / "r.svs", mpp=0.5, width_px=500, height_px=500, period_um=2.0)


# ------------------------------------------------------------------ the set


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_set_has_slides_labels_and_pairs_whatever_the_workers(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"slides": 4, "paired": 1, "width_px": 300, "height_px": 280, "seed": 3}
    seen: list[tuple[int, int]] = []
    write_slide_set(tmp_path / "a", **arguments, progress=lambda done, total: seen.append((done, total)))
    write_slide_set(tmp_path / "b", **arguments, workers=2)
    files = _files(tmp_path / "a")
    assert files == _files(tmp_path / "b")
    assert seen == [(1, 8), (2, 8), (3, 8), (4, 8), (8, 8)]
    with (tmp_path / "a" / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("slide", "stain", "scanner", "split")
    names = [row["slide"] for row in rows]
    assert sorted(files) == sorted(["labels.csv", *(f"{n}.svs" for n in names), *(f"{n}.geojson" for n in names)])
    assert [row["split"] for row in rows] == ["train", "train", "test", "train", *["paired"] * 4]
    assert {(row["stain"], row["scanner"]) for row in rows[4:]} == {
        (stain, scanner) for stain in ("harris", "mayer") for scanner in ("aurora", "cinder")
    }
    truths = slide_set_truths(**arguments)
    assert list(truths) == names
    for name, truth in truths.items():
        assert json.loads(files[f"{name}.geojson"]) == json.loads(json.dumps(annotation(truth)))
    assert len({files[f"{name}.geojson"] for name in names}) == 5
    for row in rows:
        white = 255 * np.array(SCANNERS[row["scanner"]].white)
        assert np.abs(_read(tmp_path / "a" / f"{row['slide']}.svs")[:6, :6].mean((0, 1)) - white).max() < 4


def test_every_section_of_a_set_is_another_one() -> None:
    truths = slide_set_truths(slides=5, paired=2, width_px=700, height_px=600, seed=1)
    assert list(truths)[5:7] == ["pair-000_harris-aurora", "pair-000_harris-cinder"]
    assert len(truths) == 5 + 2 * 4
    assert len({truth.grid_HW.tobytes() for truth in truths.values()}) == 5 + 2
    other = slide_set_truths(slides=5, paired=2, width_px=700, height_px=600, seed=2)
    assert not {truth.grid_HW.tobytes() for truth in truths.values()} & {t.grid_HW.tobytes() for t in other.values()}


def test_an_interrupted_set_is_absent(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_slide_set(tmp_path / "set", slides=3, width_px=260, height_px=260, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slides": 2}, "slides 2"),
        ({"slides": 3, "paired": -1}, "paired -1"),
        ({"slides": 3, "workers": 0}, "workers 0"),
        ({"slides": 3, "width_px": 100}, "too small"),
        ({"slides": 3, "stains": (STAINS["gill"],) * 2}, "gill-aurora"),
    ],
)
def test_wrong_sets_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_slide_set(tmp_path / "set", **arguments)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="not empty"):
        write_slide_set(tmp_path, slides=3)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ------------------------------------------------------------------ damage, for the tests of readers


def damage_block(path: Path, level: int, column: int, row: int, how: Literal["zero", "truncate", "missing"]) -> None:
    """Spoil one stored tile of one level: its bytes become 0, or its second half does not count, or it is not there."""
    with tifffile.TiffFile(path, mode="r+") as tif:
        page: Any = [page for page in tif.pages if page.is_tiled][level]  # type: ignore[union-attr]
        index = row * -(-page.imagewidth // page.tilewidth) + column
        offsets, counts = list(page.dataoffsets), list(page.databytecounts)
        if how == "zero":
            tif.filehandle.seek(offsets[index])
            tif.filehandle.write(bytes(counts[index]))
            return
        counts[index] = counts[index] // 2 if how == "truncate" else 0
        offsets[index] = offsets[index] if how == "truncate" else 0
        page.tags["TileOffsets"].overwrite(offsets)
        page.tags["TileByteCounts"].overwrite(counts)


@pytest.mark.parametrize("how", ["zero", "truncate", "missing"])
def test_damage_hits_one_block_only(slide: Path, tmp_path: Path, how: Literal["zero", "truncate", "missing"]) -> None:
    copy = Path(shutil.copy(slide, tmp_path / "copy.svs"))
    damage_block(copy, 0, 1, 2, how)
    with tifffile.TiffFile(slide) as sound, tifffile.TiffFile(copy) as spoilt:
        for number in range(4):
            pages: list[Any] = [tif.pages[number] for tif in (sound, spoilt)]
            segments = []
            for page in pages:
                handle, parts = page.parent.filehandle, []
                for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
                    handle.seek(offset)
                    parts.append(handle.read(size))
                segments.append(parts)
            differing = [index for index, (a, b) in enumerate(zip(*segments, strict=True)) if a != b]
            assert differing == ([2 * 5 + 1] if number == 0 else [])
    if how == "zero":
        with openslide.OpenSlide(copy) as source:
            assert source.read_region((0, 0), 0, (240, 240)).size == (240, 240)
        with openslide.OpenSlide(copy) as source, pytest.raises(openslide.OpenSlideError):
            source.read_region((240, 480), 0, (240, 240))
