"""Which slides a command means, and what is told of each beside its file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from histill.errors import ConfigError, RunError, nearest
from histill.slides.find import SlideFile, find_slides
from histill.slides.scale import read_overrides
from histill.tiles.config import TileConfig
from histill.tiles.cutting import SlideJob, mask_name
from histill.tiles.folder import SlideRecord
from histill.tiles.images import read_table

__all__ = ["jobs_of", "refuse_changes"]

T = TypeVar("T")

_MASK_SUFFIXES = (".geojson", ".png")


def jobs_of(config: TileConfig, console: Console) -> list[SlideJob]:
    """The slides of a command, sorted by id; with ``--shard i/n`` every n-th.

    Raises
    ------
    ConfigError, DataError
        A slide, table or mask folder that is missing, or a table that names a slide that is not there.
    """
    found = find_slides(config.slides)
    ids = [slide.id for slide in found]
    ids_by_name = _ids_by_name(found)
    overrides, everywhere = _overrides(config, ids_by_name, console)
    patients = _patients(config.patients, ids_by_name, console)
    masks = _masks(config.masks, ids)
    number, count = config.shard_of()
    shared = dataclasses.replace(config, slides=())  # thousands of paths would travel with every cell
    return [
        SlideJob(
            id=slide.id,
            path=slide.path.absolute(),  # not resolved: files of a series lie beside the link
            config=shared,
            override_mpp=overrides.get(slide.id, everywhere),
            mask=masks.get(slide.id),
            patient=patients.get(slide.id),
        )
        for slide in found[number::count]
    ]


def _ids_by_name(found: Sequence[SlideFile]) -> dict[str, str]:
    """What a table may call a slide -> its id: the id itself, or the file's name where only one slide has it."""
    names = Counter(slide.path.name for slide in found)
    by_file = {slide.path.name: slide.id for slide in found if names[slide.path.name] == 1}
    return by_file | {slide.id: slide.id for slide in found}


def _overrides(
    config: TileConfig, ids_by_name: dict[str, str], console: Console
) -> tuple[dict[str, float], float | None]:
    """Slide -> mpp, and the mpp of all slides."""
    told = config.mpp_override
    if told is None:
        return {}, None
    try:
        return {}, float(told)
    except ValueError:
        pass
    overrides = read_overrides(Path(told))
    return _by_slide(overrides, ids_by_name, f"--mpp-override {told}", console), None


def _patients(table: Path | None, ids_by_name: dict[str, str], console: Console) -> dict[str, str]:
    if table is None:
        return {}
    rows = read_table(table, ["slide", "patient"])
    patients: dict[str, str] = {}
    for row in rows:
        if patients.setdefault(row["slide"], row["patient"]) != row["patient"]:
            raise ConfigError("a slide has two patients", where=table, got=row["slide"])
    return _by_slide(patients, ids_by_name, f"--patients {table}", console)


def _masks(folder: Path | None, ids: list[str]) -> dict[str, Path]:
    """Slide -> its mask; in a folder of masks every slide needs one."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError("the folder of masks does not exist", where="--masks", got=folder)
    masks, missing = {}, []
    for slide in ids:
        there = [folder / f"{slide}{suffix}" for suffix in _MASK_SUFFIXES if (folder / f"{slide}{suffix}").is_file()]
        if len(there) > 1:
            raise ConfigError("a slide has two masks", where=folder, got=" and ".join(path.name for path in there))
        if there:
            masks[slide] = there[0]
        else:
            missing.append(slide)
    if missing:
        raise ConfigError(
            "slides without a mask",
            where=folder,
            got=", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            allowed=" or ".join(f"<slide>{suffix}" for suffix in _MASK_SUFFIXES),
            remedy="add them, or tile these slides into a set of their own without --masks",
        )
    return masks


def _by_slide(table: dict[str, T], ids_by_name: dict[str, str], where: str, console: Console) -> dict[str, T]:
    """A table's values by slide id.

    A table may be of a whole collection: names of other slides are counted aloud. One that names none of the slides is
    the wrong one, or misspelt.
    """
    found: dict[str, T] = {}
    strangers = [name for name in table if name not in ids_by_name]
    for name, value in table.items():
        slide = ids_by_name.get(name)
        if slide is not None and found.setdefault(slide, value) != value:
            raise ConfigError("a slide is named twice, with two values", where=where, got=f"{slide}: {value}")
    if not found:
        ids = sorted(set(ids_by_name.values()))
        raise ConfigError(
            "no slide of this table is among the given ones",
            where=where,
            got=", ".join(strangers[:5]),
            allowed=", ".join(ids[:5]) + (" ..." if len(ids) > 5 else ""),
            remedy=nearest(strangers[0], ids) if strangers else None,
        )
    if strangers:
        console.print(
            f"{where}: {len(strangers)} rows are of other slides, such as {strangers[0]}", highlight=False, markup=False
        )
    return found


def refuse_changes(job: SlideJob, record: SlideRecord) -> None:
    """A finished slide must still be what it was.

    Raises
    ------
    RunError
        Its file, its scale, its mask or its patient changed since its tiles were cut.
    """
    settled_by = job.coords or job.mask
    wanted: list[tuple[str, object, object]] = [
        ("patient", job.patient, record.patient),
        ("mask or coordinates", mask_name(settled_by) if settled_by else "otsu", record.mask),
    ]
    if job.override_mpp is not None:
        wanted.append(("mpp", job.override_mpp, record.mpp))
    elif record.mpp_source == "override":
        wanted.append(("mpp override", None, record.mpp))
    if job.path.is_file():
        wanted.append(("size in bytes", job.path.stat().st_size, record.slide_bytes))
    for name, now, then in wanted:
        if now != then:
            raise RunError(
                f"slide {job.id} was done with another {name}",
                got=f"{then} then, {now} now",
                remedy=f"give another --out, or delete parts/{job.id}.json there to do this slide again",
            )
