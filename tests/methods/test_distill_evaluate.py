"""Heads and groups of classes."""

import pytest
import timm
import timm.optim
import torch

from pyvitfast.distill import class_groups, group_accuracy, head_logits, long_tail_counts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_heads_of_a_model_with_two(micro, batch, training, distilled):
    images, _ = batch()
    model = micro(distilled=True).train(training)
    model.set_distilled_training(distilled)
    found = head_logits(model, images)
    tokens = model.forward_features(images)
    torch.testing.assert_close(found.cls, model.head(tokens[:, 0]))
    torch.testing.assert_close(found.dist, model.head_dist(tokens[:, 1]))
    torch.testing.assert_close(found.avg, model.eval()(images))
    assert model.training is False and model.distilled_training is distilled


def test_a_model_with_one_head(batch):
    model = timm.create_model("vit_micro_patch2_8").eval()
    images, _ = batch()
    found = head_logits(model, images)
    assert all(torch.equal(part, found.avg) for part in found)


def test_average_is_of_logits():
    cls, dist = torch.tensor([4.0, 0, 3]), torch.tensor([0, 3.5, 2])

    class Two(timm.models.deit.VisionTransformerDistilled):
        def forward_features(self, x):
            return torch.stack((cls, dist))[None].expand(len(x), 2, 3)

    model = Two(img_size=8, patch_size=4, in_chans=1, embed_dim=3, depth=1, num_heads=1, num_classes=3)
    model.head, model.head_dist = torch.nn.Identity(), torch.nn.Identity()
    found = head_logits(model, torch.zeros(1, 1, 8, 8))
    assert found.avg[0].tolist() == [2, 1.75, 2.5] and int(found.avg.argmax()) == 2
    probabilities = (cls.softmax(0) + dist.softmax(0)) / 2
    assert probabilities.tolist() == pytest.approx([0.37275, 0.40554, 0.22171], abs=5e-6)
    assert int(probabilities.argmax()) == 1


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [
        (10, (3, 4, 3)),
        (100, (36, 35, 29)),
        (1000, (390, 445, 165)),
        (8142, (842, 3701, 3599)),
        (20, (6, 8, 6)),
        (7, (2, 3, 2)),
        (2, (1, 0, 1)),
        (1, (0, 1, 0)),
    ],
)
def test_index_groups(classes, sizes):
    groups = class_groups(list(range(classes, 0, -1)))
    assert list(groups) == ["head", "mid", "tail"]
    assert tuple(len(g) for g in groups.values()) == sizes
    assert [c for g in groups.values() for c in g] == list(range(classes))


def test_groups_of_cifar100():
    counts = long_tail_counts(500, 100, 100)
    index, by_count = class_groups(counts), class_groups(counts, "count")
    assert [len(g) for g in by_count.values()] == [35, 35, 30]
    # Class 35 has 98 images and class 70 has 19.
    assert 35 in index["head"] and 35 in by_count["mid"]
    assert 70 in index["mid"] and 70 in by_count["tail"]


def test_groups_are_sorted_by_count_and_stable():
    counts = [5, 200, 5, 20, 100, 101, 19, 0, 5, 200]
    groups = class_groups(counts, "count")
    assert groups == {"head": [1, 9, 5], "mid": [4, 3], "tail": [6, 0, 2, 8, 7]}
    assert class_groups(counts) == {"head": [1, 9, 5], "mid": [4, 3, 6, 0], "tail": [2, 8, 7]}
    with pytest.raises(ValueError, match="`split` must be one of index, count, got 'median'"):
        class_groups(counts, "median")


def test_means_of_classes():
    labels = torch.tensor([0] * 8 + [1] * 2 + [2] * 2)
    predictions = torch.tensor([0] * 8 + [1, 0] + [0, 0])
    found = group_accuracy(predictions, labels, {"head": [0, 1], "mid": [2, 3], "tail": [3, 4]})
    # Class 3 and 4 have no test image.
    assert found == {"overall": 75.0, "head": 75.0, "mid": 0.0}
    logits = torch.nn.functional.one_hot(predictions, 5).float()
    assert group_accuracy(logits, labels, {"head": [0, 1], "mid": [2, 3], "tail": [3, 4]}) == found


def test_groups_make_up_the_overall_accuracy_by_their_sizes():
    labels = torch.arange(10).repeat(20)
    predictions = torch.where(torch.rand(200) < 0.6, labels, torch.randint(10, (200,)))
    found = group_accuracy(predictions, labels, class_groups(long_tail_counts(5000, 10, 100)))
    mean = (3 * found["head"] + 4 * found["mid"] + 3 * found["tail"]) / 10
    assert mean == pytest.approx(found["overall"], abs=1e-10)


def test_bad_predictions():
    with pytest.raises(ValueError, match=r"must be \[N\] with N of at least 1, got \[3\] and \[2\]"):
        group_accuracy(torch.zeros(3), torch.zeros(2), {})
    with pytest.raises(ValueError, match="at least 1"):
        group_accuracy(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), {})


def test_groups_have_no_negative_classes():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="`groups` must hold class numbers from 0, got -1"):
        group_accuracy(labels, labels, {"tail": [0, -1]})


def test_two_heads_on_one_feature_are_refused():
    model = timm.create_model("levit_128s", num_classes=3).eval()
    with pytest.raises(TypeError, match="got LevitDistilled, whose two heads share a feature"):
        head_logits(model, torch.zeros(1, 3, 224, 224))


def test_the_published_student_is_timms():
    with torch.device("meta"):
        student = timm.create_model("deit_base_distilled_patch16_224", num_classes=10)
    assert sum(p.numel() for p in student.parameters()) == 85_815_572
    optimizer = timm.optim.create_optimizer_v2(student, opt="adamw", weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in student.named_parameters():
        kind = name.split(".")[-1]
        assert (id(parameter) in decayed) == (kind == "weight" and "norm" not in name)
