"""The report: built from results by hand, looked at as text and in a real headless Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from histill import cli, files
from histill.errors import ConfigError, DataError
from histill.evaluate.plism import groups
from histill.evaluate.plism.engine import PairMetrics
from histill.evaluate.plism.layout import SCANNERS, STAININGS, SlideName
from histill.evaluate.report.charts import Bar, bars, heat_map, order_slides
from histill.evaluate.report.collect import Column, Encoder, collect, find_roles
from histill.evaluate.report.reference import PUBLISHED, SOURCES
from histill.evaluate.report.tables import words
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.statistics import Clusters, paired_test

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COST = {
    "parameters": 21_700_000,
    "macs_per_tile": 4_600_000_000,
    "tiles_per_second": 38.25,
    "memory_bytes": None,
    "memory_batch": 8,
    "memory_rule": "not measured: no such system",
    "processor": "a processor",
    "threads": 2,
    "batch": 16,
    "input_px": 224,
    "precision": "bf16",
    "engine": "PyTorch 9",
    "yardstick_gflops": 81.0,
    "tiles": "tiles of a benchmark",
    "date": "2026-03-04",
}
HEST_TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "LUNG", "LYMPH_IDC")


class _Page(HTMLParser):
    """Rows of every table, by section, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loaded: list[str] = []
        self.classes: list[str] = []
        self._section = ""
        self._row: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        held = dict(attributes)
        self.loaded += [held[name] or "" for name in ("src", "href", "srcset", "data", "action") if name in held]
        self.classes += (held.get("class") or "").split()
        if tag == "section":
            self._section = held.get("id") or ""
        elif tag == "tr":
            self._row = []
            self.tables.setdefault(self._section, []).append(self._row)
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_data(self, data: str) -> None:
        if self._row:
            self._row[-1] = f"{self._row[-1]} {data}".strip()

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._row = None


def _slides(count: int) -> list[str]:
    names = [f"{staining}_{scanner}_to_GMH_S60.tif" for staining in STAININGS for scanner in SCANNERS]
    return names[:count] if count > 12 else [names[place] for place in (0, 1, 7, 8, 14, 15)[:count]]


def _plism(encoder: str, pooling: str, count: int, seed: int) -> Result:
    generator = np.random.default_rng(seed)
    slides = [SlideName.of(name, Path("here")) for name in _slides(count)]
    pairs = []
    for place, a in enumerate(slides):
        for b in slides[place + 1 :]:
            drawn = [generator.uniform(0.4, 0.9), *np.sort(generator.uniform(0.1, 0.9, 4)).tolist()]
            metrics = PairMetrics(**dict(zip(groups.METRICS, drawn, strict=True)))
            pairs.append(groups.Pair(a=a, b=b, metrics=metrics))
    return Result(
        benchmark="plism",
        encoder=encoder,
        encoder_key=f"{seed:064x}",
        pooling=pooling,
        headline="score",
        scores=groups.scores(pairs),
        data={"root": "/home/someone/plism", "slides": count, "tiles": 8139, "tiles_in_slide": 16278, "compat": "none"},
        details=groups.details(pairs),
        seconds=12.5,
    )


def _hest(encoder: str, pooling: str, level: float) -> Result:
    scores = [Score(name="pearson", value=level, low=level - 0.02, high=level + 0.03, note="mean over 8 of 9 tasks")]
    scores += [
        Score(name=f"pearson/{task}", value=level + 0.03 * place - 0.1, low=level - 0.13, high=level + 0.2)
        for place, task in enumerate(HEST_TASKS[:-1])
    ]
    scores.append(Score(name="pearson/LYMPH_IDC", value=None, note="not on the disk"))
    sums = Clusters(
        names=("IDC/0", "IDC/1", "PRAD/0", "PRAD/1"),
        numerator_SC=level * np.array([[0.9], [1.1], [1.2], [0.8]]),
        denominator_SC=np.ones((4, 1)),
    )
    return Result(
        benchmark="hest",
        encoder=encoder,
        encoder_key="b" * 64,
        pooling=pooling,
        headline="pearson",
        scores=tuple(scores),
        data={"root": "/data/hest", "solver": "lsqr", "tasks": ["IDC", "PRAD"]}
        | ({"cost": COST} if level > 0.2 else {}),
        details={"clusters": {"pearson": sums.to_plain()}},
        seconds=3661.0,
        weights=f"{100 * level:064.0f}",
        date="2026-03-04",
        settings={"input_px": 224, "precision": "bf16"},
    )


def _eva(encoder: str, pooling: str, task: str, value: float) -> Result:
    return Result(
        benchmark="eva",
        encoder=encoder,
        encoder_key="c" * 64,
        pooling=pooling,
        headline=f"balanced_accuracy/{task}",
        scores=(
            Score(name=f"balanced_accuracy/{task}", value=value, low=value - 0.01, high=value + 0.01),
            Score(name=f"balanced_accuracy_clean/{task}", value=value - 0.02, note="no interval: one slide"),
        ),
        data={"root": "/data/eva", "task": task},
    )


def _write(results: list[Result], out: Path) -> Path:
    """As ``histill evaluate`` lays them out."""
    for result in results:
        task = result.headline.partition("/")[2] if result.benchmark == "eva" else ""
        write_result(result, out / result.benchmark / task / f"{result.encoder}__{result.pooling}")
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Three encoders; EVA and HEST not of all, PathoROB of none."""
    results = [
        _plism("small <run|1>", "cls+mean", 6, 1),
        _plism("teacher", "cls", 6, 2),
        _plism("random", "cls", 6, 3),
        _hest("small <run|1>", "cls+mean", 0.30),
        _hest("teacher", "cls", 0.40),
        _hest("random", "cls", 0.20),
        _eva("small <run|1>", "cls+mean", "bach", 0.80),
        _eva("teacher", "cls", "bach", 0.90),
        _eva("teacher", "cls", "mhist", 0.81),
    ]
    folder = _write(results, tmp_path / "out")
    absent = {"benchmark": "eva/mhist", "encoder": "small <run|1>", "pooling": "cls+mean"}
    summary = {
        "failed": [absent | {"reason": "an image cannot be read\n  where:   MHIST/7.png"}],
        "missing": [{"benchmark": "pathorob", "reason": "not in roots.json", "encoder": None, "pooling": None}],
    }
    files.write_json(folder / "summary.json", summary)
    files.write_json(folder / "results.json", {"results": [], **summary})  # the table beside the summary: no result
    return folder


def _report(out: Path, *options: str) -> tuple[Path, str]:
    page = out.parent / "page" / "report.html"
    assert cli.main(["report", str(out), "--out", str(page), *options]) == 0
    return page, page.read_text("utf-8")


ROLES = ("--student", "small <run|1>", "--teacher", "teacher", "--untrained", "random")


def test_the_headline_names_pooling_interval_and_what_is_missing(out: Path) -> None:
    _, text = _report(out)
    rows = {row[0].split(" pooling")[0]: row for row in _Page(text).tables["headline"]}
    assert rows["small <run|1>"][0].endswith("pooling: cls+mean")
    assert "0.300" in rows["small <run|1>"][2]
    assert "0.280 to 0.330" in rows["small <run|1>"][2]
    for name in ("small <run|1>", "teacher", "random"):
        assert rows[name][3].startswith("not run")
    assert any("published by others" in row[0].lower() for row in rows.values())
    assert text.count("PathoROB was not run: not in roots.json") == 1
    assert "an image cannot be read; where: MHIST/7.png" in text
    assert "mean over 8 of 9 tasks" in text
    assert "PLISM on 6 of 91 slides" in text
    assert "/home/someone" not in text


def test_nothing_is_loaded_and_no_long_dash_is_written(out: Path) -> None:
    _, text = _report(out, *ROLES)
    page = _Page(text)
    assert page.loaded
    assert all(value.startswith(("data:", "#")) for value in page.loaded)
    assert not re.search(r"https?://|@import|url\(|<script|\N{EM DASH}", text)


def test_cells_without_a_run_are_grey(out: Path) -> None:
    _, text = _report(out)
    cells = re.findall(r"<td[^>]*?( class=\"absent\")?>(not run|not defined|not known)", text)
    assert len(cells) > 3
    assert all(grey for grey, _ in cells)


def test_published_rows_are_as_in_the_sources() -> None:
    rows = {(row.benchmark, row.encoder, row.pooling): row for row in PUBLISHED}
    assert len(rows) == len(PUBLISHED) == 12 + 6 + 4 + 5
    assert {row.source for row in PUBLISHED} == set(SOURCES)
    for row in PUBLISHED:
        if row.benchmark == "plism":  # the score is the mean of the four, to the last digit that is given
            parts = [value for name, value in row.scores.items() if name != "score"]
            assert np.mean(parts) == pytest.approx(row.scores["score"], abs=1.1e-3), row
        if row.benchmark == "hest":
            parts = [value for name, value in row.scores.items() if "/" in name]
            assert len(parts) == 9
            assert np.mean(parts) == pytest.approx(row.scores["pearson"], abs=1.1e-4), row


def test_retention_counts_from_the_untrained_network(out: Path) -> None:
    _, text = _report(out, *ROLES)
    rows = [row for row in _Page(text).tables["retention"] if row[0].startswith("HEST")]
    headline = next(row for row in rows if row[0] == "HEST pearson")
    assert headline[1:4] == ["0.200", "0.300", "0.400"]
    assert headline[4].startswith("75.0 %")
    assert headline[4].endswith("75 to 75 %")  # both are in step on every fold
    assert headline[5] == "50.0 %"
    absent = next(row for row in _Page(text).tables["retention"] if "mhist: balanced accuracy" in row[0])
    assert absent[1] == "not run: small <run|1>, cls+mean"


def test_retention_and_differences_on_plism_are_drawn_by_slide(out: Path) -> None:
    _, text = _report(out, *ROLES)
    tables = _Page(text).tables
    (kept,) = [row for row in tables["retention"] if row[0] == "PLISM score"]
    assert re.search(r"\d+ to \d+ %$", kept[4])
    head, *rows = tables["differences"]
    assert head[1:] == ["PLISM score", "HEST pearson"]
    by_pair = {row[0]: row[1:] for row in rows if len(row) == 3}
    plism, hest = by_pair["small <run|1>, cls+mean minus teacher, cls"]
    results = {name: _plism(name, "cls", 6, seed) for seed, name in ((1, "s"), (2, "t"))}
    measures = [groups.slide_medians(groups.read_pairs(r.details["pairs"]), "score") for r in results.values()]
    want = paired_test(*measures)
    signed = f"{want.difference:+.3f} NOTE {want.low:+.3f} to {want.high:+.3f}; p {want.p:.3f}"
    assert re.sub(r" \d+ ", " NOTE ", plism, count=1) == signed.replace("-", "\N{MINUS SIGN}")
    assert "PLISM (score): drawn from 6 clusters only: the interval is too narrow and p too small" in text
    # both are in step on every fold: as sure as four folds can be
    assert re.match("\N{MINUS SIGN}0.100 \\d+ \N{MINUS SIGN}0.1", hest)
    assert "bach: balanced accuracy" in str(tables["differences"])
    assert "mhist" not in str(tables["differences"])  # which one encoder alone has


def test_scores_are_said_in_words() -> None:
    assert words("balanced_accuracy/bach") == "bach: balanced accuracy"
    assert words("few_shot_auc/4") == "few shot auc, 4 a class"
    assert words("top_10") == "top 10"


def test_an_encoder_s_path_is_not_passed_on() -> None:
    assert Encoder(name="/home/someone/runs/a/student", pooling="cls").shown == "a/student"
    assert Encoder(name="hf-hub:org/name", pooling="cls").shown == "hf-hub:org/name"


def test_what_has_no_interval_says_why(out: Path) -> None:
    _, text = _report(out, *ROLES)
    assert "HEST (IDC: pearson): no interval of the share, its results keep no sums by slide, patient or fold" in text
    assert "EVA (bach: balanced accuracy): no interval of the difference, its results keep no sums" in text


def test_the_cost_names_machine_and_units(out: Path) -> None:
    _, text = _report(out)
    head, *rows = _Page(text).tables["cost"]
    assert head[1:5] == ["parameters, millions", "MACs a tile, billions", "tiles a second", "memory, GB"]
    by_name = {row[0]: row[1:] for row in rows}
    with_cost = [row for row in rows if row[0].startswith("teacher") and row[1] == "21.7"]
    assert with_cost[0][2] == "4.6"
    assert with_cost[0][3].startswith("38.2")
    assert with_cost[0][4].startswith("not known")
    assert by_name["random pooling: cls"][:4] == ["not measured"] * 4
    assert (
        "a processor, 2 threads, 16 tiles of 224 px at once (tiles of a benchmark), bf16, PyTorch 9, 2026-03-04" in text
    )


def test_roles_need_a_shared_pooling(tmp_path: Path) -> None:
    results = [_hest("s", pooling, 0.3) for pooling in ("cls", "cls+mean")]
    results += [_hest("t", pooling, 0.4) for pooling in ("cls", "cls+mean", "mean")] + [_hest("u", "mean", 0.1)]
    found = collect([_write(results, tmp_path)])
    both = find_roles(found, "s", "t", "u")
    assert [role.student.pooling for role in both] == [role.teacher.pooling for role in both] == ["cls", "cls+mean"]
    assert {role.untrained for role in both} == {Encoder(name="u", pooling="mean")}
    (one,) = find_roles(found, "s:cls", "t:mean", None)
    assert (one.student.pooling, one.teacher.pooling, one.untrained) == ("cls", "mean", None)
    with pytest.raises(ConfigError, match="did you mean"):
        find_roles(found, "s:clss", "t", None)


def test_results_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    first, second = (_write([_hest("a", "cls", level)], tmp_path / name) for name, level in (("1", 0.3), ("2", 0.4)))
    with pytest.raises(DataError, match="two results of hest"):
        collect([first, second])
    assert len(collect([first, first]).results) == 1


@pytest.mark.parametrize("damage", ["{", '{"scores": []}', '{"failed": 1, "missing": []}', '{"failed": '])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    out = _write([_hest("a", "cls", 0.3)], tmp_path)
    name = "summary.json" if "failed" in damage else "more/results.json"
    (out / "more").mkdir()
    (out / name).write_text(damage)
    with pytest.raises(DataError, match=re.escape(name)):
        collect([out])


def test_the_summary_of_another_command_is_not_ours(tmp_path: Path) -> None:
    out = _write([_hest("a", "cls", 0.3)], tmp_path)
    for folder in (out, out / "hest" / "a__cls"):
        files.write_json(folder / "summary.json", {"seed": 0, "headline": {}})
    assert len(collect([out]).results) == 1


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "no results.json" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # a wrong command line
        cli.main(["report"])
    assert "no folder" in capsys.readouterr().err


def test_an_encoder_that_never_ran_has_a_row(out: Path) -> None:
    failed = {"benchmark": "hest", "encoder": "broken", "pooling": None, "reason": "weights cannot be loaded"}
    files.write_json(out / "summary.json", {"failed": [failed], "missing": []})
    found = collect([out])
    broken = Encoder(name="broken", pooling="?")
    assert broken in found.encoders
    absent = found.absence(broken, Column(benchmark="hest", score="pearson"))
    assert absent is not None
    assert absent.reason == "weights cannot be loaded"
    assert found.absence(broken, Column(benchmark="plism", score="score")) is None


def test_rows_on_different_data_are_marked(tmp_path: Path) -> None:
    out = _write([_plism("a", "cls", 6, 1), _plism("b", "cls", 4, 2)], tmp_path / "out")
    _, text = _report(out)
    assert "rows of PLISM (score) differ in slides: compare them with care" in text


def test_the_table_for_a_model_card(out: Path) -> None:
    page, _ = _report(out)
    lines = page.with_suffix(".md").read_text("utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
    assert set(cells) == {cells[0], cells[-1]}  # two tables, each as wide in every row
    row = next(line for line in table if line.startswith("| small <run\\|1> | cls+mean |"))
    assert "0.300 (0.280 to 0.330)" in row
    assert "not run" in row
    assert any("H-optimus-0 (published)" in line for line in table)


def test_a_heat_map_puts_each_pair_on_its_side() -> None:
    names = ["HR_S60_to_GMH_S60.tif", "GM_S60_to_GMH_S60.tif", "GM_AT2_to_GMH_S60.tif"]
    order = order_slides(names)
    assert [names[place][:6] for place in order] == ["GM_AT2", "GM_S60", "HR_S60"]
    above = np.array([[np.nan, 0.11, 0.22], [0.11, np.nan, np.nan], [0.22, np.nan, np.nan]])
    svg = heat_map([names[place] for place in order], above, above + 0.5, title="t")
    places = {
        value: (float(x), float(y))
        for x, y, value in re.findall(r'class="(?:dark|light)" x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.]+)<', svg)
    }
    assert set(places) == {"0.11", "0.22", "0.61", "0.72"}
    assert places["0.11"][0] > places["0.61"][0]
    assert places["0.11"][1] < places["0.61"][1]


def test_bars_stand_on_zero() -> None:
    rows = [
        Bar(name="a", style="c0", value=-0.1),
        Bar(name="b", style="c1", value=0.3),
        Bar(name="c", style="c2", value=None),
    ]
    svg = bars(rows, title="t", span=(-0.1, 0.3))
    drawn = re.findall(r'class="bar c\d" x="([\d.]+)" y="\d+" width="([\d.]+)"', svg)
    (left, below), (start, above) = [(float(x), float(width)) for x, width in drawn]
    assert (left, left + below) == (0.0, pytest.approx(start, abs=0.1))
    assert above == pytest.approx(3 * below, abs=0.2)
    assert "not run" in svg


def test_help_imports_no_torch() -> None:
    code = "import sys\nfrom histill.cli import main\ntry: main(['report', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--student" in done.stdout


def test_a_full_matrix_stays_small(tmp_path: Path) -> None:
    out = _write([_plism(f"encoder {seed}", "cls", 91, seed) for seed in range(2)], tmp_path / "out")
    page, text = _report(out)
    assert "91 slides" in text
    assert page.stat().st_size < 5_000_000
    assert _Page(text).classes.count("rule") == 2


@pytest.fixture
def chromium() -> str:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed to open the page with")
    return CHROMIUM


def test_a_browser_opens_it_without_complaint(out: Path, chromium: str, tmp_path: Path) -> None:
    page, _ = _report(out, *ROLES)
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    logged = [*command, "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(logged, capture_output=True, text=True, timeout=120, check=True)
    dom = _Page(done.stdout)
    assert {"headline", "eva", "retention", "plism", "cost", "provenance"} <= set(dom.tables)
    assert dom.classes.count("map") == 3
    assert all(value.startswith(("data:", "#")) for value in dom.loaded)
    assert "CONSOLE" not in done.stderr
    assert not re.search(r"(ERR_|Failed to load|net_error)[^\n]*" + re.escape(page.name), done.stderr)
