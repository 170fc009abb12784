"""Inputs on which every implementation of sum_grad_power is compared with the float64 reference."""

from __future__ import annotations

import math
import zlib
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from fastewc._dispatch import Impl
from fastewc.ops.sum_grad_power import reference
from fastewc.ops.sum_grad_power.api import (
    DTYPES,
    _out_size,
    add_conv_grad_power,
    add_scale_grad_power,
    add_sum_grad_power,
    row_moments,
    sum_grad_power,
)
from fastewc.ops.sum_grad_power.schema import ScaleUse
from fastewc.testing import op_dtype, sum_roundings

Segments = list[tuple[Tensor, Tensor]]
Shape = tuple[int, ...]
_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One input: N samples, T positions (None: a [N, I] and g [N, O]), I inputs, O outputs.

    spread: "normal", or "decades" (magnitudes over 12 decades, so that small sums sit beside large ones).
    """

    N: int
    T: int | None
    I: int
    O: int
    p: Literal[1, 2]
    spread: str = "normal"
    dtypes = DTYPES

    @property
    def id(self) -> str:
        """A name for test output."""
        return f"p{self.p}-N{self.N}-T{self.T}-I{self.I}-O{self.O}-{self.spread}"

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The same a and g in every dtype: drawn in float64, then rounded."""
        generator = _generator(self.id)
        rows = (self.N,) if self.T is None else (self.N, self.T)
        made = []
        for width in (self.I, self.O):
            values = torch.randn(*rows, width, generator=generator, dtype=torch.float64)
            if self.spread == "decades":
                exponent = 6 * torch.rand(width, generator=generator, dtype=torch.float64) - 4
                values = values * 10**exponent
            made.append(values.to(device, dtype))
        return made[0], made[1]

    def run(self, impl: Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The op on this case's inputs."""
        return [sum_grad_power(*self.make_inputs(dtype, device), self.p, impl)]

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        a, g = self._wide(dtype)
        return [reference.sum_grad_power(a, g, self.p)]

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """Σ_n (Σ_t |g a|)^p: the size of the terms before their signs cancel inside a sample."""
        a, g = self._wide(dtype)
        return [reference.sum_grad_power(a.abs(), g.abs(), self.p)]

    @property
    def roundings(self) -> float:
        """p times those of the sum over T (a power multiplies relative errors), and those of the sum over N."""
        return self.p * sum_roundings(self.T or 1) + sum_roundings(self.N)

    def _wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, g = (t.double() for t in self.make_inputs(dtype))
        return (a.unsqueeze(1), g.unsqueeze(1)) if self.T is None else (a, g)


@dataclass(frozen=True)
class _AddCase:
    """What is added to a total that holds numbers already; a subclass makes the segments and names the op.

    total: "contiguous", "transposed" (its dimensions in reverse order in memory) or "gaps" (every other element).
    """

    _: KW_ONLY
    p: Literal[1, 2] = 2
    layout: str = "contiguous"
    total: str = "contiguous"
    dtypes = DTYPES

    @property
    def id(self) -> str:
        """A name for test output: the fields that differ from their defaults."""
        own = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}-" + "-".join(f"{name}{_word(value)}" for name, value in own)

    def _shapes(self) -> list[tuple[Shape, Shape]]:
        """Those of a (or x) and g, for each segment."""
        raise NotImplementedError

    def _weight(self) -> Shape:
        """The shape of the total."""
        raise NotImplementedError

    def _add(self, kernels: Any, total: Tensor, segments: Segments, **chosen: Impl) -> None:
        """The op on these, from the module or class ``kernels``."""
        raise NotImplementedError

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Segments]:
        """The total and the segments, of the same values in every dtype: drawn in float64, then rounded."""
        generator = _generator(self.id)
        total = 4 * torch.rand(self._weight(), generator=generator, dtype=torch.float64)
        segments = [
            [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in pair]
            for pair in self._shapes()
        ]
        placed = [(_laid_out(a.to(device), self.layout), _laid_out(g.to(device), self.layout)) for a, g in segments]
        return _laid_out(total.to(device, op_dtype(dtype)), self.total), placed

    def run(self, impl: Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The total with what the op has added."""
        total, segments = self.make_inputs(dtype, device)
        self._add(_Api, total, segments, impl=impl)
        return [total]

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        total, segments = self.make_inputs(dtype)
        total = total.double()
        self._add(reference, total, [(a.double(), g.double()) for a, g in segments])
        return [total]

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """The total before, and Σ_n (Σ |g a|)^p: the size of the terms before their signs cancel inside a sample."""
        total, segments = self.make_inputs(dtype)
        total = total.double()
        self._add(reference, total, [(a.double().abs(), g.double().abs()) for a, g in segments])
        return [total]

    @property
    def roundings(self) -> float:
        """As :class:`Case`, T over all segments, and the total as one more term of the sum over N."""
        shapes = self._shapes()
        return self.p * sum_roundings(self._positions()) + sum_roundings(shapes[0][0][0] + 1 if shapes else 1)

    def _positions(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class SegmentsCase(_AddCase):
    """Uses of one weight [O, I] by N samples: ``T`` has the positions of each.

    layout: "contiguous", "time_first" (a batch dimension that is not the first in memory), "transposed" (neighbouring
    features far apart) or "expanded" (samples of a, and positions of g, that are one in memory).
    """

    N: int
    T: tuple[int, ...]
    I: int
    O: int

    def _shapes(self) -> list[tuple[Shape, Shape]]:
        return [((self.N, T, self.I), (self.N, T, self.O)) for T in self.T]

    def _weight(self) -> Shape:
        return (self.O, self.I)

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Segments]:
        """As every case's; what "expanded" makes one is one in memory."""
        total, segments = super().make_inputs(dtype, device)
        if self.layout == "expanded":
            segments = [(a[:1].expand_as(a), g[:, :1].expand_as(g)) for a, g in segments]
        return total, segments

    def _add(self, kernels: Any, total: Tensor, segments: Segments, **chosen: Impl) -> None:
        kernels.add_sum_grad_power(total, segments, self.p, **chosen)

    def _positions(self) -> int:
        return sum(self.T)


@dataclass(frozen=True)
class ConvCase(_AddCase):
    """A convolution of N samples of C channels to O, of as many dimensions as ``spatial`` and ``kernel`` have.

    layout: "contiguous", "channels_last" or "transposed"; segments: how often the weight is used, each time on inputs
    that are one longer.
    """

    N: int
    C: int
    O: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    segments: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the op."""
        dims = len(self.kernel)
        wide = {name: (getattr(self, name),) * dims for name in ("stride", "padding", "dilation")}
        return {**wide, "groups": self.groups}

    def _shapes(self) -> list[tuple[Shape, Shape]]:
        settings = self.settings
        del settings["groups"]
        made = []
        for longer in range(self.segments):
            spatial = tuple(size + longer for size in self.spatial)
            out = _out_size(spatial, self.kernel, **settings)
            made.append(((self.N, self.C, *spatial), (self.N, self.O, *out)))
        return made

    def _weight(self) -> Shape:
        return (self.O, self.C // self.groups, *self.kernel)

    def _add(self, kernels: Any, total: Tensor, segments: Segments, **chosen: Impl) -> None:
        kernels.add_conv_grad_power(total, segments, self.p, **self.settings, **chosen)

    def _positions(self) -> int:
        return sum(math.prod(out[2:]) for _, out in self._shapes())


@dataclass(frozen=True)
class ScaleCase(_AddCase):
    """Uses of one scale or bias of shape ``weight`` by N samples; ``shapes`` are those of each, without the samples.

    kind: "bias" (no x), "scale" (x), "norm" (a shift and a factor for each position too) or "statistics" (for each
        channel).
    layout: as in other cases; "channels_first" is [N, C, ...] as convolutions and their norms have it.
    """

    N: int
    weight: Shape
    shapes: tuple[Shape, ...]
    kind: str = "scale"

    def _shapes(self) -> list[tuple[Shape, Shape]]:
        return [((self.N, *shape), (self.N, *shape)) for shape in self.shapes]

    def _weight(self) -> Shape:
        return self.weight

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[ScaleUse]]:  # type: ignore[override]
        """As every case's; x has a mean other than 0, and what "expanded" makes one is one in memory."""
        total, segments = super().make_inputs(dtype, device)
        generator = _generator(self.id + " moments")
        uses = []
        for x, g in segments:
            if self.layout == "expanded":
                x, g = x[:1].expand_as(x), g[..., :1].expand_as(g)
            positions = (*g.shape[: g.ndim - len(self.weight)], *([1] * len(self.weight)))
            shape = positions if self.kind == "norm" else self.weight
            moments = (
                (1 + torch.rand(shape, generator=generator, dtype=torch.float64)).to(device, op_dtype(dtype))
                for _ in range(2)
            )
            match self.kind:
                case "bias":
                    uses.append(ScaleUse(g))
                case "scale":
                    uses.append(ScaleUse(g, x))
                case _:
                    uses.append(ScaleUse(g, x + 1, *moments))
        return total, uses

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        total, uses = self.make_inputs(dtype)
        return self._in_float64(total, [(g, x, shift, factor) for g, x, shift, factor in uses])

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """As every case's, before x and its shift cancel either."""
        total, uses = self.make_inputs(dtype)
        sizes = [
            (g.abs(), *(None if t is None else t.abs() for t in (x, None if shift is None else -shift, factor)))
            for g, x, shift, factor in uses
        ]
        return self._in_float64(total, [(g, x, None if shift is None else -shift, f) for g, x, shift, f in sizes])

    def _in_float64(self, total: Tensor, uses: list[tuple[Tensor | None, ...]]) -> list[Tensor]:
        total = total.double()
        wide = []
        for g, x, *moments in ([None if t is None else t.double() for t in use] for use in uses):
            assert g is not None
            wide.append(ScaleUse(g, x, *(None if t is None else t.expand(g.shape) for t in moments)))
        reference.add_scale_grad_power(total, wide, self.p)
        return [total]

    def _add(self, kernels: Any, total: Tensor, segments: Any, **chosen: Impl) -> None:
        kernels.add_scale_grad_power(total, segments, self.p, **chosen)

    @property
    def roundings(self) -> float:
        """As every case's, and p times the three of x̂ and a product."""
        return super().roundings + 3 * self.p

    def _positions(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes) // max(1, math.prod(self.weight))


@dataclass(frozen=True)
class MomentsCase:
    """The moments of rows; ``offset`` is their mean, in standard deviations."""

    shape: Shape
    centred: bool = True
    offset: float = 0.0
    dtypes = DTYPES

    @property
    def id(self) -> str:
        """A name for test output."""
        return f"MomentsCase-{_word(self.shape)}-{self.centred}-{self.offset}"

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Drawn in float64, then rounded."""
        made = torch.randn(self.shape, generator=_generator(self.id), dtype=torch.float64) + self.offset
        return made.to(device, dtype)

    def run(self, impl: Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The op on this case's inputs."""
        return list(row_moments(self.make_inputs(dtype, device), _EPS, centred=self.centred, impl=impl))

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        return list(row_moments(self.make_inputs(dtype).double(), _EPS, centred=self.centred, impl="reference"))

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """mean(|x|); and the factor, more wrong by as much as the mean is larger than the deviation."""
        x = self.make_inputs(dtype).double()
        _, factor = row_moments(x, _EPS, centred=self.centred, impl="reference")
        mean = x.abs().mean(-1, keepdim=True)
        return [mean, factor * (1 + mean * factor)]

    @property
    def roundings(self) -> float:
        """Those of a sum and of a sum of squares, and of what is made of them."""
        return 2 * sum_roundings(self.shape[-1]) + 8


class _Api:
    """The public functions, to be named beside the reference's."""

    add_sum_grad_power = staticmethod(add_sum_grad_power)
    add_conv_grad_power = staticmethod(add_conv_grad_power)
    add_scale_grad_power = staticmethod(add_scale_grad_power)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _word(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another order in memory."""
    dims = range(values.ndim)
    match layout:
        case "time_first":
            order = [1, 0, *dims[2:]]
        case "channels_last":
            order = [0, *dims[2:], 1]
        case "channels_first":
            order = [0, *dims[:0:-1][:1], *dims[1:-1]]
        case "transposed":
            order = [*reversed(dims)]
        case "gaps":
            return torch.stack([values, torch.full_like(values, math.nan)], dim=-1)[..., 0]
        case _:
            return values
    return values.permute(order).contiguous().permute([order.index(d) for d in dims])


_SIZES: tuple[tuple[int, int | None, int, int], ...] = (
    (1, None, 1, 1), (17, None, 33, 5), (130, None, 17, 10), (0, None, 3, 4), (5, None, 0, 4), (5, None, 4, 0),
    (1, 1, 1, 1), (3, 17, 5, 33), (17, 3, 33, 130), (2, 130, 17, 4), (4, 0, 3, 2), (33, 2, 7, 1),
    (300, 1, 65, 67), (5, 4, 129, 31), (2, 300, 64, 12),
)  # fmt: skip

CASES: list[Case | SegmentsCase | ConvCase | ScaleCase | MomentsCase] = [
    *(Case(*size, p=p) for size in _SIZES for p in (1, 2)),
    *(Case(*size, p=p, spread="decades") for size in (_SIZES[1], _SIZES[7]) for p in (1, 2)),
    # A weight that is used more than once, in memory of every order.
    *(SegmentsCase(5, (3, 1, 17), 19, 33, p=p) for p in (1, 2)),
    SegmentsCase(3, (), 4, 5),
    SegmentsCase(9, (1, 1), 40, 7, total="transposed"),
    SegmentsCase(4, (7, 0), 17, 33, layout="time_first", total="gaps"),
    SegmentsCase(6, (5,), 33, 18, layout="transposed", total="transposed", p=1),
    SegmentsCase(7, (1,), 70, 13, layout="transposed"),
    SegmentsCase(4, (6, 2), 21, 9, layout="expanded"),
    SegmentsCase(40, (1,), 21, 9, layout="expanded", p=1),
    # Convolutions: three dimensions, every setting, sizes that do not divide.
    *(ConvCase(3, 5, 7, (11,), (3,), stride=2, padding=1, p=p) for p in (1, 2)),
    ConvCase(2, 3, 4, (10,), (4,), dilation=3, total="transposed"),
    *(ConvCase(3, 6, 9, (7, 8), (3, 3), padding=1, p=p) for p in (1, 2)),
    ConvCase(2, 3, 33, (14, 15), (7, 7), stride=2, padding=3),
    ConvCase(5, 65, 13, (2, 2), (3, 3), padding=1, p=1),
    ConvCase(4, 33, 18, (5, 5), (1, 1), stride=2, layout="channels_last"),
    ConvCase(2, 8, 12, (6, 7), (3, 2), stride=2, padding=2, dilation=2, groups=4, layout="channels_last"),
    ConvCase(3, 9, 9, (5, 6), (3, 3), padding=1, groups=9, p=1),
    ConvCase(2, 3, 12, (6, 6), (3, 3), groups=3, layout="transposed", total="gaps"),
    ConvCase(2, 4, 6, (6, 5), (3, 2), padding=1, groups=2, segments=2, total="transposed"),
    ConvCase(9, 4, 6, (3, 3), (3, 3), p=1),
    ConvCase(2, 3, 5, (4, 5, 6), (3, 2, 1), stride=2, padding=1, dilation=2, p=1),
    ConvCase(2, 6, 4, (3, 4, 3), (2, 2, 2), groups=2, layout="channels_last"),
    ConvCase(0, 3, 4, (5, 5), (3, 3)),
    # Scales and biases: every kind, broadcast over dimensions in front, behind and between, used more than once.
    *(ScaleCase(17, (33,), ((33,),), kind="bias", p=p) for p in (1, 2)),
    *(ScaleCase(17, (33,), ((33,),), kind="scale", p=p) for p in (1, 2)),
    *(ScaleCase(5, (19,), ((7, 19),), kind=kind, p=2) for kind in ("bias", "scale", "norm", "statistics")),
    *(
        ScaleCase(3, (10,), ((3, 6, 10),), kind=kind, layout="channels_first")
        for kind in ("bias", "scale", "norm", "statistics")
    ),
    ScaleCase(130, (600,), ((600,),), kind="scale", total="gaps", p=1),
    ScaleCase(4, (5, 1, 3), ((2, 5, 9, 3),), kind="norm"),
    ScaleCase(4, (5, 3), ((5, 3),), kind="statistics", layout="transposed", total="transposed"),
    ScaleCase(6, (21,), ((4, 21), (21,), (2, 3, 21)), layout="time_first", p=1),
    ScaleCase(6, (1, 21), ((4, 21), (0, 21)), kind="bias", layout="expanded"),
    ScaleCase(9, (), ((5, 11), ()), kind="scale", layout="transposed"),
    ScaleCase(0, (3,), ((2, 3),)),
    ScaleCase(3, (0,), ((2, 0),)),
    ScaleCase(3, (4,), ()),
    *(MomentsCase((7, 33), centred=centred) for centred in (True, False)),
    *(MomentsCase((2, 3, 1100), offset=offset) for offset in (0.0, 100.0)),
    MomentsCase((0, 5)),
]  # fmt: skip
