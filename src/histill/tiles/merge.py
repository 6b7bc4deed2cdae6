"""Put tile sets of the same settings together: the parts of a job array that each had a folder of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from histill import files
from histill.errors import RunError
from histill.tiles.folder import SetFolder, SlideRecord
from histill.tiles.write import finish

__all__ = ["merge_sets"]


def merge_sets(sources: Sequence[Path], out: Path) -> list[SlideRecord]:
    """Bring all finished slides of some sets into one; the sources stay as they are.

    Shards are hard links where both folders lie on one disk, else copies. The same command again brings only what is
    missing. Of a slide that failed in one set and is finished in another, the finished one is taken.

    Raises
    ------
    RunError
        A source is no tile set, the settings differ, or two sets hold different tiles of the same slide.
    """
    folder = SetFolder(out)
    parts = [SetFolder(source) for source in sources]
    settings = [source.settings() for source in parts]
    with folder.writing():
        folder.root.mkdir(parents=True, exist_ok=True)
        for told in settings:
            folder.claim(told)
    for source in parts:
        for record in source.records():
            with folder.taken(record.slide) as work:
                if work is None:
                    raise RunError("another process works on this slide", where=folder.root, got=record.slide)
                _bring(record, source, folder, work)
    finish(folder)
    return folder.records()


def _bring(record: SlideRecord, source: SetFolder, folder: SetFolder, work: Path) -> None:
    slide = record.slide
    if folder.is_done(slide):
        if record.status == "done" and not _same(source.rows(slide), folder.rows(slide)):
            raise RunError(
                "two sets hold different tiles of one slide",
                where=f"{source.root} and {folder.root}",
                got=slide,
                remedy="merge sets of different slides, or cut the slide with the same scale and mask",
            )
        return
    folder.forget(slide)
    wanted = [(source.record(slide), folder.record(slide))]  # last: it makes the slide finished
    if record.status == "done":
        shards = [(source.shards / name, folder.shards / name) for name in record.shards]
        others = [(part.rows(slide), part.thumbnail(slide)) for part in (source, folder)]
        wanted = [*shards, *zip(*others, strict=True), *wanted]
    for number, (there, here) in enumerate(wanted):
        _link(there, work / str(number))
        folder.place(work / str(number), here)


def _same(one: Path, other: Path) -> bool:
    return files.sha256_file(one) == files.sha256_file(other)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
