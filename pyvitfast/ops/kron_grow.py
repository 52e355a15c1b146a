"""Stacked matrices made wider by two factors and deeper by a third."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.ops._registration import differentiable

NAME = "kron_grow"
NAMES = ("weight", "a", "b", "d")
FACTORS = ("shared", "source", "target")


def _check(tensors: tuple[Any, ...], factors: str, identity: bool) -> None:
    _checks.float_tensors(NAME, list(zip(NAMES, tensors, strict=True)))
    if factors not in FACTORS[1:]:
        raise ValueError(f"{NAME}: `factors` must be 'source' or 'target', got {factors!r}.")
    if not isinstance(identity, bool):
        raise TypeError(f"{NAME}: `identity` must be True or False, got {type(identity).__name__}.")
    weight, a, b, d = tensors
    if identity and a.ndim == 3 and factors == "source":
        raise ValueError(f"{NAME}: `identity` goes with shared factors or those of the target's layers.")
    if weight.ndim != 4:
        raise ValueError(f"{NAME}: `weight` must have shape [T, L1, O1, I1], got {list(weight.shape)}.")
    types, layers, rows, cols = weight.shape
    if d.ndim != 3 or d.shape[0] != types or d.shape[2] != layers:
        raise ValueError(
            f"{NAME}: `d` must have shape [T, L2, L1], {types} types and {layers} layers of `weight`, "
            f"got {list(d.shape)}."
        )
    if a.ndim != b.ndim or a.ndim not in (2, 3):
        raise ValueError(
            f"{NAME}: `a` and `b` must be matrices, or both stacks of one a layer, got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    for name, factor, size, side in (("a", a, cols, "columns"), ("b", b, rows, "rows")):
        if factor.shape[-1] != size:
            raise ValueError(
                f"{NAME}: `{name}` must have as many columns as `weight` has {side}, {size}, "
                f"got {list(factor.shape)}."
            )
        count = layers if factors == "source" else d.shape[1]
        if factor.ndim == 3 and factor.shape[0] != count:
            raise ValueError(
                f"{NAME}: `{name}` must have one matrix for each of the {count} layers of the {factors}, "
                f"got {list(factor.shape)}."
            )


def kron_grow(
    weight: Tensor, a: Tensor, b: Tensor, d: Tensor, *, factors: str = "source", identity: bool = False
) -> Tensor:
    r"""Widen and deepen stacks of matrices: :math:`W'_{t,m} = \sum_l D_{t,m,l}\, B\, W_{t,l}\, A^\top`.

    Args:
        weight: W, [T, L1, O1, I1]: T stacks of L1 matrices, rows and columns as in ``nn.Linear.weight``.
            float32, bfloat16, float16 or float64.
        a: of the columns, [I2, I1] for all matrices, or one a layer [L, I2, I1].
        b: of the rows, [O2, O1] or [L, O2, O1], with as many dimensions as ``a``.
        d: of the layers, [T, L2, L1].
        factors: whose layers a stack of factors belongs to: ``source`` (applied to the small matrices, as the
            LiGO paper writes) or ``target`` (applied after the layers are mixed, as its released code does).
        identity: ``a`` and ``b`` are the rows below an identity, [I2 - I1, I1] and [O2 - O1, O1]: the mixed
            source stands in the upper left corner as it is, at half the cost or less. Not for factors of the
            source's layers.

    Returns:
        [T, L2, O2, I2], contiguous, in the widest dtype of the arguments. Differentiable once with respect to
        all.

    Raises:
        TypeError: not float tensors.
        ValueError: sizes or devices that do not fit.

    Sums are float32, also for 16-bit arguments (which are converted once, and the result back), float64 for
    float64. Their order depends on the shapes alone, so bits do not depend on threads or runs; autocast is
    ignored. Shared factors come before or after the layers are mixed, and columns before or after rows,
    whichever takes fewer operations. Besides inputs and outputs as much is kept as the mixed matrices take:
    of the source's size where layers are mixed first, else of the target's with L1 layers.

    Source:
        LiGO (Wang et al., ICLR 2023), section 3; with a row selection as B and a divided one as A it is
        Net2Net's and bert2BERT's function-preserving map.

    Example:
        >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
        >>> a = torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.5, 0.0]])
        >>> b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> pyvitfast.ops.kron_grow(w, a, b, torch.ones(1, 1, 1))[0, 0]
        tensor([[0.5000, 2.0000, 0.5000],
                [1.5000, 4.0000, 1.5000],
                [1.5000, 4.0000, 1.5000]])
    """
    op = _checks.call(NAME)
    given = (weight, a, b, d)
    _check(given, factors, identity)
    dtype, wide = _checks.widest(given)
    weight, a, b, d = (t.to(wide) for t in given)
    code = FACTORS.index(factors)
    if a.ndim == 2:
        a, b, code = a[None], b[None], 0
    result: Tensor = op(weight, a, b, d, code, identity).to(dtype)
    return result


def _fake(weight: Tensor, a: Tensor, b: Tensor, d: Tensor, factors: int, identity: bool) -> Tensor:
    types, _, rows, cols = weight.shape
    more = (b.shape[1], a.shape[1])
    size = (rows + more[0], cols + more[1]) if identity else more
    return weight.new_empty((types, d.shape[1], *size))


def _fake_backward(
    grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, d: Tensor, factors: int, of_source: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b, d)]
    source = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (source if of_source else grad.new_empty(0)), made[0], made[1], made[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.factors, ctx.identity = inputs[4:]


def _below_identity(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[2], dtype=factor.dtype, device=factor.device)
    return torch.cat([eye.expand(factor.shape[0], -1, -1), factor], 1)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_source = ctx.needs_input_grad[0]
    weight, a, b, d = ctx.saved_tensors
    if ctx.identity:
        a, b = _below_identity(a), _below_identity(b)
    run = torch.ops.pyvitfast.kron_grow_backward
    source, of_a, of_b, of_d = run(grad, weight, a, b, d, ctx.factors, of_source)
    if ctx.identity:
        of_a, of_b = of_a[:, weight.shape[3] :], of_b[:, weight.shape[2] :]
    return (source if of_source else None, of_a, of_b, of_d, None, None)


def _flops(weight: Any, a: Any, b: Any, d: Any, factors: int, identity: bool, **_: Any) -> int:
    types, layers, rows, cols = weight
    layers2, more_rows, more_cols = d[1], b[1], a[1]
    source = rows * cols
    if identity:
        width = source * more_cols + more_rows * rows * (cols + more_cols)
        return int(2 * types * (layers2 * width + layers * layers2 * source))
    width = min(rows * more_cols * (cols + more_rows), more_rows * cols * (rows + more_cols))
    mixes = layers * layers2
    before = layers2 * width + mixes * source
    after = layers * width + mixes * more_rows * more_cols
    return int(2 * types * (min(before, after) if factors == 0 else after if factors == 1 else before))


differentiable(
    NAME,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    fake_backward=_fake_backward,
    flops=_flops,
)
