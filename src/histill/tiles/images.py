"""A folder of tile images, optionally with a table of labels, as a map-style source."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from histill.errors import DataError, nearest
from histill.tiles.order import tile_at

__all__ = ["ImageFolder", "UnreadableTileError", "decode", "image_px", "paths_of_table", "read_table"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_JPEG_SUFFIXES = (".jpg", ".jpeg")


class UnreadableTileError(DataError):
    """One tile's file is missing or damaged. It is counted and named; another tile never takes its place."""


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode one image file to RGB.

    JPEG goes through libjpeg-turbo (about twice as fast as Pillow); a JPEG that is not RGB, YCbCr or grey, and
    every other format, through Pillow.

    Parameters
    ----------
    data
        The file's bytes.
    name
        Its name, for the suffix and the error.

    Returns
    -------
    ndarray
        uint8, shape (height, width, 3).

    Raises
    ------
    UnreadableTileError
        When the file is truncated or not an image; a partly decoded picture is never returned.
    """
    try:
        if name.lower().endswith(_JPEG_SUFFIXES) and simplejpeg.decode_jpeg_header(data)[2] != "CMYK":
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True))
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableTileError("a tile cannot be decoded", where=name, got=str(error) or repr(error)) from None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any picture as 8-bit RGB: 16-bit grey is divided by 257, what shines through is white, as on a slide."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey_HW = np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no known range; 8 or 16 bits are needed")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def image_px(path: Path) -> tuple[int, int]:
    """(height, width) in pixels from an image file's header alone.

    Raises
    ------
    UnreadableTileError
        When the file cannot be read, or is not an image.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableTileError("a tile cannot be opened", where=path, got=error) from None


def read_table(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV with a header; each row is a dict of text.

    Raises
    ------
    DataError
        When the file is missing, empty, not UTF-8, ragged, or lacks one of the ``needed`` columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            missing = [column for column in needed if column not in columns]
            if missing:
                raise DataError(
                    f"a table lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
                    where=path,
                    got=", ".join(columns) or "no columns",
                    allowed=f"at least {', '.join(needed)}",
                    remedy=nearest(missing[0], columns),
                )
            rows = list(reader)
    except FileNotFoundError:
        raise DataError("this table does not exist", where=path, remedy="check the path") from None
    except UnicodeDecodeError as error:
        raise DataError("this table is not UTF-8 text", where=path, got=error) from None
    except (OSError, csv.Error) as error:
        raise DataError("this table cannot be read", where=path, got=error, allowed="CSV in UTF-8") from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise DataError("a row has another number of fields than the header", where=f"{path}, line {number}")
    if not rows:
        raise DataError("this table has no rows", where=path)
    return rows


def paths_of_table(table: Path, rows: Iterable[dict[str, str]], root: Path) -> list[str]:
    """POSIX paths relative to ``root`` of a table's column ``path`` (relative to the table's folder, or absolute)."""
    folder, base = os.path.realpath(table.parent), os.path.realpath(root)
    return [Path(os.path.relpath(os.path.join(folder, row["path"]), base)).as_posix() for row in rows]  # noqa: PTH118


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Tiles as image files below one folder, in the order of their names.

    Built by :meth:`scan`; ``len(folder)`` tiles, ``folder.read(index)`` decodes one.
    """

    root: Path
    """The folder that ``paths`` are relative to."""
    paths: tuple[str, ...]
    """POSIX paths of the tiles, sorted."""
    held_out: int = 0
    """Tiles below the folder that were left out since a table marks them as test tiles."""

    @classmethod
    def scan(cls, root: Path, *, table: Path | None = None, hold_out: Iterable[str] = ()) -> ImageFolder:
        """Find the images below a folder, or those that a table names.

        Parameters
        ----------
        root
            A folder of images, at any depth. Hidden files and folders are passed over.
        table
            A CSV with a column ``path``, relative to the table's own folder; only its tiles are taken.
        hold_out
            Paths relative to ``root`` that are left out (for instance the test split of a labelled table).

        Raises
        ------
        DataError
            When the folder is missing or holds no image.
        """
        if not root.is_dir():
            what = "the tiles must be a folder" if root.exists() else "the folder of tiles does not exist"
            raise DataError(what, where=root, remedy="give --tiles the folder that holds the images")
        if table is None:
            found = sorted(_images_below(root))
            where = root
        else:
            found = sorted(set(paths_of_table(table, read_table(table, ["path"]), root)))
            where = table
        left_out = frozenset(hold_out)
        paths = tuple(path for path in found if path not in left_out)
        if not paths:
            raise DataError(
                "there are no tiles to learn from",
                where=where,
                got=f"{len(found)} images, {len(found) - len(paths)} of them held out",
                allowed=f"files that end in {', '.join(IMAGE_SUFFIXES)}",
            )
        return cls(root, paths, len(found) - len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Decode one tile: uint8, shape (height, width, 3); UnreadableTileError when that fails."""
        path = self.root / self.paths[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnreadableTileError("a tile cannot be read", where=path, got=error.strerror or error) from None
        return decode(data, self.paths[index])

    def name(self, index: int) -> str:
        """What a message calls a tile: its path below the folder."""
        return self.paths[index]

    def tile_at(self, positions_B: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Which tile stands at each position of the endless stream, int64 (B,): all of them shuffled, every epoch."""
        return tile_at(positions_B, len(self), seed)

    def median_side_px(self, sample: int = 256) -> int:
        """Median over evenly spaced tiles of the shorter side, in pixels, from the headers of the files.

        Raises
        ------
        DataError
            Not one of these tiles can be opened.
        """
        step = max(1, len(self) // sample)
        sides = []
        for index in range(0, len(self), step):
            try:
                sides.append(min(image_px(self.root / self.paths[index])))
            except UnreadableTileError:
                continue  # counted and named when its turn comes in training
        if not sides:
            raise DataError(
                "none of the tiles can be opened", where=self.root, got=f"{len(range(0, len(self), step))} tried"
            )
        return int(np.median(sides))

    def fingerprint(self) -> str:
        """Hex SHA-256 over the tiles' names and sizes in bytes: what a run's order depends on."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                size = (self.root / path).stat().st_size
            except OSError:
                size = -1
            digest.update(f"{path}\0{size}\n".encode())
        return digest.hexdigest()


def _images_below(root: Path) -> list[str]:
    found: list[str] = []
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was there already, such as a loop
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(
                "the name of a tile is not UTF-8", where=root, got=repr(os.fsencode(path)), remedy="rename the file"
            ) from None
    return found
