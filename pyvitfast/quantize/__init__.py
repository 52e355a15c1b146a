"""Quantisation-aware training, and what corrects its gradients."""

from pyvitfast.models.quantized import quantized_layers
from pyvitfast.quantize.config import QuantConfig
from pyvitfast.quantize.fogzo import ESTIMATORS, FOGZO
from pyvitfast.quantize.prepare import QuantReport, convert, initial_scale, prepare, report

__all__ = [
    "ESTIMATORS",
    "FOGZO",
    "QuantConfig",
    "QuantReport",
    "convert",
    "initial_scale",
    "prepare",
    "quantized_layers",
    "report",
]
