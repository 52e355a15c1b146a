"""STViT: a few semantic tokens stand for all image tokens."""

from pyvitfast.models.stvit import TokensConfig
from pyvitfast.models.stvit_config import STViTConfig
from pyvitfast.tokens.convert import TokensReport, report, to_stvit

__all__ = ["STViTConfig", "TokensConfig", "TokensReport", "report", "to_stvit"]
