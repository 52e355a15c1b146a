"""The ops of :mod:`pyvitfast.ops` in plain torch: same signatures, any device, any float dtype."""

from pyvitfast.reference.adaptive_window_pool import adaptive_window_pool
from pyvitfast.reference.fake_quantize import fake_quantize
from pyvitfast.reference.few_query_attention import few_query_attention
from pyvitfast.reference.kron_grow import kron_grow
from pyvitfast.reference.linear_cross_attention import linear_cross_attention
from pyvitfast.reference.saliency_commit_ import saliency_commit_
from pyvitfast.reference.saliency_rowcol import saliency_rowcol
from pyvitfast.reference.scaled_sqnorm import scaled_sqnorm
from pyvitfast.reference.semantic_pool_attention import semantic_pool_attention
from pyvitfast.reference.spsa_perturb import spsa_perturb
from pyvitfast.reference.spsa_update_ import spsa_update_
from pyvitfast.reference.structured_gather import structured_gather
from pyvitfast.reference.structured_zero_ import structured_zero_
from pyvitfast.reference.tensor_ring_grow import tensor_ring_grow
from pyvitfast.reference.two_head_loss import two_head_loss
from pyvitfast.reference.window_gather_attention import window_gather_attention

__all__ = [
    "adaptive_window_pool",
    "fake_quantize",
    "few_query_attention",
    "kron_grow",
    "linear_cross_attention",
    "saliency_commit_",
    "saliency_rowcol",
    "scaled_sqnorm",
    "semantic_pool_attention",
    "spsa_perturb",
    "spsa_update_",
    "structured_gather",
    "structured_zero_",
    "tensor_ring_grow",
    "two_head_loss",
    "window_gather_attention",
]
