"""Parametric contrastive learning: features against class centres, a second view and a queue."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pyvitfast.distill.weights import Counts, checked_counts


@dataclass(frozen=True)
class PaCoConfig:
    """Settings of :class:`PaCo`; the defaults are those of CIFAR-100-LT.

    ImageNet-LT and iNaturalist-2018 have alpha 0.05, temperature 0.2, queue 8192 and dim 128. The settings of
    CIFAR-10-LT and rho of SAM for this loss were never published. Our choice is what they are for plain
    cross-entropy, which PaCo is without its features: the settings of CIFAR-100-LT, and rho 0.1 with 10
    classes and 0.2 with 100; for ImageNet-LT and iNaturalist-2018 0.05, that of SAM's authors for ImageNet.

    Args:
        alpha: weight of each feature of the same class.
        beta: weight of the class's centre.
        gamma: factor of the features in the denominator.
        temperature: divides the products of features.
        queue: features kept of earlier batches.
        dim: width of a feature.
        momentum: of the key encoder, which follows the query encoder after each step.

    Raises:
        ValueError: a value out of its range.

    Source:
        Cui et al., Parametric Contrastive Learning, ICCV 2021.
    """

    alpha: float = 0.01
    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 0.05
    queue: int = 1024
    dim: int = 32
    momentum: float = 0.999

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("alpha", 0 <= self.alpha < float("inf"), "finite and at least 0"),
            ("beta", 0 < self.beta < float("inf"), "finite and above 0"),
            ("gamma", 0 <= self.gamma < float("inf"), "finite and at least 0"),
            ("temperature", 0 < self.temperature < float("inf"), "finite and above 0"),
            ("queue", type(self.queue) is int and self.queue >= 0, "a whole number of at least 0"),
            ("dim", type(self.dim) is int and self.dim >= 1, "a whole number of at least 1"),
            ("momentum", 0 <= self.momentum <= 1, "from 0 to 1"),
        ):
            if not good:
                raise ValueError(f"PaCoConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PaCoConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        if unknown := sorted(set(data) - set(cls.__dataclass_fields__)):
            raise ValueError(
                f"PaCoConfig: unknown key {unknown[0]!r}; known are {', '.join(cls.__dataclass_fields__)}."
            )
        return cls(**data)


class PaCoLoss(nn.Module):
    r"""Contrast of a feature with all class centres and all other features.

    Candidates of anchor i are the C centres, with logits :math:`z_{ic} + \log \pi_c`, and the other features,
    with :math:`q_i \cdot f_j / T`. With :math:`P_i` the other features of its class

    .. math::
        l_i = -\frac{\beta \log P(y_i) + \alpha \sum_{j \in P_i} \log P(j)}{\beta + \alpha |P_i|}

    where P is a softmax over the candidates, in whose denominator the features are multiplied by gamma.

    Args:
        class_counts: training images of each class, whose shares are the prior.
        config: alpha, beta, gamma and the temperature.

    Raises:
        ValueError: bad counts, or a class without images.

    Source:
        Cui et al., Parametric Contrastive Learning, ICCV 2021, released code.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Counts, config: PaCoConfig | None = None) -> None:
        super().__init__()
        self.config = config or PaCoConfig()
        n = checked_counts(class_counts, "PaCoLoss", "error")
        self.register_buffer("log_prior", (n / n.sum()).log(), persistent=False)

    def forward(self, logits: Tensor, query: Tensor, others: Tensor, labels: Tensor, of: Tensor) -> Tensor:
        """The mean of :math:`l_i`, a scalar, float32 or wider.

        Args:
            logits: of the query view, [B, C].
            query: features of the query view, of length 1, [B, D]. They are candidates of one another.
            others: further features, of length 1, [M, D]: of the key view, and the queue.
            labels: int64 [B] of logits and query.
            of: int64 [M] of others; a negative one marks a feature that is no candidate.
        """
        # Divided by the temperature, 16-bit products would have an error of a tenth.
        with torch.autocast(logits.device.type, enabled=False):
            return self._mean(logits, query, others, labels, of)

    def _mean(self, logits: Tensor, query: Tensor, others: Tensor, labels: Tensor, of: Tensor) -> Tensor:
        c = self.config
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = torch.arange(len(labels), device=labels.device)
        centres = logits.to(wide) + self.log_prior.to(logits.device, wide)  # [B, C]
        features = torch.cat((query, others)).to(wide)
        products = query.to(wide) @ features.T / c.temperature  # [B, B + M]
        theirs = torch.cat((labels, of))
        candidate = (theirs >= 0).repeat(len(labels), 1)
        candidate[rows, rows] = False
        denominator = centres.logsumexp(1)
        if c.gamma:
            scaled = products.masked_fill(~candidate, -torch.inf) + torch.tensor(c.gamma, dtype=wide).log()
            denominator = torch.cat((centres, scaled), 1).logsumexp(1)
        positive = (labels[:, None] == theirs) & candidate
        total = c.beta * (centres[rows, labels] - denominator)
        total = total + c.alpha * ((products - denominator[:, None]) * positive).sum(1)
        losses = -(total / (c.beta + c.alpha * positive.sum(1, dtype=wide)))
        return losses.sum() / max(1, len(labels))


class PaCo(nn.Module):
    """Trains a classifier by :class:`PaCoLoss`, with a key encoder that follows and a queue of its features.

    The encoder's own linear classifier holds the learned centres, so :meth:`teacher` is the encoder itself.
    The features that are contrasted come from its pooled ones by a layer, a ReLU and a layer.

    Args:
        encoder: a timm model with a linear classifier over all classes.
        class_counts: training images of each class.
        config: all settings at once.
        settings: fields of :class:`PaCoConfig`, in place of ``config``.

    Raises:
        ValueError: the classifier is not linear or has other classes; a bad setting.
        TypeError: both ``config`` and single settings.

    Call :meth:`advance` once after each optimizer step. It stands apart from the forward pass because SAM
    makes two of these in a step. Under DistributedDataParallel, keys of all processes go in every queue; call
    it on the inner module. Before the queue is full, its free places are no candidates (our choice; the
    released code begins with noise).

    Example:
        >>> paco = PaCo(timm.create_model("resnet32_cifar", num_classes=100), counts)
        >>> paco(query_views, key_views, labels).backward()
        >>> optimizer.step()
        >>> paco.advance()
        >>> vf.save(paco.teacher(), "teacher.safetensors")
    """

    queue: Tensor
    queue_labels: Tensor
    place: Tensor

    def __init__(
        self, encoder: nn.Module, class_counts: Counts, config: PaCoConfig | None = None, **settings: Any
    ) -> None:
        super().__init__()
        if config is not None and settings:
            raise TypeError("PaCo: give either `config` or single settings, got both.")
        self.config = c = config or PaCoConfig(**settings)
        net: Any = encoder
        centres = net.get_classifier()
        if not isinstance(centres, nn.Linear) or centres.out_features != len(class_counts):
            got = f"{type(centres).__name__} of {getattr(centres, 'out_features', '?')}"
            raise ValueError(
                f"PaCo: `encoder` must have a Linear classifier of {len(class_counts)} classes, got {got}."
            )
        width = centres.in_features
        self.encoder = encoder
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, c.dim))
        key_encoder: Any = copy.deepcopy(encoder)
        key_encoder.reset_classifier(0)
        self.key_encoder = key_encoder.requires_grad_(False)
        self.key_mlp = copy.deepcopy(self.mlp).requires_grad_(False)
        self.loss = PaCoLoss(class_counts, c)
        self.register_buffer("queue", torch.zeros(c.queue, c.dim))
        self.register_buffer("queue_labels", torch.full((c.queue,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self._latest: tuple[Tensor, Tensor] | None = None

    def forward(self, query_images: Tensor, key_images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            query_images: one view of the images, [B, C, H, W].
            key_images: another view of the same images.
            labels: int64 [B].
        """
        net: Any = self.encoder
        pooled = net.forward_head(net.forward_features(query_images), pre_logits=True)
        logits = net.get_classifier()(pooled)
        query = F.normalize(self.mlp(pooled), dim=1)
        with torch.no_grad():
            follower: Any = self.key_encoder
            pooled = follower.forward_head(follower.forward_features(key_images), pre_logits=True)
            keys = F.normalize(self.key_mlp(pooled), dim=1)
        self._latest = (keys, labels)
        others = torch.cat((keys, self.queue.to(keys.dtype)))
        found: Tensor = self.loss(logits, query, others, labels, torch.cat((labels, self.queue_labels)))
        return found

    @torch.no_grad()
    def advance(self) -> None:
        """Put the keys of the latest batch in the queue, and let the key encoder follow: once a step.

        Raises:
            RuntimeError: there was no batch since the last time.
        """
        if self._latest is None:
            raise RuntimeError("PaCo: advance() must come after a forward pass, once a step.")
        keys, labels = (_gathered(part) for part in self._latest)
        self._latest = None
        if size := self.config.queue:
            keys, labels = keys[-size:], labels[-size:]
            places = (self.place + torch.arange(len(labels), device=labels.device)) % size
            self.queue[places] = keys.to(self.queue.dtype)
            self.queue_labels[places] = labels
            self.place.add_(len(labels)).remainder_(size)
        for leader, follower in ((self.encoder, self.key_encoder), (self.mlp, self.key_mlp)):
            ahead = dict(leader.named_parameters())
            mine = dict(follower.named_parameters())
            torch._foreach_lerp_(
                list(mine.values()), [ahead[name] for name in mine], 1 - self.config.momentum
            )

    def teacher(self) -> nn.Module:
        """A copy of encoder and classifier in eval mode, whose logits are without the prior.

        It is an ordinary model for :class:`TeacherPipeline` and :func:`pyvitfast.save`.
        """
        return copy.deepcopy(self.encoder).eval()


def _gathered(part: Tensor) -> Tensor:
    """``part`` of all processes, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)
