"""ReViT's widths against the published rows written out, and its timm models."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import VisionTransformer

import pyvitfast as vf
from pyvitfast.models import BlockDims, ViTConfig, revit_dims
from pyvitfast.prune import NViTPruner

SMALL = {"img_size": 32, "num_classes": 5}
# Heads, QK and MLP of the 12 blocks; V is 64 throughout.
CODE = {
    384: ([10, 4, 4, *[8] * 6, 4, 4, 10], [32, 16, 16, *[32] * 6, 16, 16, 32]),
    192: ([10, 2, 2, *[4] * 6, 2, 2, 10], [16, 8, 8, *[16] * 6, 8, 8, 16]),
    176: ([10, 2, 2, *[4] * 6, 2, 2, 10], [16, 8, 8, *[16] * 6, 8, 8, 16]),
    768: ([10, 8, 8, *[16] * 6, 8, 8, 10], [80, 40, 40, *[80] * 6, 40, 40, 80]),
}
PAPER = {
    384: ([4, 4, 4, *[8] * 6, 4, 4, 4], [16, 16, 16, *[40] * 6, 16, 16, 16]),
    192: ([2, 2, 2, *[4] * 6, 2, 2, 2], [8, 8, 8, *[16] * 6, 8, 8, 8]),
    768: ([8, 8, 8, *[16] * 6, 8, 8, 8], [40, 40, 40, *[80] * 6, 40, 40, 40]),
}
ROWS = [("code", e, *rows) for e, rows in CODE.items()] + [("paper", e, *rows) for e, rows in PAPER.items()]
NAMES = [
    f"nvit_revit_{size}{suffix}{token}"
    for size in ("tiny", "small", "base")
    for suffix in ("", "_table6")
    for token in ("", "_distilled")
]


@pytest.mark.parametrize(("reading", "width", "heads", "qk"), ROWS)
def test_widths_are_the_rows(reading, width, heads, qk):
    mlp = [3 * width] * 3 + [6 * width] * 6 + [3 * width] * 3
    expected = tuple(BlockDims(h, q, 64, m) for h, q, m in zip(heads, qk, mlp, strict=True))
    assert revit_dims(width, reading).blocks == expected
    assert revit_dims(width, reading).embed_dim == width


def test_default_is_the_code_at_depth_12():
    assert revit_dims(384) == revit_dims(384, "code", 12)


@pytest.mark.parametrize("reading", ["code", "paper"])
def test_other_depths_keep_the_quarters(reading):
    twelve, eight = revit_dims(384, reading).blocks, revit_dims(384, reading, 8).blocks
    assert eight == twelve[:1] + twelve[1:2] + twelve[4:8] + twelve[-2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((384, "table"), "`reading` must be one of code, paper, got 'table'"),
        ((384, "code", 10), "`depth` must be a multiple of 4, got 10"),
        ((384, "code", 0), "`depth` must be a multiple of 4, got 0"),
        ((100, "code"), "`embed_dim` must be above 100"),
        ((64, "paper"), "`embed_dim` must be above 100"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        revit_dims(*arguments)


def test_every_name_is_registered_and_nothing_else():
    assert sorted(timm.list_models("nvit_revit_*")) == sorted(NAMES)
    assert timm.list_models("nvit_revit_*", pretrained=True) == []


@pytest.mark.parametrize("name", NAMES)
def test_registered_models_have_their_widths(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    width = {"tiny": 192, "small": 384, "base": 768}[name.split("_")[2]]
    config = ViTConfig.from_model(model)
    assert config.dims == revit_dims(width, "paper" if "table6" in name else "code")
    assert config.scales == (0.125,) * 12
    assert config.distilled == name.endswith("distilled")
    assert (config.img_size, config.patch_size, config.num_classes) == ((224, 224), (16, 16), 1000)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("name", ["nvit_revit_tiny", "nvit_revit_tiny_distilled"])
def test_arguments_of_timm_and_a_trip_through_a_file(name, tmp_path):
    model = timm.create_model(name, **SMALL, in_chans=1, drop_path_rate=0.1).eval()
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 5)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    vf.save(model, tmp_path / "m.safetensors")
    again = vf.load(tmp_path / "m.safetensors")
    assert type(again) is type(model)
    assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["architecture"] == name
    assert vf.summary(again).blocks == revit_dims(192).blocks
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_features_as_of_timms_vits():
    model = timm.create_model("nvit_revit_tiny", img_size=32, features_only=True, out_indices=(2, 11))
    x = torch.randn(1, 3, 32, 32)
    assert [tuple(f.shape) for f in model(x)] == [(1, 192, 2, 2)] * 2
    assert model.feature_info.channels() == [192, 192]
    plain = timm.create_model("nvit_revit_tiny", img_size=32).eval()
    assert isinstance(plain, VisionTransformer)
    final, features = plain.forward_intermediates(x, indices=[11])
    torch.testing.assert_close(final, plain.forward_features(x))
    assert features[0].shape == (1, 192, 2, 2)


def test_scale_does_not_follow_the_query_width():
    model = timm.create_model("nvit_revit_tiny", img_size=32)
    assert {b.attn.scale for b in model.blocks} == {64**-0.5}
    assert {b.attn.qk_dim for b in model.blocks} == {8, 16}


def test_can_be_pruned_again():
    model = timm.create_model("nvit_revit_tiny_distilled", **SMALL)
    pruner = NViTPruner(model, target=0.9, groups_per_step=50)
    while not pruner.done:
        pruner.prune_once(torch.rand(pruner.table.count, generator=torch.Generator().manual_seed(0)))
    slim = pruner.compact().eval()
    assert vf.summary(slim).macs <= 0.9 * vf.summary(model).macs
    assert {b.attn.scale for b in slim.blocks} == {0.125}
    assert slim(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_pretrained_weights_do_not_exist():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for nvit_revit_tiny"):
        timm.create_model("nvit_revit_tiny", pretrained=True)


def test_page_states_the_counts():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name in NAMES:
        if not name.endswith("_distilled"):
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(name).parameters())
            width = {"tiny": 192, "small": 384, "base": 768}[name.split("_")[2]]
            assert f"| `{name}` | {width} | {count:,} |" in page
