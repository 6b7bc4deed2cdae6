"""`histill tile` when it is killed, doubled, out of space, or its workers die: nothing lost, nothing twice."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from histill import files
from histill.cli import main
from histill.tiles import slide_writer
from histill.tiles.folder import SetFolder
from histill.tiles.open import open_set

SMALL = "CMU-1-Small-Region"
OPTIONS = ("--mpp", "1", "--mpp-override", "0.5", "--workers", "1")


def _content(folder: Path) -> dict[str, bytes]:
    """File -> bytes, of all but the records of seconds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json" and path.name != "slides.csv"
    }


@pytest.fixture(scope="module")
def four(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    for name in "abcd":
        shutil.copyfile(shared_data / "slides" / f"{SMALL}.svs", folder / f"{name}.svs")
    return folder


@pytest.fixture(scope="module")
def whole(four: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    return out


def _start(four: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "histill", "tile", str(four), "--out", str(out), *OPTIONS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _until(process: subprocess.Popen[bytes], happened: object) -> None:
    assert callable(happened)
    limit = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < limit
        time.sleep(0.005)


MOMENTS = {
    "the folder is claimed": lambda out: (out / "tileset.json").exists(),
    "a shard is begun": lambda out: bool(list(out.glob(".work/slides/*/.tmp-*"))),
    "a slide is finished": lambda out: (out / "parts" / "a.json").exists(),
    "another shard is in place": lambda out: (out / "shards" / "c-00000.tar").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_set(moment: str, four: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = _start(four, out)
    _until(process, lambda: MOMENTS[moment](out))
    process.kill()
    process.communicate()
    assert not (out / "index.parquet").exists()
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    assert _content(out) == _content(whole)
    assert not list(out.glob(".*"))
    rows = pq.read_table(out / "index.parquet").select(["slide", "x", "y"]).to_pylist()
    assert len({tuple(row.values()) for row in rows}) == len(rows)


def test_workers_of_a_killed_run_do_not_stay(four: Path, tmp_path: Path) -> None:
    process = _start(four, tmp_path / "set")
    _until(process, lambda: (tmp_path / "set" / "parts" / "a.json").exists())
    children = _children(process.pid)
    assert children
    process.kill()
    process.communicate()
    limit = time.monotonic() + 20
    while any(_alive(child) for child in children):
        assert time.monotonic() < limit, "a worker outlived its parent"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_finished_slides_and_no_litter(four: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = _start(four, out)
    _until(process, lambda: (out / "parts" / "a.json").exists())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    finished = {record.slide: record.status for record in SetFolder(out).records()}
    assert "a" in finished
    assert set(finished.values()) == {"done"}  # what was in flight is not called failed
    assert len(open_set(out)) == sum(record.tiles for record in SetFolder(out).records())
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    assert _content(out) == _content(whole)


def test_two_processes_on_one_folder(four: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    processes = [_start(four, out) for _ in range(2)]
    for process in processes:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told.decode()
    # whoever ends last has seen all slides: nothing is left to do
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    assert _content(out) == _content(whole)


# ------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of one megabyte, where this user may mount one."""
    folder = Path("/tmp") / f"histill-disk-{os.getpid()}"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_disk_that_is_really_full(
    four: Path, whole: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "set"
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "free some space" in told
    assert not list(out.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    assert _content(out) == _content(whole)


@pytest.mark.parametrize("after", [0, 3, 30])
def test_no_space_at_any_write(
    after: int,
    four: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ENOSPC from the n-th write of a tile on, injected where shards are written."""
    out, written = tmp_path / "set", 0
    add = slide_writer.ShardWriter.add

    class FullFile:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(self: slide_writer.ShardWriter, name: str, data: bytes) -> tuple[str, int]:
        nonlocal written
        written += 1
        if written > after:
            if self._file is None:
                add(self, name, data)
            self._file = FullFile(self._file)
        return add(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(slide_writer.ShardWriter, "add", full)
        assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "free some space" in told
    assert not list(out.rglob("*.tar")) or after == 30
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    assert _content(out) == _content(whole)


@pytest.mark.parametrize("number", range(1, 16, 2))
def test_no_space_at_any_file(
    number: int,
    four: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ENOSPC at the n-th file that is synced: settings, shards, rows, thumbnails, records, index, tables."""
    out, synced = tmp_path / "set", itertools.count(1)
    sync = files.sync

    def full(path: Path) -> None:
        if next(synced) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync", full)
        assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 1
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert "No space left on device" in told
    assert "free some space" in told
    assert main(["tile", str(four), "--out", str(out), *OPTIONS]) == 0
    assert _content(out) == _content(whole)
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("number", [3, 8, 15])
def test_a_killed_merge_goes_on_to_the_same_set(number: int, four: Path, whole: Path, tmp_path: Path) -> None:
    """Killed at the n-th file that is put in its place."""
    for part in (0, 1):
        assert main(["tile", str(four), "--out", str(tmp_path / str(part)), *OPTIONS, "--shard", f"{part}/2"]) == 0
    merge = ["tile", "--merge", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "set")]
    script = f"""
import itertools, os, signal, sys
from histill import files
from histill.cli import main
from histill.tiles.folder import SetFolder
place, placed = SetFolder.place, itertools.count(1)
def killed(self, path, target):
    place(self, path, target)
    if next(placed) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
SetFolder.place = killed
main({merge!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "set" / "index.parquet").exists()
    before = _content(tmp_path / "0")
    assert main(merge) == 0
    assert _content(tmp_path / "set") == _content(whole)
    assert _content(tmp_path / "0") == before
    assert not list((tmp_path / "set").rglob(".*"))


# ------------------------------------------------------------------ workers that die


def test_a_worker_that_is_killed_costs_nothing(four: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = _start(four, out)
    _until(process, lambda: (out / "parts" / "a.json").exists())
    for child in _children(process.pid):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told.decode()
    assert _content(out) == _content(whole)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_set(four: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = [
        sys.executable,
        "-m",
        "histill",
        "tile",
        str(four),
        "--out",
        str(out),
        *OPTIONS,
        "--ray",
        "local",
        "--workers",
        "2",
    ]
    assert subprocess.run(command, check=False).returncode == 0
    assert _content(out) == _content(whole)


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_midway(four: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = [
        sys.executable,
        "-m",
        "histill",
        "tile",
        str(four),
        "--out",
        str(out),
        *OPTIONS,
        "--ray",
        "local",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command)
    _until(process, lambda: bool(list(out.glob(".work/slides/*/.tmp-*"))))
    workers = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and path.read_bytes().startswith(b"ray::")
    ]
    busy = [pid for pid in workers if b"_one_slide" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert busy
    os.kill(busy[0], signal.SIGKILL)
    assert process.wait(timeout=240) == 0
    assert _content(out) == _content(whole)
