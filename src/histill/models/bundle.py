"""The model bundle: a folder that timm and the Hugging Face hub read as it is, with its provenance.

::

    config.json         architecture, model_args, normalisation, input size: timm's own format
    model.safetensors   the weights, float32
    README.md           the model card
    histill.json        provenance: teacher and its licence, config, data, metrics, versions; what its tiles must be

``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens it without histill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from histill import __version__, files
from histill.errors import ModelError
from histill.models.card import HUB_LICENCES, model_card, with_benchmarks
from histill.models.encoder import Embedding, Encoder, load_encoder, wrap
from histill.models.sources import read_config, read_record

__all__ = ["Bundle", "Described", "read_bundle", "teacher_record", "write_benchmarks", "write_bundle"]


class Described(Protocol):
    """What timm needs to rebuild a model: a ``StudentSpec``, a :class:`Bundle`, or anything alike."""

    @property
    def architecture(self) -> str:
        """Name of the architecture in timm."""

    @property
    def model_args(self) -> dict[str, Any]:
        """Its arguments, ready for JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle that was read."""

    folder: Path
    """Where it stands."""
    encoder: Encoder
    """The model: frozen, in eval mode, float32."""
    provenance: dict[str, Any]
    """The content of ``histill.json``; {} for a plain timm folder."""
    architecture: str
    """timm's name of the architecture."""
    model_args: dict[str, Any]
    """Its arguments."""


def read_bundle(folder: Path, *, device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle, or a plain timm folder.

    Raises
    ------
    ModelError
        Naming the file that is missing, damaged or does not fit the others.
    """
    config = read_config(folder)
    provenance = read_record(folder)
    encoder = load_encoder(f"local-dir:{folder}", device=device)
    return Bundle(
        folder=folder,
        encoder=encoder,
        provenance=provenance,
        architecture=config["architecture"],
        model_args=dict(config.get("model_args", {})),
    )


def teacher_record(encoder: Encoder) -> dict[str, Any]:
    """Say in a student's provenance who its teacher is; None stands for unknown."""
    spec = encoder.spec
    prefix, _, target = encoder.name.partition(":")
    # the card may be published: a local teacher is known by its folder's name, not by its path
    name = spec.name if spec else encoder.name if prefix in ("timm", "hf-hub") else Path(target or prefix).name
    return {
        "name": name,
        "licence": encoder.licence,
        "derivatives": spec.derivatives if spec else _allows_derivatives(encoder.licence),
        "gated": spec.gated if spec else None,
        "source_url": spec.source_url if spec else None,
        "embed_dim": encoder.embed_dim,
        "content_hash": encoder.content_hash(),
    }


def _allows_derivatives(licence: str | None) -> bool | None:
    return True if licence is not None and licence.lower() in HUB_LICENCES else None


def write_bundle(
    folder: Path,
    model: nn.Module,
    student: Described,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    input_px: int,
    provenance: dict[str, Any],
    card: str | None = None,
    embedding: Embedding = "cls",
    licence: str | None = None,
    mpp: float | None = None,
) -> None:
    """Write a bundle, whole or not at all; an older bundle in its place is replaced.

    Parameters
    ----------
    folder
        The new folder.
    model
        The timm model; its weights are stored in float32.
    student
        Architecture and arguments from which timm rebuilds ``model``.
    mean, std
        Normalisation of the RGB channels, images in 0..1.
    input_px
        Side of the tiles that it was made for.
    provenance
        JSON-ready facts. ``teacher`` (see :func:`teacher_record`) and ``metrics`` (name to number) are shown on the
        card; the embedding, licence, content hash, parameter count, normalisation and histill's version are added.
    card
        The text of ``README.md``; written from the provenance if None.
    embedding
        The embedding that the metrics were measured with, and that ``Encoder.embed`` gives from now on.
    licence
        Licence of the new model as an SPDX name; None while its owner has not chosen one.
    mpp
        Microns per pixel of the tiles that it was made for; None: what the provenance says, if anything.

    Raises
    ------
    ModelError
        If ``student`` does not describe ``model``, or ``folder`` holds something that is not a bundle.
    """
    _check_description(model, student)
    _check_place(folder)
    encoder = wrap(model, name=folder.name, mean=mean, std=std, input_px=input_px, embedding=embedding)
    record = provenance | _facts(encoder, licence) | ({} if mpp is None else {"mpp": mpp})
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in model.state_dict().items()
    }
    config = _timm_config(student, encoder, licence)
    text = card if card is not None else model_card(folder.name, config, record)
    with files.atomic_folder(folder) as temporary:
        files.write_json(temporary / "config.json", config)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        files.write_json(temporary / "histill.json", record)
        files.write_text(temporary / "README.md", text)


def _facts(encoder: Encoder, licence: str | None) -> dict[str, Any]:
    """What is added to every provenance."""
    return {
        "format": 1,
        "histill_version": __version__,
        "embedding": encoder.embedding,
        "licence": licence,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "params": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "content_hash": encoder.content_hash(),
    }


def _check_place(folder: Path) -> None:
    """Refuse to replace anything but a model folder: a run has a config.json too."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_config(folder)
    except ModelError:
        raise ModelError(
            "this place holds something that is not a model bundle, and is not overwritten",
            where=folder,
            remedy="choose an empty or a new folder",
        ) from None


def _check_description(model: nn.Module, student: Described) -> None:
    """Compare the model with what timm would build from the description, without memory for its weights."""
    with torch.device("meta"):
        described = timm.create_model(student.architecture, pretrained=False, num_classes=0, **student.model_args)
    shapes = [{name: tuple(tensor.shape) for name, tensor in side.state_dict().items()} for side in (model, described)]
    for name in [*shapes[0], *shapes[1]]:
        if shapes[0].get(name) != shapes[1].get(name):
            raise ModelError(
                "the described architecture is not that of the model",
                where=name,
                got=f"model {shapes[0].get(name, 'has none')}, description {shapes[1].get(name, 'has none')}",
            )


def _timm_config(student: Described, encoder: Encoder, licence: str | None) -> dict[str, Any]:
    """Describe the model in the format of timm's ``local-dir:`` and ``hf-hub:`` models."""
    size = [3, encoder.input_px, encoder.input_px]
    config: dict[str, Any] = {
        "architecture": student.architecture,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "token",
        "model_args": dict(student.model_args),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if licence is not None:
        config["pretrained_cfg"]["license"] = licence
    return config


def write_benchmarks(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put benchmark scores into a bundle: ``metrics.benchmarks`` of ``histill.json``, and its card. Older ones go.

    Parameters
    ----------
    folder
        The bundle. Each of the two files is replaced as a whole; after a kill between them the same call mends it.
    rows
        ``benchmark``, ``data``, ``pooling``, ``score``, ``date``, ``histill`` (text), ``value``, ``low``, ``high``
        (numbers or None) and ``note`` (text or None).

    Raises
    ------
    ModelError
        This is no bundle, or its card is damaged.
    """
    config, record = read_config(folder), read_record(folder)
    if not record:
        raise ModelError("this folder is no bundle of histill: it has no histill.json", where=folder)
    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8") if readme.is_file() else model_card(folder.name, config, record)
        text = with_benchmarks(text, folder.name, rows)
    except ValueError as error:
        raise ModelError("this card cannot be written into", where=readme, got=error) from None
    metrics = dict(record.get("metrics") or {}) | {"benchmarks": list(rows)}
    files.write_json(folder / "histill.json", record | {"metrics": metrics})
    files.write_text(readme, text)
