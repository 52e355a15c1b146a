"""FOGZO: zeroth-order measurements that correct the straight-through estimator."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.models.modules import unwrap
from pyvitfast.models.quantized import LayerQuantization, QuantLayer, quantized_layers
from pyvitfast.reference._spsa import NOISES, direction_sign

ESTIMATORS = ("fogzo", "ste", "spsa", "zo")
_WORD = 2**64 - 1

# (eps_bar, noise) whose smoothing of the quantiser is the surrogate's: section 4 of the paper.
_ROUND = (1 / (2 * math.sqrt(3)), "uniform")
_KERNELS = {
    "identity": (1 / math.sqrt(3), "uniform"),
    "hardtanh": (1 / math.sqrt(3), "uniform"),
    "tanh": (math.pi / math.sqrt(12), "logistic"),
    "approx_sign": (1 / math.sqrt(6), "triangular"),
}
_MEZO = (1e-3, "normal")


def kernel_of(q: LayerQuantization) -> tuple[float, str]:
    """Radius in scales and noise that go with the surrogate of a layer."""
    return _KERNELS[q.mask] if q.grid == "sign" else _ROUND


def step_seed(seed: int, step: int) -> int:
    """The generator's key at a step: the splitmix64 of ``seed`` advanced by ``step``. 64 bits."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
    return z ^ z >> 31


@dataclass
class _Group:
    """Weights that one call of an op takes: equal bits, grid, surrogate and group size."""

    quantization: LayerQuantization
    eps_bar: float
    noise: str
    weights: list[nn.Parameter]
    ids: list[int]
    layers: list[list[QuantLayer]]

    def only(self, chosen: set[int]) -> _Group:
        """The part whose weights have these ids."""
        places = [i for i, w in enumerate(self.weights) if id(w) in chosen]
        parts = ([values[i] for i in places] for values in (self.weights, self.ids, self.layers))
        return _Group(self.quantization, self.eps_bar, self.noise, *parts)  # type: ignore[arg-type]

    def scales(self) -> list[Tensor]:
        return [owners[0].weight_scale.detach() for owners in self.layers]

    def use(self, weights: list[Tensor] | None) -> None:
        """Let the layers compute with ``weights``, or with their own again."""
        for i, owners in enumerate(self.layers):
            for layer in owners:
                layer.quantized_weight = None if weights is None else weights[i]


@contextlib.contextmanager
def _no_backward() -> Iterator[None]:
    """Backward passes inside do nothing, so that an ordinary closure can be evaluated without gradients."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    tensor_backward, function = torch.Tensor.backward, torch.autograd.backward
    torch.Tensor.backward, torch.autograd.backward = nothing, nothing  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            yield
    finally:
        torch.Tensor.backward, torch.autograd.backward = (  # type: ignore[method-assign]
            tensor_backward,
            function,
        )


class FOGZO(torch.optim.Optimizer):
    """Quantisation-aware training whose gradient is measured, guided by the straight-through one.

    A step takes the straight-through gradient g of the quantised network, then measures the loss at
    :math:`Q(w \\pm \\bar\\varepsilon s \\odot v)` for directions
    :math:`v = \\pm\\sqrt\\beta\\,\\hat g + \\sqrt{1-\\beta}\\,u` and hands the optimizer
    :math:`G = \\frac1n\\sum_i c_i v_i / s`, where c is the slope found. Where g misleads, c is about 0 or
    negative.

    Args:
        optimizer: any first-order optimizer over the model's parameters.
        model: from :func:`prepare`; wrapped by ``torch.compile`` or DistributedDataParallel or not.
        estimator: ``fogzo``; ``ste``: the optimizer's own step; ``spsa``: beta = 0, measured directions only
            and no backward pass; ``zo``: the same with Gaussian noise and a small fixed radius, after MeZO.
            With the last two only quantised weights are trained.
        n: directions a step; each costs two forward passes.
        omega: energy of the noise in a direction, (1 - beta) d for d perturbed weights; that of g is 1. From
            0.1 to 10 is sensible.
        one_minus_beta: that share itself, in place of ``omega``. Not beta: 1 - 1e-9 is 1 in float32.
        schedule: ``linear`` lets 1 - beta grow from 0 to its value over ``total_steps``; ``constant``.
        total_steps: optimizer steps of the training; needed by ``linear`` and ``start_frac``. Without it the
            schedule is constant.
        start_frac: part of ``total_steps`` taken with plain straight-through steps first. 0.7 is the mix of
            the paper; that these come first is inferred.
        eps_bar: radius in scales; None takes the one that goes with the surrogate (paper, section 4).
        noise: of directions: uniform, triangular, logistic, rademacher, normal; None likewise.
        clip_grad_norm: largest norm of the estimate, and, on its own, of the other gradients.
        seed: of all noise; the same on every rank. A step's noise depends on (seed, step) alone.

    Raises:
        TypeError: a quantised weight that is not float32.
        ValueError: a value out of its range, no quantised weight that the optimizer trains, or layers whose
            surrogates want different radii, where ``eps_bar`` is left out.

    Perturbed are the quantised weights that the optimizer holds, that require a gradient and get one:
    freezing and unfreezing is seen in the next step. Scales, learned or not, are fixed during the
    measurements, which take place in coordinates divided by them; learned scales and all other parameters
    keep their backpropagated gradients. These are our choices.

    Dropout and drop path are replayed in each measurement, and running statistics put back: torch's
    generators and the buffers end as after one training pass. Python's and NumPy's generators are not
    replayed, so draw the batch outside of the closure.

    It is a torch optimizer itself, for schedulers and accelerate; accelerate's wrapper returns no loss.

    Weight decay: decoupled (AdamW) acts as ever; coupled L2 is added to G by the optimizer.

    Source:
        Yang and Aamodt, Improving the Straight-Through Estimator with Zeroth-Order Information, NeurIPS 2025.

    Example:
        >>> model = prepare(model, QuantConfig(weight_bits=2))
        >>> optimizer = FOGZO(torch.optim.AdamW(model.parameters()), model, total_steps=1000)
        >>> loss = optimizer.step(lambda: loss_fn(model(images), labels))
    """

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module,
        *,
        estimator: str = "fogzo",
        n: int = 1,
        omega: float = 1.0,
        one_minus_beta: float | None = None,
        schedule: str = "linear",
        total_steps: int | None = None,
        start_frac: float = 0.0,
        eps_bar: float | None = None,
        noise: str | None = None,
        clip_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        def need(good: bool, rule: str, got: Any) -> None:
            if not good:
                raise ValueError(f"FOGZO: {rule}, got {got!r}.")

        need(estimator in ESTIMATORS, f"`estimator` must be one of {', '.join(ESTIMATORS)}", estimator)
        need(schedule in ("linear", "constant"), "`schedule` must be 'linear' or 'constant'", schedule)
        need(type(n) is int and n >= 1, "`n` must be a whole number of at least 1", n)
        need(0 <= omega < math.inf, "`omega` must be a finite number of at least 0", omega)
        given = one_minus_beta
        need(given is None or 0 <= given <= 1, "`one_minus_beta` must be from 0 to 1", given)
        need(total_steps is None or total_steps >= 1, "`total_steps` must be at least 1", total_steps)
        need(0 <= start_frac < 1, "`start_frac` must be at least 0 and below 1", start_frac)
        need(not start_frac or total_steps is not None, "`start_frac` needs `total_steps`", total_steps)
        need(eps_bar is None or 0 < eps_bar < math.inf, "`eps_bar` must be a positive number", eps_bar)
        need(noise is None or noise in NOISES, f"`noise` must be one of {', '.join(NOISES)}", noise)
        positive = clip_grad_norm is None or clip_grad_norm > 0
        need(positive, "`clip_grad_norm` must be a positive number", clip_grad_norm)
        need(type(seed) is int and 0 <= seed <= _WORD, "`seed` must be from 0 to 2^64 - 1", seed)
        self.optimizer, self.model = optimizer, model
        self.estimator, self.n, self.seed = estimator, n, seed
        self.schedule, self.total_steps, self.start_frac = schedule, total_steps, start_frac
        self.clip_grad_norm = clip_grad_norm
        self._groups = self._grouped(eps_bar, noise)
        self._weights = [w for group in self._groups for w in group.weights]
        trained = "`model` must come from prepare, and `optimizer` train a quantised weight of it"
        need(bool(self._weights) and self.dims > 0, trained, 0)
        self._omega, self._given = omega, 1.0 if estimator in ("spsa", "zo") else given
        if estimator in ("spsa", "zo"):
            self.schedule = "constant"
        self.steps = 0
        self._totals: Tensor | None = None
        self._measured = self._skipped = 0
        self._norms: dict[str, Tensor] = {}
        self._agreed = False
        if _world() > 1:
            self._check_seed()

    # torch's own would leave out all but groups and state, and wrap step() of every FOGZO in the process.
    # A scheduler's wrapper around step() is bound to the original.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _grouped(self, eps_bar: float | None, noise: str | None) -> list[_Group]:
        owners: dict[int, list[QuantLayer]] = {}
        for layer in quantized_layers(self.model).values():
            owners.setdefault(id(layer.weight), []).append(layer)
        groups: dict[tuple[Any, ...], _Group] = {}
        for index, layers in enumerate(owners.values()):
            q = layers[0].quantization
            default = _MEZO if self.estimator == "zo" else kernel_of(q)
            key = (q.bits, q.grid, q.mask, q.group_size, q.learned)
            if key not in groups:
                groups[key] = _Group(q, eps_bar or default[0], noise or default[1], [], [], [])
            group = groups[key]
            weight: Any = layers[0].weight
            if weight.dtype != torch.float32:
                raise TypeError(
                    "FOGZO: quantised weights must be float32, got "
                    f"{str(weight.dtype).removeprefix('torch.')}. Keep them so and use autocast."
                )
            group.weights.append(weight)
            group.ids.append(index)
            group.layers.append(layers)
        radii = {group.eps_bar for group in groups.values()}
        if len(radii) > 1:
            # One loss difference has one radius: with several, G would not be parallel to g.
            raise ValueError(
                "FOGZO: `eps_bar` must be given where the surrogates of the layers differ, got "
                f"{sorted(radii)} from them."
            )
        return list(groups.values())

    @property
    def dims(self) -> int:
        """How many scalars are perturbed now: shared ones once, frozen ones not."""
        return sum(w.numel() for w in self._trained())

    @property
    def one_minus_beta(self) -> float:
        """1 - beta at the end of the training, in float64."""
        return min(1.0, self._omega / max(1, self.dims)) if self._given is None else self._given

    def _trained(self) -> list[nn.Parameter]:
        held = {id(p) for group in self.param_groups for p in group["params"]}
        return [w for w in self._weights if w.requires_grad and id(w) in held]

    def _check_seed(self) -> None:
        mine = torch.tensor([self.seed >> 32, self.seed & 0xFFFFFFFF], device=self._weights[0].device)
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise ValueError(
                f"FOGZO: `seed` must be the same on every rank, got {self.seed} here and another one "
                "elsewhere: replicas would part."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, for schedulers."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's."""
        defaults: dict[str, Any] = self.optimizer.defaults
        return defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The optimizer's own; quantised weights among them are perturbed from the next step on."""
        self.optimizer.add_param_group(param_group)

    def noise_share(self, step: int) -> float:
        """1 - beta at a step, in float64."""
        if self.schedule == "constant" or self.total_steps is None:
            return self.one_minus_beta
        return self.one_minus_beta * min(1.0, step / self.total_steps)

    @property
    def straight_through(self) -> bool:
        """Whether the next step is a plain straight-through one."""
        if self.estimator == "ste":
            return True
        return self.steps < self.start_frac * (self.total_steps or 0)

    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor], scaler: Any = None, *, local_weight: float = 1.0
    ) -> Tensor:
        """One optimizer step.

        Args:
            closure: computes the loss of a batch and returns it: float32 or float64, one element. It may call
                ``zero_grad`` and ``backward`` as a torch closure does, also for several micro-batches, and
                then returns the loss that all of them make; else the backward pass is done here. It is called
                1 + 2n times and must see the same batch each time.
            scaler: a ``torch.amp.GradScaler``; a closure that calls ``backward`` itself does so on the scaled
                loss, and returns the plain one. Gradients are unscaled first; the estimate needs no scale.
            local_weight: of this process's slopes in their mean over all processes.

        Returns:
            The loss at the current weights, detached (with ``spsa`` and ``zo`` the mean over the first pair).

        Raises:
            TypeError: the closure does not return a float32 or float64 tensor: differences of 16-bit losses
                have three digits.
            RuntimeError: processes whose gradients differ, in the first step.

        A gradient of a quantised weight or a slope that is not finite skips the update and is counted.
        """
        device = self._weights[0].device
        measured_only = self.estimator in ("spsa", "zo")
        states = _random_states(device)
        loss = None if measured_only else self._base(closure, scaler)
        if scaler is not None and not measured_only:
            scaler.unscale_(self.optimizer)
        trained = self._trained()
        # A weight without a gradient took no part: noise would only shake it.
        chosen = {id(w) for w in trained if measured_only or w.grad is not None}
        groups = [part for group in self._groups if (part := group.only(chosen)).weights]
        grads = {
            id(w): torch.zeros_like(w) if measured_only or w.grad is None else w.grad
            for group in groups
            for w in group.weights
        }
        sqnorm = self._sqnorm(groups, grads)
        finite = sqnorm.isfinite()
        if not self.straight_through and groups:
            self._agree(sqnorm)
            after = _random_states(device)
            others = self._take_gradients()
            buffers = _Buffers(self.model)

            def replay() -> None:
                _restore(states, device)
                buffers.restore()

            pair, difference = self._measure(closure, groups, grads, sqnorm, replay, local_weight)
            if measured_only:
                loss = pair
            else:
                _restore(after, device)
                buffers.restore()
                for parameter, grad in others:
                    parameter.grad = grad
            self._write(difference, groups, grads, sqnorm)
            self._count(difference, sqnorm)
            finite = finite & difference.isfinite().all()
        assert loss is not None
        self._finish(bool(finite), None if measured_only else scaler)
        return loss

    def _base(self, closure: Callable[[], Tensor], scaler: Any) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel must see the parameters themselves in the graph.
        alone = _world() == 1
        rounded: list[Tensor] = []
        leaves: list[Tensor] = []
        owners: list[tuple[nn.Parameter, Tensor]] = []
        try:
            if alone:
                for group in self._groups:
                    own = self._round(group)
                    group.use([w.detach() for w in own])
                    for out, weight, layers in zip(own, group.weights, group.layers, strict=True):
                        if weight.requires_grad or layers[0].weight_scale.requires_grad:
                            rounded.append(out)
                            owners.append((weight, layers[0].weight_scale))
                            leaf: Any = layers[0].quantized_weight
                            leaves.append(leaf.requires_grad_())
            with torch.enable_grad():
                loss = _checked(closure())
                trained = [p for g in self.optimizer.param_groups for p in g["params"]]
                if all(t.grad is None for t in (*leaves, *trained)):
                    (loss if scaler is None else scaler.scale(loss)).backward()
        finally:
            for group in self._groups:
                group.use(None)
        before = [(t, t.grad) for pair in owners for t in pair]
        if rounded:
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
            torch.autograd.backward(rounded, grads)
        for i, leaf in enumerate(leaves):
            if leaf.grad is None:
                for tensor, grad in before[2 * i : 2 * i + 2]:
                    tensor.grad = grad
        return loss.detach()

    def _round(self, group: _Group) -> list[Tensor]:
        q = group.quantization
        run = ops.implementation("fake_quantize", group.weights[0].device)
        with torch.enable_grad():
            out: list[Tensor] = run(
                group.weights,
                [owners[0].weight_scale for owners in group.layers],
                bits=q.bits,
                grid=q.grid,
                mask=q.mask,
                group_size=q.group_size,
                scale_gradient=q.learned,
            )
        return out

    def _take_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """All gradients, out of reach of the closure's ``zero_grad``."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        taken = [(p, p.grad) for p in held]
        for parameter in held:
            parameter.grad = None
        return taken

    @torch.no_grad()
    def _sqnorm(self, groups: list[_Group], grads: dict[int, Tensor]) -> Tensor:
        device = self._weights[0].device
        sqnorm = torch.zeros((), dtype=torch.float64, device=device)
        if self.estimator in ("spsa", "zo"):
            return sqnorm
        run = ops.implementation("scaled_sqnorm", device)
        for group in groups:
            own = [grads[id(w)] for w in group.weights]
            sqnorm += run(own, group.scales(), group_size=group.quantization.group_size)
        return sqnorm

    @torch.no_grad()
    def _measure(
        self,
        closure: Callable[[], Tensor],
        groups: list[_Group],
        grads: dict[int, Tensor],
        sqnorm: Tensor,
        replay: Callable[[], None],
        local_weight: float,
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of the first pair, and the difference of each."""
        differences = []
        first: Tensor | None = None
        try:
            for direction in range(self.n):
                sides = [self._perturbed(group, grads, sqnorm, direction) for group in groups]
                losses = []
                for side in (0, 1):
                    for group, both in zip(groups, sides, strict=True):
                        group.use([w[0] for w in both[side]])
                    replay()
                    with _no_backward():
                        losses.append(_checked(closure()).detach().double().reshape(()))
                differences.append(losses[0] - losses[1])
                if first is None:
                    first = ((losses[0] + losses[1]) / 2).float()
        finally:
            for group in groups:
                group.use(None)
        difference = torch.stack(differences)
        if _world() > 1:
            parts = torch.cat([difference * local_weight, difference.new_tensor([local_weight])])
            dist.all_reduce(parts)
            difference = parts[:-1] / parts[-1]
        assert first is not None
        return first, difference

    def _agree(self, sqnorm: Tensor) -> None:
        """Once, that the gradients were averaged: without it replicas part in silence."""
        if self._agreed or _world() == 1:
            return
        lowest, highest = sqnorm.clone(), sqnorm.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        if not torch.equal(lowest, highest) and bool(sqnorm.isfinite()):
            raise RuntimeError(
                "FOGZO: gradients must be equal on all processes, but they differ. Wrap the model in "
                "DistributedDataParallel and call that in the closure."
            )
        self._agreed = True

    def _perturbed(
        self, group: _Group, grads: dict[int, Tensor], sqnorm: Tensor, direction: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        q = group.quantization
        run = ops.implementation("spsa_perturb", sqnorm.device)
        sides: tuple[list[Tensor], list[Tensor]] = run(
            group.weights,
            [grads[id(w)] for w in group.weights],
            group.scales(),
            sqnorm,
            seed=step_seed(self.seed, self.steps),
            one_minus_beta=self.noise_share(self.steps),
            eps_bar=group.eps_bar,
            bits=q.bits,
            grid=q.grid,
            kind=group.noise,
            direction=direction,
            group_size=q.group_size,
            tensor_ids=group.ids,
        )
        return sides

    @torch.no_grad()
    def _write(
        self, difference: Tensor, groups: list[_Group], grads: dict[int, Tensor], sqnorm: Tensor
    ) -> None:
        for group in groups:
            run = ops.implementation("spsa_update_", sqnorm.device)
            run(
                [grads[id(w)] for w in group.weights],
                group.scales(),
                difference / (2 * group.eps_bar),
                sqnorm,
                seed=step_seed(self.seed, self.steps),
                one_minus_beta=self.noise_share(self.steps),
                kind=group.noise,
                group_size=group.quantization.group_size,
                tensor_ids=group.ids,
            )
            for weight in group.weights:
                weight.grad = grads[id(weight)]

    def _finish(self, finite: bool, scaler: Any) -> None:
        """Clip, update and count."""
        if self.clip_grad_norm is not None:
            mine = self._trained()
            ids = {id(w) for w in mine}
            rest = [p for g in self.optimizer.param_groups for p in g["params"] if id(p) not in ids]
            for name, part in (("grad_norm", mine), ("other_grad_norm", rest)):
                self._norms[name] = torch.nn.utils.clip_grad_norm_(part, self.clip_grad_norm)
        if not finite:
            self._skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
        elif scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        if scaler is not None:
            scaler.update()
        self.steps += 1

    def _count(self, difference: Tensor, sqnorm: Tensor) -> None:
        seed = step_seed(self.seed, self.steps)
        signs = torch.tensor([direction_sign(seed, i) for i in range(self.n)], dtype=torch.float64)
        along = difference * signs.to(difference.device)
        eps_bar = self._groups[0].eps_bar
        ratio = (along / (2 * eps_bar) / sqnorm.sqrt()).nan_to_num(0.0, 0.0, 0.0)
        sums = [
            ratio.sum(),
            (along < 0).sum(),
            (along == 0).sum(),
            (along == 0).all(),
            along.new_tensor(self.n),
        ]
        now = torch.stack([s.double() for s in (*sums, along.new_tensor(1.0))])
        self._totals = now if self._totals is None else self._totals + now
        self._measured += 1
        if self._measured in (50, 500, 5000) and (share := self.stats["share_zero"]) > 0.5:
            warnings.warn(
                f"FOGZO: in {100 * share:.0f} % of the measurements no loss differed, so nothing was learned "
                "from them. The radius is too small for weights to change their code: raise `eps_bar` or "
                "`omega`, or use finer scales.",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def stats(self) -> dict[str, float]:
        """What the measurements said so far; reading it waits for the device.

        ``slope_ratio``: mean of c / ||g||, the measured slope along g over the one g promises;
        ``share_negative`` and ``share_zero``: of directions with c < 0 and c = 0;
        ``share_zero_steps``: of steps without any slope; ``measured_steps``; ``skipped``: steps with values
        that were not finite. With ``clip_grad_norm`` also the last norms before clipping: ``grad_norm`` of
        the quantised weights and ``other_grad_norm``.
        """
        values = [0.0] * 6 if self._totals is None else self._totals.tolist()
        ratio, negative, zero, zero_steps, directions, steps = values
        return {
            "slope_ratio": ratio / max(directions, 1),
            "share_negative": negative / max(directions, 1),
            "share_zero": zero / max(directions, 1),
            "share_zero_steps": zero_steps / max(steps, 1),
            "measured_steps": steps,
            "skipped": float(self._skipped),
            **{name: float(norm) for name, norm in self._norms.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state, step and counters: with them a run goes on in the same bits."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seed": self.seed,
            "skipped": self._skipped,
            "measured": self._measured,
            "totals": None if self._totals is None else self._totals.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state was made with another seed.
        """
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"FOGZO: the state was made with seed {state_dict['seed']}, this has {self.seed}; the noise "
                "would differ. Make it with the same seed."
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.steps, self._skipped = state_dict["steps"], state_dict["skipped"]
        self._measured, self._agreed = state_dict["measured"], False
        totals = state_dict["totals"]
        device = self._weights[0].device
        self._totals = None if totals is None else torch.tensor(totals, dtype=torch.float64, device=device)


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"FOGZO: the closure must return a loss tensor of one element, got {loss!r}.")
    if loss.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"FOGZO: the loss must be float32 or float64, got {str(loss.dtype).removeprefix('torch.')}: "
            "differences of 16-bit losses are mostly 0. Compute the loss from logits.float()."
        )
    return loss


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class _Buffers:
    """Buffers as they are now. All of them: batch norm writes its own without a new version."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(unwrap(model).buffers())
        self._values = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.copy_(value)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
