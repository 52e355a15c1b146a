"""From a float model to one that trains with quantised weights, and on to packed weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyvitfast.models.modules import unwrap
from pyvitfast.models.quantized import (
    LayerQuantization,
    codes_of,
    levels_of,
    pack_layer,
    packed_bytes,
    packed_layers,
    quantize_layer,
    quantized_layers,
    replace,
)
from pyvitfast.quantize.config import QuantConfig
from pyvitfast.reference._quantizer import bounds, quantize, spread

_LEAST = 2.0**-16
_SHRINKS = 81


@dataclass(frozen=True)
class QuantReport:
    """What is quantised in a model.

    Args:
        layers: how each quantised layer is, by name.
        skipped: why other linear layers and convolutions are not, by name.
        weights: parameters in quantised weights; a shared one counts once.
        params: parameters of the whole model.
        float_bytes: bytes of the whole model in float32.
        packed_bytes: the same with quantised weights packed, scales included.
    """

    layers: Mapping[str, LayerQuantization]
    skipped: Mapping[str, str]
    weights: int
    params: int
    float_bytes: int
    packed_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of a parameter of the whole model once packed, scales included."""
        return 8 * self.packed_bytes / self.params

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            "layers": sorted(self.layers),
            "skipped": dict(self.skipped),
            "weights": self.weights,
            "params": self.params,
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "bits_per_weight": self.bits_per_weight,
        }

    def __str__(self) -> str:
        q = next(iter(self.layers.values()))
        inputs = "" if q.activation_bits is None else f", inputs in {q.activation_bits} bits"
        lines = [
            f"{q.bits}-bit weights ({q.grid} grid, a scale each {q.granularity}{inputs}) in "
            f"{len(self.layers)} layers: {self.weights:,} of {self.params:,} parameters; "
            f"{self.float_bytes / 1024:,.1f} KiB -> {self.packed_bytes / 1024:,.1f} KiB packed, "
            f"{self.bits_per_weight:.2f} bits a parameter"
        ]
        return "\n".join([*lines, *(f"  {name} skipped: {why}" for name, why in self.skipped.items())])


def _ends(model: nn.Module, names: list[str]) -> dict[str, str]:
    """First and last layer: timm's own words for them, else by order."""
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    found: dict[str, str] = {}
    for key, word in (("first_conv", "the first layer"), ("classifier", "the last layer")):
        value = known.get(key)
        for name in (value,) if isinstance(value, str) else value or ():
            found |= {n: word for n in names if n == name or n.startswith(f"{name}.")}
    if not found and len(names) > 2:
        found = {names[0]: "the first layer", names[-1]: "the last layer"}
    return found


def _candidates(model: nn.Module, config: QuantConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers to quantise, and why others are not."""
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{leaf}" if name else leaf)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if type(module) not in (nn.Linear, nn.Conv2d):
            reasons[name] = (
                f"{type(module).__name__} is a class of its own, whose weight may be read elsewhere"
            )
        elif not name:
            reasons[name] = "it is the model itself; wrap it, as in nn.Sequential(layer)"
        elif not isinstance(module.weight, nn.Parameter) or type(module.weight.data) is not Tensor:
            reasons[name] = "its weight is computed or of another type"
        elif module.weight.dtype not in (torch.float32, torch.float64):
            reasons[name] = f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not float32"
        else:
            layers[name] = module
    if config.skip is None:
        ends = _ends(model, list(layers))
        reasons |= ends
    else:
        reasons |= {name: "named in skip" for name in layers if config.skips(name)}
    layers = {name: module for name, module in layers.items() if name not in reasons}
    ours = {f"{name}.weight" for name in layers}
    for name, module in list(layers.items()):
        others = [n for n in owners[id(module.get_parameter("weight"))] if n not in ours]
        if others:
            reasons[name] = f"its weight is also {others[0]}, which is not quantised"
            del layers[name]
    return layers, reasons


def _segments(weight: Tensor, q: LayerQuantization) -> tuple[Tensor, Tensor]:
    """Weights by scale [..., n], padded with 0, and how many of them are there."""
    shape = q.scale_shape(weight)
    if len(shape) < 2:
        flat = weight.reshape(shape[0] if shape else 1, -1)
        count = torch.full(flat.shape[:1], flat.shape[1], device=weight.device)
        return flat.view(*shape, -1), count.view(shape)
    rows = weight.reshape(shape[0], -1)
    padded = F.pad(rows, (0, shape[1] * q.group_size - rows.shape[1]))
    there = F.pad(torch.ones_like(rows), (0, shape[1] * q.group_size - rows.shape[1]))
    return padded.view(*shape, -1), there.view(*shape, -1).sum(-1)


@torch.no_grad()
def initial_scale(weight: Tensor, q: LayerQuantization, rule: str, value: float | None = None) -> Tensor:
    """Scales of a weight by the rules of :class:`QuantConfig`.

    Args:
        weight: [O, ...].
        q: how it is quantised.
        rule: ``lsq``, ``absmax``, ``mse`` or ``fixed``.
        value: the fixed scale, or None.

    Returns:
        Positive scales in the shape of ``q.scale_shape(weight)``, in the weight's dtype.
    """
    shape = q.scale_shape(weight)
    if rule == "fixed":
        fan_in = weight[0].numel()
        return torch.full(shape, value or 1 / math.sqrt(fan_in), dtype=weight.dtype, device=weight.device)
    segments, count = _segments(weight.detach(), q)
    size = segments.abs()
    mean = size.sum(-1) / count
    high = bounds(q.grid, q.bits)[1]
    outermost = high + (0.5 if q.grid == "half_integer" else 0.0)
    if rule == "lsq":
        scale = mean if q.grid == "sign" else 2 * mean / math.sqrt(max(high, 1))
    elif rule == "absmax":
        scale = size.amax(-1) / outermost
    elif q.grid == "sign":
        scale = mean  # the least squared error in closed form
    else:
        scale = _least_squares(weight.detach(), q, size.amax(-1) / outermost)
    greatest = scale.max() if scale.numel() else scale.new_zeros(())
    floor = torch.where(greatest > 0, greatest * _LEAST, 1.0)
    return torch.maximum(scale, floor).view(shape)


def _least_squares(weight: Tensor, q: LayerQuantization, whole: Tensor) -> Tensor:
    whole = torch.where(whole > 0, whole, 1.0)
    best, least = whole, torch.full_like(whole, float("inf"))
    for factor in torch.linspace(1.0, 0.2, _SHRINKS).tolist():
        scale = whole * factor
        segments, _ = _segments((_rounded(weight, scale, q) - weight).square(), q)
        error = segments.sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _rounded(weight: Tensor, scale: Tensor, q: LayerQuantization) -> Tensor:
    each = spread(scale, weight, q.group_size)
    return quantize(weight / each, each, q.grid, q.bits)


def prepare(model: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """Make the linear layers and convolutions of a model train with quantised weights.

    Args:
        model: changed in place: any model with ``nn.Linear`` or ``nn.Conv2d`` layers, such as timm's Vision
            Transformers and ResNets, pruned models and ours; wrapped by ``torch.compile`` or
            DistributedDataParallel or not.
        config: what to do; by default 4 bits with learned scales a channel.

    Returns:
        The same model. Float weights stay parameters under their names, so state dicts load; layers round
        them at each use. :func:`report` tells what was done.

    Raises:
        ValueError: no layer fits, the model is quantised already, or a weight holds NaN or Inf.

    Layers whose weight other code reads directly (``nn.MultiheadAttention``, subclasses) stay as they are.
    """
    config = config or QuantConfig()
    inner = unwrap(model)
    if quantized_layers(inner) or packed_layers(inner):
        raise ValueError("prepare: `model` must not be quantised already; start from the float model.")
    layers, reasons = _candidates(inner, config)
    if not layers:
        why = "; ".join(f"{n or 'the model'}: {r}" for n, r in list(reasons.items())[:3])
        raise ValueError(
            "prepare: `model` must have an nn.Linear or nn.Conv2d to quantise, got "
            f"{why or 'none at all'}. QuantConfig(skip=()) takes first and last layers too."
        )
    q = config.layer()
    scales: dict[int, Tensor] = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        if not weight.isfinite().all():
            raise ValueError(f"prepare: `model` must hold finite weights, got NaN or Inf in {name}.weight.")
        if id(weight) not in scales:
            scale = initial_scale(weight, q, config.scale, config.scale_value)
            scales[id(weight)] = (
                nn.Parameter(scale, requires_grad=weight.requires_grad) if q.learned else scale
            )
    for name, layer in layers.items():
        scale = scales[id(layer.get_parameter("weight"))]
        replace(inner, name, quantize_layer(layer, q, scale))
    notes: Any = inner
    notes.quantization_skipped = reasons
    return model


def convert(model: nn.Module) -> nn.Module:
    """A copy of a prepared model for inference, its weights as packed integers.

    Args:
        model: from :func:`prepare`, trained or not; left as it is.

    Returns:
        A model in eval mode that computes the same bits as ``model`` in eval mode. ``pyvitfast.save`` stores
        the packed codes: ``bits`` bits a weight. In memory the rounded weights are kept as floats too.

    Raises:
        ValueError: the model is not prepared, or a weight or scale holds NaN or Inf, or a scale is not
            positive.
    """
    inner = copy.deepcopy(unwrap(model)).eval()
    layers = quantized_layers(inner)
    if not layers:
        raise ValueError(
            "convert: `model` must come from pyvitfast.quantize.prepare; no quantised layer found."
        )
    for name, layer in layers.items():
        scale = layer.weight_scale
        if not (layer.weight.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise ValueError(
                f"convert: weights must be finite and scales positive, got others in {name}: training "
                "diverged. Lower the learning rate or load an earlier checkpoint."
            )
    for name, layer in layers.items():
        packed = pack_layer(layer)
        made: Any = packed
        again = levels_of(
            codes_of(made.weight, made.weight_scale, made.quantization), made.weight_scale, made.quantization
        )
        if not torch.equal(again.to(made.weight.dtype), made.weight):
            raise ValueError(
                f"convert: the weight of {name} does not survive packing; its scales are too small."
            )
        replace(inner, name, packed)
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    return inner


def report(model: nn.Module) -> QuantReport:
    """What is quantised in a prepared or converted model.

    Raises:
        ValueError: nothing is.
    """
    inner = unwrap(model)
    layers: dict[str, Any] = {**quantized_layers(inner), **packed_layers(inner)}
    if not layers:
        raise ValueError("report: `model` must be prepared or converted; no quantised layer found.")
    weights = {id(layer.weight): layer for layer in layers.values()}
    scales = {id(layer.weight_scale) for layer in layers.values()}
    quantisers = {
        id(layer.input_quantizer.scale) for layer in layers.values() if layer.input_quantizer is not None
    }
    plain = [p for p in inner.parameters() if id(p) not in scales | quantisers]
    params = sum(p.numel() for p in plain)
    count = sum(layer.weight.numel() for layer in weights.values())
    packed = sum(packed_bytes(layer.weight, layer.quantization) for layer in weights.values())
    return QuantReport(
        layers={name: layer.quantization for name, layer in layers.items()},
        skipped=dict(getattr(inner, "quantization_skipped", {})),
        weights=count,
        params=params,
        float_bytes=4 * params,
        packed_bytes=packed + 4 * (params - count + len(quantisers)),
    )
