from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histill import config
from histill.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How the weights move."""

    lr: float = 1e-3
    """Learning rate per 1,024 samples."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    kind: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One loss."""

    name: str
    """Its name."""
    weight: float = 1.0
    """Its weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, with one field of every kind that a config may have."""

    tiles: Path
    """Folder of tiles."""
    steps: int | None = None
    """Length in steps."""
    amp: bool = True
    """Autocast."""
    out: Path | None = None
    """Run folder."""
    sizes: tuple[int, ...] = (224, 98)
    """Crop sizes, px."""
    scale: int | float = 1
    """A number that keeps its kind."""
    level: Literal[1, 2] = 1
    """A level."""
    terms: tuple[Term, ...] = ()
    """Losses."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How the weights move."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError("a run needs at least one step", where="steps", got=self.steps)


PRESET = Run(tiles=Path("preset"), amp=False, sizes=(112,), optimizer=Optimizer(lr=0.5, betas=(0.1, 0.2), kind="sgd"))


def _parse(*argv: str, default: Run | None = PRESET) -> Run:
    return config.parse(Run, argv, prog="histill test", description="A test.", default=default)


# ------------------------------------------------------------------ dataclass <-> JSON

_finite = st.floats(allow_nan=False, allow_infinity=False)
_paths = st.text("abc-_.é ", min_size=1).map(Path)
_optimizers = st.builds(
    Optimizer, lr=_finite, betas=st.tuples(_finite, _finite), kind=st.sampled_from(["adamw", "sgd"])
)
_runs = st.builds(
    Run,
    tiles=_paths,
    steps=st.none() | st.integers(min_value=1),
    amp=st.booleans(),
    out=st.none() | _paths,
    sizes=st.lists(st.integers()).map(tuple),
    scale=st.integers() | _finite,
    level=st.sampled_from([1, 2]),
    terms=st.lists(st.builds(Term, name=st.text(), weight=_finite)).map(tuple),
    optimizer=_optimizers,
)


@given(_runs)
def test_any_config_comes_back_equal_through_json_text(run: Run) -> None:
    again = config.from_dict(Run, json.loads(json.dumps(config.to_dict(run), allow_nan=False)))
    assert again == run
    assert type(again.scale) is type(run.scale)


def test_save_and_load(tmp_path: Path) -> None:
    run = Run(tiles=Path("a/b"), terms=(Term(name="dino", weight=0.5), Term(name="ibot")))
    config.save(run, tmp_path / "config.json")
    assert config.load(Run, tmp_path / "config.json") == run
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tiles"] == "a/b"
    assert written["optimizer"] == {"lr": 0.001, "betas": [0.9, 0.999], "kind": "adamw"}


def test_absent_keys_take_their_defaults() -> None:
    assert config.from_dict(Run, {"tiles": "t"}) == Run(tiles=Path("t"))


def test_a_whole_number_may_stand_for_a_float_and_becomes_one() -> None:
    lr = config.from_dict(Optimizer, {"lr": 1}).lr
    assert type(lr) is float
    assert lr == 1.0


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tiels": "t"}, ["unknown key 'tiels'", "config", "did you mean tiles"]),
        ({"tiles": "t", "optimizer": {"lrr": 1}}, ["unknown key 'lrr'", "config.optimizer", "did you mean lr?"]),
        ({}, ["missing key tiles"]),
        ({"tiles": "t", "terms": [{}]}, ["missing key name", "config.terms[0]"]),
        ({"tiles": 3}, ["config.tiles", "3", "Path"]),
        ({"tiles": "t", "steps": "many"}, ["config.steps", "'many'", "int"]),
        ({"tiles": "t", "steps": 1.0}, ["config.steps", "1.0", "int"]),
        ({"tiles": "t", "steps": True}, ["config.steps", "True", "int"]),
        ({"tiles": "t", "amp": 1}, ["config.amp", "1", "bool"]),
        ({"tiles": "t", "amp": None}, ["config.amp", "None", "bool"]),
        ({"tiles": "t", "scale": "1"}, ["config.scale", "'1'", "int or float"]),
        ({"tiles": "t", "sizes": 224}, ["a list is needed", "config.sizes", "224"]),
        ({"tiles": "t", "sizes": [224, "98"]}, ["config.sizes[1]", "'98'", "int"]),
        ({"tiles": "t", "level": 3}, ["config.level", "3", "1, 2"]),
        ({"tiles": "t", "level": True}, ["config.level", "True", "1, 2"]),
        ({"tiles": "t", "optimizer": 0.1}, ["a group of settings", "config.optimizer", "0.1"]),
        ({"tiles": "t", "optimizer": {"kind": "sgdx"}}, ["config.optimizer.kind", "'sgdx'", "did you mean sgd?"]),
        ({"tiles": "t", "optimizer": {"betas": [0.9]}}, ["config.optimizer.betas", "1 values", "2 values"]),
        ({"tiles": "t", "optimizer": {"lr": math.nan}}, ["config.optimizer.lr", "nan", "finite"]),
        ({"tiles": "t", "optimizer": {"lr": -math.inf}}, ["config.optimizer.lr", "-inf", "finite"]),
        ({"tiles": "t", "steps": 0}, ["a run needs at least one step"]),
    ],
)
def test_a_wrong_value_is_an_error_that_names_field_value_and_choice(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_dict(Run, values)
    for part in parts:
        assert part in str(caught.value)


def test_a_type_that_a_config_cannot_hold_is_a_programming_error() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Loose:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(AssertionError, match=r"config\.table"):
        config.from_dict(Loose, {"table": {"a": 1}})


def test_configs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESET.amp = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"tiles": "t"', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "one JSON object"),
        (b'{"tiels": "t"}', "unknown key 'tiels'"),
        (b"", "not valid JSON"),
    ],
)
def test_a_damaged_config_file_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=part) as caught:
        config.load(Run, path)
    assert str(path) in str(caught.value)


def test_a_config_file_that_is_absent_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(Run, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(Run, tmp_path)


# ------------------------------------------------------------------ the command line


def test_one_nested_option_leaves_the_rest_of_the_preset_alone() -> None:
    run = _parse("--optimizer.lr", "0.25")
    assert run == Run(
        tiles=Path("preset"), amp=False, sizes=(112,), optimizer=Optimizer(lr=0.25, betas=(0.1, 0.2), kind="sgd")
    )


def test_no_option_is_the_preset() -> None:
    assert _parse() == PRESET


def test_options_of_every_kind() -> None:
    run = _parse(
        *("--tiles", "t", "--steps", "7", "--amp", "True", "--out", "o", "--sizes", "1", "2", "3", "--level", "2"),
        *("--optimizer.betas", "0.5", "0.75", "--optimizer.kind", "adamw"),
        default=None,
    )
    assert run == Run(
        tiles=Path("t"),
        steps=7,
        amp=True,
        out=Path("o"),
        sizes=(1, 2, 3),
        level=2,
        optimizer=Optimizer(betas=(0.5, 0.75)),
    )


def test_a_preset_value_can_be_taken_back_to_none() -> None:
    preset = Run(tiles=Path("t"), steps=5)
    assert _parse("--steps", "None", default=preset).steps is None


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--stepz", "3"], ["--stepz", "--steps"]),
        (["--optimizer.lrr", "3"], ["--optimizer.lrr", "--optimizer.lr"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "0"], ["at least one step"]),
        (["--optimizer.kind", "sgdx"], ["--optimizer.kind", "sgdx", "sgd"]),
        (["--amp", "perhaps"], ["--amp", "perhaps"]),
        (["--optimizer.betas", "0.9"], ["--optimizer.betas"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_command_line_exits_2_and_names_the_option(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse(*argv)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in parts:
        assert part in printed.err


def test_a_missing_required_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse(default=None)
    assert caught.value.code == 2
    assert "--tiles" in capsys.readouterr().err


def test_a_number_that_config_json_could_not_repeat_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        _parse("--optimizer.lr", "nan")


def test_help_shows_the_field_docstrings_and_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "A test." in text
    assert "Learning rate per 1,024 samples." in text
    assert "0.5" in text
