"""NViT's objective against its formulas in plain numpy, and the released code's reading."""

import numpy as np
import pytest
import torch

from pyvitfast.prune import DistillationConfig, DistillationLoss, both_logits

RANDOM = np.random.default_rng(0)
CLS, DIST, DENSE_CLS, DENSE_DIST, CNN = RANDOM.normal(size=(5, 6, 10)) * 3
LABELS = RANDOM.integers(10, size=6)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def cross_entropy(z, labels):
    return -log_softmax(z)[np.arange(6), labels].mean()


def divergence(student, teacher, temperature):
    """Sum over classes of p_teacher (log p_teacher - log p_student), by image."""
    s, t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    return (np.exp(t) * (t - s)).sum(1)


def compute(config, **teachers):
    def tensors(value):
        return tuple(map(torch.tensor, value)) if isinstance(value, tuple) else torch.tensor(value)

    found = DistillationLoss(config)(
        tensors((CLS, DIST)), torch.tensor(LABELS), **{k: tensors(v) for k, v in teachers.items()}
    )
    return float(found)


BOTH = {"dense": (DENSE_CLS, DENSE_DIST), "cnn": CNN}


def test_paper():
    """Equations 8 and 9 with alpha 2, temperature 4."""
    expected = cross_entropy(CLS, LABELS) + cross_entropy(DIST, CNN.argmax(1))
    expected += 2 * 16 * (divergence(CLS, DENSE_CLS, 4) + divergence(DIST, DENSE_DIST, 4)).mean()
    assert compute(DistillationConfig(kl_weight=2.0, temperature=4.0), **BOTH) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("stage", ["prune", "finetune"])
def test_released_code(stage):
    """KLDivLoss() as the code calls it: mean over images and classes, no squared temperature, times 1e5."""
    expected = 0.5 * cross_entropy((CLS + DIST) / 2, LABELS) + 0.5 * cross_entropy(DIST, CNN.argmax(1))
    if stage == "prune":
        kl = divergence((CLS + DIST) / 2, (DENSE_CLS + DENSE_DIST) / 2, 3).mean() / 10
    else:
        kl = 0.5 * (divergence(CLS, DENSE_CLS, 20) + divergence(DIST, DENSE_DIST, 20)).mean() / 10
    found = compute(DistillationConfig.preset("nvit_repo", stage), **BOTH)
    assert found == pytest.approx(expected + 1e5 * kl, rel=1e-5)


def test_alpha_of_the_code_is_a_hundred_times_the_divergence_per_image():
    student, teacher = RANDOM.normal(size=(2, 6, 1000))
    loss = DistillationLoss(DistillationConfig.preset("nvit_repo", label_weight=0.0))
    found = float(loss(torch.tensor(student), torch.tensor(LABELS), dense=torch.tensor(teacher)))
    assert found == pytest.approx(100 * divergence(student, teacher, 3).mean(), rel=1e-5)


def test_without_teachers_both_heads_are_trained():
    heads = tuple(torch.tensor(z, requires_grad=True) for z in (CLS, DIST))
    loss = DistillationLoss()(heads, torch.tensor(LABELS))
    assert loss.item() == pytest.approx(cross_entropy((CLS + DIST) / 2, LABELS))
    loss.backward()
    assert all(float(h.grad.abs().sum()) > 0 for h in heads)


def test_one_head_is_in_every_term():
    loss = DistillationLoss(DistillationConfig(temperature=2.0))
    found = float(
        loss(*map(torch.tensor, (CLS, LABELS)), dense=torch.tensor(DENSE_CLS), cnn=torch.tensor(CNN))
    )
    expected = cross_entropy(CLS, LABELS) + cross_entropy(CLS, CNN.argmax(1))
    assert found == pytest.approx(expected + 4 * divergence(CLS, DENSE_CLS, 2).mean(), rel=1e-6)


def test_mixed_labels_and_smoothing():
    mixed = RANDOM.dirichlet(np.ones(10), size=6)
    logits = torch.tensor(CLS)
    expected = -(mixed * log_softmax(CLS)).sum(1).mean()
    assert float(DistillationLoss(label_smoothing=0.1)(logits, torch.tensor(mixed))) == pytest.approx(
        expected
    )
    smooth = 0.9 * np.eye(10)[LABELS] + 0.01
    expected = -(smooth * log_softmax(CLS)).sum(1).mean()
    found = DistillationLoss(label_smoothing=0.1)(logits, torch.tensor(LABELS))
    assert float(found) == pytest.approx(expected)


def test_zero_weight_leaves_the_dense_model_out():
    config = DistillationConfig(kl_weight=0.0)
    assert compute(config, **BOTH) == compute(config, cnn=CNN)


def test_equal_models_have_no_divergence():
    config = DistillationConfig(label_weight=0.0)
    assert compute(config, dense=(CLS, DIST)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_logits_of_both_heads(micro, batch, training):
    images, _ = batch()
    model = micro(distilled=True).train(training)
    cls, dist = both_logits(model, images)
    torch.testing.assert_close((cls + dist) / 2, model(images))
    model.set_distilled_training(True)
    for one, other in zip(model.train()(images), (cls, dist)):
        torch.testing.assert_close(one, other)
    plain = micro()
    torch.testing.assert_close(both_logits(plain, images), plain(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be finite and above 0, got 0.0"),
        ({"kl_weight": -1.0}, "`kl_weight` must be finite and at least 0"),
        ({"cnn_weight": float("nan")}, "`cnn_weight` must be finite"),
        ({"kl_logits": "sum"}, "`kl_logits` must be one of each, mean_of_each, mean, got 'sum'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**changes)


def test_bad_presets_and_round_trip():
    with pytest.raises(ValueError, match="`stage` must be prune or finetune, got 'train'"):
        DistillationConfig.preset("paper", "train")
    with pytest.raises(ValueError, match="`preset` must be one of paper, nvit_repo, got 'code'"):
        DistillationConfig.preset("code")
    repo = DistillationConfig.preset("nvit_repo", temperature=5.0)
    assert DistillationConfig.from_dict(repo.to_dict()) == repo and repo.temperature == 5.0


def test_teachers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`cnn` must have .* shape \[6, 10\], got \[6, 9\]"):
        compute(DistillationConfig(), cnn=CNN[:, :9])
    with pytest.raises(ValueError, match="`dense` must have as many heads"):
        compute(DistillationConfig(), dense=DENSE_CLS)
