"""NViT pruning of Swin Transformers: units of stages and blocks, compaction, files."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pyvitfast as vf
from pyvitfast.models import BlockDims, PrunedSwinTransformer, SwinConfig, SwinDims
from pyvitfast.prune import LatencyTable, NViTPruner, ParamsCost, UnitTable
from tests.methods.conftest import pruned

HEADS, WIDTH = (2, 4), 8
NO_EMBED = {"embed": 1000}  # more than there are, so none is removable


@pytest.fixture
def swin():
    """Makes Swins with shifted windows, padding (9 tokens by windows of 4) and weights far from 0 and 1."""

    def make(double=True, seed=0, img_size=18, **changes):
        torch.manual_seed(seed)
        model = SwinTransformer(
            img_size=img_size,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=16,
            depths=(2, 2),
            num_heads=HEADS,
            window_size=4,
            drop_path_rate=0.0,
            **changes,
        )
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.double() if double else model

    return make


@pytest.fixture
def images():
    def make(count=4, seed=0, side=18, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 1, side, side, generator=generator, dtype=dtype)
        return x, torch.randint(10, (count,), generator=generator)

    return make


@pytest.mark.parametrize("membership", ["subset", "full"])
def test_scores_are_squared_gate_gradients(membership, swin, images):
    """Gates on activations, all 1, against the sums over weights."""
    model, (x, y) = swin(), images()
    full = membership == "full"
    pruner = NViTPruner(model, membership=membership)
    F.cross_entropy(model(x), y).backward()
    pruner.score()
    gates = {s.name: torch.ones(s.size, dtype=torch.float64, requires_grad=True) for s in pruner.structures}
    handles = []

    def after(module, function):
        handles.append(module.register_forward_hook(lambda m, a, out: function(out)))

    def before(module, function):
        handles.append(module.register_forward_pre_hook(lambda m, a: (function(a[0]),)))

    gated = {}
    after(model.patch_embed.norm, lambda out: out * gates["layers.0.embed"])
    if full:
        after(model.patch_embed.proj, lambda out: out * gates["layers.0.embed"][:, None, None])
        after(model.norm, lambda out: out * gates["layers.1.embed"])
        before(model.head.fc, lambda a: a * gates["layers.1.embed"])
    for s, stage in enumerate(model.layers):
        e = gates[f"layers.{s}.embed"]
        if s:
            past = gates[f"layers.{s - 1}.embed"]
            after(stage.downsample.reduction, lambda out, e=e: out * e)
            before(stage.downsample.reduction, lambda a, past=past: a * past.repeat(4))
            if full:
                after(stage.downsample.norm, lambda out, past=past: out * past.repeat(4))
        for j, block in enumerate(stage.blocks):
            own = {k: gates[f"layers.{s}.blocks.{j}.{k}"] for k in ("head", "qk", "v", "mlp")}

            def qkv(out, own=own, heads=HEADS[s]):
                parts = []
                for part, dim in zip(out.chunk(3, -1), ("qk", "qk" if full else None, "v")):
                    part = part.view(*part.shape[:-1], heads, WIDTH) * own["head"][:, None]
                    parts.append((part * own[dim] if dim else part).flatten(-2))
                return torch.cat(parts, -1)

            before(block.attn.qkv, lambda a, e=e: a * e)
            after(block.attn.qkv, qkv)
            after(block.attn.proj, lambda out, e=e: out * e)
            before(block.mlp.fc1, lambda a, e=e: a * e)
            after(block.mlp.fc1, lambda out, own=own: out * own["mlp"])
            after(block.mlp.fc2, lambda out, e=e: out * e)
            if full:

                def rows(a, own=own, heads=HEADS[s]):
                    part = a.view(*a.shape[:-1], heads, WIDTH)
                    return (part * own["head"][:, None] * own["v"]).flatten(-2)

                after(block.norm1, lambda out, e=e: out * e)
                after(block.norm2, lambda out, e=e: out * e)
                before(block.attn.proj, rows)
                before(block.mlp.fc2, lambda a, own=own: a * own["mlp"])
                table = f"layers.{s}.blocks.{j}.attn.relative_position_bias_table"
                gated[table] = block.attn.relative_position_bias_table * own["head"]
    F.cross_entropy(functional_call(model, gated, (x,)), y).backward()
    for handle in handles:
        handle.remove()
    assert [s.name for s in pruner.structures][:4] == [
        "layers.0.embed",
        "layers.1.embed",
        "layers.0.blocks.0.head",
        "layers.0.blocks.0.qk",
    ]
    for s in pruner.structures:
        found = pruner.unit_scores[s.start : s.stop]
        torch.testing.assert_close(found, gates[s.name].grad ** 2, rtol=1e-8, atol=1e-20, msg=s.name)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"global_pool": "max"}, {"window_size": 9}])
def test_masked_equals_compact_without_channel_pruning(swin, images, changes):
    if "window_size" in changes:  # one window, no shift
        torch.manual_seed(0)
        model = SwinTransformer(
            img_size=18, patch_size=2, in_chans=1, embed_dim=16, depths=(2, 2), num_heads=HEADS, window_size=9
        ).double()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    else:
        model = swin(**changes)
    model.eval()
    pruner = pruned(model, group_sizes=NO_EMBED)
    kinds = {r["structure"].split(".")[-1] for entry in pruner.history for r in entry["removed"]}
    assert kinds == {"head", "qk", "v", "mlp"}
    slim = pruner.compact()
    x, _ = images()
    torch.testing.assert_close(slim(x), model(x), rtol=1e-12, atol=1e-12)
    assert slim.state_dict().keys() == model.state_dict().keys()


def test_the_shift_of_windows_matters_to_that_comparison(swin, images):
    model = swin().eval()
    slim = pruned(model, group_sizes=NO_EMBED).compact()
    shifted = [b for stage in slim.layers for b in stage.blocks if any(b.shift_size)]
    assert len(shifted) == 2 and all(b.attn_mask is not None for b in shifted)
    x, _ = images()
    expected = slim(x)
    for block in shifted:
        block.attn_mask = torch.zeros_like(block.attn_mask)
    assert (slim(x) - expected).abs().max() > 1e-3


def test_channels_of_a_stage_are_cut_as_by_norms_over_alive_channels(swin, images):
    model = swin().eval()
    pruner = pruned(model, 0.3, group_sizes={"mlp": 1000, "head": 1000, "qk": 1000, "v": 1000})
    first, second = pruner.dims.embed_dims
    assert first < 16 and second < 32
    slim = pruner.compact(ln_fix=False)
    alive = [pruner.masks["layers.0.embed"], pruner.masks["layers.1.embed"]]

    def norm_over(mask):
        def hook(module, inputs, output):
            out = torch.zeros_like(output)
            weight, bias = module.weight[mask], module.bias[mask]
            out[..., mask] = F.layer_norm(inputs[0][..., mask], weight.shape, weight, bias, module.eps)
            return out

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            if name == "layers.1.downsample.norm":
                mask = torch.cat([alive[0]] * 4)
            else:
                mask = alive[1] if name.startswith("layers.1") or name == "norm" else alive[0]
            module.register_forward_hook(norm_over(mask))
    x, _ = images()
    torch.testing.assert_close(slim(x), model(x), rtol=1e-10, atol=1e-10)
    fixed = pruner.compact()
    for name, factor in (("layers.1.downsample.norm", 16 / first), ("norm", 32 / second)):
        found, plain = fixed.get_submodule(name).weight, slim.get_submodule(name).weight
        torch.testing.assert_close(found, plain * factor**0.5)


def kept_by_hand(name, parameter, masks):
    """Rows and columns of a parameter that live on, from the masks and nothing of the table."""
    rows = torch.ones(parameter.shape[0], dtype=torch.bool)
    cols = torch.ones(parameter.shape[-1] if parameter.ndim == 2 else 1, dtype=torch.bool)
    stage = name.split(".")[1] if name.startswith("layers") else "1"
    e = masks["layers.0.embed" if name.startswith("patch_embed") else f"layers.{stage}.embed"]
    if "downsample" in name:
        merged = torch.cat([masks["layers.0.embed"]] * 4)
        return (merged, cols) if "norm" in name else (e, merged)
    if "head.fc" in name:
        return (rows, e) if parameter.ndim == 2 else (rows, cols)
    if ".blocks." not in name or "norm" in name:
        return e, cols
    block, part = name.split(".attn.")[0].split(".mlp.")[0], name.split(".", 4)[4]
    head = masks[f"{block}.head"]
    qk = (head[:, None] & masks[f"{block}.qk"]).flatten()
    v = (head[:, None] & masks[f"{block}.v"]).flatten()
    found = {
        "attn.relative_position_bias_table": (rows, head),
        "attn.qkv.weight": (torch.cat([qk, qk, v]), e),
        "attn.qkv.bias": (torch.cat([qk, qk, v]), cols),
        "attn.proj.weight": (e, v),
        "mlp.fc1.weight": (masks[f"{block}.mlp"], e),
        "mlp.fc1.bias": (masks[f"{block}.mlp"], cols),
        "mlp.fc2.weight": (e, masks[f"{block}.mlp"]),
    }
    return found.get(part, (e, cols))


def test_kept_weights_are_the_right_ones(swin):
    model = swin()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = pruned(model, 0.3)
    slim = dict(pruner.compact(ln_fix=False).named_parameters())
    assert all(not mask.all() for name, mask in pruner.masks.items() if not name.endswith("0.head"))
    for name, p in before.items():
        rows, cols = kept_by_hand(name, p, pruner.masks)
        expected = p[rows][:, cols] if p.ndim == 2 else p[rows]
        assert torch.equal(slim[name], expected), name


def test_pruned_weights_stay_exactly_zero(swin, images):
    model = swin(double=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    pruner = NViTPruner(model, target=0.2, interval=1000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        pruner.prune_once(torch.rand(pruner.table.count, generator=generator))
        if pruner.fraction < 0.5:
            break
    for step in range(20):
        x, y = images(8, step, dtype=torch.float32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.step(optimizer)
        alive = 0
        for name, p in model.named_parameters():
            rows, cols = kept_by_hand(name, p, pruner.masks)
            keep = rows.view(-1, *[1] * (p.ndim - 1)) & (cols if p.ndim == 2 else torch.tensor(True))
            assert (p[~keep.expand_as(p)] == 0).all(), name
            alive += int(keep.expand_as(p).sum())
        assert alive == sum(p.numel() for p in pruner.compact().parameters())
    assert alive < 0.7 * sum(p.numel() for p in model.parameters())


def test_permuting_units_permutes_scores(swin, images):
    model, (x, y) = swin(), images()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    mlp = other.layers[0].blocks[1].mlp
    for parameter in (mlp.fc1.weight, mlp.fc1.bias):
        parameter.data = parameter.data[order]
    mlp.fc2.weight.data = mlp.fc2.weight.data[:, order]
    attn, heads = other.layers[1].blocks[1].attn, torch.tensor([2, 0, 3, 1])
    rows = (heads[:, None] * WIDTH + torch.arange(WIDTH)).flatten()
    attn.qkv.weight.data = torch.cat([attn.qkv.weight.data[rows + 32 * t] for t in range(3)])
    attn.qkv.bias.data = torch.cat([attn.qkv.bias.data[rows + 32 * t] for t in range(3)])
    attn.proj.weight.data = attn.proj.weight.data[:, rows]
    attn.relative_position_bias_table.data = attn.relative_position_bias_table.data[:, heads]
    torch.testing.assert_close(other(x), model(x))
    found = []
    for each in (model, other):
        pruner = NViTPruner(each)
        F.cross_entropy(each(x), y).backward()
        pruner.score()
        found.append({s.name: pruner.unit_scores[s.start : s.stop] for s in pruner.structures})
    assert found[0].keys() == found[1].keys()
    permuted = {"layers.0.blocks.1.mlp": order, "layers.1.blocks.1.head": heads}
    for name, scores in found[0].items():
        expected = scores[permuted[name]] if name in permuted else scores
        torch.testing.assert_close(found[1][name], expected, rtol=1e-7, atol=1e-18, msg=name)


def test_pruning_while_training(swin, images):
    """Pruned places stay exactly 0, the budget is met, and the optimizer goes on with the small model."""
    model = swin(double=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    pruner = NViTPruner(model, target=0.5, interval=2, groups_per_step=4)
    step = 0
    while not pruner.done:
        x, y = images(8, step, dtype=torch.float32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.step(optimizer)
        step += 1
    alive = pruner.masks["layers.0.blocks.1.mlp"]
    assert not alive.all()
    assert (model.layers[0].blocks[1].mlp.fc2.weight[:, ~alive] == 0).all()
    dense = vf.summary(swin(double=False))
    slim = pruner.compact(optimizer)
    found = vf.summary(slim)
    assert found.macs <= 0.5 * dense.macs and found.blocks == pruner.dims.blocks
    assert pruner.fraction == pytest.approx(found.macs / dense.macs)
    x, y = images(8, 99, dtype=torch.float32)
    before = slim.head.fc.weight.clone()
    F.cross_entropy(slim(x), y).backward()
    optimizer.step()
    assert not torch.equal(before, slim.head.fc.weight)
    state = optimizer.state[slim.layers[1].downsample.reduction.weight]
    assert state["exp_avg"].shape == slim.layers[1].downsample.reduction.weight.shape


def test_files_and_timm_methods(swin, images, tmp_path):
    slim = pruned(swin(double=False).eval(), 0.5).compact().eval()
    assert type(slim) is PrunedSwinTransformer
    vf.save(slim, tmp_path / "swin.safetensors")
    again = vf.load(tmp_path / "swin.safetensors")
    x, _ = images(dtype=torch.float32)
    assert type(again) is PrunedSwinTransformer and torch.equal(again(x), slim(x))
    assert SwinConfig.from_model(again) == SwinConfig.from_model(slim)
    features = slim.forward_features(x)
    assert features.shape == (4, 5, 5, slim.num_features)
    torch.testing.assert_close(slim.forward_head(features), slim(x))
    widths = SwinConfig.from_model(slim).dims.embed_dims
    assert [f.shape[1] for f in slim.forward_intermediates(x, intermediates_only=True)] == list(widths)
    assert [info["num_chs"] for info in slim.feature_info] == list(widths)
    slim.reset_classifier(3)
    assert slim(x).shape == (4, 3) and slim.get_classifier().out_features == 3
    second = pruned(again, 0.6)
    assert vf.summary(second.compact()).macs < vf.summary(again).macs


def test_resuming_and_configs(swin):
    model = swin()
    first = pruned(model, 0.7)
    second = NViTPruner(swin(), target=0.7)
    second.load_state_dict(first.state_dict())
    assert second.dims == first.dims
    config = SwinConfig.from_model(model)
    assert SwinConfig.from_dict(config.to_dict()) == config
    assert SwinDims.from_dict(first.dims.to_dict()) == first.dims
    rebuilt = config.build().double().eval()
    rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize("pruned", [False, True])
def test_counts_agree_with_the_counter(swin, images, pruned):
    model = swin(double=False).eval()
    if pruned:
        dims = SwinDims(
            (12, 20), (((BlockDims(1, 4, 4, 24)), BlockDims(2, 6, 6, 8)), (BlockDims(3, 2, 2, 40),) * 2)
        )
        model = SwinConfig.from_model(model).prune(dims).build().eval()
    found = vf.summary(model)
    x, _ = images(1, dtype=torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert found.macs == counter.get_total_flops() / 2
    assert found.params == SwinConfig.from_model(model).params()


def test_counts_of_unequal_widths(swin, images):
    """The counter also sees the zeros that make the two widths of a head equal."""
    blocks = (BlockDims(2, 4, 8, 24), BlockDims(1, 6, 2, 8)), (BlockDims(3, 2, 4, 40), BlockDims(4, 8, 6, 16))
    model = SwinConfig.from_model(swin(double=False)).prune(SwinDims((12, 20), blocks)).build().eval()
    windows, zeros = (9, 4), 0  # of 9 x 9 and 5 x 5 tokens, 4 a side
    for stage, count in zip(blocks, windows, strict=True):
        for b in stage:
            zeros += count * 16**2 * b.heads * (2 * max(b.qk_dim, b.v_dim) - b.qk_dim - b.v_dim)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(1, dtype=torch.float32)[0])
    assert vf.summary(model).macs + zeros == counter.get_total_flops() / 2


def test_savings_stand_in_the_order_of_the_structures(swin):
    """Against models built with one unit fewer."""
    config = SwinConfig.from_model(swin())
    table = UnitTable(config)
    whole = sum(p.numel() for p in config.build().parameters())
    saved = ParamsCost(config).delta(config.dims)
    assert len(saved) == len(table.structures) == 2 + 4 * 4
    for s, found in zip(table.structures.values(), saved, strict=True):
        alive = torch.ones(table.count, dtype=torch.bool)
        alive[s.start] = False
        smaller = config.prune(table.dims(alive)).build()
        assert found == whole - sum(p.numel() for p in smaller.parameters()), s.name


def test_products_of_swin_tiny_stay_multiples_of_16():
    with torch.device("meta"):
        table = UnitTable(SwinConfig.from_model(timm.create_model("swin_tiny_patch4_window7_224")))
    generator = torch.Generator().manual_seed(0)
    alive = torch.ones(table.count, dtype=torch.bool)
    while chosen := table.select(torch.rand(table.count, generator=generator).double(), alive, alive, 40):
        for _, units, _ in chosen:
            alive[units] = False
        dims = table.dims(alive)
        widths = list(dims.embed_dims)
        for b in dims.blocks:
            widths += [b.heads * b.qk_dim, b.heads * b.v_dim, b.mlp]
        assert all(w > 0 and w % 16 == 0 for w in widths), widths
    assert dims.embed_dims == (16, 16, 16, 16)


def test_masks_follow_dtype_and_flags_are_carried(swin, images, tmp_path):
    """Masks of shifted windows are in no file and no optimizer: they must be made in the model's dtype."""
    model = swin().bfloat16().eval()
    model.set_grad_checkpointing(True)
    x = images(dtype=torch.bfloat16)[0]
    slim = pruned(model).compact()
    vf.save(model, tmp_path / "dense.safetensors")
    vf.save(slim, tmp_path / "slim.safetensors")
    dense = vf.load(tmp_path / "dense.safetensors")
    assert type(dense) is SwinTransformer
    for each in (slim, dense, vf.load(tmp_path / "slim.safetensors")):
        masks = [b for name, b in each.named_buffers() if name.endswith("attn_mask")]
        assert [m.dtype for m in masks] == [torch.bfloat16] * 2
        assert each(x).dtype == torch.bfloat16
    assert torch.equal(dense(x), model(x))
    assert all(stage.grad_checkpointing for stage in slim.layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compacts_on_the_gpu(swin, images):
    model = swin().cuda().eval()
    slim = pruned(model, group_sizes=NO_EMBED).compact()
    assert all(t.is_cuda for t in (*slim.parameters(), *slim.buffers()))
    x = images()[0].cuda()
    torch.testing.assert_close(slim(x), model(x), rtol=1e-10, atol=1e-10)


def test_swin_tiny_as_published():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    config = SwinConfig.from_model(model)
    assert config.params() == 28_288_354  # Swin paper: 28 M parameters, 4.5 G
    assert round(config.macs() / 1e9, 1) == 4.5
    pruner = NViTPruner(model)
    groups = {
        kind: {s.group_size for s in pruner.structures if s.kind == kind} for kind in ("embed", "qk", "mlp")
    }
    assert groups == {"embed": {16}, "qk": {8, 16}, "mlp": {16}}
    heads = {s.name.split(".")[1]: s.group_size for s in pruner.structures if s.kind == "head"}
    assert heads == {"0": 1, "1": 2, "2": 2, "3": 2}  # three heads cannot go in twos


def test_compile_whole(swin, images):
    slim = pruned(swin(double=False).eval(), 0.5).compact().eval()
    x, _ = images(dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(slim, fullgraph=True, backend="aot_eager")(x), slim(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"dynamic_img_size": True},
        {"always_partition": True, "img_size": 12, "window_size": 7},
        {"img_size": (18, 24), "window_size": ((3, 4), (2, 2))},
        {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.1},
        {"head_dim": 6, "mlp_ratio": 3.3, "qkv_bias": False},
        {"num_classes": 0, "global_pool": ""},
    ],
)
def test_rebuilt_and_equally_wide_models_compute_the_same(changes):
    plain = {
        "img_size": 18,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_classes": 5,
    }
    dense = SwinTransformer(**{**plain, "num_heads": HEADS, "window_size": 4, **changes}).eval()
    config = SwinConfig.from_model(dense)
    x = torch.randn(2, 1, *config.img_size)
    again, ours = config.build().eval(), config.prune(config.dims).build().eval()
    assert str(again) == str(dense)
    for model in (again, ours):
        model.load_state_dict(dense.state_dict())
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
        assert SwinConfig.from_model(model).macs() == config.macs()


class TestRefused:
    def test_second_version(self):
        model = SwinTransformerV2(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1))
        with pytest.raises(TypeError, match="SwinTransformerV2"):
            NViTPruner(model)

    def test_parts(self, swin):
        model = swin()
        model.layers[0].blocks[1].mlp.act = nn.ReLU()
        with pytest.raises(NotImplementedError, match=r"layers\.0\.blocks\.1\.mlp: must be .*GELU"):
            NViTPruner(model)
        model = swin()
        model.layers[1].blocks[0].norm1 = nn.RMSNorm(32)
        with pytest.raises(NotImplementedError, match=r"norm1: must be a LayerNorm"):
            NViTPruner(model)
        model = swin()
        model.extra = nn.Linear(2, 2)
        with pytest.raises(NotImplementedError, match=r"parameters: must be \d+ for these widths"):
            NViTPruner(model)

    def test_windows(self, swin):
        model = swin()
        model.layers[0].blocks[1].shift_size = (1, 1)
        with pytest.raises(NotImplementedError, match=r"layers\.0\.blocks\.1\.shift_size: must be \(2, 2\)"):
            NViTPruner(model)
        model = swin()
        model.layers[1].blocks[1].window_size = (3, 3)
        with pytest.raises(NotImplementedError, match=r"layers\.1\.blocks\.1\.window_size: must be \(4, 4\)"):
            NViTPruner(model)

    def test_other_families_and_pooling(self, swin):
        with pytest.raises(TypeError, match=r"SwinTransformer; no supported attention .*\.Linear"):
            NViTPruner(nn.Linear(2, 2))
        with pytest.raises(NotImplementedError, match="global_pool: must be avg, max or none, got avgmax"):
            NViTPruner(swin(global_pool="avgmax"))

    def test_scales(self, swin):
        config = SwinConfig.from_model(swin())
        with pytest.raises(ValueError, match="`scales` must hold 4 values, one for each block, got 1"):
            PrunedSwinTransformer(config.dims, [0.5], nn.LayerNorm)

    def test_latency(self, swin):
        with pytest.raises(TypeError, match="VisionTransformer"):
            LatencyTable.measure(swin())
