"""`histill distill` on several processes, started with torchrun as a user starts it: gloo, real files, real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from histill.cli import main
from histill.distill.checkpoint import latest
from histill.distill.record import read_rows
from histill.models import read_bundle
from histill.synthetic.slides import write_slide

STEPS = 20
ALL_TERMS = ("--objective.token-cls=1", "--objective.token-patch=1", "--objective.relational=1")
CLOSE = 1e-5


def options(teacher: Path, tiles: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [
        "distill",
        "cpu",
        f"--teacher=local-dir:{teacher}",
        "--student=vit-nano",
        f"--tiles={tiles}",
        f"--out={out}",
        f"--steps={steps}",
        "--batch-tiles=8",
        "--objective.head-hidden=32",
        "--objective.head-bottleneck=16",
        "--checks.agreement-tiles=32",
        f"--checks.every-steps={steps}",
        "--precision=fp32",
        *more,
    ]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def torchrun(world: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    return subprocess.Popen(
        [*launcher, f"--master-port={free_port()}", "-m", "histill", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    return text


def trained(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def assert_same_losses(ours: Path, theirs: Path, steps: int = STEPS) -> None:
    """Every logged loss of every step, and the same tiles."""
    rows = trained(ours), trained(theirs)
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(steps))
    for own, other in zip(*rows, strict=True):
        assert own["tiles"] == other["tiles"]
        names = [name for name, value in own.items() if isinstance(value, float) and name != "gradient_norm"]
        for name in names:
            assert own[name] == pytest.approx(other[name], abs=CLOSE), (own["step"], name)
        assert own["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another patch size, width and normalisation, without registers, in timm's format."""
    folder = tmp_path_factory.mktemp("teacher16") / "vit16"
    folder.mkdir()
    torch.manual_seed(3)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1.0}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    record = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 48, "model_args": shape}
    (folder / "config.json").write_text(json.dumps(record | {"pretrained_cfg": cfg}))
    return folder


@pytest.fixture(scope="module")
def alone(small_teacher: Path, small_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, every distilling term."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(options(small_teacher, small_tiles, out, *ALL_TERMS)) == 0
    return out


def everything(other_teacher: Path, small_tiles: Path) -> list[str]:
    """Two teachers, one of them dropped now and then; two students; a labelled set; masked iBOT."""
    return [
        *ALL_TERMS,
        f"--teacher=local-dir:{other_teacher}",
        "--teacher-weight=1",
        "--teacher-weight=0.5",
        "--teacher-drop=0.5",
        "--student=vit-micro",
        f"--labelled={small_tiles / 'labels.csv'}",
        "--labelled-tiles=6",
        "--objective.ibot-tokens=block",
    ]


def test_two_sharded_ranks_equal_one(
    small_teacher: Path, other_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    more = everything(other_teacher, small_tiles)
    assert main(options(small_teacher, small_tiles, tmp_path / "one", *more)) == 0
    sharded = ["--scale.students=shard", "--scale.teachers=shard"]
    text = finish(torchrun(2, options(small_teacher, small_tiles, tmp_path / "two", *more, *sharded)))
    assert "2 processes" in text
    assert text.count("student written to") == 2, "ranks other than the first speak too"
    for student in ("vit-nano", "vit-micro"):
        one, two = tmp_path / "one" / student, tmp_path / "two" / student
        assert_same_losses(two, one)
        assert {"token_cls.0", "token_cls.1", "labelled_labels"} <= set(trained(one)[0])
        ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (two, one))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
        assert (two / "student" / "labelled_heads.safetensors").exists()
        assert len(read_bundle(two / "student").provenance["further_teachers"]) == 1


def test_two_ranks_equal_one_and_a_killed_rank_ends_the_job(
    alone: Path, small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    """Two ranks, one of them killed; then one rank, stopped in good order; then three to the end."""
    out = tmp_path / "run"
    arguments = options(small_teacher, small_tiles, out, *ALL_TERMS, "--checkpoint-minutes=0.005")
    job = torchrun(2, arguments)
    wait_for_steps(job, out, 6)
    os.kill(workers_of(job.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    text = job.communicate(timeout=90)[0]
    assert time.monotonic() - began < 60
    assert job.returncode != 0
    assert "another process of this run has ended" in text
    assert "SIGKILL" in text
    assert latest(out / "checkpoints") is not None

    single = subprocess.Popen(
        [sys.executable, "-m", "histill", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(single, out, 12)
    single.send_signal(signal.SIGTERM)
    text = single.communicate(timeout=90)[0]
    assert single.returncode == 0, text
    assert "going on from step" in text
    assert len(trained(out)) < STEPS

    finish(torchrun(3, arguments))
    assert_same_losses(out, alone)


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    deadline = time.monotonic() + 180
    while len(trained(out)) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.02)


def workers_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ours = [int(child) for child in children if b"histill" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ours) == 2, children
    return sorted(ours)


def test_a_student_that_fails_does_not_stop_the_others(
    small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One student's weights in a checkpoint are ruined; the run goes on from it."""
    out, sound = tmp_path / "run", tmp_path / "sound"
    for folder in (out, sound):
        assert main(options(small_teacher, small_tiles, folder, "--student=vit-micro", steps=6)) == 0
    capsys.readouterr()
    (out / "summary.json").unlink()
    newest: Any = latest(out / "checkpoints")
    state = load_file(newest)
    state["vit-micro/student/model.norm.weight"][0] = float("nan")
    save_file(state, newest.with_name("step_00000003.safetensors"), metadata={"step": "3", "failed": "{}"})
    newest.unlink()
    assert main(options(small_teacher, small_tiles, out, "--student=vit-micro", steps=6)) == 1
    said = capsys.readouterr().err
    assert "vit-micro learnt no more" in said.replace("\n", " ")
    assert "step 3" in said
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["students"]) == ["vit-nano"]
    assert "vit-micro" in summary["failed"]
    assert [row["step"] for row in trained(out / "vit-nano")] == list(range(6))
    assert len(trained(out / "vit-micro")) == 3
    assert (out / "vit-nano" / "student").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "terms",
    [
        "--objective.dino=1 --objective.ibot=0 --objective.koleo=0",
        "--objective.dino=0 --objective.ibot=1 --objective.koleo=0",
        "--objective.dino=0 --objective.ibot=1 --objective.koleo=0 --objective.ibot-tokens=random",
        "--objective.dino=1 --objective.ibot=0 --objective.koleo=1",
        "--objective.dino=0 --objective.ibot=0 --objective.koleo=0 --objective.token-cls=1",
        "--objective.dino=0 --objective.ibot=0 --objective.koleo=0 --objective.token-patch=1",
        "--objective.dino=0 --objective.ibot=0 --objective.koleo=0 --objective.relational=1",
    ],
)
def test_each_objective_alone(terms: str, small_teacher: Path, small_tiles: Path, tmp_path: Path) -> None:
    assert main(options(small_teacher, small_tiles, tmp_path / "one", *terms.split())) == 0
    finish(torchrun(2, options(small_teacher, small_tiles, tmp_path / "two", *terms.split())))
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def test_ranks_without_a_tile_of_a_fit_or_of_a_labelled_set_take_part(
    small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    """The last batch of the fit has one tile, and a step two labelled ones, for three ranks with sharded teachers."""
    more = [*ALL_TERMS, "--objective.fit-tiles=33", f"--labelled={small_tiles / 'labels.csv'}", "--labelled-tiles=2"]
    assert main(options(small_teacher, small_tiles, tmp_path / "one", *more, steps=4)) == 0
    sharded = ["--scale.teachers=shard", "--scale.students=replicate"]
    finish(torchrun(3, options(small_teacher, small_tiles, tmp_path / "three", *more, *sharded, steps=4)))
    assert_same_losses(tmp_path / "three", tmp_path / "one", 4)
    assert "labelled_labels" in trained(tmp_path / "three")[-1]


def test_ranks_read_slides_through_one_index(small_teacher: Path, tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / "slides" / f"s{number}.svs"
        path.parent.mkdir(exist_ok=True)
        write_slide(path, width_px=1800, height_px=1600, mpp=0.5, seed=number)
    more = ["--views.global-px=56", "--views.local-px=28", "--objective.cls-prototypes=4"]
    finish(torchrun(2, options(small_teacher, tmp_path / "slides", tmp_path / "out", *more, steps=2)))
    assert len(trained(tmp_path / "out")) == 2


def test_more_ranks_than_tiles_of_a_step_are_refused_at_the_start(
    small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    job = torchrun(3, [*options(small_teacher, small_tiles, tmp_path / "out"), "--batch-tiles=2"])
    text = job.communicate(timeout=300)[0]
    assert job.returncode != 0
    assert "each process needs a tile" in text
    assert not list((tmp_path / "out").glob("teacher_statistics*"))


def test_a_run_goes_on_in_another_layout(small_teacher: Path, small_tiles: Path, tmp_path: Path) -> None:
    plain = options(small_teacher, small_tiles, tmp_path / "plain", "--objective.token-cls=1", steps=6)
    assert main(plain) == 0
    arguments = options(small_teacher, small_tiles, tmp_path / "run", "--objective.token-cls=1", steps=6)
    process = subprocess.Popen([sys.executable, "-m", "histill", *arguments, "--checkpoint-minutes=0.0001"])
    wait_for_steps(process, tmp_path / "run", 3)  # type: ignore[arg-type]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    other = ["--scale.pack=True", "--scale.checkpoint-activations=True", "--loader-threads=2", "--device=cpu"]
    assert main([*arguments, *other]) == 0
    assert_same_losses(tmp_path / "run", tmp_path / "plain", 6)


@pytest.mark.parametrize(
    "layout",
    [
        "--scale.micro-tiles=3",
        "--scale.pack=True",
        "--scale.checkpoint-activations=True",
        pytest.param(
            "--scale.compile=True",
            # dynamo asks tensors for their gradients, and torch warns of it
            marks=[pytest.mark.slow, pytest.mark.filterwarnings(r"ignore:The \.grad attribute")],
        ),
    ],
)
def test_the_layout_in_memory_does_not_change_the_losses(
    layout: str, small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    terms = ["--objective.koleo=0", "--objective.token-cls=1", "--objective.token-patch=1"]
    for name, more in (("plain", []), ("other", [layout])):
        assert main(options(small_teacher, small_tiles, tmp_path / name, *terms, *more, steps=6)) == 0
    assert_same_losses(tmp_path / "other", tmp_path / "plain", 6)
