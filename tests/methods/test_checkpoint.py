"""Model files: round trips, damage, and saves that fail."""

import json
import os
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyvitfast as vf
from pyvitfast.models import ViTConfig
from pyvitfast.prune import NViTPruner


@pytest.fixture
def slim(micro):
    pruner = NViTPruner(micro(True), target=0.5)
    generator = torch.Generator().manual_seed(0)
    while not pruner.done:
        pruner.prune_once(torch.rand(pruner.table.count, generator=generator))
    return pruner.compact().eval()


def equal(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )


def test_pruned_model_round_trip(slim, batch, tmp_path):
    slim.pretrained_cfg = slim.default_cfg = {"architecture": "deit_micro", "mean": (0.5, 0.5)}
    path = tmp_path / "m.safetensors"
    vf.save(slim, path)
    again = vf.load(path)
    assert type(again) is type(slim)
    assert equal(slim, again)
    assert not again.training
    assert again.pretrained_cfg == slim.pretrained_cfg
    assert torch.equal(again(batch()[0]), slim(batch()[0]))
    assert ViTConfig.from_model(again) == ViTConfig.from_model(slim)
    vf.save(again, str(path))
    assert equal(vf.load(str(path)), slim)


def test_timm_models_round_trip(micro, tmp_path):
    models = [
        micro(),
        micro(True).double().train(),
        micro(reg_tokens=2, global_pool="avg", init_values=0.1).bfloat16(),
        timm.create_model("vit_tiny_patch16_224", num_classes=3),
        timm.create_model("resnet18", num_classes=5, in_chans=1),
        timm.create_model("test_vit4", num_classes=3),
    ]
    for model in models:
        vf.save(model, tmp_path / "m.safetensors")
        again = vf.load(tmp_path / "m.safetensors")
        assert type(again) is type(model)
        assert equal(model, again)
        assert again.training == model.training


def test_changed_head_is_kept(tmp_path):
    for name in ("vit_tiny_patch16_224", "resnet18"):
        model = timm.create_model(name)
        model.reset_classifier(4)
        vf.save(model, tmp_path / "m.safetensors")
        assert equal(vf.load(tmp_path / "m.safetensors"), model)


def test_compiled_model_is_saved_as_its_module(slim, tmp_path):
    vf.save(torch.compile(slim), tmp_path / "m.safetensors")
    assert equal(vf.load(tmp_path / "m.safetensors"), slim)


def test_the_file_holds_no_pickle_and_plain_names(slim, tmp_path):
    vf.save(slim, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    ours = json.loads(header["__metadata__"]["pyvitfast"])
    assert ours["format_version"] == 1
    assert ours["architecture"]["config"]["dims"] == ViTConfig.from_model(slim).dims.to_dict()
    assert load_file(tmp_path / "m.safetensors").keys() == slim.state_dict().keys()


def edit(path, change):
    """Rewrite the file with changed metadata or tensors and a correct layout."""
    tensors = load_file(path)
    data = path.read_bytes()
    ours = json.loads(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["pyvitfast"])
    change(ours, tensors)
    save_file(tensors, path, {"pyvitfast": json.dumps(ours)})


class TestLoadErrors:
    @pytest.fixture
    def path(self, slim, tmp_path):
        vf.save(slim, tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="`path` must be a file") as error:
            vf.load(tmp_path / "none.safetensors")
        assert "none.safetensors" in str(error.value)
        with pytest.raises(FileNotFoundError):
            vf.load(tmp_path)

    def test_wrong_suffix(self, tmp_path):
        (tmp_path / "m.pth").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"must end in \.safetensors"):
            vf.load(tmp_path / "m.pth")

    @pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
    def test_truncated(self, keep, path):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match="truncated or corrupted"):
            vf.load(path)

    def test_one_flipped_bit(self, path):
        data = bytearray(path.read_bytes())
        data[-1000] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match="SHA-256"):
            vf.load(path)

    def test_not_ours(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match="without our metadata"):
            vf.load(tmp_path / "m.safetensors")

    def test_unknown_version(self, path):
        edit(path, lambda ours, _: ours.update(format_version=99))
        with pytest.raises(ValueError, match=r"format version 1, got 99 .* Upgrade pyvitfast"):
            vf.load(path)

    def test_metadata_that_is_not_json(self, path):
        save_file(load_file(path), path, {"pyvitfast": "{"})
        with pytest.raises(ValueError, match="must be JSON"):
            vf.load(path)

    def test_wrong_shape(self, path):
        edit(path, lambda _, tensors: tensors.update({"head.weight": torch.zeros(3, 3)}))
        with pytest.raises(ValueError, match=r"head\.weight must have shape \[10, \d+\], got \[3, 3\]"):
            vf.load(path)

    def test_missing_and_unknown_weights(self, path):
        def change(_, tensors):
            tensors["extra"] = tensors.pop("norm.bias")

        edit(path, change)
        with pytest.raises(ValueError, match="extra must have shape None"):
            vf.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda ours, _: ours["architecture"].update(kind="other"),
            lambda ours, _: ours["architecture"]["config"].pop("dims"),
            lambda ours, _: ours["architecture"]["config"].update(unknown=1),
            lambda ours, _: ours["architecture"]["config"].update(act_layer="os.system"),
            lambda ours, _: ours.pop("architecture"),
        ],
    )
    def test_damaged_architecture(self, change, path):
        edit(path, change)
        with pytest.raises(ValueError, match=r"architecture|layers must be classes"):
            vf.load(path)


class TestSaveErrors:
    def test_wrong_suffix(self, slim, tmp_path):
        with pytest.raises(ValueError, match=r"must end in \.safetensors"):
            vf.save(slim, tmp_path / "m.pt")

    def test_not_a_module(self, tmp_path):
        with pytest.raises(TypeError, match=r"must be an nn\.Module"):
            vf.save({"a": 1}, tmp_path / "m.safetensors")

    def test_model_that_cannot_be_described(self, tmp_path):
        with pytest.raises(NotImplementedError, match="Sequential"):
            vf.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_missing_folder(self, slim, tmp_path):
        with pytest.raises(FileNotFoundError, match="mkdir -p"):
            vf.save(slim, tmp_path / "no" / "m.safetensors")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder(self, slim, tmp_path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match="could not be written"):
                vf.save(slim, tmp_path / "m.safetensors")
        finally:
            tmp_path.chmod(0o700)

    @pytest.mark.parametrize("broken", ["fsync", "replace"])
    def test_failing_save_keeps_the_old_file(self, broken, slim, micro, tmp_path, monkeypatch):
        path = tmp_path / "m.safetensors"
        vf.save(slim, path)

        def fail(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, broken, fail)
            with pytest.raises(OSError, match="an existing file there is unchanged"):
                vf.save(micro(), path)
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
        assert equal(vf.load(path), slim)


def test_permissions_follow_the_umask(slim, tmp_path):
    old = os.umask(0o027)
    try:
        vf.save(slim, tmp_path / "m.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640
