"""KoLeo, token regression and relations."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from histill.distill.losses import koleo_loss, relational_loss, token_loss, token_similarity_loss
from histill.errors import ConfigError


@pytest.fixture(scope="module")
def reference(shared_parity: Path) -> dict[str, Tensor]:
    with np.load(shared_parity / "dinov2_losses.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(normal(99, width, width)).Q


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_koleo_equals_the_original_with_gradient_also_for_equal_rows(reference: dict[str, Tensor]) -> None:
    x_GBD = reference["koleo_input"].clone().requires_grad_()
    total = sum((koleo_loss(x_BD) for x_BD in x_GBD), start=torch.zeros(()))
    torch.testing.assert_close(total, reference["koleo_sum"], rtol=1e-5, atol=0.0)
    grad_GBD = torch.autograd.grad(total, x_GBD)[0]
    for grad_BD, expected_BD in zip(grad_GBD.flatten(0, 1), reference["koleo_grad"].flatten(0, 1), strict=True):
        torch.testing.assert_close(grad_BD, expected_BD, rtol=1e-5, atol=1e-5 * expected_BD.abs().max().item())


def test_koleo_falls_when_features_spread_and_ignores_length() -> None:
    x_BD = normal(0, 16, 8)
    crowded_BD = x_BD + 20.0
    assert koleo_loss(x_BD) < koleo_loss(crowded_BD)
    torch.testing.assert_close(koleo_loss(x_BD * torch.rand(16, 1).add(0.5)), koleo_loss(x_BD))


def test_koleo_is_float32_under_autocast() -> None:
    x_BD = normal(1, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(x_BD)
    assert torch.equal(loss, koleo_loss(x_BD))


@pytest.mark.parametrize("loss", [koleo_loss, lambda x_BD: relational_loss(x_BD, x_BD)])
def test_one_image_is_refused(loss) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="1 images"):
        loss(torch.ones(1, 4))


def test_token_loss_by_its_definition() -> None:
    prediction_MD, target_MD = 2 * normal(2, 6, 5), normal(3, 6, 5)
    result = token_loss(prediction_MD, target_MD)
    unit = [row / row.norm() for row in prediction_MD], [row / row.norm() for row in target_MD]
    cosine = [1 - (a @ b).item() for a, b in zip(*unit, strict=True)]
    huber_M = [np.mean([huber(float(x)) for x in row]) for row in prediction_MD - target_MD]
    assert result.cosine.item() == pytest.approx(np.mean(cosine), rel=1e-5)
    assert result.smooth_l1.item() == pytest.approx(np.mean(huber_M), rel=1e-5)
    weights_M = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 0.0])
    weighted = token_loss(prediction_MD, target_MD, weights_M)
    assert weighted.cosine.item() == pytest.approx(0.75 * cosine[1] + 0.25 * cosine[2], rel=1e-5)
    assert weighted.smooth_l1.item() == pytest.approx(0.75 * huber_M[1] + 0.25 * huber_M[2], rel=1e-5)


def test_token_loss_is_zero_on_equal_tokens_and_without_weight_and_two_on_opposite_ones() -> None:
    x_MD = normal(4, 6, 5)
    equal, opposite = token_loss(x_MD, x_MD), token_loss(-x_MD, x_MD)
    assert equal.smooth_l1.item() == 0.0
    assert equal.cosine.item() == pytest.approx(0.0, abs=1e-6)
    assert opposite.cosine.item() == pytest.approx(2.0)
    nothing = token_loss(-x_MD, x_MD, torch.zeros(6))
    assert (nothing.cosine.item(), nothing.smooth_l1.item()) == (0.0, 0.0)


def test_token_loss_pulls_the_prediction_only() -> None:
    prediction_MD, target_MD = normal(5, 4, 3).requires_grad_(), normal(6, 4, 3).requires_grad_()
    result = token_loss(prediction_MD, target_MD)
    (result.cosine + result.smooth_l1).backward()
    assert target_MD.grad is None
    assert prediction_MD.grad is not None


def distances(x_BD: Tensor) -> np.ndarray:
    array = x_BD.double().numpy()
    distance_BB = np.linalg.norm(array[:, None] - array[None], axis=-1)
    return distance_BB / (distance_BB.sum() / (len(array) * (len(array) - 1)))


def cosine(x_BD: Tensor, i: int, j: int, k: int) -> float:
    array = x_BD.double().numpy()
    a, b = array[i] - array[j], array[k] - array[j]
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_relations_by_their_definition() -> None:
    student_BD, teacher_BE = normal(7, 6, 5), normal(8, 6, 9)
    result = relational_loss(student_BD, teacher_BE)
    difference_BB = distances(student_BD) - distances(teacher_BE)
    pairs = [huber(difference_BB[i, j]) for i, j in itertools.permutations(range(6), 2)]
    angles = [
        huber(cosine(student_BD, i, j, k) - cosine(teacher_BE, i, j, k))
        for i, j, k in itertools.permutations(range(6), 3)
    ]
    assert result.distance.item() == pytest.approx(np.mean(pairs), rel=1e-4)
    assert result.angle.item() == pytest.approx(np.mean(angles), rel=1e-4)


def test_relations_ignore_rotation_scale_and_shift() -> None:
    x_BD = normal(9, 8, 5)
    same = relational_loss(3.0 * x_BD @ rotation(5) + 1.0, x_BD)
    assert same.distance.item() == pytest.approx(0.0, abs=1e-9)
    assert same.angle.item() == pytest.approx(0.0, abs=1e-9)
    other = relational_loss(x_BD * torch.linspace(0.1, 2.0, 5), x_BD)
    assert other.distance.item() > 1e-3
    assert other.angle.item() > 1e-3


def test_equal_images_have_finite_relations_and_gradients() -> None:
    student_BD = normal(10, 6, 4)
    student_BD[1] = student_BD[0]
    student_BD.requires_grad_()
    for student in (student_BD, torch.zeros(6, 4, requires_grad=True)):
        result = relational_loss(student, normal(11, 6, 7))
        (result.distance + result.angle).backward()
        assert result.distance.isfinite()
        assert result.angle.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 10.0


def test_the_gradient_of_relations() -> None:
    teacher_BE = normal(12, 5, 3)
    student_BD = normal(13, 5, 4).requires_grad_()
    result = relational_loss(student_BD, teacher_BE)
    grad_BD = torch.autograd.grad(result.distance + result.angle, student_BD)[0]
    direction_BD = F.normalize(grad_BD.flatten(), dim=0).view(5, 4)

    def along(step: float) -> float:
        moved = relational_loss(student_BD.detach() + step * direction_BD, teacher_BE)
        return (moved.distance + moved.angle).item()

    assert (along(1e-2) - along(-1e-2)) / 2e-2 == pytest.approx(grad_BD.norm().item(), rel=1e-2)


def test_two_images_have_a_distance_and_no_angle() -> None:
    result = relational_loss(normal(14, 2, 3), normal(15, 2, 3))
    assert result.distance.item() == pytest.approx(0.0, abs=1e-9)
    assert result.angle.item() == 0.0


def test_token_similarities_by_their_definition() -> None:
    student_BND, teacher_BNE = normal(16, 2, 5, 4), normal(17, 2, 5, 6)

    def scores(x_ND: Tensor, token: int) -> np.ndarray:
        x = F.normalize(x_ND.double(), dim=-1)
        logits = torch.stack([x[token] @ x[other] for other in range(5) if other != token]) / 0.3
        return torch.softmax(logits, dim=0).numpy()

    divergences = []
    for image, token in itertools.product(range(2), range(5)):
        p, q = scores(teacher_BNE[image], token), scores(student_BND[image], token)
        divergences.append((p * np.log(p / q)).sum())
    loss = token_similarity_loss(student_BND, teacher_BNE, 0.3)
    assert loss.item() == pytest.approx(np.mean(divergences), rel=1e-4)


def test_token_similarities_ignore_a_rotation() -> None:
    x_BND = normal(18, 2, 6, 5).requires_grad_()
    loss = token_similarity_loss(x_BND @ rotation(5), x_BND.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert x_BND.grad is not None
    assert x_BND.grad.abs().max() < 1e-5


@pytest.mark.parametrize("held", [1, 300, 700])
def test_relations_in_parts_are_those_at_once(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss() -> tuple[Tensor, Tensor]:
        student = torch.randn(17, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        teacher = torch.randn(17, 7, generator=torch.Generator().manual_seed(2))
        angle = relational_loss(student, teacher).angle
        angle.backward()
        assert student.grad is not None
        return angle.detach(), student.grad

    expected = loss()
    monkeypatch.setattr("histill.distill.losses.relational._HELD_TRIPLETS", held)
    torch.testing.assert_close(loss(), expected, rtol=1e-5, atol=1e-8)
