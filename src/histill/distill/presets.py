"""Named starting points, as plain objects. Any field can still be set on the command line."""

from __future__ import annotations

from histill.distill.config import DistillConfig, ObjectiveConfig, OptimiserConfig
from histill.distill.views.config import ViewConfig

__all__ = ["PRESETS"]

# The paper's architecture with DINOv2's recipe. The paper does not state its temperatures, learning rate, batch and
# length: these are DINOv2's or ours, never "the paper's".
H0_MINI = DistillConfig(
    student=("h0-mini",),
    batch_tiles=64,  # ten crops a tile; 128 take 57 GB of a GPU by histill distill --plan, which was not measured
    views=ViewConfig(global_px=224, local_px=98),
    objective=ObjectiveConfig(fit_tiles=524_288),  # 65,536 class prototypes on a set of that size
)

# No heads: standardised teacher tokens by cosine + smooth-L1 (after DistillPath, RADIO, UNIC); distances and angles
# between class tokens, and KoLeo, keep these from drawing together. One crop a tile, so that the teacher, which is
# most of the work, sees each tile once a step.
TOKENS = DistillConfig(
    student=("vit-small",),
    init="auto",
    batch_tiles=64,
    views=ViewConfig(n_global=1, n_local=0, teacher_view="clean"),
    objective=ObjectiveConfig(
        dino=0.0, ibot=0.0, token_cls=1.0, token_patch=1.0, relational=1.0, teacher_head="none", adaptor_hidden=0
    ),
    # 6e-4 spoils a pruned start within 75 steps (docs/results/first-student.md).
    optimiser=OptimiserConfig(base_lr=1.5e-4, weight_decay_end=0.04, freeze_last_layer=0.0),
)

# DINO + iBOT on prototypes, sized for 2 cores: small crops, few local ones, narrow heads.
CPU = DistillConfig(
    student=("vit-tiny",),
    init="auto",
    batch_tiles=32,
    views=ViewConfig(n_global=2, n_local=2, teacher_view="clean"),
    objective=ObjectiveConfig(head_hidden=512, head_bottleneck=128),
    optimiser=OptimiserConfig(base_lr=6e-4, weight_decay_end=0.04),
)

PRESETS: dict[str, DistillConfig] = {"h0-mini": H0_MINI, "tokens": TOKENS, "cpu": CPU}
"""Preset -> config; teacher, tiles, out and the length are left open."""
