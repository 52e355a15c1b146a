"""Balanced softmax, class-weighted BCE and the control without a teacher."""

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target

from pyvitfast.distill import (
    BalancedSoftmaxLoss,
    ClassWeightedBCE,
    MixedLabels,
    TwoTokenLoss,
    effective_number_weights,
)

COUNTS = [60, 25, 9, 4]
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
MIXED = MixedLabels(LABELS, LABELS.flip(0), torch.tensor(0.75))


def test_balanced_softmax():
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    p = counts * LOGITS.exp()
    p = p / p.sum(1, keepdim=True)
    expected = -p[torch.arange(6), LABELS].log().mean()
    torch.testing.assert_close(BalancedSoftmaxLoss(COUNTS)(LOGITS, LABELS), expected, rtol=1e-12, atol=0)
    dense = mixup_target(LABELS, 4, 0.75, 0.1)
    expected = -(dense * p.log()).sum(1).mean()
    loss = BalancedSoftmaxLoss(COUNTS, smoothing=0.1)
    torch.testing.assert_close(loss(LOGITS, dense), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(LOGITS, MIXED), expected, rtol=1e-6, atol=0)  # float32 targets


def test_balanced_softmax_of_equal_classes_is_cross_entropy():
    found = BalancedSoftmaxLoss([3] * 4)(LOGITS, LABELS)
    torch.testing.assert_close(found, F.cross_entropy(LOGITS, LABELS), rtol=1e-12, atol=0)


def test_balanced_softmax_of_empty_classes():
    with pytest.raises(ValueError, match="no images of classes 0"):
        BalancedSoftmaxLoss([0, 1])
    with pytest.raises(ValueError, match="`empty` must be one of error, one, got 'zero'"):
        BalancedSoftmaxLoss([0, 1], empty="zero")
    assert BalancedSoftmaxLoss([0, 1], empty="one").log_prior.exp().tolist() == pytest.approx([0.5, 0.5])


def test_class_weighted_bce():
    weights = effective_number_weights(COUNTS)
    targets = F.one_hot(LABELS, 4).double()
    p = LOGITS.sigmoid()
    rows = -(weights * (targets * p.log() + (1 - targets) * (1 - p).log()))
    found = ClassWeightedBCE(COUNTS)(LOGITS, LABELS)
    assert float(found) == pytest.approx(float(rows.mean()), rel=1e-6)  # timm's is float32
    mixed = ClassWeightedBCE(COUNTS, smoothing=0.1)
    dense = mixup_target(LABELS, 4, 0.75, 0.1)
    torch.testing.assert_close(mixed(LOGITS, MIXED), mixed(LOGITS, dense))


def test_two_tokens_without_a_teacher():
    dense = mixup_target(LABELS, 4, 0.75, 0.1).double()
    other = LOGITS.flip(0)
    expected = 0.7 * F.cross_entropy(LOGITS, dense) + 0.3 * F.cross_entropy(other, dense)
    found = TwoTokenLoss(0.3)((LOGITS, other), MIXED)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    smooth = TwoTokenLoss()((LOGITS, LOGITS), LABELS)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(smooth, expected, rtol=1e-12, atol=0)


def test_shares_out_of_range():
    with pytest.raises(ValueError, match="TwoTokenLoss: `alpha` must be from 0 to 1, got 1"):
        TwoTokenLoss(1.5)
    with pytest.raises(ValueError, match="TwoTokenLoss: `smoothing` must be from 0 to 1, got nan"):
        TwoTokenLoss(0.5, float("nan"))
    with pytest.raises(ValueError, match="BalancedSoftmaxLoss: `smoothing` must be from 0 to 1, got -0"):
        BalancedSoftmaxLoss(COUNTS, -0.1)
    with pytest.raises(
        ValueError, match="ClassWeightedBCE: `smoothing` must be at least 0 and below 1, got 1"
    ):
        ClassWeightedBCE(COUNTS, smoothing=1)
