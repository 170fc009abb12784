"""Ω in one byte a weight: a block-wise logarithmic code. This module is its specification, in plain PyTorch.

**Format.** The elements of a tensor, in the order in which they lie in memory, form blocks of BLOCK = 1,024. Each block
has one float32 scale S, the smallest power of two that is no less than its maximum (0 if all are 0); each element has
one byte. A byte 0 is exactly 0; a byte c = 1 … 255 is

    Ω = S · 2^(⌊q/12⌋ − 22) · M[q mod 12],   q = c + 9,   M[i] = 1 + (485,676 i + 13,371 i² + 365 i³) · 2⁻²³ ≈ 2^(i/12)

so 255 is S itself, 1 is 4.25e-7 · S, and neighbours differ by at most 5.955 %. Since S is a power of two, all blocks
share one grid of numbers, every step of decoding is exact, and kernels that compute M and kernels that look it up agree
to the bit, fused multiply-adds or not. Cutting the same elements into other blocks, as another memory layout does,
keeps every number that is not too small for its new block.

**Bounds**, m the maximum of the block (and while Ω is no subnormal float32):

* rounded to nearest: Ω ≥ 1e-6 m within 2.9 %, smaller ones within 5e-7 m;
* rounded stochastically: unbiased, Ω ≥ 1e-6 m within 5.96 %, smaller ones within 1e-6 m.

A task added to what is held must round stochastically: to nearest, an addend below 3 % would vanish for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastewc.ops._parts import dense_order, lies_as

#: Elements that share a scale: what the CPU kernels take at a time, and a whole tile of the Triton kernels.
BLOCK = 1024
#: The largest Ω that has a code.
LARGEST = 2.0**127
_SMALLEST_SCALE = -126  # as an exponent of two: the smallest normal float32
_BLOCKS_AT_A_TIME = 512  # encoding has some ten temporaries of this many blocks


@dataclass(frozen=True)
class Codes:
    """Ω of one parameter in one byte a weight.

    Attributes:
        codes: uint8, of the parameter's shape, dense: without gaps or overlaps in memory, in any order of dimensions.
        scales: float32 [blocks], one for each BLOCK elements of the codes' memory.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """torch.uint8."""
        return self.codes.dtype

    def numel(self) -> int:
        """How many weights."""
        return self.codes.numel()

    def detach(self) -> Codes:
        """Itself: codes have no gradient."""
        return self

    def clone(self) -> Codes:
        """A copy in memory of its own."""
        return Codes(self.codes.clone(), self.scales.clone())

    def flat(self) -> Codes:
        """The same memory as codes [n], in its order."""
        return Codes(in_memory(self.codes), self.scales)

    def __getitem__(self, elements: slice) -> Codes:
        """Of :meth:`flat` codes, the elements of a slice that begins with a block: a view."""
        begin, end, _ = elements.indices(self.numel())
        return Codes(self.codes[begin:end], self.scales[begin // BLOCK : -(-end // BLOCK)])

    def copy_(self, other: Codes) -> Codes:
        """Take over the codes and scales of another one of this shape and order."""
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)
        return self

    def to(self, device: torch.device) -> Codes:
        """On another device; itself if it is there."""
        if device == self.device:
            return self
        return Codes(self.codes.to(device), self.scales.to(device))

    def lie_as(self, parameter: Tensor) -> bool:
        """Whether kernels that walk the parameter's memory meet its codes in the same order."""
        return lies_as(self.codes, dense_order(parameter))

    def relaid(self, parameter: Tensor) -> Codes:
        """In the order of the parameter's memory; itself where it is so."""
        return self if self.lie_as(parameter) else encode(self.decoded(), parameter)

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ω as a new tensor with the strides of the codes."""
        out = torch.empty_strided(self.shape, self.codes.stride(), dtype=dtype, device=self.device)
        flat, codes = in_memory(out), in_memory(self.codes)
        grid, scales = _grid(self.device, dtype), self.scales.to(dtype)
        for begin, end in _runs(self.numel()):
            torch.index_select(grid, 0, codes[begin:end].int(), out=flat[begin:end])
            own = scales[begin // BLOCK : -(-end // BLOCK)]
            whole = (end - begin) // BLOCK * BLOCK
            flat[begin : begin + whole].view(-1, BLOCK).mul_(own[: whole // BLOCK, None])
            flat[begin + whole : end].mul_(own[whole // BLOCK :])
        return out

    def check(self, name: str) -> None:
        """ValueError, naming the parameter, where these are no codes that :func:`encode` made."""
        blocks = -(-self.numel() // BLOCK)
        kinds = (self.codes.dtype, self.scales.dtype, tuple(self.scales.shape))
        if kinds != (torch.uint8, torch.float32, (blocks,)):
            raise ValueError(
                f"the importance codes of {name!r} have dtype {kinds[0]} with scales {kinds[1]} of shape {kinds[2]}; "
                f"wanted torch.uint8 with torch.float32 scales ({blocks},)"
            )
        if not lies_as(self.codes, dense_order(self.codes)):
            raise ValueError(f"the importance codes of {name!r} have gaps in memory, strides {self.codes.stride()}")
        exponents = self.scales.view(torch.int32)
        if bool(((exponents & 0x807FFFFF) != 0).any()) or bool((self.scales == torch.inf).any()):
            raise ValueError(f"the scales of the importance codes of {name!r} must be powers of two or 0 (damaged)")


def encode(value: Tensor, parameter: Tensor, generator: torch.Generator | None = None) -> Codes:
    """The codes of Ω, in the order of the parameter's memory.

    Args:
        value: Ω, finite and ≥ 0, at most LARGEST: float32 or float64, of the parameter's shape.
        parameter: decides the order.
        generator: rounds stochastically, x between neighbours a < b to b with probability (x − a)/(b − a); None rounds
            to nearest.
    """
    order = dense_order(parameter)
    codes = torch.empty_strided(value.shape, order, dtype=torch.uint8, device=value.device)
    scales = torch.empty(-(-value.numel() // BLOCK), dtype=torch.float32, device=value.device)
    if not lies_as(value, order):
        value = torch.empty_strided(value.shape, order, dtype=value.dtype, device=value.device).copy_(value)
    values, flat = in_memory(value), in_memory(codes)
    for begin, end in _runs(value.numel()):
        blocks = pad(values[begin:end], (0, -(end - begin) % BLOCK)).view(-1, BLOCK)
        found, own = _encode_blocks(blocks, generator)
        flat[begin:end] = found.flatten()[: end - begin]
        scales[begin // BLOCK : -(-end // BLOCK)] = own
    return Codes(codes, scales)


def split(importances: Sequence[Tensor | Codes | None]) -> tuple[list[Tensor], list[Tensor]]:
    """(codes or numbers, scales) as kernels take them: scales are empty where there are numbers; no list without codes.

    No entry is None. The scales of a list that has codes are as many as there are importances.
    """
    if not any(isinstance(omega, Codes) for omega in importances):
        return list(importances), []  # type: ignore[arg-type]
    pairs = [
        (o.codes, o.scales) if isinstance(o, Codes) else (o, o.new_empty(0).float())
        for o in importances
        if o is not None
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def numbers(importance: Tensor | Codes, dtype: torch.dtype) -> Tensor:
    """Ω as numbers of a dtype, however it is stored."""
    return importance.decoded(dtype) if isinstance(importance, Codes) else importance.to(dtype)


def _encode_blocks(blocks: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(codes [n, BLOCK], scales [n]) of the rows of ``blocks``."""
    scales = _power_above(blocks.amax(1))
    x = blocks / torch.where(scales > 0, scales, 1.0).to(blocks.dtype)[:, None]
    grid = _grid(x.device, x.dtype)
    lower = torch.bucketize(x, grid, right=True) - 1
    upper = (lower + 1).clamp_(max=255)
    below, above = x - grid[lower], grid[upper] - x
    if generator is None:
        rises = below > above
    else:
        rises = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) * (below + above) < below
    return torch.where(rises, upper, lower).to(torch.uint8), scales


def _power_above(x: Tensor) -> Tensor:
    """The smallest power of two ≥ x, from the smallest normal float32 on, as float32; 0 for 0."""
    mantissa, exponent = torch.frexp(x)
    exponent = exponent - (mantissa == 0.5).int()
    bits = (exponent.clamp(min=_SMALLEST_SCALE) + 127) << 23  # put together: pow need not be exact
    return torch.where(x > 0, bits.to(torch.int32).view(torch.float32), 0.0)


@lru_cache
def _grid(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What the 256 bytes stand for where S = 1, ascending."""
    q = torch.arange(1, 256) + 9
    i, octave = q % 12, q // 12 - 22
    mantissa = (2**23 + 485_676 * i + 13_371 * i**2 + 365 * i**3).double()
    return torch.cat([torch.zeros(1).double(), torch.ldexp(mantissa, octave - 23)]).to(device, dtype)


def in_memory(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, a view."""
    return t.as_strided((t.numel(),), (1,))


def _runs(n: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of whole blocks."""
    step = BLOCK * _BLOCKS_AT_A_TIME
    return ((begin, min(begin + step, n)) for begin in range(0, n, step))
