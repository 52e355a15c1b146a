"""Weights by the effective number of samples, against the published and hand-worked numbers."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from timm.loss.class_weights import compute_class_weights

from pyvitfast.distill import effective_number_weights, long_tail_counts

CIFAR10 = long_tail_counts(5000, 10, 100)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.9999, [0.02715872, 0.27036887, 2.70247240]),
        (0.99, [0.04223747, 0.28004361, 2.67771892]),
        (0.0, [1.0, 1.0, 1.0]),
    ],
)
def test_three_classes(beta, expected):
    found = effective_number_weights([100, 10, 1], beta)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


def test_paper_form_is_one_over_the_effective_number():
    found = effective_number_weights([100, 10, 1], normalize=False)
    numbers = [float((1 - Decimal("0.9999") ** n) / Decimal("0.0001")) for n in (100, 10, 1)]
    torch.testing.assert_close(1 / found, torch.tensor(numbers, dtype=torch.float64), rtol=1e-12, atol=0)
    assert numbers == pytest.approx([99.5066, 9.99550, 1], abs=5e-5)


@pytest.mark.parametrize(
    ("imbalance", "expected"),
    [
        (100, "0.05061 0.07690 0.12113 0.19504 0.31881 0.52459 0.86835 1.44263 2.40922 3.99272"),
        (50, "0.08903 0.12668 0.18526 0.27606 0.41675 0.63441 0.96953 1.48945 2.29226 3.52058"),
    ],
)
def test_cifar10(imbalance, expected):
    found = effective_number_weights(long_tail_counts(5000, 10, imbalance))
    wanted = torch.tensor([float(x) for x in expected.split()], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    assert float(found.sum()) == pytest.approx(10, abs=1e-12)


def test_ratios_saturate():
    found = effective_number_weights(CIFAR10)
    assert float(found[9] / found[0]) == pytest.approx(78.89, abs=5e-3)
    ten = effective_number_weights(long_tail_counts(5000, 10, 10))
    assert float(ten[0]) == pytest.approx(0.29234, abs=5e-6)
    assert float(ten[9]) == pytest.approx(2.35852, abs=5e-6)
    hundred = effective_number_weights(long_tail_counts(500, 100, 100))
    for c, w in ((0, 0.04487566), (35, 0.22442360), (36, 0.23643036), (71, 1.21698861), (99, 4.37831256)):
        assert float(hundred[c]) == pytest.approx(w, abs=5e-9)
    assert float(hundred[99] / hundred[0]) == pytest.approx(97.565, abs=5e-4)


def test_float64_keeps_the_digits_that_float32_loses():
    exact = [(1 - 0.9999) / -math.expm1(n * math.log(0.9999)) for n in CIFAR10]
    wanted = torch.tensor(exact, dtype=torch.float64)
    wanted *= 10 / wanted.sum()
    torch.testing.assert_close(effective_number_weights(CIFAR10), wanted, rtol=1e-12, atol=0)
    single = 1 / (1 - torch.tensor(0.9999) ** torch.tensor(CIFAR10))
    single = single * 10 / single.sum()
    assert float((single.double() / wanted - 1).abs().max()) > 1e-6


def test_as_timm_and_towards_one_over_n():
    _, theirs = compute_class_weights(CIFAR10, sum(CIFAR10), "effective_num", beta=0.9999)
    torch.testing.assert_close(effective_number_weights(CIFAR10).float(), theirs, rtol=1e-6, atol=0)
    inverse = 1 / torch.tensor(CIFAR10, dtype=torch.float64)
    near = effective_number_weights(CIFAR10, beta=1 - 1e-12)
    torch.testing.assert_close(near, inverse * 10 / inverse.sum(), rtol=1e-6, atol=0)


def test_empty_classes():
    with pytest.raises(ValueError, match="no images of classes 1, 3"):
        effective_number_weights([100, 0, 10, 0, 1])
    zero = effective_number_weights([100, 0, 10, 1], empty="zero")
    assert torch.equal(zero[[0, 2, 3]], effective_number_weights([100, 10, 1])) and zero[1] == 0
    one = effective_number_weights([100, 0, 10], empty="one")
    assert torch.equal(one, effective_number_weights([100, 1, 10]))
    assert effective_number_weights([0, 0], empty="zero").tolist() == [0, 0]


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ([1, 2], {"beta": 1.0}, "`beta` must be at least 0 and below 1, got 1.0"),
        ([1, 2], {"beta": float("nan")}, "`beta` must be"),
        ([1, -2], {}, "`counts` must be finite and at least 0, got -2.0 at 1"),
        ([[1, 2]], {}, r"one number a class, \[C\], got shape \[1, 2\]"),
        ([], {}, "one number a class"),
        ([1, 2], {"empty": "two"}, "`empty` must be one of error, zero, one, got 'two'"),
    ],
)
def test_bad_values(counts, settings, message):
    with pytest.raises(ValueError, match=message):
        effective_number_weights(counts, **settings)


@pytest.mark.parametrize(
    "counts", [{0: 5, 1: 3}, {5, 3}, "53", ["5", "3"], [5, None], None, torch.tensor([1j, 1])]
)
def test_counts_that_are_no_numbers(counts):
    with pytest.raises(TypeError, match="effective_number_weights: `counts` must be"):
        effective_number_weights(counts)


@pytest.mark.parametrize(
    "counts", [(100, 10, 1), range(3, 0, -1), np.array([3, 2, 1], np.uint16), torch.ones(3)]
)
def test_counts_of_any_kind(counts):
    assert torch.equal(effective_number_weights(counts), effective_number_weights([int(n) for n in counts]))


def test_a_plain_mean_would_shrink_the_loss():
    counts = torch.tensor(CIFAR10, dtype=torch.float64)
    for normalize, share in ((False, 8.6e-4), (True, 0.171)):
        weights = effective_number_weights(CIFAR10, normalize=normalize)
        assert float((counts * weights).sum() / counts.sum()) == pytest.approx(share, rel=2e-3)
