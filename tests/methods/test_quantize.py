from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import pyvitfast as vf
from pyvitfast.models.quantized import codes_of, levels_of, pack, packed_layers, unpack
from pyvitfast.quantize import QuantConfig, convert, initial_scale, prepare, quantized_layers, report

CHOICES = [
    (bits, grid, granularity, group)
    for bits in range(1, 9)
    for grid in ("integer", "half_integer", "sign")
    for granularity, group in (("tensor", 0), ("channel", 0), ("group", 7))
    if not (grid == "integer" and bits == 1) and not (grid == "sign" and bits > 1)
]


def micro():
    torch.manual_seed(0)
    return timm.create_model("vit_micro_patch2_8")


def digits_like(count=4):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_without_gaps(bits):
    for count in (0, 1, 7, 8, 37):
        codes = torch.randint(0, 2**bits, (count,))
        packed = pack(codes, bits)
        assert packed.numel() == math.ceil(count * bits / 8)
        assert torch.equal(unpack(packed, bits, count), codes.int())
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00111001]


@pytest.mark.parametrize(("bits", "grid", "granularity", "group"), CHOICES)
def test_converted_model_computes_the_prepared_ones_bits(bits, grid, granularity, group, tmp_path):
    config = QuantConfig(weight_bits=bits, grid=grid, granularity=granularity, group_size=group)
    model, x = prepare(micro(), config).eval(), digits_like()
    low = convert(model)
    assert torch.equal(low(x), model(x))
    for layer in packed_layers(low).values():
        q = layer.quantization
        assert layer.codes.numel() == math.ceil(layer.weight.numel() * bits / 8)
        again = levels_of(codes_of(layer.weight, layer.weight_scale, q), layer.weight_scale, q)
        assert torch.equal(again, layer.weight)
        assert len(layer.weight.unique()) <= 2**bits * layer.weight_scale.numel()
    vf.save(low, tmp_path / "low.safetensors")
    loaded = vf.load(tmp_path / "low.safetensors")
    assert torch.equal(loaded(x), low(x))
    size = (tmp_path / "low.safetensors").stat().st_size
    assert report(low).packed_bytes <= size <= report(low).packed_bytes + 16_384  # names and shapes


def test_training_goes_on_from_a_file(tmp_path):
    model = prepare(micro(), QuantConfig(activation_bits=8)).train()
    model(digits_like()).sum().backward()
    vf.save(model, tmp_path / "qat.safetensors")
    loaded = vf.load(tmp_path / "qat.safetensors")
    assert loaded.training
    assert torch.equal(loaded(digits_like()), model(digits_like()))
    for name, layer in quantized_layers(loaded).items():
        assert isinstance(layer.weight_scale, nn.Parameter), name
        assert layer.input_quantizer.ready


def test_state_dict_of_timm_loads_and_names_stay():
    model = prepare(micro(), QuantConfig(scale="absmax"))
    found = model.load_state_dict(micro().state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(key.endswith("weight_scale") for key in found.missing_keys)


def test_default_skips_the_ends_and_says_so():
    found = report(prepare(micro()))
    assert dict(found.skipped) == {"patch_embed.proj": "the first layer", "head": "the last layer"}
    assert len(found.layers) == 16
    assert found.weights == 110_592
    assert "4-bit weights" in str(found)
    everything = report(prepare(micro(), QuantConfig(skip=())))
    assert len(everything.layers) == 18
    some = report(prepare(micro(), QuantConfig(skip=("blocks.0.*", "head"))))
    assert "blocks.0.attn.qkv" in some.skipped
    assert len(some.layers) == 13


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"weight_bits": 9}, "`weight_bits` must be a whole number from 1 to 8, got 9"),
        ({"weight_bits": 2.0}, "`weight_bits`"),
        ({"activation_bits": 0}, "`activation_bits`"),
        ({"weight_bits": 1, "grid": "integer"}, "`grid` must be another one with 1 bit"),
        ({"grid": "sign"}, "`grid` must be 'integer' or 'half_integer' with more than 1 bit"),
        ({"granularity": "row"}, "`granularity` must be one of tensor, channel, group"),
        ({"granularity": "group"}, "`group_size` must be at least 1"),
        ({"group_size": 8}, "`group_size` must be 0 without"),
        ({"mask": "tanh"}, "`mask` must be one of lsq, rounded, identity"),
        ({"scale": "max"}, "`scale` must be one of"),
        ({"scale_value": 0.5}, "`scale_value` must be None unless"),
        ({"scale": "fixed", "scale_value": -1.0}, "`scale_value` must be a positive number"),
    ],
)
def test_illegal_settings_name_themselves(values, match):
    with pytest.raises(ValueError, match=match):
        QuantConfig(**values)


def test_settings_survive_a_round_trip():
    config = QuantConfig(weight_bits=3, granularity="group", group_size=5, skip=("head",))
    assert QuantConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown key 'bits'"):
        QuantConfig.from_dict({"bits": 3})


def test_scale_rules_against_their_formulas():
    w = torch.randn(6, 22, dtype=torch.float64)
    two = QuantConfig(weight_bits=2, grid="integer").layer()
    torch.testing.assert_close(initial_scale(w, two, "lsq"), 2 * w.abs().mean(1))
    torch.testing.assert_close(initial_scale(w, two, "absmax"), w.abs().amax(1))
    half = QuantConfig(weight_bits=3, grid="half_integer", granularity="tensor").layer()
    torch.testing.assert_close(initial_scale(w, half, "absmax"), w.abs().max() / 3.5)
    assert initial_scale(w, half, "fixed").item() == pytest.approx(22**-0.5)
    assert initial_scale(w, half, "fixed", 0.25).item() == 0.25
    groups = QuantConfig(weight_bits=4, granularity="group", group_size=5).layer()
    found = initial_scale(w, groups, "absmax")
    assert found.shape == (6, 5)
    torch.testing.assert_close(found[:, 4], w[:, 20:].abs().amax(1) / 7)
    torch.testing.assert_close(initial_scale(w, QuantConfig(weight_bits=1).layer(), "mse"), w.abs().mean(1))


def test_least_squares_scale_is_no_worse_than_its_neighbours():
    w = torch.randn(4, 200, dtype=torch.float64)
    q = QuantConfig(weight_bits=3).layer()
    best = initial_scale(w, q, "mse")

    def error(scale):
        code = (w / scale[:, None]).round().clamp(-4, 3)
        return (code * scale[:, None] - w).square().sum(1)

    for factor in (0.8, 0.9, 1.1, 1.25):
        assert (error(best) <= error(best * factor) * 1.02).all()


def test_channels_of_zeros_stay_near_zero():
    model = micro()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[3] = 0
        model.blocks[1].attn.proj.weight.zero_()
    for bits in (2, 4):
        prepared = prepare(_copy(model), QuantConfig(weight_bits=bits, scale="absmax"))
        layer = quantized_layers(prepared)["blocks.0.attn.proj"]
        weight = layer.effective_weight()
        assert (layer.weight_scale > 0).all()
        assert weight[3].abs().max() <= 2.0**-15 * weight.abs().max()
        assert convert(prepared)(digits_like()).isfinite().all()


def _copy(model):
    copied = micro()
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
def test_timm_models(name):
    model = timm.create_model(name, num_classes=5)
    size = 224 if "deit" in name else 64
    x = torch.randn(2, 3, size, size)
    before = vf.summary(model).macs
    prepare(model, QuantConfig(weight_bits=8, scale="absmax")).eval()
    low = convert(model)
    assert torch.equal(low(x), model(x))
    assert vf.summary(low).macs == before


def test_eight_bits_are_close_to_the_float_model():
    x = digits_like(32)
    plain = micro().eval()
    want = plain(x)
    got = prepare(micro(), QuantConfig(weight_bits=8, scale="mse")).eval()(x)
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


def test_tied_and_frozen_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(6, 6)
            self.third = nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.third.weight = self.table.weight

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    model = Tied()
    model.first.weight.requires_grad_(False)
    prepare(model, QuantConfig(skip=()))
    assert model.first.weight is model.second.weight
    assert model.first.weight_scale is model.second.weight_scale
    assert not model.first.weight_scale.requires_grad
    assert report(model).weights == 36
    assert "table.weight, which is not quantised" in report(model).skipped["third"]
    x = torch.randn(3, 6)
    assert torch.equal(convert(model)(x), model(x))


def test_refusals():
    with pytest.raises(ValueError, match="got none at all"):
        prepare(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="is a class of its own"):
        prepare(nn.MultiheadAttention(8, 2))
    model = prepare(micro())
    with pytest.raises(ValueError, match="must not be quantised already"):
        prepare(model)
    with pytest.raises(ValueError, match="must come from"):
        convert(micro())
    broken = micro()
    with torch.no_grad():
        broken.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in blocks.0.attn.qkv.weight"):
        prepare(broken)
    with torch.no_grad():
        quantized_layers(model)["blocks.0.attn.qkv"].weight_scale.fill_(-1.0)
    with pytest.raises(ValueError, match="scales positive"):
        convert(model)


def test_compiles_whole_and_runs_under_autocast():
    model, x = prepare(micro()).eval(), digits_like()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_pruned_models_can_be_quantised():
    model = micro()
    pruner = vf.prune.NViTPruner(model, target=0.6, budget="macs", interval=1, groups_per_step=50)
    x, y = digits_like(16), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    while not pruner.done:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.step(optimizer)
    slim = prepare(pruner.compact(), QuantConfig(weight_bits=4)).eval()
    assert torch.equal(convert(slim)(x), slim(x))
