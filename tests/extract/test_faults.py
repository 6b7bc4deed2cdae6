"""`histill extract` when it is killed, when slides or tiles are damaged, and when several processes share the work."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
import tifffile

from histill.cli import main
from histill.synthetic.slides import write_slide

OPTIONS = ("--workers", "1", "--engine", "torch-fp32", "--batch", "4", "--stride-px", "14", "--tissue-min", "0.01")
# With a commit after each batch, and batches that take a while: a kill then falls into a slide.
SLOWLY = """
import sys, time
from histill.extract import partial
from histill.extract.model import FeatureModel
from histill.cli import main
partial._COMMIT_SECONDS = 0.0
start = FeatureModel.start
def slow(self, tiles):
    time.sleep(0.02)
    return start(self, tiles)
FeatureModel.start = slow
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def rows(out: Path, name: str = "slides.csv") -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def content(out: Path) -> dict[str, bytes]:
    """File -> bytes of all that may not differ: not the seconds, and not the folder's own name."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix in (".geojson", ".csv") and path.name != "slides.csv":
            found[path.relative_to(out).as_posix()] = path.read_bytes()
        elif path.suffix == ".h5":
            with h5py.File(path) as file:
                for name, array in file.items():
                    found[f"{path.name} {name}"] = array[()].tobytes()
    return found


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with several hundred tiles at the options of this file, and a small one after it."""
    folder = tmp_path_factory.mktemp("long")
    for name, side in (("a", 500), ("b", 300)):
        write_slide(folder / f"{name}.svs", width_px=side, height_px=side, mpp=0.5, seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(long: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS]) == 0
    assert int(rows(out)[0]["tiles"]) > 200
    return out


def start(script: Path, long: Path, model: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    script.write_text(SLOWLY)
    command = ["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS, *options]
    return subprocess.Popen([sys.executable, str(script), *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def state(out: Path, slide: str = "a") -> dict[str, int]:
    try:
        return json.loads((out / ".work" / "slides" / slide / "state.json").read_text())
    except FileNotFoundError:
        return {"kept": 0, "rows": 0}


def until(process: subprocess.Popen[bytes], happened: object) -> None:
    assert callable(happened)
    limit = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_a_kill_inside_a_slide_costs_what_was_in_flight(
    long: Path, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from histill.extract import partial

    out = tmp_path / "out"
    for least in (12, 60):  # killed twice
        process = start(tmp_path / "slowly.py", long, model, out)
        until(process, lambda least=least: state(out)["kept"] > least)
        process.kill()
        process.communicate()
        assert not (out / "features").exists()
    kept = state(out)["kept"]
    total = int(rows(whole)[0]["tiles"])
    assert 60 < kept < total
    done, add = [], partial.Partial.add

    def count(self: partial.Partial, result: partial.BatchResult) -> None:
        done.append(len(result.features_BD))
        add(self, result)

    monkeypatch.setattr(partial.Partial, "add", count)
    assert main(["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS]) == 0
    assert sum(done) == total - kept + int(rows(whole)[1]["tiles"])  # the rest only
    assert content(out) == content(whole)
    assert not list(out.rglob(".*"))


def test_ctrl_c_keeps_what_is_done(long: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(tmp_path / "slowly.py", long, model, out)
    until(process, lambda: state(out)["kept"] > 40)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert state(out)["kept"] > 40
    assert main(["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS]) == 0
    assert content(out) == content(whole)


def test_a_reader_that_is_killed_costs_nothing(long: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(tmp_path / "slowly.py", long, model, out)
    until(process, lambda: state(out)["kept"] > 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    readers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert readers
    for pid in readers:
        os.kill(int(pid), signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told.decode()
    assert content(out) == content(whole)


def test_two_processes_share_a_folder(long: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = [start(tmp_path / f"slowly{number}.py", long, model, out) for number in range(2)]
    for process in processes:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told.decode()
    assert main(["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS]) == 0
    assert content(out) == content(whole)


def test_parts_are_disjoint_and_complete(long: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    found = []
    for part in ("0/2", "1/2"):
        out = tmp_path / part.replace("/", "-")
        command = ["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS, "--shard", part]
        assert main(command) == 0
        found += [row["slide"] for row in rows(out)]
        assert {name: data for name, data in content(whole).items() if name in content(out)} | {
            "unreadable.csv": b"slide,x,y,reason\n"
        } == content(out)
    assert sorted(found) == ["a", "b"]


# ------------------------------------------------------------------ damage


def damaged_copy(slide: Path, target: Path) -> tuple[int, int]:
    """Zero a block of level 0 near the middle; returns its left top."""
    shutil.copyfile(slide, target)
    with tifffile.TiffFile(target) as file:
        page = file.pages[0]
        columns = -(-page.imagewidth // page.tilewidth)
        number = columns + 1
        offset, count = page.dataoffsets[number], page.databytecounts[number]
    with target.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    return page.tilewidth, page.tilelength


def test_damaged_tiles_are_listed_and_have_no_feature(drawn: Path, model: Path, tmp_path: Path) -> None:
    left, top = damaged_copy(drawn / "a.svs", tmp_path / "a.svs")
    options = ["--model", str(model), "--workers", "1", "--engine", "torch-fp32", "--tissue-min", "0.2"]
    for slide, out in ((drawn / "a.svs", "good"), (tmp_path / "a.svs", "bad")):
        assert main(["extract", str(slide), "--out", str(tmp_path / out), *options]) == 0
    with h5py.File(tmp_path / "good/features/a.h5") as good, h5py.File(tmp_path / "bad/features/a.h5") as bad:
        features = {tuple(xy): row for xy, row in zip(good["coords"][:].tolist(), good["features"][:], strict=True)}
        left_over = {tuple(xy): row for xy, row in zip(bad["coords"][:].tolist(), bad["features"][:], strict=True)}
        failed = {tuple(xy) for xy in bad["failed_tiles"][:].tolist()}
        assert bad.attrs["failed_tiles"] == len(failed)
    listed = {(int(row["x"]), int(row["y"])) for row in rows(tmp_path / "bad", "unreadable.csv")}
    assert failed == listed
    assert failed
    for x, y in failed:  # each of them meets the block
        assert x + 56 > left
        assert x < left + 240
        assert y + 56 > top
        assert y < top + 240
    assert set(features) - failed == set(left_over) - (set(left_over) - set(features))
    assert not failed & set(left_over)
    shared = sorted(set(features) & set(left_over))
    assert len(shared) > 20
    for place in shared:
        assert abs(features[place] - left_over[place]).max() < 1e-4


def test_a_slide_that_fails_does_not_stop_the_others(
    shared_data: Path, drawn: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = [shared_data / "slides" / f"{name}.svs" for name in ("broken", "unreadable", "TCGA-CR-7395-01A-01-TS1")]
    given = [*map(str, slides), str(drawn / "b.svs")]
    command = ["extract", *given, "--model", str(model), "--out", str(tmp_path), *OPTIONS]
    assert main(command) == 2
    told = capsys.readouterr()
    assert "3 slides failed" in told.out
    assert "--mpp-override" in told.err
    assert {row["slide"]: row["status"] for row in rows(tmp_path)} == {
        "TCGA-CR-7395-01A-01-TS1": "failed",
        "b": "done",
        "broken": "failed",
        "unreadable": "failed",
    }
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["b.h5"]
    assert not list(tmp_path.rglob(".*"))


def test_a_slide_of_glass_has_a_file_without_rows(drawn: Path, model: Path, tmp_path: Path) -> None:
    options = ["--tissue-min", "1", "--tissue.piece-min-um2", "1e9", "--workers", "1", "--engine", "torch-fp32"]
    command = ["extract", str(drawn / "a.svs"), "--model", str(model), "--out", str(tmp_path), "--format", "pt"]
    assert main([*command, *options]) == 0
    with h5py.File(tmp_path / "features" / "a.h5") as file:
        assert file["features"].shape == (0, 128)
        assert file["coords"].shape == (0, 2)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(long: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    command = ["extract", str(long), "--model", str(model), "--out", str(out), *OPTIONS, "--ray", "local"]
    done = subprocess.run([sys.executable, "-m", "histill", *command], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert content(out) == content(whole)
