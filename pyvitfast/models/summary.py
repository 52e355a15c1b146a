"""Parameters, multiply-accumulates, widths and latency of a model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyvitfast.models.architecture import Config, config_of
from pyvitfast.models.clock import seconds_of
from pyvitfast.models.modules import unwrap
from pyvitfast.models.vision_transformer import BlockDims


@dataclass(frozen=True)
class ModelSummary:
    """What :func:`summary` found.

    Args:
        name: class of the model.
        input_size: channels, height, width.
        params: number of parameters.
        macs: multiply-accumulates of one image.
        latency: median milliseconds of one forward pass of ``batch_size`` images, or None.
        batch_size: images in a timed pass.
        embed_dims: width of the residual stream, by stage; empty for models that are not Vision Transformers.
        blocks: widths of each block; empty for models that are not Vision Transformers.
    """

    name: str
    input_size: tuple[int, int, int]
    params: int
    macs: int
    latency: float | None
    batch_size: int
    embed_dims: tuple[int, ...]
    blocks: tuple[BlockDims, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}, input {'x'.join(map(str, self.input_size))}"]
        lines += [f"  parameters {self.params:>16,}", f"  MACs/image {self.macs:>16,}"]
        if self.latency is not None:
            lines.append(f"  latency    {self.latency:>13.3f} ms (median, batch {self.batch_size})")
        if self.blocks:
            lines += [
                f"  embed_dim  {', '.join(map(str, self.embed_dims)):>16}",
                "  block  heads  qk_dim  v_dim    mlp",
            ]
            lines += [
                f"  {i:>5}  {b.heads:>5}  {b.qk_dim:>6}  {b.v_dim:>5}  {b.mlp:>5}"
                for i, b in enumerate(self.blocks)
            ]
        return "\n".join(lines)


def _median_latency(model: nn.Module, batch: torch.Tensor, repeats: int) -> float:
    times = [seconds_of(lambda: model(batch), batch.device) for _ in range(repeats + 3)]
    return statistics.median(times[3:]) * 1e3  # the first passes fill caches and choose kernels


def summary(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    latency: bool = False,
    batch_size: int = 1,
    *,
    repeats: int = 20,
) -> ModelSummary:
    """Count a model and, on request, time it.

    Vision Transformers that we know are counted by formula; any other model by running torch's FLOP counter
    once.

    Args:
        model: a model of ours or timm's.
        input_size: channels, height, width; by default what the model was built for.
        latency: time ``repeats`` forward passes on the model's device, in eval mode, without gradients.
        batch_size: images in a timed pass.
        repeats: timed passes, after 3 warm-up passes; the median is reported.

    Raises:
        ValueError: ``input_size`` is not given and not known, or ``batch_size`` or ``repeats`` is below 1.
    """
    if batch_size < 1 or repeats < 1:
        raise ValueError(
            f"summary: `batch_size` and `repeats` must be at least 1, got {batch_size} and {repeats}."
        )
    inner = unwrap(model)
    try:
        config: Config | None = config_of(inner)
    except (TypeError, NotImplementedError):
        config = None
    if input_size is None:
        if config is not None:
            input_size = (config.in_chans, *config.img_size)
        elif known := (getattr(inner, "pretrained_cfg", None) or {}).get("input_size"):
            input_size = tuple(known)
        else:
            raise ValueError(
                "summary: `input_size` must be given as (channels, height, width) for "
                f"{type(inner).__name__}."
            )
    elif len(input_size) != 3:
        raise ValueError(f"summary: `input_size` must be (channels, height, width), got {input_size}.")
    parameter = next(inner.parameters(), torch.empty(0))
    batch = torch.zeros(batch_size, *input_size, device=parameter.device, dtype=parameter.dtype)
    training = inner.training
    milliseconds = None
    try:
        model.eval()
        with torch.no_grad():
            if config is not None:
                macs = config.macs(input_size[1:])
            else:
                # The counter knows attention on the CPU only as its separate products.
                with (
                    sdpa_kernel(SDPBackend.MATH),
                    FlopCounterMode(display=False) as counter,
                ):
                    inner(batch[:1])
                macs = counter.get_total_flops() // 2
            if latency:
                milliseconds = _median_latency(model, batch, repeats)
    finally:
        model.train(training)
    return ModelSummary(
        name=type(inner).__name__,
        input_size=input_size,
        params=sum(p.numel() for p in inner.parameters()),
        macs=macs,
        latency=milliseconds,
        batch_size=batch_size,
        embed_dims=() if config is None else config.dims.embed_dims,
        blocks=() if config is None else config.dims.blocks,
    )
