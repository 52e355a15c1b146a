from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import pyvitfast as vf
from pyvitfast.grow import (
    IndexMap,
    Layout,
    Stacked,
    advanced_expand,
    expand,
    grow,
    grow_optimizer_state,
    random_map,
    report,
    round_robin,
    stack_vit,
    unstack_vit,
)
from pyvitfast.grow.rules import identity, interleave, of_heads, stack, stack_top, with_means

F64 = torch.float64


def randomize(model, seed=0):
    """Every parameter at random, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=F64) * (0.3 if p.ndim > 1 else 0.5)
            p.copy_(draw + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.to(F64).eval()


def vit(dim=32, depth=2, heads=4, kind=VisionTransformer, **arguments):
    arguments = {"img_size": 16, "patch_size": 4, "num_classes": 5, **arguments}
    return randomize(kind(embed_dim=dim, depth=depth, num_heads=heads, **arguments))


def swin(dim=16, depths=(2, 2), heads=(2, 4), **arguments):
    arguments = {"img_size": 32, "patch_size": 4, "window_size": 4, "num_classes": 5, **arguments}
    return randomize(SwinTransformer(embed_dim=dim, depths=depths, num_heads=heads, **arguments))


def images(dtype=F64, size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def difference(source, grown, size=16):
    dtype = next(source.parameters()).dtype
    with torch.no_grad():
        want, got = source(images(dtype, size)), grown(images(dtype, size))
    return ((got - want).norm() / want.norm()).item()


def tensors(*rows):
    return torch.tensor(rows, dtype=F64)


W0, W1 = tensors([1, 2], [3, 4]), tensors([5, 6], [7, 8])
G_IN = IndexMap(torch.tensor([0, 1, 0]), 2)
G_OUT = IndexMap(torch.tensor([0, 1, 1]), 2)

PARTS = {
    "plain": {},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "average pool": {"class_token": False, "global_pool": "avg"},
    "no final norm": {"final_norm": False},
    "max after norm": {"global_pool": "max", "fc_norm": False},
    "positions of patches": {"no_embed_class": True, "reg_tokens": 1},
    "ratio 2.5": {"mlp_ratio": 2.5},
    "distilled": {"kind": VisionTransformerDistilled},
}
MORE_PARTS = {**PARTS, "norms of q and k": {"qk_norm": True}, "norm before": {"pre_norm": True}}


def test_expansion_by_hand():
    grown = expand(W0, G_OUT, G_IN)
    assert grown.tolist() == [[0.5, 2, 0.5], [1.5, 4, 1.5], [1.5, 4, 1.5]]
    assert (grown @ tensors(10, 1, 10)).tolist() == [12, 34, 34]


def test_advanced_expansion_by_hand():
    first = advanced_expand(W0, W1, G_OUT, G_IN)
    assert first.tolist() == [[0.5, 2, 0.5], [1.5, 4, 1.5], [3.5, 8, 3.5]]
    last = advanced_expand(W1, W1, G_OUT, G_IN)
    assert last.tolist() == [[2.5, 6, 2.5], [3.5, 8, 3.5], [3.5, 8, 3.5]]
    both = advanced_expand(W0, W1, G_OUT, G_IN, neuron_wise=True)
    assert both.tolist() == [[0.5, 2, 2.5], [1.5, 4, 3.5], [3.5, 8, 3.5]]


def test_layer_norm_of_copies_and_of_a_mean_by_hand():
    norm = nn.functional.layer_norm
    x = tensors(1, 3)
    torch.testing.assert_close(norm(x, (2,), eps=0), tensors(-1, 1))
    half = 0.5**0.5
    torch.testing.assert_close(norm(G_IN.copy(x, 0), (3,), eps=0), tensors(-half, 2 * half, -half))
    means = with_means(2, 3)
    assert means.copy(x, 0).tolist() == [1, 3, 2]
    eta = (2 / 3) ** 0.5
    torch.testing.assert_close(norm(means.copy(x, 0), (3,), eps=0) * eta, tensors(-1, 1, 0))


def test_expansion_against_loops():
    generator = torch.Generator().manual_seed(3)
    out, into = random_map(5, 9, generator), random_map(4, 7, generator)
    weight = torch.randn(5, 4, dtype=F64)
    grown = expand(weight, out, into)
    for i, a in enumerate(out.index.tolist()):
        for j, b in enumerate(into.index.tolist()):
            assert grown[i, j] == weight[a, b] / into.index.tolist().count(b)


def test_maps():
    assert round_robin(3, 7).index.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert round_robin(3, 7).counts.tolist() == [3, 2, 2]
    assert round_robin(3, 5).new.tolist() == [False] * 3 + [True] * 2
    assert IndexMap(torch.tensor([1, 0, 1]), 2).new.tolist() == [False, False, True]
    assert of_heads(round_robin(2, 3), 2, 4).index.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1]
    assert round_robin(2, 3).repeated(2).index.tolist() == [0, 1, 0, 2, 3, 2]
    drawn = [random_map(4, 40, torch.Generator().manual_seed(s)).index for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0][:4].tolist() == [0, 1, 2, 3]


def test_layer_maps():
    assert stack(3, 8).index == (0, 1, 2, 0, 1, 2, 0, 1)
    assert stack_top(3, 8).index == (0, 1, 2, 0, 1, 2, 1, 2)
    assert interleave(3, 6).index == (0, 0, 1, 1, 2, 2)
    assert interleave(4, 6).index == (0, 0, 1, 2, 2, 3)
    assert interleave(2, 6, alternating=True).index == (0, 1, 0, 1, 0, 1)
    assert interleave(4, 8, alternating=True).index == (0, 1, 0, 1, 2, 3, 2, 3)
    assert identity(3, 5).index == (0, 0, 1, 1, 2)
    assert identity(3, 5).inserted == (False, True, False, True, False)
    assert identity(2, 4, alternating=True).inserted == (False, False, True, True)


@pytest.mark.parametrize("parts", MORE_PARTS.values(), ids=MORE_PARTS)
def test_width_in_whole_copies_keeps_the_function(parts):
    source = vit(**parts)
    for times in (2, 3):
        grown = grow(source, vit(32 * times, 2, 4 * times, **parts), noise=0)
        assert difference(source, grown) <= 1e-12
        assert report(grown).function_preserving


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dim", [48, 80])
def test_average_keeps_the_function_at_any_width(parts, dim, tmp_path):
    source = vit(**parts)
    grown = grow(source, vit(dim, 3, dim // 8, **parts), "average")
    assert difference(source, grown) <= 1e-12
    share = {48: 32 / 48, 80: 64 / 80}[dim]
    for norm in (m for m in grown.modules() if isinstance(m, nn.LayerNorm)):
        assert norm.eps == pytest.approx(1e-6 * share, rel=1e-12)
    assert report(grown).inserted == ("blocks.1",)
    vf.save(grown, tmp_path / "grown.safetensors")
    loaded = vf.load(tmp_path / "grown.safetensors")
    assert torch.equal(loaded(images()), grown(images()))


@pytest.mark.parametrize("parts", MORE_PARTS.values(), ids=MORE_PARTS)
def test_blocks_that_add_nothing(parts):
    source = vit(**parts)
    grown = grow(source, vit(depth=5, **parts), "identity")
    assert torch.equal(grown(images()), source(images()))
    assert report(grown).inserted == ("blocks.1", "blocks.2", "blocks.4")
    wide = grow(source, vit(64, 3, 8, **parts), "identity", noise=0)
    assert difference(source, wide) <= 1e-12


def test_columns_that_read_means_are_alive():
    source = vit()
    grown = grow(source, vit(48, 2, 6), "average")
    free = grown.blocks[0].attn.qkv.weight[:, 32:]
    assert free.std().item() == pytest.approx(source.blocks[0].attn.qkv.weight.std().item(), rel=0.1)
    assert not torch.equal(free[:32], free[96:128])
    stream = grown.patch_embed(images())
    torch.testing.assert_close(stream[..., 40], stream[..., :32].mean(-1), rtol=1e-12, atol=1e-12)
    headless = {"final_norm": False}
    grown = grow(vit(**headless), vit(48, 2, 6, **headless), "average")
    assert not grown.head.weight[:, 32:].any()
    assert grown.blocks[1].mlp.fc1.weight[:, 32:].all()


def test_distilled_keeps_both_heads():
    source = vit(kind=VisionTransformerDistilled)
    grown = grow(source, vit(64, 2, 8, kind=VisionTransformerDistilled), noise=0)
    for model in (source, grown):
        model.train().set_distilled_training(True)
    for want, got in zip(source(images()), grown(images()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_single_precision():
    source = vit().float()
    assert difference(source, grow(source, vit(96, 2, 12), noise=0)) <= 1e-5
    assert difference(source, grow(source, vit(48, 3, 6), "average")) <= 1e-5


@pytest.mark.parametrize("parts", [{}, {"qk_norm": True}], ids=["plain", "norms of q and k"])
def test_wider_heads(parts):
    source = vit(**parts)
    for heads in (4, 8):
        grown = grow(source, vit(128, 2, heads, **parts), noise=0)
        assert difference(source, grown) <= 1e-12


def test_maps_of_ones_own():
    source, generator = vit(), torch.Generator().manual_seed(5)
    maps = {
        "embed": torch.cat([torch.randperm(32, generator=generator) for _ in range(2)]),
        "heads": torch.tensor([3, 3, 0, 1, 2, 3, 3, 1]),
        "hidden": torch.cat([torch.arange(128), torch.randint(128, (128,), generator=generator)]),
    }
    grown = grow(source, vit(64, 2, 8), maps=maps, noise=0)
    assert difference(source, grown) <= 1e-12
    weight = source.blocks[0].mlp.fc1.weight
    counts = torch.bincount(maps["embed"])
    want = weight[maps["hidden"]][:, maps["embed"]] / counts[maps["embed"]]
    assert torch.equal(grown.blocks[0].mlp.fc1.weight, want)


def test_unequal_counts_change_the_function_and_warn():
    source = vit()
    with pytest.warns(RuntimeWarning, match='32 -> 48.*method="average" does not'):
        grown = grow(source, vit(48, 2, 6), noise=0)
    assert difference(source, grown) > 1e-3
    assert not report(grown).function_preserving
    drawn = grow(source, vit(64, 2, 8), "net2net", noise=0)
    assert difference(source, drawn) > 1e-3
    assert not report(drawn).function_preserving
    uneven = grow(source, vit(64, 2, 8), "average", maps={"embed": torch.arange(64).clamp(max=31)})
    assert difference(source, uneven) > 1e-3
    assert not report(uneven).function_preserving
    headless = grow(vit(num_classes=0), vit(64, 2, 8, num_classes=0), noise=0)
    torch.testing.assert_close(
        headless(images()), vit(num_classes=0)(images()).repeat(1, 2), rtol=1e-10, atol=1e-10
    )


def test_aki_takes_new_units_from_the_next_layer():
    source = vit(depth=3)
    state = source.state_dict()
    grown = grow(source, vit(64, 3, 8), "aki").state_dict()
    other = grow(source, vit(64, 3, 8), "aki", neuron_wise=True).state_dict()
    for i, after in ((0, 1), (1, 2), (2, 2)):
        for name in ("attn.proj", "mlp.fc2"):
            key, following = f"blocks.{i}.{name}", f"blocks.{after}.{name}"
            top, new = state[f"{key}.weight"], state[f"{following}.weight"]
            if name == "mlp.fc2":  # hidden units are copied in pieces as wide as the residual stream
                top, new = (t.view(32, 4, 32).repeat(1, 1, 2).view(32, 256) for t in (top, new))
                is_new = (torch.arange(256) % 64) >= 32
            else:
                top, new = top.repeat(1, 2), new.repeat(1, 2)
                is_new = torch.arange(64) >= 32
            assert torch.equal(grown[f"{key}.weight"], torch.cat([top, new]) / 2)
            assert torch.equal(
                grown[f"{key}.bias"], torch.cat([state[f"{k}.bias"] for k in (key, following)])
            )
            mixed = torch.where(is_new, new, top)
            assert torch.equal(other[f"{key}.weight"], torch.cat([mixed, new]) / 2)
        qkv = grown[f"blocks.{i}.attn.qkv.weight"].view(3, 2, 32, 64)
        for half, layer in ((0, i), (1, after)):
            want = state[f"blocks.{layer}.attn.qkv.weight"].view(3, 32, 32).repeat(1, 1, 2) / 2
            assert torch.equal(qkv[:, half], want)
        assert torch.equal(grown[f"blocks.{i}.norm1.weight"], state[f"blocks.{i}.norm1.weight"].repeat(2))


@pytest.mark.parametrize("method", ["stack", "interleave"])
def test_depth_copies_blocks(method):
    source = vit()
    state, grown = source.state_dict(), grow(source, vit(depth=5), method).state_dict()
    index = {"stack": (0, 1, 0, 1, 0), "interleave": (0, 0, 0, 1, 1)}[method]
    for i, layer in enumerate(index):
        for rest in ("attn.qkv.weight", "mlp.fc2.bias", "norm2.weight"):
            assert torch.equal(grown[f"blocks.{i}.{rest}"], state[f"blocks.{layer}.{rest}"])


def test_methods_combine():
    source = vit()
    for width in ("fpi", "net2net", "aki", "average"):
        for depth in ("stack", "stack_top", "interleave", "identity"):
            one = grow(source, vit(64, 5, 8), width, depth=depth)
            if depth != "stack_top":
                two = grow(source, vit(64, 5, 8), depth, width=width)
                same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
                assert all(same)


def test_exact_copies_have_equal_gradients_and_noise_parts_them():
    source = vit()

    def apart(**options):
        grown = grow(source, vit(64, 2, 8), **options)
        nn.functional.cross_entropy(grown(images()), torch.tensor([1, 3])).backward()
        gradient = grown.blocks[0].mlp.fc1.weight.grad.view(4, 2, 32, 2, 32)
        return ((gradient[:, 0] - gradient[:, 1]).norm() / gradient.norm()).item()

    assert apart(noise=0) <= 1e-13
    assert apart() >= 1e-3
    assert apart(method="aki") >= 1e-3


def test_noise_stands_on_new_rows_and_columns_only():
    source = vit()
    noisy, exact = (grow(source, vit(64, 2, 8), noise=n).state_dict() for n in (0.05, 0))
    for key in ("attn.proj.weight", "mlp.fc1.weight"):
        change = noisy[f"blocks.0.{key}"] - exact[f"blocks.0.{key}"]
        assert change[:32, :32].abs().max() == 0
        assert (change[32:64] != 0).all()
        assert change[32:64].std().item() == pytest.approx(
            0.05 * exact[f"blocks.0.{key}"].square().mean().sqrt().item(), rel=0.1
        )
    assert torch.equal(noisy["blocks.0.norm1.weight"], exact["blocks.0.norm1.weight"])
    again = grow(source, vit(64, 2, 8), noise=0.05).state_dict()
    assert all(torch.equal(again[key], noisy[key]) for key in noisy)
    other = grow(source, vit(64, 2, 8), noise=0.05, seed=1).state_dict()
    assert not torch.equal(other["head.weight"], noisy["head.weight"])


def test_nothing_is_shared_and_nothing_changes():
    source, target = vit(), vit(64, 3, 8)
    before = [copy.deepcopy(m.state_dict()) for m in (source, target)]
    grown = grow(source, target)
    places = {p.untyped_storage().data_ptr() for m in (source, target) for p in m.parameters()}
    assert not places & {p.untyped_storage().data_ptr() for p in grown.parameters()}
    with torch.no_grad():
        for p in grown.parameters():
            p.zero_()
    for model, state in zip((source, target), before, strict=True):
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    same = grow(source, vit())
    assert all(torch.equal(t, before[0][key]) for key, t in same.state_dict().items())
    assert same.head.weight.data_ptr() != source.head.weight.data_ptr()


def test_names_and_files(tmp_path):
    small = randomize(timm.create_model("vit_micro_patch2_8", embed_dim=24, depth=2, num_heads=2)).float()
    vf.save(small, tmp_path / "small.safetensors")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    grown = grow(tmp_path / "small.safetensors", "vit_micro_patch2_8", depth="identity", noise=0)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(grown(x), small(x), rtol=1e-4, atol=1e-5)
    vf.save(grown, str(tmp_path / "grown.safetensors"))
    again = grow(small, str(tmp_path / "grown.safetensors"), depth="identity", noise=0)
    assert torch.equal(again(x), grown(x))
    with pytest.raises(
        ValueError, match=r"`target` must be a model, a .safetensors file or a name that timm"
    ):
        grow(small, "vit_base_of_nowhere")
    with pytest.raises(ValueError, match="`source` must be trained"):
        grow("vit_micro_patch2_8", small)


def test_another_image_size():
    source, target = vit(), vit(64, 2, 8, img_size=24)
    grown = grow(source, target, noise=0)
    assert report(grown).resized == ("pos_embed",)
    assert not report(grown).function_preserving
    resized = timm.layers.resample_abs_pos_embed(source.pos_embed.detach(), [6, 6], [4, 4])
    assert torch.equal(grown.pos_embed, resized.repeat(1, 1, 2))
    same = vit(img_size=24)
    same.load_state_dict({**source.state_dict(), "pos_embed": resized})
    assert difference(same, grown, 24) <= 1e-12


def test_other_classes_are_told_to_keep_the_head():
    source, target = vit(), vit(64, 2, 8, num_classes=7)
    with pytest.raises(ValueError, match=r'num_classes must be as in the source, got 5 -> 7.*head="target"'):
        grow(source, target)
    grown = grow(source, target, head="target")
    assert torch.equal(grown.head.weight, target.head.weight)
    assert report(grown).kept == ("head.weight", "head.bias")


def test_dtype_mode_and_epsilon_are_the_sources():
    source = vit(norm_layer="layernorm").float().train()
    source.blocks[0].norm1.eps = 1e-3
    with pytest.raises(NotImplementedError, match=r"eps must be 0.001 as in block 0"):
        grow(source, vit(64, 2, 8))
    for m in source.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-3
    grown = grow(source, vit(64, 2, 8), noise=0)
    assert grown.training
    assert grown.head.weight.dtype == torch.float32
    assert difference(source.eval(), grown.eval()) <= 1e-5
    with pytest.raises(NotImplementedError, match=r"eps .* which pyvitfast.save could not keep"):
        grow(vit(qk_norm=True), vit(48, 2, 6, qk_norm=True), "average")


def test_report_counts():
    grown = grow(vit(), vit(64, 3, 8))
    found = report(grown)
    assert (found.method, found.width, found.depth, found.noise) == ("fpi", "fpi", "stack", 0.02)
    assert found.copied == ("head.bias",)
    assert len(found.copied) + len(found.grown) == len(grown.state_dict())
    assert found.params_after == sum(p.numel() for p in grown.parameters())
    assert found.to_dict()["params_before"] == sum(p.numel() for p in vit().parameters())
    assert "not function preserving" in str(found)
    assert report(copy.deepcopy(grown)).params_after == found.params_after
    with pytest.raises(ValueError, match="must come from grow"):
        report(vit())


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ({"depth": 1}, "depth of blocks must be no smaller, got 2 -> 1"),
        ({"dim": 16, "heads": 2}, "dim of blocks must be no smaller, got 32 -> 16"),
        ({"dim": 64, "heads": 2}, "heads of blocks must be no smaller, got 4 -> 2"),
        ({"mlp_ratio": 2}, "hidden of blocks must be no smaller, got 128 -> 64"),
        ({"dim": 48, "heads": 4}, "head_dim of blocks must be a multiple of the source's, got 8 -> 12"),
        ({"patch_size": 2}, "patch_size must be as in the source, got .4, 4. -> .2, 2."),
        ({"in_chans": 1}, "in_chans must be as in the source"),
        ({"reg_tokens": 1}, "reg_tokens must be as in the source, got 0 -> 1"),
        ({"init_values": 1.0}, "layer_scale must be as in the source"),
        ({"qkv_bias": False}, "qkv_bias must be as in the source"),
        ({"act_layer": "relu"}, "act must be as in the source"),
        ({"kind": VisionTransformerDistilled}, "distilled must be as in the source"),
    ],
)
def test_pairs_that_do_not_fit(target, match):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=match):
        grow(vit(), vit(**target))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "copy"}, "`method` must be one of fpi, net2net"),
        ({"width": "copy"}, "`width` must be left out|`width` must be one of"),
        ({"depth": "copy"}, "`depth` must be one of stack"),
        ({"width": "aki"}, "`width` must be left out with method 'fpi'"),
        ({"method": "stack", "depth": "identity"}, "`depth` must be left out with method 'stack'"),
        ({"noise": -0.1}, "`noise` must be a number of at least 0"),
        ({"noise": float("nan")}, "`noise`"),
        ({"head": "new"}, "`head` must be 'grow' or 'target'"),
        ({"maps": {"channels": torch.arange(64)}}, "`maps` must have keys among"),
        (
            {"maps": {"embed": torch.arange(32)}},
            "must have an entry for each of the target's 64 units, got 32",
        ),
        ({"maps": {"embed": torch.zeros(64, dtype=torch.int64)}}, "must name every source unit"),
        ({"maps": {"embed": torch.zeros(64)}}, "must be int64"),
    ],
)
def test_illegal_options_name_themselves(options, match):
    with pytest.raises(ValueError, match=match):
        grow(vit(), vit(64, 2, 8), **options)


def test_models_that_do_not_grow():
    with pytest.raises(TypeError, match="must be a timm VisionTransformer"):
        grow(nn.Linear(3, 3), vit())
    extra = vit()
    extra.blocks[1].adapter = nn.Linear(2, 2)
    with pytest.raises(
        NotImplementedError, match=r"blocks.1.adapter.bias of VisionTransformer is not a part"
    ):
        grow(extra, vit(64, 2, 8))
    tied = vit()
    tied.blocks[1].mlp.fc1.weight = tied.blocks[0].mlp.fc1.weight
    with pytest.raises(NotImplementedError, match=r"blocks.1.mlp.fc1.weight must be a tensor of its own"):
        grow(tied, vit(64, 2, 8))
    with pytest.raises(NotImplementedError, match=r"attn_pool.* is not a part that growth knows"):
        Layout.of(vit(global_pool="map"))
    with pytest.raises(NotImplementedError, match=r"weight_scale .*is not a part that growth knows"):
        grow(vf.quantize.prepare(vit()), vit(64, 2, 8))
    scaled = vit()
    scaled.blocks[0].attn.scale = 1.0
    with pytest.raises(NotImplementedError, match=r"blocks.0.attn.scale must be 0.35"):
        Layout.of(scaled)
    with pytest.raises(NotImplementedError, match="must be a LayerNorm with weight and bias, got RmsNorm"):
        Layout.of(vit(norm_layer="rmsnorm"))
    post = timm.models.vision_transformer.ResPostBlock
    with pytest.raises(NotImplementedError, match="must be a timm Block, got ResPostBlock"):
        Layout.of(VisionTransformer(embed_dim=32, depth=1, num_heads=4, block_fn=post))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"pre_norm": True}, "norm_pre writes to the residual stream"),
        ({"global_pool": "max"}, "pooling before fc_norm"),
    ],
)
def test_average_where_it_would_not_be_exact(parts, match):
    with pytest.raises(NotImplementedError, match=match):
        grow(vit(**parts), vit(48, 2, 6, **parts), "average")
    source = vit(**parts)
    assert difference(source, grow(source, vit(64, 2, 8, **parts), "average")) <= 1e-12


@pytest.mark.parametrize(
    "parts",
    [p for n, p in MORE_PARTS.items() if n != "ratio 2.5"],
    ids=[n for n in MORE_PARTS if n != "ratio 2.5"],
)
def test_stacking_round_trip(parts):
    model = vit(**parts)
    layout, state = Layout.of(model), model.state_dict()
    stacked = stack_vit(state, layout)
    again = unstack_vit(stacked, layout)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    with torch.no_grad():
        for t in (stacked.matrices, stacked.vectors, *stacked.others.values()):
            t.zero_()
    assert all(torch.equal(t, state[key]) for key, t in vit(**parts).state_dict().items())


def test_slots_and_vectors():
    model = vit()
    layout, state = Layout.of(model), model.state_dict()
    stacked = stack_vit(state, layout)
    assert stacked.matrices.shape == (2, 12, 32, 32)
    assert (layout.head_dim, layout.mlp_ratio, layout.ratio) == (8, 4.0, 4)
    assert torch.equal(stacked.matrices[1, 1], state["blocks.1.attn.qkv.weight"][32:64])
    assert torch.equal(stacked.matrices[1, 3], state["blocks.1.attn.proj.weight"])
    assert torch.equal(stacked.matrices[0, 6], state["blocks.0.mlp.fc1.weight"][64:96])
    assert torch.equal(stacked.matrices[0, 10], state["blocks.0.mlp.fc2.weight"][:, 64:96])
    assert stacked.vectors.shape == (2, 13, 32)
    assert torch.equal(stacked.vectors[1, 6], state["blocks.1.mlp.fc1.bias"][64:96])
    assert torch.equal(stacked.vectors[1, 12], state["blocks.1.norm2.bias"])
    names = [name for name, _ in layout.vectors]
    assert names.count("mlp.fc1.bias") == 4
    assert names[-4:] == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    assert set(stacked.others) == {key for key in state if not key.startswith("blocks.")}


def test_gradients_pass_through_unstacking():
    model = vit()
    layout = Layout.of(model)
    stacked = stack_vit(model.state_dict(), layout)
    leaves = [t.requires_grad_() for t in (stacked.matrices, stacked.vectors, stacked.others["pos_embed"])]
    torch.func.functional_call(model, unstack_vit(stacked, layout), images()).square().sum().backward()
    model(images()).square().sum().backward()
    want = stack_vit({name: p.grad for name, p in model.named_parameters()}, layout)
    for leaf, expected in zip(leaves, (want.matrices, want.vectors, want.others["pos_embed"]), strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-10)


def test_stacking_refusals():
    model = vit()
    layout, state = Layout.of(model), model.state_dict()
    with pytest.raises(ValueError, match=r"hidden width must be a multiple of the width 32.*got 80"):
        Layout.of(vit(mlp_ratio=2.5)).ratio  # noqa: B018
    with pytest.raises(ValueError, match="extra must not be there"):
        stack_vit({**state, "extra": torch.zeros(1)}, layout)
    with pytest.raises(ValueError, match=r"cls_token must have shape .*got none"):
        stack_vit({key: t for key, t in state.items() if key != "cls_token"}, layout)
    stacked = stack_vit(state, layout)
    with pytest.raises(ValueError, match=r"`matrices` must have shape \(2, 12, 32, 32\)"):
        unstack_vit(Stacked(stacked.matrices[:1], stacked.vectors, stacked.others), layout)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ({"dim": 32, "heads": (4, 8)}, {}),
        ({"dim": 48, "heads": (2, 6)}, {}),
        ({"dim": 32, "heads": (4, 8), "qkv_bias": False}, {}),
        ({"depths": (4, 5)}, {"method": "identity"}),
        ({"dim": 32, "depths": (3, 4), "heads": (4, 8)}, {"method": "average"}),
        ({"dim": 32, "heads": (4, 8), "img_size": 64}, {}),
    ],
)
def test_swin_keeps_the_function(target, options, tmp_path):
    source = swin(**{key: target[key] for key in ("qkv_bias",) if key in target})
    grown = grow(source, swin(**target), **options, noise=0)
    if "img_size" in target:
        source.set_input_size((64, 64), window_size=4)
    assert difference(source, grown, target.get("img_size", 32)) <= 1e-12
    assert report(grown).function_preserving
    vf.save(grown, tmp_path / "grown.safetensors")
    x = images(size=target.get("img_size", 32))
    assert torch.equal(vf.load(tmp_path / "grown.safetensors")(x), grown(x))


def test_swin_parts_follow_their_maps():
    source = swin(depths=(2, 4))
    maps = {"embed.0": torch.arange(32) // 2, "heads.1": torch.tensor([3, 2, 1, 0, 0, 1, 2, 3])}
    state, grown = (
        source.state_dict(),
        grow(source, swin(32, (2, 8), (4, 8)), "interleave", maps=maps, noise=0),
    )
    new = grown.state_dict()
    merged = new["layers.1.downsample.reduction.weight"].view(2, 32, 4, 32)
    old = state["layers.1.downsample.reduction.weight"].view(32, 4, 16)
    for half in merged:
        assert torch.equal(half, old.repeat_interleave(2, 2) / 2)
    for i, layer in enumerate((0, 1, 0, 1, 2, 3, 2, 3)):
        table = "blocks.{}.attn.relative_position_bias_table"
        want = state[f"layers.1.{table.format(layer)}"][:, maps["heads.1"]]
        assert torch.equal(new[f"layers.1.{table.format(i)}"], want)
    assert difference(swin(), grow(swin(), swin(32, heads=(4, 8)), maps=maps, noise=0), 32) <= 1e-12


def test_swin_refusals():
    with pytest.raises(ValueError, match="family must be the source's, got ViT -> Swin"):
        grow(vit(), swin(32))
    with pytest.raises(ValueError, match="number of stages must be as in the source, got 2 -> 3"):
        grow(swin(), swin(32, (2, 2, 2), (4, 8, 8), img_size=64))
    with pytest.raises(ValueError, match="window_size must be as in the source"):
        grow(swin(), swin(32, heads=(4, 8), window_size=2))
    with pytest.raises(ValueError, match=r"depth of layers.1.blocks must be no smaller, got 2 -> 1"):
        grow(swin(), swin(depths=(2, 1)))
    with pytest.raises(NotImplementedError, match=r"patch_embed.norm writes to the residual stream"):
        grow(swin(), swin(24, heads=(3, 6)), "average")


def moments(model, steps=1):
    """Adam's state after steps that move nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        x = images(size=model.patch_embed.img_size[0]) * (step + 1)
        nn.functional.cross_entropy(model(x), torch.tensor([1, 3])).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        (vit, {"dim": 64, "heads": 8}, {}),
        (vit, {"dim": 96, "heads": 6, "mlp_ratio": 5}, {}),
        (vit, {"dim": 64, "heads": 4, "qk_norm": True}, {}),
        (vit, {"dim": 64, "heads": 8, "depth": 3, "init_values": 0.1}, {"method": "identity"}),
        (vit, {"dim": 64, "heads": 8, "kind": VisionTransformerDistilled}, {}),
        (swin, {"dim": 32, "heads": (2, 8)}, {}),
    ],
)
def test_carried_moments_are_those_of_the_grown_model(source, target, options):
    parts = {key: target[key] for key in ("qk_norm", "init_values", "kind") if key in target}
    small = source(**parts)
    grown = grow(small, source(**target), noise=0, **options)
    new = torch.optim.AdamW(grown.parameters(), lr=0.1)
    carried = grow_optimizer_state(moments(small, 2), small, grown, new)
    inserted = report(grown).inserted
    names = dict(grown.named_parameters())
    assert set(carried) == {n for n in names if not n.startswith(inserted or ("none",))}
    want = moments(grown, 2)
    for name in carried:
        state, expected = new.state[names[name]], want.state[names[name]]
        assert state["step"] == 2
        # Rounding of a gradient is relative to the largest; k's bias has none but rounding.
        floor = 1e-11 * max(float(s["exp_avg"].abs().max()) for s in want.state.values())
        torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=1e-9, atol=floor)
        torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=1e-8, atol=floor**2)
    assert new.param_groups[0]["lr"] == 0.1


def test_moments_that_are_not_known_start_fresh():
    source = vit()
    optimizer = moments(source)
    for target, options in (
        ({"depth": 4}, {"method": "stack"}),
        ({"dim": 64, "heads": 8}, {"method": "aki"}),
        ({"dim": 48, "heads": 6}, {"method": "average"}),
        ({"dim": 64, "heads": 8}, {"method": "net2net"}),
    ):
        grown = grow(source, vit(**target), **options)
        new = torch.optim.AdamW(grown.parameters())
        assert grow_optimizer_state(optimizer, source, grown, new) == ()
        assert not new.state
    grown = grow(source, vit(64, 2, 8, num_classes=7), head="target")
    new = torch.optim.AdamW(grown.parameters())
    assert "head.weight" not in grow_optimizer_state(optimizer, source, grown, new)
    with pytest.raises(ValueError, match="`source` must be the model that was grown"):
        grow_optimizer_state(optimizer, vit(64, 2, 8), grown, new)
    next(iter(optimizer.state.values()))["curvature"] = torch.zeros(3)
    with pytest.raises(ValueError, match="got curvature of"):
        grow_optimizer_state(optimizer, source, grown, new)


def test_two_steps_are_one():
    source, middle, target = vit(), vit(64, 2, 8), vit(128, 4, 16)
    twice, once = grow(grow(source, middle, noise=0), target, noise=0), grow(source, target, noise=0)
    for (key, got), want in zip(twice.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(got, want), key
    # A smaller epsilon, which average leaves, goes along.
    middle = grow(source, vit(48, 2, 6), "average")
    assert difference(source, grow(middle, vit(80, 3, 10), "average")) <= 1e-12


@pytest.mark.parametrize("method", ["fpi", "mango", "ligo"])
def test_images_are_normalised_as_the_source_had_them(method):
    source = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    target = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    theirs = dict(target.pretrained_cfg)
    assert theirs["mean"] != source.pretrained_cfg["mean"]
    grown = grow(source, target, method)
    for key, value in grown.pretrained_cfg.items():
        assert value == (source.pretrained_cfg if key in ("mean", "std") else theirs)[key]
    assert timm.data.resolve_model_data_config(grown)["std"] == source.pretrained_cfg["std"]
    assert target.pretrained_cfg == theirs
    # timm takes ImageNet's mean for a model that says nothing.
    assert not hasattr(grow(vit(), vit(64, 2, 8), method), "pretrained_cfg")
