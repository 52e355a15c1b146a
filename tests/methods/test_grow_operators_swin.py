from __future__ import annotations

import copy

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

import pyvitfast as vf
from pyvitfast.grow import LiGOOperator, MangoOperator, grow, report
from pyvitfast.grow.operators import _learning_rate
from tests.methods.test_grow import F64, difference, images, randomize, swin, vit
from tests.methods.test_grow_operators import LABELS, assert_states_equal, cross_entropy, fill

WIDE = {"dim": 32, "heads": (4, 8)}
TABLE = "attn.relative_position_bias_table"
KINDS = [
    (MangoOperator, {"rank": 2, "mix_vectors": True}),
    (LiGOOperator, {}),
    (LiGOOperator, {"per_layer": True}),
    (LiGOOperator, {"style": "repo"}),
]


def batch(count=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 32, 32, generator=generator, dtype=F64)
    return x, torch.randint(5, (count,), generator=generator)


@pytest.mark.parametrize("parts", [{}, {"qkv_bias": False}, {"num_classes": 0}])
def test_a_ring_of_identities_returns_the_source_bit_for_bit(parts):
    source = swin(**parts)
    assert_states_equal(MangoOperator(source, swin(**parts)).weights(), source.state_dict())


@pytest.mark.parametrize(
    ("target", "depth"),
    [
        (WIDE, "stack"),
        ({"dim": 48, "heads": (6, 12)}, "stack"),
        ({**WIDE, "qkv_bias": False}, "stack"),
        ({**WIDE, "img_size": 64}, "stack"),
        ({**WIDE, "depths": (2, 6)}, "stack"),
        ({**WIDE, "depths": (4, 5)}, "stack_top"),
        ({"depths": (4, 6)}, "interleave"),
        ({**WIDE, "depths": (3, 4)}, "interleave"),
    ],
)
@pytest.mark.parametrize("ranks", [(1, 1, 1, 1), (2, 1, 3, 2)])
def test_the_start_is_the_fixed_rule(target, depth, ranks):
    source = swin(depths=(2, 4), **{key: target[key] for key in ("qkv_bias",) if key in target})
    target = swin(**{"depths": (2, 4), **target})
    operator = MangoOperator(source, target, ranks=ranks, noise=0, depth=depth)
    assert_states_equal(operator.weights(), grow(source, target, noise=0, depth=depth).state_dict(), 1e-12)


def test_pairs_of_windows_stay_pairs_where_depths_are_even():
    operator = MangoOperator(swin(depths=(2, 4)), swin(depths=(4, 8)), depth="interleave", noise=0)
    chosen = [getattr(operator, f"s_l_{s}")[0, :, :, 0].argmax(0).tolist() for s in (0, 1)]
    assert chosen == [[0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 2, 3]]


@pytest.mark.parametrize("target", [WIDE, {"dim": 32}, {"dim": 48, "heads": (2, 12), "mlp_ratio": 6}])
def test_the_start_keeps_the_function(target):
    """Wider heads and more hidden pieces too."""
    source = swin()
    operator = MangoOperator(source, swin(**target), noise=0)
    assert difference(source, operator.materialize(), 32) <= 1e-12
    assert difference(operator, operator.materialize(), 32) <= 1e-14
    for per_layer in (False, True) if "mlp_ratio" not in target else ():
        # LiGO's stream is smaller, beside an unchanged epsilon of LayerNorm.
        ligo = LiGOOperator(source, swin(**target), noise=0, per_layer=per_layer)
        assert difference(source, ligo.materialize(), 32) <= 1e-5


def test_matrices_of_the_next_layer():
    source, target = swin(depths=(2, 3)), swin(depths=(2, 4), **WIDE)
    got = MangoOperator(source, target, init="aki", ranks=(1, 1, 2, 1), noise=0).weights()
    want, plain = grow(source, target, "aki").state_dict(), grow(source, target, noise=0).state_dict()
    for key in want:
        matrix = ".blocks." in key and key.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight"))
        torch.testing.assert_close(got[key], (want if matrix else plain)[key], rtol=1e-12, atol=1e-12)


def merged(width):
    """The map of four tokens side by side."""
    return torch.block_diag(*[width] * 4)


def outside(source, embeds, heads):
    """What is outside the blocks by maps [D1, D2] of two stages."""
    state = source.state_dict()
    (first, last), (reads, top) = embeds, heads
    down = "layers.1.downsample"
    return {
        "patch_embed.proj.weight": torch.einsum("ocyx,op->pcyx", state["patch_embed.proj.weight"], first),
        **{key: state[key] @ first for key in ("patch_embed.proj.bias", *norm("patch_embed.norm"))},
        **{key: state[key] @ merged(first) for key in norm(f"{down}.norm")},
        f"{down}.reduction.weight": last.t() @ state[f"{down}.reduction.weight"] @ merged(reads),
        **{key: state[key] @ last for key in norm("norm")},
        "head.fc.weight": state["head.fc.weight"] @ top,
        "head.fc.bias": state["head.fc.bias"],
    }


def norm(name):
    return f"{name}.weight", f"{name}.bias"


def test_any_cores_against_sums_written_out():
    source, target = swin(depths=(2, 3)), swin(48, (3, 4), (6, 4), mlp_ratio=5)
    op = fill(MangoOperator(source, target, ranks=(2, 1, 3, 2)))
    state = source.state_dict()
    want = outside(source, *([getattr(op, f"{name}_{s}") for s in (0, 1)] for name in ("embed", "head")))
    for s, (old, deep) in enumerate(zip((2, 3), (3, 4), strict=True)):
        d1, d2 = 16 * 2**s, 48 * 2**s
        cores = {
            n: getattr(op, f"{n}_{s}") for n in ("s_b", "s_o", "s_l", "s_i", "v_b", "v_o", "v_l", "heads")
        }

        def small(name, start=f"layers.{s}.blocks", layers=old):
            return torch.stack([state[f"{start}.{i}.{name}"] for i in range(layers)])

        fc2 = small("mlp.fc2.weight").view(old, d1, 4, d1).transpose(1, 2)
        parts = [small(f"{n}.weight").view(old, -1, d1, d1) for n in ("attn.qkv", "attn.proj", "mlp.fc1")]
        slots = torch.cat([*parts, fc2], 1)
        ring = [cores[n] for n in ("s_b", "s_o", "s_l", "s_i")]
        big = torch.einsum("lboi,xbcy,yopz,zlmw,wijx->mcpj", slots, *ring)
        names = [
            "attn.qkv.bias",
            "attn.proj.bias",
            "mlp.fc1.bias",
            "mlp.fc2.bias",
            *norm("norm1"),
            *norm("norm2"),
        ]
        rows = torch.cat([small(n).view(old, -1, d1) for n in names], 1)
        rows = torch.einsum("lvo,vw,op,lm->mwp", rows, cores["v_b"], cores["v_o"], cores["v_l"])
        tables = torch.einsum("lph,hg,lm->mpg", small(TABLE), cores["heads"], cores["v_l"])
        for m in range(deep):
            block = f"layers.{s}.blocks.{m}"
            want |= {
                f"{block}.attn.qkv.weight": big[m, :3].reshape(-1, d2),
                f"{block}.attn.proj.weight": big[m, 3],
                f"{block}.mlp.fc1.weight": big[m, 4:9].reshape(-1, d2),
                f"{block}.mlp.fc2.weight": torch.cat([*big[m, 9:]], 1),
                f"{block}.{TABLE}": tables[m],
            }
            pieces = rows[m].split([3, 1, 5, 1, 1, 1, 1, 1])
            want |= {f"{block}.{n}": t.reshape(-1) for n, t in zip(names, pieces, strict=True)}
    assert_states_equal(op.weights(), want, 1e-11)


@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"style": "repo"}])
def test_ligo_against_loops(options):
    source, target = swin(depths=(2, 3), mlp_ratio=2.5), swin(48, (3, 4), (6, 4), mlp_ratio=3)
    op, state, repo = fill(LiGOOperator(source, target, **options)), source.state_dict(), "style" in options

    def factor(name, layer, s):
        f = op.factors[f"{name}_{s}"]
        f = f[layer] if f.ndim == 3 else f
        return torch.cat([torch.eye(f.shape[1], dtype=F64), f]) if repo else f

    embeds = [factor("embed", 0, s).t() for s in (0, 1)]
    want = outside(source, embeds, embeds)
    # Name of a part, factor of its rows, factor of its columns.
    parts = [(f"attn.{p}.weight", p, "embed") for p in "qkv"] + [(f"attn.{p}.bias", p, None) for p in "qkv"]
    parts += [("attn.proj.weight", "embed", "v"), ("attn.proj.bias", "embed", None)]
    parts += [("mlp.fc1.weight", "hidden", "embed"), ("mlp.fc1.bias", "hidden", None)]
    parts += [("mlp.fc2.weight", "embed", "hidden"), ("mlp.fc2.bias", "embed", None)]
    parts += [(name, "embed", None) for n in ("norm1", "norm2") for name in norm(n)]
    parts += [(TABLE, "heads", None)]
    for s, (old, deep) in enumerate(zip((2, 3), (3, 4), strict=True)):
        for m in range(deep):
            block, made = f"layers.{s}.blocks.{m}", {}
            for name, out, into in parts:
                total = 0
                for layer in range(old):
                    piece = name.split(".")[1]
                    if piece in "qkv":
                        whole = state[f"layers.{s}.blocks.{layer}.{name.replace(f'.{piece}.', '.qkv.')}"]
                        small = whole.chunk(3)["qkv".index(piece)]
                    else:
                        small = state[f"layers.{s}.blocks.{layer}.{name}"]
                    small = small.t() if name == TABLE else small
                    place = m if repo else layer
                    wide = factor(out, place, s) @ small
                    wide = wide @ factor(into, place, s).t() if into else wide
                    total = total + op.coefficients[f"{name.replace('.', '_')}_{s}"][m, layer] * wide
                made[name] = total.t() if name == TABLE else total
            for kind in ("weight", "bias"):
                made[f"attn.qkv.{kind}"] = torch.cat([made.pop(f"attn.{p}.{kind}") for p in "qkv"])
            want |= {f"{block}.{name}": t for name, t in made.items()}
    assert_states_equal(op.weights(), want, 1e-11)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_training_moves_every_map_and_leaves_the_source(kind, options, tmp_path):
    source, target = swin(), swin(depths=(2, 3), **WIDE)
    before = [copy.deepcopy(m.state_dict()) for m in (source, target)]
    op = kind(source, target, **options)
    start = {name: p.detach().clone() for name, p in op.named_parameters()}
    losses = op.fit([batch()], cross_entropy, steps=20, lr=1e-3)
    assert sum(losses[-2:]) <= 0.5 * sum(losses[:2])
    assert all(not torch.equal(p, start[name]) for name, p in op.named_parameters())
    for model, state in zip((source, target), before, strict=True):
        assert_states_equal(model.state_dict(), state)
    other = kind(source, target, **options, seed=3)
    other.load_state_dict(op.state_dict())
    assert_states_equal(other.weights(), op.weights())
    grown = op.materialize()
    assert type(grown) is SwinTransformer
    assert difference(op, grown, 32) <= 1e-12
    for (name, got), (_, want) in zip(grown.named_buffers(), target.named_buffers(), strict=True):
        assert torch.equal(got, want), name
    found = report(grown)
    assert (found.method, found.function_preserving) == (op.method, False)
    vf.save(grown, tmp_path / "grown.safetensors")
    x = images(size=32)
    assert torch.equal(vf.load(tmp_path / "grown.safetensors")(x), grown(x))
    # The outcome is a source like any other.
    assert difference(grown, grow(grown, swin(64, (2, 3), (8, 16)), noise=0), 32) <= 1e-12


def test_every_bond_is_alive_at_the_start():
    op = MangoOperator(swin(), swin(**WIDE), ranks=(2, 3, 2, 2))
    cross_entropy(op(images(size=32)), LABELS).backward()
    for name, p in op.named_parameters():
        assert p.grad.abs().max() > 0, name
        if name.startswith("s_"):
            assert all(p.grad.select(side, r).any() for side in (0, 3) for r in range(p.shape[side]))


def test_single_and_half_precision_and_methods_by_name():
    source, target = swin().half(), swin(**WIDE)
    for method in ("mango", "ligo"):
        assert {t.dtype for t in grow(source, target, method).state_dict().values()} == {torch.float16}
    op = MangoOperator(swin().float(), target)
    assert {p.dtype for p in op.parameters()} == {torch.float32}
    assert op.fit([(batch()[0].float(), batch()[1])], cross_entropy, steps=1)
    data = {"loader": [batch()], "loss_fn": cross_entropy, "steps": 2}
    op = MangoOperator(swin(), target, seed=2)
    op.fit(*list(data.values())[:2], steps=2)
    assert_states_equal(grow(swin(), target, "mango", **data, seed=2).state_dict(), op.weights())


def test_default_learning_rate_is_that_of_the_last_stage(monkeypatch):
    rates, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **k: rates.append(lr) or adamw(p, lr=lr, **k))
    LiGOOperator(swin(), swin(48, heads=(6, 12))).fit([batch()], cross_entropy, steps=1)
    assert rates == [_learning_rate(96)]


def test_classifier_of_the_target_trains_along():
    target = swin(num_classes=7, **WIDE)
    op = LiGOOperator(swin(), target, head="target")
    assert torch.equal(op.weights()["head.fc.weight"], target.head.fc.weight)
    op.fit([batch()], cross_entropy, steps=1)
    assert not torch.equal(op.materialize().head.fc.weight, target.head.fc.weight)


def test_pairs_that_do_not_fit():
    def narrow(dim, heads):
        arguments = {"img_size": 32, "window_size": 4, "num_classes": 5, "depths": (2, 2), "head_dim": 4}
        return randomize(SwinTransformer(embed_dim=dim, num_heads=heads, **arguments))

    pair = narrow(16, (2, 4)), narrow(32, (4, 8))
    with pytest.raises(ValueError, match=r"in layers.0.blocks must be as wide as .* 16, .* got 2 heads of"):
        MangoOperator(*pair)
    assert difference(pair[0], LiGOOperator(*pair, noise=0).materialize(), 32) <= 1e-5
    with pytest.raises(ValueError, match="family must be the source's, got ViT -> Swin"):
        MangoOperator(vit(), swin())
    with pytest.raises(ValueError, match=r"hidden width must be a multiple of the width 16.*got 40"):
        MangoOperator(swin(mlp_ratio=2.5), swin(32, heads=(4, 8), mlp_ratio=2.5))
    with pytest.raises(ValueError, match=r"depth of layers.1.blocks must be no smaller, got 2 -> 1"):
        LiGOOperator(swin(), swin(depths=(2, 1)))
