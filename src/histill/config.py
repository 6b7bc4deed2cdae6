"""Frozen dataclasses <-> command line <-> JSON. The only module that knows tyro."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from histill import files
from histill.errors import ConfigError, nearest

__all__ = ["from_dict", "load", "parse", "save", "to_dict"]

T = TypeVar("T")


def parse(
    config_class: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    flags: bool = False,
) -> T:
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
    flags
        Write a switch as ``--name`` and ``--no-name`` (otherwise as ``--name True``), and take fields without a
        default from the positional arguments.

    Raises
    ------
    SystemExit
        Status 2 for a wrong option or value, 0 after ``--help``.
    ConfigError
        For a number that JSON cannot hold (NaN, infinity): the run's ``config.json`` must be able to repeat it.
    """
    import tyro

    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    parsed = tyro.cli(
        config_class,
        args=_joined(config_class, argv),
        prog=prog,
        description=description,
        config=(tyro.conf.PositionalRequiredArgs,) if flags else (tyro.conf.FlagConversionOff,),
        **kwargs,
    )
    return from_dict(config_class, to_dict(parsed), where="command line")


def _joined(config_class: type[Any], argv: Sequence[str]) -> list[str]:
    """Gather the values of a list option that comes several times, in the singular or the plural, into one option."""
    spelled: dict[str, str] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        if get_origin(hint) is tuple and get_args(hint)[1:] == (Ellipsis,):
            option, singular = "--" + name.replace("_", "-"), "--" + name.removesuffix("s").replace("_", "-")
            spelled |= {option: option, singular: option, f"{singular}s": option}
    others: list[str] = []
    gathered: dict[str, list[str]] = {}
    values = others
    for argument in argv:
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") in spelled:
            values = gathered.setdefault(spelled[option.replace("_", "-")], [])
            values += [value] if equals else []
        elif argument.startswith("--"):
            values = others
            others.append(argument)
        else:
            values.append(argument)
    return [*others, *(text for option, given in gathered.items() for text in (option, *given))]


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into JSON-ready values: paths as text, tuples as lists."""
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

    Parameters
    ----------
    config_class
        A frozen dataclass; the fields' type hints decide what is taken.
    values
        Field -> JSON value (None, bool, number, text, list, dict), as :func:`to_dict` makes them. A field that is
        absent keeps its default.
    where
        Start of the fields' names in an error.

    Returns
    -------
    config_class
        An instance: text has become paths, lists tuples, dicts dataclasses, and whole numbers floats where a float is
        due.

    Raises
    ------
    ConfigError
        An unknown or missing key, a wrong type, a value that is not offered, a number that is not finite, or what the
        class itself refuses; with the field's full name, what was got and what is allowed.
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
        if name not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key{'s' * (len(missing) > 1)} {', '.join(missing)}", where=where)
    return config_class(**built)


def _build(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against the type ``hint`` of its field, and make paths, tuples, groups and floats of it."""
    origin, options = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError("a group of settings is needed here", where=where, got=repr(value))
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin in (Union, types.UnionType):
        return _build_union(options, value, where)
    if origin is Literal:
        # by type too, since True == 1 == 1.0
        if not any(type(value) is type(option) and value == option for option in options):
            offered = ", ".join(map(str, options))
            remedy = nearest(value, map(str, options)) if isinstance(value, str) else None
            raise ConfigError(
                "a value that is not offered", where=where, got=repr(value), allowed=offered, remedy=remedy
            )
        return value
    if origin is tuple:
        return _build_tuple(options, value, where)
    assert isinstance(hint, type), f"{where}: a config field cannot have the type {hint}"
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise ConfigError("a value of a wrong type", where=where, got=repr(value), allowed=_name(hint))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("a number that is not finite", where=where, got=value, allowed="a finite float")
    return value


def _build_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Build by the first option that takes the value as it is; an int becomes a float only when no option is int."""
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    kinds.sort(key=lambda option: option is not type(value))
    errors: list[ConfigError] = []
    for option in kinds:
        try:
            return _build(option, value, where)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError("a value of a wrong type", where=where, got=repr(value), allowed=" or ".join(map(_name, options)))


def _build_tuple(options: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError("a list is needed here", where=where, got=repr(value))
    if len(options) == 2 and options[1] is Ellipsis:
        options = (options[0],) * len(value)
    if len(options) != len(value):
        raise ConfigError(
            "a list of a wrong length", where=where, got=f"{len(value)} values", allowed=f"{len(options)} values"
        )
    return tuple(
        _build(option, item, f"{where}[{index}]")
        for index, (option, item) in enumerate(zip(options, value, strict=True))
    )


def _name(hint: Any) -> str:
    """Name a type as a user reads it."""
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def save(config: Any, path: Path) -> None:
    """Write a config as JSON, atomically."""
    files.write_json(path, to_dict(config))


def load(config_class: type[T], path: Path) -> T:
    """Read a config that :func:`save` wrote.

    Raises
    ------
    ConfigError
        When the file is absent, unreadable, not JSON, or not of this config's shape.
    """
    try:
        values = files.read_json(path)
    except FileNotFoundError:
        raise ConfigError("this config file does not exist", where=path) from None
    except OSError as error:
        raise ConfigError("this config file cannot be read", where=path, got=error.strerror) from None
    except ValueError as error:
        raise ConfigError("this config file is not valid JSON", where=path, got=error) from None
    if not isinstance(values, dict):
        raise ConfigError("a config file holds one JSON object", where=path, got=type(values).__name__)
    return from_dict(config_class, values, where=f"{path}: config")
