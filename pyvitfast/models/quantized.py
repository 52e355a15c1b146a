"""Linear and convolution layers with quantised weights: in training, and packed for storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyvitfast import ops
from pyvitfast.models.modules import unwrap
from pyvitfast.reference._quantizer import bounds, spread


@dataclass(frozen=True)
class LayerQuantization:
    """How one layer is quantised.

    Args:
        bits: of a weight.
        grid: ``integer``, ``half_integer`` or ``sign``.
        mask: what stands in for the derivative of rounding, see :func:`pyvitfast.ops.fake_quantize`.
        granularity: what shares a scale: the ``tensor``, an output ``channel``, or a ``group`` of columns.
        group_size: columns in a group; 0 otherwise.
        learned: the scale is a parameter.
        activation_bits: of an input, or None for inputs as they are.
        activation_grid: ``integer`` or ``half_integer``.
    """

    bits: int
    grid: str
    mask: str
    granularity: str
    group_size: int
    learned: bool
    activation_bits: int | None
    activation_grid: str

    def scale_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Shape of the scales of a weight."""
        if self.granularity == "tensor":
            return ()
        rows, columns = weight.shape[0], weight[0].numel()
        if self.granularity == "channel":
            return (rows,)
        return (rows, math.ceil(columns / self.group_size))


class InputQuantizer(nn.Module):
    """Rounds activations to a grid whose scale, one for the tensor, is learned.

    The scale begins at 2 mean|x| / sqrt(Qp) of the first batch in training mode (LSQ, section 3); until then
    inputs pass unchanged.
    """

    def __init__(self, bits: int, grid: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.bits, self.grid = bits, grid
        self.scale = nn.Parameter(torch.zeros((), device=device))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        """Rounded inputs, in the dtype and shape of ``x``."""
        if not self.ready:
            if not self.training:
                return x
            self._start(x)
        scale = self.scale.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        run = ops.implementation("fake_quantize", x.device)
        (out,) = run([x], [scale], bits=self.bits, grid=self.grid, scale_gradient=True)
        quantised: Tensor = out
        return quantised

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        size = 2 * x.abs().float().mean() / math.sqrt(max(bounds(self.grid, self.bits)[1], 1))
        self.scale.copy_(torch.where(size > 0, size, 1.0))
        self.ready = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        found = state_dict.get(f"{prefix}scale")
        self.ready = found is not None and bool(found > 0)

    def extra_repr(self) -> str:
        """Bits and grid."""
        return f"bits={self.bits}, grid={self.grid}"


class _Quantized:
    """What linear layers and convolutions share while they are trained."""

    weight: Tensor
    weight_scale: Tensor
    quantization: LayerQuantization
    quantized_weight: Tensor | None
    input_quantizer: InputQuantizer | None

    def effective_weight(self) -> Tensor:
        """The weight the layer computes with: ``quantized_weight`` where somebody set it, else the rounded
        ``weight``.
        """
        if self.quantized_weight is not None:
            return self.quantized_weight
        q = self.quantization
        wide = self.weight.dtype == torch.float64
        scale = self.weight_scale.to(torch.float64 if wide else torch.float32)
        run = ops.implementation("fake_quantize", self.weight.device)
        (out,) = run(
            [self.weight],
            [scale],
            bits=q.bits,
            grid=q.grid,
            mask=q.mask,
            group_size=q.group_size,
            scale_gradient=q.learned,
        )
        weight: Tensor = out
        return weight

    def _input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantLinear(_Quantized, nn.Linear):
    """``nn.Linear`` whose weight is rounded at each use; ``weight`` stays the float parameter."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer it stands for, with rounded weights."""
        return F.linear(self._input(input), self.effective_weight(), self.bias)


class QuantConv2d(_Quantized, nn.Conv2d):
    """``nn.Conv2d`` whose weight is rounded at each use; ``weight`` stays the float parameter."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer it stands for, with rounded weights."""
        out: Tensor = self._conv_forward(self._input(input), self.effective_weight(), self.bias)
        return out


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 as bytes, ``bits`` bits each without gaps, the lowest bit first.

    Args:
        codes: integer tensor of any shape.
        bits: 1 to 8.

    Returns:
        uint8 tensor [ceil(n * bits / 8)].
    """
    flat = codes.reshape(-1).to(torch.int32)
    unfolded = (flat[:, None] >> torch.arange(bits, device=flat.device)) & 1  # [n, bits]
    stream = F.pad(unfolded.reshape(-1), (0, -flat.numel() * bits % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: int32 tensor [count]."""
    stream = (packed.to(torch.int32)[:, None] >> torch.arange(8, device=packed.device)) & 1
    unfolded = stream.reshape(-1)[: count * bits].view(count, bits)
    return (unfolded << torch.arange(bits, device=packed.device)).sum(1).to(torch.int32)


def codes_of(weight: Tensor, scale: Tensor, q: LayerQuantization) -> Tensor:
    """Codes from 0 of a weight that lies on its levels, int32, in its shape."""
    ratio = weight.double() / spread(scale, weight, q.group_size).double()
    if q.grid == "sign":
        return (ratio > 0).to(torch.int32)
    shift = 0.5 if q.grid == "half_integer" else 0.0
    return ((ratio - shift).round() - bounds(q.grid, q.bits)[0]).to(torch.int32)


def levels_of(codes: Tensor, scale: Tensor, q: LayerQuantization) -> Tensor:
    """The weight of codes, in float32: the same product that training rounds to."""
    if q.grid == "sign":
        level = 2.0 * codes.float() - 1.0
    else:
        level = codes.float() + (bounds(q.grid, q.bits)[0] + (0.5 if q.grid == "half_integer" else 0.0))
    return level * spread(scale.float(), codes, q.group_size)


class _Packed:
    """What packed layers share. ``weight`` is computed with and not saved; ``codes`` and ``weight_scale`` are
    saved.
    """

    weight: Tensor
    codes: Tensor
    weight_scale: Tensor
    quantization: LayerQuantization
    input_quantizer: InputQuantizer | None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: bool, missing: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local, strict, missing, *args
        )
        name = f"{prefix}weight"
        while name in missing:
            missing.remove(name)
        codes = unpack(self.codes, self.quantization.bits, self.weight.numel()).view(self.weight.shape)
        weight = levels_of(codes, self.weight_scale, self.quantization)
        self.weight = nn.Parameter(weight.to(self.weight_scale.dtype), requires_grad=False)

    def _input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


class PackedLinear(_Packed, nn.Linear):
    """A linear layer for inference whose weight is stored as packed integer codes."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer it stands for, with rounded weights."""
        return F.linear(self._input(input), self.weight, self.bias)


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution for inference whose weight is stored as packed integer codes."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer it stands for, with rounded weights."""
        out: Tensor = self._conv_forward(self._input(input), self.weight, self.bias)
        return out


QuantLayer = QuantLinear | QuantConv2d
PackedLayer = PackedLinear | PackedConv2d
_TRAINED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}
_PACKED: dict[type[nn.Module], type[nn.Module]] = {QuantLinear: PackedLinear, QuantConv2d: PackedConv2d}


def _as(layer: nn.Module, kind: type[nn.Module], q: LayerQuantization) -> Any:
    """A module of class ``kind`` with the attributes, parameters, buffers and hooks of ``layer``."""
    made = kind.__new__(kind)
    made.__dict__ = {k: (v.copy() if isinstance(v, dict) else v) for k, v in layer.__dict__.items()}
    quantised: Any = made
    quantised.quantization = q
    return made


def quantize_layer(layer: nn.Module, q: LayerQuantization, scale: Tensor) -> nn.Module:
    """``layer`` as a :class:`QuantLinear` or :class:`QuantConv2d` that shares its parameters."""
    made = _as(layer, _TRAINED[type(layer)], q)
    if q.learned and not isinstance(scale, nn.Parameter):
        scale = nn.Parameter(scale, requires_grad=layer.get_parameter("weight").requires_grad)
    if q.learned:
        made.weight_scale = scale
    else:
        made.register_buffer("weight_scale", scale)
    made.quantized_weight = None
    made.input_quantizer = None
    if q.activation_bits is not None:
        made.input_quantizer = InputQuantizer(q.activation_bits, q.activation_grid, scale.device)
    return made  # type: ignore[no-any-return]


@torch.no_grad()
def pack_layer(layer: nn.Module) -> nn.Module:
    """A trained layer as its packed twin, which computes the same bits."""
    trained: Any = layer
    q: LayerQuantization = trained.quantization
    weight = trained.effective_weight().detach()
    scale = trained.weight_scale.detach()
    made = _as(layer, _PACKED[type(layer)], q)
    for store in (made._parameters, made._buffers):
        store.pop("weight_scale", None)
    del made.__dict__["quantized_weight"]
    made.register_buffer("codes", pack(codes_of(weight, scale, q), q.bits))
    made.register_buffer("weight_scale", scale.clone())
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if made.bias is not None:
        made.bias = nn.Parameter(made.bias.detach().clone(), requires_grad=False)
    return made  # type: ignore[no-any-return]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place ``name`` of ``model``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The layers of ``model`` that quantise their weight while training, by name."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, QuantLayer)}


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The layers of ``model`` whose weights are stored packed, by name."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, PackedLayer)}


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """How the layers of a quantised model are quantised, as plain data; empty for other models."""
    for packed, layers in ((False, quantized_layers(model)), (True, packed_layers(model))):
        if layers:
            return {
                "packed": packed,
                "layers": {name: asdict(layer.quantization) for name, layer in layers.items()},
            }
    return {}


def rebuild_layers(model: nn.Module, packed: bool, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Quantised layers in a freshly built model, to load weights into."""
    finish: Callable[[nn.Module], nn.Module] = pack_layer if packed else lambda layer: layer
    for name, data in layers.items():
        q = LayerQuantization(**data)
        layer = model.get_submodule(name)
        scale = torch.ones(q.scale_shape(layer.get_parameter("weight")))
        replace(model, name, finish(quantize_layer(layer, q, scale)))
    return model


def packed_bytes(weight: Tensor, q: LayerQuantization) -> int:
    """Bytes that a packed weight and its scales take."""
    return math.ceil(weight.numel() * q.bits / 8) + 4 * math.prod(q.scale_shape(weight))
