"""Settings of NViT pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

KINDS = ("embed", "head", "qk", "v", "mlp")
BUDGETS = ("macs", "params", "latency")
PRESETS = ("paper", "nvit_repo")


def _check(rule: str, name: str, value: object, good: bool) -> None:
    if not good:
        raise ValueError(f"NViTConfig: `{name}` must be {rule}, got {value!r}.")


@dataclass(frozen=True)
class NViTConfig:
    """How saliency is summed and averaged, and how fast groups are removed.

    The defaults follow the paper; :meth:`preset` gives the released code's reading.

    Args:
        target: fraction of the starting budget to stop at, in (0, 1).
        budget: what the target counts: ``"macs"``, ``"params"`` or ``"latency"``.
        interval: optimizer steps between two removals.
        groups_per_step: groups removed by each removal.
        group_sizes: units in a group by kind (``embed``, ``head``, ``qk``, ``v``, ``mlp``); a kind left out
            gets the automatic size of :func:`pyvitfast.prune.structure.group_size`.
        membership: which weights a unit's sum takes: ``"subset"`` one side of each gate, as the released
            code; ``"full"`` every weight that goes with the unit, as the paper's text.
        divisors: what a unit's sum is divided by before it is squared, by kind; a kind left out has 1.
        momentum: weight of the past in the running average of scores over removals, in [0, 1).
        bias_correction: let the first interval after a restart stand for itself. Without, the average
            restarts from 0, so the scores after k intervals are too small by ``1 - momentum ** k``.
        reset_at_first_removal: restart the average once the first group is gone.
        schedule: ``"constant"`` removes ``groups_per_step`` each time; ``"nvit_repo"`` half of it the first
            two times.
        score_after_update: multiply gradients with the weights after the optimizer's update, not before.
        eta: weight of the cost a unit saves, as a fraction of the starting cost, subtracted from its score.
        cost_rule: ``"subtract"`` ``eta`` times the saved cost from a group's score, as the paper, or
            ``"divide"`` the score by the saved cost; then ``eta`` must be 0.
        batch_ref: global batch size that ``eta`` belongs to.
        batch_size: your global batch size; ``eta`` is multiplied by ``batch_ref / batch_size``, because
            scores shrink with the batch. None leaves ``eta`` as it is.

    Raises:
        ValueError: a value outside its range.

    Source:
        NViT (Yang et al., CVPR 2023), section 3 and eq. 6-7.
    """

    target: float = 0.5
    budget: Literal["macs", "params", "latency"] = "macs"
    interval: int = 100
    groups_per_step: int = 2
    group_sizes: Mapping[str, int] | None = None
    membership: Literal["subset", "full"] = "subset"
    divisors: Mapping[str, float] | None = None
    momentum: float = 0.9
    bias_correction: bool = True
    reset_at_first_removal: bool = False
    schedule: Literal["constant", "nvit_repo"] = "constant"
    score_after_update: bool = False
    eta: float = 0.0
    cost_rule: Literal["subtract", "divide"] = "subtract"
    batch_ref: int = 512
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _check(
            "a fraction between 0 and 1, both excluded (0.5 halves the budget)",
            "target",
            self.target,
            isinstance(self.target, int | float) and 0 < self.target < 1,
        )
        _check(
            f"one of {', '.join(BUDGETS)}",
            "budget",
            self.budget,
            self.budget in BUDGETS,
        )
        _check(
            "subset or full",
            "membership",
            self.membership,
            self.membership in ("subset", "full"),
        )
        _check(
            "constant or nvit_repo",
            "schedule",
            self.schedule,
            self.schedule in ("constant", "nvit_repo"),
        )
        _check(
            "subtract or divide",
            "cost_rule",
            self.cost_rule,
            self.cost_rule in ("subtract", "divide"),
        )
        _check(
            "0 with cost_rule='divide'",
            "eta",
            self.eta,
            self.eta == 0 or self.cost_rule == "subtract",
        )
        for name in ("interval", "groups_per_step", "batch_ref"):
            value = getattr(self, name)
            _check(
                "an integer of at least 1",
                name,
                value,
                isinstance(value, int) and value >= 1,
            )
        if self.batch_size is not None:
            _check(
                "None or at least 1",
                "batch_size",
                self.batch_size,
                self.batch_size >= 1,
            )
        _check("in [0, 1)", "momentum", self.momentum, 0 <= self.momentum < 1)
        _check("finite and at least 0", "eta", self.eta, 0 <= self.eta < float("inf"))
        for name in ("group_sizes", "divisors"):
            for kind, value in (getattr(self, name) or {}).items():
                _check(
                    f"a mapping with keys out of {', '.join(KINDS)}",
                    name,
                    kind,
                    kind in KINDS,
                )
                whole = name == "divisors" or isinstance(value, int)
                _check(f"positive for {kind!r}", name, value, whole and value > 0)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> NViTConfig:
        """Named settings, with ``changes`` on top.

        ``"paper"`` is the default. ``"nvit_repo"`` follows the released code where it can run: divisors 12,
        12, 2, 2, 1 before the square, subset membership, average restarted from 0 at the first removal,
        cumulative removals 1, 2, 4, 6, ..., weights read after the update, and eta 5e-4 per second of a
        dense model that takes 0.9698 s.

        Raises:
            ValueError: unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"NViTConfig: `preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
        if name == "paper":
            return cls(**changes)
        settings: dict[str, Any] = {
            "divisors": {"embed": 12.0, "head": 12.0, "qk": 2.0, "v": 2.0},
            "bias_correction": False,
            "reset_at_first_removal": True,
            "schedule": "nvit_repo",
            "score_after_update": True,
            "eta": 5e-4 * 0.9698,
        }
        return cls(**{**settings, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NViTConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key that is not a setting.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"NViTConfig: keys must be settings ({', '.join(sorted(known))}), got {', '.join(unknown)}."
            )
        return cls(**data)
