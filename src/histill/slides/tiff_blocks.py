"""One stored block of a TIFF to pixels, strictly: a block that is cut short or overwritten never becomes a picture.

libjpeg and OpenJPEG fill what is missing with grey and only warn. Here libjpeg's warnings are errors (simplejpeg's
``strict``), OpenJPEG decodes in its strict mode, and a JPEG2000 block must also end with its end marker and hold no
run of zero bytes that its empty packets cannot explain, since zeros inside it decode without any warning.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

__all__ = [
    "DEFLATE",
    "JPEG",
    "JPEG2000_RGB",
    "JPEG2000_YCBCR",
    "LZW",
    "PHOTOMETRIC_YCBCR",
    "UNCOMPRESSED",
    "BlockError",
    "Decode",
    "jpeg2000_decoder",
    "jpeg_decoder",
    "lossless_decoder",
]

UNCOMPRESSED, LZW, JPEG, JPEG2000_YCBCR, JPEG2000_RGB = 1, 5, 7, 33003, 33005
"""Values of the TIFF tag Compression; 33003 and 33005 are Aperio's."""
DEFLATE = (8, 32946)
PHOTOMETRIC_YCBCR = 6

Decode = Callable[[bytes, NDArray[np.uint8]], None]
"""Fill ``out`` (height, width, 3) RGB from a block's bytes, or raise BlockError; ``out`` is then undefined."""

_START, _END = b"\xff\xd8", b"\xff\xd9"
_ZERO_RUN = re.compile(rb"\0{64,}")
_J2K_SIZE, _J2K_STYLE, _J2K_TILE = 0xFF51, 0xFF52, 0xFF90


class BlockError(Exception):
    """A block's bytes do not give its pixels."""


def jpeg_decoder(tables: bytes | None, photometric: int) -> Decode:
    """Make the decoder of abbreviated JPEG blocks.

    Parameters
    ----------
    tables
        The TIFF tag JPEGTables: a JPEG of quantisation and Huffman tables only, shared by the blocks.
    photometric
        The TIFF tag PhotometricInterpretation; it, not the JPEG, says whether the stored colours are RGB or YCbCr.
    """
    # An Adobe marker is how a JPEG itself says so: its last byte is 0 for RGB and 1 for YCbCr.
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([photometric == PHOTOMETRIC_YCBCR])
    head = _START + (tables.removeprefix(_START).removesuffix(_END) if tables else b"") + adobe

    def decode(data: bytes, out: NDArray[np.uint8]) -> None:
        if not data.startswith(_START):
            raise BlockError("it does not begin as a JPEG")
        try:
            image = simplejpeg.decode_jpeg(head + data[2:], colorspace="RGB", strict=True, buffer=out)
        except ValueError as error:
            raise BlockError(str(error)) from None
        if image.shape != out.shape:
            raise BlockError(f"its JPEG has {image.shape[1]} x {image.shape[0]} px")

    return decode


def jpeg2000_decoder(ycbcr: bool) -> Decode:
    """Make the decoder of JPEG2000 codestreams of three components, RGB or YCbCr (full range, ITU-R BT.601)."""

    def decode(data: bytes, out: NDArray[np.uint8]) -> None:
        _check_jpeg2000(data, out.shape[1], out.shape[0])
        try:
            if ycbcr:
                _rgb_of_ycbcr(imagecodecs.jpeg2k_decode(data, verbose=0), out)
            else:
                imagecodecs.jpeg2k_decode(data, verbose=0, out=out)
        except (RuntimeError, ValueError) as error:
            raise BlockError(str(error)) from None

    return decode


def _check_jpeg2000(data: bytes, width: int, height: int) -> None:
    """Raise BlockError unless a codestream has this size, three components, an end, and no hole of zeros."""
    if len(data) < 64 or data[:4] != b"\xff\x4f\xff\x51":
        raise BlockError("it does not begin as a JPEG2000 codestream")
    right, bottom, left, top = struct.unpack_from(">4I", data, 8)
    (components,) = struct.unpack_from(">H", data, 40)
    if (right - left, bottom - top, components) != (width, height, 3):
        raise BlockError(f"its JPEG2000 has {right - left} x {bottom - top} px of {components} components")
    if not data.endswith(_END) and not data.rstrip(b"\0").endswith(_END):
        raise BlockError("its JPEG2000 has no end marker; bytes are missing or overwritten")
    runs = _ZERO_RUN.findall(data)
    if runs and max(map(len, runs)) > _most_packets(data, width, height):
        raise BlockError(f"{max(map(len, runs))} zero bytes stand inside its JPEG2000")


def _most_packets(data: bytes, width: int, height: int) -> int:
    """Count the packets of a three-component codestream; an empty packet may be one zero byte, and no other data is.

    Source: ITU-T T.800 (JPEG2000 part 1), annex A.6.1, markers SIZ and COD.
    """
    at = 2
    while at + 14 <= len(data):
        marker, length = struct.unpack_from(">2H", data, at)
        if marker == _J2K_STYLE:
            style, layers, levels = data[at + 4], int.from_bytes(data[at + 6 : at + 8], "big"), data[at + 9]
            precincts = 1
            if style & 1:
                sizes = data[at + 14 : at + 15 + levels]
                if len(sizes) != levels + 1:
                    break
                narrow, low = min(size & 15 for size in sizes), min(size >> 4 for size in sizes)
                precincts = -(-width >> narrow) * -(-height >> low)
            return 3 * layers * (levels + 1) * precincts
        if marker == _J2K_TILE:
            break
        at += 2 + length
    raise BlockError("its JPEG2000 header is damaged")


def _rgb_of_ycbcr(ycbcr_HW3: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    if ycbcr_HW3.shape != out.shape or ycbcr_HW3.dtype != np.uint8:
        raise BlockError(f"its JPEG2000 gives {ycbcr_HW3.shape} values of {ycbcr_HW3.dtype}")
    luma, blue, red = (ycbcr_HW3[..., channel].astype(np.float32) for channel in range(3))
    blue -= 128
    red -= 128
    for channel, value in enumerate(
        (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue),
    ):
        out[..., channel] = np.clip(np.rint(value), 0, 255)


def lossless_decoder(compression: int, predictor: int) -> Decode:
    """Make the decoder of uncompressed, LZW or Deflate blocks, with predictor 1 (none) or 2 (horizontal)."""
    unpack = None
    if compression != UNCOMPRESSED:
        unpack = imagecodecs.lzw_decode if compression == LZW else imagecodecs.zlib_decode

    def decode(data: bytes, out: NDArray[np.uint8]) -> None:
        try:
            raw = unpack(data) if unpack else data
        except (RuntimeError, ValueError) as error:
            raise BlockError(str(error)) from None
        if len(raw) != out.size:
            raise BlockError(f"it gives {len(raw)} of {out.size} bytes")
        image = np.frombuffer(raw, np.uint8).reshape(out.shape)
        if predictor == 2:
            np.cumsum(image, axis=1, dtype=np.uint8, out=out)
        else:
            out[:] = image
        if compression == UNCOMPRESSED and not out.any():
            raise BlockError("all of its bytes are zero")  # overwritten, or a hole that was never filled

    return decode
