"""Loss of a class head on labels and a distillation head on a teacher's labels, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.reference.two_head_loss import TwoHeadLoss

NAME = "two_head_loss"


def _label_tensor(name: str, value: Tensor, batch: int) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{NAME}: `{name}` must be an int64 tensor, got {got}.")
    if value.ndim != 1 or value.shape[0] != batch:
        raise ValueError(f"{NAME}: `{name}` must have shape [{batch}], got {list(value.shape)}.")


def _label_range(name: str, value: Tensor, classes: int) -> None:
    if _checks.has_data(value) and value.numel() and (int(value.min()) < 0 or int(value.max()) >= classes):
        wrong = value[(value < 0) | (value >= classes)]
        raise ValueError(
            f"{NAME}: `{name}` must be classes from 0 to {classes - 1}, got {int(wrong[0])}. Do the labels "
            "and the logits belong to one set of classes?"
        )


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{NAME}: `{name}` must be a number, got {type(value).__name__}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{NAME}: `{name}` must be from 0 to 1, got {value}.")
    return float(value)


def _number(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # What is no float tensor is for the checks to refuse.
    if value is None or value.dtype == dtype or not value.is_floating_point():
        return value
    return value.to(dtype)


def _check(
    cls_logits: Tensor,
    dist_logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    partners: Tensor | None,
    lam: Tensor | None,
    divisor: Tensor | None,
) -> None:
    _checks.float_tensors(NAME, [("cls_logits", cls_logits), ("dist_logits", dist_logits)])
    if cls_logits.ndim != 2 or cls_logits.shape[1] < 1:
        raise ValueError(
            f"{NAME}: `cls_logits` must have shape [B, C], C at least 1, got {list(cls_logits.shape)}."
        )
    if dist_logits.shape != cls_logits.shape or dist_logits.dtype != cls_logits.dtype:
        raise ValueError(
            f"{NAME}: `dist_logits` must have shape and dtype of `cls_logits`, {list(cls_logits.shape)} "
            f"{cls_logits.dtype}, got {list(dist_logits.shape)} {dist_logits.dtype}."
        )
    batch, classes = cls_logits.shape
    named = [("labels", labels), *([] if partners is None else [("partners", partners)])]
    if isinstance(teacher, Tensor) and teacher.is_floating_point():
        _checks.float_tensors(NAME, [("cls_logits", cls_logits), ("teacher", teacher)])
        if teacher.shape != cls_logits.shape:
            raise ValueError(
                f"{NAME}: `teacher` must be labels [{batch}] or logits {list(cls_logits.shape)}, got "
                f"{list(teacher.shape)}. A teacher of other classes needs a class map."
            )
    else:
        named.append(("teacher", teacher))
    for name, value in named:
        _label_tensor(name, value, batch)
        _checks.same_device(NAME, [("cls_logits", cls_logits), (name, value)])
    if (partners is None) != (lam is None):
        raise ValueError(f"{NAME}: `partners` and `lam` go together, got one of them.")
    for name, number, shapes in (
        ("weights", weights, ([classes],)),
        ("lam", lam, ([], [1], [batch])),
        ("divisor", divisor, ([], [1])),
    ):
        if number is None:
            continue
        _checks.float_tensors(NAME, [("cls_logits", cls_logits), (name, number)])
        if list(number.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{NAME}: `{name}` must have shape {wanted}, got {list(number.shape)}.")
    for name, value in named:
        _label_range(name, value, classes)


def two_head_loss(
    cls_logits: Tensor,
    dist_logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    partners: Tensor | None = None,
    lam: Tensor | None = None,
    divisor: Tensor | None = None,
    *,
    alpha: float = 0.5,
    smoothing: float = 0.0,
) -> TwoHeadLoss:
    r"""Loss of a model with two heads: CLS learns mixed labels, DIST the labels of a teacher.

    With :math:`z^c, z^d` the logits, y and y' labels and partners, :math:`y^t` the teacher's labels:

    .. math::
        t_{ic} = \epsilon / C + (1 - \epsilon)(\lambda_i [c = y_i] + (1 - \lambda_i) [c = y'_i])

        L_c = -\frac1B \sum_{ic} t_{ic} \log p^c_{ic}, \quad
        L_d = \frac{\sum_i w_{y^t_i} (-\log p^d_{i y^t_i})}{\sum_i w_{y^t_i}}, \quad
        L = (1 - \alpha) L_c + \alpha L_d

    Args:
        cls_logits: [B, C], float32, bfloat16, float16 or float64; no copy where the entries of a row are
            neighbours.
        dist_logits: [B, C] of the same dtype.
        labels: y, int64 [B].
        teacher: :math:`y^t`, int64 [B], or logits [B, C] of any float dtype, of whose greatest the first
            counts; a NaN counts as the greatest, as in torch.
        weights: w, [C], or None for ones. Any float dtype, as the next two: used in that of the sums.
        partners: y', int64 [B], or None for unmixed labels.
        lam: :math:`\lambda`, [] or [B]; with ``partners``.
        divisor: [], in place of the sum of weights under :math:`L_d`; or None.
        alpha: share of :math:`L_d`, 0 to 1.
        smoothing: :math:`\epsilon`, 0 to 1.

    Returns:
        The three losses and the teacher's labels. All losses are differentiable once with respect to both
        logits. No gradient goes to weights, lam, divisor or teacher.

    Raises:
        TypeError: labels that are not int64, or numbers that are not float tensors.
        ValueError: shapes or devices that do not match, shares outside of 0 to 1, or on the CPU a label
            outside of 0 to C - 1. On CUDA such a label makes losses and its rows of the gradients NaN, and
            nothing is read out of range.

    Softmax and sums are float32 for 16-bit logits, also under autocast. Where the sum of weights or the
    divisor is 0, :math:`L_d` is 0, with a gradient of 0 for finite logits. Both losses of an empty batch are
    0. The order of all sums depends on the shapes alone, so the bits do not depend on threads or runs. On the
    CPU the gradients are made in the forward and held until the backward.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024), eq. 1 to 3 with the weighted mean of the released code; Mixup
        pairs and smoothing as timm makes them.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> out = pyvitfast.ops.two_head_loss(z, z, torch.tensor([0]), torch.tensor([1]))
        >>> out.dist_loss - out.cls_loss
        tensor(2.)
    """
    alpha, smoothing = _share("alpha", alpha), _share("smoothing", smoothing)
    given = (labels, teacher, weights, partners, lam, divisor)
    compiling = torch.compiler.is_compiling()
    if compiling:
        _check(cls_logits, dist_logits, *given)
    try:
        wide = torch.float64 if cls_logits.dtype == torch.float64 else torch.float32
        numbers = [_number(value, wide) for value in (weights, lam, divisor)]
        differentiates = cls_logits.requires_grad or dist_logits.requires_grad
        if differentiates and torch.is_grad_enabled() and not compiling:
            call = (labels, teacher, numbers[0], partners, *numbers[1:], alpha, smoothing)
            return TwoHeadLoss(*_Eager.apply(cls_logits, dist_logits, call))
        constants = [t if t is None or not t.requires_grad else t.detach() for t in (teacher, *numbers)]
        op = _checks.call(NAME)
        found = op(
            cls_logits,
            dist_logits,
            labels,
            constants[0],
            constants[1],
            partners,
            *constants[2:],
            alpha,
            smoothing,
            False,
        )
    except Exception:
        # The kernels' own checks are enough, and free; these here find the words.
        _checks.call(NAME)
        _check(cls_logits, dist_logits, *given)
        raise
    return TwoHeadLoss(*found[:4])


def _fake(cls: Tensor, dist: Tensor, labels: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check(cls, dist, labels, teacher, *rest[:4])
    wide = torch.float64 if cls.dtype == torch.float64 else torch.float32
    batch, classes = cls.shape
    made = rest[-1] and cls.is_cpu
    return (
        *(cls.new_empty((), dtype=wide) for _ in range(3)),
        cls.new_empty((batch,), dtype=torch.int64),
        cls.new_empty((1 if made else 4 * batch + 1,), dtype=wide),
        *(cls.new_empty((batch if made else 0, classes)) for _ in range(2)),
    )


def _fake_backward(grad: Any, grad_c: Any, grad_d: Any, cls: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return cls.new_empty(cls.shape), cls.new_empty(cls.shape)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    # A loss that is not used has no gradient, instead of one of zeros that a kernel would have to write.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cls, dist, labels, _, weights, partners, lam, _, ctx.alpha, ctx.smoothing, _ = inputs
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, cls, dist, labels, *output[3:5], weights, partners, lam)


def _slopes(ctx: Any, *grads: Any) -> list[Tensor | None]:
    op = torch.ops.pyvitfast.two_head_loss_backward.default
    slopes = op(*grads[:3], *ctx.saved_tensors, ctx.alpha, ctx.smoothing)
    return [s if need else None for s, need in zip(slopes, ctx.needs_input_grad[:2], strict=True)]


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return (*_slopes(ctx, *grads), *[None] * 9)


class _Eager(torch.autograd.Function):
    """The gradients that are registered, without Python's part of the dispatcher: half of a small call.

    On the CPU those of the loss are made in the forward, where each row is in the cache. What has no gradient
    comes as one argument, since each costs.
    """

    @staticmethod
    def forward(ctx: Any, cls: Tensor, dist: Tensor, call: tuple[Any, ...]) -> Any:
        both = cls.requires_grad and dist.requires_grad
        with torch._C._AutoDispatchBelowAutograd():
            found = torch.ops.pyvitfast.two_head_loss.default(cls, dist, *call, both)
        loss, cls_loss, dist_loss, chosen, statistics, grad_cls, grad_dist = found
        ctx.made = (grad_cls, grad_dist, None) if len(grad_cls) else None
        labels, _, weights, partners, lam, _, ctx.alpha, ctx.smoothing = call
        ctx.mark_non_differentiable(chosen)
        _save(ctx, cls, dist, labels, chosen, statistics, weights, partners, lam)
        return loss, cls_loss, dist_loss, chosen

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_c: Any, grad_d: Any, _: Any) -> Any:
        # Given away once: a caller may write into gradients.
        made, ctx.made = ctx.made, None
        alone = grad is not None and grad_c is None and grad_d is None
        # Second derivatives are for the op to refuse, and 16-bit gradients are scaled before rounding.
        if made is not None and alone and not torch.is_grad_enabled():
            if grad.item() == 1:
                return made
            if made[0].dtype in (torch.float32, torch.float64):
                return made[0].mul_(grad), made[1].mul_(grad), None
        return (*_slopes(ctx, grad, grad_c, grad_d), None)


differentiable(
    NAME, fake=_fake, setup_context=_setup_context, backward=_backward, fake_backward=_fake_backward
)
