from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_bytes
from pyvitfast import ops, reference
from tests.ops.table import EMULATED, BadCall, OpTable, Sample, devices, strided


def inputs(batch, classes, dtype, *, logits=False, weighted=False, mixed="no", divided=False):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cls, dist = ((2 * torch.randn(batch, classes)).to(dtype) for _ in range(2))
    labels, partners, teacher = (torch.randint(classes, (batch,)) for _ in range(3))
    if logits:
        teacher = torch.randn(batch, classes).to(dtype)
    lam = {"no": None, "one": torch.tensor(0.3), "rows": torch.rand(batch)}[mixed]
    return (
        cls,
        dist,
        labels,
        teacher,
        (0.1 + torch.rand(classes)).to(wide) if weighted else None,
        None if lam is None else partners,
        None if lam is None else lam.to(wide),
        torch.tensor(3.0, dtype=wide) if divided else None,
    )


def sample(batch, classes, alpha=0.5, smoothing=0.0, **kinds):
    return lambda dtype: (
        inputs(batch, classes, dtype, **kinds),
        {"alpha": alpha, "smoothing": smoothing},
    )


def bound(args, kwargs, expected, dtype):
    # Losses are float32 sums of float32 rows; labels are exact.
    unit = 1e-13 if dtype == torch.float64 else 2e-6
    return [unit * (1 + want.double().abs()) for want in expected[:3]] + [torch.zeros_like(expected[3])]


def bad(**changes):
    def make():
        call = {
            "cls_logits": torch.ones(4, 3),
            "dist_logits": torch.ones(4, 3),
            "labels": torch.tensor([0, 1, 2, 0]),
            "teacher": torch.tensor([0, 1, 2, 0]),
        }
        return (), {**call, **changes}

    return make


ROW = torch.tensor([0, 1, 2, 0])
# On CUDA, which the emulator stands for, these make NaN: looking would wait for the device.
LABELS_OUT_OF_RANGE = (
    []
    if EMULATED
    else [
        BadCall("above", ValueError, "`labels` must be classes from 0 to 2, got 3", bad(labels=ROW + 1)),
        BadCall("below", ValueError, "`teacher` must be classes from 0 to 2, got -1", bad(teacher=ROW - 1)),
    ]
)
TABLE = OpTable(
    op="two_head_loss",
    samples=[
        Sample("hard", sample(5, 10)),
        Sample("mixed", sample(6, 33, 0.3, 0.1, mixed="one")),
        Sample("weighted_logits", sample(4, 100, logits=True, weighted=True)),
        Sample("all", sample(9, 64, 0.7, 0.2, logits=True, weighted=True, mixed="rows", divided=True)),
        Sample("wide_rows", sample(3, 1100, 0.5, 0.1, logits=True, weighted=True, mixed="one")),
        Sample("one_class", sample(2, 1, smoothing=0.1)),
        Sample("one_row", sample(1, 7, weighted=True)),
        Sample("empty_batch", sample(0, 5, weighted=True)),
    ],
    bad_calls=[
        BadCall("rank", ValueError, r"`cls_logits` must have shape \[B, C\]", bad(cls_logits=torch.ones(4))),
        BadCall("integer", TypeError, "must have dtype", bad(cls_logits=torch.ones(4, 3).int())),
        BadCall("other", ValueError, "`dist_logits` must have shape", bad(dist_logits=torch.ones(4, 2))),
        BadCall("half", ValueError, "and dtype of", bad(dist_logits=torch.ones(4, 3).half())),
        BadCall("labels", TypeError, "`labels` must be an int64", bad(labels=ROW.int())),
        BadCall("count", ValueError, r"`labels` must have shape \[4\]", bad(labels=ROW[:3])),
        *LABELS_OUT_OF_RANGE,
        BadCall("teacher", ValueError, "needs a class map", bad(teacher=torch.ones(4, 5))),
        BadCall("pair", ValueError, "`partners` and `lam` go together", bad(partners=ROW)),
        BadCall("lam", ValueError, "`lam` must have shape", bad(partners=ROW, lam=torch.ones(3))),
        BadCall("weights", ValueError, r"`weights` must have shape \[3\]", bad(weights=torch.ones(4))),
        BadCall("divisor", ValueError, "`divisor` must have shape", bad(divisor=torch.ones(4))),
        BadCall("list", TypeError, "`cls_logits` must be a tensor", bad(cls_logits=[[1.0, 2.0, 3.0]])),
        BadCall("whole", TypeError, "`weights` must have dtype", bad(weights=torch.ones(3).long())),
        BadCall("float", TypeError, "`lam` must be a tensor", bad(partners=ROW, lam=0.3)),
        BadCall("elsewhere", ValueError, "on the device of", bad(weights=torch.ones(3, device="meta"))),
        BadCall("alpha", ValueError, "`alpha` must be from 0 to 1, got 1.5", bad(alpha=1.5)),
        BadCall("nan", ValueError, "`alpha` must be from 0 to 1, got nan", bad(alpha=float("nan"))),
        BadCall("smoothing", ValueError, "`smoothing` must be from 0 to 1", bad(smoothing=-0.1)),
        BadCall("word", TypeError, "`smoothing` must be a number, got str", bad(smoothing="0.1")),
    ],
    bound=bound,
    inputs=lambda args, kwargs: list(args[:2]),
)


def by_formula(cls: Tensor, dist: Tensor, labels, teacher, weights, partners, lam, divisor, alpha, smoothing):
    """Digest section 3 with dense targets, as a user writes it."""
    classes = cls.shape[1]
    target = F.one_hot(labels, classes).to(cls)
    if partners is not None:
        share = lam.to(cls).reshape(-1, 1)
        target = share * target + (1 - share) * F.one_hot(partners, classes).to(cls)
    target = smoothing / classes + (1 - smoothing) * target
    cls_loss = -(target * cls.log_softmax(1)).sum(1).mean()
    chosen = teacher.argmax(1) if teacher.is_floating_point() else teacher
    rows = -dist.log_softmax(1)[torch.arange(len(chosen)), chosen]
    row_weights = torch.ones_like(rows) if weights is None else weights.to(rows)[chosen]
    dist_loss = (row_weights * rows).sum() / (row_weights.sum() if divisor is None else divisor.to(rows))
    return (1 - alpha) * cls_loss + alpha * dist_loss


def slopes(loss: Tensor, *heads: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, heads))


TOY = {
    "cls": torch.tensor([[2.0, 1, 0], [0, 0, 1]], dtype=torch.float64),
    "dist": torch.tensor([[1.0, 0, 0], [0, 0, 2]], dtype=torch.float64),
    "teacher": torch.tensor([[3.0, 0, 0], [0, 4, 1]], dtype=torch.float64),
    "labels": torch.tensor([0, 2]),
    # Of 100, 10 and 1 images, up to a factor: 0.02715872, 0.27036887, 2.70247240.
    "weights": torch.tensor([1e-4 / (1 - 0.9999**n) for n in (100, 10, 1)], dtype=torch.float64),
}
WEIGHTED = [[-0.01934631, 0.00967316, 0.00967316], [0.04839244, -0.40596688, 0.35757445]]
UNWEIGHTED = [[-0.10597078, 0.05298539, 0.05298539], [0.02662674, -0.22337326, 0.19674651]]
MIXED = [[-0.01077309, 0.05284878, -0.04207569], [-0.01159794, 0.04465206, -0.03305411]]
HARD = [[-0.08368976, 0.06118212, 0.02250764], [0.05298539, 0.05298539, -0.10597078]]


@pytest.mark.parametrize(
    ("mixes", "weighted", "parts", "grad_cls", "grad_dist"),
    [
        (True, False, (0.45017934, 0.69774737, 1.14792671), MIXED, UNWEIGHTED),
        (False, True, (0.23976267, 1.04272635, 1.28248902), HARD, WEIGHTED),
        (True, True, (0.45017934, 1.04272635, 1.49290569), MIXED, WEIGHTED),
    ],
)
def test_phases_by_hand(mixes, weighted, parts, grad_cls, grad_dist):
    """Digest section 11.B; the printed losses are scaled by alpha."""
    cls, dist = TOY["cls"].clone().requires_grad_(), TOY["dist"].clone().requires_grad_()
    out = ops.two_head_loss(
        cls,
        dist,
        TOY["labels"],
        TOY["teacher"],
        TOY["weights"] if weighted else None,
        *((TOY["labels"].flip(0), torch.tensor(0.75, dtype=torch.float64)) if mixes else (None, None)),
        smoothing=0.1 if mixes else 0.0,
    )
    assert out.teacher_labels.tolist() == [0, 1]
    found = (0.5 * out.cls_loss, 0.5 * out.dist_loss, out.loss)
    for got, want in zip(found, parts, strict=True):
        assert got.item() == pytest.approx(want, abs=6e-9)
    for got, want in zip(slopes(out.loss, cls, dist), (grad_cls, grad_dist), strict=True):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=6e-9)


def test_micro_batches_by_hand():
    """Digest section 11.C: the weights of a batch of one cancel, and a scale of all weights does nothing."""
    args = (TOY["cls"], TOY["dist"], TOY["labels"], TOY["teacher"])
    whole = ops.two_head_loss(*args, TOY["weights"]).dist_loss
    assert whole.item() == pytest.approx(2.08545271, abs=2e-8)
    assert ops.two_head_loss(*args, 7 * TOY["weights"]).dist_loss.item() == pytest.approx(whole.item())
    single = [
        ops.two_head_loss(*(t[i : i + 1] for t in args), TOY["weights"]).dist_loss.item() for i in range(2)
    ]
    assert sum(single) / 2 == pytest.approx(1.39549474, abs=2e-8)


@settings(max_examples=15 if EMULATED else 60, deadline=None)
@given(
    batch=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 1024, 1025, 1100]),
    mixed=st.sampled_from(["no", "one", "rows"]),
    logits=st.booleans(),
    weighted=st.booleans(),
    divided=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    layout=st.sampled_from(["contiguous", "transposed", "step", "offset", "padded"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_against_dense_targets(
    batch, classes, mixed, logits, weighted, divided, smoothing, layout, dtype, seed
):
    torch.manual_seed(seed)
    args = inputs(
        batch, classes, dtype, logits=logits, weighted=weighted, mixed=mixed, divided=divided and weighted
    )
    cls, dist = (strided(t, layout).requires_grad_() for t in args[:2])
    out = ops.two_head_loss(cls, dist, *args[2:], alpha=0.3, smoothing=smoothing)
    exact = [t.detach().double().requires_grad_() for t in (cls, dist)]
    want = by_formula(*exact, *args[2:], 0.3, smoothing)
    unit = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(out.loss.double(), want, rtol=unit, atol=unit)
    coarse = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for got, expected in zip(slopes(out.loss, cls, dist), slopes(want, *exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=coarse, atol=max(coarse * 1e-1, 1e-7))


def test_gradients_of_a_row_add_up_to_nothing():
    args = inputs(8, 50, torch.float64, weighted=True, mixed="rows")
    cls, dist = (t.requires_grad_() for t in args[:2])
    for slope in slopes(ops.two_head_loss(cls, dist, *args[2:], smoothing=0.1).loss, cls, dist):
        assert slope.sum(1).abs().max() < 1e-15


def test_label_and_partner_change_places():
    args = list(inputs(8, 50, torch.float64, mixed="rows"))
    one = ops.two_head_loss(*args, smoothing=0.1).loss
    args[2], args[5], args[6] = args[5], args[2], 1 - args[6]
    torch.testing.assert_close(ops.two_head_loss(*args, smoothing=0.1).loss, one, rtol=0, atol=1e-14)


def test_equal_weights_are_none():
    args = list(inputs(8, 50, torch.float64))
    cls, dist = (t.requires_grad_() for t in args[:2])
    plain = ops.two_head_loss(*args).loss
    args[4] = torch.full((50,), 0.37, dtype=torch.float64)
    equal = ops.two_head_loss(*args).loss
    torch.testing.assert_close(equal, plain, rtol=0, atol=1e-14)
    torch.testing.assert_close(slopes(equal, cls, dist), slopes(plain, cls, dist), rtol=0, atol=1e-16)


def test_gradient_of_a_row_scales_with_the_weight_of_the_teachers_label():
    args = list(inputs(8, 50, torch.float64, weighted=True, divided=True))
    cls, dist = (t.requires_grad_() for t in args[:2])
    weighted = slopes(ops.two_head_loss(*args).loss, cls, dist)
    shares = args[4][args[3]][:, None]
    args[4] = None
    plain = slopes(ops.two_head_loss(*args).loss, cls, dist)
    torch.testing.assert_close(weighted[1], shares * plain[1], rtol=0, atol=1e-16)
    assert torch.equal(weighted[0], plain[0])


def test_all_of_the_label_is_hard_cross_entropy():
    args = list(inputs(8, 50, torch.float64, mixed="one"))
    args[6] = torch.ones((), dtype=torch.float64)
    want = F.cross_entropy(args[0], args[2])
    torch.testing.assert_close(ops.two_head_loss(*args).cls_loss, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", [ops.two_head_loss, reference.two_head_loss])
@pytest.mark.parametrize("zero", ["weights", "divisor"])
def test_no_weight_in_a_batch(zero, form):
    args = inputs(4, 5, torch.float32)
    cls, dist = (t.requires_grad_() for t in args[:2])
    kwargs = {"weights": torch.zeros(5)} if zero == "weights" else {"divisor": torch.zeros(())}
    out = form(cls, dist, *args[2:4], **kwargs)
    assert out.dist_loss.item() == 0
    assert slopes(out.loss, cls, dist)[1].abs().max() == 0


def test_reference_passes_no_gradient_to_weights_share_or_divisor():
    args = inputs(6, 20, torch.float64, weighted=True, mixed="rows", divided=True)
    given = [args[i].requires_grad_() for i in (4, 6, 7)]
    cls = args[0].requires_grad_()
    loss = reference.two_head_loss(*args).loss
    assert torch.autograd.grad(loss, given, allow_unused=True, retain_graph=True) == (None, None, None)
    assert slopes(loss, cls)[0].abs().max() > 0


def test_reference_leaves_no_label_out():
    z, labels = torch.zeros(2, 5), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="out of bounds"):
        reference.two_head_loss(z, z, labels, torch.tensor([0, -100]))


@pytest.mark.parametrize("form", [ops.two_head_loss, reference.two_head_loss])
def test_no_weight_in_a_batch_whatever_the_logits(form):
    cls, dist, labels, teacher, *_ = inputs(4, 5, torch.float32)
    dist[1, 2] = float("nan")
    assert form(cls, dist, labels, teacher, torch.zeros(5)).dist_loss.item() == 0


def test_an_empty_batch_costs_nothing():
    cls, dist = (torch.zeros(0, 5, requires_grad=True) for _ in range(2))
    none = torch.zeros(0, dtype=torch.long)
    out = ops.two_head_loss(cls, dist, none, torch.zeros(0, 5))
    assert [part.item() for part in out[:3]] == [0, 0, 0]
    assert out.teacher_labels.shape == (0,)
    assert [tuple(slope.shape) for slope in slopes(out.loss, cls, dist)] == [(0, 5), (0, 5)]


@pytest.mark.parametrize("batch", [32, 1030])
@pytest.mark.parametrize("classes", [10, 1000])
def test_extra_memory_is_the_two_gradients(classes, batch):
    """Besides them there are the results: three losses, the teacher's labels, and the divisor."""
    args = inputs(batch, classes, torch.float32, logits=True, weighted=True, mixed="one")
    cls, dist = (t.requires_grad_() for t in args[:2])
    run = lambda: slopes(ops.two_head_loss(*args, smoothing=0.1).loss, cls, dist)  # noqa: E731
    kept = 4 * 4 + 8 * batch
    if EMULATED:  # statistics of the rows, and what the blocks of the forward pass on
        kept += batch * 4 * (4 + 3)
    assert peak_bytes(run, lambda: None, "cpu") <= 2 * cls.nbytes + kept


@pytest.mark.parametrize("batch", [1023, 1024, 1025, 2100])
def test_many_rows(batch):
    """The CPU adds losses a block of rows at a time."""
    args = inputs(batch, 3, torch.float64, logits=True, weighted=True, mixed="rows")
    out = ops.two_head_loss(*args, alpha=0.3, smoothing=0.1)
    want = by_formula(*args, 0.3, 0.1)
    torch.testing.assert_close(out.loss, want, rtol=0, atol=1e-14)


def test_second_derivatives_are_refused():
    args = inputs(3, 4, torch.float64)
    cls = args[0].requires_grad_()
    (slope,) = torch.autograd.grad(ops.two_head_loss(*args).loss.square(), cls, create_graph=True)
    with pytest.raises(NotImplementedError, match="two_head_loss_backward: second derivatives"):
        slope.sum().backward()


@pytest.mark.skipif("cuda" not in devices(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name", ["dist_logits", "labels", "teacher", "weights", "partners", "lam", "divisor"]
)
def test_what_was_left_on_the_host_is_named(name):
    names = ("cls_logits", "dist_logits", "labels", "teacher", "weights", "partners", "lam", "divisor")
    args = inputs(4, 5, torch.float32, logits=True, weighted=True, mixed="one", divided=True)
    call = {key: value if key == name else value.cuda() for key, value in zip(names, args, strict=True)}
    with pytest.raises(ValueError, match=f"`{name}` must be on the device of"):
        ops.two_head_loss(**call)


@pytest.mark.parametrize("classes", [1, 20, 23, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(dtype, classes):
    """The first are made in the forward on the CPU, the next in the backward."""
    args = inputs(6, classes, dtype, logits=True, weighted=True, mixed="rows")
    cls, dist = (t.requires_grad_() for t in args[:2])
    loss = ops.two_head_loss(cls, dist, *args[2:], smoothing=0.1).loss
    first = torch.autograd.grad(loss, (cls, dist), retain_graph=True)
    again = torch.autograd.grad(loss, (cls, dist), retain_graph=True)
    unit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(again, first, rtol=unit, atol=unit * 1e-1)
    for slope in first:
        slope.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(again, slopes(loss, cls, dist), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [65536.0, 2.0**-10, -1.0, 0.0])
def test_gradient_that_comes_in_is_a_factor(dtype, scale):
    """A loss scale lifts gradients that would be 0 in float16, before they are rounded."""
    args = inputs(64, 100, dtype, weighted=True, mixed="one")
    cls, dist = (t.requires_grad_() for t in args[:2])
    exact = [t.detach().double().requires_grad_() for t in (cls, dist)]
    want = slopes(scale * by_formula(*exact, *args[2:], 0.5, 0.1), *exact)
    found = slopes(scale * ops.two_head_loss(cls, dist, *args[2:], smoothing=0.1).loss, cls, dist)
    unit = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for got, expected in zip(found, want, strict=True):
        least = 6e-8 if dtype == torch.float16 else 0
        torch.testing.assert_close(got.double(), expected, rtol=unit, atol=least + unit * abs(scale) * 1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("head", [0, 1])
def test_one_head_may_be_frozen(head, scale):
    args = list(inputs(6, 20, torch.float64, weighted=True))
    args[head].requires_grad_()
    twins = [t.detach().clone().requires_grad_() for t in args[:2]]
    want = slopes(scale * by_formula(*twins, *args[2:], 0.5, 0.0), *twins)[head]
    (scale * ops.two_head_loss(*args).loss).backward()
    torch.testing.assert_close(args[head].grad, want, rtol=0, atol=1e-15)
    assert args[1 - head].grad is None


def test_gradients_add_up_over_steps():
    """What the forward made is not written into by the next step's."""
    args = inputs(6, 20, torch.float64)
    cls, dist = (t.requires_grad_() for t in args[:2])
    (once,) = torch.autograd.grad(by_formula(cls, dist, *args[2:], 0.5, 0.0), cls)
    for _ in range(3):
        ops.two_head_loss(*args).loss.backward()
    torch.testing.assert_close(cls.grad, 3 * once, rtol=0, atol=1e-15)


def test_two_losses_at_once():
    args = inputs(6, 20, torch.float64, weighted=True)
    cls, dist = (t.requires_grad_() for t in args[:2])
    out = ops.two_head_loss(*args, alpha=0.3)
    found = torch.autograd.grad([out.loss, out.cls_loss], [cls, dist])
    want = slopes(by_formula(*args, 0.3, 0.0), cls, dist)
    want[0] = want[0] + slopes(F.cross_entropy(cls, args[2]), cls)[0]
    torch.testing.assert_close(list(found), want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 3])
def test_op_that_makes_gradients(dtype, batch):
    args = inputs(batch, 33, dtype, logits=True, weighted=True, mixed="one", divided=True)
    op = torch.ops.pyvitfast.two_head_loss.default
    # Fake tensors of the CPU stand for its kernels alone.
    kinds = ("test_schema",) if EMULATED else ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*args, 0.5, 0.1, True), test_utils=kinds)
    plain, made = op(*args, 0.5, 0.1, False), op(*args, 0.5, 0.1, True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], made[:4], strict=True))
    assert torch.equal(plain[4][-1], made[4][-1])  # the divisor
    assert len(made[4]) == (4 * batch + 1 if EMULATED else 1)
    assert [t.shape[0] for t in made[5:]] == [0 if EMULATED else batch] * 2


def test_all_losses_have_gradients():
    args = inputs(6, 20, torch.float64, weighted=True)
    cls, dist = (t.requires_grad_() for t in args[:2])
    out = ops.two_head_loss(cls, dist, *args[2:], alpha=0.3)
    parts = [torch.autograd.grad(part, (cls, dist), retain_graph=True) for part in out[:3]]
    for whole, one, two in zip(*parts, strict=True):
        torch.testing.assert_close(whole, 0.7 * one + 0.3 * two, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_of_equal_and_nan_is_the_teachers_label(dtype):
    teacher = torch.zeros(5, 40, dtype=dtype)
    teacher[1, [7, 30]] = 1
    teacher[2, [9, 3]] = float("nan")
    teacher[3] = -float("inf")
    teacher[4, 39] = float("inf")
    z = torch.zeros(5, 40)
    out = ops.two_head_loss(z, z, torch.zeros(5, dtype=torch.long), teacher)
    assert out.teacher_labels.tolist() == teacher.argmax(1).tolist() == [0, 7, 3, 0, 39]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    cls, dist = torch.zeros(3, 20), torch.zeros(3, 20)
    cls[1, 4] = value
    zero = torch.zeros(3, dtype=torch.long)
    out = ops.two_head_loss(cls, dist, zero, zero)
    assert out.cls_loss.isnan()
    assert out.dist_loss.isfinite()


def test_an_impossible_class_costs_nothing_without_smoothing():
    cls = torch.tensor([[0.0, 0.0, -float("inf")]])
    zero = torch.zeros(1, dtype=torch.long)
    out = ops.two_head_loss(cls, cls, zero, zero)
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert ops.two_head_loss(cls, cls, zero, zero, smoothing=0.1).cls_loss.item() == float("inf")


def test_large_logits_keep_their_differences():
    cls = torch.tensor([[10000.0, 10001.0]], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.long)
    out = ops.two_head_loss(cls, cls.detach(), zero, zero, alpha=0.0)
    assert out.loss.item() == pytest.approx(1.313262, abs=1e-6)
    torch.testing.assert_close(slopes(out.loss, cls)[0], torch.tensor([[-0.7310586, 0.7310586]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1000, 4096])
def test_bytes_moved_and_launches(counting, dtype, classes):
    args = inputs(16, classes, dtype, weighted=True, mixed="one")
    cls, dist = (t.requires_grad_() for t in args[:2])
    logits = 2 * 16 * classes * cls.element_size()
    out = ops.two_head_loss(cls, dist, *args[2:], smoothing=0.1)
    forward = counting.counters().values()
    # Each logit is read once; what is kept are a few numbers a row, in sectors of 32 bytes.
    assert sum(k["bytes_moved"] for k in forward) <= 1.02 * logits + 16 * 640
    assert sum(k["launches"] for k in forward) == 2
    counting.reset_counters()
    slopes(out.loss, cls, dist)
    backward = counting.counters().values()
    # Each warp reads the numbers of its row: one a row, or eight.
    warps = 1 if classes <= 1024 else 8
    assert sum(k["bytes_moved"] for k in backward) <= 1.02 * 2 * logits + 16 * 640 * warps
    assert sum(k["launches"] for k in backward) == 1


@pytest.mark.skipif(not EMULATED, reason="on the CPU such labels are refused")
def test_labels_out_of_range_make_nan():
    cls, dist = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    wrong, right = torch.tensor([0, 5, -1]), torch.tensor([0, 1, 2])
    out = ops.two_head_loss(cls, dist, wrong, right)
    assert out.cls_loss.isnan()
    assert out.dist_loss.isfinite()
    assert slopes(out.cls_loss, cls)[0].isnan().all(1).tolist() == [False, True, True]
    out = ops.two_head_loss(cls, dist, right, right, partners=wrong, lam=torch.tensor(0.3))
    assert out.cls_loss.isnan()
    assert slopes(out.cls_loss, cls)[0].isnan().all(1).tolist() == [False, True, True]
    for weights in (None, torch.ones(5)):
        assert ops.two_head_loss(cls, dist, right, wrong, weights).dist_loss.isnan()
    # One row suffices, and -1 is no class either.
    last = torch.tensor([0, 1, -1])
    assert ops.two_head_loss(cls, dist, right, right, partners=last, lam=torch.tensor(0.3)).loss.isnan()
