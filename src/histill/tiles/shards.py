"""Shards: USTAR files of encoded tiles, written so that their bytes depend on the tiles alone, read by byte offset.

A shard is an ordinary tar file and a valid WebDataset: ``tar``, :mod:`tarfile` and the ``webdataset`` package open it.
Format: IEEE Std 1003.1 (POSIX), pax, section *ustar Interchange Format*.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from histill.errors import DataError
from histill.files import atomic_path
from histill.tiles.images import UnreadableTileError

__all__ = ["BLOCK_BYTES", "OpenShards", "ShardWriter", "read_member", "slide_key"]

BLOCK_BYTES = 512
"""A member's header and its data start at multiples of this."""
_END = bytes(2 * BLOCK_BYTES)
_BUFFER_BYTES = 1 << 20
_NAME_BYTES, _PREFIX_BYTES = 100, 155
_MOST_BYTES = 8**11 - 1
_KEY_LETTERS = 64
_MOST_OPEN = 512


def slide_key(slide: str) -> str:
    """Give the first part of the names of a slide's members: plain ASCII of at most 64 letters, without a dot.

    WebDataset takes a name up to its first dot as the sample's key, so that ``a.b_0_0.jpg`` and ``a.b_0_9.jpg`` would
    be one sample. An id that is not plain is spelled with ``-`` and ends in a hash of itself.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", slide)
    if plain == slide and len(slide) <= _KEY_LETTERS:
        return slide
    digest = hashlib.sha256(slide.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{plain[: _KEY_LETTERS - len(digest) - 1]}-{digest}"


def _name_fields(name: str) -> tuple[bytes, bytes]:
    """Split a member's name into the fields ``name`` and ``prefix``, at a slash when it is longer than 100 bytes."""
    data = name.encode("utf-8", "surrogateescape")
    if len(data) <= _NAME_BYTES:
        return data, b""
    cut = data.find(b"/", len(data) - _NAME_BYTES - 1)
    if not 0 < cut <= _PREFIX_BYTES or cut == len(data) - 1:
        raise DataError(
            "the name of a tile is too long for a shard",
            got=name,
            allowed=f"{_NAME_BYTES} bytes, or {_PREFIX_BYTES} more in front of a slash",
        )
    return data[cut + 1 :], data[:cut]


def _template() -> bytes:
    """Header of a file without name, prefix, size and checksum: mode 644, owner and time 0."""
    header = bytearray(BLOCK_BYTES)
    for offset, field in [(100, b"0000644"), (108, b"0000000"), (116, b"0000000"), (136, b"00000000000")]:
        header[offset : offset + len(field)] = field
    header[148:156] = b" " * 8  # the checksum is made with blanks in its place
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return bytes(header)


_HEADER = _template()
_HEADER_SUM = sum(_HEADER)


def _header(name: bytes, prefix: bytes, size: int) -> bytes:
    """Make one member's header; by hand, since ``tarfile.TarInfo.tobuf`` takes several times as long."""
    digits = b"%011o" % size
    total = _HEADER_SUM + sum(name) + sum(prefix) + sum(digits)
    return b"".join(
        (
            name.ljust(_NAME_BYTES, b"\0"),
            _HEADER[100:124],
            digits,
            _HEADER[135:148],
            b"%06o\0 " % total,
            _HEADER[156:345],
            prefix.ljust(BLOCK_BYTES - 345, b"\0"),
        )
    )


class ShardWriter:
    """Writes tiles into numbered shards; all of them appear together, when the writer is closed without an error.

    Until then each shard is a file ``.tmp-*`` beside its place. An error inside a ``with`` block leaves none; a killed
    process leaves ``.tmp-*`` files, or some of the finished shards, which the next run writes again, byte for byte.

    Parameters
    ----------
    path_of_shard
        Number from 0 -> where that shard belongs; asked once for each shard that is begun.
    shard_bytes
        A new shard is begun when the next tile would make the file larger than this.
    """

    def __init__(self, path_of_shard: Callable[[int], Path], shard_bytes: int) -> None:
        self._path_of_shard = path_of_shard
        self._shard_bytes = shard_bytes
        self._shards = ExitStack()
        self._file: BinaryIO | None = None
        self._path = Path()
        self._count = 0
        self._position = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._discard(error)

    def add(self, name: str, data: bytes) -> tuple[str, int]:
        """Append one tile.

        Parameters
        ----------
        name
            Name inside the shard, with one dot.
        data
            The encoded tile.

        Returns
        -------
        tuple of str and int
            The shard's file name, and where in it ``data`` begins: an offset in bytes, a multiple of 512.

        Raises
        ------
        DataError
            When the disk is full or cannot be written, or the name does not fit.
        """
        assert name.rpartition("/")[2].count(".") == 1, f"WebDataset reads {name} up to its first dot"
        assert len(data) <= _MOST_BYTES
        name_field, prefix = _name_fields(name)
        padding = -len(data) % BLOCK_BYTES
        after = self._position + BLOCK_BYTES + len(data) + padding
        try:
            if self._file is None or (self._position > 0 and after + len(_END) > self._shard_bytes):
                self._next_shard()
            assert self._file is not None
            self._file.write(_header(name_field, prefix, len(data)))
            self._file.write(data)
            self._file.write(bytes(padding))
        except OSError as error:
            self._discard(error)
            raise self._failure(error) from error
        offset = self._position + BLOCK_BYTES
        self._position = offset + len(data) + padding
        return self._path.name, offset

    def close(self) -> None:
        """Finish the shards: they are on the disk under their names when this returns. Without a tile there is none."""
        try:
            self._finish_file()
            self._shards.close()
        except OSError as error:
            self._discard(error)
            raise self._failure(error) from error

    def _next_shard(self) -> None:
        self._finish_file()
        self._path = self._path_of_shard(self._count)
        temporary = self._shards.enter_context(atomic_path(self._path))
        self._file = temporary.open("wb", buffering=_BUFFER_BYTES)
        self._count += 1
        self._position = 0

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.write(_END)
            self._file.close()
            self._file = None

    def _discard(self, error: BaseException) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing writes what is buffered, for which there may be no room
                self._file.close()
            self._file = None
        with suppress(type(error)):
            self._shards.__exit__(type(error), error, error.__traceback__)

    def _failure(self, error: OSError) -> DataError:
        mend = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        return DataError(
            "a shard cannot be written",
            where=self._path,
            got=error.strerror or error,
            remedy=f"{mend} and run the same command again: finished slides stay",
        )


def read_member(descriptor: int, offset: int, length: int) -> bytes:
    """Read one tile's bytes; safe for many threads, since the file's own position is not used.

    Parameters
    ----------
    descriptor
        File descriptor of an open shard.
    offset, length
        In bytes, from the index.

    Raises
    ------
    UnreadableTileError
        When the shard ends before, or the disk fails.
    """
    try:
        data = os.pread(descriptor, length, offset)
    except OSError as error:
        raise UnreadableTileError("a shard cannot be read", got=error.strerror or error) from None
    if len(data) != length:
        raise UnreadableTileError(
            "a shard ends before the tile does", got=f"{len(data)} bytes at {offset}", allowed=f"{length} bytes"
        )
    return data


class _Descriptor:
    """An open file that closes when nobody holds it any more: a thread may still read what another has put out."""

    __slots__ = ("number",)

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # not when opening failed
            os.close(self.number)


class OpenShards:
    """Reads tiles from the shards of one folder, and keeps those open that were read last. Safe for many threads.

    Parameters
    ----------
    folder
        Where the shards are.
    most
        Shards that stay open; when None 512, or half of what the process may open if that is less.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder = folder
        self.most = most or min(_MOST_OPEN, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Read one tile's bytes.

        Parameters
        ----------
        shard
            File name.
        offset, length
            In bytes, from the index.

        Raises
        ------
        UnreadableTileError
            When the shard is missing, too short, or cannot be read.
        DataError
            When the process may open no more files: that concerns all tiles.
        """
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
        if file is None:
            file = self._add(shard)
        return read_member(file.number, offset, length)

    def _add(self, shard: str) -> _Descriptor:
        try:
            file = _Descriptor(self.folder / shard)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise DataError("too many files are open", where=self.folder, remedy="raise `ulimit -n`") from None
            what = "a shard is missing" if isinstance(error, FileNotFoundError) else "a shard cannot be opened"
            raise UnreadableTileError(what, where=self.folder / shard, got=error.strerror) from None
        with self._lock:
            self._open[shard] = file
            if len(self._open) > self.most:
                self._open.popitem(last=False)
        return file
