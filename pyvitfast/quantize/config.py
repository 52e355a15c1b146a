"""Settings of quantisation, checked when made."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pyvitfast.models.quantized import LayerQuantization
from pyvitfast.reference._quantizer import GRIDS, MASKS

GRANULARITIES = ("tensor", "channel", "group")
SCALES = ("lsq", "absmax", "mse", "fixed")


@dataclass(frozen=True)
class QuantConfig:
    """What :func:`prepare` does to which layers.

    Args:
        weight_bits: 1 to 8.
        activation_bits: 1 to 8 for the inputs of these layers, or None to leave them. One learned scale a
            layer (LSQ).
        granularity: what shares a scale: the ``tensor``, an output ``channel``, or a ``group`` of
            ``group_size`` columns.
        group_size: columns in a group; the last of a row may be shorter. 0 without groups.
        grid: ``integer`` (levels -2^(b-1) .. 2^(b-1)-1 times the scale), ``half_integer`` (those plus one
            half: no zero, symmetric) or ``sign`` (one bit). None takes sign for 1 bit, half_integer for 2,
            where a level at zero is dear, and integer from 3 on. Our choice.
        scale: rule for the scales. ``lsq`` learns them from 2 mean|w| / sqrt(Qp) on; ``absmax`` puts the
            largest weight on the outermost level; ``mse`` shrinks that to the least squared error; ``fixed``
            takes ``scale_value``. All but the first are constant.
        scale_value: the fixed scale; None takes 1 / sqrt(inputs of a neuron).
        mask: what stands in for the derivative of rounding; None takes ``lsq``, or ``hardtanh`` for the sign
            grid. See :func:`pyvitfast.ops.fake_quantize`.
        skip: layers left as they are, by name or pattern such as ``blocks.0.*``. None leaves the first and
            the last layer, timm's stem and classifier; () quantises all.

    Raises:
        ValueError: a value out of its range, or two that do not go together; the message names them.
        TypeError: a value of another type.

    Where all weights of a scale are 0, no rule gives a usable scale: it is then 2^-16 of the greatest one in
    the tensor, or 1 if the whole tensor is 0.
    """

    weight_bits: int = 4
    activation_bits: int | None = None
    granularity: str = "channel"
    group_size: int = 0
    grid: str | None = None
    scale: str = "lsq"
    scale_value: float | None = None
    mask: str | None = None
    skip: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            value = getattr(self, name)
            if value is None and name == "activation_bits":
                continue
            self._need(name, "a whole number from 1 to 8", type(value) is int and 1 <= value <= 8)
        self._one_of("granularity", GRANULARITIES)
        self._one_of("scale", SCALES)
        if self.grid is not None:
            self._one_of("grid", GRIDS)
        if self.mask is not None:
            self._one_of("mask", MASKS)
        grouped = self.granularity == "group"
        self._need(
            "group_size",
            "a whole number of at least 0",
            type(self.group_size) is int and self.group_size >= 0,
        )
        self._need("group_size", "at least 1 with granularity 'group'", not grouped or self.group_size >= 1)
        self._need("group_size", "0 without granularity 'group'", grouped or self.group_size == 0)
        self._need(
            "grid",
            "another one with 1 bit: 'integer' would hold -scale and 0 only; take 'sign' or 'half_integer'",
            not (self.grid == "integer" and self.weight_bits == 1),
        )
        self._need(
            "grid",
            "'integer' or 'half_integer' with more than 1 bit",
            not (self.grid == "sign" and self.weight_bits > 1),
        )
        signs = ("identity", "hardtanh", "tanh", "approx_sign")
        fitting = signs if self.weight_grid == "sign" else ("lsq", "rounded", "identity")
        self._need(
            "mask",
            f"one of {', '.join(fitting)} with grid {self.weight_grid!r}",
            self.mask is None or self.mask in fitting,
        )
        positive = isinstance(self.scale_value, float | int) and 0 < self.scale_value < float("inf")
        self._need("scale_value", "a positive number", self.scale_value is None or positive)
        self._need(
            "scale_value", "None unless scale is 'fixed'", self.scale_value is None or self.scale == "fixed"
        )
        if self.skip is not None:
            if isinstance(self.skip, str) or not all(isinstance(s, str) for s in self.skip):
                raise TypeError(
                    f"QuantConfig: `skip` must be a tuple of names or patterns, got {self.skip!r}."
                )
            object.__setattr__(self, "skip", tuple(self.skip))

    def _need(self, name: str, rule: str, good: bool) -> None:
        if not good:
            raise ValueError(f"QuantConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        self._need(name, f"one of {', '.join(known)}", getattr(self, name) in known)

    @property
    def weight_grid(self) -> str:
        """The grid of weights, with the default filled in."""
        return self.grid or {1: "sign", 2: "half_integer"}.get(self.weight_bits, "integer")

    def layer(self) -> LayerQuantization:
        """How a layer is quantised."""
        bits = self.activation_bits
        return LayerQuantization(
            bits=self.weight_bits,
            grid=self.weight_grid,
            mask=self.mask or ("hardtanh" if self.weight_grid == "sign" else "lsq"),
            granularity=self.granularity,
            group_size=self.group_size,
            learned=self.scale == "lsq",
            activation_bits=bits,
            activation_grid="half_integer" if bits is not None and bits <= 2 else "integer",
        )

    def skips(self, name: str) -> bool:
        """Whether ``skip`` names a layer."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip or ())

    def to_dict(self) -> dict[str, Any]:
        """Plain data that YAML and JSON can hold."""
        data = asdict(self)
        return data | {"skip": None if self.skip is None else list(self.skip)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"QuantConfig: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        skip = data.get("skip")
        return cls(**{**data, "skip": None if skip is None else tuple(skip)})
