"""Steps of distillation side by side in one run: students together or apart, packing, compiled blocks, precision.

Modes take turns, so that what else the machine does hits them alike; each figure is a median over rounds. On a CPU the
process's CPU seconds stand beside the wall clock: other work slows the clock far more than it raises them. (They count
threads that wait, too, unless OMP_WAIT_POLICY=PASSIVE is set; then waking them costs time.)

    python benchmarks/distill_step.py                     two students behind a large teacher, on the CPU
    python benchmarks/distill_step.py --what layout       packing, compile and precision with the preset `cpu`
    python benchmarks/distill_step.py --what layout --give-back     the same while glibc gives memory back
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from statistics import median

from random_run import one_step, random_batch, random_parts, with_students

from histill.distill.config import DistillConfig
from histill.distill.plan_config import PlanConfig
from histill.distill.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["students", "layout"], default="students")
    parser.add_argument(
        "--give-back", action="store_true", help="leave the allocator as it is: no freed memory is kept"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", default="timm:vit_base_patch14_reg4_dinov2")
    options = parser.parse_args()
    (students if options.what == "students" else layouts)(options)


def students(options: argparse.Namespace) -> None:
    """One teacher forward for two students, against a run for each."""
    base = dataclasses.replace(
        PRESETS["tokens"],
        teacher=(options.teacher,),
        device=options.device,
        batch_tiles=16,
        views=dataclasses.replace(PRESETS["tokens"].views, global_px=112),
    )
    pair = ("vit-tiny", "vit-micro")
    times = timed({"+".join(names): with_students(base, *names) for names in (pair, pair[:1], pair[1:])}, options)
    show(times, base.batch_tiles)
    wall, cpu = (times["+".join(pair)][i] / sum(times[name][i] for name in pair) for i in (0, 1))
    print(f"together / apart       {wall:8.3f} wall  {cpu:8.3f} cpu   (teacher {options.teacher})")


def layouts(options: argparse.Namespace) -> None:
    """The same step in other layouts; ratios to the plain one."""
    base = dataclasses.replace(
        PRESETS["cpu"],
        teacher=("timm:vit_small_patch14_reg4_dinov2",),
        device=options.device,
        batch_tiles=16,
        views=dataclasses.replace(PRESETS["cpu"].views, global_px=112, local_px=56),
        objective=dataclasses.replace(PRESETS["cpu"].objective, cls_prototypes=512, patch_prototypes=1024),
    )
    scaled = {
        "pack": {"pack": True},
        "compile": {"compile": True},
        "activations remade": {"checkpoint_activations": True},
    }
    configs = {"plain": base}
    configs |= {
        name: dataclasses.replace(base, scale=dataclasses.replace(base.scale, **scale))
        for name, scale in scaled.items()
    }
    configs["float32"] = dataclasses.replace(base, precision="fp32")
    times = timed(configs, options)
    show(times, base.batch_tiles)
    for name, (wall, cpu) in times.items():
        print(f"{name:22} / plain {wall / times['plain'][0]:.3f} wall  {cpu / times['plain'][1]:.3f} cpu")


def show(times: dict[str, tuple[float, float]], tiles: int) -> None:
    for name, (wall, cpu) in times.items():
        print(f"{name:22} {1e3 * wall / tiles:8.2f} ms a tile wall  {1e3 * cpu / tiles:8.2f} cpu")


def timed(configs: dict[str, DistillConfig], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds and CPU seconds a step of each, in turns; two rounds warm up."""
    runs = {
        name: (
            random_parts(config, PlanConfig(), keep_memory=not options.give_back),
            random_batch(config.batch_tiles, 128),
        )
        for name, config in configs.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(options.rounds + 2):
        for name, (parts, batch) in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            one_step(parts, batch, number)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (median(wall for wall, _ in found[2:]), median(cpu for _, cpu in found[2:]))
        for name, found in seconds.items()
    }


if __name__ == "__main__":
    main()
