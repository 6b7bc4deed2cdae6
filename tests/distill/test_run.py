"""`histill distill` as a user runs it: real files, real signals, the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from histill.cli import main
from histill.distill import run
from histill.distill.checking import held_out_paths
from histill.distill.checkpoint import latest
from histill.distill.record import one_process, read_rows
from histill.errors import ConfigError
from histill.models import read_bundle
from histill.tiles.images import ImageFolder
from histill.tiles.order import tile_at

STEPS = 14
SMALL = [
    "--student=vit-nano",
    "--batch-tiles=8",
    "--objective.head-hidden=32",
    "--objective.head-bottleneck=16",
    "--objective.token-cls=1",
    "--objective.token-patch=1",
    "--checks.agreement-tiles=32",
]


def command(teacher: Path, tiles: Path, out: Path, *more: str) -> list[str]:
    return [
        "distill",
        "cpu",
        "--teacher",
        f"local-dir:{teacher}",
        "--tiles",
        str(tiles),
        "--out",
        str(out),
        *SMALL,
        *more,
    ]


def losses(out: Path) -> dict[int, float]:
    rows = [row for row in read_rows(out / "metrics.jsonl") if "loss" in row]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows), "a step is written twice"
    return found


@pytest.fixture(scope="module")
def whole(small_teacher: Path, small_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(small_teacher, small_tiles, out, "--steps", str(STEPS))) == 0
    return out


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "histill", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    deadline = time.monotonic() + 180
    while len(read_rows(out / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.02)


def test_a_run_folder_holds_what_is_promised(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert sorted(losses(whole)) == list(range(STEPS))
    assert summary["steps"] == STEPS
    assert summary["tiles_seen"] == 8 * STEPS
    assert set(summary["student"]) == {"labels", "paired"}
    assert summary["retention"]["labels"], "the teacher is not better than an untrained student: the test tests nothing"
    for metric, share in summary["retention"]["labels"].items():
        untrained, teacher = summary["untrained"]["labels"][metric], summary["teacher"]["labels"][metric]
        assert share == pytest.approx((summary["student"]["labels"][metric] - untrained) / (teacher - untrained))
    assert (whole / "config.json").exists()
    row = read_rows(whole / "metrics.jsonl")[0]
    assert {"dino", "ibot", "koleo", "token_cls", "token_patch", "dino_target_entropy", "lr"} <= set(row)
    assert row["loss"] == pytest.approx(
        row["dino"] + row["ibot"] + 0.1 * row["koleo"] + row["token_cls"] + row["token_patch"], rel=1e-5
    )


def test_the_student_is_the_average_and_carries_its_origin(whole: Path, small_teacher: Path) -> None:
    bundle = read_bundle(whole / "student")
    state = load_file(latest(whole / "checkpoints"))
    for name, tensor in bundle.encoder.model.state_dict().items():
        assert torch.equal(tensor, state[f"average/model.{name}"])
    assert bundle.provenance["teacher"]["content_hash"] == read_bundle(small_teacher).encoder.content_hash()
    assert bundle.provenance["config"]["student"] == ["vit-nano"]


def test_checkpoints_hold_no_teacher(whole: Path) -> None:
    state = load_file(latest(whole / "checkpoints"))
    assert {name.split("/")[0] for name in state} == {"student", "average", "task", "optimiser"}
    assert not any("teacher" in name or "encoder" in name for name in state)


def test_kill_at_any_step_and_again_gives_the_same_losses(
    whole: Path, small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = command(small_teacher, small_tiles, out, "--steps", str(STEPS), "--checkpoint-minutes", "0.005")
    for steps in (2, 7):  # before the first checkpoint or just after it, and in the middle
        process = start(arguments)
        wait_for_steps(process, out, steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "summary.json").exists()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # what a kill within a write leaves
    assert main(arguments) == 0
    assert losses(out) == losses(whole)
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigterm_writes_a_checkpoint_and_exits_0(
    whole: Path, small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = command(small_teacher, small_tiles, out, "--steps", str(STEPS))
    process = start(arguments)
    wait_for_steps(process, out, 3)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "goes on from there" in text
    done = len(losses(out))
    assert latest(out / "checkpoints").name == f"step_{done:08d}.safetensors"
    assert not (out / "summary.json").exists()
    assert main(arguments) == 0
    assert losses(out) == losses(whole)


def test_a_finished_run_is_left_alone(whole: Path, small_teacher: Path, small_tiles: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(command(small_teacher, small_tiles, whole, "--steps", str(STEPS))) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_config_json_starts_the_run_again(whole: Path, tmp_path: Path) -> None:
    assert main(["distill", str(whole / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(whole)


def test_minutes_become_steps_and_are_recorded(small_teacher: Path, small_tiles: Path, tmp_path: Path) -> None:
    assert main(command(small_teacher, small_tiles, tmp_path / "run", "--minutes", "0.1")) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["steps"] == len(losses(tmp_path / "run"))
    assert plan["step_seconds"] > 0


def test_the_measurement_leaves_no_trace(
    whole: Path, small_teacher: Path, small_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose speed was measured first has the losses of one that was told its steps."""
    plan = run._Run._plan

    def measured_plan(self: run._Run) -> Any:
        assert self._measure() > 0
        return plan(self)

    monkeypatch.setattr(run._Run, "_plan", measured_plan)
    assert main(command(small_teacher, small_tiles, tmp_path / "run", "--steps", str(STEPS))) == 0
    assert losses(tmp_path / "run") == losses(whole)


def test_what_a_killed_measurement_left_is_not_taken_up(
    whole: Path, small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert main(command(small_teacher, small_tiles, out, "--steps", "3", "--seed", "5")) == 0
    for name in ("plan.json", "summary.json", "metrics.jsonl"):  # as if it had been killed in its measurement
        (out / name).unlink()
    assert main(command(small_teacher, small_tiles, out, "--steps", str(STEPS))) == 0
    assert losses(out) == losses(whole)


@pytest.fixture
def own_tiles(small_tiles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_tiles, tmp_path / "tiles"))


def test_damaged_jpeg_is_counted_named_and_not_replaced(
    small_teacher: Path, own_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = next((own_tiles / "paired").rglob("*.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    name = damaged.relative_to(own_tiles).as_posix()
    assert main(command(small_teacher, own_tiles, tmp_path / "run", "--steps", "12")) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["unreadable"]) == [name]
    assert summary["tiles_seen"] < 12 * 8
    assert name in capsys.readouterr().err.replace("\n", "")


def test_a_whole_batch_of_damaged_tiles_is_passed_over(small_teacher: Path, own_tiles: Path, tmp_path: Path) -> None:
    source = ImageFolder.scan(own_tiles, hold_out=held_out_paths(own_tiles, (own_tiles / "labels.csv",)))
    damaged = [source.paths[index] for index in tile_at(np.arange(8, 16), len(source), 0)]
    for name in damaged[1:]:  # one readable tile is left: too few for Sinkhorn and KoLeo
        (own_tiles / name).write_bytes(b"")
    out = tmp_path / "run"
    assert (
        main(command(small_teacher, own_tiles, out, "--steps", "3", "--checks.tables", str(own_tiles / "labels.csv")))
        == 0
    )
    assert sorted(losses(out)) == [0, 2]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["unreadable"]) == set(damaged[1:])


def test_test_tiles_are_held_out(small_teacher: Path, own_tiles: Path, tmp_path: Path) -> None:
    plan = {}
    for switch in ("True", "False"):
        out = tmp_path / switch
        assert main(command(small_teacher, own_tiles, out, "--steps", "1", "--checks.hold-out-test", switch)) == 0
        plan[switch] = json.loads((out / "plan.json").read_text())
    assert plan["True"]["tiles_held_out"] > 0
    assert plan["True"]["tiles"] + plan["True"]["tiles_held_out"] == plan["False"]["tiles"]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    for word in words:
        assert word in text.replace("\n", " "), text


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_steps(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    explode = ["--optimiser.base-lr=1e30", "--optimiser.clip=0", "--optimiser.warmup=0", "--checks.every-steps=9"]
    fails(
        command(small_teacher, small_tiles, out, "--steps", "5", *explode),
        capsys, "not finite", "step 1", "dino", "token_patch",
    )  # fmt: skip
    assert list(losses(out)) == [0]
    assert latest(out / "checkpoints") is None


def test_student_that_starts_with_nan_is_refused(
    small_teacher: Path, small_tiles: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(whole / "student", tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = command(small_teacher, small_tiles, tmp_path / "run", "--steps", "5", "--init", f"local-dir:{broken}")
    fails(arguments, capsys, "not finite", "weights")


def test_teacher_with_nan_weights_is_refused(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(small_teacher, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    fails(command(broken, small_tiles, tmp_path / "run", "--steps", "5"), capsys, "teacher", "not finite")


def test_bad_input_is_one_clear_error(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    fails(command(small_teacher, tmp_path / "nowhere", out, "--steps", "1"), capsys, "does not exist", "nowhere")
    fails(command(small_teacher, empty, out, "--steps", "1"), capsys, "no tiles", "empty")
    fails(command(small_teacher, small_tiles, out), capsys, "--steps or --minutes")
    wrong = command(small_teacher, small_tiles, out, "--steps", "1")
    wrong[wrong.index("--teacher") + 1] = "h-optimus-9"
    fails(wrong, capsys, "h-optimus-9", "h-optimus-0")
    wrong[wrong.index("--teacher") + 1] = f"local-dir:{small_teacher}"
    wrong[wrong.index("--student=vit-nano")] = "--student=vit-tinny"
    fails(wrong, capsys, "vit-tinny", "vit-tiny")
    fails(["distill", "tokenz"], capsys, "tokens")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--steps 1 --minutes 1", "one length"),
        ("--steps -1", "cannot be negative"),
        ("--steps 1 --objective.teacher-head none", "need teacher scores"),
        ("--steps 1 --objective.dino 0 --objective.ibot 0", "nothing ties the student to the teacher"),
        ("--steps 1 --views.n-global 1 --views.n-local 0", "another crop's teacher scores"),
        ("--steps 1 --objective.ibot-tokens most", "ibot-tokens"),
    ],
)
def test_settings_that_do_not_fit_stop_at_the_command_line(
    options: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "distill",
                "cpu",
                "--teacher",
                "x",
                "--tiles",
                str(tmp_path),
                "--out",
                str(tmp_path / "o"),
                *options.split(),
            ]
        )
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()


def test_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["distill", "cpu", "--objective.dinno", "1"])
    assert stop.value.code == 2
    assert "--objective.dinno" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(
    whole: Path, small_teacher: Path, small_tiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(command(small_teacher, small_tiles, whole, "--steps", "99"), capsys, "other settings", "14 there, 99 now")


def test_missing_tensorboard_is_said_before_anything_is_written(
    small_teacher: Path,
    small_tiles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = command(small_teacher, small_tiles, tmp_path / "run", "--steps", "1", "--tensorboard", "True")
    fails(arguments, capsys, "histill[tensorboard]")
    assert not (tmp_path / "run").exists()


def test_changed_tiles_are_refused(
    small_teacher: Path, own_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_teacher, own_tiles, tmp_path / "run", "--steps", "2")
    assert main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    next((own_tiles / "paired").rglob("*.jpg")).unlink()
    (own_tiles / "paired.csv").unlink()
    fails(arguments, capsys, "tiles have changed")


def test_changed_tables_are_refused(
    small_teacher: Path, own_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_teacher, own_tiles, tmp_path / "run", "--steps", "2")
    assert main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    table = own_tiles / "paired.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    fails(arguments, capsys, "tables of the checks have changed")


def test_more_prototypes_than_tiles_is_an_error(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_teacher, small_tiles, tmp_path, "--steps", "1", "--objective.cls-prototypes", "4096")
    fails(arguments, capsys, "fewer tokens than prototypes", "4096")


def test_changed_teacher_is_refused(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(small_teacher, tmp_path / "teacher"))
    arguments = command(own, small_tiles, tmp_path / "run", "--steps", "2")
    assert main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    weights = load_file(own / "model.safetensors")
    weights["norm.weight"][0] += 1.0
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    fails(arguments, capsys, "teacher's weights have changed")


def test_second_process_in_a_run_folder_is_refused(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with one_process(tmp_path):
        fails(command(small_teacher, small_tiles, tmp_path, "--steps", "1"), capsys, "another process")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_damaged_checkpoint_is_named(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_teacher, small_tiles, tmp_path / "run", "--steps", "2")
    assert main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    newest: Any = latest(tmp_path / "run" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:1000])
    fails(arguments, capsys, "checkpoint cannot be read", newest.name)


def test_the_package_is_the_function_too() -> None:
    import histill
    from histill.distill import DistillConfig, distill

    for named in (histill.distill, histill.distill, distill):
        with pytest.raises(ConfigError, match="missing"):
            named(DistillConfig())
