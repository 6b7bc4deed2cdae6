from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from histill.models.sources import _with_classes
from histill.models.teachers import TEACHERS

TIMM = [spec for spec in TEACHERS.values() if spec.loader == "timm"]


@pytest.mark.parametrize("spec", TIMM, ids=lambda spec: spec.name)
def test_the_architecture_has_the_numbers_of_the_table(spec):
    with torch.device("meta"):
        model = timm.create_model(
            spec.architecture, pretrained=False, num_classes=0, dynamic_img_size=True, **_with_classes(spec.model_args)
        )
    assert model.num_features == spec.embed_dim
    assert model.patch_embed.patch_size == (spec.patch_px, spec.patch_px)
    assert model.num_prefix_tokens == spec.prefix_tokens
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.params
    assert isinstance(model.norm, torch.nn.LayerNorm)  # tokens are normed where tokens_of reads them


def test_published_parameter_counts():
    assert TEACHERS["h-optimus-0"].params == 1_134_774_272
    assert TEACHERS["h0-mini"].params == 85_739_520


@pytest.mark.parametrize("spec", TEACHERS.values(), ids=lambda spec: spec.name)
def test_rows_do_not_contradict_themselves(spec):
    assert spec.input_px % spec.patch_px == 0
    assert spec.source.startswith(("hf-hub:", "timm:"))
    assert spec.source_url.startswith("https://")
    assert all(0 < value < 1 for value in (*spec.mean, *spec.std))
    assert spec.licence is None or ("ND" in spec.licence.split("-")) == (spec.derivatives is False)
    assert spec.licence is not None or spec.derivatives is None
    assert spec.loader == "transformers" or spec.architecture is not None


def test_timm_rows_agree_with_timm():
    for spec in TIMM:
        if spec.source.startswith("timm:"):
            cfg = timm.get_pretrained_cfg(spec.source.removeprefix("timm:"))
            assert (cfg.mean, cfg.std, cfg.input_size[-1]) == (spec.mean, spec.std, spec.input_px)
            assert cfg.license.lower() == spec.licence.lower()


def test_the_wanted_teachers_are_there():
    wanted = "h-optimus-0 h-optimus-1 h0-mini uni uni2-h virchow2 prov-gigapath midnight-12k phikon-v2 hibou-l"
    wanted += " kaiko-vits16 kaiko-vits8 kaiko-vitb16 kaiko-vitb8 kaiko-vitl14 openmidnight"
    wanted += " dinov2-s-reg4 dinov2-b-reg4 dinov2-l-reg4 dinov2-g-reg4"
    assert list(TEACHERS) == wanted.split()


def test_tables_import_no_torch():
    code = "import sys, histill.models as m; m.TEACHERS, m.STUDENTS; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
