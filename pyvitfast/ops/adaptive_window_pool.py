"""Pooling of a grid of tokens over adaptive bins, channels last in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.reference.adaptive_window_pool import bins

NAME = "adaptive_window_pool"
MODES = ("avg", "max", "learned")


def widest_bin(cells: int, count: int) -> int:
    """Cells of the largest of ``count`` adaptive bins over ``cells`` cells."""
    return max(end - start for start, end in bins(cells, count))


def _whole(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _check(x: Tensor, size: tuple[int, int], mode: str, intra: Tensor | None, inter: Tensor | None) -> None:
    _checks.float_tensors(NAME, [("x", x)])
    if x.ndim != 4:
        raise ValueError(f"{NAME}: `x` must have shape [B, H, W, C], got {list(x.shape)}.")
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{NAME}: `x` must have at least one row and one column, got {list(x.shape)}.")
    if len(size) != 2 or not all(_whole(n) and n >= 1 for n in size):
        raise ValueError(f"{NAME}: `size` must be two whole numbers of at least 1, got {size!r}.")
    if mode not in MODES:
        raise ValueError(f"{NAME}: `mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode != "learned" and (intra is not None or inter is not None):
        raise ValueError(f"{NAME}: `intra` and `inter` go with mode 'learned', got mode {mode!r}.")
    if mode != "learned":
        return
    if intra is None:
        raise ValueError(f"{NAME}: mode 'learned' needs `intra`.")
    cells = [widest_bin(n, m) for n, m in zip(x.shape[1:3], size, strict=True)]
    shape = [x.shape[0], size[0] * size[1], *cells]
    named = [("intra", intra), *([] if inter is None else [("inter", inter)])]
    _checks.float_tensors(NAME, [("x", x), *named])
    for name, scores in named:
        if list(scores.shape) != shape:
            raise ValueError(
                f"{NAME}: `{name}` must have shape {shape}: images, bins, and the cells of the largest bin, "
                f"got {list(scores.shape)}."
            )
        if (scores.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"{NAME}: `{name}` may be float64 beside a float64 `x` only, and must be there, got "
                f"{str(scores.dtype).removeprefix('torch.')}."
            )


def adaptive_window_pool(
    x: Tensor,
    size: tuple[int, int],
    mode: str = "avg",
    intra: Tensor | None = None,
    inter: Tensor | None = None,
) -> Tensor:
    r"""One row for each adaptive bin of a grid of tokens.

    Bin i of m over n cells holds the cells from :math:`\lfloor i n / m \rfloor` up to
    :math:`\lceil (i + 1) n / m \rceil`, as in torch's adaptive pooling: bins overlap where m does not divide
    n, and repeat cells where m is larger.

    ``avg`` and ``max`` are those of torch. ``learned`` is
    :math:`P_i = \sum_j \text{softmax}_j(M_{ij} + O_{ij})\, x_j` over the cells j of bin i.

    Args:
        x: [B, H, W, C], float32, bfloat16, float16 or float64; any strides, and no copy where channels are
            neighbours, as in a view of a sequence of tokens.
        size: rows and columns of bins.
        mode: ``avg``, ``max`` or ``learned``.
        intra: M, [B, rows * columns, KH, KW] with the cells of the largest bin; what lies outside a narrower
            bin has no effect and a gradient of zero. Any of the dtypes, float64 beside float64 only.
        inter: O, of the same shape, or None.

    Returns:
        [B, rows * columns, C] in the dtype of ``x``, bins in row-major order; differentiable once with
        respect to ``x``, ``intra`` and ``inter``.

    Raises:
        TypeError: not float tensors, or float64 beside other dtypes.
        ValueError: shapes, sizes or modes that do not fit.

    Sums and the softmax are float32 for 16-bit inputs, in the order of the cells, so the bits do not depend
    on threads or runs. Of equal maxima the first gets the gradient; NaN wins, the last one.

    Source:
        STViT (Chang et al., CVPR 2023), section 3.1, eq. 4 and 5.

    Example:
        >>> grid = torch.arange(4.0).view(1, 2, 2, 1)
        >>> pyvitfast.ops.adaptive_window_pool(grid, (1, 1), "max")
        tensor([[[3.]]])
    """
    op = _checks.call(NAME)
    _check(x, size, mode, intra, inter)
    logits: Tensor | None = None
    if intra is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = intra.to(wide) if inter is None else intra.to(wide) + inter.to(wide)
    keep = torch.is_grad_enabled() and x.requires_grad
    out: Tensor = op(x, logits, size[0], size[1], MODES.index(mode), keep)[0]
    return out


def _fake(
    x: Tensor, logits: Tensor | None, rows: int, cols: int, mode: int, keep: bool
) -> tuple[Tensor, Tensor]:
    out = x.new_empty((x.shape[0], rows * cols, x.shape[3]))
    if logits is not None:
        return out, torch.empty_like(logits, memory_format=torch.contiguous_format)
    places = keep and MODES[mode] == "max"
    return out, x.new_empty(out.shape if places else (0,), dtype=torch.int32)


def _fake_backward(
    grad: Tensor, x: Tensor | None, kept: Tensor, height: int, width: int, rows: int, cols: int, mode: int
) -> tuple[Tensor, Tensor]:
    slope = grad.new_empty((grad.shape[0], height, width, grad.shape[2]))
    if MODES[mode] == "learned" and x is not None:
        return slope, torch.empty_like(kept, memory_format=torch.contiguous_format)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return slope, grad.new_empty((0,), dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, logits, rows, cols, mode, keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.grid, ctx.settings, ctx.learned = x.shape[1:3], (rows, cols, mode), logits is not None
    # Places are kept on request; who asked for a gradient later gets them from a second look.
    ctx.again = MODES[mode] == "max" and not keep
    ctx.save_for_backward(output[1], *([x] if ctx.learned or ctx.again else []))


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    kept, *saved = ctx.saved_tensors
    if ctx.again:
        _, kept = torch.ops.pyvitfast.adaptive_window_pool(saved[0], None, *ctx.settings, True)
    x = saved[0] if ctx.learned and ctx.needs_input_grad[1] else None
    slope, scores = torch.ops.pyvitfast.adaptive_window_pool_backward(grad, x, kept, *ctx.grid, *ctx.settings)
    return slope, scores if x is not None else None, None, None, None, None


differentiable(
    NAME, fake=_fake, setup_context=_setup_context, backward=_backward, fake_backward=_fake_backward
)
