"""Sharpness-aware minimisation around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_EPS = 1e-12
# What copies and pickles take along: not a scheduler's wrapper around step(), which is bound to the original.
_FIELDS = (
    "base_optimizer",
    "adaptive",
    "skipped",
    "_rho",
    "_batch_norms",
    "_weights",
    "_kept",
    "_statistics",
)


class SAM(torch.optim.Optimizer):
    r"""Takes the gradient where the loss is worst nearby, and steps from where the weights are.

    .. math::
        e = \rho \frac{g}{\|g\|_2 + 10^{-12}},\quad w \leftarrow \text{optimizer}(w, \nabla L(w + e))

    with one norm over all parameters of all groups. Adaptive (ASAM):
    :math:`e = \rho\, w^2 g / (\| |w| g \|_2 + 10^{-12})`. Weight decay and momentum act at w, which is kept
    aside and copied back to the bit: w + e - e is not w. A step costs two forward and backward passes, and
    one copy of the weights.

    Args:
        base_optimizer: any first-order torch optimizer; parameters without a gradient are left alone.
        rho: radius, at least 0; with 0 a step is the base optimizer's own, with one pass. May be set between
            steps for a schedule.
        adaptive: ASAM.
        batch_norm_once: let the second pass leave the running statistics of BatchNorm as they were after the
            first; needs ``model``. The published teachers update them in both, so this is off.
        model: whose BatchNorm layers ``batch_norm_once`` means.

    Raises:
        ValueError: ``rho`` negative or not finite, or ``batch_norm_once`` without ``model``.

    A gradient that is not finite, in either pass, skips the whole step: the weights and the base optimizer's
    state are as before it, and :attr:`skipped` counts it. To see that, the host waits for the device once a
    pass.

    It is a torch optimizer, for schedulers, whose groups, state and hooks are the base optimizer's.

    DDP: gradients are averaged before the norm is taken, so every process makes the same e, that of the whole
    batch, as if there was one process. With accumulation, the closure makes all micro-batches of an update.

    Mixed precision: e does not depend on the scale of the loss, so the first gradient is not unscaled:

        >>> scaler.scale(loss_fn(model(images), labels)).backward()
        >>> if sam.first_step():
        ...     sam.zero_grad()
        ...     scaler.scale(loss_fn(model(images), labels)).backward()
        ...     sam.restore()
        >>> scaler.step(sam.base_optimizer)  # skips, and lowers the scale, where a gradient is not finite
        >>> scaler.update()

    Source:
        Foret et al., ICLR 2021; Kwon et al., ICML 2021 (ASAM); Rangwani et al., NeurIPS 2022, for long tails.

    Example:
        >>> sam = SAM(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), rho=0.8)
        >>> def closure():
        ...     sam.zero_grad()
        ...     loss = loss_fn(model(images), labels)
        ...     loss.backward()
        ...     return loss
        >>> loss = sam.step(closure)
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        batch_norm_once: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        if batch_norm_once and model is None:
            raise ValueError("SAM: `batch_norm_once` needs `model`, got None.")
        self.base_optimizer, self.adaptive = base_optimizer, adaptive
        self.rho = rho
        self.skipped = 0
        self._batch_norms = _batch_norms(model) if batch_norm_once and model is not None else []
        self._weights: list[Tensor] = []
        self._kept: dict[Tensor, Tensor] = {}
        self._statistics: list[tuple[Tensor, Tensor]] = []

    # torch's own would leave out all but groups and state, and wrap step() of every SAM in the process.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in _FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_optimizer_"):  # hooks
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def rho(self) -> float:
        """The radius."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        if not 0 <= rho < float("inf"):
            raise ValueError(f"SAM: `rho` must be finite and at least 0, got {rho!r}.")
        self._rho = rho

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's, for schedulers."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's own."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base optimizer's own."""
        self.base_optimizer.add_param_group(param_group)

    @torch.no_grad()
    def first_step(self) -> bool:
        """Keep w and move to w + e. The gradients of a batch must be there.

        Returns:
            Whether the weights were moved and a second pass is wanted: not where a gradient is not finite,
            nothing has a gradient, or rho is 0.

        Raises:
            RuntimeError: called again before :meth:`second_step` or :meth:`restore`.
        """
        if self._weights:
            raise RuntimeError("SAM: first_step() came twice; second_step() or restore() must come between.")
        weights = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        grads = [p.grad for p in weights]
        if not weights or not self.rho:
            return False
        if self.adaptive:
            grads = list(torch._foreach_mul(grads, weights))
        norm = _norm(grads)
        if not norm < float("inf"):
            return False
        if self.adaptive:
            torch._foreach_mul_(grads, weights)
        for p in weights:
            kept = self._kept.get(p)
            # A model may be cast, moved or cut between steps.
            if kept is None or (kept.shape, kept.dtype, kept.device) != (p.shape, p.dtype, p.device):
                self._kept[p] = torch.empty_like(p)
        torch._foreach_copy_([self._kept[p] for p in weights], weights)
        self._weights = weights
        self._statistics = [(b, b.clone()) for layer in self._batch_norms for b in layer.buffers()]
        torch._foreach_add_(weights, grads, alpha=self.rho / (norm + _EPS))
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Move back to w, to the bit. Does nothing where the weights are not moved."""
        weights, self._weights = self._weights, []
        if weights:
            torch._foreach_copy_(weights, [self._kept[p] for p in weights])
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self._statistics = []

    def second_step(self) -> None:
        """Move back to w, and let the base optimizer step with the gradients of the second pass."""
        self.restore()
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads or _norm(grads) < float("inf"):
            self.base_optimizer.step()
        else:
            self.skipped += 1

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One optimizer step.

        Args:
            closure: clears the gradients, computes the loss of a batch, calls ``backward`` and returns the
                loss. It is called twice and must see the same batch both times.

        Returns:
            The loss at w, detached.

        Raises:
            TypeError: no closure.
        """
        if not callable(closure):
            raise TypeError(
                "SAM: `closure` must be a function that computes the loss and its gradients, for it is "
                f"called twice, got {closure!r}. Without one, call first_step() and second_step()."
            )
        with torch.enable_grad():
            loss = closure()
        if self.first_step():
            try:
                with torch.enable_grad():
                    closure()
            except BaseException:
                self.restore()
                raise
        self.second_step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, rho and the number of skipped steps.

        Raises:
            RuntimeError: between first_step() and second_step(), where the weights are not those of a step.
        """
        if self._weights:
            raise RuntimeError("SAM: state_dict() must come after second_step(): the weights are moved.")
        return {"base": self.base_optimizer.state_dict(), "rho": self.rho, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.restore()
        self.base_optimizer.load_state_dict(state_dict["base"])
        self.rho, self.skipped = state_dict["rho"], state_dict["skipped"]


class ASAM(SAM):
    """:class:`SAM` with the adaptive radius: ``SAM(adaptive=True)``."""

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        batch_norm_once: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(base_optimizer, rho, True, batch_norm_once=batch_norm_once, model=model)


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _norm(tensors: list[Tensor]) -> float:
    """Euclidean norm over all tensors, squares added in float32 or wider; NaN and infinity stay."""
    norms: list[Tensor] = []
    for dtype in {t.dtype: None for t in tensors}:
        wide = torch.promote_types(dtype, torch.float32)
        part = [t for t in tensors if t.dtype == dtype]
        norms += torch._foreach_norm(part, 2, dtype=wide)
    first = norms[0].device
    return float(torch.linalg.vector_norm(torch.stack([n.to(first, torch.float64) for n in norms])))
