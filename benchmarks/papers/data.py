"""The data sets of the small-scale reproductions: digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

PACKAGED = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Images:
    """Images to train on and to test on, [N, 1, H, W] with mean 0 and deviation 1."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order."""
        for index in torch.randperm(len(self.train_y), generator=generator).split(size):
            yield self.train_x[index], self.train_y[index]

    def held_out(self, count: int) -> Images:
        """The training images alone, the last ``count`` of them to test on: what settings are tuned with."""
        x, y = self.train_x, self.train_y
        return Images(x[:-count], y[:-count], x[-count:], y[-count:])


def digits(seed: int, folder: Path) -> Images:
    """1300 images to train on and 497 to test on, split anew by each seed."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    x = (x - x.mean()) / x.std()
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1300], order[1300:]
    return Images(x[train], y[train], x[test], y[test])


def read_idx(file: Path) -> Tensor:
    """A gzipped idx file of unsigned bytes: 0, 0, type 8, number of axes, sizes as big-endian int32, data."""
    raw = gzip.decompress(file.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file}: not an idx file of unsigned bytes")
    axes = raw[3]
    shape = struct.unpack_from(f">{axes}I", raw, 4)
    start = 4 + 4 * axes
    if len(raw) != start + math.prod(shape):
        raise ValueError(f"{file}: {len(raw) - start} bytes of data, but its shape is {list(shape)}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(shape)


def fashion_files(folder: Path) -> Path:
    """Where the four files lie; they are downloaded if need be."""
    raw = folder / "FashionMNIST" / "raw"
    for found in (PACKAGED, folder, raw):
        if (found / "train-images-idx3-ubyte.gz").exists():
            return found
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
    except Exception as error:
        raise SystemExit(
            f"Fashion-MNIST: not in {PACKAGED} (Debian: dataset-fashion-mnist) nor in {folder}, and the "
            f"download failed ({type(error).__name__}: {error}). Use --data digits or --data-dir."
        ) from None
    return raw


def fashion(seed: int, folder: Path) -> Images:
    """5000 of the training images, drawn by the seed, and the first 5000 test images."""
    files = fashion_files(folder)
    x, y = read_idx(files / "train-images-idx3-ubyte.gz"), read_idx(files / "train-labels-idx1-ubyte.gz")
    test_x, test_y = (
        read_idx(files / "t10k-images-idx3-ubyte.gz"),
        read_idx(files / "t10k-labels-idx1-ubyte.gz"),
    )
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:5000]
    x, test_x = x[chosen].float().unsqueeze(1), test_x[:5000].float().unsqueeze(1)
    mean, deviation = x.mean(), x.std()
    return Images((x - mean) / deviation, y[chosen].long(), (test_x - mean) / deviation, test_y[:5000].long())


LOADERS: dict[str, Callable[[int, Path], Images]] = {"digits": digits, "fashion-mnist": fashion}
