"""Files that are either whole or absent: write to a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_folder", "atomic_path", "lock", "read_json", "sha256_file", "sync", "write_json", "write_text"]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(target: Path, suffix: str = "") -> Path:
    """Name a file or folder beside ``target``; made by plain open or mkdir, it gets ordinary permissions (umask)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".tmp-{secrets.token_hex(8)}{suffix}"


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; it becomes ``target`` when the block ends without an error.

    The suffix of ``target`` is kept, since some writers choose the format by it. A process that is killed inside the
    block leaves the old ``target`` and a file ``.tmp-*`` beside it.
    """
    temporary = _temporary_name(target, target.suffix)
    try:
        temporary.touch(exist_ok=False)
        ordinary = temporary.stat().st_mode
        yield temporary
        temporary.chmod(ordinary)  # some writers (safetensors) replace the file by a private one
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends without an error it becomes ``target``.

    An older ``target`` is replaced. A kill between the two renames leaves ``target`` absent, never half; the older one
    then stands beside it as ``.old-*``. When the second rename fails, the older one is put back.
    """
    temporary = _temporary_name(target)
    retired = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():
                if path.is_file():
                    path.chmod(temporary.stat().st_mode & 0o666)
                sync(path)
        if target.exists():
            target.replace(retired)
        try:
            temporary.replace(target)
        except BaseException:
            if retired.exists():
                retired.replace(target)
            raise
        sync(target.parent)
        if retired.exists():
            shutil.rmtree(retired)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock file among the processes of one machine (and of a network file system that passes flock on).

    Yields whether the lock was got; with ``wait`` it always is. A process that dies lets go of it. The holder may
    remove the file: whoever waited for it then starts again with the new one.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # another process tidied the folder away in between
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if _is_at(file.fileno(), path):
                yield True
                return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write JSON (indented, strict: NaN and infinity are errors) atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hash a file's bytes: SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
