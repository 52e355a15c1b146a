"""What every differentiable op tells torch: fakes, gradients, operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from pyvitfast.ops import _checks


def differentiable(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    flops_backward: Callable[..., int] | None = None,
) -> None:
    """Attach these to op ``name`` and its ``name_backward``, which refuses to be differentiated by name.

    Nothing happens where the schemas are missing.
    """
    if not _checks.defined():
        return

    def refuse_second(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(f"{name}_backward: second derivatives are not supported.")

    torch.library.register_fake(f"pyvitfast::{name}", fake)
    torch.library.register_autograd(f"pyvitfast::{name}", backward, setup_context=setup_context)
    torch.library.register_fake(f"pyvitfast::{name}_backward", fake_backward)
    torch.library.register_autograd(f"pyvitfast::{name}_backward", refuse_second)
    for op, formula in ((name, flops), (f"{name}_backward", flops_backward)):
        if formula is not None:
            register_flop_formula(getattr(torch.ops.pyvitfast, op))(formula)
