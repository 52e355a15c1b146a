"""NViT: global structural pruning of Vision Transformers."""

from pyvitfast.models.modules import both_logits
from pyvitfast.prune.config import NViTConfig
from pyvitfast.prune.cost import Cost, MacsCost, ParamsCost
from pyvitfast.prune.distillation import DistillationConfig, DistillationLoss
from pyvitfast.prune.latency import LatencyTable
from pyvitfast.prune.nvit import NViTPruner
from pyvitfast.prune.sparsity import (
    SparsityReport,
    apply_masks,
    magnitude_mask,
    sparsify,
    to_semi_structured,
)
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
    "SparsityReport",
    "Structure",
    "UnitTable",
    "apply_masks",
    "both_logits",
    "group_size",
    "magnitude_mask",
    "sparsify",
    "to_semi_structured",
]
