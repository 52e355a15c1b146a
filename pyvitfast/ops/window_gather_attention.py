"""Attention of windows of queries over windows of a grid of keys, which are never unfolded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvitfast.ops import _attention, _checks
from pyvitfast.ops._registration import differentiable
from pyvitfast.reference.window_gather_attention import window_gather_attention as reference

NAME = "window_gather_attention"


def _pair(name: str, value: Any, least: int | None) -> list[int]:
    if isinstance(value, Tensor | str) or not hasattr(value, "__len__") or len(value) != 2:
        raise TypeError(f"{NAME}: `{name}` must be two whole numbers, got {value!r}.")
    for part in value:
        if isinstance(part, bool) or not isinstance(part, int | torch.SymInt):
            raise TypeError(f"{NAME}: `{name}` must be two whole numbers, got {value!r}.")
        if least is not None and part < least:
            raise ValueError(f"{NAME}: `{name}` must be at least {least}, got {tuple(value)}.")
    return list(value)


def _check(q: Tensor, k: Tensor, v: Tensor, k_before: Tensor | None, v_before: Tensor | None) -> None:
    named = [("q", q), ("k", k), ("v", v)]
    named += [(n, t) for n, t in (("k_before", k_before), ("v_before", v_before)) if t is not None]
    _checks.float_tensors(NAME, named)
    _attention.pair_of_keys(NAME, k_before, v_before)
    if q.ndim != 6 or q.shape[5] == 0:
        raise ValueError(
            f"{NAME}: `q` must have shape [B, windows down, windows across, M, H, D], D at least 1, "
            f"got {list(q.shape)}."
        )
    if k.ndim != 5 or k.shape[0] != q.shape[0] or k.shape[3:] != q.shape[4:]:
        raise ValueError(
            f"{NAME}: `k` must have shape [B, height, width, H, D] with the B, H and D of `q` "
            f"{list(q.shape)}, got {list(k.shape)}."
        )
    _attention.same_shape(NAME, "v", v, tuple(k.shape), "that of `k`")
    if k_before is not None and v_before is not None:
        shape = (*q.shape[:3], k_before.shape[3] if k_before.ndim == 6 else 0, *q.shape[4:])
        rule = "that of `q` but for the number of rows"
        _attention.same_shape(NAME, "k_before", k_before, shape, rule)
        _attention.same_shape(NAME, "v_before", v_before, shape, "that of `k_before`")


def window_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_window: tuple[int, int],
    key_stride: tuple[int, int],
    key_offset: tuple[int, int],
    valid_hw: tuple[int, int] | None = None,
    *,
    k_before: Tensor | None = None,
    v_before: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each window's queries over a window of a grid of keys, which may overlap its neighbours.

    The queries of window (a, b) attend to the keys in lines ``a * key_stride[0] + key_offset[0]`` up to
    ``key_window[0]`` further on, columns alike, as far as they lie in the grid and in ``valid_hw``. Keys and
    values are projected once and read where they lie; nothing of the size of the unfolded windows is made.

    Args:
        q: [B, windows down, windows across, M, H, D], float32, bfloat16, float16 or float64.
        k: [B, height, width, H, D] of the same dtype. Any strides; no copy where the channels of a head are
            neighbours, as in the halves of a fused projection.
        v: [B, height, width, H, D].
        key_window: lines and columns that a window reads.
        key_stride: from one window to the next.
        key_offset: of the first window; may be negative.
        valid_hw: lines and columns of the grid that may be read, the rest being padding; by default all.
        k_before: [B, windows down, windows across, E, H, D], keys of each window's own, before those of the
            grid; or None.
        v_before: [B, windows down, windows across, E, H, D], their values.
        scale: of the scores, by default D^-1/2.

    Returns:
        [B, windows down, windows across, M, H, D], contiguous, in the dtype of ``q``; differentiable once
        with respect to all tensors.

    Raises:
        TypeError: not float tensors, dtypes that differ outside autocast, or sizes that are not pairs of
            whole numbers.
        ValueError: shapes or devices that do not match, windows or strides below 1, or ``valid_hw`` past the
            grid.

    Scores, softmax and sums are float32 for 16-bit inputs. The order of all sums depends on the shapes alone,
    so the bits do not depend on threads or runs. NaN and Inf spread as in softmax; a window without a key
    gives zeros. Autocast leaves tensors of one dtype as they are and brings those of several to its own. On
    CUDA heads wider than 128 channels take plain torch.

    Source:
        Making Vision Transformers Efficient from A Token Sparsification View (Chang et al., CVPR 2023),
        section 3.3 and the released detection code: windows of keys wider than their stride.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 1, 1, 1), torch.zeros(1, 1, 4, 1, 1)
        >>> v = torch.arange(4.0).view(1, 1, 4, 1, 1)
        >>> pyvitfast.ops.window_gather_attention(q, k, v, (1, 3), (1, 2), (0, -1)).flatten()
        tensor([0.5000, 2.0000])
    """
    op = _checks.call(NAME)
    _check(q, k, v, k_before, v_before)
    window, stride = _pair("key_window", key_window, 1), _pair("key_stride", key_stride, 1)
    offset = _pair("key_offset", key_offset, None)
    valid = list(k.shape[1:3]) if valid_hw is None else _pair("valid_hw", valid_hw, 0)
    for most, size in zip(k.shape[1:3], valid, strict=True):
        if size > most:
            raise ValueError(
                f"{NAME}: `valid_hw` must not pass the grid of {tuple(k.shape[1:3])}, got {tuple(valid)}."
            )
    named = [("q", q), ("k", k), ("v", v)]
    if k_before is not None and v_before is not None:
        named += [("k_before", k_before), ("v_before", v_before)]
    q, k, v, *before = _attention.mixed_dtypes(NAME, named)
    k_before, v_before = before or (None, None)
    scale = q.shape[5] ** -0.5 if scale is None else _attention.number(NAME, "scale", scale)
    if not _attention.fits(q):
        sizes: Any = (tuple(window), tuple(stride), tuple(offset), tuple(valid))
        return reference(q, k, v, *sizes, k_before=k_before, v_before=v_before, scale=scale)
    result: Tensor = op(q, k, v, k_before, v_before, window, stride, offset, *valid, scale)[0]
    return result


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, down, across, queries, heads = q.shape[:5]
    lse = q.new_empty((batch, down, across, heads, queries), dtype=_attention.sums(q))
    return q.new_empty(q.shape), lse


def _fake_backward(
    grad: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k_before: Tensor | None, *_: Any
) -> list[Tensor]:
    before = 0 if k_before is None else k_before.shape[3]
    shape = (*q.shape[:3], before, *q.shape[4:])
    return [q.new_empty(size) for size in (q.shape, k.shape, k.shape, shape, shape)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.settings = inputs[:5], inputs[5:]
    ctx.with_before = tensors[3] is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *(t for t in tensors if t is not None))


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    tensors = [*ctx.saved_tensors, *([] if ctx.with_before else [None, None])]
    slopes = torch.ops.pyvitfast.window_gather_attention_backward(grad, *tensors, *ctx.settings)
    before = slopes[3:] if ctx.with_before else [None, None]
    return (*slopes[:3], *before, *[None] * len(ctx.settings))


def _flops(
    q: Any, k: Any, v: Any, k_before: Any, v_before: Any, window: Any, stride: Any, offset: Any,
    valid_h: int, valid_w: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, down, across, queries, heads, width = q

    def read(count: int, axis: int, valid: int) -> int:
        first = [at * stride[axis] + offset[axis] for at in range(count)]
        return sum(max(0, min(f + window[axis], valid) - max(f, 0)) for f in first)

    before = k_before[3] * down * across if k_before else 0
    keys = read(down, 0, valid_h) * read(across, 1, valid_w) + before
    return int(4 * batch * heads * queries * keys * width)


differentiable(
    NAME,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    fake_backward=_fake_backward,
    flops=_flops,
)
