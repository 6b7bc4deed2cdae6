"""What `--tiles` may name, and what is refused since it could mean two things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histill.errors import ConfigError, DataError
from histill.tiles.images import ImageFolder
from histill.tiles.open import open_tiles


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(folder / f"{number}.png")
    return folder


def test_a_folder_of_images(pictures: Path) -> None:
    source = open_tiles(pictures)
    assert isinstance(source, ImageFolder)
    assert len(source) == 3


@pytest.mark.parametrize("option", [{"hold_out_slides": ("s1",)}, {"sampling": "slide-balanced"}])
def test_images_know_no_slides(option: dict[str, object], pictures: Path) -> None:
    with pytest.raises(ConfigError, match="knows no slides"):
        open_tiles(pictures, **option)  # type: ignore[arg-type]


def test_pictures_beside_slides_are_refused(pictures: Path) -> None:
    (pictures / "deep").mkdir()
    (pictures / "deep" / "a.svs").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pictures and slides[^$]*a\.svs"):
        open_tiles(pictures)


def test_the_folder_around_a_set_is_refused(pictures: Path) -> None:
    (pictures / "set").mkdir()
    (pictures / "set" / "tileset.json").write_text("{}")
    with pytest.raises(ConfigError, match="tile set inside"):
        open_tiles(pictures)


def test_slides_need_a_place_for_their_index(shared_data: Path) -> None:
    with pytest.raises(ConfigError, match="these are slides"):
        open_tiles(shared_data / "slides" / "CMU-1-Small-Region.svs")


def test_a_slide_that_fails_is_named(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"TCGA[^$]*--mpp-override"):
        open_tiles(shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", index_folder=tmp_path / "index")
