"""NViT: global structural pruning of Vision Transformers, during training."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyvitfast import ops
from pyvitfast.models.architecture import Dims, prunable_config_of
from pyvitfast.models.modules import unwrap
from pyvitfast.prune.compaction import compact_model
from pyvitfast.prune.config import NViTConfig
from pyvitfast.prune.cost import Cost, MacsCost, ParamsCost
from pyvitfast.prune.latency import LatencyTable
from pyvitfast.prune.shards import held_rows, local, shard_group
from pyvitfast.prune.structure import Piece, Structure, UnitTable


class NViTPruner:
    r"""Removes heads, query/key, value, MLP and residual dims of a ViT while it trains, then cuts them out.

    The score of a structural unit S is the squared first-order change of the loss when a gate on it moves,
    averaged over minibatches:

    .. math:: I_S = \operatorname{mean}_b \Big( \sum_{s \in S} w_s \, \partial L_b / \partial w_s \Big)^2

    Every ``interval`` optimizer steps the ``groups_per_step`` lowest groups of all structures are masked to
    zero, until the budget is reached. The paper calls the score Hessian-aware; it uses gradients only.

    Call order of one step: backward, :meth:`step`. It scores the weights and gradients as they are before
    the update, calls ``optimizer.step()``, stores 0 in all pruned weights and their optimizer state, and
    prunes when an interval is full.

    Args:
        model: a timm ``VisionTransformer``, ``VisionTransformerDistilled`` or ``SwinTransformer``, or one of
            our pruned ones; inside ``torch.compile`` or DistributedDataParallel or not, or split over
            processes by ``fully_shard`` before. Its weights are masked in place.
        target: fraction of the budget to reach, in (0, 1).
        budget: ``"macs"``, ``"params"`` or ``"latency"``.
        latency: a :class:`LatencyTable`, or any object with ``query(dims)`` and ``delta(dims)``; needed for
            ``budget="latency"`` and, when given, the cost that ``eta`` and ``cost_rule`` look at.
        interval: optimizer steps between two removals.
        preset: ``"paper"`` or ``"nvit_repo"``; see :meth:`NViTConfig.preset`.
        config: all settings at once, instead of ``target``, ``budget``, ``interval``, ``preset`` and
            ``settings``.
        **settings: further fields of :class:`NViTConfig`.

    Raises:
        TypeError: the model is not a Vision Transformer.
        NotImplementedError: it has a part that cannot be pruned (named).
        ValueError: a setting out of range, a target below what can be reached, no latency table for
            ``budget="latency"``, or one of another model family.

    Source:
        NViT (Yang et al., CVPR 2023), section 3, eq. 6-7. We depart where docs/methods/prune.md says so.

    Example:
        >>> model = timm.create_model("deit_small_patch16_224")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = NViTPruner(model, target=0.5, interval=100)
        >>> while not pruner.done:
        ...     loss(model(images), labels).backward()
        ...     pruner.step(optimizer)
        ...     optimizer.zero_grad()
        >>> slim = pruner.compact(optimizer)
    """

    def __init__(
        self,
        model: nn.Module,
        target: float = 0.5,
        budget: str = "macs",
        latency: Cost | None = None,
        interval: int = 100,
        preset: str = "paper",
        config: NViTConfig | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"NViTPruner: `model` must be an nn.Module, got {type(model).__name__}.")
        self.config = config or NViTConfig.preset(
            preset, target=target, budget=budget, interval=interval, **settings
        )
        self.model = unwrap(model)
        architecture = prunable_config_of(self.model)
        self.table = UnitTable(architecture, dict(self.config.group_sizes or {}))
        self._macs, self._params = MacsCost(architecture), ParamsCost(architecture)
        if isinstance(latency, LatencyTable):
            latency.check(architecture)
        self._budget, self._saving = self._costs(latency)
        self._dense = architecture.dims
        floor = self._fraction(self._budget, self.table.floor())
        if floor > self.config.target:
            raise ValueError(
                f"NViTPruner: `target` must be at least {floor:.4f}, the fraction of {self.config.budget} "
                f"left with one group in every structure, got {self.config.target}. Raise it or use smaller "
                "`group_sizes`."
            )
        self._parameters = dict(self.model.named_parameters())
        self._shards = shard_group(self.model)
        self._held = {name: held_rows(name, p) for name, p in self._parameters.items()}
        self._scored_pieces = self.table.scored(self.config.membership)
        self._layout: tuple[bool, ...] | None = None

        some = next(iter(self._parameters.values()))
        wide = torch.float64 if some.dtype == torch.float64 else torch.float32
        count = self.table.count
        self._device = some.device
        self._acc = torch.zeros(count, dtype=wide, device=self._device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._ema = torch.zeros(count, dtype=torch.float64)
        self._intervals = 0
        self._alive = torch.ones(count, dtype=torch.bool)
        self._has_gradient = torch.ones(count, dtype=torch.bool)
        self._coeff = self._coefficients().to(self._acc)
        self._fresh = True
        self._set_masks()
        self._skipped = 0
        self.steps = 0
        self.history: list[dict[str, Any]] = []

    def _costs(self, latency: Cost | None) -> tuple[Cost, Cost]:
        if latency is not None and not isinstance(latency, Cost):
            raise TypeError(
                f"NViTPruner: `latency` must have query(dims) and delta(dims), got {type(latency).__name__}."
            )
        if self.config.budget == "latency":
            if latency is None:
                raise ValueError(
                    "NViTPruner: `latency` must be a latency table with budget='latency', got None. Pass "
                    "LatencyTable.measure(model, device, batch_size), or use budget='macs' or 'params'."
                )
            return latency, latency
        budget = self._macs if self.config.budget == "macs" else self._params
        return budget, latency or budget

    def _coefficients(self) -> Tensor:
        coeff = torch.ones(self.table.count, dtype=torch.float64)
        for s in self.structures:
            coeff[s.start : s.stop] /= (self.config.divisors or {}).get(s.kind, 1.0)
        return coeff

    @property
    def structures(self) -> tuple[Structure, ...]:
        """All prunable structures, in the order of the unit numbers."""
        return tuple(self.table.structures.values())

    @property
    def dims(self) -> Dims:
        """The widths that are left."""
        return self.table.dims(self._alive)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which units are alive, bool [size of the structure], by structure name."""
        return {s.name: self._alive[s.start : s.stop].clone() for s in self.structures}

    @property
    def fraction(self) -> float:
        """The share of the budget that is left, 1 at the start."""
        return self._fraction(self._budget, self.dims)

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.fraction <= self.config.target

    @property
    def skipped(self) -> int:
        """Minibatches left out because a weight or gradient was not finite. Waits for the device."""
        return self._skipped + int(self._counts[1])

    @property
    def unscored(self) -> list[str]:
        """Structures without any gradient in this interval, such as those of frozen blocks; never pruned."""
        return [s.name for s in self.structures if not self._has_gradient[s.start : s.stop].any()]

    @property
    def unit_scores(self) -> Tensor:
        """The running average of squared sums, float64 [U], as the next removal would use it."""
        return self._average()

    def _fraction(self, cost: Cost, dims: Dims) -> float:
        return cost.query(dims) / cost.query(self._dense)

    def _average(self) -> Tensor:
        """The average over intervals, with the open one folded in."""
        committed = int(self._counts[0])
        if committed == 0:
            return self._ema
        mean = self._acc.double().cpu() / committed
        restarted = self.config.reset_at_first_removal and bool(self.history)
        if self._intervals == 0 and (self.config.bias_correction or not restarted):
            return mean
        return self.config.momentum * self._ema + (1 - self.config.momentum) * mean

    def _view(self, piece: Piece, tensor: Tensor) -> Tensor:
        """The part of a piece that this process holds, of a tensor shaped like its parameter."""
        return piece.of(local(tensor), None if self._shards is None else self._held[piece.parameter])

    def _layout_for(self, present: tuple[bool, ...]) -> None:
        """Build the CSR table for the parameters that have a gradient; frozen ones are left out."""
        scored = [entry for entry, has in zip(self._scored_pieces, present, strict=True) if has]
        shapes, places, offset = [], [], 0
        for piece, _ in scored:
            parameter = self._parameters[piece.parameter]
            view = piece.of(torch.empty(parameter.shape, device="meta"))
            rows, cols = view.shape[0], view[0].numel() if view.ndim > 1 else 1
            shapes.append((rows, cols))
            first = piece.held(self._held[piece.parameter])[0] if view.ndim != 3 else 0
            held = self._view(piece, parameter.detach()).shape[0]
            places += [torch.arange(held) + offset + first, torch.arange(cols) + offset + rows]
            offset += rows + cols
        indptr, indices = self.table.csr(scored, shapes)
        self._present = [piece for piece, _ in scored]
        self._fed = indptr.diff() > 0
        self._indptr, self._indices = indptr.to(self._device), indices.to(self._device)
        self._places, self._workspace_size = torch.cat(places).to(self._device), offset
        self._layout = present

    @torch.no_grad()
    def score(self, inv_scale: float | Tensor | None = None) -> None:
        """Add the present weights and gradients to the scores: one minibatch, one optimizer step.

        Two launches, no host sync. A minibatch with any weight times gradient that is not finite is left out
        and counted in :attr:`skipped`. :meth:`step` calls this; call it yourself only with
        :meth:`prune_once`.

        Args:
            inv_scale: factor on all gradients, 1 / loss scale under AMP.

        Raises:
            ValueError: no parameter that enters a score has a gradient.
        """
        present = tuple(self._parameters[p.parameter].grad is not None for p, _ in self._scored_pieces)
        if not any(present):
            raise ValueError(
                "NViTPruner.score: gradients: at least one parameter must have a gradient, got grad=None "
                "everywhere. Call loss.backward() before, and optimizer.zero_grad() after."
            )
        if present != self._layout:
            self._layout_for(present)
        self._has_gradient = self._fed & (self._has_gradient | self._fresh)
        self._fresh = False
        if inv_scale is not None and not isinstance(inv_scale, Tensor):
            inv_scale = torch.tensor(float(inv_scale), dtype=torch.float32, device=self._device)
        parameters = [self._parameters[piece.parameter] for piece in self._present]
        workspace = ops.implementation("saliency_rowcol", self._device)(
            [self._view(piece, p.detach()) for piece, p in zip(self._present, parameters, strict=True)],
            [
                self._view(piece, p.grad)
                for piece, p in zip(self._present, parameters, strict=True)
                if p.grad is not None
            ],
            inv_scale=inv_scale,
        )
        if self._shards is not None:
            # The sums are signed: a unit spread over processes must be whole before it is squared.
            parts, workspace = workspace, workspace.new_zeros(self._workspace_size)
            workspace[self._places] = parts
            torch.distributed.all_reduce(workspace, group=self._shards)
        ops.implementation("saliency_commit_", self._device)(
            self._acc,
            self._counts,
            workspace,
            self._indptr,
            self._indices,
            coeff=self._coeff,
        )

    def step(
        self,
        optimizer: Any,
        *,
        update: bool = True,
        scaler: Any = None,
        inv_scale: float | Tensor | None = None,
    ) -> dict[str, Any] | None:
        """Score, update, re-zero and maybe prune; call once for each optimizer step, after ``backward``.

        With gradient accumulation call it when the accumulated gradients are complete. Clip gradients after
        scoring, that is with ``update=False``.

        Args:
            optimizer: the optimizer of the model's parameters.
            update: call ``optimizer.step()``. With False, call this before your own update (clipping,
                accelerate): pruned weights, gradients and moments are zero then, so the update leaves
                them at zero.
            scaler: a ``GradScaler`` whose ``unscale_`` has not been called; scores are unscaled and
                ``scaler.step(optimizer)`` and ``scaler.update()`` replace ``optimizer.step()``.
            inv_scale: factor on the gradients for scoring, where no scaler is given.

        Returns:
            The new entry of :attr:`history` when groups were removed, else None.

        Raises:
            ValueError: the optimizer holds none of the model's parameters, no gradients, or arguments that
                contradict each other.
            RuntimeError: the target is already reached, or processes disagree on the masks.
        """
        if self.done:
            raise RuntimeError(
                f"NViTPruner.step: the target {self.config.target} is reached ({self.fraction:.4f} left). "
                "Stop when `pruner.done` and call `pruner.compact(optimizer)`; to train the masked model on, "
                "call `optimizer.step()` and `pruner.rezero(optimizer)`."
            )
        self._check_optimizer(optimizer)
        if scaler is not None:
            if inv_scale is not None or not update:
                raise ValueError(
                    "NViTPruner.step: `scaler`: must come without `inv_scale` and with `update=True`, "
                    f"got inv_scale={inv_scale}, update={update}."
                )
            inv_scale = 1.0 / scaler.get_scale()
        late = self.config.score_after_update
        if late and not update:
            raise ValueError(
                "NViTPruner.step: `update` must be True with score_after_update (preset 'nvit_repo'), "
                "got False."
            )
        if not late:
            self.score(inv_scale)
        if update:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            self.rezero(optimizer)
        if late:
            self.score(inv_scale)
        self.steps += 1
        report = None
        if self.steps % self.config.interval == 0:
            if int(self._counts[0]):
                report = self.prune_once()
            else:
                warnings.warn(
                    f"NViTPruner: nothing was pruned at step {self.steps}: all minibatches since the last "
                    "removal had weights or gradients that are not finite.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if report is not None or not update:
            self.rezero(optimizer)
        return report

    def _check_optimizer(self, optimizer: Any) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"NViTPruner: `optimizer` must be a torch optimizer, got {type(optimizer).__name__}."
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._parameters.values()):
            raise ValueError(
                "NViTPruner: `optimizer` must hold parameters of the pruned model, got one with none of "
                "them. Make it from the model you gave to the pruner (not from a copy or a compacted one)."
            )

    def prune_once(self, scores: Tensor | None = None) -> dict[str, Any]:
        """Remove the lowest groups now, with or without training in between.

        Args:
            scores: [U] scores of all units in the order of :attr:`structures`, lower goes first, instead of
                the accumulated ones: the hook for other criteria.

        Returns:
            The new entry of :attr:`history`: ``step``, ``removed`` (structure, units, score of each group),
            ``dims``, and the fractions ``budget``, ``macs`` and ``params`` that are left.

        Raises:
            ValueError: no minibatch was scored and no scores are given, or scores of wrong shape or not
                finite.
            RuntimeError: the target is reached, nothing can be removed, or processes disagree.
        """
        if self.done:
            raise RuntimeError(
                f"NViTPruner.prune_once: the target {self.config.target} is reached; call `pruner.compact()`."
            )
        candidates = self._alive.clone()
        if scores is None:
            if int(self._counts[0]) == 0:
                raise ValueError(
                    "NViTPruner.prune_once: scores: at least one minibatch must be scored since the last "
                    "removal, got none. Call `score()` after a backward, or pass `scores`."
                )
            values = self.unit_scores
            candidates &= self._has_gradient
        else:
            if scores.shape != (self.table.count,) or not bool(torch.isfinite(scores).all()):
                raise ValueError(
                    f"NViTPruner.prune_once: `scores` must be finite with shape [{self.table.count}], "
                    f"got {list(scores.shape)}."
                )
            values = scores.detach().double().cpu()
        values = self._weighed(values)
        groups = self.config.groups_per_step
        if self.config.schedule == "nvit_repo" and len(self.history) < 2:
            groups = max(1, groups // 2)
        chosen = self.table.select(values, self._alive, candidates, groups)
        if not chosen:
            raise RuntimeError(
                f"NViTPruner.prune_once: no group may be removed at {self.fraction:.4f} of the budget; "
                f"without gradients are: {', '.join(self.unscored) or 'none'}. Unfreeze them, or raise the "
                "target."
            )
        self._close_interval(scores is None)
        for _, units, _ in chosen:
            self._alive[units] = False
        self._set_masks()
        self._agree()
        self.rezero()
        dims = self.dims
        self.history.append(
            {
                "step": self.steps,
                "removed": [
                    {
                        "structure": s.name,
                        "units": (units - s.start).tolist(),
                        "score": score,
                    }
                    for s, units, score in chosen
                ],
                "dims": dims.to_dict(),
                "budget": self._fraction(self._budget, dims),
                "macs": self._fraction(self._macs, dims),
                "params": self._fraction(self._params, dims),
            }
        )
        return self.history[-1]

    def _weighed(self, values: Tensor) -> Tensor:
        """Scores [U] with what the units would save taken into account."""
        divide = self.config.cost_rule == "divide"
        if not divide and not self.config.eta:
            return values
        values = values.clone()
        eta = self.config.eta * self.config.batch_ref / (self.config.batch_size or self.config.batch_ref)
        whole = self._saving.query(self._dense)
        for s, saved in zip(self.structures, self._saving.delta(self.dims), strict=True):
            # A timed table can say that a unit costs less than nothing; that is noise, not a reward.
            share = max(0.0, saved) / whole
            part = values[s.start : s.stop]
            if not divide:
                part -= eta * share
            elif share > 0:
                # The scores of a group are added up, so its cost is that of all its units.
                part /= share * s.group_size
            else:
                part.fill_(float("inf"))
        return values

    def _close_interval(self, used: bool) -> None:
        if used:
            self._ema, self._intervals = self._average(), self._intervals + 1
            if self.config.reset_at_first_removal and not self.history:
                self._ema, self._intervals = torch.zeros_like(self._ema), 0
        self._skipped += int(self._counts[1])
        self._acc.zero_()
        self._counts.zero_()
        self._fresh = True

    def _agree(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        mine = self._alive.to(self._device, torch.uint8)
        lowest, highest = mine.clone(), mine.clone()
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        if not torch.equal(lowest, highest):
            raise RuntimeError(
                "NViTPruner: masks must be equal on all processes, but they differ: the processes have seen "
                "different gradients. Wrap the model in DistributedDataParallel, or average the gradients "
                "before `step`."
            )

    def _set_masks(self) -> None:
        """Note the pieces with pruned rows or columns, with their masks on the model's device."""
        on_device: dict[tuple[str, int], Tensor | None] = {}

        def mask(axis: tuple[str, int] | None) -> Tensor | None:
            if axis is None:
                return None
            if axis not in on_device:
                alive = self.table.alive(axis, self._alive)
                on_device[axis] = None if bool(alive.all()) else alive.to(self._device)
            return on_device[axis]

        masked = [(piece, mask(piece.rows), mask(piece.cols)) for piece in self.table.pieces]
        self._masked = [entry for entry in masked if entry[1] is not None or entry[2] is not None]

    @torch.no_grad()
    def rezero(self, optimizer: Any = None) -> None:
        """Store 0 in everything that belongs to a pruned unit: weights, gradients and optimizer state.

        One launch. NaN and Inf in pruned places go too. Momentum and weight decay would otherwise move pruned
        weights again.

        Args:
            optimizer: also zero its state of the pruned places.
        """
        tensors, rows, cols = [], [], []
        states = {} if optimizer is None else optimizer.state
        for piece, row, col in self._masked:
            parameter = self._parameters[piece.parameter]
            own = row
            if row is not None and self._shards is not None:
                first, last = piece.held(self._held[piece.parameter])
                own = row[first:last]
            for tensor in (
                parameter.detach(),
                parameter.grad,
                *states.get(parameter, {}).values(),
            ):
                if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape == parameter.shape:
                    tensors.append(self._view(piece, tensor))
                    rows.append(own)
                    cols.append(col)
        if tensors:
            ops.implementation("structured_zero_", self._device)(tensors, rows, cols)

    @torch.no_grad()
    def compact(self, optimizer: Any = None, *, ln_fix: bool = True) -> nn.Module:
        """Cut the pruned units out: an ordinary, smaller module with the remaining weights.

        Softmax scales stay those of the dense model. Without pruned residual channels the result computes
        what the masked model computes. With them it cannot, as LayerNorm of the masked model also counts the
        zeroed channels; ``ln_fix`` removes most of the difference.

        Args:
            optimizer: moved onto the new model: its groups then hold the new parameters, and every state
                tensor shaped like its parameter is cut in the same way (moments, momentum buffers). The old
                model can no longer be trained with it.
            ln_fix: multiply LayerNorm weights by ``sqrt(E / E')`` where E' of E channels are left; ours, not
                the paper's. Optimizer state is not rescaled.

        Returns:
            A :class:`PrunedVisionTransformer`, its distilled twin or a :class:`PrunedSwinTransformer` on the
            model's device, in its dtype and mode; whole on each process, also where the masked model is
            split. The masked model is not changed.

        Raises:
            ValueError: the optimizer holds none of the model's parameters.
            NotImplementedError: an optimizer is given for a model that is split over processes.
        """
        if optimizer is not None:
            self._check_optimizer(optimizer)
            if self._shards is not None:
                raise NotImplementedError(
                    "NViTPruner.compact: `optimizer` must be None for a model split over processes. Compact, "
                    "split the new model with fully_shard, and make its optimizer."
                )
        self.rezero(optimizer)
        return compact_model(self.model, self.table, self._alive, optimizer, ln_fix)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly; the model's weights and the optimizer are saved by you."""
        return {
            "config": self.config.to_dict(),
            "dense": self._dense.to_dict(),
            "acc": self._acc.clone(),
            "counts": self._counts.clone(),
            "ema": self._ema.clone(),
            "intervals": self._intervals,
            "alive": self._alive.clone(),
            "has_gradient": self._has_gradient.clone(),
            "fresh": self._fresh,
            "skipped": self._skipped,
            "steps": self.steps,
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Load the model and the optimizer too, in any order.

        Raises:
            ValueError: the state belongs to a model of other widths or to other settings.
        """
        for name, mine in (
            ("dense", self._dense.to_dict()),
            ("config", self.config.to_dict()),
        ):
            if state[name] != mine:
                raise ValueError(
                    f"NViTPruner.load_state_dict: `{name}` must equal this pruner's {mine}, got "
                    f"{state[name]}. Make the pruner from the same model with the same settings."
                )
        self._acc.copy_(state["acc"])
        self._counts.copy_(state["counts"])
        self._ema.copy_(state["ema"])
        self._alive.copy_(state["alive"])
        self._has_gradient.copy_(state["has_gradient"])
        self._intervals, self._fresh = state["intervals"], state["fresh"]
        self._skipped, self.steps = state["skipped"], state["steps"]
        self.history = copy.deepcopy(state["history"])
        self._set_masks()
        self.rezero()
