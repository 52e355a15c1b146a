"""Compaction: the smaller model and its optimizer against the masked ones."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from pyvitfast.models import PrunedVisionTransformerDistilled, ViTConfig
from pyvitfast.prune import NViTPruner
from tests.methods.conftest import pruned

NO_EMBED = {"embed": 48}  # one group only, which is never removed


VARIANTS = {
    "plain": {},
    "distilled": {"distilled": True},
    "layer scale": {"init_values": 0.5},
    "registers, average pool": {"reg_tokens": 2, "global_pool": "avg"},
    "fc_norm": {"fc_norm": True},
    "pre-norm, no biases": {"pre_norm": True, "qkv_bias": False, "proj_bias": False},
    "no pos embed": {"pos_embed": "none"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("double", [False, True])
def test_masked_equals_compact_without_channel_pruning(name, double, micro, batch):
    model = micro(double=double, **VARIANTS[name]).eval()
    pruner = pruned(model, group_sizes=NO_EMBED)
    slim = pruner.compact()
    assert sum(p.numel() for p in slim.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    kinds = {r["structure"].split(".")[-1] for entry in pruner.history for r in entry["removed"]}
    assert kinds == {"head", "qk", "v", "mlp"}
    x = batch(dtype=torch.float64 if double else torch.float32)[0]
    tolerance = 1e-12 if double else 2e-5
    torch.testing.assert_close(slim(x), model(x), rtol=tolerance, atol=tolerance)


def masked_norm_model(model, alive):
    """The masked model with LayerNorm over alive channels alone: what compaction without ln_fix computes."""

    def norm(module, inputs, output):
        x = inputs[0][..., alive]
        out = torch.zeros_like(output)
        weight, bias = module.weight[alive], module.bias[alive]
        out[..., alive] = F.layer_norm(x, weight.shape, weight, bias, module.eps)
        return out

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(norm)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"init_values": 0.5},
        {"init_values": 0.5, "distilled": True},
        {"reg_tokens": 2, "no_embed_class": True},
        {"global_pool": "avg", "reg_tokens": 2},
        {"fc_norm": True},
        {"pre_norm": True},
    ],
)
def test_channels_are_cut_as_by_a_norm_over_alive_channels(changes, micro, batch):
    model = micro(double=True, **changes).eval()
    pruner = pruned(model, 0.4, group_sizes={"mlp": 192, "head": 4, "qk": 12, "v": 12})
    assert pruner.dims.embed_dim < 24
    slim = pruner.compact(ln_fix=False)
    x = batch(dtype=torch.float64)[0]
    torch.testing.assert_close(slim(x), masked_norm_model(model, pruner.masks["embed"])(x))


def test_norm_fix_removes_most_of_the_jump(batch):
    """With 16 of 48 channels gone the error shrinks several times."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=4, num_heads=4, num_classes=10
    )
    for parameter in model.double().eval().parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    pruner = pruned(model, 0.75, group_sizes={"mlp": 192, "head": 4, "qk": 12, "v": 12})
    x = batch(dtype=torch.float64)[0]
    masked = model(x)
    with_fix, without = pruner.compact()(x), pruner.compact(ln_fix=False)(x)
    error = (with_fix - masked).norm() / masked.norm()
    assert error < 0.05
    assert error * 5 < (without - masked).norm() / masked.norm()
    factor = (48 / pruner.dims.embed_dim) ** 0.5
    expected = model.norm.weight[pruner.masks["embed"]] * factor
    torch.testing.assert_close(pruner.compact().norm.weight, expected)


def test_recomputing_the_softmax_scale_would_change_the_outputs(micro, batch):
    model = micro().eval()
    pruner = pruned(model, 0.95, group_sizes={**NO_EMBED, "mlp": 192, "head": 4, "v": 12})
    slim = pruner.compact()
    x = batch()[0]
    assert {b.attn.scale for b in slim.blocks} == {12**-0.5}
    for block in slim.blocks:
        block.attn.scale = block.attn.qk_dim**-0.5
    assert (slim(x) - model(x)).abs().max() > 1e-3


def test_nothing_pruned_is_the_dense_model_exactly(micro, batch):
    model = micro().eval()
    slim = NViTPruner(model).compact()
    assert all(torch.equal(v, slim.state_dict()[k]) for k, v in model.state_dict().items())
    assert ViTConfig.from_model(slim).dims == ViTConfig.from_model(model).dims
    x = batch()[0]
    torch.testing.assert_close(slim(x), model(x), rtol=1e-6, atol=1e-6)
    slim.load_state_dict(micro(seed=1).state_dict())


def test_compact_twice_is_compact_once(micro):
    model = micro()
    pruner = pruned(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = pruner.compact().state_dict(), pruner.compact().state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    again = NViTPruner(pruner.compact()).compact().state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_kept_weights_are_the_right_ones(micro):
    """Every parameter against plain indexing by hand."""
    model = micro(True)
    pruner = pruned(model, 0.4)
    slim = dict(pruner.compact(ln_fix=False).named_parameters())
    masks = pruner.masks
    e = masks["embed"]
    for name, p in model.named_parameters():
        block = name.split(".")[1] if name.startswith("blocks") else ""
        if "qkv" in name or name.endswith("attn.proj.weight"):
            head = masks[f"blocks.{block}.head"][:, None]
            qk = (head & masks[f"blocks.{block}.qk"]).flatten()
            v = (head & masks[f"blocks.{block}.v"]).flatten()
            rows = torch.cat([qk, qk, v])
        if name.endswith("qkv.weight"):
            expected = p[rows][:, e]
        elif name.endswith("qkv.bias"):
            expected = p[rows]
        elif name.endswith("attn.proj.weight"):
            expected = p[e][:, v]
        elif "fc1" in name:
            expected = p[masks[f"blocks.{block}.mlp"]]
            expected = expected[:, e] if p.ndim == 2 else expected
        elif name.endswith("fc2.weight"):
            expected = p[e][:, masks[f"blocks.{block}.mlp"]]
        elif name.endswith(("token", "pos_embed", "head.weight", "head_dist.weight")):
            expected = p[..., e]
        elif name in ("head.bias", "head_dist.bias"):
            expected = p
        else:
            expected = p[e]
        assert torch.equal(slim[name], expected), name


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 1e-4, momentum=0.5),
    ],
)
def test_training_goes_on_as_the_masked_model_would(make, micro, batch):
    """Without channel pruning, k steps of the slim model equal k steps of the masked one, then compacted."""

    def run(steps, compact_first):
        model = micro(double=True)
        optimizer = make(model.parameters())
        pruner = NViTPruner(model, target=0.4, interval=10**6, group_sizes=NO_EMBED)
        for step in range(3):
            one_step(model, optimizer, pruner, step)
        generator = torch.Generator().manual_seed(0)
        while not pruner.done:
            pruner.prune_once(torch.rand(pruner.table.count, generator=generator))
        pruner.rezero(optimizer)
        if compact_first:
            model = pruner.compact(optimizer)
        for step in range(3, 3 + steps):
            one_step(model, optimizer, None if compact_first else pruner, step)
        return model if compact_first else pruner.compact()

    def one_step(model, optimizer, pruner, step):
        x, y = batch(seed=step, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if pruner is not None:
            pruner.rezero(optimizer)

    slim, masked = run(5, True), run(5, False)
    for (name, a), b in zip(slim.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_optimizer_state_is_cut_like_the_weights(micro, batch, backward):
    model = micro()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    extra = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": [*rest, extra], "lr": 0.5}], 1e-3
    )
    backward(model, batch())
    optimizer.step()
    weight, norm = model.blocks[2].mlp.fc2.weight, model.norm.weight
    moments = {k: v.clone() for k, v in optimizer.state[weight].items()}
    norm_moment = optimizer.state[norm]["exp_avg"].clone()
    pruner = pruned(model)
    slim = pruner.compact(optimizer)
    assert len(optimizer.state) == len(list(slim.parameters()))
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held[0] == {id(p) for p in slim.parameters() if p.ndim > 1}
    assert held[1] == {id(p) for p in slim.parameters() if p.ndim <= 1} | {id(extra)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 1e-2]
    e, m = pruner.masks["embed"], pruner.masks["blocks.2.mlp"]
    state = optimizer.state[slim.blocks[2].mlp.fc2.weight]
    assert state["step"] == 1
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], moments[key][e][:, m])
    assert torch.equal(optimizer.state[slim.norm.weight]["exp_avg"], norm_moment[e])
    backward(slim, batch())
    optimizer.step()
    with pytest.raises(ValueError, match="must hold parameters of the pruned model"):
        pruner.compact(optimizer)


def test_flags_and_metadata_are_carried(micro):
    model = micro(True).train()
    model.set_distilled_training(True)
    model.pretrained_cfg = {"architecture": "deit_micro", "mean": (0.5,)}
    model.default_cfg = model.pretrained_cfg
    model.cls_token.requires_grad_(False)
    slim = pruned(model).compact()
    assert isinstance(slim, PrunedVisionTransformerDistilled)
    assert slim.training
    assert slim.pretrained_cfg == model.pretrained_cfg == slim.default_cfg
    assert [n for n, p in slim.named_parameters() if not p.requires_grad] == ["cls_token"]
    assert isinstance(slim(torch.randn(2, 1, 8, 8)), tuple)


def test_half_precision_keeps_its_dtype_and_bits(micro):
    model = micro().bfloat16()
    pruner = pruned(model)
    slim = pruner.compact(ln_fix=False)
    assert {p.dtype for p in slim.parameters()} == {torch.bfloat16}
    e, m = pruner.masks["embed"], pruner.masks["blocks.0.mlp"]
    assert torch.equal(slim.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight[m][:, e])


def test_compacted_model_compiles_without_graph_breaks(micro, batch):
    slim = pruned(micro(True)).compact().eval()
    x = batch()[0]
    compiled = torch.compile(slim, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), slim(x))
