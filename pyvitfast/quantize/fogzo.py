"""FOGZO: the straight-through gradient checked and corrected by measured differences of the loss."""

from __future__ import annotations

import importlib
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pyvitfast import ops
from pyvitfast.quantize.replay import Buffers, Generators, backward_calls

ESTIMATORS = ("fogzo", "ste", "spsa", "zo")
SCHEDULES = ("linear", "constant")
_ROUND = 1 / math.sqrt(12)
_OF_SIGN = {
    "identity": ("uniform", 1 / math.sqrt(3)),
    "hardtanh": ("uniform", 1 / math.sqrt(3)),
    "tanh": ("logistic", math.pi / math.sqrt(12)),
    "approx_sign": ("triangular", 1 / math.sqrt(6)),
}
_ZO_RADIUS = 0.01
_CHECK_EVERY = 50
_64 = 2**64 - 1


def kernel_of(grid: str, mask: str) -> tuple[str, float]:
    """Noise and radius, in units of the scale, whose smoothing of the quantiser has the slope of ``mask``.

    Args:
        grid: ``integer``, ``half_integer`` or ``sign``.
        mask: the surrogate of the straight-through gradient.

    Returns:
        The kind of noise and ``eps_bar``. The sign grid with mask ``identity``, which smooths no quantiser,
        gets the kernel of ``hardtanh`` (our choice).

    Source:
        FOGZO (Yang and Aamodt, NeurIPS 2025), table of smoothing kernels.
    """
    return _OF_SIGN[mask] if grid == "sign" else ("uniform", _ROUND)


def splitmix64(seed: int, step: int) -> int:
    """The output number ``step`` (from 0) of SplitMix64 started at ``seed``: an int of 64 bits."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    return z ^ (z >> 31)


def direction_sign(seed: int, direction: int) -> int:
    """The coin of a direction as the ops toss it, 1 or -1: one Philox4x32-10 block at the last counter."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = low, low, low, direction & low
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & low, (first >> 32) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return -1 if c0 >> 31 else 1


def _op(name: str, device: torch.device) -> Callable[..., Any]:
    if name not in ops.__all__:
        function: Callable[..., Any] = getattr(importlib.import_module("pyvitfast.reference"), name)
        return function
    return ops.implementation(name, device)


@dataclass
class _Weight:
    """A latent weight and the layers that use it."""

    name: str
    index: int
    parameter: nn.Parameter
    layers: list[Any] = field(default_factory=list)

    @property
    def scale(self) -> Tensor:
        scale: Tensor = self.layers[0].weight_scale
        return scale

    @property
    def grid(self) -> tuple[int, str, int]:
        """What one call of the SPSA ops has in common."""
        layer = self.layers[0]
        return layer.weight_bits, layer.grid, layer.group_size

    @property
    def quantizer(self) -> tuple[Any, ...]:
        """What one call of ``fake_quantize`` has in common."""
        layer = self.layers[0]
        return *self.grid, layer.mask, layer.scale_gradient

    def use(self, quantised: Tensor | None) -> None:
        for layer in self.layers:
            layer.quantized_weight = quantised


def _by(weights: Sequence[_Weight], key: Callable[[_Weight], Any]) -> dict[Any, list[int]]:
    """Places in the list by configuration, in order of first appearance."""
    found: dict[Any, list[int]] = {}
    for i, weight in enumerate(weights):
        found.setdefault(key(weight), []).append(i)
    return found


def _weights_of(model: nn.Module) -> list[_Weight]:
    found: dict[int, _Weight] = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "quantized_weight") and hasattr(module, "weight_scale")):
            continue
        parameter: Any = module.weight
        entry = found.setdefault(id(parameter), _Weight(f"{name}.weight", len(found), parameter))
        entry.layers.append(module)
        first = entry.layers[0]
        same = ("weight_bits", "grid", "group_size", "mask")
        if module.weight_scale is not first.weight_scale or any(
            getattr(module, key) != getattr(first, key) for key in same
        ):
            raise NotImplementedError(
                f"FOGZO: layers that share a weight must share its scale and settings, but {name!r} and "
                f"{entry.name!r} do not."
            )
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            shared = found.get(id(parameter))
            if shared is not None and not any(module is layer for layer in shared.layers):
                raise NotImplementedError(
                    f"FOGZO: {shared.name!r} is also used without quantisation, as {name}.{key}; untie it or "
                    "leave that layer out of `prepare`."
                )
    if not found:
        raise ValueError(
            "FOGZO: `model` must have quantised layers, got none. Call pyvitfast.quantize.prepare first."
        )
    for weight in found.values():
        parameter = weight.parameter
        if hasattr(parameter, "to_local"):
            raise NotImplementedError(f"FOGZO: {weight.name!r} is split over processes; use DDP instead.")
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"FOGZO: {weight.name!r} must be float32, got {parameter.dtype}: 16 bits round the "
                "perturbation away. Keep float32 weights and use autocast."
            )
    if len({w.parameter.device for w in found.values()}) > 1:
        raise NotImplementedError("FOGZO: all quantised weights must be on one device.")
    return list(found.values())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"FOGZO.step: `closure` must return the loss, a tensor of one element, got {got}.")
    if loss.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"FOGZO.step: the loss must be float32 or float64, got {loss.dtype}: differences of losses "
            "vanish in 16 bits. Compute the loss from float32 logits."
        )
    return loss.detach()


class FOGZO(torch.optim.Optimizer):
    r"""Gives the optimizer slopes measured on the quantised loss instead of the straight-through gradient g.

    In each step, after an ordinary forward and backward pass, for n directions

    .. math:: v_i = \sqrt\beta\, s_i\, \hat g + \sqrt{1-\beta}\, u_i, \qquad
              G = \frac1n \sum_i \frac{L(\theta + \epsilon v_i) - L(\theta - \epsilon v_i)}{2\epsilon}\, v_i

    with a coin :math:`s_i` and unit-variance noise :math:`u_i`. L is the loss of the quantised network on the
    same batch with the same dropout masks. G replaces the gradient of the quantised weights; all others,
    learned scales among them, keep theirs.

    Our choices, where the paper's text was not at hand: everything is done in units of each weight's scale
    (:math:`\theta' = \theta / \alpha`, :math:`G = c\,v / \alpha`), which is the paper's rule for one scale
    and keeps G along g for many; scales stand still within a step; only quantised weights are perturbed; and
    the order of ``start_frac``, plain steps first.

    Args:
        optimizer: any optimizer of the model's parameters. Decoupled weight decay is not affected; coupled
            L2 (``torch.optim.Adam``, ``SGD``) is added by the optimizer to G.
        model: from :func:`pyvitfast.quantize.prepare`, wrapped or not. Its quantised weights must be float32.
        estimator: ``fogzo``; ``ste``, the plain step; ``spsa``, noise alone (beta = 0); ``zo``, the same
            with Gaussian noise of a small radius, as MeZO. The last two run no backward pass, so that
            parameters which are not quantised get no gradient and stay as they are.
        n: directions a step; each costs two forward passes.
        omega: :math:`(1-\beta_{min})\,d` with d the number of perturbed weights: the energy of the noise
            where that of the guided part is 1. It carries over between models; 0.1 to 10 are sensible.
        one_minus_beta: :math:`1-\beta_{min}`, instead of ``omega``.
        beta: :math:`\beta_{min}`, instead of ``omega``; only where it is not 1 in float32.
        beta_schedule: ``linear``: 1 - beta grows from 0 to its final value over ``total_steps``.
            ``constant``.
        total_steps: length of the training; needed for ``linear`` and for ``start_frac``.
        start_frac: part of ``total_steps`` at the start that takes plain straight-through steps. 0.7 costs
            1.2 times a plain training, where 0 costs 1.67 times.
        kernel: ``uniform``, ``rademacher``, ``triangular``, ``logistic`` or ``normal``; by default read off
            grid and mask by :func:`kernel_of`.
        eps_bar: radius in units of the scale; by default read off likewise, and 0.01 for ``zo``.
        seed: noise of step t comes from ``splitmix64(seed, t)`` alone. On all processes the same.
        clip_grad_norm: limit for the norm of the quantised weights' gradient, after the estimate, and for
            that of all others, each on its own.
        directions_at_once: directions that are perturbed in one launch, for two copies of the weights each.

    Raises:
        TypeError: weights that are not float32.
        ValueError: no quantised layers, layers whose kernels differ (give ``kernel`` and ``eps_bar``), or a
            setting out of range.
        NotImplementedError: weights split over processes, on several devices, or also used unquantised.

    Source:
        FOGZO (Yang and Aamodt, NeurIPS 2025, arXiv 2510.23926), Algorithm 1.

    Example:
        >>> model = quantize.prepare(model, quantize.QuantConfig(weight_bits=2))
        >>> optimizer = FOGZO(torch.optim.AdamW(model.parameters(), 1e-3), model, total_steps=1000)
        >>> for images, labels in loader:
        ...     loss = optimizer.step(lambda: F.cross_entropy(model(images), labels))
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        estimator: str = "fogzo",
        n: int = 1,
        omega: float = 1.0,
        one_minus_beta: float | None = None,
        beta: float | None = None,
        beta_schedule: str = "linear",
        total_steps: int | None = None,
        start_frac: float = 0.0,
        kernel: str | None = None,
        eps_bar: float | None = None,
        seed: int = 0,
        clip_grad_norm: float | None = None,
        directions_at_once: int = 1,
    ) -> None:
        for key, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("beta_schedule", beta_schedule, SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"FOGZO: `{key}` must be one of {', '.join(known)}, got {value!r}.")
        for key, count in (
            ("n", n),
            ("directions_at_once", directions_at_once),
            ("total_steps", total_steps),
        ):
            if count is not None and count < 1:
                raise ValueError(f"FOGZO: `{key}` must be at least 1, got {count}.")
        if not 0 <= start_frac <= 1:
            raise ValueError(f"FOGZO: `start_frac` must be from 0 to 1, got {start_frac}.")
        if start_frac and estimator in ("spsa", "zo"):
            raise ValueError(f"FOGZO: `start_frac` must be 0 with estimator {estimator!r}, got {start_frac}.")
        if estimator == "fogzo" and total_steps is None and (beta_schedule == "linear" or start_frac):
            raise ValueError(
                "FOGZO: `total_steps` must be given with beta_schedule='linear' or `start_frac`, got None. "
                "Pass the number of optimizer steps of the whole training, or beta_schedule='constant'."
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"FOGZO: `seed` must be from 0 to 2**63 - 1, got {seed}.")
        self.optimizer = optimizer
        self.model = model
        self.estimator, self.n, self.seed = estimator, n, seed
        self.total_steps, self.beta_schedule, self.start_frac = total_steps, beta_schedule, start_frac
        self.clip_grad_norm, self.directions_at_once = clip_grad_norm, directions_at_once
        self._weights = _weights_of(model)
        self.device = self._weights[0].parameter.device
        self.kernel, self.eps_bar = self._radius(kernel, eps_bar)
        self._find_held()
        self._omega, self._final = self._trust(omega, one_minus_beta, beta)
        self.steps = self.skipped = 0
        self._last = torch.zeros((), dtype=torch.float64, device=self.device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._estimates = 0
        self._norms: dict[str, Tensor] = {}
        self._warned = self._agreed = False

    def _radius(self, kernel: str | None, eps_bar: float | None) -> tuple[str, float]:
        if self.estimator == "zo":
            kernel, eps_bar = kernel or "normal", eps_bar or _ZO_RADIUS
        if eps_bar is not None and not 0 < eps_bar < math.inf:
            raise ValueError(f"FOGZO: `eps_bar` must be a positive number, got {eps_bar}.")
        if kernel is not None and eps_bar is not None:
            return kernel, eps_bar
        found = {kernel_of(w.layers[0].grid, w.layers[0].mask) for w in self._weights}
        if len(found) > 1:
            raise ValueError(
                f"FOGZO: `kernel` and `eps_bar` must be given where layers need different ones, here "
                f"{sorted(found)}."
            )
        ((own, radius),) = found
        return kernel or own, eps_bar or radius

    def _trust(
        self, omega: float, one_minus_beta: float | None, beta: float | None
    ) -> tuple[float | None, float]:
        """Omega, and 1 - beta at the end of training where that was given instead."""
        if beta is not None:
            if one_minus_beta is not None:
                raise ValueError("FOGZO: `beta` must not be given together with `one_minus_beta`.")
            if 0 <= beta <= 1 and struct.unpack("f", struct.pack("f", beta))[0] == 1.0:
                raise ValueError(
                    f"FOGZO: `beta` must not be 1 in float32, got {beta!r}: its distance from 1 is lost. "
                    "Pass omega=(1 - beta) * number of quantised weights, or one_minus_beta; 0 for no noise."
                )
            one_minus_beta = 1 - beta
        count = self.dimension
        if one_minus_beta is None:
            if not 0 <= omega <= count:
                raise ValueError(
                    f"FOGZO: `omega` must be from 0 to {count}, the number of weights, got {omega}."
                )
            return omega, omega / count
        if not 0 <= one_minus_beta <= 1:
            raise ValueError(f"FOGZO: 1 - `beta` must be from 0 to 1, got {one_minus_beta}.")
        return None, one_minus_beta

    def _find_held(self) -> None:
        self._held = {id(p): p for group in self.param_groups for p in group["params"]}
        if not self._active():
            raise ValueError("FOGZO: `optimizer` must hold a trainable quantised weight of `model`.")

    def _active(self) -> list[_Weight]:
        return [w for w in self._weights if w.parameter.requires_grad and id(w.parameter) in self._held]

    @property
    def dimension(self) -> int:
        """The number of perturbed scalars: trainable, of a quantised weight, tied ones once."""
        return sum(w.parameter.numel() for w in self._active())

    @property
    def one_minus_beta(self) -> float:
        """1 - beta of the next step, in float64."""
        return self._one_minus_beta(self.dimension)

    def _one_minus_beta(self, dimension: int) -> float:
        if self.estimator in ("spsa", "zo"):
            return 1.0
        final = self._final if self._omega is None else self._omega / max(dimension, 1)
        if self.beta_schedule == "linear" and self.total_steps is not None:
            final *= min(self.steps / self.total_steps, 1.0)
        return min(final, 1.0)

    @property
    def estimating(self) -> bool:
        """Whether the next step replaces the gradient, or is a plain one."""
        if self.estimator == "ste":
            return False
        return not self.start_frac or self.steps >= round(self.start_frac * (self.total_steps or 0))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """That of the inner optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the inner optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the inner optimizer; quantised weights among them are perturbed from now on."""
        self.optimizer.add_param_group(param_group)
        self._find_held()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the inner optimizer's parameters; :meth:`step` does so by itself."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | Iterable[Callable[[], Tensor]],
        *,
        scaler: Any = None,
        local_weight: float = 1.0,
    ) -> Tensor:
        """One update.

        Args:
            closure: computes the loss of the step's batch and returns it, a float32 or float64 tensor of one
                element; it is called 1 + 2 n times. It may also clear gradients and call ``backward``, as
                closures of torch do; in passes without gradients that does nothing. It may go through
                micro-batches, if its loss is the one whose gradient it leaves. Or a sequence of closures that
                do not clear gradients: their losses are added. Draw the batch and its augmentation outside:
                torch's generators are replayed, Python's and NumPy's are not.
            scaler: a ``GradScaler``. Gradients are unscaled before anything else, measured slopes never see
                the scale, and ``scaler.step`` and ``scaler.update`` are called.
            local_weight: with several processes, the weight of this one's slopes, such as its samples over
                the mean of all; as the gradients are averaged.

        Returns:
            The loss before the update, detached: on this process's data. With ``spsa`` and ``zo`` the mean of
            the measured losses.

        Raises:
            TypeError: no closure, or a loss that is not a float32 or float64 tensor of one element.
            RuntimeError: processes with different seeds or gradients; found in the first step.

        With a gradient or a slope that is not finite nothing is updated, and ``skipped`` grows by 1; this
        check is the only wait for the device. Buffers and generators end as after one training pass.
        """
        if closure is None:
            raise TypeError("FOGZO.step: `closure` must be given: the loss is computed 1 + 2 n times.")
        closures = [closure] if callable(closure) else list(closure)
        start = Generators(self.device)
        backward = self.estimator in ("fogzo", "ste")
        buffers = Buffers(self.model, everything=not backward)
        weights = self._active()
        try:
            if backward:
                loss = self._base_pass(closures, scaler)
                buffers.hold()
                weights = [w for w in weights if w.parameter.grad is not None]
                grads = [w.parameter.grad.contiguous() for w in weights if w.parameter.grad is not None]
                sqnorm = self._sqnorm(weights, grads)
            else:
                grads = [w.parameter.new_zeros(w.parameter.shape) for w in weights]
                sqnorm = torch.zeros((), dtype=torch.float64, device=self.device)
            self._agree(sqnorm)
            finite = sqnorm.isfinite()
            if scaler is not None:
                every = [p.grad for p in self._held.values() if p.grad is not None]
                finite = finite & get_total_norm(every).isfinite()
            if self.estimating and weights:
                end = Generators(self.device)

                def replay() -> None:
                    start.restore()
                    buffers.restore()

                measured = self._estimate(closures, weights, grads, sqnorm, replay, local_weight)
                if backward:
                    end.restore()
                    buffers.restore()
                else:
                    loss = measured[1]
                finite = finite & measured[0].isfinite().all()
        finally:
            for weight in self._weights:
                weight.use(None)
        self._update(bool(finite), weights, scaler)
        self.steps += 1
        return loss

    def _losses(self, closures: Sequence[Callable[[], Tensor]]) -> Tensor:
        losses = [_checked(closure()) for closure in closures]
        return losses[0] if len(losses) == 1 else torch.stack([x.reshape(()) for x in losses]).sum()

    def _base_pass(self, closures: Sequence[Callable[[], Tensor]], scaler: Any) -> Tensor:
        """The ordinary pass: gradients of all parameters, unscaled, in ``.grad``."""
        self.zero_grad()
        losses = []
        with torch.enable_grad():
            # The hooks of DistributedDataParallel fire only if its own parameters are in the graph.
            quantised = [] if _distributed() else self._quantise()
            leaves = [q.detach().requires_grad_(q.requires_grad) for q in quantised]
            for weight, leaf in zip(self._weights, leaves):
                weight.use(leaf)
            for closure in closures:
                with backward_calls(run=True) as calls:
                    loss = closure()
                losses.append(_checked(loss))
                if not calls:
                    (loss if scaler is None else scaler.scale(loss)).backward()
        reached = [(q, leaf.grad) for q, leaf in zip(quantised, leaves) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([q for q, _ in reached], [g for _, g in reached])
        for weight, leaf in zip(self._weights, leaves):
            if leaf.grad is None:
                weight.parameter.grad = None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return losses[0] if len(losses) == 1 else torch.stack([x.reshape(()) for x in losses]).sum()

    def _quantise(self) -> list[Tensor]:
        """All quantised weights, in one call for each configuration."""
        out: list[Any] = [None] * len(self._weights)
        for (bits, grid, group, mask, factor), places in _by(self._weights, lambda w: w.quantizer).items():
            quantised = _op("fake_quantize", self.device)(
                [self._weights[i].parameter for i in places],
                [self._weights[i].scale for i in places],
                bits=bits,
                grid=grid,
                mask=mask,
                group_size=group,
                scale_gradient=factor,
            )
            for i, q in zip(places, quantised):
                out[i] = q
        return out

    def _sqnorm(self, weights: Sequence[_Weight], grads: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (_, _, group), places in _by(weights, lambda w: w.grid).items():
            total = total + _op("scaled_sqnorm", self.device)(
                [grads[i] for i in places],
                [weights[i].scale.detach() for i in places],
                group_size=group,
            )
        return total

    def _estimate(
        self,
        closures: Sequence[Callable[[], Tensor]],
        weights: Sequence[_Weight],
        grads: list[Tensor],
        sqnorm: Tensor,
        replay: Callable[[], None],
        local_weight: float,
    ) -> tuple[Tensor, Tensor]:
        """Put G in place of the gradients of ``weights``; the slopes and the mean of the losses."""
        seed = splitmix64(self.seed, self.steps)
        trust = self._one_minus_beta(sum(w.parameter.numel() for w in weights))
        groups = _by(weights, lambda w: w.grid)
        common: dict[tuple[int, str, int], dict[str, Any]] = {
            key: {
                "seed": seed,
                "one_minus_beta": trust,
                "kind": self.kernel,
                "group_size": key[2],
                "tensor_ids": [weights[i].index for i in places],
            }
            for key, places in groups.items()
        }
        kept = [(p, p.grad) for p in self._held.values()]
        for parameter, _ in kept:
            parameter.grad = None
        losses: list[Tensor] = []
        with backward_calls(run=False):
            for first in range(0, self.n, self.directions_at_once):
                count = min(self.directions_at_once, self.n - first)
                sides: list[tuple[Tensor, Tensor]] = [(sqnorm, sqnorm)] * len(weights)
                for (bits, grid, group), places in groups.items():
                    plus, minus = _op("spsa_perturb", self.device)(
                        [weights[i].parameter.detach() for i in places],
                        [grads[i] for i in places],
                        [weights[i].scale.detach() for i in places],
                        sqnorm,
                        eps_bar=self.eps_bar,
                        bits=bits,
                        grid=grid,
                        direction=first,
                        directions=count,
                        **common[bits, grid, group],
                    )
                    for i, *both in zip(places, plus, minus):
                        sides[i] = (both[0], both[1])
                for direction in range(count):
                    for side in range(2):
                        for weight, pair in zip(weights, sides):
                            weight.use(pair[side][direction])
                        replay()
                        losses.append(self._losses(closures).reshape(()).double())
        pairs = torch.stack(losses).view(self.n, 2)
        slopes = (pairs[:, 0] - pairs[:, 1]) / (2 * self.eps_bar)
        if _distributed():
            shared = torch.cat([slopes * local_weight, slopes.new_tensor([local_weight])])
            dist.all_reduce(shared)
            slopes = shared[:-1] / shared[-1]
        self._count(slopes, sqnorm, seed)
        for key, places in groups.items():
            _op("spsa_update_", self.device)(
                [grads[i] for i in places],
                [weights[i].scale.detach() for i in places],
                slopes,
                sqnorm,
                **common[key],
            )
        for parameter, grad in kept:
            parameter.grad = grad
        for weight, estimate in zip(weights, grads):
            weight.parameter.grad = estimate
        return slopes, pairs.mean()

    def _update(self, finite: bool, weights: Sequence[_Weight], scaler: Any) -> None:
        if self.clip_grad_norm is not None:
            own = {id(w.parameter) for w in weights}
            others = [p for key, p in self._held.items() if key not in own]
            for name, parameters in (
                ("grad_norm", [w.parameter for w in weights]),
                ("other_grad_norm", others),
            ):
                self._norms[name] = clip_grad_norm_(parameters, self.clip_grad_norm)
        if not finite:
            self.skipped += 1
        elif scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        if scaler is not None:
            scaler.update()

    def _agree(self, sqnorm: Tensor) -> None:
        """Once, where processes train together: that they have one seed and one gradient."""
        if self._agreed or not _distributed():
            return
        mine = torch.stack([torch.tensor(self.seed, device=self.device), sqnorm.view(torch.int64)])
        lowest, highest = mine.clone(), mine.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        seeds, gradients = (lowest == highest).tolist()
        if not seeds:
            raise RuntimeError(
                f"FOGZO: `seed` must be the same on all processes, but they have {int(lowest[0])} to "
                f"{int(highest[0])}; each would go its own way."
            )
        if not gradients:
            raise RuntimeError(
                "FOGZO: gradients must be equal on all processes, but they differ. Wrap the model in "
                "DistributedDataParallel and use that in the closure."
            )
        self._agreed = True

    def _count(self, slopes: Tensor, sqnorm: Tensor, seed: int) -> None:
        """Add to the statistics, on the device."""
        signs = [direction_sign(seed, i) for i in range(self.n)]
        along = slopes * signs[0] if self.n == 1 else slopes * slopes.new_tensor(signs)
        norm, zero = sqnorm.sqrt(), along == 0
        ratio = torch.where((norm > 0) & along.isfinite(), along / norm, 0.0)
        self._sums += torch.stack([ratio.sum(), *(x.sum().double() for x in (along < 0, zero)), zero.all()])
        self._last = ratio[-1]
        self._estimates += 1
        if not self._warned and self._estimates % _CHECK_EVERY == 0:
            share = self.stats["share_zero"]
            if share is not None and share > 0.5:
                self._warned = True
                warnings.warn(
                    f"FOGZO: {share:.0%} of the slopes so far are exactly 0: hardly a weight changes its "
                    "level within the radius. `eps_bar` is too small, or the model is very small.",
                    RuntimeWarning,
                    stacklevel=4,
                )

    @property
    def stats(self) -> dict[str, float | None]:
        """Counts and means over all steps so far; reading waits for the device.

        ``steps``, ``skipped`` and ``estimates`` (steps that measured slopes) are counts. ``slope_ratio`` is
        the mean of the slope along the straight-through gradient over its norm (1 where it tells the truth),
        ``last_slope_ratio`` the newest one, ``share_negative`` the share of directions along which the loss
        rises against it, ``share_zero`` and ``share_zero_steps`` those without any change of the loss.
        ``grad_norm`` and ``other_grad_norm`` are the last norms before clipping. None where there is none.
        """
        ratio, negative, zero, zero_steps = self._sums.tolist()
        estimates = self._estimates
        directions = estimates * self.n
        guided = estimates > 0 and self.estimator == "fogzo"
        norms = {key: float(value) for key, value in self._norms.items()}
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "estimates": estimates,
            "slope_ratio": ratio / directions if guided else None,
            "last_slope_ratio": float(self._last) if guided else None,
            "share_negative": negative / directions if guided else None,
            "share_zero": zero / directions if estimates else None,
            "share_zero_steps": zero_steps / estimates if estimates else None,
            "grad_norm": norms.get("grad_norm"),
            "other_grad_norm": norms.get("other_grad_norm"),
        }

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the seed, the step and the counts: all that an exact resume needs."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "seed": self.seed,
            "steps": self.steps,
            "skipped": self.skipped,
            "estimates": self._estimates,
            "sums": self._sums.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with noise of the saved seed from the saved step on."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.seed, self.steps = state_dict["seed"], state_dict["steps"]
        self.skipped, self._estimates = state_dict["skipped"], state_dict["estimates"]
        self._sums.copy_(state_dict["sums"])
        self._agreed = False
