"""Parameters and multiply-accumulates as the NViT paper counts them, from widths alone."""

from __future__ import annotations

from pyvitfast.models.vision_transformer import ViTDims

_PATCH = 3 * 16 * 16
_CLASSES = 1000
_PATCHES = 14 * 14


def paper_params(dims: ViTDims) -> int:
    r"""The paper's number of parameters: weight matrices only, one classifier, no biases, norms or tokens.

    :math:`768 E + 1000 E + \sum_l 2 E H (QK + V) + 2 E M` for 16-pixel colour patches and 1000 classes.

    Source:
        Found by fitting the ratios of NViT (Yang et al., CVPR 2023), Tables 1 and 7; not written there.
    """
    width = dims.embed_dim
    blocks = sum(2 * width * (d.heads * (d.qk_dim + d.v_dim) + d.mlp) for d in dims.blocks)
    return (_PATCH + _CLASSES) * width + blocks


def paper_macs(dims: ViTDims, tokens: int = 197, patches: int | None = None) -> int:
    r"""The paper's number of multiply-accumulates, there called FLOPs.

    :math:`768 E P + 1000 E + \sum_l N E H (2 QK + 2 V) + N^2 H (QK + V) + 2 N E M` with N tokens, P patches.

    Args:
        dims: widths.
        tokens: N.
        patches: P; by default N - 2, as if a distillation token were among the N. An image of 224 pixels
            has 196 and, with N = 197, a count 768 E higher. The paper prints ratios only, and its digits
            come out of both.

    Source:
        Found by fitting the ratios of NViT (Yang et al., CVPR 2023), Tables 1 and 7; not written there.
    """
    width = dims.embed_dim
    total = ((tokens - 2 if patches is None else patches) * _PATCH + _CLASSES) * width
    for d in dims.blocks:
        total += tokens * width * 2 * d.heads * (d.qk_dim + d.v_dim)
        total += tokens * tokens * d.heads * (d.qk_dim + d.v_dim)
        total += 2 * tokens * width * d.mlp
    return total


def full_params(dims: ViTDims, distilled: bool = False) -> int:
    """All parameters of the timm model with these widths at 224 pixels: biases, norms, tokens, heads."""
    width, heads = dims.embed_dim, 1 + int(distilled)
    total = width * (_PATCH + 1) + width * (heads + _PATCHES + heads)  # patches; tokens and their positions
    total += 2 * width + heads * _CLASSES * (width + 1)
    for d in dims.blocks:
        qk, v = d.heads * d.qk_dim, d.heads * d.v_dim
        total += 4 * width + (width + 1) * (2 * qk + v) + (v + 1) * width
        total += (width + 1) * d.mlp + (d.mlp + 1) * width
    return total
