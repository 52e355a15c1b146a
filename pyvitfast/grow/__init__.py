"""Larger Vision Transformers from smaller trained ones."""

from pyvitfast.grow.fixed import Growth
from pyvitfast.grow.grow import METHODS, grow
from pyvitfast.grow.layout import Layout, Stacked, stack_vit, unstack_vit
from pyvitfast.grow.ligo import LiGOOperator
from pyvitfast.grow.mango import MangoOperator
from pyvitfast.grow.operators import GrowthOperator
from pyvitfast.grow.optimizer import grow_optimizer_state
from pyvitfast.grow.outcome import GrowthReport, report
from pyvitfast.grow.pair import check_pair
from pyvitfast.grow.rules import IndexMap, LayerMap, advanced_expand, expand, random_map, round_robin
from pyvitfast.grow.swin import SwinLayout

__all__ = [
    "METHODS",
    "Growth",
    "GrowthOperator",
    "GrowthReport",
    "IndexMap",
    "LayerMap",
    "Layout",
    "LiGOOperator",
    "MangoOperator",
    "Stacked",
    "SwinLayout",
    "advanced_expand",
    "check_pair",
    "expand",
    "grow",
    "grow_optimizer_state",
    "random_map",
    "report",
    "round_robin",
    "stack_vit",
    "unstack_vit",
]
