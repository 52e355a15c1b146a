from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn

import pyvitfast as vf
from pyvitfast.grow import (
    METHODS,
    Layout,
    LiGOOperator,
    MangoOperator,
    Stacked,
    grow,
    report,
    stack_vit,
    unstack_vit,
)
from pyvitfast.models.architecture import config_of
from tests.methods.test_grow import F64, MORE_PARTS, difference, images, vit

# Hidden units in pieces as wide as the stream are what Mango's tensor is made of.
SQUARE = {name: parts for name, parts in MORE_PARTS.items() if name != "ratio 2.5"}
CORES = ("s_b", "s_o", "s_l", "s_i")
LABELS = torch.tensor([1, 3])


def cross_entropy(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_states_equal(got, want, tolerance=0.0):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].shape == tensor.shape, key
        assert (got[key] - tensor).abs().max() <= tolerance * tensor.abs().max(), key


def fill(operator, seed=0):
    """Random numbers in all parameters and in Mango's maps of vectors, some way from the start."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*operator.parameters()]
    tensors += [b for name, b in operator.named_buffers() if name.startswith("v_b")]
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn(t.shape, generator=generator, dtype=F64))
    return operator


@pytest.mark.parametrize("parts", SQUARE.values(), ids=SQUARE)
def test_a_ring_of_identities_returns_the_source_bit_for_bit(parts):
    source = vit(**parts)
    assert_states_equal(MangoOperator(source, vit(**parts)).weights(), source.state_dict())


@pytest.mark.parametrize("parts", SQUARE.values(), ids=SQUARE)
@pytest.mark.parametrize("ranks", [(1, 1, 1, 1), (2, 1, 3, 2)])
def test_the_start_is_the_fixed_rule(parts, ranks):
    source, target = vit(**parts), vit(64, 3, 8, **parts)
    operator = MangoOperator(source, target, ranks=ranks, noise=0)
    assert_states_equal(operator.weights(), grow(source, target, noise=0).state_dict(), 1e-12)


@pytest.mark.parametrize("depth", ["stack", "stack_top", "interleave"])
@pytest.mark.parametrize("dim", [64, 96])
def test_the_start_at_other_depths_and_widths(depth, dim):
    source, target = vit(depth=3), vit(dim, 5, dim // 8)
    operator = MangoOperator(source, target, rank=2, noise=0, depth=depth)
    assert_states_equal(operator.weights(), grow(source, target, noise=0, depth=depth).state_dict(), 1e-12)


@pytest.mark.parametrize("parts", [{}, {"qk_norm": True}], ids=["plain", "norms of q and k"])
def test_the_start_keeps_the_function_with_wider_heads_and_more_hidden_pieces(parts):
    source = vit(**parts)
    for target in (vit(64, 2, 4, **parts), vit(128, 2, 8, mlp_ratio=6, **parts)):
        grown = MangoOperator(source, target, noise=0).materialize()
        assert difference(source, grown) <= 1e-12


def test_more_hidden_pieces_are_copies_of_pieces():
    source, target = vit(), vit(64, 2, 8, mlp_ratio=6)
    pieces = torch.arange(6) % 4
    hidden = (pieces[:, None] * 32 + torch.arange(64) % 32).flatten()
    want = grow(source, target, noise=0, maps={"hidden": hidden}).state_dict()
    assert_states_equal(MangoOperator(source, target, noise=0).weights(), want, 1e-12)


def test_matrices_of_the_next_layer():
    source, target = vit(depth=3), vit(64, 4, 8)
    got = MangoOperator(source, target, init="aki", ranks=(1, 1, 2, 1), noise=0).weights()
    want, plain = grow(source, target, "aki").state_dict(), grow(source, target, noise=0).state_dict()
    for key in want:
        matrix = key.startswith("blocks.") and want[key].ndim == 2
        torch.testing.assert_close(got[key], (want if matrix else plain)[key], rtol=1e-12, atol=1e-12)


def test_any_cores_against_sums_written_out():
    parts = {"init_values": 0.1, "qk_norm": True, "reg_tokens": 1}
    source, target = vit(**parts), vit(48, 3, 6, mlp_ratio=5, **parts)
    old, new = Layout.of(source), Layout.of(target)
    op = fill(MangoOperator(source, target, ranks=(2, 1, 3, 2)))
    stacked = stack_vit(source.state_dict(), old)
    cores = (op.s_b, op.s_o, op.s_l, op.s_i)
    matrices = torch.einsum("lboi,xbcy,yopz,zlmw,wijx->mcpj", stacked.matrices, *cores)
    vectors = torch.einsum("lvo,vw,op,lm->mwp", stacked.vectors, op.v_b, op.v_o, op.v_l)
    others = {}
    for key, tensor in stacked.others.items():
        if key == "head.weight":
            others[key] = torch.einsum("co,op->cp", tensor, op.head)
        elif key == "head.bias":
            others[key] = tensor
        elif key == "patch_embed.proj.weight":
            others[key] = torch.einsum("ocyx,op->pcyx", tensor, op.embed)
        elif not key.startswith("blocks."):
            others[key] = torch.einsum("...o,op->...p", tensor, op.embed)
    for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
        small = torch.stack([stacked.others[f"blocks.{i}.attn.{name}"] for i in range(2)])
        for m, row in enumerate(torch.einsum("lt,lm->mt", small, op.v_l)):
            others[f"blocks.{m}.attn.{name}"] = row
    want = unstack_vit(Stacked(matrices, vectors, others), new)
    assert_states_equal(op.weights(), want, 1e-11)


def test_a_change_of_basis_on_a_bond_changes_no_weight():
    op = fill(MangoOperator(vit(), vit(48, 3, 6), ranks=(3, 2, 4, 2)))
    before = {key: t.detach().clone() for key, t in op.weights().items()}
    for i, name in enumerate(CORES):
        core, after = getattr(op, name), getattr(op, CORES[(i + 1) % 4])
        basis = randn(core.shape[3], core.shape[3], seed=i)
        with torch.no_grad():
            core.copy_(torch.einsum("aijb,bc->aijc", core, basis))
            after.copy_(torch.einsum("bc,cijd->bijd", torch.linalg.inv(basis), after))
    assert_states_equal(op.weights(), before, 1e-10)


def slice_gradients(op):
    cross_entropy(op(images()), LABELS).backward()
    return {
        (name, side, r): getattr(op, name).grad.select(side, r).norm().item()
        for name in CORES
        for side in (0, 3)
        for r in range(getattr(op, name).shape[side])
    }


def test_every_bond_is_alive_at_the_start_and_zeros_would_be_dead():
    op = MangoOperator(vit(), vit(64, 3, 8), ranks=(2, 3, 2, 2))
    assert all(norm > 0 for norm in slice_gradients(op).values())
    padded = MangoOperator(vit(), vit(64, 3, 8), rank=2)
    with torch.no_grad():
        for name in CORES:
            core = getattr(padded, name)
            first = core[0, :, :, 0].clone()
            core.zero_()[0, :, :, 0] = first
    found = slice_gradients(padded)
    assert all((norm == 0) == (r > 0) for (_, _, r), norm in found.items())


def test_further_bonds_start_as_copies_without_rows():
    op = MangoOperator(vit(), vit(64, 3, 8), rank=3, noise=0)
    for name in CORES:
        core = getattr(op, name)
        for r in (1, 2):
            assert torch.equal(core[r, :, :, r], core[0, :, :, 0] * (name != "s_o"))


def test_noise_stands_on_new_units_at_rank_one_and_is_small():
    source, target = vit(), vit(64, 3, 8)
    exact, noisy, again, other = (
        MangoOperator(source, target, noise=n, seed=s) for n, s in ((0, 0), (0.5, 0), (0.5, 0), (0.5, 1))
    )
    for name in ("s_o", "s_i"):
        change = (getattr(noisy, name) - getattr(exact, name))[0, :, :, 0]
        assert not change[:, :32].any()
        assert change[:, 32:].std().item() == pytest.approx(0.5 / math.sqrt(32), rel=0.1)
        assert torch.equal(getattr(noisy, name), getattr(again, name))
        assert not torch.equal(getattr(noisy, name), getattr(other, name))
    for name in ("s_b", "s_l", "v_o", "v_l"):
        assert torch.equal(getattr(noisy, name), getattr(exact, name))


def test_parameter_counts_of_tiny_to_small():
    small = vit(192, 12, 3).float()
    for rank in (1, 2):
        op = MangoOperator(small, vit(384, 12, 6), rank=rank)
        assert sum(getattr(op, name).numel() for name in CORES) == 147_744 * rank**2
    vectors = 192 * 384
    assert sum(p.numel() for p in op.parameters()) == 147_744 * 4 + 3 * vectors + 144
    mixing = MangoOperator(vit(), vit(64, 2, 8), mix_vectors=True)
    assert mixing.v_b.requires_grad and mixing.v_b.shape == (13, 13)


def test_ligo_by_hand():
    parts = {"mlp_ratio": 1}
    source = vit(2, 2, 2, **parts)
    op = LiGOOperator(source, vit(3, 2, 3, **parts), style="repo")
    with torch.no_grad():
        for layer, rows, bias in ((0, [[1, 2], [3, 4]], [1, 2]), (1, [[5, 6], [7, 8]], [3, 6])):
            block = source.blocks[layer]
            for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                linear.weight.copy_(torch.tensor(rows))
                linear.bias.copy_(torch.tensor(bias))
            block.attn.qkv.weight.copy_(torch.tensor(rows).repeat(3, 1))
            block.attn.qkv.bias.copy_(torch.tensor(bias).repeat(3))
        fresh = LiGOOperator(source, vit(3, 2, 3, **parts), style="repo")
        for factor in fresh.factors.values():
            factor.fill_(0.5)
        for name, w in fresh.coefficients.items():
            w.copy_(torch.tensor([0.5, 0.5] if "bias" in name else [0.75, 0.25]))
    # 0.75 W0 + 0.25 W1 = W0 + 1.
    got = fresh.weights()
    want = torch.tensor([[2, 3, 2.5], [4, 5, 4.5], [3, 4, 3.5]], dtype=F64)
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        assert torch.equal(got[f"blocks.0.{name}.weight"], want)
        assert torch.equal(got[f"blocks.1.{name}.bias"], torch.tensor([2, 4, 3], dtype=F64))
    assert torch.equal(got["blocks.1.attn.qkv.weight"], want.repeat(3, 1))
    assert torch.equal(got["blocks.0.attn.qkv.bias"], torch.tensor([2, 4, 3], dtype=F64).repeat(3))
    assert op.factors["q"].shape == (2, 1, 2)


def naive_ligo(op, source, new):
    """LiGO's sums, matrix by matrix."""
    state, old = source.state_dict(), Layout.of(source)
    repo = op.style == "repo"

    def factor(name, layer):
        f = op.factors[name]
        f = f[layer] if f.ndim == 3 else f
        return torch.cat([torch.eye(f.shape[1], dtype=F64), f]) if repo else f

    def mixed(name, out, into, tensors, m):
        w = op.coefficients[name.replace(".", "_")][m]
        total = 0
        for layer, tensor in enumerate(tensors):
            place = m if repo else layer
            wide = factor(out, place) @ tensor
            total = total + w[layer] * (wide @ factor(into, place).t() if into else wide)
        return total

    names = {key.split(".", 2)[2] for key in state if key.startswith("blocks.")}
    ends = {"attn.proj": ("embed", "v"), "mlp.fc1": ("hidden", "embed"), "mlp.fc2": ("embed", "hidden")}
    want = {}
    for m in range(new.depth):
        for name in names:
            tensors = [state[f"blocks.{i}.{name}"] for i in range(old.depth)]
            layer, _, kind = name.rpartition(".")
            if layer == "attn.qkv":
                into = "embed" if kind == "weight" else None
                grown = torch.cat(
                    [
                        mixed(f"attn.{p}.{kind}", p, into, [t.chunk(3)[i] for t in tensors], m)
                        for i, p in enumerate("qkv")
                    ]
                )
            elif layer in ("attn.q_norm", "attn.k_norm"):
                w = op.coefficients[name.replace(".", "_")][m]
                grown = sum(w[i] * t for i, t in enumerate(tensors))
            else:
                out, into = ends.get(layer, ("embed", None))
                grown = mixed(name, out, into if kind == "weight" else None, tensors, m)
            want[f"blocks.{m}.{name}"] = grown
    embed = factor("embed", 0)
    for key, tensor in state.items():
        if key == "head.bias":
            want[key] = tensor
        elif key == "head.weight":
            want[key] = tensor @ embed.t()
        elif key == "patch_embed.proj.weight":
            want[key] = torch.einsum("po,ocyx->pcyx", embed, tensor)
        elif not key.startswith("blocks."):
            want[key] = tensor @ embed.t()
    return want


@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"style": "repo"}])
def test_ligo_against_loops(options):
    parts = {"init_values": 0.1, "qk_norm": True, "reg_tokens": 1}
    source, target = vit(**parts, mlp_ratio=2.5), vit(48, 3, 6, mlp_ratio=3, **parts)
    op = fill(LiGOOperator(source, target, **options))
    assert_states_equal(op.weights(), naive_ligo(op, source, Layout.of(target)), 1e-11)


@pytest.mark.parametrize("parts", MORE_PARTS.values(), ids=MORE_PARTS)
def test_ligo_starts_near_the_function(parts):
    """All but for the epsilon of LayerNorm, here 1e-6 beside variances near 1."""
    source = vit(**parts)
    for heads, per_layer in ((8, False), (4, True)):
        op = LiGOOperator(source, vit(64, 2, heads, **parts), noise=0, per_layer=per_layer)
        assert difference(source, op.materialize()) <= 1e-5


def test_released_start_of_ligo():
    op = LiGOOperator(vit(), vit(64, 5, 8), style="repo")
    shapes = {name: tuple(f.shape) for name, f in op.factors.items()}
    assert shapes == {
        "embed": (32, 32),
        "q": (5, 32, 32),
        "k": (5, 32, 32),
        "v": (5, 32, 32),
        "hidden": (5, 128, 128),
    }
    for f in op.factors.values():
        assert (f >= 0).all()
        torch.testing.assert_close(f.sum(-1), torch.ones(f.shape[:-1], dtype=F64))
    for w in op.coefficients.values():
        torch.testing.assert_close(w.sum(-1), torch.ones(5, dtype=F64))
        assert w.argmax(-1).tolist() == [0, 1, 0, 1, 0]
        assert w.max() >= 1 / 1.03


def test_ligo_of_one_factor_is_a_ring_of_rank_one():
    source, target = vit(), vit(48, 3, 6)
    ring, ligo = MangoOperator(source, target), LiGOOperator(source, target)
    width, depth = randn(48, 32, seed=1), randn(3, 2, seed=2)
    with torch.no_grad():
        for name, factor in ligo.factors.items():
            factor.copy_(torch.block_diag(*[width] * 4) if name == "hidden" else width)
        for w in ligo.coefficients.values():
            w.copy_(depth)
        ring.s_b[0, :, :, 0] = torch.eye(12)
        ring.s_o[0, :, :, 0] = ring.s_i[0, :, :, 0] = width.t()
        ring.s_l[0, :, :, 0] = depth.t()
        ring.v_l.copy_(depth.t())
        for p in (ring.v_o, ring.embed, ring.head):
            p.copy_(width.t())
    assert_states_equal(ring.weights(), ligo.weights(), 1e-12)


KINDS = [
    (MangoOperator, {"rank": 2, "mix_vectors": True}),
    (LiGOOperator, {}),
    (LiGOOperator, {"style": "repo"}),
]


def problem(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 16, 16, generator=generator, dtype=F64)
    return x, torch.randint(5, (count,), generator=generator)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_training_lowers_the_loss_and_leaves_the_source(kind, options):
    source, target = vit(), vit(64, 3, 8, drop_path_rate=0.5, proj_drop_rate=0.5)
    before = [copy.deepcopy(m.state_dict()) for m in (source, target)]
    op = kind(source, target, **options)
    held = {name: b.clone() for name, b in op.named_buffers()}
    x, y = problem()
    losses = op.fit([(x[:8], y[:8]), (x[8:], y[8:])], cross_entropy, steps=20)
    assert len(losses) == 20
    assert sum(losses[-2:]) <= 0.3 * sum(losses[:2])
    for model, state in zip((source, target), before, strict=True):
        assert_states_equal(model.state_dict(), state)
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, held[name]) for name, b in op.named_buffers())
    assert not op.training
    again = kind(source, target, **options)
    assert again.fit([(x[:8], y[:8]), (x[8:], y[8:])], cross_entropy, steps=20) == losses
    assert difference(op, op.materialize()) <= 1e-12


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_training_is_adamw_through_the_weights(kind, options):
    """Against autograd through the whole, with the gradient of one large batch."""
    source, target = vit(), vit(48, 3, 6)
    ours, plain = kind(source, target, **options), kind(source, target, **options)
    x, y = problem(12)
    losses = ours.fit(
        [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)],
        cross_entropy,
        steps=4,
        grad_accum=3,
        lr=1e-2,
        clip=0.5,
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    for step in range(4):
        optimizer.zero_grad()
        loss = cross_entropy(plain(x), y)
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-10)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # Adam divides by the gradient's size, which makes rounding of tiny gradients visible.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_one_evaluation_a_step(monkeypatch):
    op, count = MangoOperator(vit(), vit(48, 3, 6)), []
    evaluate = op._evaluate
    monkeypatch.setattr(op, "_evaluate", lambda: count.append(1) or evaluate())
    op.fit([problem(4)], cross_entropy, steps=3, grad_accum=4)
    assert len(count) == 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_training_with_the_last_good_cores(where):
    op = MangoOperator(vit(), vit(48, 3, 6))
    seen, calls = [], 0

    def loss_fn(outputs, labels):
        nonlocal calls
        seen.append([p.detach().clone() for p in op.parameters()])
        calls += 1
        loss = cross_entropy(outputs, labels)
        if calls < 3:
            return loss
        return loss * math.nan if where == "loss" else loss + (outputs * 0).abs().sqrt().sum()

    with pytest.raises(
        FloatingPointError, match=r"must stay finite, got loss .* in step 3 of 10.*Lower `lr`"
    ):
        op.fit([problem(4)], loss_fn, steps=10)
    assert len(seen) == 3
    assert all(torch.equal(p, q) for p, q in zip(op.parameters(), seen[1], strict=True))
    assert not torch.equal(next(op.parameters()), seen[2][0])
    assert all(p.grad is None for p in op.parameters())


def test_default_learning_rates():
    from pyvitfast.grow.operators import _learning_rate

    assert [_learning_rate(d) for d in (24, 64, 192, 768)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert 1e-4 < _learning_rate(128) < 1e-3


@pytest.mark.parametrize("kind", [MangoOperator, LiGOOperator])
@pytest.mark.parametrize("parts", [{}, {"reg_tokens": 1, "init_values": 0.1}], ids=["plain", "more parts"])
def test_grown_model_is_an_ordinary_one(kind, parts, tmp_path):
    source, target = vit(**parts).float().train(), vit(64, 3, 8, **parts)
    op = kind(source, target)
    grown = op.materialize()
    weights = op.weights()
    assert_states_equal(grown.state_dict(), weights)
    assert type(grown) is type(target)
    assert grown.training
    assert all(p.requires_grad and p.is_leaf for p in grown.parameters())
    places = {t.untyped_storage().data_ptr() for m in (source, target, op) for t in m.state_dict().values()}
    places |= {t.untyped_storage().data_ptr() for t in weights.values()}
    assert not places & {p.untyped_storage().data_ptr() for p in grown.parameters()}
    found = report(grown)
    assert (found.method, found.width, found.depth) == (op.method, op.method, "stack")
    assert not found.function_preserving
    assert found.params_after == sum(p.numel() for p in grown.parameters())
    grown.eval()
    vf.save(grown, tmp_path / "grown.safetensors")
    x = images(torch.float32)
    assert torch.equal(vf.load(tmp_path / "grown.safetensors")(x), grown(x))


def test_moments_start_fresh():
    source = vit()
    grown = grow(source, vit(64, 2, 8), "mango", noise=0)
    optimizer = torch.optim.AdamW(source.parameters())
    cross_entropy(source(images()), LABELS).backward()
    optimizer.step()
    new = torch.optim.AdamW(grown.parameters())
    assert vf.grow.grow_optimizer_state(optimizer, source, grown, new) == ()


def test_dtypes_and_modes():
    source, target = vit().half().train(), vit(64, 3, 8)
    op = MangoOperator(source, target)
    assert {p.dtype for p in op.parameters()} == {torch.float32}
    assert op.training
    grown = op.materialize()
    assert {p.dtype for p in grown.parameters()} == {torch.float16}
    assert grown.training
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in op.weights().values()} == {torch.float32}


@pytest.mark.parametrize("kind", [MangoOperator, LiGOOperator])
def test_distilled_trains_both_heads(kind):
    source, target = (vit(d, 2, d // 8, kind=VisionTransformerDistilled) for d in (32, 64))
    target.set_distilled_training(True)
    op = kind(source, target)

    def loss_fn(outputs, labels):
        one, other = outputs
        return cross_entropy(one, labels) + cross_entropy(other, (labels + 1) % 5)

    losses = op.fit([problem(8)], loss_fn, steps=10)
    assert losses[-1] < 0.7 * losses[0]
    assert {"head.weight", "head_dist.weight"} <= op.weights().keys()
    grown = op.materialize().train()
    for got, want in zip(grown(images()), op.train()(images()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [MangoOperator, LiGOOperator])
def test_classifiers_of_the_target_train_along(kind):
    source, target = vit(), vit(64, 3, 8, num_classes=7)
    with pytest.raises(ValueError, match='pass head="target"'):
        kind(source, target)
    op = kind(source, target, head="target")
    assert torch.equal(op.weights()["head.weight"], target.head.weight)
    op.fit([problem(8)], cross_entropy, steps=2)
    grown = op.materialize()
    assert not torch.equal(grown.head.weight, target.head.weight)
    assert report(grown).kept == ("head.weight", "head.bias")


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_state_goes_from_one_operator_to_another(kind, options):
    source, target = vit(), vit(64, 3, 8)
    op = kind(source, target, **options)
    op.fit([problem(4)], cross_entropy, steps=2)
    other = kind(vit(), target, **options, seed=3)
    other.load_state_dict(op.state_dict())
    assert_states_equal(other.weights(), op.weights())
    assert_states_equal(copy.deepcopy(op).weights(), op.weights())
    assert op.fit([problem(4)], cross_entropy, steps=2) == other.fit([problem(4)], cross_entropy, steps=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind(vit(), vit(96, 3, 12), **options).load_state_dict(op.state_dict())


def test_another_image_size():
    source, target = vit(), vit(64, 2, 8, img_size=24)
    for op in (MangoOperator(source, target, noise=0), LiGOOperator(source, target)):
        assert report(op.materialize()).resized == ("pos_embed",)
    want = grow(source, target, noise=0).state_dict()
    assert_states_equal(MangoOperator(source, target, noise=0).weights(), want, 1e-12)


def test_files_and_configurations(tmp_path):
    source, target = vit().float(), vit(64, 3, 8)
    vf.save(source, tmp_path / "small.safetensors")
    vf.save(target.float(), tmp_path / "big.safetensors")
    want = MangoOperator(source, target).weights()
    got = MangoOperator(tmp_path / "small.safetensors", tmp_path / "big.safetensors").weights()
    assert_states_equal(got, want)
    assert_states_equal(MangoOperator(source, config_of(target)).weights(), want)
    assert_states_equal(
        grow(source, config_of(target), noise=0).state_dict(), grow(source, target, noise=0).state_dict()
    )


def test_grow_by_a_learned_operator():
    source, target = vit(), vit(64, 3, 8)
    assert {"mango", "ligo"} <= METHODS.keys()
    start = grow(source, target, "mango", rank=2, noise=0, depth="interleave")
    assert_states_equal(
        start.state_dict(), grow(source, target, depth="interleave", noise=0).state_dict(), 1e-12
    )
    for method, kind in (("mango", MangoOperator), ("ligo", LiGOOperator)):
        data = {"loader": [problem(4)], "loss_fn": cross_entropy}
        trained = grow(source, target, method, **data, steps=3, lr=1e-2, seed=2)
        op = kind(source, target, seed=2)
        op.fit(*data.values(), steps=3, lr=1e-2)
        assert_states_equal(trained.state_dict(), op.weights())
    assert report(grow(source, target, "ligo", style="repo")).noise == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"method": "fpi", "loader": []},
            "`loader` must be left out with method 'fpi', which is a fixed rule",
        ),
        ({"method": "aki", "steps": 3}, "`steps` must be left out with method 'aki'"),
        ({"method": "stack", "rank": 2}, "`rank` must be left out with method 'stack'"),
        (
            {"method": "mango", "width": "fpi"},
            "`width` must be left out with method 'mango', which is learned",
        ),
        ({"method": "ligo", "neuron_wise": True}, "`neuron_wise` must be left out with method 'ligo'"),
        ({"method": "mango", "maps": {"embed": torch.arange(64) % 32}}, "`maps` must be left out"),
        ({"method": "mango", "style": "repo"}, "options of method 'mango' must be among .*rank.*got style"),
        ({"method": "mango", "steps": 3}, "`loader` and `loss_fn` must both be given.*'steps': 3"),
        ({"method": "ligo", "loss_fn": cross_entropy}, "must both be given.*no loader"),
        ({"method": "mango", "rank": 0}, "`rank` must be a whole number of at least 1, got 0"),
        ({"method": "mango", "ranks": (1, 2)}, "`ranks` must be four whole numbers"),
        ({"method": "mango", "rank": 2, "ranks": (1, 1, 1, 1)}, "`rank` must be left out with `ranks`"),
        ({"method": "mango", "init": "zero"}, "`init` must be 'fpi' or 'aki', got 'zero'"),
        ({"method": "mango", "init": "aki"}, "aki needs a third bond of at least 2"),
        (
            {"method": "mango", "depth": "identity"},
            "`depth` must be stack, stack_top or interleave, got 'ident",
        ),
        ({"method": "ligo", "depth": "up"}, "`depth` must be stack.*got 'up'"),
        ({"method": "mango", "noise": -1.0}, "`noise` must be a number of at least 0, got -1"),
        ({"method": "mango", "head": "new"}, "`head` must be 'grow' or 'target'"),
        ({"method": "ligo", "style": "code"}, "`style` must be 'paper' or 'repo', got 'code'"),
        ({"method": "ligo", "style": "repo", "noise": 0.1}, "`noise` must be left out with style 'repo'"),
        ({"method": "ligo", "style": "repo", "per_layer": True}, "`per_layer` must be left out with style"),
    ],
)
def test_illegal_options_name_themselves(options, match):
    with pytest.raises(ValueError, match=match):
        grow(vit(), vit(64, 3, 8), **options)


def test_pairs_that_do_not_fit():
    with pytest.raises(ValueError, match="depth of blocks must be no smaller, got 2 -> 1"):
        LiGOOperator(vit(), vit(64, 1, 8))
    with pytest.raises(ValueError, match=r"hidden width must be a multiple of the width 32.*got 80"):
        MangoOperator(vit(mlp_ratio=2.5), vit(64, 2, 8, mlp_ratio=2.5))
    with pytest.raises(ValueError, match="MLP ratio must be no smaller, got 4 -> 2"):
        MangoOperator(vit(), vit(64, 2, 8, mlp_ratio=2))
    extra = vit()
    extra.blocks[1].adapter = nn.Linear(2, 2)
    with pytest.raises(
        NotImplementedError, match=r"blocks.1.adapter.bias of VisionTransformer is not a part"
    ):
        LiGOOperator(extra, vit(64, 2, 8))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (([], cross_entropy), {}, ValueError, "`loader` must give batches .images, labels. each time"),
        ((iter([problem(2)]), cross_entropy), {"steps": 2}, ValueError, "rather than an iterator"),
        (([problem(2)[0]], cross_entropy), {}, ValueError, "`loader` must give pairs .*got Tensor"),
        (([(1, 2, 3)], cross_entropy), {}, ValueError, "pairs .*got 3 parts"),
        (([problem(2)], lambda a, b: 1.0), {}, TypeError, "`loss_fn` must return a tensor, got float"),
        (([problem(2)], lambda a, b: a), {}, ValueError, r"must return a scalar, got shape \(2, 5\)"),
        (
            ([problem(2)], cross_entropy),
            {"steps": 0},
            ValueError,
            "`steps` must be a whole number of at least 1",
        ),
        (
            ([problem(2)], cross_entropy),
            {"grad_accum": 1.5},
            ValueError,
            "`grad_accum` must be a whole number",
        ),
        (([problem(2)], cross_entropy), {"lr": 0.0}, ValueError, "`lr` must be a number above 0"),
        (([problem(2)], cross_entropy), {"clip": math.inf}, ValueError, "`clip` must be a number above 0"),
    ],
)
def test_illegal_training_names_itself(arguments, options, error, match):
    with pytest.raises(error, match=match):
        MangoOperator(vit(), vit(48, 2, 6)).fit(*arguments, **options)
