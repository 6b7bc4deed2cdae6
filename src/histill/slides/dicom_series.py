"""Which series a DICOM file belongs to, from its header alone.

OpenSlide tells it too, but opens every file of the folder to answer for one: a folder of a hundred slides would be
read a thousand times over.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = ["WHOLE_SLIDE_CLASS", "DicomFile", "read_dicom_file"]

WHOLE_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class of whole slide microscopy images."""

_HEADER_BYTES = (1 << 16, 1 << 22)  # most headers are small; some carry a thumbnail or a profile first
_CLASS, _SERIES, _SYNTAX = (0x0008, 0x0016), (0x0020, 0x000E), (0x0002, 0x0010)
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """What a DICOM file says it is."""

    sop_class: str
    """SOPClassUID."""
    series: str
    """SeriesInstanceUID."""


def read_dicom_file(path: Path) -> DicomFile | None:
    """Read the two identifiers; None when it cannot be read, is no DICOM file in little endian or lacks one.

    Source: DICOM PS3.5, chapter 7 (data elements, sequences of items), and PS3.10, chapter 7 (file meta information).
    """
    for size in _HEADER_BYTES:
        try:
            with path.open("rb") as file:
                data = file.read(size)
            found = _walk(data) if data[128:132] == b"DICM" else {}
        except (OSError, struct.error, UnicodeDecodeError):  # a link to nowhere, say, or a cut header
            continue
        if _CLASS in found and _SERIES in found:
            return DicomFile(sop_class=found[_CLASS], series=found[_SERIES])
    return None


def _walk(data: bytes) -> dict[tuple[int, int], str]:
    """Walk the elements up to the series; sequences of known length are passed over, others walked through."""
    found: dict[tuple[int, int], str] = {}
    at, depth, explicit = 132, 0, True
    while at + 8 <= len(data):
        tag: tuple[int, int] = struct.unpack_from("<2H", data, at)
        syntax = found.get(_SYNTAX)
        if tag[0] != 0x0002 and syntax is not None:  # the group before is always explicit
            if syntax in (_BIG_ENDIAN, _DEFLATED):
                return {}
            explicit = syntax != _IMPLICIT
        if tag[0] == 0xFFFE or not explicit:
            (length,) = struct.unpack_from("<I", data, at + 4)
            start = at + 8
        elif data[at + 4 : at + 6] in _LONG:
            (length,) = struct.unpack_from("<I", data, at + 8)
            start = at + 12
        else:
            (length,) = struct.unpack_from("<H", data, at + 6)
            start = at + 8
        if depth == 0 and tag in (_SYNTAX, _CLASS, _SERIES):
            found[tag] = data[start : start + length].decode("ascii").strip(" \0")
        if depth == 0 and tag >= _SERIES and tag[0] < 0xFFFE:
            return found
        if tag == _SEQUENCE_END:
            depth -= 1
        elif length == _UNDEFINED and tag != _ITEM:
            depth += 1
        at = start if length == _UNDEFINED or tag in (_ITEM_END, _SEQUENCE_END) else start + length
    return found
