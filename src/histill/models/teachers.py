"""The teachers that histill knows by name: where they are, how they are built, what one may do with them.

A literal table and no torch. Every fact was looked up in the model's card, its repository or the open code that
loads it (``source_url``); what could not be verified is None, never guessed. Weights are never part of histill:
they come from their owners, under the owners' licences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["TEACHERS", "TeacherSpec"]

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
BIOPTIMUS_MEAN: Triple = (0.707223, 0.578729, 0.703617)
BIOPTIMUS_STD: Triple = (0.211883, 0.230117, 0.177517)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """What is known of one pretrained encoder."""

    name: str
    """The name on the command line."""
    source: str
    """``hf-hub:ORG/NAME`` or ``timm:NAME``."""
    loader: Literal["timm", "transformers"] = "timm"
    """The library that builds it."""
    architecture: str | None = None
    """timm's name of the architecture; None for ``transformers``."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture. Layer classes are named by text (``"SwiGLUPacked"``, ``"SiLU"``)."""
    weights_file: str | None = None
    """A checkpoint in the hub repository that is not under a standard name and has no timm config beside it."""
    remote_code: bool = False
    """Whether ``transformers`` must run Python code from the hub repository to build it."""
    input_px: int
    """Side of the tile it is used with, in pixels."""
    mpp: tuple[float, ...] | None = None
    """Microns per pixel of the tiles that it was trained on; None if unknown."""
    patch_px: int
    """Side of a patch token, in pixels."""
    prefix_tokens: int
    """Tokens before the patches: the class token and the registers."""
    embed_dim: int
    """Width of a token."""
    params: int | None = None
    """Number of parameters, counted on the architecture; None if it could not be counted."""
    mean: Triple
    """Mean of the RGB channels, images in 0..1."""
    std: Triple
    """Standard deviation of the RGB channels, images in 0..1."""
    embedding: Literal["cls", "cls+mean"]
    """The embedding that its authors use: the class token, or that and the mean of the patch tokens."""
    licence: str | None = None
    """Licence of the weights; None if it could not be verified."""
    gated: bool | None = None
    """Whether the hub asks for an account or an approval before the download."""
    derivatives: bool | None = None
    """Whether the licence allows derived works at all; False for ND licences."""
    source_url: str
    """Where the facts stand."""


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}

_ALL: tuple[TeacherSpec, ...] = (
    TeacherSpec(
        name="h-optimus-0",
        source="hf-hub:bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        model_args={"img_size": 224, "init_values": 1e-5},
        input_px=224,
        mpp=(0.5,),
        patch_px=14,
        prefix_tokens=5,
        embed_dim=1536,
        params=1_134_774_272,
        mean=BIOPTIMUS_MEAN,
        std=BIOPTIMUS_STD,
        embedding="cls",
        licence="Apache-2.0",
        gated=True,
        derivatives=True,
        source_url="https://huggingface.co/bioptimus/H-optimus-0",
    ),
    TeacherSpec(
        name="h-optimus-1",
        source="hf-hub:bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        model_args={"img_size": 224, "init_values": 1e-5},
        input_px=224,
        mpp=(0.5,),
        patch_px=14,
        prefix_tokens=5,
        embed_dim=1536,
        params=1_134_774_272,
        mean=BIOPTIMUS_MEAN,
        std=BIOPTIMUS_STD,
        embedding="cls",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        derivatives=False,
        source_url="https://huggingface.co/bioptimus/H-optimus-1",
    ),
    TeacherSpec(
        name="h0-mini",
        source="hf-hub:bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        model_args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU},
        input_px=224,
        mpp=(0.5,),
        patch_px=14,
        prefix_tokens=5,
        embed_dim=768,
        params=85_739_520,
        mean=BIOPTIMUS_MEAN,
        std=BIOPTIMUS_STD,
        embedding="cls+mean",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        derivatives=False,
        source_url="https://huggingface.co/bioptimus/H0-mini",
    ),
    TeacherSpec(
        name="uni",
        source="hf-hub:MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        model_args={"img_size": 224, "patch_size": 16, "init_values": 1e-5},
        input_px=224,
        mpp=(0.5,),
        patch_px=16,
        prefix_tokens=1,
        embed_dim=1024,
        params=303_350_784,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        embedding="cls",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        derivatives=False,
        source_url="https://huggingface.co/MahmoodLab/UNI",
    ),
    TeacherSpec(
        name="uni2-h",
        source="hf-hub:MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        model_args={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_SWIGLU,
        },
        input_px=224,
        mpp=(0.5,),
        patch_px=14,
        prefix_tokens=9,
        embed_dim=1536,
        params=681_394_176,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        embedding="cls",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        derivatives=False,
        source_url="https://huggingface.co/MahmoodLab/UNI2-h",
    ),
    TeacherSpec(
        name="virchow2",
        source="hf-hub:paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        model_args={
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            **_SWIGLU,
        },
        input_px=224,
        mpp=(0.25, 0.5, 1.0, 2.0),
        patch_px=14,
        prefix_tokens=5,
        embed_dim=1280,
        params=631_239_424,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        embedding="cls+mean",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        derivatives=False,
        source_url="https://huggingface.co/paige-ai/Virchow2",
    ),
    TeacherSpec(
        name="prov-gigapath",
        source="hf-hub:prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        model_args={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
        },
        input_px=224,
        mpp=(0.5,),
        patch_px=16,
        prefix_tokens=1,
        embed_dim=1536,
        params=1_134_953_984,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        embedding="cls",
        licence="Apache-2.0",  # its card adds conditions of use: research only
        gated=True,
        derivatives=True,
        source_url="https://github.com/prov-gigapath/prov-gigapath",
    ),
    TeacherSpec(
        name="midnight-12k",
        source="hf-hub:kaiko-ai/midnight",
        loader="transformers",
        input_px=224,
        mpp=(0.25, 0.5, 1.0, 2.0),
        patch_px=14,
        prefix_tokens=1,
        embed_dim=1536,
        mean=HALF,
        std=HALF,
        embedding="cls+mean",
        licence="MIT",
        gated=False,
        derivatives=True,
        source_url="https://huggingface.co/kaiko-ai/midnight",
    ),
    TeacherSpec(
        name="phikon-v2",
        source="hf-hub:owkin/phikon-v2",
        loader="transformers",
        input_px=224,
        mpp=(0.5,),
        patch_px=16,
        prefix_tokens=1,
        embed_dim=1024,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        embedding="cls",
        licence="Owkin non-commercial",
        gated=False,
        source_url="https://huggingface.co/owkin/phikon-v2",
    ),
    TeacherSpec(
        name="hibou-l",
        source="hf-hub:histai/hibou-L",
        loader="transformers",
        remote_code=True,
        input_px=224,
        mpp=(0.5,),
        patch_px=14,
        prefix_tokens=5,
        embed_dim=1024,
        mean=(0.7068, 0.5755, 0.722),
        std=(0.195, 0.2316, 0.1816),
        embedding="cls",
        licence="Apache-2.0",
        gated=True,
        derivatives=True,
        source_url="https://huggingface.co/histai/hibou-L",
    ),
    *(
        TeacherSpec(
            name=f"kaiko-{short}",
            source=f"hf-hub:1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms",
            architecture=architecture,
            model_args={"img_size": image_px},
            input_px=224,
            patch_px=patch_px,
            prefix_tokens=prefix_tokens,
            embed_dim=embed_dim,
            params=params,
            mean=HALF,
            std=HALF,
            embedding="cls",
            licence="Kaiko-NC-1.0",  # Kaiko Non-Commercial Public License 1: adaptations shared alike
            gated=False,
            derivatives=True,
            source_url="https://github.com/kaiko-ai/towards_large_pathology_fms",
        )
        for short, architecture, image_px, patch_px, prefix_tokens, embed_dim, params in (
            ("vits16", "vit_small_patch16_224", 224, 16, 1, 384, 21_665_664),
            ("vits8", "vit_small_patch8_224", 224, 8, 1, 384, 21_670_272),
            ("vitb16", "vit_base_patch16_224", 224, 16, 1, 768, 85_798_656),
            ("vitb8", "vit_base_patch8_224", 224, 8, 1, 768, 85_807_872),
            ("vitl14", "vit_large_patch14_reg4_dinov2", 518, 14, 5, 1024, 304_370_688),
        )
    ),
    TeacherSpec(
        name="openmidnight",
        source="hf-hub:SophontAI/OpenMidnight",
        architecture="vit_giant_patch14_reg4_dinov2",
        weights_file="teacher_checkpoint_load.pt",
        model_args={"img_size": 224},
        input_px=224,
        patch_px=14,
        prefix_tokens=5,
        embed_dim=1536,
        params=1_134_774_272,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        embedding="cls",
        source_url="https://github.com/MedARC-AI/OpenMidnight",
    ),
    *(
        TeacherSpec(
            name=f"dinov2-{letter}-reg4",
            source=f"timm:vit_{size}_patch14_reg4_dinov2.lvd142m",
            architecture=f"vit_{size}_patch14_reg4_dinov2",
            input_px=518,
            patch_px=14,
            prefix_tokens=5,
            embed_dim=embed_dim,
            params=params,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            embedding="cls",
            licence="Apache-2.0",
            gated=False,
            derivatives=True,
            source_url="https://github.com/facebookresearch/dinov2",
        )
        for letter, size, embed_dim, params in (
            ("s", "small", 384, 22_057_344),
            ("b", "base", 768, 86_582_016),
            ("l", "large", 1024, 304_370_688),
            ("g", "giant", 1536, 1_136_483_840),
        )
    ),
)

TEACHERS: dict[str, TeacherSpec] = {spec.name: spec for spec in _ALL}
"""The teachers by name."""
