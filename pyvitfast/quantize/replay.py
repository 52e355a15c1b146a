"""Running the same forward pass several times: random generators, buffers, and backward left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Generators:
    """The states of torch's CPU generator and of that of ``device``, as they are now.

    Python's and NumPy's generators are not among them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Buffers:
    """The buffers of a model, such as running statistics, which further passes must not move.

    Args:
        model: the module.
        everything: hold all values as they are now. Without it call :meth:`hold` after a first pass: those
            that it changed are held.
    """

    def __init__(self, model: nn.Module, everything: bool = False) -> None:
        self._seen = {
            (module, name): (tensor, tensor._version)
            for module in model.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        }
        self._held: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        if everything:
            self._keep(list(self._seen))

    def _keep(self, slots: list[tuple[nn.Module, str]]) -> None:
        for module, name in slots:
            tensor = module._buffers[name]
            if tensor is not None:
                self._held[module, name] = tensor, tensor.clone()
                self._seen[module, name] = tensor, tensor._version

    def _changed(self) -> list[tuple[nn.Module, str]]:
        return [
            (module, name)
            for (module, name), (tensor, version) in self._seen.items()
            if module._buffers.get(name) is not tensor or tensor._version != version
        ]

    def hold(self) -> None:
        """Hold the present values of all buffers that changed since this was made."""
        self._keep(self._changed())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the held values back where something changed them."""
        for module, name in self._changed():
            if (module, name) in self._held:
                tensor, value = self._held[module, name]
                module._buffers[name] = tensor
                tensor.copy_(value)
                self._seen[module, name] = tensor, tensor._version


@contextmanager
def backward_calls(run: bool) -> Iterator[list[None]]:
    """A list that gets one entry for each ``Tensor.backward`` inside; without ``run`` they do nothing."""
    calls: list[None] = []
    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        if run:
            original(*args, **kwargs)

    torch.autograd.backward = backward
    try:
        yield calls
    finally:
        torch.autograd.backward = original
