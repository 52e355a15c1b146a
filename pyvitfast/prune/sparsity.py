"""Fine-grained N:M sparsity of linear layers, 2:4 as sparse tensor cores want it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyvitfast.models.modules import unwrap

_TILE = 16


@dataclass(frozen=True, eq=False)
class SparsityReport:
    """What :func:`sparsify` did.

    Args:
        pattern: entries kept, of how many consecutive ones.
        matched: names of the layers made sparse.
        skipped: why the other linear layers were not, by name.
        masks: what is kept, bool, by name and in the shape of the parameter.
        params_before: parameters of the whole model.
        params_after: those without the masked ones.
        weights_before: parameters in the weights of the matched layers.
        weights_after: those without the masked ones; half with 2:4.
        semi_structured: by name of a matched layer, an empty text where its weight is stored compressed,
            or why it stays dense with zeros. Empty unless that was asked for.
    """

    pattern: tuple[int, int]
    matched: tuple[str, ...]
    skipped: Mapping[str, str]
    masks: Mapping[str, Tensor]
    params_before: int
    params_after: int
    weights_before: int
    weights_after: int
    semi_structured: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Fraction of the matched weights that is kept."""
        return self.weights_after / self.weights_before

    def to_dict(self) -> dict[str, Any]:
        """All but the masks, as plain data that JSON can hold."""
        return {
            "pattern": list(self.pattern),
            "matched": list(self.matched),
            "skipped": dict(self.skipped),
            "kept": self.kept,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "weights_before": self.weights_before,
            "weights_after": self.weights_after,
            "semi_structured": dict(self.semi_structured),
        }

    def __str__(self) -> str:
        n, m = self.pattern
        lines = [
            f"{n}:{m} sparsity in {len(self.matched)} linear layers: {self.weights_after:,} of "
            f"{self.weights_before:,} weights kept, {self.params_after:,} of {self.params_before:,} "
            "parameters of the model"
        ]
        lines += [f"  {name} skipped: {reason}" for name, reason in self.skipped.items()]
        dense = {name: reason for name, reason in self.semi_structured.items() if reason}
        if compressed := len(self.semi_structured) - len(dense):
            lines.append(f"  {compressed} weights stored compressed")
        lines += [f"  {name} stays dense with zeros: {reason}" for name, reason in dense.items()]
        return "\n".join(lines)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, str]]:
    """Each linear layer with its name and why it cannot be sparse, an empty text if it can."""
    for name, module in unwrap(model).named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight, reason = module.weight, ""
        if type(weight.data) is not Tensor:
            reason = f"its weight is a {type(weight.data).__name__}"
        elif any(size % _TILE or not size for size in weight.shape):
            reason = f"{'x'.join(map(str, weight.shape))} are not both multiples of {_TILE}"
        yield name, module, reason


def sparse_layers(model: nn.Module) -> list[str]:
    """Names of the layers that :func:`sparsify` would make sparse.

    Raises:
        ValueError: there is none.
    """
    found = list(_linears(model))
    if matched := [name for name, _, reason in found if not reason]:
        return matched
    why = "; ".join(f"{name}: {reason}" for name, _, reason in found[:3]) or "no linear layer at all"
    raise ValueError(
        f"sparsify: `model` must have an nn.Linear whose two dims are multiples of {_TILE}, got {why}."
    )


def magnitude_mask(weight: Tensor, pattern: tuple[int, int] = (2, 4)) -> Tensor:
    """Which entries of ``weight`` [O, I] are among the n largest ``|w|`` of each m consecutive in a row.

    Equal magnitudes go to the lower index. Returns bool [O, I].
    """
    n, m = pattern
    groups = weight.detach().abs().reshape(weight.shape[0], -1, m)  # [O, I / m, m]
    order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)


def sparsify(
    model: nn.Module, pattern: tuple[int, int] = (2, 4), semi_structured: bool = False
) -> tuple[nn.Module, SparsityReport]:
    """Store 0 in all but the n largest of each m consecutive weights along a linear layer's input.

    Taken are all ``nn.Linear`` whose two dims are multiples of 16, as the widths of a model pruned in the
    automatic group sizes are. Doing it twice is doing it once, so a loaded model gets its masks back.

    Args:
        model: changed in place; wrapped by ``torch.compile`` or DistributedDataParallel or not.
        pattern: n and m.
        semi_structured: also store the weights compressed where the device can, for inference only; see
            :func:`to_semi_structured`.

    Returns:
        The model and what was done. ``apply_masks(model, report.masks)`` after each optimizer step keeps the
        zeros while the model is finetuned.

    Raises:
        ValueError: no layer fits, a weight is NaN, or the pattern is not 1 <= n < m with m = 2, 4, 8 or 16.

    Source:
        NViT (Yang et al., CVPR 2023), Table 1: 2:4 after finetuning, in one shot.
    """
    if len(pattern) != 2 or pattern[1] not in (2, 4, 8, 16) or not 1 <= pattern[0] < pattern[1]:
        raise ValueError(
            f"sparsify: `pattern` must be (n, m) with 1 <= n < m and m one of 2, 4, 8, 16, got {pattern}."
        )
    matched, inner = sparse_layers(model), unwrap(model)
    weights = {f"{name}.weight": inner.get_parameter(f"{name}.weight") for name in matched}
    for name, weight in weights.items():
        if weight.isnan().any():
            raise ValueError(f"sparsify: `model` must hold no NaN, got NaN in {name}.")
    masks = {name: magnitude_mask(weight, pattern) for name, weight in weights.items()}
    apply_masks(model, masks)
    once = {id(weight): weight.numel() for weight in weights.values()}
    before = sum(once.values())
    after = before * pattern[0] // pattern[1]
    params = sum(p.numel() for p in inner.parameters())
    report = SparsityReport(
        pattern=(pattern[0], pattern[1]),
        matched=tuple(matched),
        skipped={name: reason for name, _, reason in _linears(model) if reason},
        masks=masks,
        params_before=params,
        params_after=params - before + after,
        weights_before=before,
        weights_after=after,
        semi_structured=to_semi_structured(model) if semi_structured else {},
    )
    return model, report


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Store 0 in the parameters of ``model`` wherever their mask is false.

    Args:
        model: wrapped or not.
        masks: ``SparsityReport.masks``.

    Raises:
        ValueError: a mask whose name or shape no parameter has.
    """
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        found = list(parameters[name].shape) if name in parameters else None
        if found != list(mask.shape):
            raise ValueError(
                f"apply_masks: `masks` must fit the model's parameters, got {name} {list(mask.shape)} for "
                f"{found}."
            )
    for name, mask in masks.items():
        weight = parameters[name]
        weight.masked_fill_(~mask.to(weight.device), 0)


def _hindrance(weight: Tensor) -> str:
    """Why torch cannot store ``weight`` compressed; an empty text if it can."""
    if weight.device.type != "cuda":
        return f"sparse tensor cores need a CUDA device, got {weight.device.type}"
    if (capability := torch.cuda.get_device_capability(weight.device)) < (8, 0):
        return f"sparse tensor cores need sm_80, got sm_{capability[0]}{capability[1]}"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"the weight must be float16 or bfloat16, got {str(weight.dtype).removeprefix('torch.')}"
    return ""


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Store the 2:4 weights of ``model`` compressed, in place, by ``torch.sparse.to_sparse_semi_structured``.

    For inference: such weights take no gradient, and ``pyvitfast.save`` does not store them. Where the device
    or torch cannot, a weight stays dense with zeros, which computes the same.

    Returns:
        By name of a layer that fits, an empty text, or why its weight stays dense.

    Raises:
        ValueError: no layer fits.
    """
    inner = unwrap(model)
    outcome: dict[str, str] = {}
    for name in sparse_layers(model):
        layer = inner.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        reason = _hindrance(weight)
        # torch compresses whatever it is given and would drop the rest of a group without a word.
        if not reason and (weight.reshape(-1, 4).count_nonzero(dim=-1) > 2).any():
            reason = "it has more than 2 of 4 consecutive weights; sparsify it first"
        if not reason:
            try:
                packed = torch.sparse.to_sparse_semi_structured(weight)
                setattr(layer, "weight", nn.Parameter(packed, requires_grad=False))  # noqa: B010
            except (RuntimeError, NotImplementedError, ValueError) as error:
                reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        outcome[name] = reason
    return outcome
