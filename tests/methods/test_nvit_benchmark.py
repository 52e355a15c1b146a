"""The paper benchmark: its gate on made-up results, its readers and its peer on tiny models."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.papers.data import Images, fashion_files, read_idx
from benchmarks.papers.nvit.criteria import CRITERIA, QUICK, SHORT, backwards
from benchmarks.papers.nvit.data import TASKS
from benchmarks.papers.nvit.gate import PEERS, claims
from benchmarks.papers.nvit.latency import between
from benchmarks.papers.training import accuracy

NAMES = {
    "nvit": "nvit",
    "magnitude": "magnitude, global",
    "random": "random",
    "mean": "square of mean",
    "plain": PEERS[0],
    "isomorphic": PEERS[1],
}


def results(**one_shot):
    return {
        NAMES[key]: {"0.4": {"one-shot": values, "finetuned": [v + 1 for v in values]}}
        for key, values in one_shot.items()
    }


def held(**one_shot):
    return [claim["held"] for claim in claims(results(**one_shot))]


GOOD = {
    "nvit": [94.0, 93.0],
    "magnitude": [40.0, 84.0],
    "random": [10.0, 12.0],
    "mean": [80.0, 82.0],
    "plain": [80.0, 82.0],
    "isomorphic": [88.0, 89.0],
}


def test_gate_reads_means_over_seeds():
    good = claims(results(**GOOD))
    assert [claim["held"] for claim in good] == [True] * 7
    assert [claim["measured"] for claim in good] == [93.5, 94.5, 31.5, 82.5, 12.5, 31.5, 5.0]
    bad = {key: [92.4] for key in GOOD}
    assert held(**bad) == [False] * 7


def test_gate_takes_the_better_peer_and_not_the_absent_one():
    assert held(**GOOD | {"plain": [94.0]})[-1] is False
    assert held(**GOOD | {"plain": []})[-1] is True
    last = claims(results(**GOOD | {"plain": [], "isomorphic": []}))[-1]
    assert (last["held"], last["measured"]) == (False, None)


def test_named_criteria_exist():
    assert set(QUICK) < set(CRITERIA)
    assert set(SHORT) < set(CRITERIA)


def test_interpolation_between_latencies():
    points = [(1.0, 90.0), (0.5, 80.0), (0.8, 88.0)]
    assert between(points, 0.65) == pytest.approx(84.0)
    assert between(points, 1.0) == 90.0
    assert between(points, 0.4) is None


def write_idx(file, values, kind=8):
    header = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def test_idx_reader(tmp_path):
    values = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    write_idx(tmp_path / "a.gz", values)
    assert torch.equal(read_idx(tmp_path / "a.gz"), values)
    write_idx(tmp_path / "b.gz", values, kind=13)
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(tmp_path / "b.gz")
    (tmp_path / "c.gz").write_bytes(gzip.compress(gzip.decompress((tmp_path / "a.gz").read_bytes())[:-1]))
    with pytest.raises(ValueError, match="23 bytes"):
        read_idx(tmp_path / "c.gz")


def test_missing_images_are_told_in_one_line(tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr("benchmarks.papers.data.PACKAGED", tmp_path / "none")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    with pytest.raises(SystemExit, match=r"no network.*--data-dir") as told:
        fashion_files(tmp_path)
    assert "\n" not in str(told.value)


def small(seed=0):
    torch.manual_seed(seed)
    settings = {"in_chans": 1, "num_classes": 10, "depth": 2, "num_heads": 4, "weight_init": "reset"}
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=32, **settings)


def images(count=60):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10
    return Images(x, y, x, y)


def test_accuracy_counts_all_images():
    class Parity(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10)

    assert accuracy(Parity(), images(600)) == pytest.approx(10.0)


def test_held_out_images_are_training_images_left_out():
    data = images(10)
    part = data.held_out(3)
    assert torch.equal(torch.cat([part.train_x, part.test_x]), data.train_x)
    assert len(part.test_y) == 3


class TestPeer:
    @pytest.fixture(autouse=True)
    def peer(self, monkeypatch):
        pytest.importorskip("torch_pruning")
        from benchmarks.papers.nvit import criteria, peer

        monkeypatch.setattr(criteria, "SCORED_BATCHES", 2)
        monkeypatch.setattr(criteria, "SCORED_SIZE", 20)
        self.peer = peer

    @pytest.mark.parametrize("attention", ["dims", "heads", "both", "half", "none"])
    @pytest.mark.parametrize("embed", [True, False])
    def test_lands_at_the_budget_and_runs(self, attention, embed):
        setting = self.peer.Setting(isomorphic=embed, embed=embed, attention=attention, steps=2, fix="scale")
        dense, data = small(), images()
        slim = self.peer.prune_peer(dense, data, setting, 0.6, 0)
        share = self.peer.macs(slim) / self.peer.macs(dense)
        assert 0.5 < share <= 0.6
        assert slim(data.test_x).shape == (60, 10)
        assert (slim.pos_embed.shape[-1] < 32) == (embed and slim.embed_dim < 32)
        assert dense.pos_embed.shape[-1] == 32

    def test_removes_what_has_no_effect(self):
        """Head dims and hidden units with zero weights go first, and with the dense scale nothing changes."""
        model, data = small(), images()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.view(3, 4, 8, 32)[:, :, [1, 6]] = 0
                block.attn.qkv.bias.view(3, 4, 8)[:, :, [1, 6]] = 0
                block.mlp.fc1.weight[5:15] = 0
                block.mlp.fc1.bias[5:15] = 0
                block.mlp.fc2.weight[:, 5:15] = 0
                block.attn.proj.weight.view(32, 4, 8)[:, :, [1, 6]] = 0
        expected = model(data.test_x)
        for _ in backwards(model, data, 0, add=True):
            pass
        setting = self.peer.Setting(isomorphic=False, embed=False, fix="scale")
        units = 2 * (8 + 128)
        slim = self.peer.cut(model, setting, (24 - 0.5) / units)
        assert [block.attn.head_dim for block in slim.blocks] == [6, 6]
        assert [block.mlp.fc1.out_features for block in slim.blocks] == [118, 118]
        torch.testing.assert_close(slim(data.test_x), expected, rtol=1e-4, atol=1e-5)
        plain = self.peer.cut(model, replace(setting, fix="none"), (24 - 0.5) / units)
        assert (plain(data.test_x) - expected).abs().max() > 1e-4

    def test_says_why_it_failed(self):
        setting = self.peer.Setting(isomorphic=False, embed=False, attention="none", steps=1)
        with pytest.raises(self.peer.PeerFailed, match="MACs left"):
            self.peer.prune_peer(small(), images(), setting, 0.05, 0)

    def test_search_keeps_the_best_and_all_it_tried(self, monkeypatch):
        monkeypatch.setattr(self.peer, "AXES", (({"steps": 1}, {"attention": "none"}), ({"embed": False},)))
        monkeypatch.setattr(self.peer, "AGAIN", ())
        task = replace(TASKS["digits"], tuning_epochs=1)
        other = dict.fromkeys((0.7, 0.6), self.peer.Setting(isomorphic=True, round_to=2))
        found, tried = self.peer.search(
            task, [(small(), images())], False, [0.7, 0.6], other, lambda text: None
        )
        for budget in (0.6, 0.7):
            mine = [entry for entry in tried if entry["budget"] == budget]
            kept = [entry for entry in mine if entry["setting"] == vars(found[budget])]
            assert kept[0]["accuracy"] == max(entry["accuracy"] for entry in mine)
            assert len(mine) in range(3, 8)
        assert list(found) == [0.7, 0.6]


def test_command_line_refuses_contradictions():
    pytest.importorskip("torch_pruning")
    from benchmarks.papers.nvit.__main__ import main

    for bad in (["--seeds", "0"], ["--quick", "--data", "fashion-mnist"]):
        with pytest.raises(SystemExit) as stopped:
            main(bad)
        assert stopped.value.code == 2
