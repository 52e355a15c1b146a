"""Models the methods give back, their checkpoints and their summary."""

from pyvitfast.models import cifar_resnet, cosine_resnet  # noqa: F401  registers their models
from pyvitfast.models.accelerate import AccelerateReport, accelerate
from pyvitfast.models.accounting import full_params, paper_macs, paper_params
from pyvitfast.models.checkpoint import load, save
from pyvitfast.models.config import ViTConfig
from pyvitfast.models.crossvit import CrossViT
from pyvitfast.models.crossvit_config import CrossViTConfig, CrossViTDims
from pyvitfast.models.crossvit_fusion import LinearMultiScaleBlock
from pyvitfast.models.crossvit_variants import crossvit_filter_fn
from pyvitfast.models.export import ExportReport, export
from pyvitfast.models.micro import vit_micro_patch2_8
from pyvitfast.models.revit import revit_dims
from pyvitfast.models.stvit import STViT, TokensConfig
from pyvitfast.models.stvit_config import STViTConfig
from pyvitfast.models.stvit_swin import STViTSwin, WindowTokensConfig
from pyvitfast.models.stvit_swin_config import STViTSwinConfig
from pyvitfast.models.stvit_variants import create
from pyvitfast.models.summary import ModelSummary, summary
from pyvitfast.models.swin_config import SwinConfig
from pyvitfast.models.swin_transformer import PrunedSwinTransformer, PrunedWindowAttention, SwinDims
from pyvitfast.models.vision_transformer import (
    BlockDims,
    PrunedAttention,
    PrunedBlock,
    PrunedVisionTransformer,
    PrunedVisionTransformerDistilled,
    ViTDims,
)

__all__ = [
    "AccelerateReport",
    "BlockDims",
    "CrossViT",
    "CrossViTConfig",
    "CrossViTDims",
    "ExportReport",
    "LinearMultiScaleBlock",
    "ModelSummary",
    "PrunedAttention",
    "PrunedBlock",
    "PrunedSwinTransformer",
    "PrunedVisionTransformer",
    "PrunedVisionTransformerDistilled",
    "PrunedWindowAttention",
    "STViT",
    "STViTConfig",
    "STViTSwin",
    "STViTSwinConfig",
    "SwinConfig",
    "SwinDims",
    "TokensConfig",
    "ViTConfig",
    "ViTDims",
    "WindowTokensConfig",
    "accelerate",
    "create",
    "crossvit_filter_fn",
    "export",
    "full_params",
    "load",
    "paper_macs",
    "paper_params",
    "revit_dims",
    "save",
    "summary",
    "vit_micro_patch2_8",
]
