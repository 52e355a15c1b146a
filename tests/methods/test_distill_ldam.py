"""Margins, deferred weights and the cosine classifier."""

import pytest
import torch
import torch.nn.functional as F

from pyvitfast.distill import CosineClassifier, LDAMLoss, effective_number_weights, long_tail_counts


def test_hand_worked_loss():
    loss = LDAMLoss([100, 10, 1])
    cosines = torch.tensor([[0.6, 0.2, 0.1]], dtype=torch.float64)
    label = torch.tensor([1])
    assert float(loss(cosines, label)) == pytest.approx(20.43512, abs=5e-6)
    assert float(LDAMLoss([100, 10, 1], max_margin=0.0)(cosines, label)) == pytest.approx(12.00001, abs=5e-6)
    expected = torch.tensor([0.15811388, 0.28117066, 0.5], dtype=torch.float64)
    torch.testing.assert_close(loss.margins, expected, rtol=0, atol=5e-9)


def test_margins_of_cifar10():
    expected = ".15811 .17970 .20424 .23209 .26383 .29977 .34068 .38722 .44050 .5"
    wanted = torch.tensor([float(m) for m in expected.split()], dtype=torch.float64)
    found = LDAMLoss(long_tail_counts(5000, 10, 100)).margins
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


def test_weights_begin_at_their_epoch():
    counts = [100, 10, 1]
    loss = LDAMLoss(counts, drw_epoch=2)
    cosines = torch.rand(8, 3, dtype=torch.float64) * 2 - 1
    labels = torch.randint(3, (8,))
    logits = 30 * cosines
    logits[torch.arange(8), labels] -= 30 * 0.5 * torch.tensor(counts, dtype=torch.float64)[labels] ** -0.25
    rows = F.cross_entropy(logits, labels, reduction="none")
    weights = effective_number_weights(counts)[labels]
    for epoch, expected in ((1, rows.mean()), (2, (weights * rows).sum() / weights.sum())):
        loss.set_epoch(epoch)
        torch.testing.assert_close(loss(cosines, labels), expected, rtol=1e-12, atol=0)


def test_low_precision_is_computed_in_float32():
    assert LDAMLoss([3, 2])(torch.zeros(1, 2, dtype=torch.float16), torch.tensor([0])).dtype == torch.float32


def test_empty_classes():
    with pytest.raises(ValueError, match="no images of classes 1"):
        LDAMLoss([100, 0, 1])
    assert LDAMLoss([100, 0, 1], empty="zero").margins.tolist() == pytest.approx([0.15811388, 0, 0.5])
    assert LDAMLoss([100, 0, 1], empty="one").margins.tolist() == pytest.approx([0.15811388, 0.5, 0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "`scale` must be finite and positive, got 0.0"),
        ({"max_margin": -0.1}, "`max_margin` must be"),
        ({"drw_epoch": 1.5}, "`drw_epoch` must be a whole number"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        LDAMLoss([2, 1], **changes)


def test_bad_shape():
    with pytest.raises(ValueError, match=r"`cosines` must be \[B, 2\], .* got \[1, 3\]"):
        LDAMLoss([2, 1])(torch.zeros(1, 3), torch.tensor([0]))


def test_cosine_classifier():
    layer = CosineClassifier(6, 4).double()
    assert (layer.in_features, layer.out_features) == (6, 4) and len(list(layer.parameters())) == 1
    features = torch.randn(5, 6, dtype=torch.float64)
    expected = F.cosine_similarity(features[:, None], layer.weight.detach()[None], dim=-1)
    torch.testing.assert_close(layer(features).detach(), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(layer(7 * features), layer(features), rtol=1e-12, atol=1e-15)


def test_nothing_to_learn_is_a_loss_of_zero():
    loss = LDAMLoss([100, 0, 1], empty="zero", drw_epoch=1)
    for epoch, labels in ((0, []), (1, []), (1, [1, 1])):
        loss.set_epoch(epoch)
        cosines = torch.rand(len(labels), 3, requires_grad=True)
        found = loss(cosines, torch.tensor(labels, dtype=torch.long))
        found.backward()
        assert found.item() == 0 and not cosines.grad.any()
    assert LDAMLoss([0, 0], empty="zero").margins.tolist() == [0, 0]
