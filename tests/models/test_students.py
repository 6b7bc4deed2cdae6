from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked

from histill.errors import ConfigError, ModelError
from histill.models import STUDENTS, build_student, init_from_teacher, write_bundle
from histill.models.students import evenly_chosen

HALF = (0.5, 0.5, 0.5)


def released_h0_mini():
    return timm.create_model(
        "vit_base_patch14_reg4_dinov2",
        img_size=224,
        init_values=1e-5,
        num_classes=0,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        mlp_ratio=5.33334,
        reg_tokens=4,
        no_embed_class=True,
    )


@pytest.mark.parametrize("spec", STUDENTS.values(), ids=lambda spec: spec.name)
def test_specs_describe_what_timm_builds(spec):
    assert json.loads(json.dumps(spec.model_args)) == spec.model_args
    with torch.device("meta"):
        model = timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.model_args)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.params
    assert model.patch_embed.patch_size == (14, 14)
    assert model.num_prefix_tokens == 5
    assert model.embed_dim == spec.embed_dim
    assert len(model.blocks) == spec.depth


def test_h0_mini_is_the_released_one():
    assert STUDENTS["h0-mini"].params == 85_739_520
    student, released = build_student("h0-mini", seed=0).eval(), released_h0_mini().eval()
    student.load_state_dict(released.state_dict(), strict=True)  # fails on any name or shape
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    small = timm.layers.pos_embed.resample_abs_pos_embed(released.pos_embed, [2, 2], num_prefix_tokens=0)
    released.pos_embed, released.patch_embed.strict_img_size = torch.nn.Parameter(small), False
    with torch.no_grad():
        torch.testing.assert_close(student.forward_features(images), released.forward_features(images))


def test_h0_mini_output_at_224():
    student = build_student("h0-mini", seed=0).eval()
    with torch.no_grad():
        assert student.forward_features(torch.zeros(1, 3, 224, 224)).shape == (1, 261, 768)


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = build_student("vit-nano", seed=3).state_dict(), build_student("vit-nano", seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_student("vit-nano", seed=4).state_dict()
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_small_students_start_with_open_blocks():
    assert torch.all(build_student("vit-nano", seed=0).blocks[0].ls1.gamma == 1)


def test_unknown_student():
    with pytest.raises(ConfigError, match="vit-tiny"):
        build_student("vit-tyni")


@pytest.mark.parametrize("wrong", [{"init": "bundle"}, {"init": "teacher"}, {"init_from": "local-dir:x"}])
def test_init_without_its_source(wrong):
    with pytest.raises(ConfigError, match="do not match"):
        build_student("vit-nano", **wrong)


def test_init_from_a_bundle_is_strict(tmp_path):
    old = build_student("vit-nano", seed=1)
    spec = STUDENTS["vit-nano"]
    write_bundle(tmp_path / "b", old, spec, mean=HALF, std=HALF, input_px=224, provenance={})
    new = build_student("vit-nano", seed=2, init="bundle", init_from=f"local-dir:{tmp_path / 'b'}")
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    assert all(parameter.requires_grad for parameter in new.parameters())
    with pytest.raises(ModelError, match="not those of a vit-micro"):
        build_student("vit-micro", init="bundle", init_from=f"local-dir:{tmp_path / 'b'}")


def test_evenly_chosen():
    assert evenly_chosen(4, 12) == (0, 3, 7, 11)
    assert evenly_chosen(12, 12) == tuple(range(12))
    assert evenly_chosen(1, 12) == (11,)


def vit(*, reg=0, no_embed_class=True, depth=3, dim=32, heads=2, img_size=28):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        num_classes=0,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        img_size=img_size,
        reg_tokens=reg,
        no_embed_class=no_embed_class,
        dynamic_img_size=True,
        init_values=0.5,
    )
    torch.nn.init.normal_(model.cls_token)
    torch.nn.init.normal_(model.pos_embed)
    return model.eval()


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("reg", [0, 4])
def test_a_student_with_all_layers_is_the_teacher(theirs, mine, reg):
    """Holds whether positions are added to the prefix tokens in both, in one or in none of them."""
    teacher, student = vit(reg=reg, no_embed_class=theirs), vit(reg=reg, no_embed_class=mine)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_()
    init_from_teacher(student, teacher)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(student.forward_features(images), teacher.forward_features(images))


def test_chosen_layers_and_resampled_positions():
    teacher, student = vit(depth=5, img_size=56, no_embed_class=False), vit(depth=2, reg=4)
    registers = student.reg_token.detach().clone()
    init_from_teacher(student, teacher, layers=(1, 3))
    assert torch.equal(student.blocks[0].mlp.fc1.weight, teacher.blocks[1].mlp.fc1.weight)
    assert torch.equal(student.blocks[1].attn.qkv.bias, teacher.blocks[3].attn.qkv.bias)
    assert torch.equal(student.norm.weight, teacher.norm.weight)
    assert torch.equal(student.reg_token, registers)  # the teacher has none
    expected = timm.layers.pos_embed.resample_abs_pos_embed(teacher.pos_embed, [2, 2], num_prefix_tokens=1)[:, 1:]
    torch.testing.assert_close(student.pos_embed, expected)
    torch.testing.assert_close(student.cls_token, teacher.cls_token + teacher.pos_embed[:, :1])


@pytest.mark.parametrize(
    ("student", "layers", "message"),
    [
        ({"dim": 64}, None, "patch_embed.proj.weight"),
        ({"heads": 4}, None, "4 heads"),
        ({"depth": 4}, None, "at most 3 blocks"),
        ({"depth": 2}, (0,), "2 numbers from 0 to 2"),
        ({"depth": 2}, (0, 3), "2 numbers from 0 to 2"),
    ],
)
def test_what_does_not_fit_is_named(student, layers, message):
    model = vit(**student)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message) as caught:
        init_from_teacher(model, vit(), layers)
    assert layers or "embed_dim 32, 2 heads" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mlp_of_another_kind_does_not_fit():
    with pytest.raises(ModelError, match=r"blocks.0.mlp.fc1.weight"):
        init_from_teacher(build_student("vit-nano"), _gated())


def _gated():
    return timm.create_model(
        "vit_giant_patch14_reg4_dinov2", num_classes=0, embed_dim=128, depth=4, num_heads=2, img_size=28
    )


@pytest.mark.parametrize("options", [{"init": "banana"}, {"init": "layers"}, {"init": None}, {"layers": (0, 1)}])
def test_a_start_that_does_not_exist_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no such start"):
        build_student("vit-nano", **options)
