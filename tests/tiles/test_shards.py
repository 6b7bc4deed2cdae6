from __future__ import annotations

import errno
import gc
import io
import os
import resource
import signal
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histill.errors import DataError
from histill.tiles import shards
from histill.tiles.images import UnreadableTileError
from histill.tiles.shards import OpenShards, ShardWriter, read_member, slide_key

LARGE = 10**9


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write(folder: Path, members: list[tuple[str, bytes]], shard_bytes: int = LARGE) -> list[tuple[str, int]]:
    with ShardWriter(lambda number: folder / f"s-{number:05d}.tar", shard_bytes) as writer:
        return [writer.add(name, data) for name, data in members]


def test_tarfile_reads_names_data_and_offsets_back(tmp_path: Path) -> None:
    members = [(f"a_{size}_0.jpg", bytes(range(256)) * 5 + bytes(size)) for size in (0, 1, 255, 256, 257, 4000)]
    members.append(("empty_0_0.jpg", b""))
    placed = write(tmp_path, members)
    with tarfile.open(tmp_path / "s-00000.tar") as tar:
        found = tar.getmembers()
        assert [(entry.name, tar.extractfile(entry).read()) for entry in found] == members  # type: ignore[union-attr]
        assert [entry.offset_data for entry in found] == [offset for _, offset in placed]
    assert all(offset % 512 == 0 for _, offset in placed)
    data = (tmp_path / "s-00000.tar").read_bytes()
    assert data[-1024:] == bytes(1024)
    assert len(data) == sum(512 + -(-len(content) // 512) * 512 for _, content in members) + 1024


@settings(deadline=None, max_examples=50)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=30),
    st.integers(0, 5000),
)
def test_headers_equal_those_of_tarfile(stem: str, size: int) -> None:
    info = tarfile.TarInfo(f"{stem}.jpg")
    info.size = size
    name = info.name.encode()
    if len(name) <= 100:
        ours = shards._header(name, b"", size)
        theirs = info.tobuf(tarfile.USTAR_FORMAT, "utf-8")
        # tarfile fills the device numbers, which only device files have
        assert ours[:148] + ours[156:329] == theirs[:148] + theirs[156:329]
        read = tarfile.TarInfo.frombuf(ours, "utf-8", "strict")
        assert (read.name, read.size, read.mode, read.uid, read.gid, read.mtime) == (info.name, size, 0o644, 0, 0, 0)


@pytest.mark.parametrize("folder_letters", [1, 60, 150, 155])
def test_long_names_use_the_prefix_field(tmp_path: Path, folder_letters: int) -> None:
    name = f"{'f' * folder_letters}/{'n' * 90}.jpg"
    write(tmp_path, [(name, b"data")])
    with tarfile.open(tmp_path / "s-00000.tar") as tar:
        assert tar.getnames() == [name]


@pytest.mark.parametrize("name", ["n" * 97 + ".jpg", "f" * 156 + "/" + "n" * 90 + ".jpg", "f/" + "n" * 97 + ".jpg"])
def test_names_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="too long"):
        write(tmp_path, [(name, b"data")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves that to the garbage collector
def test_webdataset_reads_the_shards_as_they_are(tmp_path: Path) -> None:
    key = slide_key("TCGA-CR-7395.6F2C/a b")
    members = [(f"{key}_{x}_224.jpg", jpeg(x)) for x in range(7)]
    placed = write(tmp_path, members, shard_bytes=4000)
    urls = sorted({str(tmp_path / shard) for shard, _ in placed})
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(sample["__key__"], sample["jpg"]) for sample in samples] == [
        (name.removesuffix(".jpg"), data) for name, data in members
    ]
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("jpg"))
    for (image,), (_, data) in zip(decoded, members, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data))))
    gc.collect()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(1, 20_000))
def test_shards_roll_over_at_their_size(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int) -> None:
    folder = tmp_path_factory.mktemp("roll")
    members = [(f"m_{number}_0.jpg", bytes([number]) * size) for number, size in enumerate(sizes)]
    placed = write(folder, members, most)
    names = list(dict.fromkeys(shard for shard, _ in placed))
    assert names == [f"s-{number:05d}.tar" for number in range(len(names))]
    assert sorted(path.name for path in folder.iterdir()) == names
    whole = [512 + -(-size // 512) * 512 for size in sizes]
    for number, name in enumerate(names):
        inside = [size for size, (shard, _) in zip(whole, placed, strict=True) if shard == name]
        assert (folder / name).stat().st_size == sum(inside) + 1024
        assert len(inside) == 1 or sum(inside) + 1024 <= most
        if number + 1 < len(names):  # and the next tile would not have fitted
            following = next(size for size, (shard, _) in zip(whole, placed, strict=True) if shard == names[number + 1])
            assert sum(inside) + following + 1024 > most
    for (shard, offset), (_, data) in zip(placed, members, strict=True):
        assert (folder / shard).read_bytes()[offset : offset + len(data)] == data


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    members = [(f"a_{x}_0.jpg", jpeg(x)) for x in range(5)]
    (tmp_path / "b").mkdir()
    old_umask = os.umask(0o077)
    try:
        write(tmp_path / "a", members)
    finally:
        os.umask(old_umask)
    write(tmp_path / "b", members)
    assert (tmp_path / "a" / "s-00000.tar").read_bytes() == (tmp_path / "b" / "s-00000.tar").read_bytes()


def test_no_shard_appears_before_the_end_and_none_without_a_tile(tmp_path: Path) -> None:
    with ShardWriter(lambda number: tmp_path / f"{number}.tar", 2000) as writer:
        for x in range(4):
            writer.add(f"a_{x}_0.jpg", bytes(900))
            assert all(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    assert len(list(tmp_path.glob("[0-9].tar"))) == 4
    assert write(tmp_path / "none", []) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_the_block_leaves_no_shard(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with ShardWriter(lambda number: tmp_path / f"{number}.tar", 2000) as writer:
            writer.add("a_0_0.jpg", bytes(900))
            writer.add("a_1_0.jpg", bytes(900))
            raise error("stop")

    with pytest.raises(error, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


class _FullDisk:
    """Files on a disk with room for so many bytes."""

    def __init__(self, room: int, code: int) -> None:
        self.room, self.code = room, code
        self.plain = Path.open

    def open(self, path: Path, *args: Any, **kwargs: Any) -> BinaryIO:
        file: Any = self.plain(path, *args, **kwargs)
        return _OnFullDisk(file, self)  # type: ignore[return-value]


class _OnFullDisk:
    def __init__(self, file: BinaryIO, disk: _FullDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        self.disk.room -= len(data)
        if self.disk.room < 0:
            raise OSError(self.disk.code, os.strerror(self.disk.code))
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 700, 3000, 5000])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_failing_disk_is_said_and_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, code: int
) -> None:
    disk = _FullDisk(room, code)
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: disk.open(path, *args, **kwargs))
    with pytest.raises(DataError) as caught:
        write(tmp_path, [(f"a_{x}_0.jpg", bytes(900)) for x in range(3)], 1500 if room == 5000 else LARGE)
    message = str(caught.value)
    assert os.strerror(code) in message
    assert "s-0000" in message
    assert "run the same command again: finished slides stay" in message
    assert ("free some space" in message) == (code == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_file_size_is_told_when_buffers_are_written(tmp_path: Path) -> None:
    """The kernel itself refuses, at a moment of its choosing: inside a write or at the close."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for tile_bytes in (70_000, 3_000_000):
            with pytest.raises(DataError, match="a shard cannot be written"):
                write(tmp_path, [(f"a_{x}_0.jpg", bytes(tile_bytes)) for x in range(2)])
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a shard cannot be written"):
        write(tmp_path / "file", [("a_0_0.jpg", b"x")])


def test_keys_have_no_dot_and_stay_apart() -> None:
    assert slide_key("CMU-1-Small_Region") == "CMU-1-Small_Region"
    names = ["a.b", "a-b", "a/b", "a b", "ä", "a" * 65, "a" * 66, "a\udce9"]
    keys = [slide_key(name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert key.isascii()
        assert "." not in key
        assert "/" not in key
        assert len(key) <= 64


# ------------------------------------------------------------------ reading


def test_a_short_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert read_member(descriptor, 512, 488) == bytes(488)
        with pytest.raises(UnreadableTileError, match="488 bytes"):
            read_member(descriptor, 512, 489)
    finally:
        os.close(descriptor)
    with pytest.raises(UnreadableTileError, match="cannot be read"):
        read_member(descriptor, 0, 1)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors as Linux shows them")
def test_descriptors_are_bounded_and_given_back(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 10)
    before = _open_descriptors()
    opened = OpenShards(tmp_path, most=3)
    for _ in range(2):
        for number in range(20):
            assert opened.read(str(number), 2, 5) == bytes([number]) * 5
            assert _open_descriptors() <= before + 3
    with pytest.raises(UnreadableTileError, match=r"a shard is missing[^$]*nowhere"):
        opened.read("nowhere", 0, 1)
    del opened
    assert _open_descriptors() == before


def test_threads_never_read_from_a_shard_that_was_put_out_under_them(tmp_path: Path) -> None:
    count, size = 12, 3000
    for number in range(count):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * size)
    opened = OpenShards(tmp_path, most=1)
    start = threading.Barrier(6)

    def work(seed: int) -> bool:
        start.wait()
        picks = np.random.default_rng(seed).integers(0, count, 400)
        return all(opened.read(str(pick), 0, size) == bytes([pick]) * size for pick in picks)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors as Linux shows them")
def test_too_many_open_files_concern_all_tiles_and_are_no_unreadable_tile(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"1234")
    opened = OpenShards(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(tmp_path / "0", os.O_RDONLY))
        with pytest.raises(DataError, match="ulimit") as caught:
            opened.read("0", 0, 1)
        assert not isinstance(caught.value, UnreadableTileError)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
