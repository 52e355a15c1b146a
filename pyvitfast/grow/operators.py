"""Growth that learns: a larger model's weights as a function of a smaller one's, trained before use."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from pyvitfast.grow.fixed import Growth, index_maps
from pyvitfast.grow.layout import Parameter, Stage
from pyvitfast.grow.models import Model, Pair, Target, finished, open_pair, set_eps
from pyvitfast.grow.rules import DEPTH, LayerMap

LossFunction = Callable[[Any, Any], Tensor]

# Stacks of the target's tensors of one name [L2, ...], by the start of the blocks' names and the name within.
Blocks = dict[tuple[str, str], Tensor]

# Seconds of training before a bar is worth its line.
_PATIENCE = 5.0


class GrowthOperator(nn.Module, ABC):
    """What learned operators have in common.

    The source's weights are buffers and never change; parameters are what is trained. They are float32, or
    float64 for a float64 source. The target is kept without memory of its own: its weights are made anew for
    every evaluation.

    Each stage of a Swin Transformer has maps of its own, since widths differ; their names end with its
    number, as ``embed_0``. Between two stages, what merges four tokens reads by four copies of the map of the
    stage before and writes by that of the stage after. Patches have the first stage's maps, the final norm
    and the classifier the last's. Tables of relative positions grow by heads and are mixed by layers.

    Args:
        source: as for :func:`pyvitfast.grow.grow`.
        target: as for :func:`pyvitfast.grow.grow`.
        depth: ``stack``, ``stack_top`` or ``interleave``: which source block each target block starts from.
        noise: standard deviation of what the start is perturbed by, in units of 1 / sqrt(source width).
        seed: of all that is drawn.
        head: ``"grow"``, or ``"target"`` to start from the target's own classifiers, which are then trained
            along.

    Raises:
        NotImplementedError: a part that growth does not know.
        TypeError, ValueError: as :func:`pyvitfast.grow.grow`.
    """

    method = ""

    def __init__(
        self, source: Model, target: Target, *, depth: str, noise: float, seed: int, head: str
    ) -> None:
        super().__init__()
        self._check_start(depth, noise)
        pair = open_pair(source, target, head, seed)
        self.source_layout, self.target_layout = pair.source, pair.target
        self.growth = Growth(
            state={},
            source=pair.source,
            target=pair.target,
            width=self.method,
            depth=depth,
            maps=index_maps(pair.source, pair.target, "fpi", seed, {}),
            layers=tuple(
                DEPTH[depth](a.depth, b.depth, pair.source.alternating)
                for a, b in zip(pair.source.stages, pair.target.stages, strict=True)
            ),
            noise=noise,
            seed=seed,
            neuron_wise=False,
        )
        some = next(iter(pair.state.values()))
        self._wide = torch.promote_types(some.dtype, torch.float32)
        self._resized, self._own = pair.resized, pair.kept
        self._hold_outside(pair)
        set_eps(pair.big, self.growth)
        # Shift masks and position indices are the architecture's; what is on meta has no values.
        self._constants = {name: _plain(name, "target") for name, _ in pair.big.named_buffers()}
        for name, constant in pair.big.named_buffers():
            self.register_buffer(self._constants[name], constant.clone(), persistent=False)
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
        for key in self.source_layout.parameters():
            if key not in self._own and not _in_blocks(self.source_layout.stages, key):
                self._hold(key, pair.state[key])
        for stage in self.source_layout.stages:
            for name, p in self._within(stage).items():
                if beside(stage, p):
                    self._hold(stage.axis(name), stack_of(pair, stage, name))
        self.own = nn.ParameterDict({_plain(key): nn.Parameter(own[key].to(self._wide)) for key in self._own})

    def _within(self, stage: Stage) -> dict[str, Parameter]:
        """Names within a block of a source's stage, and what they are."""
        start, found = f"{stage.prefix}.0.", self.source_layout.parameters()
        return {key.removeprefix(start): p for key, p in found.items() if key.startswith(start)}

    def _stages(self) -> Iterator[tuple[Stage, Stage, LayerMap]]:
        """Source's and target's stages, and the map of their blocks."""
        return zip(self.source_layout.stages, self.target_layout.stages, self.growth.layers, strict=True)

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
    def _evaluate(self) -> tuple[Blocks, dict[str, Tensor]]:
        """The target's weights: those of all blocks, and all others by name."""

    def _outside(self, embeds: Sequence[Tensor], heads: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is outside the blocks, by maps [D1, D2] of each stage of what it writes and what it reads."""
        stages = self.target_layout.stages
        out, into = (
            {
                stage.axis(axis): m
                for stage, m in zip(stages, maps, strict=True)
                for axis in ("embed", "merge")
            }
            for maps in (embeds, heads)
        )
        grown: dict[str, Tensor] = {}
        for key, p in self.target_layout.parameters().items():
            if _in_blocks(stages, key):
                continue
            if key in self._own:
                grown[key] = self.own[_plain(key)]
                continue
            tensor = self._held(key)
            if p.reads:
                tensor = _by_pieces(tensor, into[p.reads])
            if p.writes:
                tensor = _by_pieces(tensor.movedim(p.writes[0], -1), out[p.writes[1]]).movedim(
                    -1, p.writes[0]
                )
            grown[key] = tensor
        return grown

    def _head_norms(self, old: Stage, new: Stage, depth: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Norms of queries and keys: mixed by ``depth`` [L2, L1], copied where heads grow wider."""
        if not self.source_layout.qk_norm:
            return {}
        grown = {}
        for norm in ("q_norm", "k_norm"):
            for part in ("weight", "bias"):
                name = f"attn.{norm}.{part}"
                mixed = depth(name) @ self._held(old.axis(name))
                wide = self.growth.maps[old.axis("head_dim")].copy(mixed, 1)
                grown[name] = wide * query_scale(old, new) if norm == "q_norm" else wide
        return grown

    def _grown(self) -> tuple[Blocks, dict[str, Tensor]]:
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
        constants = {name: getattr(self, held) for name, held in self._constants.items()}
        return torch.func.functional_call(self._target[0], {**weights, **constants}, inputs)

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
            lr: learning rate; by default 1e-3 for target widths up to 64, falling to 1e-4 from 192 on; in a
                Swin Transformer by the width of the last stage.
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
        rate = _learning_rate(self.target_layout.stages[-1].dim) if lr is None else lr
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
            for name, constant in big.named_buffers():
                constant.copy_(getattr(self, self._constants[name]))
            return finished(big, self.weights(), self.method, self.growth, self._resized, self._own)


def of_stage(stage: Stage, name: str) -> str:
    """The name of a stage's parameter of an operator."""
    return stage.axis(name).replace(".", "_")


def _plain(name: str, whose: str = "source") -> str:
    """A name that may be a buffer's."""
    return f"{whose}_{name.replace('.', '_')}"


def _in_blocks(stages: Sequence[Stage], key: str) -> bool:
    return any(key.startswith(f"{stage.prefix}.") for stage in stages)


def beside(stage: Stage, p: Parameter) -> bool:
    """Whether a block's tensor has no axis of the stream's, the rows' or the hidden units' width."""
    return p.kind == "table" or (p.writes is not None and p.writes[1] == stage.axis("head_dim"))


def stack_of(pair: Pair, stage: Stage, name: str) -> Tensor:
    """The source's tensors of one name within a block [L1, ...]."""
    return torch.stack([pair.state[f"{stage.prefix}.{i}.{name}"] for i in range(stage.depth)])


def _by_pieces(tensor: Tensor, width: Tensor) -> Tensor:
    """The last dimension by ``width`` [D1, D2]; of several D1 side by side, each."""
    if tensor.shape[-1] == width.shape[0]:
        return tensor @ width
    pieces = tensor.reshape(*tensor.shape[:-1], -1, width.shape[0])
    return (pieces @ width).flatten(-2)


def query_scale(old: Stage, new: Stage) -> float:
    """What queries are multiplied with where the target divides by the root of a larger head width."""
    return math.sqrt(old.head_dim / new.head_dim)


def _each(blocks: Blocks, function: Callable[[Tensor], Tensor]) -> Blocks:
    return {name: function(t) for name, t in blocks.items()}


def _named(blocks: Blocks, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(others)
    for (prefix, name), stack in blocks.items():
        # One unbind, whose gradient is one stack: slices would each fill a tensor of the whole size.
        for i, tensor in enumerate(stack.unbind(0)):
            state[f"{prefix}.{i}.{name}"] = tensor
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
