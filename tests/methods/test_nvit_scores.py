"""Saliency against autograd gates in float64 and against numbers worked by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call

from pyvitfast.models import ViTConfig
from pyvitfast.prune import NViTConfig, NViTPruner, UnitTable


def scores_of(model, data, backward, factor=1.0, **settings):
    pruner = NViTPruner(model, target=0.5, **settings)
    backward(model, data, factor)
    pruner.score()
    return {s.name: pruner.unit_scores[s.start : s.stop] for s in pruner.structures}


class Gates:
    """Gates on activations, all 1; their gradients are the signed sums that eq. 6 squares."""

    def __init__(self, model, membership):
        self.model, self.full = model, membership == "full"
        self.e = self.gate(48)
        self.blocks = [
            {"head": self.gate(4), "qk": self.gate(12), "v": self.gate(12), "mlp": self.gate(192)}
            for _ in model.blocks
        ]
        self.handles = []
        self.after(model.patch_embed, lambda y: y * self.e)
        for block, g in zip(model.blocks, self.blocks, strict=True):
            # A read of channel e by qkv or fc1, a write by proj or fc2: each passes the gate once.
            self.before(block.attn.qkv, lambda x: x * self.e)
            self.before(block.mlp.fc1, lambda x: x * self.e)
            self.after(block.attn.proj, lambda y: y * self.e)
            self.after(block.mlp.fc2, lambda y: y * self.e)
            self.after(block.mlp.fc1, lambda y, g=g: y * g["mlp"])
            self.after(block.attn.qkv, lambda y, g=g: self.qkv(y, g))
            if self.full:
                self.before(block.mlp.fc2, lambda x, g=g: x * g["mlp"])
                self.before(block.attn.proj, lambda x, g=g: self.rows(x, g["head"], g["v"]))
                self.after(block.norm1, lambda y: y * self.e)
                self.after(block.norm2, lambda y: y * self.e)
        if self.full:
            self.after(model.norm, lambda y: y * self.e)
            self.before(model.head, lambda x: x * self.e)

    def gate(self, size):
        return torch.ones(size, dtype=torch.float64, requires_grad=True)

    def after(self, module, function):
        self.handles.append(module.register_forward_hook(lambda m, x, y: function(y)))

    def before(self, module, function):
        self.handles.append(module.register_forward_pre_hook(lambda m, x: (function(x[0]),)))

    def rows(self, x, head, dim):
        return (x.view(*x.shape[:2], 4, 12) * head[:, None] * dim).flatten(2)

    def qkv(self, y, g):
        q, k, v = y.chunk(3, -1)
        one = torch.ones(12, dtype=torch.float64)
        return torch.cat(
            [
                self.rows(q, g["head"], g["qk"]),
                self.rows(k, g["head"], g["qk"] if self.full else one),
                self.rows(v, g["head"], g["v"]),
            ],
            -1,
        )

    def squares(self, data):
        gated = {}
        if self.full:
            for name in ("cls_token", "pos_embed"):
                gated[name] = getattr(self.model, name) * self.e
        F.cross_entropy(functional_call(self.model, gated, (data[0],)), data[1]).backward()
        for handle in self.handles:
            handle.remove()
        found = {"embed": self.e.grad**2}
        for i, gates in enumerate(self.blocks):
            found |= {f"blocks.{i}.{kind}": gate.grad**2 for kind, gate in gates.items()}
        return found


@pytest.mark.parametrize("membership", ["subset", "full"])
def test_scores_are_squared_gate_gradients(membership, micro, batch, backward):
    model, data = micro(double=True), batch(dtype=torch.float64)
    found = scores_of(model, data, backward, membership=membership)
    expected = Gates(model, membership).squares(data)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-20, msg=name)


def hand_model():
    """E = 2, H = 2, QK = V = 1, M = 2, one pixel in; weights times gradients are the table of the digest."""
    model = VisionTransformer(
        img_size=1, patch_size=1, in_chans=1, embed_dim=2, depth=1, num_heads=2, mlp_ratio=1, num_classes=2
    )
    table = {
        "blocks.0.attn.qkv.weight": [[1, -2], [3, 0], [0, 1], [2, -1], [2, 1], [-1, 1]],
        "blocks.0.attn.qkv.bias": [1, -1, 1, 1, 0, 2],
        "blocks.0.attn.proj.weight": [[1, 0], [-2, 3]],
        "blocks.0.attn.proj.bias": [1, 1],
        "blocks.0.mlp.fc1.weight": [[1, 1], [-3, 2]],
        "blocks.0.mlp.fc1.bias": [0, 1],
        "blocks.0.mlp.fc2.weight": [[2, -1], [0, 1]],
        "blocks.0.mlp.fc2.bias": [-1, 0],
        "patch_embed.proj.weight": [[[[1]]], [[[2]]]],
        "patch_embed.proj.bias": [0, 1],
    }
    for name, parameter in model.named_parameters():
        if name in table:
            parameter.data = torch.tensor(table[name], dtype=torch.float32)
            parameter.grad = torch.ones_like(parameter)
        else:
            parameter.grad = torch.zeros_like(parameter)
    return model


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"qk": [4], "v": [25], "head": [25, 36], "mlp": [4, 0], "embed": [64, 81]}),
        (
            {"divisors": NViTConfig.preset("nvit_repo").divisors},
            {
                "qk": [1],
                "v": [6.25],
                "head": [25 / 144, 36 / 144],
                "mlp": [4, 0],
                "embed": [64 / 144, 81 / 144],
            },
        ),
        ({"membership": "full"}, {"qk": [36], "v": [49], "head": [16, 81], "mlp": [16, 0]}),
    ],
)
def test_numbers_worked_by_hand(settings, expected):
    pruner = NViTPruner(hand_model(), target=0.9, **settings)
    pruner.score()
    for s in pruner.structures:
        if s.kind in expected:
            assert pruner.unit_scores[s.start : s.stop].tolist() == pytest.approx(expected[s.kind])


def one_unit(model, gradients):
    """All gradients 0 but those of MLP unit 3 of block 1: members 1, -2, 0.5 get ``gradients``."""
    fc1 = model.blocks[1].mlp.fc1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fc1.weight.data[3] = 0
    fc1.weight.data[3, :2] = torch.tensor([1.0, -2.0])
    fc1.bias.data[3] = 0.5
    fc1.weight.grad[3, :2] = torch.tensor(gradients[:2])
    fc1.bias.grad[3] = gradients[2]


def test_square_each_minibatch_then_average(micro):
    model = micro()
    pruner = NViTPruner(model, momentum=0.9)
    unit = pruner.table.structures["mlp", 1].start + 3
    one_unit(model, [0.1**0.5, 0.0, 0.0])
    pruner.score()
    assert float(pruner.unit_scores[unit]) == pytest.approx(0.1)
    pruner.prune_once()
    for gradients in ([0.2, 0.1, 0.4], [-0.1, 0.1, 0.0]):
        one_unit(model, gradients)
        pruner.score()
    assert float(pruner.unit_scores[unit]) == pytest.approx(0.9 * 0.1 + 0.1 * 0.065)


def test_opposite_gradients_do_not_cancel_between_minibatches(micro, batch, backward):
    model = micro()
    single = scores_of(model, batch(), backward)
    pruner = NViTPruner(model)
    for sign in (1.0, -1.0):
        backward(model, batch(), sign)
        pruner.score()
    for s in pruner.structures:
        torch.testing.assert_close(pruner.unit_scores[s.start : s.stop], single[s.name])


def test_repo_average_restarts_from_zero(micro, batch, backward):
    """After the first removal of the preset: 0.1 C, then 0.19 C for equal intervals."""
    model = micro()
    pruner = NViTPruner(
        model, divisors=None, bias_correction=False, reset_at_first_removal=True, group_sizes={"mlp": 1}
    )
    shares = []
    for _ in range(3):
        backward(model, batch())
        pruner.score()
        mean = pruner._acc.double() / pruner._counts[0]
        shares.append(float(pruner.unit_scores.sum() / mean.sum()))
        pruner.prune_once()
    assert shares == pytest.approx([1.0, 0.1, 0.19], rel=2e-2)


def test_doubled_sums_of_tied_projections(micro, batch, backward):
    """Q and K sums are equal, V and PROJ sums are equal: full membership doubles them, squares four times."""
    data = batch(dtype=torch.float64)
    subset = scores_of(micro(double=True), data, backward)
    full = scores_of(micro(double=True), data, backward, membership="full")
    for name in subset:
        if name.endswith((".qk", ".v")):
            torch.testing.assert_close(full[name], 4 * subset[name], rtol=1e-7, atol=1e-22)
        elif name.endswith(".mlp"):
            assert not torch.allclose(full[name], 4 * subset[name], rtol=1e-2)


def test_residual_writers_sum_to_zero_and_readers_equal_norms(micro, batch, backward):
    from pyvitfast import reference

    model = micro(double=True)
    backward(model, batch(dtype=torch.float64))

    def sums(*parameters):
        grads = [p.grad for p in parameters]
        return reference.saliency_rowcol([p.detach() for p in parameters], grads)

    writers = [model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token, model.pos_embed]
    for block in model.blocks:
        writers += [*block.attn.proj.parameters(), *block.mlp.fc2.parameters()]
    total = sum(float(sums(p)[: p.shape[0]].sum()) for p in writers)
    size = sum(float((p.detach() * p.grad).abs().sum()) for p in writers)
    assert abs(total) < 1e-6 * size
    for block in model.blocks:
        for layer, norm in ((block.attn.qkv, block.norm1), (block.mlp.fc1, block.norm2)):
            readers = sums(layer.weight)[layer.out_features :]
            affine = sums(norm.weight)[:48] + sums(norm.bias)[:48]
            torch.testing.assert_close(readers, affine, rtol=1e-9, atol=1e-13)


def test_score_follows_the_square_of_the_loss_scale(micro, batch, backward):
    model = micro(double=True)
    data = batch(dtype=torch.float64)
    once, thrice = scores_of(model, data, backward), scores_of(model, data, backward, factor=3.0)
    for name in once:
        torch.testing.assert_close(thrice[name], 9 * once[name])


def test_inv_scale_undoes_the_loss_scale(micro, batch, backward):
    model = micro()
    plain = scores_of(model, batch(), backward)
    pruner = NViTPruner(model)
    backward(model, batch(), 1024.0)
    pruner.score(inv_scale=1 / 1024)
    for s in pruner.structures:
        torch.testing.assert_close(pruner.unit_scores[s.start : s.stop], plain[s.name])


def test_moving_a_factor_between_query_and_key_changes_nothing(micro, batch, backward):
    data = batch(dtype=torch.float64)
    model = micro(double=True)
    before = scores_of(model, data, backward)
    with torch.no_grad():
        qkv = model.blocks[2].attn.qkv
        qkv.weight[:48] *= 5
        qkv.bias[:48] *= 5
        qkv.weight[48:96] /= 5
        qkv.bias[48:96] /= 5
    after = scores_of(model, data, backward)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-8, atol=1e-22)


def permuted(model, kind, order):
    """Reorder the units of block 1 (or all channels) in place; computes the same function."""
    block = model.blocks[1]
    with torch.no_grad():
        if kind == "mlp":
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[order])
            block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[order])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order])
        elif kind == "embed":
            for name, p in model.named_parameters():
                if (
                    name.startswith("patch_embed")
                    or "norm" in name
                    or name.endswith(("proj.bias", "fc2.bias"))
                ):
                    p.copy_(p[order])
                elif name.endswith(("token", "pos_embed", "qkv.weight", "fc1.weight", "head.weight")):
                    p.copy_(p[..., order])
                elif name.endswith(("proj.weight", "fc2.weight")):
                    p.copy_(p[order])
        else:
            parts = {"qk": (0, 1), "v": (2,), "head": (0, 1, 2)}[kind]
            grid = torch.arange(48).view(4, 12)
            rows = (grid[order] if kind == "head" else grid[:, order]).flatten()
            index = torch.arange(144)
            for t in parts:
                index[48 * t : 48 * t + 48] = rows + 48 * t
            block.attn.qkv.weight.copy_(block.attn.qkv.weight[index])
            block.attn.qkv.bias.copy_(block.attn.qkv.bias[index])
            if kind != "qk":
                block.attn.proj.weight.copy_(block.attn.proj.weight[:, rows])


@pytest.mark.parametrize("kind", ["embed", "head", "qk", "v", "mlp"])
@pytest.mark.parametrize("membership", ["subset", "full"])
def test_permuting_units_permutes_scores(kind, membership, micro, batch, backward):
    model = micro(double=True)
    data = batch(dtype=torch.float64)
    name = kind if kind == "embed" else f"blocks.1.{kind}"
    before, logits = scores_of(model, data, backward, membership=membership), model(data[0])
    order = torch.randperm(len(before[name]), generator=torch.Generator().manual_seed(1))
    permuted(model, kind, order)
    torch.testing.assert_close(model(data[0]), logits)
    after = scores_of(model, data, backward, membership=membership)
    assert not torch.allclose(after[name], before[name], rtol=1e-3)
    for other in before:
        expected = before[other][order] if other == name else before[other]
        torch.testing.assert_close(after[other], expected, rtol=1e-7, atol=1e-20)


def test_unit_of_zeros_scores_zero_and_may_go_for_free(micro, batch, backward):
    model = micro()
    with torch.no_grad():
        block = model.blocks[2].mlp
        block.fc1.weight[8:16] = 0
        block.fc1.bias[8:16] = 0
        block.fc2.weight[:, 8:16] = 0
    logits = model(batch()[0])
    pruner = NViTPruner(model, groups_per_step=1)
    backward(model, batch())
    pruner.score()
    assert pruner.unit_scores[pruner.table.structures["mlp", 2].start + 8 :][:8].tolist() == [0.0] * 8
    removed = pruner.prune_once()["removed"]
    assert [(r["structure"], r["units"], r["score"]) for r in removed] == [
        ("blocks.2.mlp", list(range(8, 16)), 0.0)
    ]
    assert torch.equal(model(batch()[0]), logits)


def test_deit_base_units_and_groups():
    with torch.device("meta"):
        model = timm.create_model("deit_base_distilled_patch16_224")
    table = UnitTable(ViTConfig.from_model(model))
    assert table.count == 39_312
    assert sum(s.size // s.group_size for s in table.structures.values()) == 2_616
    assert {s.kind: s.group_size for s in table.structures.values()} == {
        "embed": 16,
        "head": 2,
        "qk": 8,
        "v": 8,
        "mlp": 16,
    }
