"""Checkpoints in the layouts of the authors' programs, against the networks they were made from."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import pyvitfast as vf  # noqa: F401  registers the small networks with timm
from pyvitfast.distill import convert_teacher_state_dict


def network(name, **arguments):
    """With statistics of BatchNorm that are not those of the start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).train()
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def paco_layout(model, prefix="module.", width=32):
    """As MoCo's builder names it: both encoders with a head, both classifiers, the queue."""
    net = model.state_dict()
    features = model.num_features
    state = {f"encoder_q.{k}": v for k, v in net.items() if not k.startswith("fc.")}
    state |= {f"encoder_k.{k}": torch.full_like(v, 9) for k, v in net.items() if not k.startswith("fc.")}
    for encoder in ("q", "k"):
        head = torch.nn.Sequential(
            torch.nn.Linear(features, features),
            torch.nn.BatchNorm1d(features),
            torch.nn.ReLU(),
            torch.nn.Linear(features, width),
        )
        state |= {f"encoder_{encoder}.fc.{k}": v for k, v in head.state_dict().items()}
    for name, fill in (("linear", None), ("linear_k", 9.0)):
        for part in ("weight", "bias"):
            value = net[f"fc.{part}"]
            state[f"{name}.{part}"] = value if fill is None else torch.full_like(value, fill)
    state |= {"queue": torch.randn(6, width), "queue_l": torch.zeros(6), "queue_ptr": torch.zeros(1)}
    return {"epoch": 400, "arch": "x", "state_dict": {prefix + k: v for k, v in state.items()}}


def ldam_layout(model, classifier, key="state_dict", prefix=""):
    """The network alone; a cosine classifier has a column a class."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("fc."):
            value = value.T.clone() if model.state_dict().get("fc.bias") is None else value
            name = name.replace("fc", classifier)
        state[prefix + name] = value
    return {key: state}


@pytest.mark.parametrize("name", ["resnet32_cifar", "resnet50"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_paco(name, prefix):
    model = network(name, num_classes=7)
    again = timm.create_model(name, num_classes=7).eval()
    again.load_state_dict(convert_teacher_state_dict(paco_layout(model, prefix)))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("name", "classifier", "arguments"),
    [
        ("resnet32_cifar", "linear", {"cosine": True}),
        ("resnet32_cifar", "linear", {}),
        ("resnet50_cosine", "fc", {}),
        ("resnet50", "fc", {}),
    ],
)
@pytest.mark.parametrize(("key", "prefix"), [("state_dict", "module."), ("model", "")])
def test_ldam_and_cross_entropy(name, classifier, arguments, key, prefix):
    model = network(name, num_classes=7, **arguments)
    checkpoint = ldam_layout(model, classifier, key, prefix)
    again = timm.create_model(name, num_classes=7, **arguments).eval()
    again.load_state_dict(convert_teacher_state_dict(checkpoint))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    again.load_state_dict(convert_teacher_state_dict(checkpoint[key]))


def test_columns_of_the_published_cosine_classifier_are_the_classes():
    model = network("resnet32_cifar", num_classes=5, cosine=True)
    columns = torch.randn(64, 5)
    checkpoint = ldam_layout(model, "linear")
    checkpoint["state_dict"]["linear.weight"] = columns
    model.load_state_dict(convert_teacher_state_dict(checkpoint))
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = F.normalize(features, dim=1).mm(F.normalize(columns, dim=0))
    torch.testing.assert_close(model(images), expected)


def test_what_is_given_is_left_alone():
    checkpoint = ldam_layout(network("resnet32_cifar", cosine=True), "linear", prefix="module.")
    before = copy.deepcopy(checkpoint)
    convert_teacher_state_dict(checkpoint)
    assert checkpoint["state_dict"].keys() == before["state_dict"].keys()
    assert all(torch.equal(v, before["state_dict"][k]) for k, v in checkpoint["state_dict"].items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"module.decoder.weight": torch.zeros(1)}), "got decoder.weight"),
        (lambda s: s.pop("module.linear.weight"), "and no fc.weight"),
        (lambda s: s.pop("module.encoder_q.conv1.weight"), "and no conv1.weight"),
        (lambda s: s.update({"linear.weight": torch.zeros(1)}), "got module.encoder_q"),
        (lambda s: s.update({"module.linear.weight": torch.zeros(3)}), "one matrix, got shape \\[3\\]"),
    ],
)
def test_unknown_layouts_are_named(change, words):
    checkpoint = paco_layout(network("resnet20_cifar"))
    change(checkpoint["state_dict"])
    with pytest.raises(ValueError, match=words):
        convert_teacher_state_dict(checkpoint)


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ([1], "must be a mapping, got list"),
        ({}, "got nothing"),
        ({"epoch": 3, "state_dict": {"a": 1}}, "must hold tensors by name, .* got a"),
        ({"epoch": 3, "weights": {}}, "got epoch, weights"),
    ],
)
def test_what_is_no_checkpoint(checkpoint, words):
    with pytest.raises(TypeError, match=words):
        convert_teacher_state_dict(checkpoint)
