"""What a plan reckons, against torch's counter and real memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from histill.cli import main
from histill.distill.config import DistillConfig, ObjectiveConfig
from histill.distill.heads import PrototypeHead
from histill.distill.plan import forward_flops, head_flops, make_plan
from histill.distill.plan_config import PlanConfig
from histill.distill.presets import PRESETS
from histill.errors import ConfigError, ModelError
from histill.models import build_student, load_encoder
from histill.models.sources import build_empty, resolve


def test_the_students_share_is_what_torch_counts_in_a_real_step(small_teacher: Path) -> None:
    """Two global and two local crops of one tile, forward and backward."""
    config = DistillConfig(
        teacher=(f"local-dir:{small_teacher}",),
        student=("vit-nano",),
        views=dataclasses.replace(PRESETS["cpu"].views, global_px=56, local_px=28),
        objective=ObjectiveConfig(cls_prototypes=64, patch_prototypes=64),
    )
    plan = make_plan(config, PlanConfig())
    student = build_student("vit-nano", seed=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = [student.forward_features(torch.rand(2, 3, px, px)) for px in (56, 28)]
        sum(each.sum() for each in tokens).backward()
    # torch leaves out the gradient for the pixels: the patch embedding's backward is one product, not two
    stem = 2 * sum(2 * (px // 14) ** 2 * 3 * 14**2 * student.num_features for px in (56, 28))
    assert plan.student_flops == counter.get_total_flops() + stem


def test_an_empty_teacher_counts_as_a_real_one(small_teacher: Path) -> None:
    real = load_encoder(f"local-dir:{small_teacher}")
    empty = build_empty(resolve(f"local-dir:{small_teacher}"))
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    assert forward_flops(empty, 56) == forward_flops(real.model, 56) > 0


def test_heads_are_reckoned_as_torch_counts_them() -> None:
    head, rows = PrototypeHead(24, 96, hidden=40, bottleneck=16), 33
    x = torch.rand(rows, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(x).sum().backward()
    assert head_flops(rows, 24, 40, 16, 96) == counter.get_total_flops()


def test_the_papers_shapes_cost_what_is_known_of_them() -> None:
    """H-optimus-0: 1.22 TFLOP for two crops; ViT-B/14 with ten crops: .50 forward and backward."""
    config = dataclasses.replace(PRESETS["h0-mini"], teacher=("h-optimus-0",))
    plan = make_plan(config, PlanConfig())
    assert plan.teacher_parameters == 1_134_774_272
    assert plan.student_parameters == 85_739_520
    assert plan.teacher_flops == pytest.approx(1.22e12, rel=0.01)
    assert plan.student_flops == pytest.approx(0.50e12, rel=0.02)


def test_the_estimate_of_activations_is_near_what_torch_keeps() -> None:
    """Bytes saved for the backward pass, of two tiles less those of one: what is shared by tiles cancels."""
    student = build_student("vit-small", seed=0)
    config = DistillConfig(
        teacher=("h-optimus-0",),
        student=("vit-small",),
        batch_tiles=2,
        views=dataclasses.replace(PRESETS["tokens"].views, global_px=112, n_global=1, n_local=0),
        objective=PRESETS["tokens"].objective,
    )

    def saved(tiles: int) -> int:
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            student.forward_features(torch.rand(tiles, 3, 112, 112))
        return sum(held.values())

    measured = saved(3) - saved(2)
    assert make_plan(config, PlanConfig()).activation_bytes / 2 == pytest.approx(measured, rel=0.05)


def test_ranks_share_what_is_sharded() -> None:
    config = dataclasses.replace(PRESETS["h0-mini"], teacher=("h-optimus-0",), batch_tiles=1024)
    plain = make_plan(config, PlanConfig(world=8))
    scale = dataclasses.replace(config.scale, students="shard", teachers="shard", micro_tiles=16)
    sharded = make_plan(dataclasses.replace(config, scale=scale), PlanConfig(world=8))
    average = 4 * plain.student_parameters  # stays whole beside the shards, for checks and the bundle
    assert sharded.student_bytes == plain.student_bytes // 8 + average
    assert sharded.teacher_bytes == plain.teacher_bytes * 2 // 8  # shards are float32
    assert sharded.activation_bytes == plain.activation_bytes / 8
    assert plain.tiles_per_second("h100", 0.4) == 8 * make_plan(config, PlanConfig()).tiles_per_second("h100", 0.4)


def test_the_command_prints_a_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["distill", "h0-mini", "--teacher", "h-optimus-0", "--plan", "--plan.world", "8", "--plan.gpu", "a100"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "1,134,774,272" in text
    assert "8 x NVIDIA A100" in text
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_planned_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(PRESETS["h0-mini"], teacher=("h-optimus-0",), batch_tiles=64)
    with pytest.raises(ConfigError, match="needs a tile"):
        make_plan(config, PlanConfig(world=128))
    with pytest.raises(ModelError, match="once it is downloaded"):
        make_plan(dataclasses.replace(config, teacher=("hf-hub:nobody/nothing",)), PlanConfig())
    with pytest.raises(ConfigError, match="does not know this"):
        make_plan(dataclasses.replace(config, precision="fp32"), PlanConfig())
    with pytest.raises(ConfigError, match="does not know this"):
        make_plan(dataclasses.replace(config, minutes=5.0), PlanConfig())
    odd = dataclasses.replace(config, views=dataclasses.replace(config.views, global_px=100))
    with pytest.raises(ConfigError, match="a multiple of 14"):
        make_plan(odd, PlanConfig())
    with pytest.raises(ConfigError, match="h100"):
        PlanConfig(gpu=("h101",))
    assert main(["distill", "h0-mini", "--plan"]) == 1
    assert "--teacher" in capsys.readouterr().err
    assert main(["distill", "h0-mini", "--teacher", "h-optimus-0", "--plan.world", "2"]) == 1
    assert "without --plan" in capsys.readouterr().err
