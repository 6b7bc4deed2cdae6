"""Make the small teacher that ships with ``histill demo``.

It draws synthetic tissue, puts a folder of real tiles beside it, distils a larger teacher into a ``vit-micro`` on both,
and writes the result in float16 where the package looks for it::

    python examples/make_demo_teacher.py --teacher local-dir:FOLDER --real FOLDER --work FOLDER --minutes 10

The same command again goes on where it was stopped. What ships was made this way; its ``README.md`` says when and
from what.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histill import config as configs
from histill import files
from histill.distill import PRESETS, DistillConfig

ASSETS = Path(__file__).resolve().parents[1] / "src" / "histill" / "demo" / "assets" / "teacher"
GLOBAL_PX, LOCAL_PX = 112, 56
PATHS = ("teacher", "tiles", "table", "out", "init")  # of this machine: they do not belong into a package


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """What the demo's teacher is made from."""

    teacher: str
    """The larger teacher: any name that `histill distill --teacher` takes."""
    teacher_name: str = "a DINOv2-type ViT-S/14"
    """What the model card calls it."""
    teacher_licence: str = "MIT"
    """Its licence; the small teacher is passed on under the same."""
    real: Path
    """Folder of real tiles, at any depth."""
    real_name: str = (
        "tiles of AMi-Br (mitoses, MIT), of the WsiRegistration examples\n  (cytology under four scanners, MIT) "
        "and of the DSB 2018 (CC0) and kidney demo (MIT) image sets"
    )
    """What the model card calls them, with their licences."""
    work: Path
    """Folder for the tiles and the run; may be deleted afterwards."""
    out: Path = ASSETS
    """Where the small teacher goes."""
    minutes: float = 10.0
    """Length of the distillation."""
    steps: int = 0
    """Length in steps; above 0 it takes the place of `minutes`."""
    synthetic: int = 4_000
    """Synthetic tiles beside the real ones."""
    fit_tiles: int = 4_000
    """Tiles from which statistics and prototypes are fitted before the first step."""
    workers: int = 1
    """Processes that draw."""
    seed: int = 1_000
    """Far from the demo's own seeds, so that no demo shows tissue that the teacher has seen."""


def main(argv: list[str]) -> None:
    """Make the teacher."""
    config = configs.parse(TeacherConfig, argv, prog="make_demo_teacher.py", description="Make the demo's teacher.")
    from histill.distill.run import distill

    tiles = gather(config)
    summary = distill(run_config(config, tiles))
    if summary is not None:
        write_asset(config, summary)
        size = sum(path.stat().st_size for path in config.out.iterdir())
        print(f"wrote {config.out}, {size / 1e6:.2f} MB")


def gather(config: TeacherConfig) -> Path:
    """Draw the synthetic tiles and link the real ones beside them."""
    from histill.synthetic import write_tile_set

    tiles = config.work / "tiles"
    if not (tiles / "synthetic").exists():
        write_tile_set(
            tiles / "synthetic",
            tiles=config.synthetic,
            slides=24,
            tile_px=128,
            fields=min(120, config.synthetic // 8),
            seed=config.seed,
            workers=config.workers,
        )
    if not (tiles / "real").exists():
        (tiles / "real").symlink_to(config.real.resolve(), target_is_directory=True)
    return tiles


def run_config(config: TeacherConfig, tiles: Path) -> DistillConfig:
    """The preset `cpu` with token losses beside DINO and iBOT; the synthetic test slides stay out."""
    from histill.evaluate.checks import find_checks

    base = PRESETS["cpu"]
    return dataclasses.replace(
        base,
        teacher=(config.teacher,),
        student=("vit-micro",),
        tiles=tiles,
        out=config.work / "run",
        minutes=0.0 if config.steps else config.minutes,
        steps=config.steps,
        seed=config.seed,
        views=dataclasses.replace(base.views, global_px=GLOBAL_PX, local_px=LOCAL_PX),
        objective=dataclasses.replace(base.objective, token_cls=1.0, token_patch=1.0, fit_tiles=config.fit_tiles),
        checks=dataclasses.replace(base.checks, tables=tuple(find_checks(tiles / "synthetic"))),
    )


def write_asset(config: TeacherConfig, summary: dict[str, Any]) -> None:
    """Round the weights to float16 and write the bundle with a card of its own."""
    import torch
    from safetensors.torch import save

    from histill.models.bundle import read_bundle, write_bundle

    student = read_bundle(config.work / "run" / "student")
    model = student.encoder.model
    with torch.no_grad():  # the content hash is that of the weights as they will be read
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    record = provenance(config, student.provenance, summary)
    whole = config.work / "asset"
    write_bundle(
        whole,
        model,
        student,
        mean=student.encoder.mean,
        std=student.encoder.std,
        input_px=GLOBAL_PX,
        provenance=record,
        card=card(config, record),
        licence="MIT",
    )
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with files.atomic_folder(config.out) as temporary:
        for name in ("config.json", "histill.json", "README.md"):
            shutil.copyfile(whole / name, temporary / name)
        # save_file makes a file that only its owner can read
        (temporary / "model.safetensors").write_bytes(save(halves, metadata={"format": "pt"}))


def provenance(config: TeacherConfig, student: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """The run's record without the paths of this machine."""
    run = {name: value for name, value in student["config"].items() if name not in PATHS}
    run["checks"] = {name: value for name, value in run["checks"].items() if name != "tables"}
    return {
        "teacher": student["teacher"] | {"name": config.teacher_name, "licence": config.teacher_licence},
        "config": run,
        "data": student["data"]
        | {"synthetic_tiles": config.synthetic, "real_tiles": " ".join(config.real_name.split())},
        "steps": summary["steps"],
        "metrics": student["metrics"],
    }


def card(config: TeacherConfig, record: dict[str, Any]) -> str:
    """README.md of the asset: origin and licence."""
    agreement = f"linear CKA {record['metrics']['cka']:.3f}"
    return f"""---
license: mit
library_name: timm
tags: [timm, pathology, distillation, histill]
---

# The demo's teacher

A small vision transformer (ViT, 192 wide, 6 blocks, patch 14, 4 registers; 2.8 M parameters in float16), made so that
`histill demo` has a teacher without a download. **It is for the demo and for tests: it is no pathology foundation model
and no medical device.**

- Origin: distilled by histill from {config.teacher_name} (licence: {config.teacher_licence}), with
  `examples/make_demo_teacher.py`, {record["steps"]:,} steps of {record["config"]["batch_tiles"]} tiles.
- Data: {record["data"]["tiles"]:,} tiles. Synthetic tissue drawn by histill, and
  {config.real_name}. No tile is included here.
- Agreement with its own teacher on training tiles: {agreement}.
- Licence: MIT, as its teacher's. Provenance: `histill.json`.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
