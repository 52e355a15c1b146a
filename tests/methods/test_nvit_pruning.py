"""The pruning loop: selection, masks, optimizer, resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyvitfast.models import BlockDims, ViTConfig, ViTDims
from pyvitfast.prune import NViTConfig, NViTPruner, UnitTable, group_size


def six_unit_table(micro):
    return UnitTable(ViTConfig.from_model(micro(mlp_ratio=0.125, depth=1)), {"mlp": 2})


def test_groups_are_cut_from_the_sorted_units(micro):
    table = six_unit_table(micro)
    mlp = table.structures["mlp", 0]
    assert mlp.size == 6
    scores = torch.full((table.count,), 100.0, dtype=torch.float64)
    scores[mlp.start : mlp.stop] = torch.tensor([5.0, 1, 4, 2, 3, 0], dtype=torch.float64)
    alive = torch.ones(table.count, dtype=torch.bool)
    chosen = table.select(scores, alive, alive, 5)
    found = [((u - mlp.start).tolist(), score) for s, u, score in chosen if s is mlp]
    assert found == [([1, 5], 1.0), ([3, 4], 5.0)]  # {0, 2} of sum 9 is the last group and stays


def test_ties_go_to_the_lower_index(micro):
    table = six_unit_table(micro)
    alive = torch.ones(table.count, dtype=torch.bool)
    chosen = table.select(torch.zeros(table.count, dtype=torch.float64), alive, alive, 3)
    assert [s.kind for s, _, _ in chosen] == ["embed"] * 3
    assert torch.cat([u for _, u, _ in chosen]).tolist() == list(range(12))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 6), group=st.sampled_from([1, 2, 5, 8, 300]))
def test_selection_is_the_lowest_by_brute_force(micro_table, seed, groups, group):
    """Against all removable groups listed and sorted in plain Python."""
    table = UnitTable(micro_table, {"mlp": group})
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 50, (table.count,), generator=generator).double()
    alive = torch.rand(table.count, generator=generator) < 0.7
    pool = []
    for number, s in enumerate(table.structures.values()):
        units = sorted((float(scores[u]), u) for u in range(s.start, s.stop) if alive[u])
        bundles = [units[i : i + s.group_size] for i in range(0, len(units), s.group_size)]
        for place, bundle in enumerate(bundles[:-1]):
            pool.append((sum(v for v, _ in bundle), number, place, sorted(u for _, u in bundle)))
    expected = [units for *_, units in sorted(pool)[:groups]]
    found = [u.tolist() for _, u, _ in table.select(scores, alive, alive, groups)]
    assert found == expected


@pytest.fixture(scope="module")
def micro_table():
    from timm.models.vision_transformer import VisionTransformer

    return ViTConfig.from_model(
        VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=4, num_classes=10
        )
    )


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [2, 4, 6, 8]), ("nvit_repo", [1, 2, 4, 6])])
def test_removal_schedule(schedule, expected, micro, batch, backward):
    model = micro()
    pruner = NViTPruner(model, schedule=schedule)
    removed = []
    for _ in range(4):
        backward(model, batch())
        pruner.score()
        removed.append((removed[-1] if removed else 0) + len(pruner.prune_once()["removed"]))
    assert removed == expected


def train(model, pruner, optimizer, data, steps, start=0):
    for step in range(start, start + steps):
        if pruner.done:
            break
        optimizer.zero_grad()
        x, y = data(seed=step)
        F.cross_entropy(model(x), y).backward()
        pruner.step(optimizer)


@pytest.mark.parametrize("budget", ["macs", "params"])
def test_stops_at_the_first_call_below_the_target(budget, micro, batch):
    model = micro()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = NViTPruner(model, target=0.7, budget=budget, interval=1, groups_per_step=3)
    train(model, pruner, optimizer, batch, 500)
    fractions = [entry["budget"] for entry in pruner.history]
    assert pruner.done
    assert fractions[-1] <= 0.7 < fractions[-2]
    assert all(len(entry["removed"]) == 3 for entry in pruner.history)
    slim = pruner.compact()
    config, dense = ViTConfig.from_model(slim), ViTConfig.from_model(model)
    count = {"macs": ViTConfig.macs, "params": ViTConfig.params}[budget]
    assert count(config) / count(dense) == fractions[-1]
    assert pruner.history[-1]["dims"] == pruner.dims.to_dict() == config.dims.to_dict()


def test_widths_stay_multiples_of_the_group_sizes(micro, batch, backward):
    model = micro(embed_dim=64, num_heads=4)
    sizes = {"embed": 16, "head": 2, "qk": 8, "v": 8, "mlp": 16}
    pruner = NViTPruner(model, target=0.2, group_sizes=sizes, groups_per_step=4)
    generator = torch.Generator().manual_seed(0)
    while not pruner.done:
        pruner.prune_once(torch.rand(pruner.table.count, generator=generator))
        dims = pruner.dims
        widths = [dims.embed_dim]
        for b in dims.blocks:
            widths += [b.heads * b.qk_dim, b.heads * b.v_dim, b.mlp]
        assert all(w > 0 and w % 16 == 0 for w in widths), widths


def dead_entries(model, pruner):
    """Every weight that must be 0, listed here by hand from the masks."""
    masks = pruner.masks
    embed = ~masks["embed"]
    for name, p in model.named_parameters():
        if name.startswith(("head", "head_dist")):
            if p.ndim == 2:
                yield p[:, embed]
            continue
        if name.endswith(("token", "pos_embed")):
            yield p[..., embed]
            continue
        if "qkv" in name or name.endswith("attn.proj.weight"):
            b = name.split(".")[1]
            head, v = masks[f"blocks.{b}.head"], masks[f"blocks.{b}.v"]
            qk = masks[f"blocks.{b}.qk"]
            qk_rows = ~(head[:, None] & qk).flatten()
            v_rows = ~(head[:, None] & v).flatten()
            if "qkv" in name:
                n = len(qk_rows)
                yield p[:n][qk_rows]
                yield p[n : 2 * n][qk_rows]
                yield p[2 * n :][v_rows]
                if p.ndim == 2:
                    yield p[:, embed]
            else:
                yield p[:, v_rows]
                yield p[embed]
        elif "mlp" in name:
            mlp = ~masks[f"blocks.{name.split('.')[1]}.mlp"]
            if "fc1" in name:
                yield p[mlp]
                if p.ndim == 2:
                    yield p[:, embed]
            else:
                yield p[embed]
                if p.ndim == 2:
                    yield p[:, mlp]
        else:
            yield p[embed]


def prune_everywhere(pruner):
    """One group of every structure, units at random places."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.ones(pruner.table.count)
    for s in pruner.structures:
        scores[s.start + torch.randperm(s.size, generator=generator)[: s.group_size]] = 0
    pruner.config = NViTConfig(**{**pruner.config.to_dict(), "groups_per_step": len(pruner.structures)})
    pruner.prune_once(scores)
    for s in pruner.structures:
        assert int(pruner.masks[s.name].sum()) == s.size - s.group_size


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    ],
)
def test_pruned_weights_stay_exactly_zero(make, distilled, update, micro, batch):
    model = micro(distilled, init_values=0.5)
    optimizer = make(model.parameters())
    pruner = NViTPruner(model, target=0.1, interval=1000, group_sizes={"qk": 1, "v": 1})
    for step in range(52):
        x, y = batch(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.step(optimizer, update=update)
        if not update:
            optimizer.step()
        if step == 1:
            prune_everywhere(pruner)
            pruner.rezero(optimizer)
        if step > 1:
            dead = list(dead_entries(model, pruner))
            assert sum(part.numel() for part in dead) > 1000
            assert all(bool((part == 0).all()) for part in dead)
    alive = sum(int((p != 0).sum()) for p in model.parameters())
    assert alive == ViTConfig.from_model(pruner.compact()).params()


def test_pruning_changes_the_outputs(micro, batch):
    model = micro().eval()
    before = model(batch()[0])
    pruner = NViTPruner(model, target=0.1)
    prune_everywhere(pruner)
    assert (model(batch()[0]) - before).abs().max() > 1e-2


def test_rezero_clears_nan_and_optimizer_state(micro, batch, backward):
    model = micro()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    backward(model, batch())
    optimizer.step()
    pruner = NViTPruner(model, target=0.1)
    prune_everywhere(pruner)
    row = int((~pruner.masks["blocks.1.mlp"]).nonzero()[0])
    kept = int(pruner.masks["blocks.1.mlp"].nonzero()[0])
    weight = model.blocks[1].mlp.fc1.weight
    state = optimizer.state[weight]
    with torch.no_grad():
        weight[row] = float("nan")
        state["exp_avg"][row] = float("inf")
    pruner.rezero(optimizer)
    assert torch.equal(weight[row], torch.zeros(48))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][row], torch.zeros(48))
        assert bool((state[name][kept] != 0).any())


def test_scores_before_the_update(micro, batch, backward):
    """Weights as they stand after backward; the preset reads them after the update, another number."""
    found = {}
    for late in (False, True):
        model = micro(double=True)
        data = batch(dtype=torch.float64)
        backward(model, data)
        weight = model.blocks[0].mlp.fc1
        old = (weight.weight * weight.weight.grad).sum(1) + weight.bias * weight.bias.grad
        pruner = NViTPruner(model, score_after_update=late)
        pruner.step(torch.optim.SGD(model.parameters(), 0.5))
        new = (weight.weight * weight.weight.grad).sum(1) + weight.bias * weight.bias.grad
        start = pruner.table.structures["mlp", 0].start
        found[late] = pruner.unit_scores[start : start + 192]
        torch.testing.assert_close(found[late], (new if late else old).detach() ** 2)
    assert not torch.allclose(found[False], found[True])


def test_non_finite_minibatches_are_skipped_and_counted(micro, batch, backward):
    model = micro()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = NViTPruner(model, interval=3)
    backward(model, batch())
    pruner.step(optimizer)
    good = pruner.unit_scores
    for bad in (float("inf"), float("nan")):
        backward(model, batch())
        model.blocks[0].mlp.fc2.weight.grad[0, 0] = bad
        weight = model.blocks[0].mlp.fc2.weight.detach().clone()
        pruner.score()
        assert torch.equal(model.blocks[0].mlp.fc2.weight, weight)
    assert pruner.skipped == 2
    assert torch.equal(pruner.unit_scores, good)
    backward(model, batch())
    pruner.step(optimizer)
    backward(model, batch())
    assert pruner.step(optimizer) is not None
    assert pruner.skipped == 2


def test_interval_of_only_bad_minibatches_prunes_nothing(micro, batch, backward):
    model = micro()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = NViTPruner(model, interval=1)
    backward(model, batch())
    model.patch_embed.proj.weight.grad[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="nothing was pruned at step 1"):
        assert pruner.step(optimizer, update=False) is None
    assert pruner.history == []


def test_grad_scaler(micro, batch):
    """Scaled training prunes the same groups as plain training; an overflow is skipped by both sides."""
    plain, scaled = micro(), micro()
    histories = []
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=2.0**8))):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        pruner = NViTPruner(model, interval=2)
        for step in range(6):
            x, y = batch(seed=step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            pruner.step(optimizer, scaler=scaler)
        histories.append([r["units"] for entry in pruner.history for r in entry["removed"]])
    assert histories[0] == histories[1]
    before = copy.deepcopy(scaled.state_dict())
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(scaled(x), y) * float("inf")).backward()
    pruner.step(optimizer, scaler=scaler)
    assert pruner.skipped == 1
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(v, before[k]) for k, v in scaled.state_dict().items())


def test_gradient_accumulation_equals_the_large_batch(micro, batch, backward):
    model = micro(double=True)
    x, y = batch(16, dtype=torch.float64)
    backward(model, (x, y))
    whole = NViTPruner(model)
    whole.score()
    model.zero_grad()
    for part in (slice(0, 8), slice(8, 16)):
        (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
    parts = NViTPruner(model)
    parts.score()
    torch.testing.assert_close(parts.unit_scores, whole.unit_scores)


def test_frozen_units_are_never_pruned(micro, batch, backward):
    model = micro()
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.0.", "blocks.1.mlp")):
            parameter.requires_grad_(False)
    pruner = NViTPruner(model, groups_per_step=40)
    for _ in range(2):
        backward(model, batch())
        pruner.score()
        assert {n for n in pruner.unscored if n.startswith("blocks.0")} == {
            f"blocks.0.{kind}" for kind in ("head", "qk", "v", "mlp")
        }
        assert "blocks.1.mlp" in pruner.unscored
        assert "embed" not in pruner.unscored
        pruner.prune_once()
    touched = {r["structure"] for entry in pruner.history for r in entry["removed"]}
    assert touched
    assert not touched & {*pruner.unscored}


def test_units_frozen_for_part_of_an_interval_are_not_pruned(micro, batch, backward):
    model = micro()
    pruner = NViTPruner(model, groups_per_step=60)
    for frozen in (True, False):
        model.blocks[3].mlp.requires_grad_(not frozen)
        backward(model, batch())
        pruner.score()
    assert "blocks.3.mlp" not in {r["structure"] for r in pruner.prune_once()["removed"]}


def test_unused_distillation_head_does_not_make_channels_prunable(micro, batch):
    """The loss touches only the class head, so head_dist has no gradient."""
    model = micro(True)
    model.set_distilled_training(True)
    x, y = batch()
    F.cross_entropy(model(x)[0], y).backward()
    assert model.head_dist.weight.grad is None
    pruner = NViTPruner(model, membership="full")
    pruner.score()
    assert pruner.unscored == []


def test_resume_gives_the_same_numbers(micro, batch, tmp_path):
    def fresh():
        model = micro(drop_rate=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        return model, optimizer, NViTPruner(model, interval=4, groups_per_step=3)

    model, optimizer, pruner = fresh()
    train(model, pruner, optimizer, batch, 22)
    first = fresh()
    train(first[0], first[2], first[1], batch, 10)
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    again = fresh()
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(again[0], again[2], again[1], batch, 12, start=10)
    assert again[2].history == pruner.history
    assert len(pruner.history) == 5
    for key, value in pruner.state_dict().items():
        other = again[2].state_dict()[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again[0].parameters(), strict=True))


def test_compiled_and_wrapped_models_are_accepted(micro, batch):
    plain, inner = micro(), micro()
    compiled = torch.compile(inner, backend="aot_eager")
    pruners = []
    for model, handle in ((plain, plain), (inner, compiled)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        pruner = NViTPruner(handle, interval=1)
        train(handle, pruner, optimizer, batch, 3)
        pruners.append(pruner)
    assert pruners[0].history[-1]["dims"] == pruners[1].history[-1]["dims"]
    torch.testing.assert_close(compiled(batch()[0]), pruners[1].compact()(batch()[0]), rtol=1e-4, atol=1e-5)


def test_cost_term_prefers_units_that_save_more(micro, batch, backward):
    """With an overwhelming eta the ranking is by saved cost alone: residual channels first."""

    def kinds(eta, **settings):
        model = micro()
        pruner = NViTPruner(model, eta=eta, groups_per_step=4, **settings)
        backward(model, batch())
        pruner.score()
        return {r["structure"] for r in pruner.prune_once()["removed"]}

    assert "embed" not in kinds(0.0)
    assert kinds(1e9) == {"embed"}
    assert kinds(1e-4, batch_ref=10**9, batch_size=1) == {"embed"}


class Table:
    """A latency table: milliseconds that depend on heads alone."""

    def query(self, dims: ViTDims) -> float:
        return float(sum(b.heads for b in dims.blocks))

    def delta(self, dims: ViTDims) -> list[float]:
        return [0.0] + [d for _ in dims.blocks for d in (1.0, 0.0, -5.0, 0.0)]


def test_latency_table_can_be_plugged_in(micro, batch, backward):
    model = micro()
    pruner = NViTPruner(model, target=0.5, budget="latency", latency=Table(), eta=1e9, groups_per_step=3)
    while not pruner.done:
        backward(model, batch())
        pruner.score()
        pruner.prune_once()
    assert [b.heads for b in pruner.dims.blocks].count(1) >= 1
    assert pruner.history[-1]["budget"] == sum(b.heads for b in pruner.dims.blocks) / 16
    assert pruner.dims.blocks[0].v_dim == 12


def test_automatic_group_sizes():
    assert [group_size(k, n, 48) for k, n in (("embed", 48), ("head", 4), ("qk", 12), ("mlp", 192))] == [
        4,
        1,
        2,
        8,
    ]
    assert group_size("head", 3, 192) == 1  # three heads cannot go in twos
    assert group_size("head", 2, 192) == 1  # one group would never be removable
    assert [group_size("qk", 64, 192, heads) for heads in (1, 2)] == [16, 8]  # heads times dims in 16s
    assert group_size("v", 12, 48, 1) == 2
    assert group_size("embed", 200, 200) == 8
    assert group_size("mlp", 7, 512) == 1


def test_presets_and_config_round_trip():
    repo = NViTConfig.preset("nvit_repo", target=0.3)
    assert repo.target == 0.3
    assert repo.eta == pytest.approx(4.85e-4, rel=1e-3)
    assert NViTConfig.from_dict(repo.to_dict()) == repo != NViTConfig(target=0.3)
    assert NViTConfig.preset("paper") == NViTConfig()


def test_pruning_a_pruned_model_again(micro, batch, backward):
    model = micro()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    first = NViTPruner(model, target=0.7, interval=1, groups_per_step=5)
    train(model, first, optimizer, batch, 100)
    slim = first.compact(optimizer)
    second = NViTPruner(slim, target=0.7, interval=1, groups_per_step=5)
    train(slim, second, optimizer, batch, 100)
    final = second.compact(optimizer)
    assert ViTConfig.from_model(final).macs() <= 0.49 * ViTConfig.from_model(model).macs()
    assert ViTConfig.from_model(final).scales == (12**-0.5,) * 4
    torch.testing.assert_close(final(batch()[0]), slim(batch()[0]), rtol=1e-4, atol=1e-4)


def test_repo_preset_runs(micro, batch):
    model = micro()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = NViTPruner(model, preset="nvit_repo", interval=2, target=0.8, eta=0.0)
    train(model, pruner, optimizer, batch, 200)
    assert pruner.done
    assert [len(entry["removed"]) for entry in pruner.history[:4]] == [1, 1, 2, 2]


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"target": 0.0}, "`target` must be a fraction between 0 and 1"),
            ({"target": 1.0}, "`target` must be"),
            ({"target": 50}, "`target` must be"),
            ({"budget": "flops"}, "`budget` must be one of macs, params, latency"),
            ({"interval": 0}, "`interval` must be an integer of at least 1"),
            ({"groups_per_step": 0}, "`groups_per_step`"),
            ({"membership": "all"}, "`membership` must be subset or full"),
            ({"momentum": 1.0}, "`momentum`"),
            ({"eta": -1.0}, "`eta`"),
            ({"group_sizes": {"heads": 2}}, "`group_sizes` must be a mapping with keys out of"),
            ({"group_sizes": {"mlp": 0}}, "`group_sizes` must be positive"),
            ({"divisors": {"qk": 0.0}}, "`divisors` must be positive"),
            ({"preset": "repo"}, "`preset` must be one of paper, nvit_repo"),
            ({"target": 0.001}, "`target` must be at least 0.0"),
            ({"target": 0.5, "group_sizes": {"mlp": 192, "embed": 48}}, "`target` must be at least 0.6"),
        ],
    )
    def test_settings(self, settings, match, micro):
        with pytest.raises(ValueError, match=match):
            NViTPruner(micro(), **settings)

    def test_unknown_key(self):
        with pytest.raises(ValueError, match="got traget"):
            NViTConfig.from_dict({"traget": 0.5})

    def test_latency_needs_a_table(self, micro):
        with pytest.raises(ValueError, match="must be a latency table"):
            NViTPruner(micro(), budget="latency")
        with pytest.raises(TypeError, match=r"query\(dims\)"):
            NViTPruner(micro(), budget="latency", latency=3.0)

    def test_model_where_nothing_matches(self):
        with pytest.raises(TypeError, match="no supported attention was found"):
            NViTPruner(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(TypeError, match=r"`model` must be an nn\.Module"):
            NViTPruner("deit")

    def test_no_gradients(self, micro):
        model = micro()
        with pytest.raises(ValueError, match="grad=None everywhere"):
            NViTPruner(model).step(torch.optim.SGD(model.parameters(), 0.1))

    def test_foreign_optimizer(self, micro, batch, backward):
        model = micro()
        backward(model, batch())
        with pytest.raises(ValueError, match="must hold parameters of the pruned model"):
            NViTPruner(model).step(torch.optim.SGD(micro().parameters(), 0.1))
        with pytest.raises(TypeError, match="must be a torch optimizer"):
            NViTPruner(model).step("adam")

    def test_step_after_done(self, micro, batch, backward):
        model = micro()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pruner = NViTPruner(model, target=0.99, interval=1, groups_per_step=10)
        backward(model, batch())
        pruner.step(optimizer)
        with pytest.raises(RuntimeError, match=r"call `pruner\.compact\(optimizer\)`"):
            pruner.step(optimizer)
        with pytest.raises(RuntimeError, match=r"target 0\.99 is reached"):
            pruner.prune_once()

    def test_contradicting_arguments(self, micro, batch, backward):
        model = micro()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        backward(model, batch())
        with pytest.raises(ValueError, match="`scaler`"):
            NViTPruner(model).step(optimizer, scaler=torch.amp.GradScaler("cpu"), inv_scale=1.0)
        with pytest.raises(ValueError, match="`update` must be True"):
            NViTPruner(model, preset="nvit_repo").step(optimizer, update=False)

    def test_prune_once_without_scores(self, micro):
        with pytest.raises(ValueError, match="at least one minibatch must be scored"):
            NViTPruner(micro()).prune_once()
        with pytest.raises(ValueError, match="`scores` must be finite"):
            NViTPruner(micro()).prune_once(torch.zeros(3))

    def test_everything_prunable_frozen(self, micro, batch, backward):
        model = micro()
        model.requires_grad_(False)
        model.blocks[0].attn.qkv.bias.requires_grad_(True)
        pruner = NViTPruner(model, target=0.02, groups_per_step=500)
        for _ in range(2):
            backward(model, batch())
            pruner.score()
            if not pruner.history:
                pruner.prune_once()
        with pytest.raises(RuntimeError, match=r"no group may be removed.*blocks\.3\.mlp"):
            pruner.prune_once()

    def test_state_of_another_model(self, micro):
        state = NViTPruner(micro()).state_dict()
        with pytest.raises(ValueError, match="`dense` must equal"):
            NViTPruner(micro(depth=2)).load_state_dict(state)
        with pytest.raises(ValueError, match="`config` must equal"):
            NViTPruner(micro(), interval=7).load_state_dict(state)


def test_dims_are_plain_values(micro):
    assert NViTPruner(micro()).dims == ViTDims(48, (BlockDims(4, 12, 12, 192),) * 4)
