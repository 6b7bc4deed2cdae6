"""``histill export --to hub``: a folder as the Hugging Face hub shows it, and the upload when it is asked for.

What is private stays at home: paths of this machine and names of slides are taken out of the provenance.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from histill import files
from histill.errors import ConfigError, ModelError
from histill.export.config import ExportConfig
from histill.export.run import refuse_to_replace
from histill.models.bundle import read_bundle
from histill.models.card import licence_notices, model_card, teachers_of, with_benchmarks
from histill.models.sources import read_config, read_record

__all__ = ["export_to_hub", "hub_card", "public_record"]

_RECORD = "histill.json"
_MARK = "hub_folder"
_PATHS = ("tiles", "table", "tables", "out", "labelled", "head_checkpoint", "init")
"""Settings of a training that are, or hold, paths of its machine."""

_NO_BENCHMARKS = """## Benchmarks

No benchmark was run on these weights with `histill evaluate`. Metrics above, if any, are checks of the training run.
"""


def export_to_hub(config: ExportConfig, console: Console) -> str:
    """Write the folder, and upload it with ``--push``.

    Returns
    -------
    str
        What was made, for the user.

    Raises
    ------
    ModelError
        The bundle has no provenance, its weights are not those that its metrics belong to, or its licence stands
        against ``--push``.
    ConfigError
        A place that is taken; no token, or a hub that cannot be reached.
    """
    assert config.out is not None
    refuse_to_replace(config.out, older=config.out.is_dir() and _made_by_us(config.out))
    if config.out.resolve() == config.bundle.resolve():
        raise ConfigError("the hub folder would replace the bundle", where="--out", remedy="give another folder")
    bundle = read_bundle(config.bundle)
    if not bundle.provenance:
        raise ModelError(
            "this folder is no bundle of histill: it has no histill.json, and a card could say nothing of its origin",
            where=config.bundle,
        )
    stated, found = bundle.provenance.get("content_hash"), bundle.encoder.content_hash()
    if stated != found:
        raise ModelError(
            "these weights are not those that histill.json describes", where=config.bundle, got=found, allowed=stated
        )
    record = public_record(bundle.provenance)
    if config.push is not None:
        _refuse_push(record, config.push)
    name = config.push.partition("/")[2] if config.push else config.out.resolve().name
    described = read_config(config.bundle)
    if record["licence"] is not None:
        described.setdefault("pretrained_cfg", {})["license"] = record["licence"]
    with files.atomic_folder(config.out) as folder:
        shutil.copyfile(config.bundle / "model.safetensors", folder / "model.safetensors")
        files.write_json(folder / "config.json", described)
        files.write_json(folder / _RECORD, record | {_MARK: True})
        files.write_text(folder / "README.md", hub_card(name, described, record))
    notice = licence_notices(record)
    if notice:
        console.print(notice)
    if config.push is None:
        return f"hub folder: {config.out}"
    return f"hub folder: {config.out}\nuploaded: {_push(config.out, config.push)}"


def _made_by_us(folder: Path) -> bool:
    """Whether a folder is an older result: every bundle has a record, but only this command marks its own."""
    try:
        return read_record(folder).get(_MARK) is True
    except ModelError:
        return False


def public_record(record: dict[str, Any]) -> dict[str, Any]:
    """Take what is private out of a provenance, and let a licence that nobody stated be that of all its teachers.

    Teachers of different licences give none: which of them binds is for a person to say. Paths are
    cut down to their last part, lists of held-out slides to their length.
    """
    shown: dict[str, Any] = _public(record)
    if shown.get("licence") is None:
        licences = {teacher.get("licence") for teacher in teachers_of(shown)}
        shown["licence"] = licences.pop() if len(licences) == 1 else None
    return shown


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: f"{len(each)} slides"
            if key == "hold_out_slides" and isinstance(each, list)
            else _without_folders(each)
            if key in _PATHS
            else _public(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_public(each) for each in value]
    if isinstance(value, str) and not value.startswith(("http://", "https://", "hf-hub:", "timm:")):
        prefix, colon, rest = value.partition(":")
        if prefix == "local-dir" and colon:
            return f"local-dir:{Path(rest).name}"
        if value.startswith(("/", "~", "./", "../")):
            return Path(value).name
    return value


def _without_folders(value: Any) -> Any:
    """Cut paths to their last part, whatever they begin with; what stands after a comma is options."""
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, str) and value:
        path, comma, options = _public(value).partition(",")
        return Path(path).name + comma + options if ":" not in path else path
    return _public(value)


def hub_card(name: str, config: dict[str, Any], record: dict[str, Any]) -> str:
    """Write the full model card: what every bundle's card says, with intended use, limits and training data.

    Parameters
    ----------
    name
        Of the model.
    config, record
        As of :func:`histill.models.card.model_card`, the record as of :func:`public_record`.
    """
    metrics = record.get("metrics")
    rows = metrics.get("benchmarks") if isinstance(metrics, dict) else None
    text = model_card(name, config, record).rstrip() + "\n\n" + _use(record) + _training(record) + _licence(record)
    if rows:
        return with_benchmarks(text, name, rows)
    return f"{text}\n{_NO_BENCHMARKS}"


def _use(record: dict[str, Any]) -> str:
    both = record["embedding"] == "cls+mean"
    what = "class token and mean patch token" if both else "class token"
    mpp = _listed(record.get("mpp"))
    scale = "" if mpp is None else f" at {mpp} microns per pixel"
    return f"""## Intended use

Embeddings ({what}) of H&E tiles{scale}, for research: probes and classifiers on tiles, multiple-instance models on
slides, retrieval, maps of patch tokens. Validate it on your own data, stain and scanner before you rely on a number.

## Limits

- Not a medical device; not for diagnosis, nor for decisions on patients.
- It learnt from a teacher and inherits its blind spots; where the teacher's data are one-sided, so is this model.
- Other stains than those of its training data, other scales (microns per pixel) and other image sizes are untested
  unless a benchmark below says otherwise.
- Embeddings may carry the hospital, scanner and stain besides biology: split your data by patient and by site.

"""


def _training(record: dict[str, Any]) -> str:
    data = record.get("data")
    data = data if isinstance(data, dict) else {}
    config = record.get("config")
    config = config if isinstance(config, dict) else {}
    rows = [("tile set", config.get("tiles")), ("tiles", data.get("tiles")), ("fingerprint", data.get("fingerprint"))]
    rows += [("microns per pixel", _listed(record.get("mpp"))), ("steps", record.get("steps"))]
    students = config.get("student")
    rows.append(("students of the run" if isinstance(students, list) else "student", _listed(students)))
    listed = "\n".join(f"| {key} | {value} |" for key, value in rows if value is not None)
    table = f"| | |\n|---|---|\n{listed}\n" if listed else "Not recorded.\n"
    return f"## Training data\n\n{table}\nThe patients' images are not part of this repository.\n\n"


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _licence(record: dict[str, Any]) -> str:
    teachers = teachers_of(record)
    if not teachers:
        return f"## Licence\n\n{record.get('licence') or 'Not stated.'} No teacher is recorded.\n"
    inherited = all(record.get("licence") == teacher.get("licence") for teacher in teachers)
    how = "inherited from the teacher" if inherited else "chosen by its owner"
    own = f"This model: {record['licence']}, {how}." if record.get("licence") else "This model: not stated."
    of = " ".join(f"The teacher {each.get('name', '?')}: {each.get('licence') or 'unknown'}." for each in teachers)
    notice = licence_notices(record)
    return f"## Licence\n\n{own} {of}\n" + (f"\n{notice}\n" if notice else "")


def _refuse_push(record: dict[str, Any], target: str) -> None:
    """Refuse an upload that a licence may forbid, and one without a token: before anything is written."""
    from huggingface_hub import get_token

    teachers = teachers_of(record)
    if not teachers or any(teacher.get("derivatives") is not True for teacher in teachers):
        raise ModelError(
            "a model whose teacher's licence is not known to allow derived works is not uploaded",
            where=f"--push {target}",
            got=", ".join(str(teacher.get("licence")) for teacher in teachers) or None,
            remedy="leave out --push; with the permission of the teacher's owners, upload the folder with `hf upload`",
        )
    if record["licence"] is None:
        raise ModelError("a model without a licence is not uploaded", where=f"--push {target}")
    if not get_token():
        raise ConfigError(
            "there is no token for the hub",
            where=f"--push {target}",
            remedy="log in with `hf auth login`, or set HF_TOKEN",
        )


def _push(folder: Path, target: str) -> str:
    """Upload a folder; a new repository is private until its owner opens it."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(target, private=True, exist_ok=True)
        done: Any = api.upload_folder(repo_id=target, folder_path=folder, commit_message="Upload by histill export")
    except Exception as error:  # the hub's library passes on what its HTTP client raises, and changes that client
        raise ConfigError(
            "the hub did not take the upload; the folder is complete",
            where=f"--push {target}",
            got=str(error).strip().partition("\n")[0] or type(error).__name__,
            remedy=f"later: hf upload {target} {folder}",
        ) from error
    return str(getattr(done, "commit_url", None) or f"https://huggingface.co/{target}")
