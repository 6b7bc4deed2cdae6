"""Open a slide with the reader that is right for it: the fast one where it gives the same pixels, else OpenSlide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from histill.errors import nearest
from histill.slides.openslide_reader import EXACT_PX, OpenSlideReader
from histill.slides.slide import Slide, SlideError, UnreadableRegionError
from histill.slides.tiff_layout import tiling_remedy
from histill.slides.tiff_reader import TiffReader

__all__ = ["open_slide"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PICTURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"BM": "a bitmap",
}
_FAST_VENDORS = ("aperio", "generic-tiff")
_AGREEING, _SAMPLES, _SAMPLE_PX = 4, 24, 1_500_000
_JPEG2000_LEVELS = 2
_PIECE_PX = 4096  # OpenSlide reads a larger region in pieces of this side, and interpolates from the second on


def open_slide(path: Path, *, reader: Literal["auto", "openslide", "tiff"] = "auto") -> Slide:
    """Open a slide.

    Parameters
    ----------
    path
        The slide's file; for a DICOM series any of its files.
    reader
        ``auto`` takes the fast TIFF reader for a tiled TIFF or Aperio SVS when sampled blocks of each level have the
        same pixels as OpenSlide's (up to 2 of 255 apart for JPEG2000), and for an OME-TIFF of which OpenSlide sees no
        pyramid or nothing at all; OpenSlide otherwise. The other two take that reader, unchecked: a process that
        opens a slide again can name the reader that ``auto`` found (``slide.reader``).

    Returns
    -------
    Slide
        The open slide; its ``reader`` says which one was taken.

    Raises
    ------
    SlideError
        When the file is missing, empty, no slide, not tiled, or none of its pixels can be read; it says what to do.
    """
    path = Path(path)
    magic = _check_file(path)
    if reader == "openslide":
        return OpenSlideReader(path)
    if reader == "tiff":
        return TiffReader(path)
    fast, fast_error = None, None
    if magic in _TIFF_MAGIC:
        try:
            fast = TiffReader(path)
        except SlideError as error:
            fast_error = error
    try:
        slow = OpenSlideReader(path)
    except SlideError as slow_error:
        return _without_openslide(path, magic, fast, fast_error, slow_error)
    if fast is not None:
        if _may_be_fast(fast, slow) and _agree(fast, slow):
            slow.close()
            return fast
        fast.close()
    if not _any_pixels(slow):
        slow.close()
        raise _all_damaged(path)
    return slow


def _check_file(path: Path) -> bytes:
    """Give the first four bytes of a file that might be a slide."""
    if path.is_dir():
        raise SlideError(
            "this is a folder, not a slide",
            where=path,
            remedy="give one of its files (of a DICOM series any .dcm file), or search it with find_slides",
        )
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        remedy = nearest(path.name, beside) or "check the path"
        raise SlideError("this slide does not exist", where=path, remedy=remedy) from None
    except OSError as error:
        raise SlideError("this slide cannot be read", where=path, got=error.strerror or error) from None
    if not magic:
        raise SlideError("this file is empty", where=path, remedy="copy it again from its source")
    for start, kind in _PICTURES.items():
        if magic.startswith(start):
            raise SlideError(
                f"this is {kind}, not a slide", where=path, got=f"bytes {magic!r}", remedy=tiling_remedy(path)
            )
    return magic


def _without_openslide(
    path: Path, magic: bytes, fast: TiffReader | None, fast_error: SlideError | None, slow_error: SlideError
) -> Slide:
    """Settle a file that OpenSlide refuses."""
    if fast is not None and fast.vendor == "ome-tiff":
        if _any_pixels(fast):
            return fast
        fast.close()
        raise _all_damaged(path)
    if fast is not None:
        fast.close()
        raise SlideError(
            "OpenSlide refuses this TIFF, so that its pixels cannot be checked",
            where=path,
            got=slow_error.what,
            remedy=tiling_remedy(path) + "; or take reader='tiff' if you know that its tiles are plain RGB",
        )
    if fast_error is not None:
        raise fast_error
    raise SlideError(
        slow_error.what,
        where=path,
        got=f"a file that begins with {magic!r}",
        allowed="a format that OpenSlide knows, or a tiled TIFF or OME-TIFF",
        remedy="check that it is the scanner's own file and copy it again from its source; it may be damaged",
    )


def _all_damaged(path: Path) -> SlideError:
    return SlideError(
        "none of the pixels of this slide can be read",
        where=path,
        remedy="copy it again from its source; its structure is there, its image data are damaged",
    )


def _sizes(slide: Slide) -> list[tuple[int, int]]:
    return [(level.width, level.height) for level in slide.levels]


def _may_be_fast(fast: TiffReader, slow: OpenSlideReader) -> bool:
    """Whether both see the same levels; of an OME-TIFF OpenSlide sees the full image, not the pyramid."""
    if slow.vendor not in _FAST_VENDORS:
        return False
    fast_sizes, slow_sizes = _sizes(fast), _sizes(slow)
    return fast_sizes == slow_sizes or (fast.vendor == "ome-tiff" and fast_sizes[0] == slow_sizes[0])


def _agree(fast: TiffReader, slow: OpenSlideReader) -> bool:
    """Whether sampled blocks of each level that both see have the same pixels in both."""
    levels = zip(_sizes(fast), _sizes(slow), strict=False)
    return all(_level_agrees(fast, slow, level) for level, (ours, theirs) in enumerate(levels) if ours == theirs)


def _level_agrees(fast: TiffReader, slow: OpenSlideReader, level: int) -> bool:
    """Compare blocks until four agree; damaged ones are passed over, and one that differs settles it."""
    allowed = 0 if fast.blocks[level].lossless else _JPEG2000_LEVELS
    agreeing = refused = 0
    for region, (left, top) in _comparable(fast, slow, level):
        x, y, width, height = region
        ours = _read(fast, level, x, y, width, height)
        theirs = _read(slow, level, left, top, x + width - left, y + height - top)
        if ours is None:
            refused += theirs is not None
        elif theirs is not None:
            if np.abs(ours.astype(np.int16) - theirs[y - top :, x - left :]).max() > allowed:
                return False
            agreeing += 1
            if agreeing == _AGREEING:
                break
    # Nothing could be compared: a level of damaged blocks is the same to both, one that only we refuse is not.
    return agreeing > 0 or (refused == 0 and level > 0)


def _read(slide: Slide, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8] | None:
    try:
        return slide.read(level, x, y, width, height)
    except UnreadableRegionError:
        return None


Region = tuple[int, int, int, int]


def _comparable(fast: TiffReader, slow: OpenSlideReader, level: int) -> Iterator[tuple[Region, tuple[int, int]]]:
    """Yield blocks as (x, y, width, height) and the corner from which OpenSlide reads them without interpolating.

    First four from the fullest to the emptiest by stored bytes (tissue to glass), then others in between.
    """
    stored = fast.blocks[level]
    x, left = _exact_starts(stored.width, stored.block_width, slow.downsamples[level])
    y, top = _exact_starts(stored.height, stored.block_height, slow.downsamples[level])
    width, height = np.minimum(stored.block_width, stored.width - x), np.minimum(stored.block_height, stored.height - y)
    high, wide = y + height - top, x + width - left
    area_RC = high[:, None] * wide[None, :]
    bytes_RC = np.array(stored.counts).reshape(area_RC.shape)
    small_RC = area_RC <= max(_SAMPLE_PX, stored.block_width * stored.block_height)
    small_RC &= (high[:, None] <= _PIECE_PX) & (wide[None, :] <= _PIECE_PX)
    usable = np.flatnonzero(small_RC & (bytes_RC > 0))
    usable = usable[np.argsort(-bytes_RC.ravel()[usable], kind="stable")]
    picks = np.unique(np.linspace(0, len(usable) - 1, min(len(usable), _SAMPLES)).astype(np.int64))
    quarter = max(1, len(picks) // _AGREEING)
    for start in range(quarter):
        for place in picks[start::quarter]:
            row, column = divmod(int(usable[place]), stored.across)
            region = int(x[column]), int(y[row]), int(width[column]), int(height[row])
            yield region, (int(left[column]), int(top[row]))


def _exact_starts(level_px: int, block_px: int, downsample: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Along one axis: the blocks' starts, and the last pixel up to each that OpenSlide can begin at exactly."""
    pixels = np.arange(level_px)
    exact = np.abs(np.rint(pixels * downsample) / downsample - pixels) < EXACT_PX
    nearest_exact = np.maximum.accumulate(np.where(exact, pixels, 0))
    starts = pixels[::block_px]
    return starts, nearest_exact[starts]


def _any_pixels(slide: Slide) -> bool:
    """Whether any of up to 144 small spots of the coarsest level can be read."""
    level = len(slide.levels) - 1
    width, height = slide.levels[level].width, slide.levels[level].height
    side_x, side_y = min(32, width), min(32, height)
    spots_x = np.unique(np.linspace(0, width - side_x, 12).astype(np.int64))
    spots_y = np.unique(np.linspace(0, height - side_y, 12).astype(np.int64))
    spots = [(int(x), int(y)) for y in spots_y for x in spots_x]
    spots = spots[len(spots) // 2 :] + spots[: len(spots) // 2]  # the middle first: the edges may never be scanned
    return any(_read(slide, level, x, y, side_x, side_y) is not None for x, y in spots)
