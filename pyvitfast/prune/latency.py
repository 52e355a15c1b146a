"""Latency of a Vision Transformer from its widths: a table of one block's time on a grid."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from sklearn.isotonic import isotonic_regression
from torch import Tensor, nn

from pyvitfast.models.architecture import Config, prunable_config_of
from pyvitfast.models.checkpoint import write_atomically
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.modules import unwrap
from pyvitfast.models.vision_transformer import ViTDims
from pyvitfast.prune.timing import AXES, Timer, bad, device_name, ends, grid_points, probe_dims

FORMAT_VERSION = 1
# What the time of a block or of the parts around the blocks depends on besides its widths.
_FAMILY = (
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "distilled",
    "class_token",
    "reg_tokens",
    "act_layer",
    "norm_layer",
)

Array = NDArray[np.float64]


def family_of(config: ViTConfig) -> dict[str, Any]:
    """What a table belongs to besides widths: image, patches, tokens, classes, layers."""
    found = {name: getattr(config, name) for name in _FAMILY}
    layer_scale = config.init_values is not None
    return {**found, "layer_scale": layer_scale, "img_size": list(config.img_size)} | {
        "patch_size": list(config.patch_size),
        "tokens": config.tokens()[1],
    }


def monotone(values: Array) -> Array:
    """The nearest values, axis after axis in the least-squares sense, that fall along no axis.

    One pass over each axis is enough: isotonic regression keeps the order of its inputs, so a later axis
    does not spoil an earlier one.
    """
    values = np.array(values, dtype=np.float64)
    for axis in range(values.ndim):
        values = np.apply_along_axis(isotonic_regression, axis, values)
    return values


@dataclass(frozen=True)
class LatencyTable:
    r"""What a model costs as a function of its widths, from one block on a grid.

    .. math:: \text{Lat} = R(E) + \sum_l T(E, H_l, QK_l, V_l, M_l)

    T is read off the grid by multilinear interpolation. R is the rest of the model, embedding, last norm and
    heads; the paper leaves it out, and so does a table without ``rest``. Widths below the grid cost what
    its lowest point costs, so a saving there is 0.

    Args:
        grids: the widths of each axis, ``embed_dim``, ``heads``, ``qk_dim``, ``v_dim``, ``mlp``: five
            increasing sequences of integers, or a mapping by these names.
        values: cost of one block at each point, [E, H, QK, V, M], finite and at least 0.
        rest: cost of everything around the blocks at each ``embed_dim`` of the grid, or None.
        curve: sums as above, increasing, and what whole models with these sums cost, [2, P]; None takes the
            sums as they are.
        unit: of the values.
        family: what the table belongs to; None fits any Vision Transformer.
        measured: where and how it was measured.

    Raises:
        ValueError: grids and values that do not fit each other, or values that are not finite.

    Source:
        NViT (Yang et al., CVPR 2023), section 3.2, eq. 7.
    """

    grids: tuple[tuple[int, ...], ...]
    values: Array
    rest: Array | None = None
    curve: Array | None = None
    unit: str = "s"
    family: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        grids: Any = self.grids
        if isinstance(grids, Mapping):
            if set(grids) != set(AXES):
                raise bad(f"`grids` must have the keys {', '.join(AXES)}", sorted(grids))
            grids = [grids[name] for name in AXES]
        if len(grids) != len(AXES):
            raise bad(f"`grids` must hold {len(AXES)} axes ({', '.join(AXES)})", len(grids))
        for name, grid in zip(AXES, grids, strict=True):
            increasing = all(a < b for a, b in itertools.pairwise(grid))
            if len(grid) == 0 or not increasing or grid[0] < 0 or any(int(g) != g for g in grid):
                raise bad(f"`grids`: {name} must be increasing integers of at least 0", list(grid))
        object.__setattr__(self, "grids", tuple(tuple(int(g) for g in grid) for grid in grids))
        shape = tuple(len(grid) for grid in self.grids)
        checked = [("values", self.values, shape)]
        if self.rest is not None:
            checked.append(("rest", self.rest, shape[:1]))
        for name, given, expected in checked:
            array = given.numpy(force=True) if isinstance(given, Tensor) else given
            array = np.asarray(array, dtype=np.float64)
            if array.shape != expected:
                raise bad(f"`{name}` must have shape {list(expected)}", list(array.shape))
            if not np.isfinite(array).all() or (array < 0).any():
                raise bad(f"`{name}` must be finite and at least 0", "others")
            object.__setattr__(self, name, array)
        if self.curve is not None:
            curve = np.asarray(self.curve, dtype=np.float64)
            good = curve.ndim == 2 and curve.shape[0] == 2 and curve.shape[1] > 0 and (curve > 0).all()
            if not good or (np.diff(curve, axis=1) < 0).any() or not np.isfinite(curve).all():
                raise bad("`curve` must be two rows of positive numbers that do not fall", curve.tolist())
            object.__setattr__(self, "curve", curve)

    @classmethod
    def from_macs(cls, model: nn.Module) -> LatencyTable:
        """Multiply-accumulates of the blocks in place of seconds; nothing is measured.

        Exact for all widths, because the count is affine in each of them.

        Args:
            model: a timm Vision Transformer or one of ours.

        Raises:
            TypeError, NotImplementedError: it is not one, or has parts that cannot be described.
        """
        config = _config(model)
        tokens, high = config.tokens()[1], ends(config)[1]
        grids = tuple((0, high[name]) for name in AXES)
        e, h, qk, v, m = np.meshgrid(*(np.array(g, dtype=np.float64) for g in grids), indexing="ij")
        values = 2 * tokens * e * h * (qk + v) + tokens**2 * h * (qk + v) + 2 * tokens * e * m
        return cls(grids, values, unit="MACs", family=family_of(config))

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        *,
        grids: Mapping[str, Sequence[int]] | None = None,
        dtype: torch.dtype | None = None,
        repeats: int = 7,
        clean: bool = True,
        calibrate: bool = True,
        progress: bool = True,
    ) -> LatencyTable:
        """Time blocks of many widths on this machine.

        The attention half and the MLP half of a block share only the residual width, so each is timed on a
        grid of its own and the five-dimensional table is their sum. All points take turns, ``repeats``
        times; each gets its median. In a model, blocks find other data in the caches than in a loop of their
        own, so whole models of several sizes are timed in turns with the model itself, and a monotone curve
        leads from the table's sums to their times. Take care that nothing else runs.

        Args:
            model: a timm Vision Transformer or one of ours; only its architecture is read.
            device: where to time.
            batch_size: images in a forward pass. Time per image differs much between 1 and 32; measure
                what you will run.
            grids: widths of some axes instead of the automatic ones, which go from one pruning group to the
                model's width.
            dtype: of weights and images; by default the model's.
            repeats: timings of each point, after a warm-up; at most 3 of those that take 0.1 s or more.
            clean: make the times monotone, since a wider block that seems faster is noise.
            calibrate: measure that curve; how far the table is off then stands in ``measured["error"]``.
            progress: show a bar.

        Returns:
            A table in seconds for a whole batch, with ``rest`` measured.

        Raises:
            ValueError: an argument out of range.
            TypeError, NotImplementedError: as :meth:`from_macs`.
        """
        if batch_size < 1 or repeats < 1:
            raise bad("`batch_size` and `repeats` must be at least 1", f"{batch_size} and {repeats}")
        config = _config(model)
        where = torch.device(device)
        kind = dtype or next(unwrap(model).parameters()).dtype
        points = grid_points(config, grids or {})
        timer = Timer(config, where, kind, batch_size)
        probes = probe_dims(config, points) if calibrate else []
        cells: list[tuple[str, tuple[int, ...]]] = [
            *(("attn", p) for p in itertools.product(*points[:4])),
            *(("mlp", p) for p in itertools.product(points[0], points[4])),
            *(("rest", (e,)) for e in points[0]),
        ]
        timer.probes = probes
        with Progress(transient=True, disable=not progress) as bar:
            total = (len(cells) + 2 * max(0, len(probes) - 1)) * (repeats + 1)
            task = bar.add_task(f"latency table, {device_name(where)}", total=total)

            def advance() -> None:
                bar.advance(task)

            values = iter(timer.medians(cells, repeats, advance))
            wholes = np.array(timer.in_pairs(repeats, advance) if probes else [])
        shapes = [tuple(map(len, points[:4])), (len(points[0]), len(points[4])), (len(points[0]),)]
        parts = [np.fromiter(values, np.float64, int(np.prod(s))).reshape(s) for s in shapes]
        attn, mlp, rest = (monotone(p) for p in parts) if clean else parts
        facts = {
            "device": device_name(where),
            "device_type": where.type,
            "batch_size": batch_size,
            "dtype": str(kind).removeprefix("torch."),
            "threads": torch.get_num_threads() if where.type == "cpu" else None,
            "torch": str(torch.__version__),
            "repeats": repeats,
        }
        table = cls(
            points,
            attn[..., None] + mlp[:, None, None, None, :],
            rest=rest,
            family=family_of(config),
            measured=facts,
        )
        return table._fitted(probes, wholes) if calibrate else table

    def _fitted(self, probes: Sequence[ViTDims], times: Array) -> LatencyTable:
        """The table with the curve that leads from its sums to the measured ``times`` of whole models."""
        sums = np.array([self.query(dims) for dims in probes])
        order = np.argsort(sums, kind="stable")
        # The first is the model itself: fractions of it are what pruning asks for, so it is met exactly.
        weights = np.where(order == 0, 1e6, 1.0)
        curve = np.stack([sums[order], isotonic_regression(times[order], sample_weight=weights)])
        fitted = replace(self, curve=curve)
        found = np.array([fitted.query(dims) for dims in probes])
        error = float(np.abs(found / times - 1).max())
        return replace(fitted, measured={**(self.measured or {}), "error": error})

    def query(self, dims: ViTDims) -> float:
        """Cost of a model with these widths.

        Raises:
            ValueError: a width above the grid.
        """
        total = float(self._blocks(_points(dims)).sum()) + self._rest(dims.embed_dim)
        if self.curve is None:
            return total
        sums, times = self.curve
        # In proportion to the nearest end outside of what was measured.
        inside = float(np.clip(total, sums[0], sums[-1]))
        return float(np.interp(inside, sums, times)) * (total / inside if inside else 1.0)

    def delta(self, dims: ViTDims) -> list[float]:
        """What one unit fewer saves: in ``embed``, then by block in ``heads``, ``qk``, ``v``, ``mlp``.

        The structures are those of :class:`pyvitfast.prune.UnitTable`, in its order. Without the curve, which
        knows only whole models.

        Raises:
            ValueError: a width above the grid.
        """
        points = _points(dims)
        now = self._blocks(points)

        def saved(axis: int) -> Array:
            fewer = points.copy()
            fewer[:, axis] -= 1
            found: Array = now - self._blocks(fewer)
            return found

        embed = float(saved(0).sum()) + self._rest(dims.embed_dim) - self._rest(dims.embed_dim - 1)
        by_block = np.stack([saved(axis) for axis in range(1, len(AXES))], axis=1)
        return [embed, *by_block.flatten().tolist()]

    def monotone(self) -> LatencyTable:
        """The table without decreases along any axis; see :func:`monotone`."""
        rest = None if self.rest is None else monotone(self.rest)
        return replace(self, values=monotone(self.values), rest=rest)

    def check(self, config: Config) -> None:
        """Raise ValueError when the table belongs to another family than ``config``, or is too small for it.

        Depth and widths may differ; image and patch size, tokens, classes and layers may not.
        """
        if not isinstance(config, ViTConfig):
            raise ValueError(
                "LatencyTable: `model` must be a Vision Transformer with one width of the residual stream, "
                f"got {type(config).__name__.removesuffix('Config')}."
            )
        if self.family is not None:
            mine, theirs = dict(self.family), family_of(config)
            different = [f"{k} {mine.get(k)!r} against {v!r}" for k, v in theirs.items() if mine.get(k) != v]
            if different:
                raise ValueError(
                    "LatencyTable: `model` must be of the family that was measured; the table and the model "
                    f"differ in {'; '.join(different)}. Measure a table for this model."
                )
        self._inside(_points(config.dims))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            "format_version": FORMAT_VERSION,
            "unit": self.unit,
            "measured": None if self.measured is None else dict(self.measured),
            "family": None if self.family is None else dict(self.family),
            "grids": dict(zip(AXES, map(list, self.grids))),
            "rest": None if self.rest is None else self.rest.tolist(),
            "curve": None if self.curve is None else self.curve.tolist(),
            "values": self.values.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: missing keys, another format version, or values that do not fit.
        """
        try:
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise bad(f"format_version must be {FORMAT_VERSION}", version)
            rest = None if data["rest"] is None else np.array(data["rest"], dtype=np.float64)
            return cls(
                data["grids"],
                np.array(data["values"], dtype=np.float64),
                rest,
                None if data["curve"] is None else np.array(data["curve"], dtype=np.float64),
                data["unit"],
                data["family"],
                data["measured"],
            )
        except (KeyError, TypeError) as error:
            raise bad("a stored table must be complete", repr(error)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, with the device it was measured on; whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a whole table.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"LatencyTable.load: {path} must be JSON: {error}.") from error
        if not isinstance(data, dict):
            raise ValueError(f"LatencyTable.load: {path} must hold a table, got a {type(data).__name__}.")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"LatencyTable.load: {path}: {error}") from error

    def _inside(self, points: Array) -> None:
        for axis, (name, grid) in enumerate(zip(AXES, self.grids, strict=True)):
            if (points[:, axis] > grid[-1]).any():
                raise bad(f"{name} must be at most {grid[-1]}, where the grid ends", points[:, axis].max())

    def _blocks(self, points: Array) -> Array:
        """Cost of blocks with the widths ``points`` [L, 5]; returns [L]."""
        self._inside(points)
        corners = []
        for axis, grid in enumerate(self.grids):
            steps = np.array(grid, dtype=np.float64)
            x = np.maximum(points[:, axis], steps[0])
            low = np.clip(np.searchsorted(steps, x, side="right") - 1, 0, max(0, len(steps) - 2))
            high = np.minimum(low + 1, len(steps) - 1)
            gap = steps[high] - steps[low]
            share = np.where(gap > 0, (x - steps[low]) / np.where(gap > 0, gap, 1.0), 0.0)
            corners.append(((low, 1.0 - share), (high, share)))
        total: Array = np.zeros(len(points))
        for chosen in itertools.product(*corners):
            weight = np.prod([w for _, w in chosen], axis=0)
            total += weight * self.values[tuple(index for index, _ in chosen)]
        return total

    def _rest(self, embed_dim: int) -> float:
        return 0.0 if self.rest is None else float(np.interp(embed_dim, self.grids[0], self.rest))


def _config(model: nn.Module) -> ViTConfig:
    prunable_config_of(model)  # names the families that are not pruned yet
    return ViTConfig.from_model(unwrap(model))


def _points(dims: ViTDims) -> Array:
    rows = [(dims.embed_dim, b.heads, b.qk_dim, b.v_dim, b.mlp) for b in dims.blocks]
    return np.array(rows, dtype=np.float64).reshape(-1, len(AXES))
