"""Frozen dataclasses <-> command line <-> JSON. The only module that knows tyro."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from histill import files
from histill.errors import ConfigError, nearest

__all__ = ["from_dict", "load", "parse", "save", "to_dict"]

T = TypeVar("T")


def parse(config_class: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Read a config from the command line; a wrong option prints the nearest ones and exits with status 2.

    Parameters
    ----------
    config_class
        A frozen dataclass; nested dataclasses become ``--group.field`` options.
    argv
        The arguments, without the program's name.
    prog, description
        For ``--help``.
    default
        An instance whose values are the defaults (a preset).
    """
    import tyro

    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        config_class,
        args=list(argv),
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
        **kwargs,
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values (paths as text, tuples as lists)."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def from_dict(config_class: type[T], values: dict[str, Any], *, where: str = "config") -> T:
    """Build a config from JSON values; an unknown key or a value of a wrong type is an error.

    Raises
    ------
    ConfigError
        With the field's full name, what was got and what is allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"unknown key '{key}'", where=where, allowed=", ".join(fields), remedy=nearest(key, fields)
            )
    built = {key: _build(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in built
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key{'s' * (len(missing) > 1)} {', '.join(missing)}", where=where)
    return config_class(**built)


def _build(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError("a group of settings is needed here", where=where, got=repr(value))
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        options = [option for option in get_args(hint) if option is not type(None)]
        errors: list[ConfigError] = []
        for option in options:
            try:
                return _build(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError("a value that is not offered", where=where, got=repr(value), allowed=get_args(hint))
        return value
    if origin is tuple:
        inner = get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError("a list is needed here", where=where, got=repr(value))
        return tuple(_build(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise ConfigError("a value of a wrong type", where=where, got=repr(value), allowed=hint.__name__)
    return value


def save(config: Any, path: Path) -> None:
    """Write a config as JSON, atomically."""
    files.write_json(path, to_dict(config))


def load(config_class: type[T], path: Path) -> T:
    """Read a config that :func:`save` wrote."""
    try:
        values = files.read_json(path)
    except FileNotFoundError:
        raise ConfigError("this config file does not exist", where=path) from None
    except ValueError as error:
        raise ConfigError("this config file is not valid JSON", where=path, got=error) from None
    if not isinstance(values, dict):
        raise ConfigError("a config file holds one JSON object", where=path, got=type(values).__name__)
    return from_dict(config_class, values, where=str(path))
