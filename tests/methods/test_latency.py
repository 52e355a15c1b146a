"""The latency table: interpolation, cleaning, files, measuring, and what pruning does with it."""

import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast.models import BlockDims, ViTConfig, ViTDims
from pyvitfast.prune import LatencyTable, NViTPruner
from pyvitfast.prune.latency import monotone
from pyvitfast.prune.timing import Timer

GRIDS = {
    "embed_dim": [0, 256, 512, 768],
    "heads": [1, 3, 12],
    "qk_dim": [1, 16, 64],
    "v_dim": [1, 32, 64],
    "mlp": [1, 1536, 3072],
}


def macs(dims: ViTDims, tokens: int) -> int:
    """MACs of the blocks, section 14.3's formula in plain Python."""
    n, e = tokens, dims.embed_dim
    return sum(
        n * e * b.heads * (2 * b.qk_dim + 2 * b.v_dim)
        + n * n * b.heads * (b.qk_dim + b.v_dim)
        + 2 * n * e * b.mlp
        for b in dims.blocks
    )


def filled(tokens: int = 197) -> LatencyTable:
    values = torch.zeros([len(g) for g in GRIDS.values()], dtype=torch.float64)
    for index in np.ndindex(*values.shape):
        e, *block = (grid[i] for grid, i in zip(GRIDS.values(), index))
        values[index] = macs(ViTDims(e, (BlockDims(*block),)), tokens)
    return LatencyTable(GRIDS, values)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 768),
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 64), st.integers(1, 64), st.integers(1, 3072)),
        min_size=1,
        max_size=4,
    ),
)
def test_interpolation_is_exact_for_what_is_affine_in_each_width(embed, blocks):
    dims = ViTDims(embed, tuple(BlockDims(*b) for b in blocks))
    assert filled().query(dims) == pytest.approx(macs(dims, 197), rel=1e-12)


def test_savings_of_deit_base():
    """Section 14.3, N = 198."""
    model = timm.create_model("deit_base_distilled_patch16_224")
    table, dims = LatencyTable.from_macs(model), ViTConfig.from_model(model).dims
    embed, head, qk, v, mlp, *rest = table.delta(dims)
    assert (embed, head, qk, v, mlp) == (21897216, 43946496, 4119984, 4119984, 304128)
    assert rest == [head, qk, v, mlp] * 11
    assert table.query(dims) == macs(dims, 198)
    assert table.unit == "MACs" and table.rest is None


def test_rest_is_interpolated_in_the_residual_width():
    table = LatencyTable(([2, 4, 8], [1], [1], [1], [1]), np.zeros((3, 1, 1, 1, 1)), rest=[1.0, 2.0, 6.0])
    block = BlockDims(1, 1, 1, 1)
    assert table.query(ViTDims(6, (block,))) == 4.0
    assert table.query(ViTDims(1, ())) == 1.0
    assert table.delta(ViTDims(8, (block,)))[0] == 1.0


def test_curve_is_followed_and_continued_in_proportion():
    table = LatencyTable(
        ([1, 100], [1], [1], [1], [1]),
        np.array([1.0, 100.0]).reshape(2, 1, 1, 1, 1),
        curve=[[10.0, 20.0], [20.0, 30.0]],
    )
    found = [table.query(ViTDims(width, (BlockDims(1, 1, 1, 1),))) for width in (5, 10, 15, 20, 40)]
    assert found == [10.0, 20.0, 25.0, 30.0, 60.0]


def test_widths_outside_the_grid():
    table = filled()
    low, high = BlockDims(1, 1, 1, 1), BlockDims(1, 1, 1, 3073)
    with pytest.raises(ValueError, match=r"mlp must be at most 3072, where the grid ends, got 3073"):
        table.query(ViTDims(256, (low, high)))
    assert table.query(ViTDims(256, (BlockDims(0, 1, 0, 1),))) == table.query(ViTDims(256, (low,)))
    assert table.delta(ViTDims(256, (low,)))[1:] == [0.0] * 4


def test_cleaning_is_the_nearest_monotone_sequence():
    # Pool adjacent violators by hand: 3 and 2 become their mean.
    assert monotone(np.array([1.0, 3.0, 2.0, 4.0])).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert monotone(np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 2.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=5, max_side=4), elements=st.floats(0, 9)))
def test_cleaning_leaves_no_decrease_and_the_mean(values):
    cleaned = monotone(values)
    for axis in range(values.ndim):
        assert (np.diff(cleaned, axis=axis) >= -1e-9).all()
    assert cleaned.mean() == pytest.approx(values.mean(), abs=1e-9)
    np.testing.assert_allclose(monotone(cleaned), cleaned, atol=1e-9)


def test_cleaning_a_table():
    noisy = np.array([5.0, 1.0]).reshape(1, 1, 1, 1, 2)
    table = LatencyTable(([1], [1], [1], [1], [1, 2]), noisy, rest=[1.0]).monotone()
    assert table.values.flatten().tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {"embed_dim": [1]}}, "must have the keys"),
        ({"grids": [[1], [1]]}, "must hold 5 axes"),
        ({"grids": [[2, 1], [1], [1], [1], [1]]}, "embed_dim must be increasing integers"),
        ({"grids": [[1.5], [1], [1], [1], [1]]}, "embed_dim must be increasing integers"),
        ({"grids": [[1], [], [1], [1], [1]]}, "heads must be increasing"),
        ({"values": np.zeros((1, 1, 1, 1))}, r"`values` must have shape \[1, 1, 1, 1, 1\]"),
        ({"values": np.full((1,) * 5, np.nan)}, "`values` must be finite"),
        ({"values": np.full((1,) * 5, -1.0)}, "`values` must be finite and at least 0"),
        ({"rest": [1.0, 2.0]}, r"`rest` must have shape \[1\]"),
        ({"curve": [[2.0, 1.0], [1.0, 2.0]]}, "`curve` must be two rows of positive numbers"),
        ({"curve": [[0.0], [1.0]]}, "`curve` must be two rows of positive numbers"),
    ],
)
def test_bad_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LatencyTable(**{"grids": [[1]] * 5, "values": np.zeros((1,) * 5), **change})


class TestFiles:
    def test_round_trip_keeps_every_bit_and_the_device(self, micro, tmp_path):
        table = LatencyTable.measure(micro(), batch_size=2, repeats=1, progress=False)
        table.save(tmp_path / "table.json")
        again = LatencyTable.load(tmp_path / "table.json")
        assert again.to_dict() == table.to_dict()
        assert (again.values == table.values).all() and (again.rest == table.rest).all()
        assert again.measured["device"] and again.measured["batch_size"] == 2
        again.check(ViTConfig.from_model(micro()))

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "must be JSON"), ("[]", "must hold a table, got a list"), ("{}", "must be complete")],
    )
    def test_other_files(self, tmp_path, text, message):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            LatencyTable.load(path)

    def test_other_versions_and_cut_values(self, tmp_path):
        path = tmp_path / "table.json"
        for change, message in (
            ({"format_version": 2}, "format_version must be 1, got 2"),
            ({"values": [1.0]}, "must have shape"),
        ):
            path.write_text(json.dumps({**filled().to_dict(), **change}))
            with pytest.raises(ValueError, match=message):
                LatencyTable.load(path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            LatencyTable.load(tmp_path / "table.json")


class TestMeasure:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_parts_add_up_to_the_model(self, micro, monkeypatch, distilled):
        """With FLOPs in place of seconds, the table must say what whole models cost."""

        def flops(timer, part, widths, calls):
            run = timer.parts[part, widths]
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            return float(counter.get_total_flops())

        monkeypatch.setattr(Timer, "seconds", flops)
        grids = {
            "embed_dim": [16, 48],
            "heads": [1, 4],
            "qk_dim": [4, 12],
            "v_dim": [4, 12],
            "mlp": [64, 192],
        }
        model = micro(distilled)
        raw = {"clean": False, "calibrate": False, "progress": False}
        table = LatencyTable.measure(model, batch_size=3, grids=grids, repeats=1, **raw)
        config = ViTConfig.from_model(model)
        assert table.grids == tuple(map(tuple, grids.values()))
        for embed, heads, width, mlp in ((48, 4, 12, 192), (16, 1, 4, 64), (48, 1, 12, 64), (16, 4, 4, 192)):
            dims = ViTDims(embed, (BlockDims(heads, width, width, mlp),) * 4)
            whole = config.prune(dims).build().eval()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                whole(torch.zeros(3, 1, 8, 8))
            assert table.query(dims) == counter.get_total_flops()

    def test_whole_models_bend_the_table(self, micro, monkeypatch):
        """Whole models that take the square root of their parts must be predicted so; their order stays."""

        def parts(dims):
            blocks = sum(dims.embed_dim * (b.heads * (2 * b.qk_dim + b.v_dim) + b.mlp) for b in dims.blocks)
            return 100.0 + dims.embed_dim + blocks

        def seconds(timer, part, widths, calls):
            if part == "rest":
                return 100.0 + widths[0]
            if part == "whole":
                return parts(timer.probes[widths[0]]) ** 0.5
            if part == "mlp":
                return float(widths[0] * widths[1])
            embed, heads, qk, v = widths
            return float(embed * heads * (2 * qk + v))

        monkeypatch.setattr(Timer, "seconds", seconds)
        model = micro()
        dense = ViTConfig.from_model(model).dims
        table = LatencyTable.measure(model, batch_size=1, repeats=1, progress=False)
        assert table.measured["error"] < 1e-9
        assert table.query(dense) == pytest.approx(parts(dense) ** 0.5, rel=1e-9)
        dims = ViTDims(40, (BlockDims(3, 10, 7, 100),) * 4)
        assert table.query(dims) == pytest.approx(parts(dims) ** 0.5, rel=0.05)
        raw = LatencyTable.measure(model, batch_size=1, repeats=1, progress=False, calibrate=False)
        assert raw.query(dims) == pytest.approx(parts(dims), rel=1e-9)
        assert table.delta(dims) == raw.delta(dims)
        assert raw.curve is None and "error" not in raw.measured

    def test_noise_among_whole_models_leaves_the_model_itself_exact(self, micro, monkeypatch):
        monkeypatch.setattr(
            Timer, "seconds", lambda timer, part, widths, calls: 20.0 - widths[0] if part == "whole" else 1.0
        )
        model = micro()
        table = LatencyTable.measure(model, batch_size=1, repeats=1, progress=False)
        assert (np.diff(table.curve) >= 0).all()
        assert table.query(ViTConfig.from_model(model).dims) == pytest.approx(20.0, rel=1e-4)

    def test_times_are_monotone_and_the_grid_ends_at_the_model(self, micro):
        table = LatencyTable.measure(micro(), batch_size=1, repeats=1, progress=False)
        assert [grid[-1] for grid in table.grids] == [48, 4, 12, 12, 192]
        assert [grid[0] for grid in table.grids] == [4, 1, 2, 2, 8]
        for axis in range(5):
            assert (np.diff(table.values, axis=axis) >= 0).all()
        assert (table.values > 0).all() and (table.rest > 0).all()
        assert table.unit == "s" and table.measured["dtype"] == "float32"

    def test_model_is_left_alone(self, micro):
        model = micro().train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        LatencyTable.measure(model, batch_size=1, repeats=1, progress=False, dtype=torch.bfloat16)
        assert model.training
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_arguments(self, micro):
        with pytest.raises(ValueError, match="`batch_size` and `repeats` must be at least 1, got 0 and 7"):
            LatencyTable.measure(micro(), batch_size=0)
        with pytest.raises(ValueError, match=r"keys out of embed_dim.*depth"):
            LatencyTable.measure(micro(), grids={"depth": [1]})
        with pytest.raises(TypeError, match="VisionTransformer"):
            LatencyTable.measure(torch.nn.Linear(2, 2))


class TestPruner:
    def test_other_families_are_refused(self, micro):
        table = LatencyTable.from_macs(micro())
        NViTPruner(micro(depth=2), budget="latency", latency=table)
        with pytest.raises(ValueError, match=r"differ in patch_size \[2, 2\] against \[4, 4\].*tokens 17"):
            NViTPruner(micro(patch_size=4), budget="latency", latency=table)
        with pytest.raises(ValueError, match=r"distilled False against True"):
            NViTPruner(micro(distilled=True), budget="latency", latency=table)
        with pytest.raises(ValueError, match="embed_dim must be at most 48"):
            NViTPruner(micro(embed_dim=64), budget="latency", latency=table)

    def test_stops_at_the_first_call_at_or_below_the_target(self, micro, batch, backward):
        model = micro()
        table = LatencyTable.from_macs(model)
        dense = macs(ViTConfig.from_model(model).dims, 17)
        pruner = NViTPruner(model, target=0.5, budget="latency", latency=table, groups_per_step=2)
        shares = [1.0]
        while not pruner.done:
            backward(model, batch())
            pruner.score()
            shares.append(macs(ViTDims.from_dict(pruner.prune_once()["dims"]), 17) / dense)
        assert shares[-1] <= 0.5 < shares[-2]
        assert pruner.fraction == pytest.approx(shares[-1], rel=1e-12)

    def test_cost_term_takes_fewer_calls_and_shrinks_the_residual_width(self, micro, batch, backward):
        def run(eta):
            model = micro()
            pruner = NViTPruner(
                model,
                target=0.5,
                budget="latency",
                latency=LatencyTable.from_macs(model),
                eta=eta,
                groups_per_step=1,
            )
            while not pruner.done:
                backward(model, batch())
                pruner.score()
                pruner.prune_once()
            return len(pruner.history), pruner.dims.embed_dim

        (plain_calls, plain_width), (calls, width) = run(0.0), run(1e3)
        assert calls < plain_calls and width < plain_width

    def test_divided_scores_by_brute_force(self, micro):
        """The removed group has the least sum of scores over what the whole group saves."""
        model = micro(depth=1)
        table = LatencyTable.from_macs(model)
        pruner = NViTPruner(model, cost_rule="divide", latency=table, groups_per_step=1)
        scores = torch.rand(
            pruner.table.count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        saved = table.delta(pruner.dims)
        expected = {}
        for s, each in zip(pruner.structures, saved):
            units = sorted((float(scores[u]), u) for u in range(s.start, s.stop))[: s.group_size]
            expected[s.name] = sum(v for v, _ in units) / (each * s.group_size), [u for _, u in units]
        best = min(expected, key=lambda name: expected[name][0])
        (removed,) = pruner.prune_once(scores)["removed"]
        start = next(s.start for s in pruner.structures if s.name == best)
        assert removed["structure"] == best
        assert sorted(u + start for u in removed["units"]) == sorted(expected[best][1])

    def test_units_that_save_nothing_go_last(self, micro):
        class Heads:
            def query(self, dims):
                return float(sum(b.heads for b in dims.blocks))

            def delta(self, dims):
                return [0.0] + [1.0, 0.0, 0.0, 0.0] * len(dims.blocks)

        model = micro()
        pruner = NViTPruner(model, cost_rule="divide", latency=Heads(), groups_per_step=5)
        removed = pruner.prune_once(torch.zeros(pruner.table.count))["removed"]
        assert {r["structure"].rpartition(".")[2] for r in removed} == {"head"}

    def test_dead_groups_never_make_room_for_a_burst(self, micro):
        """Section 10.6: dead MLP groups above alive channels in the ranking must not be caught up with."""
        model = micro()
        pruner = NViTPruner(model, target=0.3, eta=1.0, latency=LatencyTable.from_macs(model))
        scores = torch.full((pruner.table.count,), 100.0)
        for s in pruner.structures:
            if s.kind == "mlp":
                scores[s.start : s.stop] = 0.0
        for _ in range(5):
            assert len(pruner.prune_once(scores)["removed"]) == 2
        # Dead groups rank as 0 and channels far below: a count over all ranks would now take 12 groups.
        scores.zero_()
        scores[: pruner.dims.embed_dim] = -100.0
        for _ in range(3):
            removed = pruner.prune_once(scores)["removed"]
            assert [r["structure"] for r in removed] == ["embed", "embed"]
        assert pruner.dims.embed_dim == 48 - 3 * 2 * 4

    def test_rules_exclude_each_other(self, micro):
        with pytest.raises(ValueError, match="`eta` must be 0 with cost_rule='divide'"):
            NViTPruner(micro(), cost_rule="divide", eta=0.1)
        with pytest.raises(ValueError, match="`cost_rule` must be subtract or divide"):
            NViTPruner(micro(), cost_rule="ratio")
