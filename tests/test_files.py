from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from histill import files


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ files


def test_the_target_is_made_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.txt"
    files.write_text(target, "ä\n")
    assert target.read_bytes() == "ä\n".encode()
    assert _names(target.parent) == ["x.txt"]


def test_the_temporary_file_stands_beside_the_target_and_keeps_its_suffix(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "w.safetensors") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        assert not (tmp_path / "w.safetensors").exists()
        temporary.write_bytes(b"1")
    assert _names(tmp_path) == ["w.safetensors"]


def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")

    def write() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["x.txt"]


def test_a_writer_that_unlinks_and_writes_anew_is_fine(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "x.bin") as temporary:
        temporary.unlink()
        temporary.write_bytes(b"anew")
    assert (tmp_path / "x.bin").read_bytes() == b"anew"


def test_a_writer_that_writes_nothing_into_its_place_is_an_error(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_path(tmp_path / "x.bin") as temporary:
            temporary.unlink()

    with pytest.raises(FileNotFoundError):
        write()
    assert _names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "x.json"
    files.write_json(target, {"a": 1})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(Path, "replace", full if call == "replace" else Path.replace)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(target, {"a": 2})
    monkeypatch.undo()
    assert files.read_json(target) == {"a": 1}
    assert _names(tmp_path) == ["x.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")

    def write() -> None:
        with files.atomic_path(target) as temporary:
            temporary.unlink()
            temporary.symlink_to("/dev/full")
            temporary.write_text("new")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["x.txt"]


def test_the_data_is_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, calls = tmp_path / "x.txt", []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def seen_replace(self: Path, other: Path) -> Path:
        calls.append("rename")
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    files.write_text(target, "new")
    assert calls == ["fsync file", "rename", "fsync folder"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from histill import files
target, kind = Path(sys.argv[1]), sys.argv[2]
with (files.atomic_path if kind == "file" else files.atomic_folder)(target) as temporary:
    (temporary if kind == "file" else temporary / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_in_the_middle_leaves_the_old_content(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    content = target if kind == "file" else target / "part"
    content.write_text("old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(target), kind], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content.read_text() == "old"
    left = [name for name in _names(tmp_path) if name != "target"]
    assert len(left) == 1
    assert left[0].startswith(".tmp-")


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_are_those_of_ordinary_files(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "x.txt", "x")
        with files.atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "y.txt").write_text("y")
    finally:
        os.umask(before)
    assert (tmp_path / "x.txt").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "folder" / "y.txt").stat().st_mode & 0o777 == file_mode


# ------------------------------------------------------------------ folders


def test_a_folder_replaces_the_older_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "student"
    for name in ("old.txt", "new.txt"):
        with files.atomic_folder(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert _names(target / "sub") == ["new.txt"]
    assert _names(tmp_path) == ["student"]


def test_an_error_inside_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "student"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def write() -> None:
        with files.atomic_folder(target) as temporary:
            (temporary / "new.txt").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert _names(tmp_path) == ["student"]
    assert _names(target) == ["old.txt"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "student"
    target.mkdir()
    (target / "old.txt").write_text("old")
    replace = Path.replace

    def fail_for_new(self: Path, other: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", fail_for_new)

    def write() -> None:
        with files.atomic_folder(target) as temporary:
            (temporary / "new.txt").write_text("new")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert _names(tmp_path) == ["student"]
    assert _names(target) == ["old.txt"]


# ------------------------------------------------------------------ JSON and hashes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_json_that_others_cannot_read_is_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "x.json", value)
    assert _names(tmp_path) == []


def test_json_comes_back_and_ends_with_a_newline(tmp_path: Path) -> None:
    value = {"name": "Zürich", "values": [1, 2.5, None, True]}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert files.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"a" * 1_000_003)
    assert files.sha256_file(path) == hashlib.sha256(b"a" * 1_000_003).hexdigest()


@pytest.mark.parametrize("inside_a_folder", [False, True])
def test_a_writer_that_makes_private_files_still_leaves_ordinary_ones(tmp_path: Path, inside_a_folder: bool) -> None:
    (tmp_path / "plain").touch()
    ordinary = (tmp_path / "plain").stat().st_mode
    if inside_a_folder:
        with files.atomic_folder(tmp_path / "made") as temporary:
            (temporary / "x").touch(mode=0o600)
        made = tmp_path / "made" / "x"
    else:
        with files.atomic_path(tmp_path / "x") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
        made = tmp_path / "x"
    assert made.stat().st_mode == ordinary


# ------------------------------------------------------------------ locks


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.lock"
    with files.lock(path, wait=False) as first:
        assert first
        with files.lock(path, wait=False) as second:
            assert not second
    with files.lock(path, wait=False) as third:
        assert third


def test_a_lock_file_that_its_holder_removes_is_no_lock_any_more(tmp_path: Path) -> None:
    """Whoever waited on the removed file must not share the lock with whoever made a new one."""
    path, waiting, got = tmp_path / "x.lock", threading.Event(), threading.Event()
    release = threading.Event()

    def waiter() -> None:
        waiting.set()
        with files.lock(path, wait=True):
            got.set()
            release.wait(10)

    with files.lock(path, wait=True):
        thread = threading.Thread(target=waiter)
        thread.start()
        waiting.wait(10)
        time.sleep(0.1)  # until it stands in flock
        path.unlink()
    assert got.wait(10)
    with files.lock(path, wait=False) as ours:
        assert not ours
    release.set()
    thread.join()
