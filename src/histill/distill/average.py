"""The moving average of the student's weights: the product of a run."""

from __future__ import annotations

import copy

import torch

from histill.distill.parallel import local
from histill.models.encoder import Encoder

__all__ = ["average_of", "update_average"]


def average_of(student: Encoder) -> Encoder:
    """A frozen copy of the student, in eval mode."""
    average = copy.deepcopy(student)
    average.requires_grad_(False)
    return average.eval()


@torch.no_grad()
def update_average(average: Encoder, student: Encoder, momentum: float) -> None:
    """Move each weight: average = momentum * average + (1 - momentum) * student."""
    kept = [local(parameter) for parameter in average.parameters()]
    torch._foreach_lerp_(kept, [local(parameter) for parameter in student.parameters()], 1.0 - momentum)
