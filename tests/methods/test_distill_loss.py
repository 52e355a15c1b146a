"""DeiTLTLoss against hand-worked numbers, timm's targets and float64 formulas."""

import random

import numpy as np
import pytest
import timm.data
import timm.scheduler
import torch
import torch.nn.functional as F

from pyvitfast.distill import (
    DeiTLTConfig,
    DeiTLTLoss,
    LDAMLoss,
    MixedLabels,
    PairedMixup,
    effective_number_weights,
)

CLS = torch.tensor([[2, 1, 0], [0, 0, 1]], dtype=torch.float64)
DIST = torch.tensor([[1, 0, 0], [0, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[3, 0, 0], [0, 4, 1]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])
MIXED = MixedLabels(LABELS, LABELS.flip(0), torch.tensor(0.75, dtype=torch.float64))
SOFT = (
    torch.tensor([[8.5, 0.4, 3.1], [3.1, 0.4, 8.5]], dtype=torch.float64) / 12
)  # .0333 + .9 (.75, 0, .25) in twelfths
COUNTS = [100, 10, 1]


def run(epoch, target, cls=CLS, dist=DIST, teacher=TEACHER, counts=COUNTS, divisor=None, **settings):
    """Loss, its parts, and the gradients of both heads."""
    loss = DeiTLTLoss(counts, **{"drw_epoch": 10, **settings})
    loss.set_epoch(epoch)
    heads = [part.clone().requires_grad_() for part in (cls, dist)]
    value = loss(tuple(heads), target, teacher, divisor=divisor)
    return value.detach(), loss.parts, *torch.autograd.grad(value, heads)


def near(found, expected, atol=5e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


BEFORE_CLS = [[-0.01077309, 0.05284878, -0.04207569], [-0.01159794, 0.04465206, -0.03305411]]
AFTER_CLS = [[-0.08368976, 0.06118212, 0.02250764], [0.05298539, 0.05298539, -0.10597078]]
BEFORE_DIST = [[-0.10597078, 0.05298539, 0.05298539], [0.02662674, -0.22337326, 0.19674651]]
AFTER_DIST = [[-0.01934631, 0.00967316, 0.00967316], [0.04839244, -0.40596688, 0.35757445]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("epoch", "keep", "cls", "dist", "total", "cls_grad", "dist_grad"),
    [
        (9, False, 0.45017934, 0.69774737, 1.14792671, BEFORE_CLS, BEFORE_DIST),
        (10, False, 0.23976267, 1.04272635, 1.28248902, AFTER_CLS, AFTER_DIST),
        (10, True, 0.45017934, 1.04272635, 1.49290569, BEFORE_CLS, AFTER_DIST),
    ],
    ids=["before", "after", "after with mixing"],
)
def test_toy(epoch, keep, cls, dist, total, cls_grad, dist_grad, dense):
    mixes = epoch < 10 or keep
    target = (SOFT if dense else MIXED) if mixes else (F.one_hot(LABELS, 3).double() if dense else LABELS)
    found = run(epoch, target, mixing_after_drw=keep)
    near(found[0], total)
    near(found[1].cls_loss / 2, cls)
    near(found[1].dist_loss / 2, dist)
    near(found[2], cls_grad)
    near(found[3], dist_grad)


def test_rows_of_the_toy():
    soft = -(SOFT * CLS.log_softmax(1)).sum(1)
    near(soft, [0.95760596, 0.84311138])
    for i, expected in enumerate((0.95760596, 0.84311138)):
        mixed = MixedLabels(LABELS[[i]], LABELS[[1 - i]], MIXED.lam)
        near(run(0, mixed, CLS[[i]], DIST[[i]], TEACHER[[i]])[1].cls_loss, expected)
    for i, (hard, dist) in enumerate(((0.40760596, 0.55144471), (0.55144471, 2.23954477))):
        parts = run(10, LABELS[[i]], CLS[[i]], DIST[[i]], TEACHER[[i]])[1]
        near(parts.cls_loss, hard)
        near(parts.dist_loss, dist)


def test_mixed_targets_as_timm_builds_them():
    near(MIXED.probabilities(3, 0.1), SOFT)
    theirs = timm.data.mixup.mixup_target(LABELS, 3, 0.75, 0.1)
    torch.testing.assert_close(MIXED.probabilities(3, 0.1).float(), theirs)


def test_batch_of_one_has_no_weights_and_micro_batches_are_not_the_batch():
    whole = run(10, LABELS)[1].dist_loss
    near(whole, 2.08545271, 1e-8)
    halves = [run(10, LABELS[[i]], CLS[[i]], DIST[[i]], TEACHER[[i]])[1].dist_loss for i in range(2)]
    near(sum(halves) / 2, 1.39549474)
    for i in range(2):
        near(halves[i], F.cross_entropy(DIST[[i]], TEACHER[[i]].argmax(1)), 1e-12)


def test_global_weights_make_micro_batches_one_batch():
    loss = DeiTLTLoss(COUNTS, drw_epoch=0, weight_norm="global")
    labels = TEACHER.argmax(1)
    divisor = loss.window_divisor([labels[[0]], labels[[1]]])
    halves = [
        run(10, LABELS[[i]], CLS[[i]], DIST[[i]], TEACHER[[i]], weight_norm="global", divisor=divisor)
        for i in range(2)
    ]
    near(sum(h[1].dist_loss for h in halves) / 2, 2.08545271)
    near(torch.cat([h[3] for h in halves]) / 2, AFTER_DIST)
    near(run(10, LABELS, weight_norm="global")[1].dist_loss, 2.08545271)


def test_class_norm_divides_by_the_batch():
    weights = effective_number_weights(COUNTS)[TEACHER.argmax(1)]
    rows = F.cross_entropy(DIST, TEACHER.argmax(1), reduction="none")
    near(run(10, LABELS, weight_norm="classes")[1].dist_loss, (weights * rows).mean(), 1e-9)
    near(run(9, LABELS, weight_norm="classes")[1].dist_loss, rows.mean(), 1e-12)


def random_batch(batch=16, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    cls, dist, teacher = (torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(3))
    labels, partners = (torch.randint(classes, (batch,), generator=g) for _ in range(2))
    return cls, dist, teacher, labels, partners


def test_gradients_of_rows_sum_to_zero_and_follow_the_weights():
    cls, dist, teacher, labels, _ = random_batch()
    counts = [500, 200, 50, 10, 2]
    _, _, cls_grad, dist_grad = run(10, labels, cls, dist, teacher, counts)
    near(cls_grad.sum(1), torch.zeros(16), 1e-15)
    near(dist_grad.sum(1), torch.zeros(16), 1e-15)
    plain = run(9, labels, cls, dist, teacher, counts)[3]
    weights = effective_number_weights(counts)[teacher.argmax(1)]
    # To the bit of the weights as float64; the plain gradient has W = B.
    near(dist_grad, plain * (16 * weights / weights.sum())[:, None], 1e-15)


def test_equal_weights_are_no_weights():
    cls, dist, teacher, labels, _ = random_batch()
    weighted = run(10, labels, cls, dist, teacher, [7] * 5)
    plain = run(9, labels, cls, dist, teacher, [7] * 5, smoothing=0.0)
    for one, other in zip((weighted[0], *weighted[1], *weighted[2:]), (plain[0], *plain[1], *plain[2:])):
        near(one, other, 1e-15)


def test_swapped_partners_are_no_change():
    cls, dist, teacher, labels, partners = random_batch()
    lam = torch.tensor(0.3, dtype=torch.float64)
    one = run(0, MixedLabels(labels, partners, lam), cls, dist, teacher, [1] * 5)
    other = run(0, MixedLabels(partners, labels, 1 - lam), cls, dist, teacher, [1] * 5)
    near(one[0], other[0], 1e-14)
    near(one[2], other[2], 1e-15)


def test_whole_lam_without_smoothing_is_cross_entropy():
    cls, dist, teacher, labels, partners = random_batch()
    mixed = MixedLabels(labels, partners, torch.tensor(1.0, dtype=torch.float64))
    found = run(0, mixed, cls, dist, teacher, [1] * 5, smoothing=0.0)
    near(found[1].cls_loss, F.cross_entropy(cls, labels), 1e-14)
    smooth = run(0, labels, cls, dist, teacher, [1] * 5)
    near(smooth[1].cls_loss, F.cross_entropy(cls, labels, label_smoothing=0.1), 1e-14)


def test_probabilities_that_do_not_sum_to_one():
    cls, dist, teacher, *_ = random_batch()
    target = torch.rand(16, 5, dtype=torch.float64)
    found = run(0, target, cls, dist, teacher, [1] * 5)
    p = cls.softmax(1)
    near(found[2], 0.5 / 16 * (p * target.sum(1, keepdim=True) - target), 1e-15)


@pytest.mark.parametrize("dense", [False, True])
def test_batch_of_empty_classes_has_no_loss(dense):
    teacher = torch.tensor([1, 1])
    target = F.one_hot(LABELS, 3).double() if dense else LABELS
    found = run(10, target, teacher=teacher, counts=[100, 0, 10], empty="zero")
    assert float(found[1].dist_loss) == 0
    assert torch.equal(found[3], torch.zeros_like(DIST))
    near(found[0], F.cross_entropy(CLS, LABELS) / 2, 1e-12)
    with pytest.raises(ValueError, match="no images of classes 1"):
        DeiTLTLoss([100, 0, 10])


def test_phases():
    loss = DeiTLTLoss(COUNTS, drw_epoch=3)
    phases = []
    for epoch in range(5):
        loss.set_epoch(epoch)
        phases.append((loss.reweights, loss.mixes))
    assert phases == [(False, True)] * 3 + [(True, False)] * 2
    loss.set_epoch(1)
    assert not loss.reweights
    kept = DeiTLTLoss(COUNTS, drw_epoch=0, mixing_after_drw=True)
    assert kept.reweights and kept.mixes
    never = DeiTLTLoss(COUNTS)
    never.set_epoch(10**6)
    assert not never.reweights and never.mixes
    with pytest.raises(ValueError, match="`epoch` must be at least 0, got -1"):
        loss.set_epoch(-1)


def test_nothing_of_the_loss_is_in_a_state_dict():
    assert not DeiTLTLoss(COUNTS).state_dict() and not list(DeiTLTLoss(COUNTS).parameters())


def test_low_precision_logits_are_summed_in_float32():
    cls, dist, teacher, labels, _ = random_batch()
    loss = DeiTLTLoss([500, 200, 50, 10, 2], drw_epoch=0)
    heads = tuple(part.bfloat16().requires_grad_() for part in (cls, dist))
    value = loss(heads, labels, teacher.bfloat16())
    assert value.dtype == torch.float32
    value.backward()
    assert heads[0].grad.dtype == torch.bfloat16
    wide = tuple(part.detach().double() for part in heads)
    expected = run(10, labels, *wide, teacher.bfloat16().double(), [500, 200, 50, 10, 2])[0]
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_bad_calls():
    loss = DeiTLTLoss(COUNTS, drw_epoch=1)
    with pytest.raises(TypeError, match=r"got one tensor. Call model.set_distilled_training\(True\)"):
        loss(CLS, LABELS, TEACHER)
    with pytest.raises(ValueError, match=r"two tensors \[B, 3\].* got \[2, 4\] and \[2, 4\]"):
        loss((torch.zeros(2, 4), torch.zeros(2, 4)), LABELS, TEACHER)
    with pytest.raises(ValueError, match=r"`target` must be probabilities \[2, 3\], got \[2, 2\]"):
        loss((CLS, DIST), torch.zeros(2, 2), TEACHER)
    with pytest.raises(ValueError, match=r"teacher|label"):
        loss((CLS, DIST), LABELS, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="label"):
        loss((CLS, DIST), torch.tensor([-1, 0]), TEACHER)
    for outside in (-100, -1, 3):  # torch would pass over -100, and read -1 as the last
        with pytest.raises(RuntimeError, match="out of bounds"):
            loss((CLS, DIST), SOFT, torch.tensor([0, outside]))
    loss.set_epoch(1)
    with pytest.raises(ValueError, match="plain labels from epoch 1 on"):
        loss((CLS, DIST), MIXED, TEACHER)
    with pytest.raises(TypeError, match="either `config` or single settings"):
        DeiTLTLoss(COUNTS, 0.3, config=DeiTLTConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "`alpha` must be from 0 to 1, got 1.5"),
        ({"beta": 1.0}, "`beta` must be at least 0 and below 1"),
        ({"smoothing": -0.1}, "`smoothing` must be from 0 to 1"),
        ({"drw_epoch": -1}, "`drw_epoch` must be a whole number of at least 0, or None for never, got -1"),
        ({"drw_epoch": (5,)}, "`drw_epoch` must be a whole number"),
        ({"weight_norm": "rank"}, "`weight_norm` must be one of batch, global, classes, got 'rank'"),
        ({"empty": ""}, "`empty` must be one of error, zero, one"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        DeiTLTConfig(**changes)


def test_config_round_trip():
    config = DeiTLTConfig(alpha=0.3, drw_epoch=7, weight_norm="global")
    assert DeiTLTConfig.from_dict(config.to_dict()) == config
    assert DeiTLTLoss(COUNTS, config=config).drw_epoch == 7
    with pytest.raises(ValueError, match="unknown key 'gamma'"):
        DeiTLTConfig.from_dict({"gamma": 1})


@pytest.mark.parametrize("settings", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0, "mixup_alpha": 0.0}])
def test_pairs_have_the_pixels_and_targets_of_timm(settings):
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
    for seed in range(5):
        np.random.seed(seed)
        theirs, dense = timm.data.Mixup(num_classes=4, label_smoothing=0.1, **settings)(
            images.clone(), labels
        )
        np.random.seed(seed)
        mine, mixed = PairedMixup(**settings)(images.clone(), labels)
        assert torch.equal(mine, theirs)
        assert mixed.lam.shape == () and torch.equal(mixed.partners, labels.flip(0))
        torch.testing.assert_close(mixed.probabilities(4, 0.1), dense)


def test_mixing_refuses_odd_batches_and_other_modes():
    with pytest.raises(ValueError, match="even number of images, got 5"):
        PairedMixup()(torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="`mode` must be 'batch', got 'elem'"):
        PairedMixup(mode="elem")


def test_learning_rate_of_the_published_schedule():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.5e-4)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1200, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5
    )
    expected = {0: 1e-6, 1: 5.08e-5, 5: 2.4999e-4, 600: 1.30e-4, 1100: 1.4089e-5, 1199: 1.0000e-5}
    for epoch, lr in expected.items():
        schedule.step(epoch)
        # As many digits as are published.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=3e-4 if epoch != 600 else 4e-3)


def test_random_state_is_left_alone():
    random.seed(0)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    run(10, LABELS)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("norm", ["batch", "global", "classes"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_empty_batch_has_no_loss(norm, dense, epoch):
    loss = DeiTLTLoss(COUNTS, drw_epoch=1, weight_norm=norm)
    loss.set_epoch(epoch)
    logits = torch.zeros(0, 3, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    found = loss((logits, logits), torch.zeros(0, 3) if dense else labels, labels)
    found.backward()
    assert found.item() == 0 and logits.grad.shape == (0, 3)


@pytest.mark.parametrize("kind", [DeiTLTLoss, LDAMLoss])
def test_epochs_do_not_compile_anew(kind):
    torch._dynamo.reset()
    loss = kind(COUNTS, drw_epoch=10)
    arguments = (CLS.tanh(), LABELS) if kind is LDAMLoss else ((CLS, DIST), LABELS, TEACHER)
    graphs = []
    compiled = torch.compile(
        loss, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]
    )
    for epoch in range(20):
        loss.set_epoch(epoch)
        near(compiled(*arguments), loss(*arguments), 1e-12)
    assert len(graphs) == 2
