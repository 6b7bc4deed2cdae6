"""Which slides a command means, and what is told of each beside its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from histill.errors import ConfigError, RunError, nearest
from histill.slides.find import SlideFile, find_slides
from histill.slides.scale import read_overrides
from histill.tiles.config import TileConfig
from histill.tiles.cutting import SlideJob, mask_name
from histill.tiles.folder import SlideRecord
from histill.tiles.images import read_table

__all__ = ["jobs_of", "refuse_changes"]

_MASK_SUFFIXES = (".geojson", ".png")


def jobs_of(config: TileConfig) -> list[SlideJob]:
    """The slides of a command, sorted by id; with ``--shard i/n`` every n-th.

    Raises
    ------
    ConfigError, DataError
        A slide, table or mask folder that is missing, or a table that names a slide that is not there.
    """
    found = find_slides(config.slides)
    ids = [slide.id for slide in found]
    ids_by_name = _ids_by_name(found)
    overrides, everywhere = _overrides(config, ids_by_name)
    patients = _patients(config.patients, ids_by_name)
    masks = _masks(config.masks, ids)
    number, count = config.shard_of()
    return [
        SlideJob(
            id=slide.id,
            path=slide.path.resolve(),
            config=config,
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


def _overrides(config: TileConfig, ids_by_name: dict[str, str]) -> tuple[dict[str, float], float | None]:
    """Slide -> mpp, and the mpp of all slides."""
    told = config.mpp_override
    if told is None:
        return {}, None
    try:
        return {}, float(told)
    except ValueError:
        pass
    overrides = read_overrides(Path(told))
    _refuse_strangers(list(overrides), ids_by_name, f"--mpp-override {told}")
    return {ids_by_name[name]: mpp for name, mpp in overrides.items() if name in ids_by_name}, None


def _patients(table: Path | None, ids_by_name: dict[str, str]) -> dict[str, str]:
    if table is None:
        return {}
    rows = read_table(table, ["slide", "patient"])
    patients: dict[str, str] = {}
    for row in rows:
        if patients.setdefault(row["slide"], row["patient"]) != row["patient"]:
            raise ConfigError("a slide has two patients", where=table, got=row["slide"])
    _refuse_strangers(list(patients), ids_by_name, f"--patients {table}")
    return {ids_by_name[name]: patient for name, patient in patients.items() if name in ids_by_name}


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


def _refuse_strangers(named: list[str], ids_by_name: dict[str, str], where: str) -> None:
    """A table may be of a whole collection; one that names none of the slides is the wrong one, or misspelt."""
    strangers = [name for name in named if name not in ids_by_name]
    if strangers and len(strangers) == len(named):
        ids = sorted(set(ids_by_name.values()))
        raise ConfigError(
            "no slide of this table is among the given ones",
            where=where,
            got=", ".join(strangers[:5]),
            allowed=", ".join(ids[:5]) + (" ..." if len(ids) > 5 else ""),
            remedy=nearest(strangers[0], ids),
        )


def refuse_changes(job: SlideJob, record: SlideRecord) -> None:
    """A finished slide must still be what it was.

    Raises
    ------
    RunError
        Its file, its scale, its mask or its patient changed since its tiles were cut.
    """
    wanted: list[tuple[str, object, object]] = [
        ("patient", job.patient, record.patient),
        ("mask", mask_name(job.mask) if job.mask else "otsu", record.mask),
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
                f"slide {job.id} was tiled with another {name}",
                got=f"{then} then, {now} now",
                remedy=f"give another --out, or delete parts/{job.id}.json there to cut this slide again",
            )
