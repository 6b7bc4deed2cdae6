"""What is refused before a slide is opened: a model of another scale or normalisation, other settings, wrong words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from histill.cli import main
from histill.evaluate.slide_features import find_features


def extract(slides: object, model: Path, out: Path, *options: object) -> int:
    command = ["extract", str(slides), "--model", str(model), "--out", str(out), "--workers", "1"]
    engine = [] if "--engine" in options else ["--engine", "torch-fp32"]
    return main([*command, *engine, *map(str, options)])


def test_a_model_of_another_scale_is_refused_with_both(
    drawn: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(drawn, model, tmp_path / "out", "--mpp", 0.25) == 1
    told = capsys.readouterr().err
    assert "0.25" in told
    assert "0.5 um/px" in told
    assert not (tmp_path / "out").exists()
    assert extract(drawn / "a.svs", model, tmp_path / "out", "--mpp", 0.51) == 0  # within 5 %
    assert extract(drawn / "a.svs", model, tmp_path / "other", "--mpp", 1, "--any-mpp") == 0


def test_a_model_that_does_not_say_its_scale_needs_one(
    drawn: Path, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = make_bundle(tmp_path / "model", provenance={})
    assert extract(drawn, unknown, tmp_path / "out") == 1
    assert "--mpp" in capsys.readouterr().err
    told = make_bundle(tmp_path / "told", provenance={"mpp": 1.0})
    assert extract(drawn, told, tmp_path / "out", "--mpp", 0.5) == 1
    assert "1 um/px" in capsys.readouterr().err


def test_teachers_of_several_scales_leave_their_student_several(
    drawn: Path, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = {"name": "h-optimus-0"}, {"name": "midnight-12k"}
    one = make_bundle(tmp_path / "one", provenance={"teacher": first})
    assert extract(drawn / "a.svs", one, tmp_path / "out") == 0, "0.5 um/px, by the table"
    both = make_bundle(tmp_path / "both", provenance={"teacher": first, "further_teachers": [second]})
    assert extract(drawn / "a.svs", both, tmp_path / "more") == 1
    assert "made for 0.25, 0.5, 1, 2" in capsys.readouterr().err
    assert extract(drawn / "a.svs", both, tmp_path / "more", "--mpp", 0.5) == 0


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_model_with_another_normalisation_is_refused_with_both(
    name: str, drawn: Path, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student's teacher is H-optimus-0; somebody wrote ImageNet's default into config.json."""
    broken = make_bundle(tmp_path / "model")
    config = json.loads((broken / "config.json").read_text())
    config["pretrained_cfg"][name] = [0.5, 0.5, 0.5]
    (broken / "config.json").write_text(json.dumps(config))
    assert extract(drawn, broken, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "normalisation" in told
    assert f"{name} 0.5, 0.5, 0.5" in told
    assert ("0.707223" if name == "mean" else "0.211883") in told
    assert not (tmp_path / "out").exists()


def test_other_settings_in_a_folder_are_refused(
    drawn: Path, model: Path, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert extract(drawn / "a.svs", model, out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = make_bundle(tmp_path / "nano", seed=1)  # the same name, other weights
    for options, told in (
        ((model, out, "--batch", 8), "batch: 32 there, 8 now"),
        ((model, out, "--tissue-min", 0.5), "tissue_min: 0.4 there, 0.5 now"),
        ((model, out, "--tokens"), "tokens: False there, True now"),
        ((other, out), "model_hash"),
    ):
        assert extract(drawn / "a.svs", *options) == 1
        assert told in capsys.readouterr().err
    assert extract(drawn / "a.svs", model, out, "--mpp-override", 0.49) == 1
    assert "another mpp" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_finished_folder_is_left_alone_and_auto_keeps_its_engine(
    drawn: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(drawn / "a.svs", model, tmp_path) == 0
    before = (tmp_path / "features" / "a.h5").stat()
    capsys.readouterr()
    assert extract(drawn, model, tmp_path, "--engine", "auto") == 0  # torch-fp32, as the folder was begun
    assert "1 slides done" in (told := capsys.readouterr().out)
    assert "1 there already" in told
    assert (tmp_path / "features" / "a.h5").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "OUT"], "--model is not given"),
        (["--model", "MODEL"], "--out is not given"),
        (["--model", "MODEL", "--out", "TAKEN"], "not a feature folder"),
        (["--model", "MODEL", "--out", "OUT", "--engine", "torhc"], "there is no such engine"),
        (["--model", "MODEL", "--out", "OUT", "--tile-px", "60"], "14"),
        (["--model", "MODEL", "--out", "OUT", "--gpus", "99"], "--gpus"),
        (["--model", "MODEL", "--out", "OUT", "--coords", "nowhere"], "do not exist"),
        (["--model", "nowhere/at/all", "--out", "OUT"], "does not exist"),
    ],
)
def test_wrong_words(
    options: list[str], told: str, drawn: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "novel.txt").write_text("Call me Ishmael.")
    places = {"OUT": tmp_path / "out", "TAKEN": tmp_path / "taken", "MODEL": model}
    assert main(["extract", str(drawn), *(str(places.get(option, option)) for option in options)]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--coords", "patches", "--stride-px", "28"], "--stride-px"),
        (["--coords", "patches", "--masks", "masks"], "--masks"),
        (["--shard", "2/2"], "--shard"),
        (["--batch", "0"], "--batch"),
        (["--format", "npz"], "format"),
    ],
)
def test_a_wrong_command_line(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["extract", "a.svs", "--model", "m", "--out", "o", *options])
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_a_bundle_carries_its_own_scale_and_normalisation(
    drawn: Path, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They go before its teacher's, which is H-optimus-0 (0.5 um/px) with Bioptimus' mean."""
    own = make_bundle(tmp_path / "model", mpp=1.0, mean=(0.5, 0.4, 0.6))
    record = json.loads((own / "histill.json").read_text())
    assert (record["mpp"], record["mean"], record["std"]) == (1.0, [0.5, 0.4, 0.6], [0.211883, 0.230117, 0.177517])
    assert extract(drawn / "a.svs", own, tmp_path / "out", "--mpp", 0.5) == 1
    assert "1 um/px" in capsys.readouterr().err
    assert extract(drawn / "a.svs", own, tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out" / "features.json").read_text())
    assert (settings["mpp"], settings["mean"]) == (1.0, [0.5, 0.4, 0.6])


def test_an_export_keeps_scale_and_normalisation(
    drawn: Path, model: Path, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for number in range(3):
        Image.new("RGB", (56, 56), (200, 150, 40 * number)).save(tiles / f"{number}.png")
    to_onnx = ["--to", "onnx", "--verify-tiles", "2", "--tiles", str(tiles)]
    assert main(["export", str(model), *to_onnx, "--out", str(tmp_path / "onnx")]) == 0
    engine = ("--engine", "onnxruntime")
    assert extract(drawn / "a.svs", tmp_path / "onnx", tmp_path / "out", *engine) == 0, "the scale of the bundle"
    assert extract(drawn / "a.svs", tmp_path / "onnx", tmp_path / "other", "--mpp", 1.0, *engine) == 1
    assert "0.5 um/px" in capsys.readouterr().err
    broken = make_bundle(tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (broken / "config.json").write_text(json.dumps(config))
    assert main(["export", str(broken), *to_onnx, "--out", str(tmp_path / "never")]) == 1
    assert "normalisation" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("name", "value"), [("mpp", "half"), ("mpp", 0), ("mean", "x"), ("std", [1, 2])])
def test_a_damaged_record_is_named(
    name: str,
    value: object,
    drawn: Path,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = make_bundle(tmp_path / "model")
    record = json.loads((broken / "histill.json").read_text()) | {name: value}
    (broken / "histill.json").write_text(json.dumps(record))
    assert extract(drawn / "a.svs", broken, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "damaged" in told
    assert name in told


def test_a_model_may_be_written_in_two_ways(
    drawn: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    assert extract(drawn / "a.svs", Path(model.name), tmp_path / "out") == 0
    assert extract(drawn / "b.svs", model, tmp_path / "out") == 0
    assert find_features(tmp_path / "out").encoder == model.name


def test_lost_files_are_made_again_and_strays_go(drawn: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert extract(drawn, model, out) == 0
    features = out / "features"
    expected = (features / "a.h5").stat().st_size
    (features / "a.h5").unlink()
    (features / "b.h5").write_bytes((features / "b.h5").read_bytes()[:-100])
    stray = features / ".tmp-0123456789abcdef.h5"
    stray.write_bytes(b"of a killed process")
    assert extract(drawn, model, out) == 0
    assert (features / "a.h5").stat().st_size == expected
    assert sorted(path.name for path in features.iterdir()) == ["a.h5", "b.h5"]
    assert set(find_features(out).files) == {"a", "b"}


def test_auto_takes_the_engine_with_which_another_process_began(
    drawn: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job array: while this process measures, another one begins the folder with its own choice."""
    import histill.extract.run as module

    out, opened = tmp_path / "out", module.open_model

    def slow(config: Any, known: Any, engine: str, device: str) -> Any:
        if engine != "auto":
            return opened(config, known, engine, device)
        monkeypatch.setattr(module, "open_model", opened)
        assert extract(drawn / "b.svs", model, out, "--engine", "onnxruntime") == 0
        return opened(config, known, "torch-fp32", device)

    monkeypatch.setattr(module, "open_model", slow)
    assert extract(drawn / "a.svs", model, out, "--engine", "auto") == 0
    assert json.loads((out / "features.json").read_text())["engine"] == "onnxruntime"
    assert set(find_features(out).files) == {"a", "b"}
