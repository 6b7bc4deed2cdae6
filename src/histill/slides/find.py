"""Find the slides below folders and give each its id."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from histill.errors import nearest
from histill.slides.dicom_series import WHOLE_SLIDE_CLASS, read_dicom_file
from histill.slides.slide import SlideError

__all__ = ["SLIDE_SUFFIXES", "SlideFile", "find_slides"]

SLIDE_SUFFIXES = (
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".vms",
    ".vmu",
    ".scn",
    ".mrxs",
    ".svslide",
    ".bif",
    ".dcm",
)
"""Suffixes of the files that are taken as slides, in any case; ``.ome.tif`` and ``.ome.tiff`` are among them."""
_DICOM = ".dcm"
_ID_BYTES = 200


@dataclass(frozen=True, slots=True)
class SlideFile:
    """A slide to open."""

    id: str
    """Its POSIX path relative to the folder that was given, without suffix, ``/`` written as ``__``."""
    path: Path
    """The file to open; of a DICOM series its first file by name."""


def find_slides(inputs: Sequence[Path]) -> list[SlideFile]:
    """Find slides in files and folders.

    A DICOM series is one slide: the whole-slide ``.dcm`` files of one folder with one SeriesInstanceUID. When it is
    the only series of its folder it gets the folder's name, else the name of its first file. DICOM files of other
    kinds (annotations, radiology) are passed over in folders. A file that is reached twice counts once.

    Parameters
    ----------
    inputs
        Files, and folders that are searched at any depth; names that begin with a dot are passed over in them.

    Returns
    -------
    list
        The slides, sorted by id.

    Raises
    ------
    SlideError
        When an input does not exist, a file has no suffix of a slide, no slide is found, or two have the same id.
    """
    found: list[SlideFile] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found += _below(given)
        elif given.exists():
            found.append(_single(given))
        else:
            beside = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
            remedy = nearest(given.name, beside) or "check the path"
            raise SlideError("this file or folder does not exist", where=given, remedy=remedy)
    if not found:
        raise SlideError(
            "no slides were found",
            where=", ".join(map(str, inputs)) or "no files or folders were given",
            allowed=f"files that end in {', '.join(SLIDE_SUFFIXES)}",
        )
    return sorted(_distinct(found), key=lambda slide: slide.id)


def _distinct(found: Iterable[SlideFile]) -> list[SlideFile]:
    by_path: dict[str, SlideFile] = {}
    for slide in (SlideFile(_file_id(slide.id), slide.path) for slide in found):
        by_path.setdefault(os.path.realpath(slide.path), slide)
    by_id: dict[str, SlideFile] = {}
    for slide in by_path.values():
        other = by_id.setdefault(slide.id, slide)
        if other is not slide:
            raise SlideError(
                f"two slides have the id {slide.id}",
                where=f"{other.path} and {slide.path}",
                remedy="rename one of them, or give the folder above both",
            )
    return list(by_id.values())


def _single(path: Path) -> SlideFile:
    if path.suffix.lower() not in SLIDE_SUFFIXES:
        raise SlideError(
            "this file is not a slide by its name", where=path, allowed=f"names that end in {', '.join(SLIDE_SUFFIXES)}"
        )
    if path.suffix.lower() == _DICOM:
        siblings = [entry for entry in sorted(path.parent.iterdir()) if _is_slide_name(entry.name)]
        series = _series(entry for entry in siblings if entry.suffix.lower() == _DICOM)
        for paths in series.values():
            if path in paths:
                folder = path.resolve().parent.name
                return SlideFile(folder if len(series) == 1 else paths[0].stem, paths[0])
    return SlideFile(_id(Path(path.name)), path)


def _below(root: Path) -> list[SlideFile]:
    """Find the slides of one folder, at any depth; a loop of links is walked once."""
    found: list[SlideFile] = []
    walked: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(folder, name) for name in sorted(names) if _is_slide_name(name)]
        dicom = [path for path in paths if path.suffix.lower() == _DICOM]
        found += [SlideFile(_id(path.relative_to(root)), path) for path in paths if path.suffix.lower() != _DICOM]
        series = _series(dicom)
        for members in series.values():
            first = members[0]
            relative = Path(folder).relative_to(root)
            if len(series) > 1:
                slide_id = _id(first.relative_to(root))
            else:
                slide_id = "__".join(relative.parts) or root.resolve().name
            found.append(SlideFile(slide_id, first))
    return found


def _refuse(error: OSError) -> None:
    """A folder that cannot be looked into might hold slides."""
    raise SlideError("a folder of slides cannot be read", where=error.filename, got=error.strerror)


def _is_slide_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SLIDE_SUFFIXES)


def _id(relative: Path) -> str:
    name = relative.name[: -len(relative.suffix)]
    if relative.suffix.lower() in (".tif", ".tiff") and name.lower().endswith(".ome"):
        name = name[: -len(".ome")]
    return "__".join([*relative.parts[:-1], name])


def _file_id(name: str) -> str:
    """An id that files and tables can be named after: UTF-8, and short enough for a file system."""
    data = os.fsencode(name)
    text = data.decode("utf-8", "backslashreplace")
    if len(text.encode()) <= _ID_BYTES:
        return text
    digest = hashlib.sha256(data).hexdigest()[:12]
    return f"{text.encode()[: _ID_BYTES - 13].decode('utf-8', 'ignore')}-{digest}"


def _series(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group the DICOM files of one folder; a file without a readable header stands alone, for the opener to refuse."""
    series: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        header = read_dicom_file(path)
        if header is None:
            series[f"no series: {path.name}"].append(path)
        elif header.sop_class == WHOLE_SLIDE_CLASS:
            series[header.series].append(path)
    return dict(series)
