"""NViT: global structural pruning of Vision Transformers."""

from pyvitfast.prune.config import NViTConfig
from pyvitfast.prune.cost import Cost, MacsCost, ParamsCost
from pyvitfast.prune.distillation import DistillationConfig, DistillationLoss, both_logits
from pyvitfast.prune.latency import LatencyTable
from pyvitfast.prune.nvit import NViTPruner
from pyvitfast.prune.structure import Structure, UnitTable, group_size

__all__ = [
    "Cost",
    "DistillationConfig",
    "DistillationLoss",
    "LatencyTable",
    "MacsCost",
    "NViTConfig",
    "NViTPruner",
    "ParamsCost",
    "Structure",
    "UnitTable",
    "both_logits",
    "group_size",
]
