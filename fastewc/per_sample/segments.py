"""One use of a parameter in one backward pass, and how its per-sample gradients are reduced without being stored.

A parameter's per-sample gradient is the sum over its uses, so |·|^p comes after all of them: uses of one kind go
through one kernel call, mixed ones through explicit gradients of a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from fastewc._dispatch import Impl
from fastewc.ops.sum_grad_power import ScaleUse, add_conv_grad_power, add_scale_grad_power, add_sum_grad_power
from fastewc.per_sample.layout import Layout

#: Numbers of explicit per-sample gradients that are in memory at a time, where they are formed at all.
EXPLICIT = 1 << 24


class Segment:
    """A use's share of the per-sample gradients, [N, *shape] of the operand, not formed."""

    samples: int

    @property
    def double(self) -> bool:
        """True if its gradients are float64; all others are summed in float32."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """The explicit gradients of some samples, [stop − start, *shape], at least float32."""
        raise NotImplementedError

    def joins(self, other: Segment) -> bool:
        """True if :meth:`add_together` takes both."""
        return False

    def add_together(self, total: Tensor, segments: Sequence[Any], power: int, impl: Impl) -> None:
        """``total`` += Σ_n |Σ over segments|^power; ``segments`` are of this kind and begin with this one."""
        add_explicitly(total, segments, power)


def wide(tensor: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass
class Outer(Segment):
    """Σ_t g_nto a_nti of a weight that is [O, I] once the first dimensions of its shape and the last are flattened."""

    a_NTI: Tensor
    g_NTO: Tensor
    shape: tuple[int, ...] = ()  # [O, I] if it is empty

    def __post_init__(self) -> None:
        self.a_NTI = self.a_NTI.to(self.g_NTO.dtype)  # as autocast casts it for the op
        self.samples = self.g_NTO.shape[0]

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.g_NTO.dtype == torch.float64

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, O, I]."""
        rows = torch.bmm(wide(self.g_NTO[start:stop]).mT, wide(self.a_NTI[start:stop]))
        return rows.reshape(-1, *self.shape) if self.shape else rows

    def turned(self) -> Outer:
        """The same for the transposed matrix."""
        return Outer(self.g_NTO, self.a_NTI)

    def joins(self, other: Segment) -> bool:
        """Any number of them, of one dtype."""
        return (
            isinstance(other, Outer)
            and other.g_NTO.dtype == self.g_NTO.dtype
            and other.g_NTO.shape[-1] == self.g_NTO.shape[-1]
        )

    def add_together(self, total: Tensor, segments: Sequence[Outer], power: int, impl: Impl) -> None:
        """One kernel call: they are summed over T together."""
        pairs = [(one.a_NTI, one.g_NTO) for one in segments]
        if self.shape:
            matrix = total.new_zeros(self.g_NTO.shape[-1], self.a_NTI.shape[-1])  # total may not flatten to a view
            add_sum_grad_power(matrix, pairs, power, impl)
            total.add_(matrix.reshape(self.shape))
        else:
            add_sum_grad_power(total, pairs, power, impl)


@dataclass
class Conv(Segment):
    """The weight [O, C/groups, *kernel] of a convolution of x [N, C, *spatial], g [N, O, *out]; pairs add up."""

    pairs: list[tuple[Tensor, Tensor]]
    shape: tuple[int, ...]
    geometry: dict[str, Any]  # stride, padding, dilation: tuples; groups

    def __post_init__(self) -> None:
        self.pairs = [(x.to(g.dtype), g) for x, g in self.pairs]
        self.samples = self.pairs[0][1].shape[0]

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.pairs[0][1].dtype == torch.float64

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, O, C/groups, *kernel]."""
        one: Callable[..., Tensor] = (conv1d_weight, conv2d_weight, conv3d_weight)[len(self.shape) - 3]
        rows = []
        for n in range(start, stop):
            parts = [one(wide(x[n : n + 1]), self.shape, wide(g[n : n + 1]), **self.geometry) for x, g in self.pairs]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)

    def joins(self, other: Segment) -> bool:
        """Of one geometry."""
        return (
            isinstance(other, Conv)
            and other.geometry == self.geometry
            and other.pairs[0][1].dtype == self.pairs[0][1].dtype
        )

    def add_together(self, total: Tensor, segments: Sequence[Conv], power: int, impl: Impl) -> None:
        """One kernel call."""
        pairs = [pair for one in segments for pair in one.pairs]
        add_conv_grad_power(total, pairs, power, **self.geometry, impl=impl)


@dataclass
class Scale(Segment):
    """What was multiplied with x̂, or added to something, and broadcast: biases, scales, tables of positions.

    g is [N, ...]; the rest, where it is there, is as large, or broadcasts to it: x̂ = (x − shift) factor.
    """

    g: Tensor
    shape: tuple[int, ...]
    x: Tensor | None = None
    shift: Tensor | None = None
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        self.samples = self.g.shape[0]
        if self.x is not None:
            self.x = self.x.to(self.g.dtype).expand(self.g.shape)
        arithmetic = torch.float64 if self.double else torch.float32
        self.shift = None if self.shift is None else self.shift.to(arithmetic)
        self.factor = None if self.factor is None else self.factor.to(arithmetic)

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.g.dtype == torch.float64

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, *shape]."""
        product = wide(self.g[start:stop])
        if self.x is not None:
            x = wide(self.x[start:stop])
            x = x if self.shift is None else x - self.shift.expand(self.g.shape)[start:stop]
            x = x if self.factor is None else x * self.factor.expand(self.g.shape)[start:stop]
            product = product * x
        return product.sum_to_size((len(product), *self._in_front(), *self.shape)).reshape(len(product), *self.shape)

    def _in_front(self) -> tuple[int, ...]:
        """1 for every dimension of g that the shape lacks."""
        return (1,) * (self.g.ndim - 1 - len(self.shape))

    def joins(self, other: Segment) -> bool:
        """Any number of them, of one dtype."""
        return isinstance(other, Scale) and other.g.dtype == self.g.dtype

    def add_together(self, total: Tensor, segments: Sequence[Scale], power: int, impl: Impl) -> None:
        """One kernel call."""
        uses = [ScaleUse(one.g, one.x, one.shift, one.factor) for one in segments]
        add_scale_grad_power(total, uses, power, impl)


@dataclass
class Rows(Segment):
    """The table [V, E] of an embedding: g [N, T, E] at rows ids [N, T]; a negative id has no row."""

    ids: Tensor
    g_NTE: Tensor
    entries: int

    def __post_init__(self) -> None:
        self.samples = self.ids.shape[0]

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.g_NTE.dtype == torch.float64

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, V, E]."""
        ids, g = self.ids[start:stop], wide(self.g_NTE[start:stop])
        found = g.new_zeros(stop - start, self.entries + 1, g.shape[-1])
        found.scatter_add_(1, ids.where(ids >= 0, self.entries).unsqueeze(-1).expand_as(g), g)
        return found[:, :-1]

    def joins(self, other: Segment) -> bool:
        """Any number of them."""
        return isinstance(other, Rows)

    def add_together(self, total: Tensor, segments: Sequence[Rows], power: int, impl: Impl) -> None:
        """Each sample's sums over equal ids, then those over the samples."""
        pairs, summed = self.summed(segments)
        self.spread(total, pairs, powers(summed, power))

    def summed(self, segments: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        """([U], [U, E]): sample · V + id of every row that a sample touches, ascending, and its gradient."""
        ids, g = torch.cat([one.ids for one in segments], 1), torch.cat([one.g_NTE for one in segments], 1)
        sample = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        real = ids >= 0
        pairs, place = torch.unique((sample * self.entries + ids)[real], return_inverse=True)
        return pairs, segment_sums(wide(g[real]), place, len(pairs))

    def spread(self, total: Tensor, pairs: Tensor, values: Tensor) -> Tensor:
        """Add values [U, E] to the rows that ``pairs`` name; returns these rows."""
        found: tuple[Tensor, Tensor] = torch.unique(pairs % self.entries, return_inverse=True)
        rows, place = found
        total[rows] += segment_sums(values, place, len(rows))
        return rows


def add_tied(total: Tensor, outers: Sequence[Outer], rows: Sequence[Rows], power: int, impl: Impl) -> None:
    """``total`` [V, E] += Σ_n |D_n + S_n|^power, D_n of a dense head and S_n of an embedding with the same table.

    Σ_n φ(D_n) as if there were no embedding, and φ(D + S) − φ(D) for the rows that a sample touches: nothing of size
    N·V·E.
    """
    outers[0].add_together(total, outers, power, impl)
    pairs, embedded = rows[0].summed(rows)
    samples, entries = rows[0].samples, rows[0].entries
    sample, row = pairs // entries, pairs % entries
    counts = torch.bincount(sample, minlength=samples)
    place = torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[sample]
    touched = row.new_zeros(samples, int(counts.max()) if len(pairs) else 0)
    touched[sample, place] = row
    dense = torch.zeros_like(embedded)
    for one in outers:
        T = one.g_NTO.shape[1]
        step = max(1, EXPLICIT // max(1, T * touched.shape[1]))
        for start in range(0, samples, step):
            some = slice(start, start + step)
            g_NTU = one.g_NTO[some].gather(2, touched[some].unsqueeze(1).expand(-1, T, -1))
            found = torch.bmm(wide(g_NTU).mT, wide(one.a_NTI[some]))
            here = (sample >= start) & (sample < start + step)
            dense[here] += found[sample[here] - start, place[here]]
    changed = rows[0].spread(total, pairs, powers(dense + embedded, power) - powers(dense, power))
    total[changed] = total[changed].clamp_min(0)  # where D + S is about 0, roundings of φ(D) remain


def segment_sums(values: Tensor, place: Tensor, count: int) -> Tensor:
    """[count, ...]: sums of the values [K, ...] that share a place [K], in the order of K: the same bits every time."""
    found = values.new_zeros(count, *values.shape[1:])
    if values.is_cuda:  # index_add_ adds there in any order
        order = torch.argsort(place, stable=True)
        lengths = torch.bincount(place, minlength=count)
        return torch.segment_reduce(values[order], "sum", lengths=lengths, axis=0)
    return found.index_add_(0, place, values)


@dataclass
class Reran(Segment):
    """Any op: differentiated by autograd once per sample, with the gradients of all other samples set to 0."""

    run: Callable[[], tuple[Tensor, Tensor]]  # the op anew: its result with a graph, and the leaf that is asked for
    g: Tensor
    layout: Layout
    samples: int

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.g.dtype == torch.float64

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, *shape]."""
        with torch.enable_grad():
            result, leaf = self.run()
        found = []
        for n in range(start, stop):
            alone = torch.zeros_like(self.g, memory_format=torch.contiguous_format)
            self.layout.split(alone, self.samples)[n] = self.layout.split(self.g, self.samples)[n]
            (gradient,) = torch.autograd.grad(
                result, leaf, alone, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(wide(gradient))
        return torch.stack(found)


@dataclass
class Wrapped(Segment):
    """What is made of another segment's gradients."""

    inner: Segment

    def __post_init__(self) -> None:
        self.samples = self.inner.samples

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.inner.double


@dataclass
class Pulled(Wrapped):
    """Of something that arithmetic made of a parameter: the gradients at it, pulled back to the parameter."""

    value: Tensor
    leaf: Tensor

    @property
    def double(self) -> bool:
        """By its gradients."""
        return self.leaf.dtype == torch.float64

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, *shape of the parameter]."""
        rows = self.inner.rows(start, stop).to(self.value.dtype)
        together = back_together(self.value, [torch.autograd.graph.get_gradient_edge(self.leaf)], rows)
        if together is not None:
            return wide(together[0])
        found = []
        for row in rows:
            (gradient,) = torch.autograd.grad(
                self.value, self.leaf, row, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(wide(gradient))
        return torch.stack(found)


def back_together(
    value: Tensor, edges: Sequence[torch.autograd.graph.GradientEdge], rows: Tensor
) -> Sequence[Tensor] | None:
    """Gradients [n, ...] at ``value``, taken back to the edges for all n at once.

    None if a function on the way can't do that: its backward looks at values.
    """
    try:
        return torch.autograd.grad(
            value, edges, rows.to(value.dtype), retain_graph=True, allow_unused=True, materialize_grads=True,
            is_grads_batched=True,
        )  # fmt: skip
    except RuntimeError:
        return None


@dataclass
class Sloped(Wrapped):
    """The gradients at a function of each entry of a parameter, as gradients of the parameter."""

    slope: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, *shape]."""
        return self.inner.rows(start, stop) * self.slope


@dataclass
class Within(Wrapped):
    """The gradients at a part of a parameter, as gradients of all of it."""

    view: Callable[[Tensor], Tensor]
    like: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """[n, *shape of the parameter], zeros elsewhere."""
        found = []
        for row in self.inner.rows(start, stop):
            # Strides as the parameter's: the view may flatten what of other strides would be copied.
            whole = torch.zeros_like(self.like, dtype=row.dtype)
            self.view(whole).copy_(row)
            found.append(whole)
        return torch.stack(found)


def powers(values: Tensor, power: int) -> Tensor:
    """|values|^power."""
    return values.abs() if power == 1 else values.square()


def add_explicitly(total: Tensor, segments: Sequence[Segment], power: int) -> None:
    """``total`` += Σ_n |Σ over segments|^power from explicit gradients of a few samples at a time."""
    samples = segments[0].samples
    step = max(1, EXPLICIT // max(1, total.numel()))
    for start in range(0, samples, step):
        stop = min(samples, start + step)
        rows = segments[0].rows(start, stop)
        for segment in segments[1:]:
            rows = rows + segment.rows(start, stop)
        total.add_(powers(rows, power).sum(0).to(total.dtype))
