"""Where a model comes from: a name of the table, ``timm:``, ``hf-hub:`` or ``local-dir:``, understood and built.

A name that could mean two things, a folder without weights, weights that do not fit: each is an error that names
the file. Building is timm's work; ``transformers`` serves the few models that exist only there.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from histill import files
from histill.errors import MissingExtraError, ModelError, nearest
from histill.models.teachers import TEACHERS, TeacherSpec

__all__ = ["Source", "build", "build_empty", "read_config", "read_record", "record_of", "resolve"]

Prefix = Literal["timm", "hf-hub", "local-dir"]
PREFIXES: tuple[Prefix, ...] = ("timm", "hf-hub", "local-dir")
TOKEN_MODULES = ("vision_transformer", "eva")  # timm's plain transformers: class token, registers, patches in order
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model's name, understood."""

    prefix: Prefix
    """The place."""
    target: str
    """A timm name, ``ORG/NAME`` or a folder."""
    spec: TeacherSpec | None = None
    """The row of the table, if it has one."""


def build(source: Source, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the model of a source and load its weights, strictly; the errors are those of ``load_encoder``."""
    if source.spec is not None and source.spec.loader == "transformers":
        return _from_transformers(source.spec, trust_remote_code=trust_remote_code)
    if source.prefix == "local-dir":
        return _from_folder(Path(source.target))
    return _from_timm(source)


def build_empty(source: Source) -> nn.Module:
    """Build the model of a source without weights, on torch's ``meta`` device: only shapes, nothing is fetched.

    Raises
    ------
    ModelError
        When the architecture stands only in the model's hub repository.
    """
    spec = source.spec
    if source.prefix == "local-dir":
        config = read_config(Path(source.target))
        architecture, model_args = config["architecture"], dict(config.get("model_args") or {})
    elif spec is not None and spec.architecture is not None:
        architecture, model_args = spec.architecture, _with_classes(spec.model_args)
    elif source.prefix == "timm":
        architecture, model_args = source.target, {}
    else:
        raise ModelError(
            "the architecture of this model is known only once it is downloaded",
            got=f"{source.prefix}:{source.target}",
            allowed="a teacher of the table with timm's architecture, timm:NAME or local-dir:FOLDER",
        )
    model_args |= {"num_classes": 0, "dynamic_img_size": True}
    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, pretrained=False, **model_args)
    return model


def resolve(name: str) -> Source:
    """Understand a name, or raise a ModelError that says which spellings would do."""
    prefix, colon, target = name.partition(":")
    if colon and prefix in PREFIXES and target:
        return _resolve_prefixed(prefix, target)
    folder = Path(name).expanduser()
    if colon and not folder.is_dir():
        raise ModelError(
            "this model name has an unknown prefix, or nothing after it",
            got=repr(name),
            allowed=", ".join(f"{known}:..." for known in PREFIXES),
            remedy=nearest(prefix, PREFIXES),
        )
    spec = TEACHERS.get(name)
    if spec and (folder / "config.json").is_file():
        raise ModelError(
            "this name means a known teacher and also a folder that is here",
            got=repr(name),
            allowed=f"{spec.source} or local-dir:{name}",
        )
    if spec:
        return resolve(spec.source)
    if folder.is_dir():
        return Source(prefix="local-dir", target=str(folder))
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        raise ModelError(
            "this name could mean a hub repository or a folder, and there is no such folder here",
            got=repr(name),
            allowed=f"hf-hub:{name} or local-dir:{name}",
        )
    if "/" in name:
        raise ModelError("this model folder does not exist", where=folder)
    if timm.is_model(name):
        raise ModelError("a model of timm is asked for with its prefix", got=repr(name), allowed=f"timm:{name}")
    raise ModelError(
        "there is no model of this name",
        got=repr(name),
        allowed="a name that `histill models` lists, timm:NAME, hf-hub:ORG/NAME or local-dir:FOLDER",
        remedy=nearest(name.lower(), TEACHERS),
    )


def _resolve_prefixed(prefix: Prefix, target: str) -> Source:
    if prefix == "local-dir":
        return Source(prefix=prefix, target=str(Path(target).expanduser()))
    if prefix == "hf-hub" and target.count("/") != 1:
        raise ModelError("a hub model has an owner and a name", got=f"hf-hub:{target}", allowed="hf-hub:ORG/NAME")
    if prefix == "timm" and not timm.is_model(target):
        known = nearest(target, [*timm.list_models(), *timm.list_pretrained()])
        raise ModelError("timm has no such model", got=f"timm:{target}", remedy=known)
    wanted = f"{prefix}:{target}".lower()
    spec = next((spec for spec in TEACHERS.values() if spec.source.lower() == wanted), None)
    return Source(prefix=prefix, target=target, spec=spec)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the timm description ``config.json`` of a model folder.

    Raises
    ------
    ModelError
        If the folder or the file is missing, is not JSON, or describes no timm model.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError("this model folder does not exist", where=folder)
    if not path.is_file():
        exported = (folder / "export.json").is_file()
        raise ModelError(
            "this folder holds no model: it has no config.json",
            where=folder,
            remedy="it is an export: open it with histill.open_engine, or give the bundle" if exported else None,
        )
    config = _read_object(path)
    if not isinstance(config.get("architecture"), str):
        inner = folder / "student"
        raise ModelError(
            "this file describes no timm model: it has no architecture",
            where=path,
            remedy=f"use local-dir:{inner}" if (inner / "config.json").is_file() else None,
        )
    cfg = config.get("pretrained_cfg", config)
    for key in ("mean", "std", "input_size"):
        if not isinstance(cfg, dict) or not _three_numbers(cfg.get(key)):
            raise ModelError(f"this model description lacks {key}", where=path, allowed="three numbers")
    return config


def _three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(number, int | float) for number in value)


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``histill.json`` of a bundle, {} for a plain timm folder; a damaged file is a ModelError."""
    path = folder / "histill.json"
    if not path.is_file():
        return {}
    record = _read_object(path)
    if record.get("embedding", "cls") not in ("cls", "cls+mean"):
        raise ModelError(
            "this file is damaged: unknown embedding", where=path, got=record["embedding"], allowed="cls, cls+mean"
        )
    for name, holds in (("mean", _three_numbers), ("std", _three_numbers), ("mpp", _scales)):
        if record.get(name) is not None and not holds(record[name]):
            raise ModelError(f"this file is damaged: {name} is not what it should be", where=path, got=record[name])
    return record


def record_of(source: Source) -> dict[str, Any]:
    """What ``histill.json`` says of a model, in its folder or its hub repository; {} where there is none.

    Raises
    ------
    ModelError
        The file is damaged.
    """
    if source.prefix == "local-dir":
        return read_record(Path(source.target))
    if source.prefix != "hf-hub" or source.spec is not None:
        return {}
    try:
        return read_record(Path(hf_hub_download(source.target, "histill.json")).parent)
    except LocalEntryNotFoundError:  # the hub cannot be asked, and nothing was kept from an earlier time
        warnings.warn(
            f"hf-hub:{source.target}: the hub cannot be asked for histill.json; without it the embedding is taken to "
            "be the class token, and the scale to be unknown",
            stacklevel=2,
        )
        return {}
    except EntryNotFoundError:
        return {}
    except HfHubHTTPError as error:  # gated and missing repositories among them
        raise ModelError("the hub refused this model", where=source.target, got=_first_line(error)) from None


def _scales(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and number > 0 for number in values
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = files.read_json(path)
    except ValueError as error:
        raise ModelError("this file is damaged: not valid JSON", where=path, got=_first_line(error)) from None
    if not isinstance(value, dict):
        raise ModelError("this file is damaged: it holds no JSON object", where=path, got=type(value).__name__)
    return value


def _need_tokens(architecture: str, where: object) -> None:
    """Refuse what timm does not know, and what is no plain vision transformer."""
    if not timm.is_model(architecture):
        raise ModelError(
            "the installed timm has no such architecture",
            where=where,
            got=architecture,
            remedy=nearest(architecture, timm.list_models()) or "update timm",
        )
    if not timm.models.is_model_in_modules(architecture, TOKEN_MODULES):
        raise ModelError(
            "histill reads the tokens of plain vision transformers, and this is another architecture",
            where=where,
            got=architecture,
            allowed="a VisionTransformer or Eva of timm",
        )


def _from_folder(folder: Path) -> nn.Module:
    """Build from a timm folder."""
    config = read_config(folder)
    _need_tokens(config["architecture"], folder / "config.json")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ModelError("this model folder holds no weights", where=folder, allowed=" or ".join(WEIGHTS))
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError("this weights file is damaged", where=weights, got=_first_line(error)) from None
    try:
        model: nn.Module = timm.create_model(
            f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True
        )
    except Exception as error:  # timm raises whatever its architectures raise
        raise ModelError(
            "these weights do not fit the architecture that config.json describes",
            where=weights,
            got=_first_line(error),
        ) from error
    return model


def _from_timm(source: Source) -> nn.Module:
    """Build from the hub or from timm's own table; timm fetches and loads the weights."""
    where = f"{source.prefix}:{source.target}"
    try:
        name, extra = _timm_request(source, where)
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True, **extra)
    except ModelError:
        raise
    except GatedRepoError:
        raise ModelError(
            "the hub gives this model only to those who accepted its terms",
            where=f"https://huggingface.co/{source.target}",
            remedy="accept the terms on that page, then log in with `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            "the hub has no such model, or hides it from you", where=where, remedy="check the name; `hf auth login`"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError("the weights could not be fetched", where=where, got=_first_line(error)) from error
    except Exception as error:  # timm raises whatever its architectures raise
        raise ModelError("timm could not build this model", where=where, got=_first_line(error)) from error
    return model


def _timm_request(source: Source, where: str) -> tuple[str, dict[str, Any]]:
    """Name and further arguments for ``timm.create_model``."""
    spec = source.spec
    extra = _with_classes(spec.model_args) if spec else {}
    if spec and spec.weights_file:
        # no timm config beside the checkpoint: the table says what it is, and timm converts DINOv2's own format
        assert spec.architecture is not None
        extra["pretrained_cfg_overlay"] = {
            "hf_hub_id": source.target,
            "hf_hub_filename": spec.weights_file,
            "url": None,
        }
        return spec.architecture, extra
    if source.prefix == "hf-hub":
        try:
            _, architecture, _ = timm.models.load_model_config_from_hf(source.target)
        except KeyError:
            raise ModelError("this hub repository holds no timm model", where=where) from None
        _need_tokens(architecture, where)
        return where, extra
    _need_tokens(source.target, where)
    cfg = timm.get_pretrained_cfg(source.target)
    if cfg is None or not cfg.has_weights:
        known = nearest(source.target, timm.list_pretrained())
        raise ModelError("timm has no pretrained weights under this name", got=where, remedy=known)
    return source.target, extra


def _with_classes(model_args: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of layer classes by the classes."""
    places: dict[str, Any] = {"mlp_layer": timm.layers, "act_layer": nn}
    return {key: getattr(places[key], value) if key in places else value for key, value in model_args.items()}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


class _PatchSize(nn.Module):
    def __init__(self, patch_px: int) -> None:
        super().__init__()
        self.patch_size = (patch_px, patch_px)


class _FromTransformers(nn.Module):
    """A DINOv2 of ``transformers`` with the interface that ``tokens_of`` reads."""

    def __init__(self, inner: nn.Module, spec: TeacherSpec) -> None:
        super().__init__()
        self.inner = inner
        self.num_prefix_tokens = spec.prefix_tokens
        self.num_features = spec.embed_dim
        self.patch_embed = _PatchSize(spec.patch_px)

    def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """All tokens after the last norm, (B, N, D)."""
        tokens_BND: torch.Tensor = self.inner(pixel_values=images_BCHW).last_hidden_state
        return tokens_BND


def _from_transformers(spec: TeacherSpec, *, trust_remote_code: bool) -> nn.Module:
    """Build through ``transformers.AutoModel``, and check that it is what the table says."""
    if spec.remote_code and not trust_remote_code:
        raise ModelError(
            "this teacher runs Python code from its hub repository, which needs your consent",
            where=f"https://huggingface.co/{spec.source.partition(':')[2]}",
            remedy="read that code, then give trust_remote_code=True (histill distill: --trust-remote-code True)",
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(
            f"{spec.name} exists only for the library transformers", remedy="pip install 'histill[hf]'"
        ) from None
    target = spec.source.partition(":")[2]
    try:
        inner = transformers.AutoModel.from_pretrained(target, trust_remote_code=spec.remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            "this teacher could not be loaded",
            where=f"https://huggingface.co/{target}",
            got=_first_line(error),
            remedy="accept its terms if it has any, then log in with `hf auth login`",
        ) from error
    got = {"embed_dim": inner.config.hidden_size, "patch_px": inner.config.patch_size}
    promised = {"embed_dim": spec.embed_dim, "patch_px": spec.patch_px}
    if got != promised:
        raise ModelError("the hub's model is not the one of the table", where=spec.source, got=got, allowed=promised)
    return _FromTransformers(inner, spec)
