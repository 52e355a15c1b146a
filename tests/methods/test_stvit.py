"""STViT on ViT and DeiT: hand values, invariants and tables of the paper, against timm and float64."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

import pyvitfast as vf
from pyvitfast.models.stvit import LearnedPool, OverlapPool, STViT, TokensConfig, cross_attention
from pyvitfast.models.stvit_config import STViTConfig, vit_macs
from pyvitfast.prune import NViTPruner
from pyvitfast.quantize import QuantConfig, convert, prepare
from pyvitfast.tokens import report, to_stvit
from tests.ops.table import RecordedCalls

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters away from zeros and ones, in float64."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model.double().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def vit(**kwargs):
    torch.manual_seed(0)
    return shaken(VisionTransformer(**{**SMALL, **kwargs}))


def distilled():
    torch.manual_seed(0)
    made = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=64, patch_size=8, depth=6, num_classes=5
    )
    return shaken(made)


class TestIdentity:
    """Digest section 12: with M = N, G = 0 and layer-2 keys S1 the model is the plain one."""

    @pytest.mark.parametrize("pool", ["avg", "max", "learned"])
    def test_without_class_token(self, images, pool):
        plain = vit(class_token=False, global_pool="avg", fc_norm=False)
        fast = to_stvit(plain, (8, 8), concat_keys=False, pool=pool)
        torch.testing.assert_close(fast(images), plain(images), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("make", [vit, distilled])
    def test_with_carried_tokens(self, images, make):
        plain = make()
        fast = to_stvit(plain, (8, 8), concat_keys=False, prefix="carry")
        torch.testing.assert_close(fast(images), plain(images), rtol=0, atol=1e-12)

    def test_with_image_tokens_as_keys_it_is_not(self, images):
        plain = vit(class_token=False, global_pool="avg", fc_norm=False)
        assert (to_stvit(plain, (8, 8))(images) - plain(images)).abs().max() > 1e-3


def by_hand(model: STViT, images: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 written out, for ``prefix="drop"`` and two layers."""
    config = model.stgm.config

    def layer(block: Block, q: torch.Tensor, kv: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        width, heads = q.shape[-1], block.attn.num_heads
        wq, wk, wv = block.attn.qkv.weight.chunk(3)
        bq, bk, bv = block.attn.qkv.bias.chunk(3)
        qs = F.linear(block.norm1(q), wq, bq).unflatten(2, (heads, -1)).transpose(1, 2)
        ks = F.linear(block.norm1(kv), wk, bk).unflatten(2, (heads, -1)).transpose(1, 2)
        vs = F.linear(block.norm1(kv), wv, bv).unflatten(2, (heads, -1)).transpose(1, 2)
        scores = qs @ ks.transpose(2, 3) / math.sqrt(width // heads)
        mixed = (scores.softmax(-1) @ vs).transpose(1, 2).flatten(2)
        hidden = shortcut + block.attn.proj(mixed)
        return hidden + block.mlp(block.norm2(hidden))

    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks[: config.base]:
        x = block(x)
    first, second = model.blocks[config.base : config.base + 2]
    s1 = layer(first, pooled, x, pooled)
    queries = s1 if model.stgm.G is None else s1 + model.stgm.G
    s2 = layer(second, queries, torch.cat([s1, x], 1), queries if config.residual_includes_g else s1)
    for block in model.blocks[config.base + 2 :]:
        s2 = block(s2)
    return model.forward_head(model.norm(s2))


class TestEquations:
    @pytest.mark.parametrize("residual_includes_g", [False, True])
    def test_against_the_equations(self, images, residual_includes_g):
        fast = shaken(
            to_stvit(vit(), (4, 4), pool="max", residual_includes_g=residual_includes_g, warm_start=False), 2
        )
        x = fast.norm_pre(fast._pos_embed(fast.patch_embed(images)))
        for block in fast.blocks[:2]:
            x = block(x)
        grid = x.transpose(1, 2).unflatten(2, (8, 8))
        pooled = F.adaptive_max_pool2d(grid, (4, 4)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(fast(images), by_hand(fast, images, pooled), rtol=0, atol=1e-10)

    def test_fused_and_plain_attention_agree(self, images):
        fast = shaken(to_stvit(vit(), (4, 4), pool="avg", warm_start=False), 2)
        expected = fast(images)
        # A hook must see the projection, so keys and values are made.
        seen = []
        for block in fast.blocks:
            block.attn.qkv.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(fast(images), expected, rtol=0, atol=1e-10)
        assert len(seen) == 6

    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
    def test_timms_models_run_on_the_op(self, name):
        fast = to_stvit(timm.create_model(name).eval(), (2, 2), pool="avg")
        with torch.no_grad(), RecordedCalls("semantic_pool_attention") as seen:
            fast(torch.zeros(1, 3, 224, 224))
        assert len(seen.calls) == 2

    def test_order_of_semantic_tokens_does_not_matter_later(self, images):
        fast = shaken(to_stvit(vit(), (4, 4), pool="avg", warm_start=False), 2)
        expected = fast(images)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
        fast.blocks[4].register_forward_pre_hook(lambda _, given: (given[0][:, order],))
        torch.testing.assert_close(fast(images), expected, rtol=0, atol=1e-12)

    def test_equal_keys_give_equal_tokens(self):
        block = shaken(Block(24, 3, qkv_bias=True))
        keys = torch.randn(1, 1, 24).double().expand(2, 9, 24)
        out = cross_attention(block, torch.randn(2, 4, 24).double(), keys)
        torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=1e-12)


class TestPools:
    def test_learned_starts_as_average(self):
        x = torch.randn(2, 14, 14, 8).double()
        pool = LearnedPool(8, (4, 4), (14, 14), "window").double()
        expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 4).flatten(2).transpose(1, 2)
        torch.testing.assert_close(pool(x), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("scope", ["window", "grid"])
    @pytest.mark.parametrize("size", [(4, 4), (5, 3)])
    def test_learned_against_a_window_at_a_time(self, scope, size):
        x = torch.randn(2, 7, 8, 6).double()
        pool = shaken(LearnedPool(6, size, (7, 8), scope))

        def network(net, image):  # [1, C, h, w]
            y = net.depthwise(image).permute(0, 2, 3, 1)
            y = F.gelu(F.layer_norm(y, (6,), net.layer_norm.weight, net.layer_norm.bias, 1e-5))
            return net.score(y.permute(0, 3, 1, 2))

        for b in range(2):
            cells, scores, means = [], [], []
            image = x[b].permute(2, 0, 1).unsqueeze(0)
            whole = network(pool.intra, image)
            for i in range(size[0]):
                for j in range(size[1]):
                    rows = slice(i * 7 // size[0], -(-(i + 1) * 7 // size[0]))
                    columns = slice(j * 8 // size[1], -(-(j + 1) * 8 // size[1]))
                    part = image[:, :, rows, columns]
                    # A narrower bin is convolved beside zeros, like every border.
                    score = network(pool.intra, part) if scope == "window" else whole[:, :, rows, columns]
                    cells.append(part[0])
                    scores.append(score[0, 0])
                    means.append((score.flatten(1).softmax(1) * part[0].flatten(1)).sum(1))
            between = network(pool.inter, torch.stack(means).T.unflatten(1, size).unsqueeze(0))
            between = between[0].flatten(1).T.unflatten(1, pool.cells)
            for part, score, extra, got in zip(cells, scores, between, pool(x)[b], strict=True):
                total = score + extra[: score.shape[0], : score.shape[1]]
                want = (total.flatten().softmax(0) * part.flatten(1)).sum(1)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    def test_overlap_is_the_papers_on_14(self):
        x = torch.randn(1, 14, 14, 3).double()
        expected = F.avg_pool2d(x.permute(0, 3, 1, 2), 6, 2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(OverlapPool((5, 5))(x), expected)

    def test_multiscale_has_25_tokens_for_4(self, images):
        fast = to_stvit(vit(), 4, pool="multiscale")
        assert fast.forward_features(images).shape == (2, 25, 24)
        with pytest.raises(ValueError, match="no grid"):
            fast.forward_intermediates(images)

    def test_other_bins_are_refused_by_the_learned_pool(self):
        with pytest.raises(ValueError, match="bins of 4x4 cells were learned"):
            LearnedPool(8, (4, 4), (14, 14), "window")(torch.randn(1, 20, 20, 8))


class TestTables:
    """MACs of digest section 8 in billions, to 0.5 %; parameters exactly."""

    @pytest.mark.parametrize(
        ("size", "prefix", "expected"),
        [
            ("tiny", "drop", (0.525, 0.600, 0.709, 0.856)),
            ("small", "drop", (1.911, 2.201, 2.613, 3.156)),
            ("base", "drop", (7.272, 8.405, 10.007, 12.090)),
            ("base", "keys", (7.306, 8.439, 10.041, 12.124)),
        ],
    )
    def test_tokens(self, size, prefix, expected):
        for side, gmacs in zip((4, 6, 8, 10), expected, strict=True):
            model = timm.create_model(f"stvit_deit_{size}_{side**2}", prefix=prefix)
            assert vf.summary(model).macs / 1e9 == pytest.approx(gmacs, rel=5e-3)

    @pytest.mark.parametrize(
        ("base", "layers", "gmacs"),
        [
            (4, 3, 1.972),
            (4, 4, 2.033),
            (3, 2, 1.563),
            (5, 2, 2.260),
            (7, 2, 2.957),
            (8, 2, 3.305),
            (10, 2, 4.002),
        ],
    )
    def test_place_and_layers(self, base, layers, gmacs):
        model = timm.create_model("stvit_deit_small_16", base=base, layers=layers)
        assert vf.summary(model).macs / 1e9 == pytest.approx(gmacs, rel=5e-3)

    @pytest.mark.parametrize(("size", "gmacs"), [("tiny", 1.259), ("small", 4.608), ("base", 17.583)])
    def test_plain(self, size, gmacs):
        config = vf.models.ViTConfig.from_model(timm.create_model(f"deit_{size}_patch16_224"))
        assert vit_macs(config) / 1e9 == pytest.approx(gmacs, rel=5e-3)

    @pytest.mark.parametrize("pool", ["avg", "max", "overlap", "multiscale", "learned"])
    @pytest.mark.parametrize("global_centers", [True, False])
    def test_parameters(self, pool, global_centers):
        fast = to_stvit(vit(), 3, pool=pool, global_centers=global_centers, layer_scale=0.1)
        held = sum(p.numel() for p in fast.parameters())
        assert STViTConfig.from_model(fast).params() == held
        plain = sum(p.numel() for p in vit(class_token=False, global_pool="avg").parameters())
        count = 13 if pool == "multiscale" else 9
        # 8 tokens a side in 3 bins: the widest has 4.
        learned = 2 * (9 + 3) * 24 + (1 + 16) * 25 if pool == "learned" else 0
        assert held == plain + count * 24 * global_centers + learned + 4 * 2 * 24


class TestConversion:
    def test_source_is_untouched_and_its_weights_are_kept(self):
        source = vit()
        before = {k: v.clone() for k, v in source.state_dict().items()}
        fast = to_stvit(source)
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, before[name])
        for name, tensor in fast.blocks.state_dict().items():
            assert torch.equal(tensor, before[f"blocks.{name}"])
        assert torch.equal(fast.pos_embed, before["pos_embed"][:, 1:])
        assert fast.cls_token is None
        assert torch.count_nonzero(fast.stgm.G) == 0
        assert "64 semantic" not in str(report(fast))
        assert "16 semantic tokens" in str(report(fast))

    def test_a_state_dict_of_the_source_loads(self, images):
        source = vit(reg_tokens=2)
        made = STViTConfig.from_model(to_stvit(source)).build().double()
        made.load_state_dict(source.state_dict())
        assert torch.equal(made.pos_embed, source.pos_embed[:, 3:])

    @pytest.mark.parametrize("prefix", ["drop", "keys", "carry"])
    @pytest.mark.parametrize("global_pool", ["token", "avg"])
    def test_saved_and_loaded(self, images, tmp_path, prefix, global_pool):
        fast = to_stvit(vit(global_pool=global_pool, reg_tokens=1), (3, 5), prefix=prefix, warm_start=False)
        vf.save(fast, tmp_path / "m.safetensors")
        again = vf.load(tmp_path / "m.safetensors")
        assert torch.equal(again(images), fast(images))
        assert again.stgm.config == fast.stgm.config

    @pytest.mark.parametrize("prefix", ["drop", "keys", "carry"])
    def test_tokens_of_the_prefix(self, images, prefix):
        fast = to_stvit(vit(reg_tokens=1), (2, 3), prefix=prefix)
        assert fast.forward_features(images).shape == (2, 6 + 2 * (prefix == "carry"), 24)
        maps = fast.forward_intermediates(images, intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [(8, 8)] * 2 + [(2, 3)] * 4

    def test_a_pruned_model_is_converted(self, images):
        torch.manual_seed(0)
        model = VisionTransformer(**SMALL)
        pruner = NViTPruner(
            model,
            target=0.7,
            budget="macs",
            interval=1,
            group_sizes={"embed": 4, "head": 1, "qk": 2, "v": 2, "mlp": 8},
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        while not pruner.done:
            model(images.float()).square().sum().backward()
            pruner.step(optimizer)
        slim = shaken(pruner.compact())
        same = to_stvit(slim, (8, 8), concat_keys=False, prefix="carry")
        torch.testing.assert_close(same(images), slim(images), rtol=0, atol=1e-12)
        few = to_stvit(slim, (2, 2))
        assert STViTConfig.from_model(few).params() == sum(p.numel() for p in few.parameters())

    def test_a_converted_model_is_quantised(self, images):
        fast = to_stvit(vit(), (2, 2)).float()
        low = prepare(fast, QuantConfig(weight_bits=4))
        low(images.float()).sum().backward()
        expected = low.eval()(images.float())
        torch.testing.assert_close(convert(low)(images.float()), expected, rtol=0, atol=1e-6)

    def test_what_does_not_compose_says_why(self):
        fast = to_stvit(vit(), (2, 2))
        with pytest.raises(NotImplementedError, match="Prune first"):
            NViTPruner(fast, target=0.5, budget="macs")
        with pytest.raises(NotImplementedError, match="semantic tokens already"):
            to_stvit(fast)
        with pytest.raises((TypeError, NotImplementedError), match="STViT"):
            vf.grow.grow(fast, vit(embed_dim=48), method="fpi")
        with pytest.raises(NotImplementedError, match="quantised"):
            to_stvit(prepare(vit().float(), QuantConfig(weight_bits=4)))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"tokens": (9, 2)}, "must not exceed the grid"),
            ({"tokens": 0}, "two positive whole numbers"),
            ({"base": 5}, "need 7 blocks"),
            ({"base": -1}, "at least 0"),
            ({"layers": 0}, "at least 1"),
            ({"pool": "median"}, "avg, max, overlap"),
            ({"prefix": "keep"}, "drop, keys, carry"),
        ],
    )
    def test_bad_settings(self, options, reason):
        with pytest.raises(ValueError, match=reason):
            to_stvit(vit(), **options)

    def test_bad_models(self):
        with pytest.raises(TypeError, match="VisionTransformer"):
            to_stvit(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="patch_drop_rate"):
            to_stvit(vit(patch_drop_rate=0.5))
        with pytest.raises(ValueError, match='must be "carry"'):
            to_stvit(distilled(), prefix="drop")
        with pytest.raises(TypeError, match="to_stvit"):
            report(timm.create_model("stvit_deit_tiny_16", depth=6, base=2))

    def test_config_goes_through_json(self):
        config = TokensConfig(tokens=(3, 5), pool="avg", layer_scale=1e-5)
        assert TokensConfig.from_dict({**config.to_dict(), "tokens": [3, 5]}) == config
        with pytest.raises(ValueError, match="unknown settings"):
            TokensConfig.from_dict({"tokens": (2, 2), "tokns": 1})


class TestModule:
    def test_images_of_other_sizes(self):
        fast = to_stvit(vit(dynamic_img_size=True, img_size=64), (2, 2), pool="max")
        assert fast(torch.randn(1, 3, 96, 40).double()).shape == (1, 5)
        with pytest.raises(ValueError, match="at least as many patches"):
            fast(torch.randn(1, 3, 64, 8).double())

    def test_gradients_with_checkpointing_are_the_same(self, images):
        fast = to_stvit(vit(), (4, 4), warm_start=False).train()
        gradients = []
        for enabled in (False, True):
            fast.set_grad_checkpointing(enabled)
            fast.zero_grad()
            fast(images).square().sum().backward()
            gradients.append([p.grad.clone() for p in fast.parameters()])
        for plain, saved in zip(*gradients, strict=True):
            torch.testing.assert_close(saved, plain, rtol=0, atol=1e-12)

    def test_every_parameter_learns(self, images):
        fast = to_stvit(vit(), (4, 4), warm_start=False).train()
        shaken(fast, 4)(images).square().sum().backward()
        idle = [n for n, p in fast.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert idle == []

    def test_compiles_whole(self, images):
        fast = to_stvit(vit(), (4, 4), warm_start=False).float()
        compiled = torch.compile(fast, fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(images.float()), fast(images.float()), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("suffix", ["onnx", "pt2"])
    def test_exported_without_our_ops(self, tmp_path, suffix):
        fast = to_stvit(vit(), (4, 4), warm_start=False).float()
        report = vf.models.export(fast, tmp_path / f"m.{suffix}")
        assert report.max_error is not None
        assert report.max_error < 1e-4
        if suffix == "pt2":
            code = torch.export.load(tmp_path / "m.pt2").module().code
            assert "pyvitfast" not in code

    def test_registered_models_take_timms_arguments(self):
        model = timm.create_model(
            "stvit_deit_tiny_16", num_classes=7, img_size=64, patch_size=8, depth=6, base=2
        )
        assert isinstance(model, STViT)
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7)
        assert model.get_classifier() is model.head
        model.reset_classifier(3)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
        features = timm.create_model(
            "stvit_deit_tiny_16",
            features_only=True,
            img_size=64,
            patch_size=8,
            depth=6,
            base=2,
            out_indices=(1, 5),
        )
        assert [tuple(t.shape) for t in features(torch.randn(1, 3, 64, 64))] == [
            (1, 192, 8, 8),
            (1, 192, 4, 4),
        ]


def test_one_step_of_attention_finds_clusters():
    """Digest section 3.5: 8 clusters of 200 points, guesses at a distance of 0.7."""
    draw = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(8, 64, generator=draw), dim=1).double()
    points = centres.repeat_interleave(200, 0)
    points = points + 0.5 / 8 * torch.randn(points.shape, generator=draw).double()
    guesses = F.normalize(
        centres + 0.7 * F.normalize(torch.randn(8, 64, generator=draw), dim=1).double(), dim=1
    )
    gaps = (guesses @ centres.T).diagonal()[:, None] - guesses @ centres.T
    delta = gaps[~torch.eye(8, dtype=torch.bool)].min()
    heat = (math.log(64) + math.log(8)) / delta
    found, _ = vf.ops.few_query_attention(
        guesses[None, None], points[None, None], points[None, None], scale=float(heat)
    )
    before, after = (F.cosine_similarity(x, centres).min() for x in (guesses, found[0, 0]))
    assert before < 0.9
    assert after > 0.99
