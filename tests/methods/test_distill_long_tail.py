"""Long-tailed subsets to the index, class order and class maps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyvitfast.distill import checked_class_map, class_ranks, long_tail_counts, long_tail_indices


@pytest.mark.parametrize(
    ("imbalance", "counts", "total"),
    [
        (10, "5000 3871 2997 2320 1796 1391 1077 834 645 500", 20431),
        (50, "5000 3237 2096 1357 878 568 368 238 154 100", 13996),
        (100, "5000 2997 1796 1077 645 387 232 139 83 50", 12406),
        (200, "5000 2775 1540 854 474 263 146 81 45 25", 11203),
        (1 / 0.01, "5000 2997 1796 1077 645 387 232 139 83 50", 12406),
    ],
)
def test_counts_of_cifar10(imbalance, counts, total):
    found = long_tail_counts(5000, 10, imbalance)
    assert found == [int(n) for n in counts.split()] and sum(found) == total


@pytest.mark.parametrize(
    ("imbalance", "last", "total"), [(10, 50, 19573), (50, 10, 12608), (100, 5, 10847), (200, 2, 9502)]
)
def test_counts_of_cifar100(imbalance, last, total):
    found = long_tail_counts(500, 100, imbalance)
    assert (found[0], found[-1], sum(found)) == (500, last, total)
    if imbalance == 100:
        assert found[::10] == [500, 314, 197, 123, 77, 48, 30, 19, 12, 7] and found[-4:] == [5] * 4
        assert (found[35], found[36], found[70], found[71]) == (98, 93, 19, 18)


def test_step():
    assert long_tail_counts(5000, 10, 100, "step") == [5000] * 5 + [50] * 5
    assert long_tail_counts(100, 3, 10, "step") == [100, 10, 10]
    labels = [c for c in range(4) for _ in range(20)]
    kept = long_tail_indices(labels, 10, "step")
    assert np.bincount([labels[i] for i in kept]).tolist() == [20, 20, 2, 2]


def ranks_in_class(labels, kept):
    """By class, the place of each kept image among those of its class."""
    labels = np.asarray(labels)
    place = np.empty(len(labels), dtype=int)
    for c in range(labels.max() + 1):
        place[labels == c] = np.arange((labels == c).sum())
    chosen = labels[kept]
    assert (np.diff(chosen) >= 0).all()
    return {c: place[np.asarray(kept)[chosen == c]].tolist() for c in range(labels.max() + 1)}


def interleaved(classes, size):
    """Labels in an order as mixed as CIFAR's files."""
    return np.random.RandomState(5).permutation(np.repeat(np.arange(classes), size)).tolist()


def test_published_images_of_cifar10():
    labels = interleaved(10, 5000)
    found = ranks_in_class(labels, long_tail_indices(labels, 100))
    firsts = {
        0: [398, 3833, 4836, 4572, 636, 2545],
        1: [597, 332, 521, 3935, 4800, 1102],
        8: [1905, 4623, 1694, 4227, 2715, 3889],
        9: [2204, 3816, 2206, 2507, 1926, 4765],
    }
    for c, first in firsts.items():
        assert found[c][:6] == first
    for c, total in {1: 7517660, 2: 4449736, 5: 985831, 9: 129276}.items():
        assert sum(found[c]) == total
    generator = np.random.RandomState(0)
    for c in range(10):
        places = np.arange(5000)
        generator.shuffle(places)
        assert found[c] == places[: len(found[c])].tolist()
    assert generator.rand() == 0.7290947260117723


def test_published_images_of_cifar100():
    labels = interleaved(100, 500)
    found = ranks_in_class(labels, long_tail_indices(labels, 100))
    assert found[0][:6] == [90, 254, 283, 445, 461, 15]
    assert found[99] == [348, 153, 363, 361, 299]
    generator = np.random.RandomState(0)
    for _ in range(100):
        generator.shuffle(np.arange(500))
    assert generator.rand() == 0.07911969913263062


def test_more_imbalance_keeps_a_prefix():
    labels = interleaved(10, 500)
    less, more = (ranks_in_class(labels, long_tail_indices(labels, rho)) for rho in (50, 100))
    assert all(more[c] == less[c][: len(more[c])] for c in range(10))


def test_global_generator_is_left_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    long_tail_indices([0, 0, 1, 1], 2)
    assert np.random.get_state()[1].tolist() == before


@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(lambda sizes: sizes[-1]),
    st.floats(1, 200, allow_nan=False),
    st.integers(0, 9),
)
def test_unequal_classes(sizes, ratio, seed):
    labels = [c for c, n in enumerate(sizes) for _ in range(n)]
    kept = long_tail_indices(labels, ratio, seed=seed)
    assert len(kept) == len(set(kept)) and kept == long_tail_indices(labels, ratio, seed=seed)
    for c, size in enumerate(sizes):
        wanted = max(sizes) / ratio ** (c / (len(sizes) - 1))
        # Rounding of the power may fall on either side of a whole number.
        assert sum(labels[i] == c for i in kept) in {
            min(size, max(1, int(w))) for w in (wanted - 1e-9, wanted + 1e-9)
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "at least one"),
        ({"labels": [0, -1]}, "class numbers from 0"),
        ({"labels": [0, 1], "imbalance": 0.5}, "`imbalance` must be finite and at least 1, got 0.5"),
        ({"labels": [0, 1], "kind": "power"}, "`kind` must be one of exp, step, got 'power'"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        long_tail_indices(**arguments)


def test_ranks_are_stable():
    assert class_ranks([5, 5, 7, 5, 7]) == [2, 3, 0, 4, 1]
    counts = torch.randint(3, (40,)).tolist()
    ranks = class_ranks(counts)
    assert sorted(range(40), key=lambda c: -counts[c]) == sorted(range(40), key=lambda c: ranks[c])


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ([0, 1], r"each of the teacher's 3 classes, got shape \[2\]"),
        ([[0, 1, 2]], r"got shape \[1, 3\]"),
        ([0, 1, 3], "from 0 to 2, got 3 for class 2"),
        ([0, 1, 10**20], "from 0 to 2, got one past int64"),
        ([0, -1, 2], "from 0 to 2, got -1 for class 1"),
        ([0, 1, 1], "each number must stand once, but 1 stands for several"),
        ([0.0, 1.0, 2.0], "numbers must be whole"),
    ],
)
def test_bad_class_maps(class_map, message):
    with pytest.raises(ValueError, match=message):
        checked_class_map(class_map, 3)


@pytest.mark.parametrize("labels", [[0.0, 1.0], ["cat", "dog"], [0, None], np.array([0.5, 1.0])])
def test_labels_that_are_no_numbers(labels):
    with pytest.raises(TypeError, match="`labels` must be whole numbers"):
        long_tail_indices(labels)


def test_labels_of_any_kind():
    labels = [0] * 20 + [1] * 20 + [2] * 20
    kept = long_tail_indices(labels, 10)
    for kind in (np.int32, np.uint8, np.uint64):
        assert long_tail_indices(np.array(labels, kind), 10) == kept
    assert long_tail_indices(torch.tensor(labels, dtype=torch.int32), 10) == kept


@pytest.mark.parametrize("class_map", [{0: 1, 1: 0}, "01", None])
def test_class_maps_that_are_no_lists(class_map):
    with pytest.raises(TypeError, match="class map: it must be a list, an array or a tensor, got"):
        checked_class_map(class_map, 2)
