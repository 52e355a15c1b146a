"""Settings of DeiT-LT, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pyvitfast.distill.weights import EMPTY, Empty, check_drw_epoch

WEIGHT_NORMS = ("batch", "global", "classes")


@dataclass(frozen=True)
class DeiTLTConfig:
    r"""Settings of :class:`DeiTLTLoss`.

    Args:
        alpha: share of the DIST loss in [0, 1]; the CLS loss has the rest.
        drw_epoch: first epoch, from 0, whose DIST loss is weighted by class. None, or one that is never
            reached: never, which is DeiT.
        beta: of the effective number of samples, in [0, 1).
        smoothing: label smoothing of the CLS loss, in [0, 1]; the DIST loss has none.
        weight_norm: what the weighted DIST loss is divided by. ``"batch"``: the weights of the batch on this
            device (published). ``"global"``: their mean over all processes and micro-batches of an optimizer
            update, so that the update is that of one large batch. ``"classes"``: the batch size, with weights
            of mean 1 over classes.
        mixing_after_drw: keep mixing and label smoothing from ``drw_epoch`` on, as the published recipes for
            ImageNet-LT and iNaturalist do; those for CIFAR turn both off.
        empty: classes without training images, see :func:`effective_number_weights`.

    Raises:
        ValueError: a value outside its range.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024); ``"global"`` and ``"classes"`` are ours.
    """

    alpha: float = 0.5
    drw_epoch: int | None = None
    beta: float = 0.9999
    smoothing: float = 0.1
    weight_norm: Literal["batch", "global", "classes"] = "batch"
    mixing_after_drw: bool = False
    empty: Empty = "error"

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("alpha", 0 <= self.alpha <= 1, "from 0 to 1"),
            ("beta", 0 <= self.beta < 1, "at least 0 and below 1"),
            ("smoothing", 0 <= self.smoothing <= 1, "from 0 to 1"),
            ("weight_norm", self.weight_norm in WEIGHT_NORMS, f"one of {', '.join(WEIGHT_NORMS)}"),
            ("empty", self.empty in EMPTY, f"one of {', '.join(EMPTY)}"),
        ):
            if not good:
                raise ValueError(f"DeiTLTConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.")
        check_drw_epoch(self.drw_epoch, "DeiTLTConfig")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeiTLTConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"DeiTLTConfig: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        return cls(**data)
