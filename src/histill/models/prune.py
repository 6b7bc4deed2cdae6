"""Start a student as a pruned teacher: fewer channels, heads, neurons and blocks that keep most of its function.

A small ViT from random weights needs millions of tiles before its attention does anything. This start needs a few
hundred. It joins known parts:

- channels: the residual stream is rotated to its principal axes and the weakest are cut (Ashkboos et al., *SliceGPT*,
  ICLR 2024). One rotation serves all blocks, since a ViT's skip connections are identities. The axes are chosen
  orthogonal to the vector of ones, so that the student's LayerNorm, which subtracts the mean over channels, subtracts
  nothing; the scale that cutting changes goes into the next layer's weights.
- heads and neurons: those whose output varies most are kept, and the output matrix is refitted by least squares, so
  that the kept ones also stand in for the cut ones (as in Frantar and Alistarh, *SparseGPT*, ICML 2023, section 3).
- blocks: evenly chosen.

Shapes: D teacher channels, S student channels, H neurons or concatenated head channels, K those of them kept, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from histill.errors import ModelError
from histill.models.encoder import Encoder
from histill.models.students import evenly_chosen

__all__ = ["prune_teacher", "why_not_prunable"]

_RIDGE = 1e-3


def why_not_prunable(student: Any, teacher: Any) -> str | None:
    """Say why a student cannot start as this teacher pruned; None if it can. Both are timm vision transformers."""
    for model, whose in ((teacher, "the teacher"), (student, "the student")):
        block = model.blocks[0] if len(getattr(model, "blocks", ())) else None
        parts = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
        if block is None or not all(hasattr(block, part) for part in parts) or not hasattr(block.attn, "qkv"):
            return f"{whose} is not a plain pre-norm vision transformer of timm"
        if not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2, model.norm)):
            return f"{whose} has norms of another kind than LayerNorm"
        if not isinstance(model.norm_pre, nn.Identity):
            return f"{whose} has a norm before its first block"
        if not isinstance(block.attn.q_norm, nn.Identity):
            return f"{whose} normalises queries and keys"
    if student.blocks[0].attn.qkv.bias is None:
        return "the student's queries, keys and values have no bias, which must take over the shift of the norms"
    mine, theirs = student.blocks[0], teacher.blocks[0]
    sizes = [
        ("patch size", student.patch_embed.patch_size[0], teacher.patch_embed.patch_size[0], "equal"),
        ("width of a head", mine.attn.head_dim, theirs.attn.head_dim, "equal"),
        ("kind of MLP", _is_gated(mine.mlp), _is_gated(theirs.mlp), "equal"),
        ("width", student.embed_dim, teacher.embed_dim, "at most"),
        ("heads", mine.attn.num_heads, theirs.attn.num_heads, "at most"),
        ("neurons", mine.mlp.fc2.in_features, theirs.mlp.fc2.in_features, "at most"),
        ("blocks", len(student.blocks), len(teacher.blocks), "at most"),
    ]
    for name, ours, whole, rule in sizes:
        if ours != whole if rule == "equal" else ours > whole:
            return f"the student's {name} ({ours}) must be {rule} the teacher's ({whole})"
    return None


def _is_gated(mlp: Any) -> bool:
    return bool(mlp.fc1.out_features == 2 * mlp.fc2.in_features)


@dataclass(slots=True)
class _Second:
    """Count, sum and second moment of vectors."""

    count: int = 0
    sum_H: Tensor | float = 0.0
    outer_HH: Tensor | float = 0.0

    def add(self, x_TH: Tensor) -> None:
        self.count += len(x_TH)
        self.sum_H = self.sum_H + x_TH.double().sum(0)
        self.outer_HH = self.outer_HH + (x_TH.T @ x_TH).double()

    def mean_covariance(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.sum_H, Tensor)
        assert isinstance(self.outer_HH, Tensor)
        mean_H = self.sum_H / self.count
        return mean_H, self.outer_HH / self.count - torch.outer(mean_H, mean_H)


@dataclass(slots=True)
class _Seen:
    """What the teacher's layers saw: directions at each norm, inputs of each output matrix, embedded patches."""

    norms: dict[str, _Second] = field(default_factory=dict)
    outputs: dict[str, _Second] = field(default_factory=dict)
    patch: _Second = field(default_factory=_Second)


@torch.no_grad()
def _look(encoder: Encoder, images: Iterable[Tensor], layers: tuple[int, ...]) -> _Seen:
    """Run the teacher over images and collect moments at the chosen blocks."""
    model: Any = encoder.model
    seen, hooks = _Seen(), []

    def collect(place: dict[str, _Second], name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        place[name] = _Second()

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            place[name].add(change(inputs[0].flatten(0, -2).float()))

        return hook

    def direction(x_TD: Tensor) -> Tensor:
        centred_TD = x_TD - x_TD.mean(1, keepdim=True)
        unit_TD: Tensor = centred_TD / centred_TD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return unit_TD

    for index in layers:
        block = model.blocks[index]
        for name in ("norm1", "norm2"):
            hooks.append(
                getattr(block, name).register_forward_pre_hook(collect(seen.norms, f"{index}.{name}", direction))
            )
        for name, module in (("attn", block.attn.proj), ("mlp", block.mlp.fc2)):
            hooks.append(module.register_forward_pre_hook(collect(seen.outputs, f"{index}.{name}", lambda x: x)))
    hooks.append(model.norm.register_forward_pre_hook(collect(seen.norms, "norm", direction)))
    hooks.append(model.patch_embed.register_forward_hook(lambda _, __, out: seen.patch.add(out.flatten(0, -2).float())))
    try:
        for images_BCHW in images:
            encoder(images_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def prune_teacher(student: Any, encoder: Encoder, images: Iterable[Tensor]) -> float:
    """Set a student's weights to those of a pruned teacher.

    Parameters
    ----------
    student
        A timm vision transformer in float32; changed in place. It takes images in the teacher's normalisation.
    encoder
        The teacher.
    images
        Batches of float images in 0..1, (B, 3, H, W), on the teacher's device; a few hundred images are enough.

    Returns
    -------
    float
        Share of a residual direction's length (root mean square, mean over the norms) that the kept channels carry.

    Raises
    ------
    ModelError
        When the two do not fit; the text says what.
    """
    teacher: Any = encoder.model
    reason = why_not_prunable(student, teacher)
    if reason is not None:
        what, remedy = "this student cannot start as the teacher pruned", "use --init auto or --init random"
        raise ModelError(what, where=encoder.name, got=reason, remedy=remedy)
    layers = evenly_chosen(len(student.blocks), len(teacher.blocks))
    seen = _look(encoder, images, layers)
    encode_SD, kept = _principal_axes(seen, student.embed_dim)
    encode_SD = encode_SD.float()
    widen = math.sqrt(teacher.embed_dim / student.embed_dim)

    def read(linear: nn.Linear, norm: nn.LayerNorm, site: str) -> tuple[Tensor, Tensor]:
        """A layer behind a norm, for the student's channels and a norm without scale and shift."""
        weight = linear.weight.float().cpu() * norm.weight.float().cpu()
        bias = linear.weight.float().cpu() @ norm.bias.float().cpu() + _bias(linear)
        return (weight @ encode_SD.T) * (widen * kept[site]), bias

    for own, index in zip(student.blocks, layers, strict=True):
        theirs = teacher.blocks[index]
        _unit(own.norm1)
        _unit(own.norm2)
        qkv = read(theirs.attn.qkv, theirs.norm1, f"{index}.norm1")
        _prune_attention(own, theirs, seen.outputs[f"{index}.attn"], encode_SD, *qkv)
        fc1 = read(theirs.mlp.fc1, theirs.norm2, f"{index}.norm2")
        _prune_mlp(own, theirs, seen.outputs[f"{index}.mlp"], encode_SD, *fc1)
    _unit(student.norm)
    mean_D, _ = seen.patch.mean_covariance()
    _prune_stem(student, teacher, encode_SD, mean_D.float().cpu())
    return sum(kept.values()) / len(kept)


def _principal_axes(seen: _Seen, width: int) -> tuple[Tensor, dict[str, float]]:
    """Map (S, D) to the student's channels, and the share of a direction's length that it keeps at each norm."""
    outers = {name: second.outer_HH / second.count for name, second in seen.norms.items()}
    total_DD = torch.stack([outer for outer in outers.values() if isinstance(outer, Tensor)]).sum(0).cpu()
    _, axes_DD = torch.linalg.eigh(total_DD)
    kept_DS = axes_DD[:, -(width - 1) :]  # one fewer: the student's mean over channels carries nothing
    # An orthonormal basis of the student's space, orthogonal to the vector of ones.
    ones = torch.cat([torch.ones(width, 1), torch.eye(width)[:, : width - 1]], dim=1).double()
    basis_SS = torch.linalg.qr(ones).Q[:, 1:]
    kept = {
        name: float((kept_DS.T @ outer.cpu() @ kept_DS).trace().sqrt())  # root mean square of the kept length
        for name, outer in outers.items()
        if isinstance(outer, Tensor)
    }
    return basis_SS @ kept_DS.T, kept


def _unit(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1.0)
    norm.bias.zero_()


def _bias(linear: nn.Linear) -> Tensor:
    return linear.bias.float().cpu() if linear.bias is not None else torch.zeros(linear.out_features)


def _scale(layer_scale: nn.Module, width: int) -> Tensor:
    gamma = getattr(layer_scale, "gamma", None)
    return gamma.detach().float().cpu() if gamma is not None else torch.ones(width)


def _refit(out_SH: Tensor, bias_S: Tensor, second: _Second, kept_K: Tensor) -> tuple[Tensor, Tensor]:
    """The output matrix for the kept inputs alone that comes closest, by least squares, to the whole one."""
    mean_H, covariance_HH = (moment.cpu() for moment in second.mean_covariance())
    cut_C = torch.ones(len(mean_H), dtype=torch.bool).index_fill_(0, kept_K, False).nonzero().squeeze(1)
    inner_KK = covariance_HH[kept_K][:, kept_K]
    inner_KK = inner_KK + _RIDGE * inner_KK.diagonal().mean() * torch.eye(len(kept_K), dtype=torch.float64)
    # What the kept inputs predict of the cut ones' output is added to their own weights.
    cross_KS = (out_SH.double()[:, cut_C] @ covariance_HH[cut_C][:, kept_K]).T
    new_SK = out_SH.double()[:, kept_K] + torch.linalg.solve(inner_KK, cross_KS).T
    return new_SK.float(), (out_SH.double() @ mean_H - new_SK @ mean_H[kept_K]).float() + bias_S


def _output(theirs: nn.Linear, layer_scale: nn.Module, encode_SD: Tensor) -> tuple[Tensor, Tensor]:
    """An output layer with its layer scale, into the student's channels."""
    gamma_D = _scale(layer_scale, theirs.out_features)
    return encode_SD @ (gamma_D[:, None] * theirs.weight.float().cpu()), encode_SD @ (gamma_D * _bias(theirs))


def _prune_attention(
    own: Any, theirs: Any, second: _Second, encode_SD: Tensor, qkv_weight: Tensor, qkv_bias: Tensor
) -> None:
    heads, head_dim = theirs.attn.num_heads, theirs.attn.head_dim
    out_SH, bias_S = _output(theirs.attn.proj, theirs.ls1, encode_SD)
    _, covariance_HH = second.mean_covariance()
    power_H = _power(out_SH, covariance_HH, head_dim)
    best = power_H.topk(own.attn.num_heads).indices.sort().values
    kept_K = (best[:, None] * head_dim + torch.arange(head_dim)).flatten()
    rows = torch.cat([kept_K + part * heads * head_dim for part in range(3)])
    _set(own.attn.qkv, qkv_weight[rows], qkv_bias[rows])
    _set(own.attn.proj, *_refit(out_SH, bias_S, second, kept_K))
    _open(own.ls1)


def _prune_mlp(own: Any, theirs: Any, second: _Second, encode_SD: Tensor, fc1_weight: Tensor, fc1_bias: Tensor) -> None:
    out_SH, bias_S = _output(theirs.mlp.fc2, theirs.ls2, encode_SD)
    _, covariance_HH = second.mean_covariance()
    kept_K = _power(out_SH, covariance_HH, 1).topk(own.mlp.fc2.in_features).indices.sort().values
    rows = torch.cat([kept_K, kept_K + theirs.mlp.fc2.in_features]) if _is_gated(theirs.mlp) else kept_K
    _set(own.mlp.fc1, fc1_weight[rows], fc1_bias[rows])
    _set(own.mlp.fc2, *_refit(out_SH, bias_S, second, kept_K))
    _open(own.ls2)


def _power(out_SH: Tensor, covariance_HH: Tensor, group: int) -> Tensor:
    """How much the output of each group of inputs varies: trace(W_g C_gg W_g^T)."""
    inputs = out_SH.shape[1] // group
    out_SGI = out_SH.double().unflatten(1, (inputs, group))
    blocks_GII = torch.stack(
        [covariance_HH.cpu()[g * group : (g + 1) * group, g * group : (g + 1) * group] for g in range(inputs)]
    )
    power_G: Tensor = torch.einsum("sgi,gij,sgj->g", out_SGI, blocks_GII, out_SGI)
    return power_G


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def _open(layer_scale: nn.Module) -> None:
    gamma = getattr(layer_scale, "gamma", None)
    if gamma is not None:
        gamma.fill_(1.0)  # the teacher's scale is in the weights now


def _prune_stem(student: Any, teacher: Any, encode_SD: Tensor, patch_D: Tensor) -> None:
    """Patch embedding, positions, class token and registers."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    theirs, own = teacher.patch_embed.proj, student.patch_embed.proj
    weight = theirs.weight.detach().float().cpu()
    own.weight.copy_((encode_SD @ weight.flatten(1)).reshape(own.weight.shape))
    own.bias.copy_(encode_SD @ _conv_bias(theirs))
    position_1ND = teacher.pos_embed.detach().float().cpu()
    prefix = 0 if teacher.no_embed_class else teacher.num_prefix_tokens
    patches_1ND = resample_abs_pos_embed(
        position_1ND[:, prefix:],
        new_size=list(student.patch_embed.grid_size),
        old_size=list(teacher.patch_embed.grid_size),
        num_prefix_tokens=0,
    )
    tokens = [teacher.cls_token] + ([teacher.reg_token] if teacher.reg_token is not None else [])
    tokens_1ND = torch.cat([token.detach().float().cpu() for token in tokens], dim=1)
    if prefix:
        tokens_1ND = tokens_1ND + position_1ND[:, :prefix]
    new_patches, new_tokens = patches_1ND @ encode_SD.T, tokens_1ND @ encode_SD.T
    student.cls_token.copy_(new_tokens[:, :1])
    if student.reg_token is not None:
        registers, wanted = new_tokens[:, 1:], student.reg_token.shape[1]
        if registers.shape[1] < wanted:
            # A teacher without registers: an average patch disturbs its attention least (with all channels kept,
            # the CKA of the class tokens is .97 with it, .83 with random registers, .72 with the class token).
            average_S = encode_SD @ (patch_D + position_1ND[0, prefix:].mean(0))
            registers = torch.cat([registers, average_S.expand(1, wanted - registers.shape[1], -1)], dim=1)
        student.reg_token.copy_(registers[:, :wanted])
    if not student.no_embed_class:
        new_patches = torch.cat(
            [new_patches.new_zeros(1, student.num_prefix_tokens, new_patches.shape[2]), new_patches], 1
        )
    student.pos_embed.copy_(new_patches)


def _conv_bias(conv: nn.Conv2d) -> Tensor:
    return conv.bias.detach().float().cpu() if conv.bias is not None else torch.zeros(conv.out_channels)
