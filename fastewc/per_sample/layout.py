"""Where the samples are in a tensor: which dimension counts them, alone or merged with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples along ``dim``.

    merged: "no": the dimension's size is N. "major": N·k, sample by sample (windows, tokens of ``x.view(-1, E)``).
    "minor": k·N, all samples of the first position first (time-major tensors, flattened).
    """

    dim: int
    merged: Literal["no", "major", "minor"] = "no"

    def fits(self, shape: Sequence[int], samples: int) -> bool:
        """True if a tensor of this shape can hold so many samples this way."""
        if self.dim >= len(shape):
            return False
        size = shape[self.dim]
        return size == samples if self.merged == "no" else size > 0 and size % samples == 0

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """[N, *shape], with dimension ``dim`` of the shape cut to one sample's part of it (1 where it is alone).

        A view where strides allow it, and always one of the same memory for "no".
        """
        if self.merged == "no":
            return tensor.unsqueeze(0).transpose(0, self.dim + 1)
        before, size, after = tensor.shape[: self.dim], tensor.shape[self.dim], tensor.shape[self.dim + 1 :]
        if self.merged == "major":
            return tensor.reshape(*before, samples, size // samples, *after).movedim(self.dim, 0)
        return tensor.reshape(*before, size // samples, samples, *after).movedim(self.dim + 1, 0)

    def moved(self, dim: int) -> Layout:
        """The same samples along another dimension, of a transposed tensor."""
        return Layout(dim, self.merged)


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """True if a tensor of one shape can be expanded to the other."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


class Unclear(Exception):
    """The shapes (or values) do not tell where the samples are; the text says why, for the report."""


def layout_of(alone: Sequence[int], together: Sequence[int]) -> Layout | None:
    """Where a tensor has its samples, from its shapes in a run of one sample and in a run of two; None: nowhere.

    A dimension of samples and something else is reported as "major"; :func:`confirmed` finds out by values.

    Raises:
        Unclear: several dimensions grow with the samples, or one grows in another proportion.
    """
    if len(alone) != len(together):
        raise Unclear("the number of dimensions of a tensor depends on the number of samples")
    growing = [dim for dim, (one, two) in enumerate(zip(alone, together, strict=True)) if one != two]
    if not growing:
        return None
    if len(growing) > 1:
        raise Unclear("several dimensions of a tensor grow with the number of samples")
    (dim,) = growing
    if together[dim] != 2 * alone[dim]:
        raise Unclear("a dimension of a tensor does not grow in proportion to the number of samples")
    return Layout(dim, "no" if alone[dim] == 1 else "major")


def confirmed(layout: Layout, alone: Tensor, together: Tensor, index: int = 0) -> Layout:
    """Which of "major" and "minor" it is: where in the run of two the values of one sample's run are found.

    ``index``: which of the two it is.

    Raises:
        Unclear: in both places (both samples are the same there), or in neither.
    """
    one, two = (_thinned(t.detach(), layout.dim).double().nan_to_num() for t in (alone, together))
    if layout.merged == "no":
        own, other = (float((two.narrow(layout.dim, n, 1) - one).norm()) for n in (index, 1 - index))
        size, rounded = float(one.norm()), 0.05 if alone.dtype.itemsize < 4 else 1e-3  # TF32's, for one
        if own > 0.5 * size or own > max(other, rounded * size):
            raise Unclear("a sample's values are not where the sample should be")
        return layout
    orders: tuple[Literal["major"], Literal["minor"]] = ("major", "minor")
    major, minor = (float((Layout(layout.dim, order).split(two, 2)[index] - one).norm()) for order in orders)
    if not min(major, minor) < 0.05 * max(major, minor):
        raise Unclear("samples share a dimension with something else, and their values do not tell in which order")
    return Layout(layout.dim, "major" if major < minor else "minor")


def _thinned(tensor: Tensor, dim: int) -> Tensor:
    """Some tens of entries, evenly spaced, along every dimension but ``dim``: enough to recognise values by."""
    steps = [1 if d == dim else max(1, size // 32) for d, size in enumerate(tensor.shape)]
    return tensor[tuple(slice(None, None, step) for step in steps)]
