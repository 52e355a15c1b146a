"""Cross-attention fusion of timm's CrossViT on ``linear_cross_attention``, without its copies."""

from __future__ import annotations

from typing import Any

import torch
from timm.models._features_fx import register_notrace_module
from timm.models.crossvit import CrossAttention, CrossAttentionBlock, MultiScaleBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pyvitfast.models.modules import is_plain, is_plain_layer_norm, is_plain_linear, kernel


def runs_on_op(fusion: nn.Module) -> bool:
    """Whether the op computes what ``fusion`` would, so that nobody misses the keys and values.

    False for anything but timm's own modules, for hooks on a module that would not be called, for weights
    that are no plain tensors, and while attention dropout is active. Hooks on all modules at once
    (``register_module_forward_hook``) are not looked at.
    """
    if not is_plain(fusion, CrossAttentionBlock):
        return False
    attn: Any = fusion.attn
    norm: Any = fusion.norm1
    if not (
        is_plain(attn, CrossAttention) and is_plain_layer_norm(norm) and is_plain(attn.attn_drop, nn.Dropout)
    ):
        return False
    if norm.weight is None or len(norm.normalized_shape) != 1:
        return False
    if attn.attn_drop.training and attn.attn_drop.p > 0:
        return False
    return all(is_plain_linear(part) for part in (attn.wq, attn.wk, attn.wv, attn.proj))


def _fuse(fusion: Any, query: Tensor, patches: Tensor) -> Tensor:
    """timm's ``CrossAttentionBlock`` of ``query`` [B, 1, C] over itself and ``patches`` [B, P, C]."""
    attn, norm = fusion.attn, fusion.norm1
    if query.dtype != patches.dtype:
        # Under autocast the projected token is narrower than the residual stream; timm's cat widens it too.
        wide = torch.promote_types(query.dtype, patches.dtype)
        query, patches = query.to(wide), patches.to(wide)
    y = kernel("linear_cross_attention", query.device)(
        query.squeeze(1),
        patches,
        attn.wq.weight,
        attn.wk.weight,
        attn.wv.weight,
        attn.proj.weight,
        num_heads=attn.num_heads,
        q_bias=attn.wq.bias,
        k_bias=attn.wk.bias,
        v_bias=attn.wv.bias,
        proj_bias=attn.proj.bias,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        scale=attn.scale,
    )
    out: Tensor = query + fusion.drop_path(attn.proj_drop(y.unsqueeze(1)))
    return out


def _exchange(fusion: Any, query: Tensor, patches: Tensor) -> Tensor:
    """A fusion of either key layout: ``query`` [B, 1, C] and ``patches`` [B, P, C] to [B, 1, C]."""
    if runs_on_op(fusion):
        return _fuse(fusion, query, patches)
    if is_plain(fusion, nn.Sequential) and len(fusion) and runs_on_op(fusion[0]):
        query = _fuse(fusion[0], query, patches)
        for later in list(fusion)[1:]:  # each sees the one row that the module before it gives
            query = later(query)
        return query
    out: Tensor = fusion(torch.cat((query, patches), dim=1))[:, 0:1]
    return out


@register_notrace_module
class LinearMultiScaleBlock(MultiScaleBlock):  # type: ignore[misc]
    r"""timm's multi-scale encoder with the exchange of class tokens on :func:`linear_cross_attention`.

    Parameters, their names and the modules are timm's. With :math:`a` and :math:`b` the tokens of the two
    branches after their own blocks, :math:`p = f_s(a_0)`,
    :math:`y = p + \mathrm{CA}([p ; b_1, \dots])` and :math:`a_0 \leftarrow g_s(y)`; the other direction
    likewise, from the same :math:`a` and :math:`b`. No tensor of all tokens is copied for the attention, and
    in inference the new class token is stored over the old one.

    A fusion that :func:`runs_on_op` refuses runs as timm's.

    Source:
        CrossViT (Chen et al., ICCV 2021), section 3.2, eq. 4 to 6.
    """

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """One tensor for each branch, [B, N_i, C_i], to the same shapes; floating point of any dtype."""
        tokens = [block(branch) for block, branch in zip(self.blocks, x)]
        queries = [proj(branch[:, 0:1]) for proj, branch in zip(self.projs, tokens)]
        # All class tokens come before the first is stored: both directions read what was before the exchange.
        classes = [
            revert(_exchange(fusion, query, tokens[(i + 1) % self.num_branches][:, 1:]))
            for i, (fusion, revert, query) in enumerate(zip(self.fusion, self.revert_projs, queries))
        ]
        outs = []
        for block, branch, cls in zip(self.blocks, tokens, classes):
            if self._is_ours(block, branch, cls):
                branch[:, 0:1] = cls
                outs.append(branch)
            else:
                outs.append(torch.cat((cls, branch[:, 1:]), dim=1))
        return outs

    @staticmethod
    def _is_ours(block: Any, branch: Tensor, cls: Tensor) -> bool:
        """Whether ``branch`` was made by ``block`` just now and nobody else can hold it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if torch.nn.modules.module._global_forward_hooks:
            return False
        if not (is_plain(block, nn.Sequential) and len(block) and is_plain(block[-1], Block)):
            return False  # an empty branch gives its caller's tensor, a hook may keep what it saw
        return torch.promote_types(branch.dtype, cls.dtype) == branch.dtype


def swap_blocks(model: nn.Module, enable: bool) -> tuple[int, int]:
    """Turn the encoders of ``model`` into ours, or back into timm's; how many there are and were changed."""
    found = [m for m in model.modules() if type(m) in (MultiScaleBlock, LinearMultiScaleBlock)]
    kind = LinearMultiScaleBlock if enable else MultiScaleBlock
    changed = [m for m in found if type(m) is not kind]
    for module in changed:
        # Both classes hold the same things, so parameters, hooks and references to the module stay valid.
        module.__class__ = kind
    return len(found), len(changed)
