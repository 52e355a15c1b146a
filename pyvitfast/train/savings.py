"""What growth saves: training operations of the target until it is as good as one trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Costs:
    """Training operations of the parts of a run; a multiply-add is two, a backward pass twice a forward one.

    Args:
        update: an update of the target.
        operator: all training of the growth operator, through the target.
        source: training of the small model; None where it came from a file and is not known.
    """

    update: float
    operator: float = 0.0
    source: float | None = None


@dataclass(frozen=True)
class Saving:
    """The saving of an arm against scratch; None where it never became as good.

    Args:
        goal: accuracy to reach, the mean of scratch's last evaluations.
        excl_small: (scratch - arm) / scratch in operations until ``goal``, the operator's training counted.
        incl_small: the same with the training of the small model counted too; None also where that is not
            known.
        scratch: operations of scratch until ``goal``.
        spent: those of the arm, its operator's counted.
    """

    goal: float
    excl_small: float | None
    incl_small: float | None
    scratch: float = 0.0
    spent: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        if self.excl_small is None:
            return f"did not reach scratch's {self.goal:.2f} %"
        text = f"saves {100 * self.excl_small:.0f} % of scratch's operations to its {self.goal:.2f} %"
        if self.incl_small is None:
            return text
        return f"{text}, {100 * self.incl_small:.0f} % with the small model's training"


def update_flops(macs: float, images: int) -> float:
    """Operations of an update on ``images`` images of a model with ``macs`` multiply-adds an image."""
    return 6.0 * macs * images


def operations_to(curve: Curve, goal: float) -> float | None:
    """Operations at the first evaluation (operations, accuracy) of at least ``goal``; None without one."""
    return next((operations for operations, accuracy in curve if accuracy >= goal), None)


def saving(scratch: Curve, arm: Curve, costs: Costs, last: int = 5) -> Saving:
    """How much ``arm`` saves.

    Args:
        scratch: (updates, accuracy) of each evaluation of the target trained from scratch.
        arm: the same of the grown target; an evaluation after 0 updates counts.
        costs: of ``arm``.
        last: evaluations of scratch whose mean is the goal.

    Raises:
        ValueError: scratch has no evaluation.

    Source:
        LiGO (Wang et al., ICLR 2023), which counts the operator's training and not the small model's.
    """
    if not scratch:
        raise ValueError("saving: `scratch` must have at least one evaluation, got none.")
    tail = [accuracy for _, accuracy in scratch[-last:]]
    goal = min(sum(tail) / len(tail), max(tail))  # a rounded mean of equal accuracies may exceed them
    whole = operations_to(scratch, goal)
    mine = operations_to(arm, goal)
    assert whole is not None, "the greatest of the last evaluations is no smaller than their mean"
    if mine is None or whole == 0:
        return Saving(goal, None, None, whole * costs.update)
    spent = mine * costs.update + costs.operator
    whole *= costs.update
    charged = None if costs.source is None else (whole - spent - costs.source) / whole
    return Saving(goal, (whole - spent) / whole, charged, whole, spent)
