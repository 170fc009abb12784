"""MNIST and its fixed pixel permutations, as tensors in memory.

Shapes: N images, P pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# The permutations belong to the benchmark, not to a run: every run of every row sees the same ten tasks.
PERMUTATION_SEED = 2109_10021


@dataclass(frozen=True)
class Split:
    """Images and labels for training and testing: x [N, P] float32 in 0..1, y [N] int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def permuted(self, pixels: Tensor) -> Split:
        """The same images with their pixels in the order ``pixels`` [P]."""
        return Split(self.train_x[:, pixels], self.train_y, self.test_x[:, pixels], self.test_y)


def load_mnist(data_root: str | Path | None, *, download: bool = False, fashion: bool = False) -> Split:
    """MNIST or FashionMNIST as flat vectors divided by 255, through torchvision.

    Args:
        data_root: the folder that holds (or will hold) ``MNIST/raw``; None: the environment variable FASTEWC_DATA.
        download: fetch the files if they are not there.
        fashion: FashionMNIST, from ``FashionMNIST/raw``.

    Raises:
        ImportError: torchvision is missing; the text names the extra that brings it.
        ValueError: no folder was given.
        RuntimeError: the files are not there and ``download`` is off (raised by torchvision).
    """
    root = data_root or os.environ.get("FASTEWC_DATA")
    if not root:
        raise ValueError("no data folder: give --data-root PATH or set FASTEWC_DATA (and --download to fetch MNIST)")
    try:
        from torchvision.datasets import MNIST, FashionMNIST
    except ImportError as error:
        raise ImportError("this benchmark reads MNIST through torchvision: pip install 'fastewc[bench]'") from error
    kind = FashionMNIST if fashion else MNIST
    train, test = (kind(str(root), train=part, download=download) for part in (True, False))
    return Split(
        train.data.flatten(1).float().div_(255),
        train.targets.long(),
        test.data.flatten(1).float().div_(255),
        test.targets.long(),
    )


def pixel_orders(tasks: int, pixels: int, seed: int) -> list[Tensor]:
    """One pixel order [P] per task: the identity, then ``tasks − 1`` permutations that depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.arange(pixels)] + [torch.randperm(pixels, generator=generator) for _ in range(tasks - 1)]
