"""Growth that learns: a larger model's weights as a function of a smaller one's, trained before use."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from pyvitfast.grow.fixed import Growth, index_maps
from pyvitfast.grow.layout import Layout
from pyvitfast.grow.models import Model, Pair, Target, finished, open_pair, set_eps
from pyvitfast.grow.rules import DEPTH

LossFunction = Callable[[Any, Any], Tensor]

# Seconds of training before a bar is worth its line.
_PATIENCE = 5.0


class GrowthOperator(nn.Module, ABC):
    """What learned operators have in common.

    The source's weights are buffers and never change; parameters are what is trained. They are float32, or
    float64 for a float64 source. The target is kept without memory of its own: its weights are made anew for
    every evaluation.

    Args:
        source: as for :func:`pyvitfast.grow.grow`; a ViT or DeiT.
        target: as for :func:`pyvitfast.grow.grow`.
        depth: ``stack``, ``stack_top`` or ``interleave``: which source block each target block starts from.
        noise: standard deviation of what the start is perturbed by, in units of 1 / sqrt(source width).
        seed: of all that is drawn.
        head: ``"grow"``, or ``"target"`` to start from the target's own classifiers, which are then trained
            along.

    Raises:
        NotImplementedError: a Swin Transformer, or a part that growth does not know.
        TypeError, ValueError: as :func:`pyvitfast.grow.grow`.
    """

    method = ""

    def __init__(
        self, source: Model, target: Target, *, depth: str, noise: float, seed: int, head: str
    ) -> None:
        super().__init__()
        self._check_start(depth, noise)
        pair = open_pair(source, target, head, seed)
        if not isinstance(pair.source, Layout) or not isinstance(pair.target, Layout):
            raise NotImplementedError(
                f"{type(self).__name__}: `source` must be a timm ViT or DeiT, got a Swin Transformer. Its "
                "stages have widths of their own, and one operator ties all blocks to one width. Take a "
                'fixed rule: grow(source, target, method="fpi").'
            )
        self.source_layout, self.target_layout = pair.source, pair.target
        self.growth = Growth(
            state={},
            source=pair.source,
            target=pair.target,
            width=self.method,
            depth=depth,
            maps=index_maps(pair.source, pair.target, "fpi", seed, {}),
            layers=(DEPTH[depth](pair.source.depth, pair.target.depth, False),),
            noise=noise,
            seed=seed,
            neuron_wise=False,
        )
        some = next(iter(pair.state.values()))
        self._wide = torch.promote_types(some.dtype, torch.float32)
        self._resized, self._own = pair.resized, pair.kept
        self._hold_outside(pair)
        set_eps(pair.big, self.growth)
        # In a tuple the target is no submodule: its weights are not the operator's.
        self._target = (pair.big.eval().to("meta"),)
        self.train(pair.training)

    def _check_start(self, depth: str, noise: float) -> None:
        name = type(self).__name__
        if depth == "identity":
            raise ValueError(
                f"{name}: `depth` must be stack, stack_top or interleave, got 'identity': blocks that add "
                "nothing need zeros in some matrices of a block only, and layers start alike in all."
            )
        if depth not in DEPTH:
            raise ValueError(f"{name}: `depth` must be stack, stack_top or interleave, got {depth!r}.")
        if not math.isfinite(noise) or noise < 0:
            raise ValueError(f"{name}: `noise` must be a number of at least 0, got {noise}.")

    def _hold_outside(self, pair: Pair) -> None:
        own = pair.big.state_dict()
        for key, p in self.source_layout.parameters().items():
            rest = key.split(".", 2)[-1]
            if key in self._own:
                continue
            if not key.startswith("blocks."):
                self._hold(key, pair.state[key])
            elif key.startswith("blocks.0.") and p.writes and p.writes[1] == "head_dim":
                names = [f"blocks.{i}.{rest}" for i in range(self.source_layout.depth)]
                self._hold(rest, torch.stack([pair.state[name] for name in names]))
        self.own = nn.ParameterDict({_plain(key): nn.Parameter(own[key].to(self._wide)) for key in self._own})

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(_plain(name), tensor.to(self._wide, copy=True))

    def _held(self, name: str) -> Tensor:
        held: Tensor = getattr(self, _plain(name))
        return held

    @property
    def device(self) -> torch.device:
        """Where the operator is evaluated."""
        return next(self.buffers()).device

    @abstractmethod
    def _evaluate(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The target's weights: those of all blocks [L2, ...] by name within a block, and all others."""

    def _outside(self, embed: Tensor, head: Tensor) -> dict[str, Tensor]:
        """What is outside the blocks, by ``embed`` and ``head`` [D1, D2]."""
        grown: dict[str, Tensor] = {}
        for key, p in self.target_layout.parameters().items():
            if key.startswith("blocks."):
                continue
            if key in self._own:
                grown[key] = self.own[_plain(key)]
            elif p.writes:
                grown[key] = (self._held(key).movedim(p.writes[0], -1) @ embed).movedim(-1, p.writes[0])
            else:
                grown[key] = self._held(key) @ head if p.reads else self._held(key)
        return grown

    def _head_norms(self, depth: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Norms of queries and keys: mixed by ``depth`` [L2, L1], copied where heads grow wider."""
        if not self.source_layout.qk_norm:
            return {}
        grown = {}
        for norm in ("q_norm", "k_norm"):
            for part in ("weight", "bias"):
                name = f"attn.{norm}.{part}"
                wide = self.growth.maps["head_dim"].copy(depth(name) @ self._held(name), 1)
                grown[name] = wide * self._query_scale if norm == "q_norm" else wide
        return grown

    @property
    def _query_scale(self) -> float:
        return math.sqrt(self.source_layout.head_dim / self.target_layout.head_dim)

    def _grown(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.autocast(self.device.type, enabled=False):
            return self._evaluate()

    def weights(self) -> dict[str, Tensor]:
        """The target's state dict, differentiable with respect to the operator's parameters.

        Returns:
            Tensors in the parameters' dtype, on their device; those of the blocks are views.
        """
        return _named(*self._grown())

    def forward(self, *inputs: Any) -> Any:
        """The target's outputs with :meth:`weights`, without dropout and drop path."""
        return self._call(self.weights(), inputs, self.training)

    def _call(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...], training: bool) -> Any:
        # The parts are in eval mode; of the whole, the mode tells whether DeiT returns both heads.
        self._target[0].training = training
        return torch.func.functional_call(self._target[0], dict(weights), inputs)

    def fit(
        self,
        loader: Iterable[Any],
        loss_fn: LossFunction,
        steps: int = 100,
        *,
        lr: float | None = None,
        grad_accum: int = 1,
        clip: float = 1.0,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> list[float]:
        """Train the operator with the target's loss; the source's weights stay.

        AdamW without weight decay, which would pull copies to zero, at a constant learning rate, and without
        dropout and drop path. The operator is evaluated once a step: gradients of the target's weights are
        summed over batches in place, and then pass through it.

        Args:
            loader: batches (images, labels); begins anew when it ends.
            loss_fn: called with the target's outputs and the labels; returns a scalar. With
                ``target.set_distilled_training(True)`` the outputs of a DeiT are a pair.
            steps: optimizer steps.
            lr: learning rate; by default 1e-3 for target widths up to 64, falling to 1e-4 from 192 on.
            grad_accum: batches a step; their losses are averaged.
            clip: largest norm of the gradient.
            device: where to train; the operator is moved there. By default it stays.
            progress: show a bar on a terminal once this takes longer than five seconds.

        Returns:
            The loss of each step, before it.

        Raises:
            TypeError: ``loss_fn`` returns no tensor.
            ValueError: an illegal number, a loader that gives nothing, or something other than pairs, or a
                loss that is no scalar.
            FloatingPointError: a loss or gradient is not finite. The operator is then as it was when both
                were finite last.

        A second call goes on from the parameters, with fresh moments. Nothing in it is random: bits depend
        on the batches.

        Source:
            LiGO (Wang et al., ICLR 2023) for 100 steps through the target; Mango (Pan et al., NeurIPS 2023).
            Optimizer, learning rate and clipping are our choice.
        """
        for name, count in (("steps", steps), ("grad_accum", grad_accum)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"fit: `{name}` must be a whole number of at least 1, got {count!r}.")
        rate = _learning_rate(self.target_layout.dim) if lr is None else lr
        for name, value in (("lr", rate), ("clip", clip)):
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"fit: `{name}` must be a number above 0, got {value}.")
        if device is not None:
            self.to(device)
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        good = [p.detach().clone() for p in parameters]
        batches, losses = _cycled(loader), list[float]()
        bar = Progress(transient=True)
        shown = progress and bar.console.is_terminal
        task, begun = bar.add_task(f"{type(self).__name__}", total=steps), time.perf_counter()
        try:
            for step in range(steps):
                optimizer.zero_grad()
                loss = self._backward(batches, loss_fn, grad_accum)
                norm = float(nn.utils.clip_grad_norm_(parameters, clip))
                if not math.isfinite(loss) or not math.isfinite(norm):
                    _copy(parameters, good)
                    raise FloatingPointError(
                        f"fit: the loss must stay finite, got loss {loss} and gradient norm {norm} in step "
                        f"{step + 1} of {steps}. The operator is as it was before. Lower `lr` (now "
                        f"{rate:g}), or look for NaN in the images."
                    )
                losses.append(loss)
                _copy(good, parameters)
                optimizer.step()
                if shown and not bar.live.is_started and time.perf_counter() - begun > _PATIENCE:
                    bar.start()
                bar.advance(task)
        finally:
            optimizer.zero_grad()
            if bar.live.is_started:
                bar.stop()
        return losses

    def _backward(self, batches: Iterator[Any], loss_fn: LossFunction, grad_accum: int) -> float:
        """Gradients of the mean loss of some batches; returns that loss."""
        blocks, others = self._grown()
        outputs = [t for t in (*blocks.values(), *others.values()) if t.requires_grad]
        slopes = {id(t): torch.zeros_like(t) for t in outputs}
        leaves = {key: t.detach() for key, t in _named(_each(blocks, Tensor.detach), others).items()}
        slopes_by_name = _named(
            _each(blocks, lambda t: slopes[id(t)]),
            {key: slopes[id(t)] for key, t in others.items() if t.requires_grad},
        )
        for key, slope in slopes_by_name.items():
            leaves[key].requires_grad_().grad = slope  # autograd adds to it in place
        total = 0.0
        for _ in range(grad_accum):
            images, labels = _batch(next(batches), self.device)
            loss = loss_fn(self._call(leaves, (images,), True), labels)
            if not isinstance(loss, Tensor):
                raise TypeError(f"fit: `loss_fn` must return a tensor, got {type(loss).__name__}.")
            if loss.numel() != 1:
                raise ValueError(f"fit: `loss_fn` must return a scalar, got shape {tuple(loss.shape)}.")
            torch.autograd.backward(loss / grad_accum)
            total += float(loss.detach()) / grad_accum
        torch.autograd.backward(outputs, [slopes[id(t)] for t in outputs])
        return total

    def materialize(self) -> nn.Module:
        """The target with the weights that the operator makes now, an ordinary module.

        Returns:
            A new module that shares no memory with operator, source or target, in the source's dtype, on the
            operator's device and in its mode, which is the source's at first. :func:`pyvitfast.grow.report`
            tells what was done.
        """
        big = copy.deepcopy(self._target[0]).to_empty(device=self.device).train(self.training)
        with torch.no_grad():
            return finished(big, self.weights(), self.method, self.growth, self._resized, self._own)


def _plain(name: str) -> str:
    """A name that may be a buffer's."""
    return "source_" + name.replace(".", "_")


def _each(tensors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: function(t) for name, t in tensors.items()}


def _named(blocks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(others)
    for name, stack in blocks.items():
        # One unbind, whose gradient is one stack: slices would each fill a tensor of the whole size.
        for i, tensor in enumerate(stack.unbind(0)):
            state[f"blocks.{i}.{name}"] = tensor
    return state


def _learning_rate(width: int) -> float:
    share = math.log(min(max(width, 64), 192) / 64) / math.log(3)
    return float(10 ** (-3 - share))


def _copy(to: list[Any], source: list[Any]) -> None:
    with torch.no_grad():
        for a, b in zip(to, source, strict=True):
            a.copy_(b)


def _cycled(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "fit: `loader` must give batches (images, labels) each time it is gone through, got none. "
                "Pass a DataLoader or a list rather than an iterator, with at least one batch."
            )


def _batch(batch: Any, device: torch.device) -> tuple[Tensor, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        what = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"fit: `loader` must give pairs (images, labels), got {what}.")
    images, labels = batch
    return images.to(device), labels.to(device) if isinstance(labels, Tensor) else labels
