"""Parameter shapes of the models whose steps are timed, in the order of their parameters()."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

Shape = tuple[int, ...]


def mlp() -> Iterator[Shape]:
    """784-300-150-10, the fully connected network of Kutalev & Lapina (arXiv 2109.10021)."""
    for inputs, outputs in pairwise((784, 300, 150, 10)):
        yield from ((outputs, inputs), (outputs,))


def resnet18() -> Iterator[Shape]:
    """torchvision's, for ImageNet: 62 tensors."""
    yield from ((64, 3, 7, 7), (64,), (64,))
    width = 64
    for planes in (64, 128, 256, 512):
        for inputs in (width, planes):
            yield from ((planes, inputs, 3, 3), (planes,), (planes,), (planes, planes, 3, 3), (planes,), (planes,))
            if inputs != planes:
                yield from ((planes, inputs, 1, 1), (planes,), (planes,))
        width = planes
    yield from ((1000, 512), (1000,))


def gpt2(width: int = 768, blocks: int = 12, words: int = 50257, positions: int = 1024) -> Iterator[Shape]:
    """GPT-2, its head tied to its embedding; by default the small one: 148 tensors."""
    yield from ((words, width), (positions, width))
    for _ in range(blocks):
        yield from ((width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from ((width,), (width,))


#: 0.28, 11.7 and 124 million parameters.
MODELS: dict[str, list[Shape]] = {"mlp": list(mlp()), "resnet18": list(resnet18()), "gpt2": list(gpt2())}
