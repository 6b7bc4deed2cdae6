"""The prototype cross-entropy for many tokens and many prototypes: no M x K logits are ever held whole.

Shapes: M tokens of this rank, C tokens of one chunk, H tokens whose teacher logits are held, K prototypes,
E teacher features, B bottleneck of the head.

All that Sinkhorn keeps is one potential per prototype (see ``sinkhorn``), so each iteration can stream over chunks
of tokens and compute their teacher logits again. ``iterations`` streams find the potential; a last one has teacher
and student scores of a chunk side by side, and takes loss and gradients from them at once. Three buffers of C x K
and the H x K logits that fit a budget are all that is ever held; the matrix products are nearly all of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from histill.distill.losses.sinkhorn import (
    Reduce,
    column_log_sum_exp_,
    column_sum,
    first_potential,
    next_potential,
)

__all__ = [
    "BalancedTokens",
    "PrototypeLoss",
    "balance_tokens",
    "balanced_prototype_loss",
    "chunked_prototype_loss",
]

# A buffer this large keeps a CPU's caches warm, and a GPU busy. But never fewer rows than _FEWEST: below, each
# product spends its time on reading the weights.
_CPU_BYTES, _GPU_BYTES, _FEWEST = 2 * 2**20, 256 * 2**20, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PrototypeLoss:
    """Value of the loss, and a monitor."""

    loss: Tensor
    """Sum over tokens of weight times cross-entropy, in nats; a scalar with a gradient."""
    target_entropy: Tensor
    """Weighted mean entropy of the teacher's scores, in nats (at most log K); a scalar without a gradient."""


@torch.no_grad()
def balance_tokens(
    teacher_ME: Tensor,
    prototypes_KE: Tensor,
    *,
    teacher_temperature: float,
    iterations: int = 3,
    reduce: Reduce | None = None,
    chunk_rows: int | None = None,
    held_bytes: int = 2**26,
) -> BalancedTokens:
    """Sinkhorn's potential of each prototype over the tokens of all ranks: the first half of the loss.

    It has no student in it, so that several students, or parts of a batch, share it.

    Parameters
    ----------
    teacher_ME, prototypes_KE
        Their products are the teacher's logits; no gradient flows into them.
    teacher_temperature
        Divides the logits.
    iterations
        Sinkhorn iterations; 0 is a plain softmax of the teacher's logits.
    reduce
        Sum over the ranks; None with one rank. Ranks may hold different numbers of tokens, also none.
    chunk_rows
        Tokens per chunk; None chooses by the number of prototypes and the device.
    held_bytes
        Memory for teacher logits that are then computed once, not in every stream. Values do not depend on it.
    """
    assert min(teacher_temperature, iterations + 1) > 0, "temperatures > 0, iterations >= 0"
    dtype = torch.float64 if teacher_ME.dtype == torch.float64 else torch.float32
    rows = chunk_rows or _rows(prototypes_KE.shape[0], prototypes_KE.device)
    with torch.autocast(teacher_ME.device.type, enabled=False), _tensor_cores(teacher_ME.device):
        teacher = _teacher(teacher_ME.to(dtype), prototypes_KE.to(dtype), teacher_temperature, rows, held_bytes)
        return BalancedTokens(teacher, _potential(teacher, iterations, reduce, rows))


def balanced_prototype_loss(
    student_hidden_MB: Tensor,
    student_weight_KB: Tensor,
    balanced: BalancedTokens,
    weights_M: Tensor,
    *,
    student_temperature: float = 0.1,
    chunk_rows: int | None = None,
) -> PrototypeLoss:
    """Cross-entropy of student scores with balanced teacher scores, without the logits of all tokens.

    The gradients for the two student tensors are computed with the loss and held until the backward pass, which only
    scales them (as in Hsu et al., *Liger kernel*, 2024, for language models). Products are taken in float32 (float64
    if the teacher's are) outside autocast; on GPUs as TF32, whose rounding (10 bits) is that of the float16 in which
    DINOv2 takes them.

    Parameters
    ----------
    student_hidden_MB, student_weight_KB
        L2-normalised outputs of the student head's bottleneck, and its weight-normalised last layer.
    balanced
        What :func:`balance_tokens` says of the same tokens.
    weights_M
        Weight of each token in the loss, see `token_weights`.
    student_temperature
        Divides the student's logits.
    chunk_rows
        Tokens per chunk; None chooses by the number of prototypes and the device.
    """
    teacher = balanced.teacher
    assert student_hidden_MB.shape[0] == teacher.features_ME.shape[0] == weights_M.shape[0], "a row, a weight per token"
    assert student_weight_KB.shape[0] == teacher.prototypes_KE.shape[0], "teacher and student share the prototypes"
    assert student_temperature > 0, "temperatures > 0"
    dtype = teacher.features_ME.dtype
    rows = chunk_rows or _rows(teacher.prototypes_KE.shape[0], teacher.prototypes_KE.device)
    device = teacher.features_ME.device
    with torch.autocast(device.type, enabled=False), _tensor_cores(device):
        loss, entropy = _CrossEntropy.apply(
            student_hidden_MB.to(dtype),
            student_weight_KB.to(dtype),
            weights_M.detach().to(dtype),
            teacher,
            balanced.potential_K,
            student_temperature,
            rows,
        )
    return PrototypeLoss(loss=loss, target_entropy=entropy)


def chunked_prototype_loss(
    student_hidden_MB: Tensor,
    student_weight_KB: Tensor,
    teacher_ME: Tensor,
    prototypes_KE: Tensor,
    weights_M: Tensor,
    *,
    teacher_temperature: float,
    student_temperature: float = 0.1,
    iterations: int = 3,
    reduce: Reduce | None = None,
    chunk_rows: int | None = None,
    held_bytes: int = 2**26,
) -> PrototypeLoss:
    """Both halves at once: :func:`balance_tokens`, then :func:`balanced_prototype_loss`.

    Equal to `sinkhorn` of ``teacher_ME @ prototypes_KE.T``, then a weighted cross-entropy with the student's logits
    ``student_hidden_MB @ student_weight_KB.T``. A token of weight 0 still takes part in Sinkhorn.

    Source: Caron et al., SwAV, NeurIPS 2020, section 3.1 (the balance); Zhou et al., iBOT, ICLR 2022, section 3.1 (the
    loss).

    Parameters
    ----------
    student_hidden_MB, student_weight_KB
        L2-normalised outputs of the student head's bottleneck, and its weight-normalised last layer; both get
        gradients.
    teacher_ME, prototypes_KE
        Their products are the teacher's logits; no gradient flows into them.
    weights_M
        Weight of each token in the loss, see `token_weights`; no gradient flows into it.
    teacher_temperature, student_temperature
        Divide the logits of the two sides; above 0.
    iterations, reduce, chunk_rows, held_bytes
        As in :func:`balance_tokens`.

    Returns
    -------
    PrototypeLoss
        Scalars in float32; in float64 if student or teacher tokens are.
    """
    exact = torch.float64 in (student_hidden_MB.dtype, teacher_ME.dtype)
    balanced = balance_tokens(
        teacher_ME.double() if exact else teacher_ME,
        prototypes_KE,
        teacher_temperature=teacher_temperature,
        iterations=iterations,
        reduce=reduce,
        chunk_rows=chunk_rows,
        held_bytes=held_bytes,
    )
    return balanced_prototype_loss(
        student_hidden_MB,
        student_weight_KB,
        balanced,
        weights_M,
        student_temperature=student_temperature,
        chunk_rows=chunk_rows,
    )


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Products of float32 as TF32 on GPUs, and only these: views and statistics need all their digits."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, slots=True)
class _Teacher:
    """What the teacher's logits are computed from."""

    features_ME: Tensor
    prototypes_KE: Tensor
    temperature: float
    held_HK: Tensor
    """Logits / temperature of the first H tokens, a whole number of chunks."""

    def logits(self, chunk: slice, potential_K: Tensor, out_CK: Tensor) -> Tensor:
        """Logits / temperature + potential of one chunk, written to the first rows of ``out_CK``."""
        out_CK, potential_K = out_CK[: chunk.stop - chunk.start], potential_K.to(out_CK.dtype)
        if chunk.stop <= self.held_HK.shape[0]:
            return torch.add(self.held_HK[chunk], potential_K, out=out_CK)
        features_CE, alpha = self.features_ME[chunk], 1.0 / self.temperature
        return torch.addmm(potential_K, features_CE, self.prototypes_KE.T, alpha=alpha, out=out_CK)


@dataclass(frozen=True, slots=True)
class BalancedTokens:
    """Teacher scores of some tokens, not yet written out: logits and Sinkhorn's potential."""

    teacher: _Teacher
    potential_K: Tensor
    """Of each prototype, float64."""

    def of(self, rows_M: Tensor) -> BalancedTokens:
        """The same scores for some of the tokens, by their numbers (int64, ascending)."""
        teacher = self.teacher
        held_HK = teacher.held_HK
        all_held = held_HK.shape[0] == teacher.features_ME.shape[0]
        part = replace(
            teacher, features_ME=teacher.features_ME[rows_M], held_HK=held_HK[rows_M] if all_held else held_HK[:0]
        )
        return BalancedTokens(part, self.potential_K)


@torch.no_grad()
def _teacher(features_ME: Tensor, prototypes_KE: Tensor, temperature: float, rows: int, held_bytes: int) -> _Teacher:
    """Compute once the logits that fit ``held_bytes``."""
    fit = held_bytes // (prototypes_KE.shape[0] * prototypes_KE.element_size())
    held = features_ME.shape[0] if fit >= features_ME.shape[0] else fit // rows * rows
    held_HK = (features_ME[:held] / temperature) @ prototypes_KE.T
    return _Teacher(features_ME, prototypes_KE, temperature, held_HK)


def _rows(prototypes: int, device: torch.device) -> int:
    """Rows of a chunk."""
    budget = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES
    return max(_FEWEST, budget // (4 * prototypes))


def _chunks(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _buffers(count: int, rows: int, like_ME: Tensor, prototypes: int) -> list[Tensor]:
    return [like_ME.new_empty(min(rows, like_ME.shape[0]), prototypes) for _ in range(count)]


@torch.no_grad()
def _potential(teacher: _Teacher, iterations: int, reduce: Reduce | None, rows: int) -> Tensor:
    """Sinkhorn's potential of each prototype, (K,) float64, in ``iterations`` streams over the tokens."""
    tokens, prototypes = teacher.features_ME.shape[0], teacher.prototypes_KE.shape[0]
    zeros_K = teacher.prototypes_KE.new_zeros(prototypes, dtype=torch.float64)
    if iterations == 0:
        return zeros_K
    logits_CK, scores_CK = _buffers(2, rows, teacher.features_ME, prototypes)
    log_sum_exp_K = torch.full_like(zeros_K, -torch.inf)
    for chunk in _chunks(tokens, rows):
        part_K = column_log_sum_exp_(teacher.logits(chunk, zeros_K, logits_CK))
        log_sum_exp_K = torch.logaddexp(log_sum_exp_K, part_K)
    potential_K = first_potential(log_sum_exp_K, reduce)
    for _ in range(iterations - 1):
        mass_K = torch.zeros_like(zeros_K)
        for chunk in _chunks(tokens, rows):
            part_CK = teacher.logits(chunk, potential_K, logits_CK)
            mass_K += column_sum(torch.softmax(part_CK, dim=1, out=scores_CK[: part_CK.shape[0]]))
        potential_K = next_potential(potential_K, mass_K, reduce)
    return potential_K


class _CrossEntropy(torch.autograd.Function):
    """Last stream: the loss, and the student's gradients in the same step."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MB: Tensor,
        weight_KB: Tensor,
        weights_M: Tensor,
        teacher: _Teacher,
        potential_K: Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """Loss and mean target entropy."""
        tokens = hidden_MB.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad_MB = torch.empty_like(hidden_MB) if needs_hidden else None
        weight_grad_KB = torch.zeros_like(weight_KB) if needs_weight else None
        first_CK, second_CK, third_CK = _buffers(3, rows, teacher.features_ME, weight_KB.shape[0])
        loss, entropy = (weights_M.new_zeros((), dtype=torch.float64) for _ in range(2))
        for chunk in _chunks(tokens, rows):
            hidden_CB, weights_C = hidden_MB[chunk], weights_M[chunk]
            size = hidden_CB.shape[0]
            a_CK, b_CK, c_CK = first_CK[:size], second_CK[:size], third_CK[:size]
            # Teacher: its log scores in c, its scores in b.
            torch.log_softmax(teacher.logits(chunk, potential_K, a_CK), dim=1, out=c_CK)
            torch.exp(c_CK, out=b_CK)
            entropy -= torch.dot(weights_C, c_CK.mul_(b_CK).sum(dim=1))
            # Student: its log scores in c; a is free for products.
            torch.mm(hidden_CB / temperature, weight_KB.T, out=a_CK)
            torch.log_softmax(a_CK, dim=1, out=c_CK)
            loss -= torch.dot(weights_C, torch.mul(b_CK, c_CK, out=a_CK).sum(dim=1))
            if not (needs_hidden or needs_weight):
                continue
            # The gradient for the scaled logits is weight * (student - teacher); the weights go to the small side.
            c_CK.exp_().sub_(b_CK)
            scale_C1 = (weights_C / temperature)[:, None]
            if hidden_grad_MB is not None:
                torch.mm(c_CK, weight_KB, out=hidden_grad_MB[chunk]).mul_(scale_C1)
            if weight_grad_KB is not None:
                weight_grad_KB.addmm_(c_CK.T, hidden_CB * scale_C1)
        ctx.save_for_backward(hidden_grad_MB, weight_grad_KB)
        entropy /= weights_M.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny)
        loss, entropy = loss.to(hidden_MB.dtype), entropy.to(hidden_MB.dtype)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale the gradients found in the forward pass."""
        hidden_grad_MB, weight_grad_KB = ctx.saved_tensors
        scaled = [None if grad is None else grad * loss_grad for grad in (hidden_grad_MB, weight_grad_KB)]
        return *scaled, None, None, None, None, None
