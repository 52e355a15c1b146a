"""The paper's way of counting against its printed ratios, and full counts against timm's models."""

import pytest
import timm
import torch

from pyvitfast.models import (
    BlockDims,
    ViTConfig,
    ViTDims,
    full_params,
    paper_macs,
    paper_params,
    revit_dims,
)


def deit(width):
    return ViTDims(width, (BlockDims(width // 64, 64, 64, 4 * width),) * 12)


# Widths, weights, MACs with 195 patches, and the two ratios to DeiT-B as the paper prints them.
ROWS = {
    "DeiT-B": (deit(768), 86_292_480, 17_563_238_400, "1.00", "1.00"),
    "DeiT-S": (deit(384), 21_912_576, 4_598_587_392, "3.94", "3.82"),
    "DeiT-T": (deit(192), 5_647_872, 1_253_535_744, "15.28", "14.01"),
    "ReViT-S": (revit_dims(384), 22_600_704, 4_679_505_536, "3.82", "3.75"),
    "ReViT-T": (revit_dims(192), 5_893_632, 1_282_080_256, "14.64", "13.69"),
    "ReViT-T, 176": (revit_dims(176), 5_098_368, 1_128_573_824, None, None),
    # Published as ReViT-S's table, which has DeiT-S's weights.
    "ReViT-S, Table 6": (revit_dims(384, "paper"), 21_912_576, None, None, None),
}


def printed(ratio):
    """How the paper may have shortened a ratio: rounded, or cut off as it did once."""
    return {f"{ratio:.2f}", f"{int(ratio * 100) / 100:.2f}"}


@pytest.mark.parametrize("row", ROWS)
def test_integers(row):
    dims, params, macs, _, _ = ROWS[row]
    assert paper_params(dims) == params
    assert macs is None or paper_macs(dims) == paper_macs(dims, 197, patches=195) == macs


@pytest.mark.parametrize("row", ROWS)
def test_the_196_patches_of_224_pixels_count_768_channels_more(row):
    dims, _, macs, _, _ = ROWS[row]
    if macs is not None:
        assert paper_macs(dims, patches=196) == macs + 768 * dims.embed_dim


def test_plain_formula_of_the_base_model():
    """Written out: patches, classifier, projections, attention, MLP."""
    blocks = 197 * 768 * 12 * 256 + 197 * 197 * 12 * 128 + 2 * 197 * 768 * 3072
    assert paper_macs(deit(768), patches=196) == 196 * 768 * 768 + 1000 * 768 + 12 * blocks
    assert paper_macs(deit(768), patches=196) == 17_563_828_224


@pytest.mark.parametrize("row", [r for r, v in ROWS.items() if v[3]])
@pytest.mark.parametrize("patches", [195, 196])
def test_ratios(row, patches):
    dims, _, _, params_ratio, macs_ratio = ROWS[row]
    assert params_ratio in printed(paper_params(deit(768)) / paper_params(dims))
    macs = paper_macs(deit(768), patches=patches) / paper_macs(dims, patches=patches)
    assert macs_ratio in printed(macs)


def test_the_narrower_tiny_revit_does_not_give_the_printed_ratios():
    dims = revit_dims(176)
    assert "14.64" not in printed(paper_params(deit(768)) / paper_params(dims))
    assert "13.69" not in printed(paper_macs(deit(768)) / paper_macs(dims))


@pytest.mark.parametrize(
    ("size", "width", "plain", "distilled"),
    [
        ("base", 768, 86_567_656, 87_338_192),
        ("small", 384, 22_050_664, 22_436_432),
        ("tiny", 192, 5_717_416, 5_910_800),
    ],
)
def test_full_counts_are_those_of_timms_deits(size, width, plain, distilled):
    for token, expected in (("", plain), ("_distilled", distilled)):
        with torch.device("meta"):
            model = timm.create_model(f"deit_{size}{token}_patch16_224")
        assert sum(p.numel() for p in model.parameters()) == expected
        assert full_params(deit(width), bool(token)) == expected


@pytest.mark.parametrize("name", ["nvit_revit_tiny", "nvit_revit_small_table6_distilled"])
def test_full_counts_of_other_widths(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = ViTConfig.from_model(model)
    assert full_params(config.dims, config.distilled) == sum(p.numel() for p in model.parameters())


def test_counts_with_the_real_patches_are_the_summarys():
    """The same products as ``ViTConfig.macs`` sees in a plain model of 224 pixels."""
    with torch.device("meta"):
        model = timm.create_model("nvit_revit_small")
    config = ViTConfig.from_model(model)
    assert paper_macs(config.dims, patches=196) == config.macs()
