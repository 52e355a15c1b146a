"""STViT: a few semantic tokens stand for all image tokens."""

from pyvitfast.models.stvit import TokensConfig
from pyvitfast.models.stvit_config import STViTConfig
from pyvitfast.models.stvit_swin import WindowTokensConfig
from pyvitfast.models.stvit_swin_config import STViTSwinConfig
from pyvitfast.tokens.convert import TokensReport, report, to_stvit
from pyvitfast.tokens.video import PerFrame

__all__ = [
    "PerFrame",
    "STViTConfig",
    "STViTSwinConfig",
    "TokensConfig",
    "TokensReport",
    "WindowTokensConfig",
    "report",
    "to_stvit",
]
