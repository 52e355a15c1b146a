"""CIFAR ResNets as timm models."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import pyvitfast as vf
from pyvitfast.distill import CosineClassifier


def parameters(blocks, classes=10, chans=3):
    """By hand: convolutions, two numbers a channel of each norm, the classifier."""
    total = chans * 16 * 9 + 32
    width = 16
    for out in (16, 32, 64):
        total += (width * out + (2 * blocks - 1) * out * out) * 9 + 2 * blocks * 2 * out
        width = out
    return total + 65 * classes


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameters_are_the_published_ones(depth, published):
    model = timm.create_model(f"resnet{depth}_cifar")
    found = sum(p.numel() for p in model.parameters())
    assert found == parameters((depth - 2) // 6)
    assert round(found / 1e6, 2) == published
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def test_teacher_of_the_paper():
    model = timm.create_model("resnet32_cifar")
    assert sum(p.numel() for p in model.parameters()) == 464154
    assert len(list(model.parameters())) == 95  # 31 convolutions, 31 norms, a classifier with its bias
    # 1x1 for a channel out: sides of 32, 16 and 8.
    macs = 27 * 16 * 1024 + 10 * 144 * 16 * 1024
    macs += (144 + 9 * 288) * 32 * 256 + (288 + 9 * 576) * 64 * 64 + 640
    assert vf.summary(model).macs == macs


def reference(model, x):
    """The same network from its weights: He et al., section 4.2, shortcut A."""
    s = model.state_dict()

    def conv_norm(x, name, norm, stride):
        x = F.conv2d(x, s[f"{name}.weight"], stride=stride, padding=1)
        shape = (1, -1, 1, 1)
        scale = s[f"{norm}.weight"] / (s[f"{norm}.running_var"] + 1e-5).sqrt()
        return (x - s[f"{norm}.running_mean"].view(shape)) * scale.view(shape) + s[f"{norm}.bias"].view(shape)

    x = conv_norm(x, "conv1", "bn1", 1).relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:
                short = torch.zeros_like(y)
                start = (y.shape[1] - x.shape[1]) // 2
                short[:, start : start + x.shape[1]] = x[:, :, ::2, ::2]
                x = short
            x = (x + y).relu()
    return x.flatten(2).mean(2) @ s["fc.weight"].T + s["fc.bias"]


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (9, 13)])
def test_logits(size):
    model = timm.create_model("resnet20_cifar").double()
    model.train()(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    model.eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference(model, images), rtol=1e-10, atol=1e-12)


def test_conventions_of_timm():
    model = timm.create_model("resnet20_cifar", num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    assert torch.equal(model.forward_head(features), model(images))
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)
    with pytest.raises(ValueError, match="`global_pool` must be 'avg' or None, got 'max'"):
        model.reset_classifier(3, "max")
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["std"] == (0.2023, 0.1994, 0.2010)
    assert model.pretrained_cfg["classifier"] == "fc" and model.pretrained_cfg["first_conv"] == "conv1"


@pytest.mark.parametrize("cosine", [False, True])
def test_save_and_load(tmp_path, cosine):
    model = timm.create_model("resnet20_cifar", num_classes=5, in_chans=1, cosine=cosine)
    model.reset_classifier(6)
    model.train()(torch.randn(4, 1, 8, 8))
    vf.save(model.eval(), tmp_path / "m.safetensors")
    again = vf.load(tmp_path / "m.safetensors")
    assert isinstance(again.fc, CosineClassifier) == cosine
    images = torch.randn(2, 1, 12, 12)
    assert torch.equal(again(images), model(images)) and again(images).shape == (2, 6)
    if cosine:
        assert model(images).abs().max().item() <= 1 + 1e-6


def test_micro_student_with_two_heads(tmp_path):
    model = timm.create_model("deit_micro_distilled_patch2_8").train()
    plain = timm.create_model("vit_micro_patch2_8")
    # A token, its position, its head.
    more = 48 + 48 + 49 * 10
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + more
    model.set_distilled_training(True)
    images = torch.randn(2, 1, 8, 8)
    assert [part.shape for part in model(images)] == [(2, 10), (2, 10)]
    vf.save(model.eval(), tmp_path / "m.safetensors")
    assert torch.equal(vf.load(tmp_path / "m.safetensors")(images), model(images))


def test_resnet50_with_a_cosine_classifier(tmp_path):
    """timm's network but for the classifier, which has no bias."""
    model = timm.create_model("resnet50_cosine", num_classes=7).eval()
    plain = timm.create_model("resnet50", num_classes=7)
    count = sum(p.numel() for p in plain.parameters()) - 7
    assert sum(p.numel() for p in model.parameters()) == count
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = [[F.cosine_similarity(f, w, dim=0) for w in model.fc.weight] for f in features]
    torch.testing.assert_close(model(images), torch.tensor(expected))
    vf.save(model, tmp_path / "m.safetensors")
    assert torch.equal(vf.load(tmp_path / "m.safetensors").eval()(images), model(images))
    model.reset_classifier(3)
    assert model(images).abs().max() <= 1.00001
