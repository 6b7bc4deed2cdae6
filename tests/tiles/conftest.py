"""What the tests of `histill tile` share: real slides, the command, and how a set is looked at."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from histill.cli import main


@pytest.fixture(scope="session")
def slides(shared_data: Path) -> Path:
    """Folder of real slides."""
    return shared_data / "slides"


@pytest.fixture(scope="session")
def tile() -> Callable[..., int]:
    """Run `histill tile` with one worker; gives its exit status."""
    return lambda *argv: main(["tile", *map(str, argv), "--workers", "1"])


@pytest.fixture(scope="session")
def small_set(slides: Path, tile: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of a small real slide; not to be changed."""
    out = tmp_path_factory.mktemp("small") / "set"
    assert tile(slides / "CMU-1-Small-Region.svs", "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def slide_rows() -> Callable[..., dict[str, dict[str, str]]]:
    """Read a table of slides: slide -> its row."""

    def read(folder: Path, name: str = "slides.csv") -> dict[str, dict[str, str]]:
        with (folder / name).open(newline="") as file:
            return {row["slide"]: row for row in csv.DictReader(file)}

    return read


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, str]]:
    """File -> hash of all that a set is; the seconds that a slide took are the only thing that may differ."""

    def hashes(folder: Path) -> dict[str, str]:
        found = {}
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            if path.parent.name == "parts" and path.suffix == ".json":
                data = json.dumps(json.loads(data) | {"seconds": 0}).encode()
            if path.name == "slides.csv":
                rows = list(csv.DictReader(data.decode().splitlines()))
                data = json.dumps([row | {"seconds": 0} for row in rows]).encode()
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
        return found

    return hashes


@pytest.fixture(scope="session")
def damaged_copy() -> Callable[[Path, Path, str], tuple[int, int]]:
    """Damage one block in the middle of level 0 of a copy; gives the level-0 pixel at its middle."""

    def damage(slide: Path, target: Path, how: str) -> tuple[int, int]:
        import tifffile

        shutil.copyfile(slide, target)
        with tifffile.TiffFile(target) as file:
            page = file.pages[0]
            columns = -(-page.imagewidth // page.tilewidth)
            column, row = 4, 5
            number = row * columns + column
            offset, count = page.dataoffsets[number], page.databytecounts[number]
            middle = (column * page.tilewidth + page.tilewidth // 2, row * page.tilelength + page.tilelength // 2)
        with target.open("r+b") as file:
            file.seek(offset if how == "zero" else offset + count // 2)
            file.write(bytes(count if how == "zero" else count - count // 2))
        return middle

    return damage
