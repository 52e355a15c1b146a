"""Torch-Pruning's Group Taylor on the same task, and the search for its best settings.

One call of :func:`prune_peer` reaches one budget in ``Setting.steps`` steps. A step sums the gradients of the
minibatches that NViT scores too, and takes the pruning ratio by bisection that leaves the most MACs at or
below the step's share of the way. Between steps there is no training.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.papers.data import Images
from benchmarks.papers.nvit.criteria import backwards
from benchmarks.papers.nvit.data import Task
from benchmarks.papers.training import accuracy, train
from pyvitfast.models.config import ViTConfig


class PeerFailed(RuntimeError):
    """Torch-Pruning did not reach the budget; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What is searched.

    ``isomorphic`` ranks structures of one kind together rather than all. ``embed`` prunes the residual
    stream too. ``attention``: head dims, whole heads, both at the ratio of the rest, both with half the
    ratio for head dims (as in the published DeiT recipes of isomorphic pruning), or nothing. ``normalizer``,
    ``reduction`` and ``multivariable`` are those of GroupTaylorImportance. ``fix`` is our help after a cut:
    nothing, the softmax scale of the dense model, or that and LayerNorm weights times sqrt(E / E').
    """

    isomorphic: bool
    embed: bool = True
    attention: str = "dims"
    normalizer: str | None = "mean"
    reduction: str = "mean"
    multivariable: bool = False
    steps: int = 5
    round_to: int | None = None
    fix: str = "none"

    def __str__(self) -> str:
        default = asdict(Setting(self.isomorphic))
        changed = [f"{k}={v}" for k, v in asdict(self).items() if v != default[k]]
        return ", ".join(changed) or "as at the start"


AXES: tuple[tuple[dict[str, Any], ...], ...] = (
    tuple({"embed": embed, "steps": steps} for steps in (5, 1) for embed in (True, False)),
    tuple({"attention": a} for a in ("dims", "heads", "both", "half", "none")),
    (
        {"normalizer": "mean", "reduction": "mean", "multivariable": False},
        {"normalizer": "mean", "reduction": "mean", "multivariable": True},
        {"normalizer": None, "reduction": "mean", "multivariable": False},
        {"normalizer": None, "reduction": "sum", "multivariable": False},
        {"normalizer": None, "reduction": "sum", "multivariable": True},
    ),
    ({"fix": "none"}, {"fix": "scale"}, {"fix": "scale and norms"}),
    ({"embed": True}, {"embed": False}),
    ({"round_to": None}, {"round_to": 2}, {"round_to": 4}),
    ({"steps": 1}, {"steps": 5}, {"steps": 18}),
)
# What is searched again at the other budgets, from the best setting of the first.
AGAIN = (AXES[0], AXES[1], AXES[3], AXES[-1])


def macs(model: nn.Module) -> int:
    return ViTConfig.from_model(model).macs()


@torch.no_grad()
def cut(model: VisionTransformer, setting: Setting, ratio: float) -> VisionTransformer:
    """A pruned copy of ``model``, whose gradients are read; a plain timm model again."""
    import torch_pruning as tp

    slim = copy.deepcopy(model)
    for new, old in zip(slim.parameters(), model.parameters()):
        new.grad = None if old.grad is None else old.grad.clone()
    attentions = [block.attn for block in slim.blocks]
    heads, dims = (
        setting.attention in ("heads", "both", "half"),
        setting.attention in ("dims", "both", "half"),
    )
    ignored = [slim.head]
    if not setting.embed:
        ignored += [slim.patch_embed.proj, *(a.proj for a in attentions), *(b.mlp.fc2 for b in slim.blocks)]
    shares = {tuple(a.qkv for a in attentions): 0.5 * ratio} if setting.attention == "half" else {}
    if setting.attention == "none":
        ignored += [a.qkv for a in attentions]
    size = slim.patch_embed.img_size
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            slim,
            torch.zeros(1, slim.patch_embed.proj.in_channels, *size),
            tp.importance.GroupTaylorImportance(
                group_reduction=setting.reduction,
                normalizer=setting.normalizer,
                multivariable=setting.multivariable,
            ),
            global_pruning=True,
            isomorphic=setting.isomorphic,
            pruning_ratio=ratio,
            pruning_ratio_dict=shares,
            ignored_layers=ignored,
            num_heads={a.qkv: a.num_heads for a in attentions},
            prune_num_heads=heads,
            prune_head_dims=dims,
            head_pruning_ratio=ratio if heads else 0.0,
            round_to=setting.round_to,
            # Its defaults are dictionaries that all pruners of the process would share.
            in_channel_groups={},
            out_channel_groups={},
        )
        pruner.step()
    before, after = model.embed_dim, slim.patch_embed.proj.out_channels
    slim.embed_dim = slim.num_features = slim.head_hidden_size = after
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.proj.in_features
        was, attention.head_dim = attention.head_dim, attention.attn_dim // attention.num_heads
        attention.scale = attention.head_dim**-0.5
        if setting.fix != "none":
            # timm's forward takes the scale from the width, so the dense one goes into the queries.
            for tensor in (attention.qkv.weight, attention.qkv.bias):
                if tensor is not None:
                    tensor[: attention.attn_dim].mul_((attention.head_dim / was) ** 0.5)
    if setting.fix == "scale and norms":
        for module in slim.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_((before / after) ** 0.5)
    slim.zero_grad()
    return slim


def prune_peer(dense: nn.Module, data: Images, setting: Setting, budget: float, seed: int) -> nn.Module:
    """A model with at most ``budget`` of the dense model's MACs.

    Raises:
        PeerFailed: no ratio that was tried led there.
    """
    whole = macs(dense)
    slim = copy.deepcopy(dense)
    for step in range(1, setting.steps + 1):
        goal = whole * (1 - (1 - budget) * step / setting.steps)
        if macs(slim) <= goal:
            continue
        for _ in backwards(slim, data, seed, add=True):
            pass
        now = macs(slim)
        best: tuple[int, nn.Module] | None = None
        reason = "no ratio leads there"

        def attempt(ratio: float, slim: nn.Module = slim, goal: float = goal) -> tuple[int, nn.Module] | None:
            """The cut model and its MACs; None where the library fails."""
            nonlocal best, reason
            try:
                trial = cut(slim, setting, ratio)
                left = macs(trial)
                trial(data.train_x[:2])
            except Exception as error:  # whatever it is, it is reported
                reason = f"{type(error).__name__} at ratio {ratio:.3f}: {error}"
                return None
            if left <= goal and (best is None or left > best[0]):
                best = left, trial
            return left, trial

        last = step == setting.steps
        low, high = 0.0, 1.0 if last else min(1.0, 3 * (1 - goal / now))
        for _ in range(10 if last else 5):
            ratio = (low + high) / 2
            trial = attempt(ratio)
            if trial is None or trial[0] <= goal:
                high = ratio
            else:
                low = ratio
        if best is None:  # fewer MACs at a higher ratio is no rule: layers that would become empty stay whole
            for part in range(1, 50):
                attempt(part / 50)
        if best is None:
            raise PeerFailed(f"step {step} of {setting.steps}, {now / whole:.1%} of MACs left: {reason}")
        slim = best[1]
    return slim


def search(
    task: Task,
    prepared: list[tuple[nn.Module, Images]],
    isomorphic: bool,
    budgets: list[float],
    other: dict[float, Setting],
    progress: Callable[[str], None],
) -> tuple[dict[float, Setting], list[dict[str, Any]]]:
    """The best setting at each budget, and all that was tried.

    From the best of a few starts, one axis after the other is changed and the best is kept: at 40 % along all
    axes, then at the other budgets along those of ``AGAIN``. Starts are the library's defaults in 5 steps,
    the same without the residual stream, what was found at 40 %, and what the ``other`` ranking found.
    Best is the mean accuracy on held-out training images after finetuning; ``prepared`` holds models that
    never saw these images.
    """
    tried: list[dict[str, Any]] = []
    first: Setting | None = None
    found: dict[float, Setting] = {}
    for budget in sorted(budgets, key=lambda budget: abs(budget - 0.4)):
        known: dict[Setting, float] = {}

        def score(setting: Setting, budget: float = budget, known: dict[Setting, float] = known) -> float:
            if setting in known:
                return known[setting]
            after, share, failure = [], [], None
            for seed, (dense, data) in enumerate(prepared):
                try:
                    slim = prune_peer(dense, data, setting, budget, seed)
                except PeerFailed as error:
                    failure = str(error)
                    break
                share.append(macs(slim) / macs(dense))
                train(slim, data, task.tuning_epochs, task.finetune_lr, task.batch, seed)
                after.append(accuracy(slim, data))
            known[setting] = -1.0 if failure else statistics.mean(after)
            tried.append(
                {
                    "budget": budget,
                    "setting": asdict(setting),
                    "accuracy": after,
                    "macs": share,
                    "failure": failure,
                }
            )
            progress(f"searched {budget:.0%}: {setting}: {failure or f'{known[setting]:.2f} %'}")
            return known[setting]

        # Many steps are slow, so their number is the last axis and starts low again.
        starts = [Setting(isomorphic), Setting(isomorphic, embed=False)]
        starts += [replace(first, steps=5)] if first else []
        starts += [replace(other[budget], isomorphic=isomorphic)] if other else []
        best = max(starts, key=score)
        for axis in AGAIN if first else AXES:
            best = max([best, *(replace(best, **change) for change in axis)], key=score)
        found[budget] = best
        first = first or best
    return dict(sorted(found.items(), reverse=True)), tried


# What full runs found, by data set, ranking (isomorphic or global) and budget; --quick takes these.
TUNED: dict[tuple[str, bool, float], Setting] = {
    ("digits", False, 0.4): Setting(isomorphic=False, embed=False, multivariable=True),
    ("digits", True, 0.4): Setting(isomorphic=True, embed=False, attention="none", steps=18),
}
