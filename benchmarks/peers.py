"""A step of histill beside a step of lightly-train and of birder: same teacher, student, crops, batch and threads.

Each program runs its own training loop on the same tiles, in a process of its own; processes take turns. A hook of
PyTorch on the optimizer notes the end of every step, so that a step is everything from one update to the next: waiting
for data, views, teacher, student, gradient, update, logging. The peers live in a separate virtual environment.

    python benchmarks/peers.py --venv PEERS --prepare                                makes it (6.6 GB)
    python benchmarks/peers.py --venv PEERS --teacher TEACHER --tiles TILES          measures

TEACHER is a folder with a timm ViT-S/14 (config.json, model.safetensors), TILES one with images and no tables. Whatever
else the processor does slows all of them: beside the wall clock stand the CPU seconds of the process and its workers.
(They count threads that wait, too, unless OMP_WAIT_POLICY=PASSIVE is set; then waking them costs time.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

PINNED = ("lightly-train==0.18.0", "birder==0.8.4", "timm==1.0.31", "torch==2.14.1", "torchvision==0.29.1")
STUDENT = {"img_size": 224, "dynamic_img_size": True, "embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 1.0}
GLOBAL_PX, LOCAL_PX, N_LOCAL, PROTOTYPES = 112, 56, 2, (512, 1024)
WARM_STEPS = 3

# name -> (whose environment, tiles a step)
RUNS = {
    "lightly-train": ("peers", 64),
    "histill tokens": ("ours", 64),
    "birder": ("peers", 32),
    "histill cpu, block": ("ours", 32),
    "histill cpu, all": ("ours", 32),
}
PAIRS = (
    ("lightly-train", "histill tokens"),
    ("birder", "histill cpu, block"),
    ("birder", "histill cpu, all"),
)
NOTES = f"""\
same: ViT-S/14 teacher, the student vit-tiny (timm, patch 14, 4 registers, 192 wide, 12 blocks) from random weights,
  bfloat16 autocast, equal PyTorch threads, one thread or process that loads ahead,
  torch {PINNED[3][7:]}, no compile
lightly-train (method distillation = distillationv3) and histill tokens: one {GLOBAL_PX} px crop a tile for both models
  lightly-train: KL to the teacher over a queue of teacher class tokens and over the tokens of an image, two linear
  layers, mixup, albumentations (crop, flip, colour, grey, blur) in the loader; AdamW
  histill: cosine + smooth-L1 to standardised class and patch tokens, distances and angles, KoLeo, moving average;
  crop, flip, turn, colour, stain, blur in the step; the teacher sees the crop without jitter; AdamW
birder (train_dino_v2_dist) and histill cpu: 2 x {GLOBAL_PX} px + {N_LOCAL} x {LOCAL_PX} px, DINO + iBOT + KoLeo, two
  heads of 3 layers 2048 wide, bottleneck 256, {PROTOTYPES[0]} and {PROTOTYPES[1]} prototypes, Sinkhorn; AdamW, clip 3,
  moving average
  birder: its own ViTs of the same shapes, teacher with random weights (its checkpoints do not take timm's) and heads
  like the student's; iBOT on the mask's positions (15 % of tokens on average); views in the loader
  histill: k-means prototypes instead of teacher heads; iBOT on 15 % of tokens (block) or, the preset, on all"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true", help="make the virtual environment and install the peers")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--tiles", type=Path)
    parser.add_argument("--steps", type=int, default=16, help="timed steps of a run, after the warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch; 1 is least upset by other work")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--child", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.venv)
    elif options.teacher is None or options.tiles is None:
        parser.error("--teacher and --tiles are needed to measure")
    elif options.child:
        child(options)
    else:
        compare(options)


def prepare(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "pip", "install", *PINNED], check=True)


def compare(options: argparse.Namespace) -> None:
    """Run all programs in turns, and print medians and ratios."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    load = []
    for _ in range(options.rounds):
        for name in found:
            load.append(os.getloadavg()[0])
            found[name].append(measured(options, name))
    print(NOTES)
    print(
        f"{options.rounds} turns of {options.steps} steps, {options.threads} threads; ms a tile; "
        f"load average {min(load):.1f} to {max(load):.1f}"
    )
    tiles = {name: RUNS[name][1] for name in found}
    for name, runs in found.items():
        wall, cpu = ([1e3 * run[key] / tiles[name] for run in runs] for key in ("wall", "cpu"))
        parts = {key: 1e3 * median(run["parts"][key] for run in runs) / tiles[name] for key in runs[0]["parts"]}
        print(
            f"{name:19} wall {median(wall):7.2f} ({min(wall):.2f} to {max(wall):.2f})  cpu {median(cpu):7.2f} "
            f"({min(cpu):.2f} to {max(cpu):.2f})  held up {sum(run['held_up'] for run in runs)}  "
            + "  ".join(f"{key} {ms:.2f}" for key, ms in parts.items())
        )
    for peer, ours in PAIRS:
        if peer in found and ours in found:
            ratios = {
                key: [
                    theirs[key] / tiles[peer] / (own[key] / tiles[ours])
                    for theirs, own in zip(found[peer], found[ours], strict=True)
                ]
                for key in ("wall", "cpu")
            }
            print(
                f"{peer} / {ours}: "
                + ", ".join(f"{key} {median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for key, r in ratios.items())
            )


def measured(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One process: seconds and CPU seconds of a median step, and the parts that were seen."""
    python = sys.executable if RUNS[name][0] == "ours" else str(options.venv / "bin" / "python")
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, "--child", name, "--folder", folder, "--venv", options.venv]
        command += ["--teacher", options.teacher.resolve(), "--tiles", options.tiles.resolve()]
        command += ["--steps", options.steps, "--threads", options.threads]
        quiet = {
            "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
            "MODELS_DIR": folder,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(options.threads),
        }
        log = Path(folder) / "log"
        with log.open("w") as output:
            ended = subprocess.run(
                [*map(str, command)],
                cwd=folder,
                env=os.environ | quiet,
                stdout=output,
                stderr=output,
            )
        result = Path(folder) / "result.json"
        if not result.exists():
            raise SystemExit(f"{name} ended with {ended.returncode}:\n{log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer


class Clock:
    """Notes the end of each step; after the last one it writes the result and ends the process."""

    def __init__(self, steps: int, folder: Path) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.steps, self.folder = steps, folder
        self.ends: list[tuple[float, float]] = []
        self.parts: list[dict[str, float]] = [{}]
        register_optimizer_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """Note that a step has ended."""
        self.ends.append((time.perf_counter(), cpu_seconds()))
        self.parts.append({})
        if len(self.ends) == WARM_STEPS + self.steps:
            self.write()

    def write(self) -> None:
        """Write medians of the timed steps, and leave."""
        ends = self.ends[WARM_STEPS - 1 :]
        wall, cpu = ([after[i] - before[i] for before, after in pairwise(ends)] for i in (0, 1))
        parts = self.parts[WARM_STEPS:-2]  # the last step's student is not booked before its hook
        whole = median(wall)
        known = {name: median(part.get(name, 0.0) for part in parts) for name in parts[0]}
        if len(known) > 1:
            known["rest"] = whole - sum(known.values())
        # CPU seconds: the mean, since a loader's work for one step falls into another.
        result = {"wall": whole, "cpu": sum(cpu) / len(cpu), "parts": known}
        # A step far longer than its CPU time was held up by other work on the machine.
        result["held_up"] = sum(seconds > 2 * whole for seconds in wall)
        (self.folder / "result.json").write_text(json.dumps(result))
        os._exit(0)  # each program would go on to checkpoints, checks or exports

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book the block's time under a name."""
        began = time.perf_counter()
        yield
        part = self.parts[-1]
        part[name] = part.get(name, 0.0) + time.perf_counter() - began

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Book every call of a method under a name."""
        inner: Callable[..., Any] = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)


def cpu_seconds() -> float:
    """CPU time of this process and of the workers below it."""
    ticks, waiting = 0, ["self"]
    while waiting:
        process = Path("/proc") / waiting.pop()
        try:
            ticks += sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:13]))
            for task in (process / "task").iterdir():
                waiting += (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def child(options: argparse.Namespace) -> None:
    """Run one program in this process until it has made its steps."""
    import torch

    torch.set_num_threads(options.threads)
    clock = Clock(options.steps, options.folder)
    run = {"lightly-train": lightly_train, "birder": birder}.get(options.child, histill)
    run(options, clock)
    raise SystemExit("the run ended before its steps were made")


def lightly_train(options: argparse.Namespace, clock: Clock) -> None:
    """Its public function with the defaults of its default method, but for what the comparison settles."""
    import lightly_train
    import timm
    from lightly_train._methods.distillationv3.distillationv3 import DistillationV3
    from safetensors.torch import load_file
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    config = json.loads((options.teacher / "config.json").read_text())
    teacher = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    teacher.load_state_dict(load_file(options.teacher / "model.safetensors"))
    student = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **STUDENT)
    clock.watch(_BaseDataLoaderIter, "__next__", "data")
    clock.watch(DistillationV3, "_forward_teacher", "teacher")
    clock.watch(DistillationV3, "_forward_student", "student forward")
    lightly_train.pretrain(
        out=str(options.folder / "out"),
        data=str(options.tiles),
        model=student,
        method="distillation",
        method_args={"teacher": teacher},
        batch_size=RUNS["lightly-train"][1],
        epochs=1_000,
        num_workers=1,
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        transform_args={"image_size": (GLOBAL_PX, GLOBAL_PX)},
    )


def birder(options: argparse.Namespace, clock: Clock) -> None:
    """Its script's function, with a teacher checkpoint of the kind that the script reads."""
    import torch
    from birder.common.fs_ops import model_path
    from birder.common.lib import get_mim_network_name
    from birder.model_registry import registry
    from birder.net.ssl.dino_v2 import DINOv2Student, DINOv2Teacher
    from birder.scripts import train_dino_v2_dist as script
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    heads = {"dino_out_dim": PROTOTYPES[0], "ibot_out_dim": PROTOTYPES[1], "head_bottleneck_dim": 256}
    body = {"use_bn": False, "num_layers": 3, "hidden_dim": 2048, "ibot_separate_head": True}
    shape = {"hidden_dim": 192, "num_layers": 12, "num_heads": 3, "mlp_dim": 768, "drop_path_rate": 0.0}
    names = {"network": "vit_reg4_s14_nps_ls", "teacher": "vit_s14_ls"}
    still = {"patch_size": 14, "drop_path_rate": 0.0}
    size = (GLOBAL_PX, GLOBAL_PX)
    if not registry.exists(names["teacher"]):
        names["teacher"] = names["network"]
        still["num_reg_tokens"] = 0
    network = registry.net_factory(names["teacher"], 0, 3, config=still, size=size)
    teacher = DINOv2Teacher(network, config=heads | body)
    path = model_path(get_mim_network_name("dino_v2", encoder=names["teacher"]), epoch=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state": {f"teacher.{key}": value for key, value in teacher.state_dict().items()}}, path)
    clock.watch(_BaseDataLoaderIter, "__next__", "data")
    clock.watch(DINOv2Teacher, "forward", "teacher")
    clock.watch(DINOv2Student, "forward", "student forward")
    arguments = script.args_from_dict(
        **names,
        **heads,
        ibot_separate_head=True,
        model_config=shape,
        teacher_model_config=still,
        teacher_epoch=1,
        size=list(size),
        local_crop_size=[LOCAL_PX, LOCAL_PX],
        local_crops_number=N_LOCAL,
        batch_size=RUNS["birder"][1],
        centering="sinkhorn_knopp",
        opt="adamw",
        lr=2e-4,
        wd=0.04,
        clip_grad_norm=3.0,
        amp=True,
        amp_dtype="bfloat16",
        device="cpu",
        num_workers=1,
        no_summary=True,
        epochs=200,
        data_path=[options.tiles],
    )
    script.train(arguments)


def histill(options: argparse.Namespace, clock: Clock) -> None:
    """Its command, with the presets' settings but for what the comparison settles."""
    from histill import cli
    from histill.distill.progress import Stopwatch

    mark = Stopwatch.mark

    def noted(watch: Stopwatch, name: str) -> None:
        before = watch.step_seconds.get(name, 0.0)
        mark(watch, name)
        # `student` ends after the optimizer, whose hook has begun the next step.
        part = clock.parts[-2 if name == "student" and len(clock.parts) > 1 else -1]
        part[name] = part.get(name, 0.0) + watch.step_seconds[name] - before

    Stopwatch.mark = noted  # type: ignore[method-assign]
    preset = "tokens" if "tokens" in options.child else "cpu"
    views = {"global-px": GLOBAL_PX} | ({} if preset == "tokens" else {"local-px": LOCAL_PX, "n-local": N_LOCAL})
    settings: dict[str, Any] = {
        "teacher": f"local-dir:{options.teacher}",
        "student": "vit-tiny",
        "init": "random",
        "tiles": options.tiles,
        "out": options.folder / "out",
        "steps": 100_000,
        "batch-tiles": RUNS[options.child][1],
        "precision": "bf16",
        "checks.every-steps": 100_000,
        "checks.agreement-tiles": 32,
        "objective.fit-tiles": 512,
    } | {f"views.{key}": value for key, value in views.items()}
    if preset == "cpu":
        settings |= {
            "objective.cls-prototypes": PROTOTYPES[0],
            "objective.patch-prototypes": PROTOTYPES[1],
            "objective.head-hidden": 2048,
            "objective.head-bottleneck": 256,
            "objective.ibot-tokens": options.child.rpartition(" ")[2],
            "objective.ibot-share": 0.15,
        }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    sys.argv = ["histill", "distill", preset, *words]
    cli.main()


if __name__ == "__main__":
    main()
