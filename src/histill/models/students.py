"""The students: what each is, and how its first weights are made. The table imports no torch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from histill.errors import ConfigError, ModelError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["STUDENTS", "StudentSpec", "build_student", "evenly_chosen", "init_from_teacher"]

Init = Literal["random", "bundle", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """A student's architecture, in terms that timm alone can rebuild from JSON."""

    name: str
    """The name on the command line."""
    architecture: str
    """timm's name. The variant settles patch 14, 4 registers and the kind of MLP."""
    embed_dim: int
    """Width of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads of a block."""
    init_values: float
    """Start of the layer scale."""
    params: int
    """Number of parameters, asserted when it is built."""
    purpose: str
    """One line for ``histill models --students``."""

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments for ``timm.create_model``, ready for JSON."""
        return {
            "img_size": 224,
            "dynamic_img_size": True,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "init_values": self.init_values,
        }


# DINOv2 starts its layer scale at 1e-5, which tames 40 blocks over half a million steps. A small student that sees
# some ten thousand tiles would spend them on opening its blocks, so the small ones start at 1: a plain transformer.
_OPEN = 1.0
_PLAIN = "vit_small_patch14_reg4_dinov2"
# timm cannot read a layer class from JSON. The giant variant has SwiGLUPacked, SiLU and the MLP ratio 5.33334 built
# in, so the student of the paper is that variant made narrow: same state dict as the released H0-mini.
_GATED = "vit_giant_patch14_reg4_dinov2"

STUDENTS: dict[str, StudentSpec] = {
    spec.name: spec
    for spec in (
        StudentSpec(
            name="h0-mini",
            architecture=_GATED,
            embed_dim=768,
            depth=12,
            heads=12,
            init_values=1e-5,
            params=85_739_520,
            purpose="the paper's student (arXiv 2501.16239): ViT-B/14, SwiGLU",
        ),
        StudentSpec(
            name="vit-small",
            architecture=_PLAIN,
            embed_dim=384,
            depth=12,
            heads=6,
            init_values=_OPEN,
            params=21_629_952,
            purpose="one consumer GPU",
        ),
        StudentSpec(
            name="vit-small-4",
            architecture=_PLAIN,
            embed_dim=384,
            depth=4,
            heads=6,
            init_values=_OPEN,
            params=7_428_096,
            purpose="4 blocks of a ViT-S/14 teacher, for a start from its layers",
        ),
        StudentSpec(
            name="vit-tiny",
            architecture=_PLAIN,
            embed_dim=192,
            depth=12,
            heads=3,
            init_values=_OPEN,
            params=5_506_560,
            purpose="a few CPU cores",
        ),
        StudentSpec(
            name="vit-micro",
            architecture=_PLAIN,
            embed_dim=192,
            depth=6,
            heads=3,
            init_values=_OPEN,
            params=2_835_072,
            purpose="a few CPU cores, quickly",
        ),
        StudentSpec(
            name="vit-nano",
            architecture=_PLAIN,
            embed_dim=128,
            depth=4,
            heads=2,
            init_values=_OPEN,
            params=903_168,
            purpose="demonstrations and tests",
        ),
    )
}
"""The students by name."""


def build_student(
    name: str,
    *,
    seed: int | None = None,
    init: Init = "random",
    init_from: str | None = None,
    teacher: nn.Module | None = None,
    layers: tuple[int, ...] | None = None,
) -> Any:
    """Build a student of the table.

    Parameters
    ----------
    name
        A key of :data:`STUDENTS`.
    seed
        Seed of the random weights; the global generator is then left as it was. None draws from the global one.
    init
        ``random``; ``bundle``: all weights from ``init_from``, strictly; ``teacher``: :func:`init_from_teacher`.
    init_from
        For ``bundle``: any name that :func:`histill.models.load_encoder` takes.
    teacher, layers
        For ``teacher``: the teacher's timm model, and which of its blocks to copy (evenly chosen if None).

    Returns
    -------
    timm.models.VisionTransformer
        In train mode, float32, on the CPU.

    Raises
    ------
    ConfigError
        Unknown name (with the nearest ones), or ``init`` without what it needs.
    ModelError
        Weights that do not fit.
    """
    import timm
    import torch

    spec = _spec(name)
    _check_start(init, init_from, teacher, layers)
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed)
        model = timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.model_args)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == spec.params, f"{name} has {count} parameters, not {spec.params}: timm's architecture has changed"
    if init_from is not None:
        _load_strictly(model, init_from, name)
    if teacher is not None:
        init_from_teacher(model, teacher, layers)
    return model


def _check_start(init: Any, init_from: str | None, teacher: Any, layers: tuple[int, ...] | None) -> None:
    if init not in ("random", "bundle", "teacher") or (layers is not None and init != "teacher"):
        raise ConfigError(
            "there is no such start of a student",
            got=f"init={init!r}" + ("" if layers is None else f", layers={layers}"),
            allowed="init='random', 'bundle' or 'teacher'; layers with 'teacher' alone",
        )
    if (init == "bundle") != (init_from is not None) or (init == "teacher") != (teacher is not None):
        raise ConfigError(
            "the start of a student and its source do not match",
            got=f"init={init!r}, init_from={init_from!r}, teacher {'given' if teacher is not None else 'not given'}",
            allowed="init='random' alone, init='bundle' with init_from, init='teacher' with teacher",
        )


def _spec(name: str) -> StudentSpec:
    if name not in STUDENTS:
        raise ConfigError(
            "there is no student of this name",
            got=repr(name),
            allowed=", ".join(STUDENTS),
            remedy=nearest(name, STUDENTS),
        )
    return STUDENTS[name]


def _load_strictly(student: nn.Module, init_from: str, name: str) -> None:
    from histill.models.encoder import load_encoder

    weights = load_encoder(init_from).model.state_dict()
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(f"these weights are not those of a {name}", where=init_from, got=lines[1]) from None


def evenly_chosen(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Choose blocks of the teacher: the first, the last, and evenly between (0, 3, 7, 11 for 4 of 12)."""
    if student_depth == 1:
        return (teacher_depth - 1,)
    return tuple(index * (teacher_depth - 1) // (student_depth - 1) for index in range(student_depth))


def init_from_teacher(student: Any, teacher: Any, layers: tuple[int, ...] | None = None) -> None:
    """Copy patch embedding, position embedding, class token, blocks and last norm of a teacher into a student.

    Position embeddings are resampled to the student's grid. Registers are copied where both have the same number,
    else they keep their random start. The student takes its images in the teacher's normalisation from then on.

    Parameters
    ----------
    student, teacher
        timm vision transformers of the same width, heads, patch size and MLP.
    layers
        The teacher's block for each block of the student; evenly chosen if None.

    Raises
    ------
    ModelError
        Naming the first thing that does not fit, and the student that would.
    """
    import torch

    depth, available = len(student.blocks), len(teacher.blocks)
    layers = evenly_chosen(depth, available) if layers is None and depth <= available else layers
    fitting = (
        f"a student with embed_dim {teacher.embed_dim}, {teacher.blocks[0].attn.num_heads} heads, patch "
        f"{teacher.patch_embed.patch_size[0]}, the teacher's kind of MLP and at most {available} blocks"
    )
    if layers is None or len(layers) != depth or not all(0 <= layer < available for layer in layers):
        raise ModelError(
            "the chosen blocks do not fit",
            got=f"{layers or 'all'} of {available} blocks for a student of {depth}",
            allowed=f"{depth} numbers from 0 to {available - 1}" if depth <= available else fitting,
        )
    new = dict(_stem(student, teacher, fitting))
    pairs = [(f"blocks.{index}", student.blocks[index], teacher.blocks[layer]) for index, layer in enumerate(layers)]
    for name, mine, theirs in [*pairs, ("norm", student.norm, teacher.norm)]:
        new |= _part(name, mine, theirs, fitting)
    with torch.no_grad():
        own = dict(student.named_parameters())
        for name, tensor in new.items():
            own[name].copy_(tensor)


def _mismatch(what: str, mine: object, theirs: object, fitting: str) -> ModelError:
    return ModelError(
        "the teacher's layers do not fit into this student",
        where=what,
        got=f"teacher {theirs}, student {mine}",
        allowed=fitting,
    )


def _part(name: str, student: nn.Module, teacher: nn.Module, fitting: str) -> dict[str, torch.Tensor]:
    """Pair the parameters of one module; names, shapes and head counts must agree."""
    mine, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    for key in [*mine, *theirs]:
        shapes = [tuple(side[key].shape) if key in side else None for side in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise _mismatch(f"{name}.{key}", shapes[0] or "has none", shapes[1] or "has none", fitting)
    heads = [getattr(getattr(side, "attn", None), "num_heads", None) for side in (student, teacher)]
    if heads[0] != heads[1]:
        raise _mismatch(f"{name}.attn", f"{heads[0]} heads", f"{heads[1]} heads", fitting)
    return {f"{name}.{key}": value.detach() for key, value in theirs.items()}


def _stem(student: Any, teacher: Any, fitting: str) -> dict[str, torch.Tensor]:
    """Patch embedding, position embedding and prefix tokens.

    Where one model adds a position to its prefix tokens and the other does not, the sum of token and position is
    carried over, so that the blocks see the same input.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    new = _part("patch_embed", student.patch_embed, teacher.patch_embed, fitting)
    prefix = 0 if teacher.no_embed_class else teacher.num_prefix_tokens
    position_1ND = teacher.pos_embed.detach()
    grid = tuple(student.patch_embed.grid_size)
    patches_1ND = resample_abs_pos_embed(
        position_1ND[:, prefix:], new_size=grid, old_size=tuple(teacher.patch_embed.grid_size), num_prefix_tokens=0
    )
    tokens_1ND = teacher.cls_token.detach()
    registers = student.num_prefix_tokens > 1 and student.num_prefix_tokens == teacher.num_prefix_tokens
    if registers:
        tokens_1ND = _cat(tokens_1ND, teacher.reg_token.detach())
    if prefix:
        tokens_1ND = tokens_1ND + position_1ND[:, : tokens_1ND.shape[1]]
    if not student.no_embed_class:
        # the sum is in the tokens, so the positions of the student's prefix tokens are 0
        patches_1ND = _cat(patches_1ND.new_zeros(1, student.num_prefix_tokens, patches_1ND.shape[2]), patches_1ND)
    new["cls_token"] = tokens_1ND[:, :1]
    if registers:
        new["reg_token"] = tokens_1ND[:, 1:]
    new["pos_embed"] = patches_1ND
    return new


def _cat(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([left, right], dim=1)
