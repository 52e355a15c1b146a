from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pyvitfast.prune import NViTPruner

MICRO = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}


def pruned(model, target=0.5, seed=0, **settings):
    """Pruned by random scores, so that every kind of structure is hit."""
    pruner = NViTPruner(model, target=target, **settings)
    generator = torch.Generator().manual_seed(seed)
    while not pruner.done:
        scores = torch.rand(pruner.table.count, generator=generator)
        for s in pruner.structures:
            scores[s.start : s.stop] /= s.group_size
        pruner.prune_once(scores)
    return pruner


@pytest.fixture
def micro() -> Callable[..., nn.Module]:
    """Makes micro ViTs whose weights, biases, norms and tokens are all far from their initial 0 and 1."""

    def make(distilled: bool = False, double: bool = False, seed: int = 0, **changes: object) -> nn.Module:
        torch.manual_seed(seed)
        kind = VisionTransformerDistilled if distilled else VisionTransformer
        model = kind(**{**MICRO, **changes})
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.double() if double else model

    return make


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes random images and labels."""

    def make(
        count: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype)
        return images, torch.randint(10, (count,), generator=generator)

    return make


@pytest.fixture
def backward() -> Callable[..., None]:
    """Fresh gradients of the cross-entropy on a batch."""

    def run(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], factor: float = 1.0) -> None:
        model.zero_grad()
        (factor * F.cross_entropy(model(data[0]), data[1])).backward()

    return run
