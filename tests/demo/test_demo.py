from __future__ import annotations

import base64
import csv
import dataclasses
import functools
import importlib.resources
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from histill import config as configs
from histill import files
from histill.cli import main
from histill.demo import benchmarks, command, measure, prepare
from histill.demo import run as demo_run
from histill.demo.config import DemoConfig
from histill.demo.run import TEACHER, demo, distill_config
from histill.distill import PRESETS, DistillConfig
from histill.errors import ConfigError, RunError
from histill.models import load_encoder, read_bundle
from histill.tiles.config import TileConfig

LIMIT_BYTES = 2_000_000
VOID = {"meta", "img", "br", "link", "input", "hr"}


def _tiny(out: Path, **changed: Any) -> DemoConfig:
    return dataclasses.replace(DemoConfig(out=out, steps=2, slides=6), **changed)


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def facts(finished: Path) -> dict[str, Any]:
    read: dict[str, Any] = files.read_json(finished / "summary.json")
    return read


# ------------------------------------------------------------------ summary.json


def test_the_summary_holds_what_was_promised(facts: dict[str, Any]) -> None:
    assert set(facts) >= {
        "headline",
        "scores",
        "retention",
        "agreement",
        "collapse_warning",
        "models",
        "speed",
        "neighbours",
        "training",
        "benchmarks",
        "start",
        "seed",
        "config",
        "versions",
        "machine",
        "seconds",
    }
    assert set(facts["versions"]) >= {"histill", "python", "torch", "timm"}
    assert set(facts["scores"]) == {"teacher", "student", "untrained"}
    assert facts["config"]["demo"]["slides"] == 6
    assert configs.from_dict(DistillConfig, facts["config"]["distill"]).student == ("vit-nano",)
    assert facts["seconds"]["total"] >= sum(value for name, value in facts["seconds"].items() if name != "total") - 0.5


def test_retention_is_what_the_scores_say(facts: dict[str, Any]) -> None:
    seen = 0
    for table, metrics in facts["retention"].items():
        for metric, share in metrics.items():
            teacher, student, untrained = (
                facts["scores"][n][table][metric] for n in ("teacher", "student", "untrained")
            )
            if teacher - untrained < 0.02:
                assert share is None
                assert "does not lead" in facts["no_retention"][table][metric]
            else:
                assert share == pytest.approx((student - untrained) / (teacher - untrained))
            seen += 1
    assert seen == 7
    assert facts["headline"]["retention"] == facts["retention"]["labels"]["linear_auc"]


def test_the_headline_repeats_the_measurements(facts: dict[str, Any]) -> None:
    head = facts["headline"]
    assert head["scanner_top_1"] == {name: facts["scores"][name]["paired"]["top_1"] for name in facts["scores"]}
    low, high = facts["speed"]["ratio_quartiles"]
    assert low <= head["speed_ratio"] <= high
    assert facts["models"]["student"]["params"] < facts["models"]["teacher"]["params"]
    assert facts["models"]["student"]["macs"] < facts["models"]["teacher"]["macs"]


def test_checks_of_training_end_with_the_final_scores(finished: Path, facts: dict[str, Any]) -> None:
    run = files.read_json(finished / "run" / "summary.json")
    last = facts["training"]["checks"][-1]
    assert last["step"] == facts["training"]["steps"] == run["steps"]
    assert last["scores"] == run["student"] == facts["scores"]["student"]


def test_paired_and_test_slides_are_kept_out_of_training(finished: Path, facts: dict[str, Any]) -> None:
    split = {row["slide"]: row["split"] for row in _rows(finished / "slides" / "labels.csv")}
    tiles = {row["slide"]: int(row["tiles"]) for row in _rows(finished / "tiles" / "slides.csv")}
    assert set(facts["config"]["distill"]["hold_out_slides"]) == {name for name in split if split[name] != "train"}
    assert facts["training"]["plan"]["tiles"] == sum(tiles[name] for name in split if split[name] == "train")
    assert facts["training"]["plan"]["tiles_held_out"] == sum(tiles[name] for name in split if split[name] != "train")


def test_the_counts_are_those_of_the_files(finished: Path, facts: dict[str, Any]) -> None:
    data, cut = facts["data"], _rows(finished / "tiles" / "slides.csv")
    labels, pairs = (_rows(finished / "checks" / name) for name in ("labels.csv", "paired.csv"))
    assert len(list((finished / "slides").glob("*.svs"))) == len(cut) == data["slides"] + data["paired_slides"] == 6 + 4
    assert (data["slides"], data["test_slides"], data["paired_sections"]) == (6, 2, 1)
    assert data["tiles"] == sum(int(row["tiles"]) for row in cut)
    assert data["grid_tiles"] == 10 * 12 * 12
    left_out = data["without_tissue"] + sum(data["filtered"].values()) + data["unreadable"]
    assert data["tiles"] == data["grid_tiles"] - left_out
    assert data["labelled_tiles"] == len(labels) > 100
    assert data["paired_fields"] * 4 == len(pairs) > 40 * 4
    for split, counts in data["labels"].items():
        for kind, number in counts.items():
            assert number == sum((row["split"], row["label"]) == (split, kind) for row in labels)


# ------------------------------------------------------------------ benchmarks


def test_every_benchmark_has_a_score_of_every_model(finished: Path, facts: dict[str, Any], page: Page) -> None:
    told = facts["benchmarks"]
    rows = {row["benchmark"]: row for row in told["headlines"]}
    assert set(rows) == set(told["names"]) == set(benchmarks.NAMES)
    assert {name.partition("/")[0] for name in rows} == {"plism", "hest", "eva", "pathorob", "tiles", "paired"}
    text = " ".join(" ".join(page.text).split())
    assert "compare with each other, and with no published one" in text
    for row in rows.values():
        for model in ("teacher", "student", "untrained"):
            path = finished / "benchmarks" / "results" / row["benchmark"].partition("/")[0]
            found = list(path.glob(f"{model}__*/**/results.json"))
            scores = [score for each in found for score in files.read_json(each)["scores"]]
            assert row[model]["value"] in [score["value"] for score in scores if score["name"] == row["score"]]
            value = row[model]["value"]
            assert f"{value:.3f}" in text or f"{100 * value:.0f}%" in text
    for name in ("plism", "hest", "paired"):
        assert rows[name]["teacher"]["value"] > rows[name]["untrained"]["value"]


def test_the_page_of_the_benchmarks_says_what_it_is(finished: Path) -> None:
    text = (finished / "benchmarks.html").read_text(encoding="utf-8")
    assert "Benchmarks on drawn tissue" in text
    assert all(f"{name}" in text for name in ("teacher", "student", "untrained"))
    assert "local-dir:" not in text


# ------------------------------------------------------------------ report.html


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.loads += [values[name] for name in ("src", "href", "srcset", "data", "poster", "action") if name in values]
        if tag == "img":
            self.images.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    parsed = Page()
    parsed.feed((finished / "report.html").read_text(encoding="utf-8"))
    parsed.close()
    return parsed


def test_the_report_is_one_file_that_loads_nothing(finished: Path, page: Page) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < LIMIT_BYTES
    assert not page.open, "every tag is closed"
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert [load for load in page.loads if not load.startswith("data:image/")] == ["benchmarks.html"], "the one link"
    assert (finished / "benchmarks.html").is_file()
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_picture_is_there_and_described(finished: Path, page: Page) -> None:
    shown = {(row["label"], row["slide"]) for row in _rows(finished / "checks" / "labels.csv")}  # a tile of each
    slides, looks, neighbours, tokens = 4, 4, 4 * (1 + 5 + 5), 4 * 2 * 3
    assert len(page.images) == slides + len(shown) + looks + neighbours + tokens
    for image in page.images:
        assert image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as decoded:
            pixels = np.asarray(decoded)
        assert pixels.shape in ((512, 512, 3), (128, 128, 3), (224, 224, 3), (16, 16, 3))
        assert pixels.std() > 2, "not blank"


def test_the_page_says_the_numbers_of_the_summary(page: Page, facts: dict[str, Any]) -> None:
    text = " ".join(" ".join(page.text).split())
    head = facts["headline"]
    assert f"{head['speed_ratio']:.1f} times as fast" in text
    assert f"teacher {100 * head['scanner_top_1']['teacher']:.0f}%" in text
    if head["retention"] is not None:
        assert f"{100 * head['retention']:.0f}%".replace("-", "\N{MINUS SIGN}") in text
    for name in ("teacher", "student", "untrained"):
        assert f"{facts['scores'][name]['labels']['linear_auc']:.3f}" in text
        scores = facts["scores"][name]["labels"]
        assert f"{scores['linear_auc_low']:.3f} to {scores['linear_auc_high']:.3f}" in text
    assert f"{facts['models']['student']['params']:,}" in text
    assert "None" not in text
    assert not re.search(r"\bnan\b", text)


def test_the_page_begins_with_the_slides_under_all_looks(finished: Path, page: Page, facts: dict[str, Any]) -> None:
    data, text = facts["data"], " ".join(" ".join(page.text).split())
    kept = {row["slide"]: row["tiles"] for row in _rows(finished / "tiles" / "slides.csv")}
    looks = {row["slide"]: (row["stain"], row["scanner"]) for row in _rows(finished / "slides" / "labels.csv")}
    found = [image["alt"].partition(" ")[0] for image in page.images[:4]]
    assert len({looks[slide] for slide in found}) == 4
    for slide in found:
        assert f"{slide}: {kept[slide]} of 144 tiles kept" in text
    assert "drawn by a program" in text
    assert f"{data['tiles']:,} {facts['training']['plan']['tiles']:,} of them to learn from" in text
    assert f"{data['without_tissue']:,} of {data['grid_tiles']:,} places" in text


def test_the_thumbnails_show_the_grid_of_the_kept_tiles(finished: Path, page: Page) -> None:
    slide, uri = page.images[0]["alt"].partition(" ")[0], page.images[0]["src"]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as decoded:
        red, green, _ = np.moveaxis(np.asarray(decoded, dtype=int), 2, 0)
    index = parquet.read_table(finished / "tiles" / "index.parquet", columns=["slide", "x", "y"]).to_pylist()
    kept = {(row["x"] // 128, row["y"] // 128) for row in index if row["slide"] == slide}
    step, right, wrong = 512 / 12, 0, []
    for row in range(12):
        for column in range(1, 12):
            lined = (column, row) in kept or (column - 1, row) in kept
            rows, at = slice(int(row * step) + 4, int((row + 1) * step) - 4), round(column * step)
            side = np.median((green - red)[rows, at - 2 : at + 3].max(axis=1))
            seen = side - np.median((green - red)[rows, at + 8 : at + 20]) > 8
            right += seen == lined
            wrong += [(column, row)] if seen != lined else []
    assert len(wrong) <= 0.03 * (right + len(wrong)), wrong


def test_the_page_shows_the_charts_with_units(page: Page) -> None:
    text = " ".join(page.text)
    for label in ("training steps", "area under the ROC curve", "cross-entropy (nats)", "learning rate, in 0.0001"):
        assert label in text


def test_the_commands_for_real_tissue_are_understood(page: Page) -> None:
    shown = "".join(page.text).replace("\\\n", " ")
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("histill ")]
    tiling = [words[2:] for words in commands if words[1] == "tile"]
    assert [configs.parse(TileConfig, words, prog="test", description="", flags=True).tile_px for words in tiling] == [
        224
    ]
    training = [words for words in commands if words[1] == "distill"]
    assert {words[2] for words in training} == {"cpu", "h0-mini"}
    for words in training:
        config = configs.parse(DistillConfig, words[3:], prog="test", description="", default=PRESETS[words[2]])
        config.require_complete()


# ------------------------------------------------------------------ the folder


def test_a_finished_demo_says_so_and_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    assert command.run(["--out", str(finished), "--steps", "2", "--slides", "6"]) == 0
    seen = capsys.readouterr()
    assert "finished already" in seen.err
    assert seen.out == f"report: {finished / 'report.html'}\n"
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before


def test_another_seed_in_the_same_folder_is_refused(finished: Path) -> None:
    with pytest.raises(RunError, match="seed: 0 there, 5 now"):
        demo(_tiny(finished, seed=5), console=Console(quiet=True))


def test_an_error_at_the_end_leaves_nothing_half_written_and_the_next_call_goes_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import histill.demo.report

    trained = (finished / "run" / "summary.json").stat().st_mtime_ns
    checks = {path: path.read_bytes() for path in (finished / "checks").rglob("*") if path.is_file()}
    shutil.rmtree(finished / "checks")  # as if it had been killed between the tile set and its tables
    for name in ("report.html", "summary.json"):
        (finished / name).unlink()
    (finished / ".tmp-0123456789abcdef").mkdir()  # of a process that was killed

    monkeypatch.setattr(measure, "speeds", functools.partial(measure.speeds, rounds=3))

    def broken(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(histill.demo.report, "render", broken)
        with pytest.raises(KeyboardInterrupt):
            demo(_tiny(finished), console=Console(quiet=True))
    assert {path.name for path in finished.iterdir()} == {
        ".lock",
        "demo.json",
        "slides",
        "tiles",
        "checks",
        "run",
        "benchmarks",
        "benchmarks.html",
        "benchmarks.md",
    }
    assert {path: path.read_bytes() for path in (finished / "checks").rglob("*") if path.is_file()} == checks
    assert demo(_tiny(finished), console=Console(quiet=True)) == finished / "report.html"
    assert files.read_json(finished / "summary.json")["resumed"] is True
    assert (finished / "run" / "summary.json").stat().st_mtime_ns == trained, "it is not trained again"


def test_a_demo_that_was_moved_is_not_continued_in_its_old_place(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    (moved / "summary.json").unlink()
    with pytest.raises(RunError, match="moved"):
        demo(_tiny(moved), console=Console(quiet=True))


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not a demo[\s\S]*thesis\.txt"):
        demo(_tiny(tmp_path), console=Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("below", ["", "demo"])
def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        demo(_tiny(tmp_path / "file" / below), console=Console(quiet=True))


def test_a_folder_that_may_not_be_written_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(demo_run.configs, "save", forbidden)  # root may write anywhere, so chmod would not do
    with pytest.raises(ConfigError, match=r"cannot be written[\s\S]*Permission denied"):
        demo(_tiny(tmp_path / "new"), console=Console(quiet=True))


def test_a_demo_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import histill.distill.run

    monkeypatch.setattr(histill.distill.run, "distill", lambda config, console: None)
    monkeypatch.setattr(prepare, "draw_slides", lambda config, console: (config.out / "slides").mkdir())
    monkeypatch.setattr(prepare, "cut_tiles", lambda config, console: (config.out / "tiles").mkdir())
    monkeypatch.setattr(prepare, "held_out_slides", lambda slides: ())
    assert command.run(["--out", str(tmp_path / "new"), "--slides", "6"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock", "demo.json", "slides", "tiles"}


# ------------------------------------------------------------------ settings


def test_the_distillation_is_the_preset_with_token_losses(tmp_path: Path) -> None:
    told = distill_config(DemoConfig(out=tmp_path, seed=3), ("slide-002",))
    weights = {name: getattr(told.objective, name) for name in ("dino", "ibot", "token_cls", "token_patch")}
    assert weights == dict.fromkeys(weights, 1.0)
    assert (told.steps, told.minutes) == (256, 0.0)
    assert (told.views.global_px, told.student, told.seed) == (112, ("vit-nano",), 3)
    assert (told.tiles, told.table, told.hold_out_slides) == (tmp_path / "tiles", None, ("slide-002",))
    assert told.checks.tables == (tmp_path / "checks" / "labels.csv", tmp_path / "checks" / "paired.csv")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("--slides", "5", "6 or more"), ("--steps", "0", "1 or more"), ("--seed", "-1", "0 or more")],
)
def test_settings_out_of_range_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, allowed: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(tmp_path / "new"), option, value])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert allowed in error
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ the teacher in the package


def test_the_teacher_ships_small_and_loads() -> None:
    folder = importlib.resources.files("histill.demo").joinpath("assets", "teacher")
    assert Path(str(folder)) == TEACHER
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 6_000_000
    with safe_open(TEACHER / "model.safetensors", framework="pt") as weights:
        kinds = {str(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"F16"}
    encoder = load_encoder(f"local-dir:{TEACHER}")
    assert (encoder.embed_dim, encoder.patch_px, encoder.input_px) == (192, 14, 112)


def test_the_teacher_says_where_it_comes_from() -> None:
    bundle = read_bundle(TEACHER)
    assert bundle.provenance["content_hash"] == bundle.encoder.content_hash()
    assert bundle.provenance["licence"] == bundle.encoder.licence == "MIT"
    card = (TEACHER / "README.md").read_text(encoding="utf-8")
    assert "distilled by histill from a DINOv2-type ViT-S/14" in card
    assert "license: mit" in card
    record = json.dumps(bundle.provenance)
    assert "local-dir:" not in record
    assert not re.search(r'": "(/|\.\.)', record), "no path of the machine that made it"


def test_the_template_ships_with_the_package() -> None:
    assert importlib.resources.files("histill.demo").joinpath("templates", "report.html.j2").is_file()


# ------------------------------------------------------------------ at full size


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    report = demo(DemoConfig(out=tmp_path / "new"))
    assert report is not None
    assert report.stat().st_size < LIMIT_BYTES
    facts = files.read_json(tmp_path / "new" / "summary.json")
    print(f"\n{facts['seconds']}, {facts['training']['steps']} steps, {facts['headline']}")
    assert facts["headline"]["retention"] > 0.3
    assert facts["collapse_warning"] is None
