"""What the two tokens have learned: how they differ, how many directions they use, how far they look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from pyvitfast.models.modules import unwrap
from pyvitfast.models.vision_transformer import PrunedAttention


class FeatureRanks(NamedTuple):
    """Rank of each token's features after each block.

    Args:
        cls: of the class token.
        dist: of the distillation token.
    """

    cls: list[int]
    dist: list[int]


@contextmanager
def _observed(model: nn.Module, prefix: int, distilled: bool = False) -> Iterator[Any]:
    """The timm model inside, in eval mode and without gradients, put back at the end."""
    inner: Any = unwrap(model)
    if not hasattr(inner, "blocks") or getattr(inner, "num_prefix_tokens", 0) < prefix:
        raise TypeError(
            f"analysis: `model` must be a timm Vision Transformer with {prefix} or more tokens before its "
            f"patches, got {type(inner).__name__} with {getattr(inner, 'num_prefix_tokens', 0)}."
        )
    if distilled and not hasattr(inner, "dist_token"):
        raise TypeError(
            f"analysis: `model` must have a distillation token, got {type(inner).__name__}, whose second "
            "token is another."
        )
    training = {module: module.training for module in inner.modules()}
    inner.eval()
    try:
        with torch.no_grad():
            yield inner
    finally:
        for module, mode in training.items():
            module.training = mode


def expert_diversity(model: nn.Module, images: Tensor) -> float:
    """One minus the mean cosine of the CLS and DIST features after the last norm.

    Args:
        model: a timm ``VisionTransformerDistilled``.
        images: [B, C, H, W].

    Raises:
        TypeError: a model without two tokens.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024): 0.01 for DeiT at most, up to 0.43 for DeiT-LT on CIFAR-10-LT.
    """
    with _observed(model, 2, distilled=True) as inner:
        features = inner.forward_features(images)
        return 1 - float(F.cosine_similarity(features[:, 0], features[:, 1], eps=1e-6).double().mean())


def feature_rank(model: nn.Module, loader: Iterable[Any], threshold: float = 0.99) -> FeatureRanks:
    """How many principal components hold ``threshold`` of the variance of CLS and DIST, after each block.

    Args:
        model: a timm ``VisionTransformerDistilled`` on the device of the images.
        loader: batches of images [B, C, H, W], or tuples that begin with them. The rank is below the number
            of images, so take several times as many as the model is wide.
        threshold: share of the variance, above 0 and up to 1; not published, 0.99 is our choice.

    Returns:
        Ranks by block; the components are those of centred features, in float64.

    Raises:
        TypeError: a model without two tokens.
        ValueError: a bad threshold, or no images.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024): low-rank features from flat teachers.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"feature_rank: `threshold` must be above 0 and up to 1, got {threshold!r}.")
    with _observed(model, 2, distilled=True) as inner:
        seen: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda _m, _a, out: seen.append(out[:, :2])) for b in inner.blocks]
        count, shift, total, products = 0, None, None, None
        try:
            for batch in loader:
                seen.clear()
                inner.forward_features(batch if isinstance(batch, Tensor) else batch[0])
                _check_blocks(inner, len(seen))
                x = torch.stack(seen).transpose(1, 2).double()  # [blocks, B, 2, D] to [blocks, 2, B, D]
                # Products around the first batch's mean keep their digits where the mean is large.
                shift = x.mean(2, keepdim=True) if shift is None else shift
                x = x - shift
                count += x.shape[2]
                total = x.sum(2) + (0 if total is None else total)
                products = x.mT @ x + (0 if products is None else products)
        finally:
            for hook in hooks:
                hook.remove()
    if total is None or products is None:
        raise ValueError("feature_rank: `loader` must give at least one batch, got none.")
    mean = total / count
    variances = torch.linalg.eigvalsh(products / count - mean[..., :, None] * mean[..., None, :]).flip(-1)
    variances = variances.clamp(min=0)
    held = variances.cumsum(-1)
    # A hair less than the threshold, so that rounding does not ask for one more at a threshold of 1.
    missing = held < threshold * held[..., -1:] * (1 - 1e-12)
    ranks = missing.sum(-1) + (held[..., -1] > 0)
    return FeatureRanks(ranks[:, 0].tolist(), ranks[:, 1].tolist())


def _attention_maps(model: Any, images: Tensor) -> list[Tensor]:
    """Attention [B, heads, N, N] of each block, which fused attention does not give away: taken from qkv."""
    for block in model.blocks:
        # Others add positions, turn queries and keys, or mix heads: that is not in qkv.
        if not isinstance(attn := getattr(block, "attn", None), Attention | PrunedAttention):
            raise TypeError(
                f"analysis: `model` must have plain attention in each block, got {type(attn).__name__}."
            )
    inputs: list[Tensor] = []
    hooks = [b.attn.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for b in model.blocks]
    try:
        model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    _check_blocks(model, len(inputs))
    maps = []
    for block, x in zip(model.blocks, inputs, strict=True):
        attn = block.attn
        width = attn.num_heads * getattr(attn, "qk_dim", getattr(attn, "head_dim", 0))
        queries, keys = (
            part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            for part in attn.qkv(x)[..., : 2 * width].split(width, dim=-1)
        )
        if hasattr(attn, "q_norm"):
            queries, keys = attn.q_norm(queries), attn.k_norm(keys)
        maps.append((attn.scale * queries.float() @ keys.float().mT).softmax(-1))
    return maps


def attention_distance(model: nn.Module, images: Tensor) -> Tensor:
    """Mean distance in pixels between a patch and what it attends to, weighted by attention.

    Tokens before the patches are left out, and attention is scaled to sum 1 over patches: our choice, for the
    paper does not say.

    Args:
        model: a timm Vision Transformer with plain attention.
        images: [B, C, H, W].

    Returns:
        float32 [blocks, heads] on the CPU, unsorted; NaN behind the last head of a block that has fewer.

    Raises:
        TypeError: a model without blocks of plain attention.

    Source:
        DeiT-LT (Rangwani et al., CVPR 2024), blocks 1 and 2: local heads; Dosovitskiy et al., ICLR 2021.
    """
    with _observed(model, 0) as inner:
        maps = _attention_maps(inner, images)
        rows, columns = _grid(inner, images)
        height, width = inner.patch_embed.patch_size
        y, x = torch.meshgrid(torch.arange(rows) * height, torch.arange(columns) * width, indexing="ij")
        centres = torch.stack((y.flatten(), x.flatten()), 1).float()
        distances = torch.cdist(centres, centres).to(images.device)
        first = inner.num_prefix_tokens
        found = []
        for attention in maps:
            patches = attention[:, :, first:, first:]
            patches = patches / patches.sum(-1, keepdim=True)
            found.append((patches * distances).sum(-1).mean((0, 2)))
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=torch.nan).cpu()


def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """How much of each patch reaches each token through all blocks.

    In a block a token is half itself, by the residual stream, and half the mean of the heads' attention; the
    blocks' matrices are multiplied.

    Args:
        model: a timm Vision Transformer with plain attention and at least one token before the patches.
        images: [B, C, H, W].

    Returns:
        float32 [B, T, rows, columns] for the T tokens before the patches: CLS first, then DIST.

    Raises:
        TypeError: a model without such a token, or without blocks of plain attention.

    Source:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """
    with _observed(model, 1) as inner:
        maps = _attention_maps(inner, images)
        tokens = maps[0].shape[-1]
        flow = identity = torch.eye(tokens, device=maps[0].device)
        for attention in maps:
            flow = (attention.mean(1) + identity) / 2 @ flow
        first = inner.num_prefix_tokens
        return flow[:, :first, first:].reshape(len(images), first, *_grid(inner, images))


def _check_blocks(model: Any, ran: int) -> None:
    if ran != len(model.blocks):
        raise TypeError(
            f"analysis: `model` must run its {len(model.blocks)} blocks one after the other on all tokens, "
            f"got {type(model).__name__}, which runs {ran} of them so."
        )


def _grid(model: Any, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = model.patch_embed.patch_size
    return images.shape[-2] // height, images.shape[-1] // width
