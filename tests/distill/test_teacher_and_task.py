"""The teacher's targets and the task's terms, against the same computed the long way round."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file

from histill.distill import losses
from histill.distill.config import ObjectiveConfig
from histill.distill.heads import PrototypeHead
from histill.distill.targets import Said, balance
from histill.distill.task import DistillTask, Step
from histill.distill.teacher import FitStep, Teacher
from histill.distill.views import Views
from histill.errors import ModelError, RunError
from histill.models import build_student, load_encoder, wrap
from histill.models.encoder import Encoder

OFF = torch.autocast("cpu", enabled=False)
BASE = ObjectiveConfig(
    cls_prototypes=6, patch_prototypes=10, head_hidden=24, head_bottleneck=12, token_cls=1.0, token_patch=1.0
)


def crops(batches: int = 3, tiles: int = 8, px: int = 56) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(tiles, 3, px, px, generator=generator) for _ in range(batches)]


def own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def placed(batches: list[torch.Tensor]) -> list[tuple[NDArray[np.int64], torch.Tensor]]:
    return [(np.arange(number * len(batch), (number + 1) * len(batch)), batch) for number, batch in enumerate(batches)]


def fitted(folder: Path, config: ObjectiveConfig, px: int = 56) -> Teacher:
    teacher = Teacher(load_encoder(f"local-dir:{folder}"), config, px)
    teacher.fit(placed(crops(px=px)), 24, 0, FitStep(autocast=OFF, reduce=own, gather=own))
    return teacher


@pytest.fixture(scope="module")
def student() -> Encoder:
    return wrap(build_student("vit-nano", seed=3), name="s", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)).train()


def views(n_local: int = 2) -> Views:
    generator = torch.Generator().manual_seed(9)
    seen = torch.rand(2, 4, 3, 56, 56, generator=generator)
    return Views(
        global_GBCHW=seen, local_LBCHW=torch.rand(n_local, 4, 3, 28, 28, generator=generator), clean_GBCHW=seen
    )


STEP = Step(positions_B=np.arange(4), autocast=OFF)


def said(teacher: Teacher, seen: Views) -> Said:
    targets = teacher.targets(seen.clean_GBCHW.flatten(0, 1), 4)
    return balance(teacher, targets, teacher.config, STEP.positions_B, 0.07, seed=0)


def test_targets_are_standardised_and_prototypes_unit(small_teacher: Path) -> None:
    teacher = fitted(small_teacher, BASE)
    parts = [teacher.targets(batch, 4) for batch in crops()]
    cls = torch.cat([part.cls_MD for part in parts])
    patches = torch.cat([part.patches_MHWD.flatten(0, 2) for part in parts])
    for tokens in (cls, patches):
        torch.testing.assert_close(tokens.mean(0), torch.zeros(tokens.shape[1]), rtol=0, atol=2e-3)
        torch.testing.assert_close(tokens.std(0, unbiased=False), torch.ones(tokens.shape[1]), rtol=1e-2, atol=0)
    assert teacher.cls_prototypes_KE.shape == (6, cls.shape[1])
    assert teacher.patch_prototypes_KE.shape == (10, cls.shape[1])
    torch.testing.assert_close(teacher.patch_prototypes_KE.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(parts[0].cls_scores_ME, F.normalize(parts[0].cls_MD, dim=1))


def test_statistics_survive_the_disk_and_hold_no_weights(small_teacher: Path, tmp_path: Path) -> None:
    teacher = fitted(small_teacher, dataclasses.replace(BASE, standardiser="phi-s"))
    teacher.save_statistics(tmp_path / "s.safetensors")
    other = Teacher(load_encoder(f"local-dir:{small_teacher}"), teacher.config, 56)
    other.load_statistics(tmp_path / "s.safetensors")
    for ours, theirs in zip(other.statistics().items(), teacher.statistics().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    assert not any("encoder" in name for name in other.statistics())
    (tmp_path / "s.safetensors").write_bytes(b"12345678nonsense")
    with pytest.raises(RunError, match="statistics cannot be read"):
        other.load_statistics(tmp_path / "s.safetensors")


def test_another_grid_is_resampled_where_tokens_stand(small_teacher: Path) -> None:
    teacher = fitted(small_teacher, BASE)
    image = crops(1)[0]
    coarse = teacher.targets(image, 2).patches_MHWD
    fine = teacher.targets(image, 4).patches_MHWD
    assert coarse.shape[1:3] == (2, 2)
    expected = F.interpolate(fine.permute(0, 3, 1, 2), size=(2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(coarse, expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_crops_that_the_teacher_cannot_take_are_resized_for_it(small_teacher: Path) -> None:
    teacher = Teacher(load_encoder(f"local-dir:{small_teacher}"), BASE, 60)
    assert teacher.image_px == 56
    assert teacher.tokens(torch.rand(2, 3, 60, 60))[1].shape[1:3] == (4, 4)


def test_every_term_equals_the_plain_computation(small_teacher: Path, student: Encoder) -> None:
    config = dataclasses.replace(BASE, relational=0.5, koleo=0.3, dino=0.7, ibot=1.1)
    teacher, seen = fitted(small_teacher, config), views()
    torch.manual_seed(0)
    task = DistillTask(config, student.embed_dim, [teacher], seed=0)
    targets = teacher.targets(seen.clean_GBCHW.flatten(0, 1), 4)
    outcome = task(student, seen, [said(teacher, seen)], STEP)
    tokens = student(seen.global_GBCHW.flatten(0, 1))
    local = student(seen.local_LBCHW.flatten(0, 1)).cls_BD
    cls, patches = tokens.cls_BD, tokens.patches_BHWD.flatten(1, 2)
    cls_targets = losses.sinkhorn(targets.cls_scores_ME @ teacher.cls_prototypes_KE.T, 0.07)
    dino = losses.dino_loss(
        task.heads[0].cls_head(cls).unflatten(0, (2, 4)),
        task.heads[0].cls_head(local).unflatten(0, (2, 4)),
        cls_targets.unflatten(0, (2, 4)),
    )
    patch_logits = targets.patch_scores_MHWE.flatten(0, 2) @ teacher.patch_prototypes_KE.T
    patch_targets = losses.sinkhorn(patch_logits, 0.07).unflatten(0, (8, 16))
    relational = losses.relational_loss(cls, targets.cls_MD)

    def regression(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scored = losses.token_loss(prediction.flatten(0, -2), target.flatten(0, -2))
        return scored.cosine + scored.smooth_l1

    expected = {
        "dino": sum(dino),
        "ibot": losses.ibot_loss(task.heads[0].patch_head(patches), patch_targets),
        "koleo": losses.koleo_loss(cls[:4]) + losses.koleo_loss(cls[4:]),
        "token_cls": regression(task.heads[0].cls_adaptor(cls), targets.cls_MD),
        "token_patch": regression(task.heads[0].patch_adaptor(patches), targets.patches_MHWD.flatten(1, 2)),
        "relational": relational.distance + relational.angle,
    }
    assert set(outcome.terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(outcome.terms[name], value, rtol=1e-4, atol=1e-5)
    total = sum(getattr(config, name) * value for name, value in expected.items())
    torch.testing.assert_close(outcome.loss, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["block", "random"])
def test_masked_ibot_scores_only_the_chosen_tokens(small_teacher: Path, student: Encoder, kind: str) -> None:
    config = ObjectiveConfig(
        dino=0, koleo=0, ibot=2.0, ibot_tokens=kind, ibot_share=0.25, cls_prototypes=6, patch_prototypes=10,
        head_hidden=24, head_bottleneck=12,
    )  # fmt: skip
    teacher, seen = fitted(small_teacher, config), views()
    task = DistillTask(config, student.embed_dim, [teacher], seed=0)
    outcome = task(student, seen, [said(teacher, seen)], STEP)
    assert float(outcome.monitors["ibot_effective_weight"]) == pytest.approx(2.0 * 0.25)
    again = task(student, seen, [said(teacher, seen)], STEP)
    assert torch.equal(outcome.loss, again.loss)


def test_gradients_reach_the_student_and_never_the_teacher(small_teacher: Path, student: Encoder) -> None:
    teacher, seen = fitted(small_teacher, BASE), views()
    task = DistillTask(BASE, student.embed_dim, [teacher], seed=0)
    task(student, seen, [said(teacher, seen)], STEP).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not any("teacher" in name for name in task.state_dict())
    student.zero_grad()


def heads_file(path: Path, width: int, prefix: str, parametrised: bool) -> PrototypeHead:
    torch.manual_seed(1)
    head = PrototypeHead(width, 9, hidden=16, bottleneck=5)
    state = {f"{prefix}dino_head.{name}": value.clone() for name, value in head.state_dict().items()}
    if parametrised:
        base = f"{prefix}dino_head.last_layer"
        state[f"{base}.parametrizations.weight.original0"] = state.pop(f"{base}.weight_g")
        state[f"{base}.parametrizations.weight.original1"] = state.pop(f"{base}.weight_v")
    save_file(state, path)
    return head


@pytest.mark.parametrize(("prefix", "parametrised"), [("", False), ("teacher.", True)])
def test_heads_of_a_checkpoint_are_used(small_teacher: Path, tmp_path: Path, prefix: str, parametrised: bool) -> None:
    encoder = load_encoder(f"local-dir:{small_teacher}")
    head = heads_file(tmp_path / "h.safetensors", encoder.embed_dim, prefix, parametrised)
    config = ObjectiveConfig(teacher_head="checkpoint", head_checkpoint=tmp_path / "h.safetensors")
    teacher = fitted(small_teacher, config)
    image = crops(1)[0]
    found = teacher.targets(image, 4)
    torch.testing.assert_close(found.cls_scores_ME @ teacher.cls_prototypes_KE.T, head(encoder(image).cls_BD))
    # one head serves both tokens when the file has no iBOT head
    expected = head(encoder(image).patches_BHWD)
    torch.testing.assert_close(found.patch_scores_MHWE @ teacher.patch_prototypes_KE.T, expected)


def test_heads_that_do_not_fit_are_refused(small_teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    config = ObjectiveConfig(teacher_head="checkpoint", head_checkpoint=path)
    encoder = load_encoder(f"local-dir:{small_teacher}")
    heads_file(path, 7, "", False)
    with pytest.raises(ModelError, match="another teacher"):
        Teacher(encoder, config, 56)
    save_file({"backbone.x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="no DINO head"):
        Teacher(encoder, config, 56)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        Teacher(encoder, config, 56)


def test_linear_adaptors_start_at_the_least_squares_solution(small_teacher: Path, student: Encoder) -> None:
    teacher = fitted(small_teacher, BASE)
    torch.manual_seed(0)
    task = DistillTask(BASE, student.embed_dim, [teacher], seed=0)

    @torch.no_grad()
    def error() -> float:
        parts = []
        for batch in crops():
            predicted = task.heads[0].patch_adaptor(student(batch).patches_BHWD)
            parts.append((predicted - teacher.targets(batch, 4).patches_MHWD).square().mean())
        return float(torch.stack(parts).mean())

    before = error()
    task.fit_adaptors(student, [teacher], crops(), OFF)
    after = error()
    assert after < 0.9 * min(before, 1.0)  # 1.0: the error of predicting nothing
    with torch.no_grad():  # a minimum: a step along any direction does not help by more than the ridge holds back
        for scale in (-0.05, 0.05):
            task.heads[0].patch_adaptor.layers[0].weight.mul_(1 + scale)
            assert error() > after - 0.02
            task.heads[0].patch_adaptor.layers[0].weight.div_(1 + scale)


def test_mlp_adaptors_keep_their_random_start(small_teacher: Path, student: Encoder) -> None:
    config = dataclasses.replace(BASE, adaptor_hidden=8)
    teacher = fitted(small_teacher, config)
    task = DistillTask(config, student.embed_dim, [teacher], seed=0)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.fit_adaptors(student, [teacher], crops(), OFF)
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
