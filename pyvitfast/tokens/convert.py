"""From a trained Vision Transformer to one with semantic tokens."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pyvitfast.models.config import ViTConfig
from pyvitfast.models.modules import unwrap
from pyvitfast.models.quantized import quantized_layers
from pyvitfast.models.stvit import SemanticTokensMixin, TokensConfig
from pyvitfast.models.stvit_config import STViTConfig, vit_macs, with_semantic_tokens


@dataclass(frozen=True)
class TokensReport:
    """What :func:`to_stvit` did.

    Args:
        image_tokens: rows of the blocks before the module.
        semantic_tokens: rows of the blocks after it.
        base: blocks before the module.
        layers: blocks of the module.
        depth: blocks in all.
        params_before: parameters of the source.
        params_after: parameters now.
        macs_before: multiply-accumulates of one image before.
        macs_after: those now.
    """

    image_tokens: int
    semantic_tokens: int
    base: int
    layers: int
    depth: int
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        left = 100 * self.macs_after / self.macs_before
        return (
            f"{self.image_tokens} tokens in the first {self.base} of {self.depth} blocks, "
            f"{self.semantic_tokens} semantic tokens in the others; MACs/image {self.macs_before:,} -> "
            f"{self.macs_after:,} ({left:.0f} %), parameters {self.params_before:,} -> {self.params_after:,}"
        )


def to_stvit(
    model: nn.Module,
    tokens: tuple[int, int] | int = (4, 4),
    *,
    base: int | None = None,
    layers: int = 2,
    pool: str = "learned",
    global_centers: bool = True,
    concat_keys: bool = True,
    residual_includes_g: bool = False,
    prefix: str | None = None,
    intra_scope: str = "window",
    layer_scale: float | None = None,
    warm_start: bool = True,
    seed: int = 0,
) -> nn.Module:
    r"""Let the later blocks of a Vision Transformer see a few semantic tokens instead of all image tokens.

    After ``base`` blocks the tokens X are pooled on their grid to M centres P. ``layers`` ordinary blocks
    then read X again: :math:`S_1 = B_1(q = P, kv = X)`, :math:`S_2 = B_2(q = S_1 + G, kv = [S_1; X])`. All
    later blocks and the head see the M tokens only. No block gets a weight of its own, so the source's
    weights are kept whole. It is another architecture: the result must be finetuned, or trained from scratch
    as in the paper, which has no figures for finetuning.

    Args:
        model: timm's ``VisionTransformer`` or ``VisionTransformerDistilled``, or a pruned one of ours, any
            device and floating dtype; wrapped by ``torch.compile`` or DistributedDataParallel or not. It is
            not changed.
        tokens: grid of semantic tokens, height and width; one number for a square.
        base: blocks before the module; by default a third of all, the paper's 4 of 12.
        layers: as in :class:`TokensConfig`, like all up to ``layer_scale``.
        pool: default ``learned``, which starts as ``avg``.
        global_centers: learned centres G.
        concat_keys: keys from the second layer on.
        residual_includes_g: whether G joins the residual stream.
        prefix: by default ``drop``, and ``carry`` for a distilled model, whose heads read its tokens.
        intra_scope: of the learned pool.
        layer_scale: first value of LayerScale, None adds none.
        warm_start: G starts at zero, so that a trained model is disturbed least; False draws it from a normal
            of standard deviation 0.02, as for training from scratch.
        seed: of that.

    Returns:
        A new model, an ordinary module with timm's conventions, in the mode of the source. With
        ``prefix="drop"`` it has no class token: its head reads the mean of the tokens, after the norm where
        the source has its norm there.

    Raises:
        TypeError: no Vision Transformer.
        NotImplementedError: it has a part that we cannot describe, has semantic tokens already, or is
            quantised; the message names it.
        ValueError: settings that do not fit the model.

    Example:
        >>> model = timm.create_model("deit_small_patch16_224", pretrained=True)
        >>> fast = vf.tokens.to_stvit(model, tokens=(4, 4))
        >>> print(vf.tokens.report(fast))

    Source:
        STViT (Chang et al., CVPR 2023), section 3. Keeping a trained model's weights is ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_stvit: `model` must be an nn.Module, got {type(model).__name__}.")
    source = unwrap(model)
    if isinstance(source, SemanticTokensMixin):
        raise NotImplementedError("to_stvit: `model` has semantic tokens already; convert what it came from.")
    if quantized_layers(source):
        raise NotImplementedError(
            "to_stvit: `model` is quantised, and would have to be trained again; convert the float model, "
            "then quantise."
        )
    vit = ViTConfig.from_model(source)
    grid: Any = (tokens, tokens) if isinstance(tokens, int) else tuple(tokens)
    semantic = TokensConfig(
        tokens=grid,
        base=len(vit.dims.blocks) // 3 if base is None else base,
        layers=layers,
        pool=pool,
        global_centers=global_centers,
        concat_keys=concat_keys,
        residual_includes_g=residual_includes_g,
        prefix=("carry" if vit.distilled else "drop") if prefix is None else prefix,
        intra_scope=intra_scope,
        layer_scale=layer_scale,
    )
    config = with_semantic_tokens(vit, semantic)
    weight = next(source.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fast = config.build().to(weight.device, weight.dtype)
    if warm_start and fast.stgm.G is not None:  # type: ignore[union-attr]
        nn.init.zeros_(fast.stgm.G)  # type: ignore[union-attr, arg-type]
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    if layer_scale is not None:
        own = fast.state_dict()
        state |= {name: own[name] for name in own if name.rpartition(".")[2] == "gamma" and name not in state}
    fast.load_state_dict(state)
    known: Any = source
    if pretrained := getattr(known, "pretrained_cfg", None):
        fast.pretrained_cfg = fast.default_cfg = copy.deepcopy(dict(pretrained))  # type: ignore[assignment]
    fast._tokens_source = (vit.params(), vit_macs(vit))  # type: ignore[assignment]
    return fast.train(model.training)


def report(model: nn.Module) -> TokensReport:
    """Tokens, parameters and multiply-accumulates of a model with semantic tokens beside its source's.

    Raises:
        TypeError: no model of :func:`to_stvit`.
    """
    inner: Any = unwrap(model)
    config = STViTConfig.from_model(inner)
    before = getattr(inner, "_tokens_source", None)
    if before is None:
        raise TypeError(
            "report: `model` must come from to_stvit in this process; a file does not tell what it was."
        )
    patches, rows = config.vit.tokens()
    carried = rows - patches if config.semantic.prefix == "carry" else 0
    return TokensReport(
        image_tokens=rows,
        semantic_tokens=config.semantic.count + carried,
        base=config.semantic.base,
        layers=config.semantic.layers,
        depth=len(config.dims.blocks),
        params_before=before[0],
        params_after=config.params(),
        macs_before=before[1],
        macs_after=config.macs(),
    )
