"""How Ω̄ and w* are kept: the dtypes an EWC object may store them in, and how a task's result is rounded to them."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastewc._names import op_dtype
from fastewc._offload import home, pinned
from fastewc.ops._parts import dense_order
from fastewc.ops.importance_codes import BLOCK, LARGEST, Codes, encode, numbers

IMPORTANCE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
ANCHOR_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)
Held = tuple[Tensor | Codes, Tensor]  # (Ω̄, w*) of one parameter, as they are stored


def draws(name: str, task: int, parameter: Tensor) -> torch.Generator:
    """What rounds one parameter after one task: the same on every rank and in every run."""
    return torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{task}:{name}".encode()))


def blank(parameter: Tensor, importance_dtype: torch.dtype, anchor_dtype: torch.dtype, offload: bool) -> Held:
    """Memory for Ω̄ and w* of a parameter, in the order of its own."""
    device, order = home(parameter, offload), dense_order(parameter)

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(parameter.shape, order, dtype=dtype, device=device)

    anchor = pinned(empty(anchor_dtype), parameter)
    if importance_dtype == torch.uint8:
        scales = torch.empty(-(-parameter.numel() // BLOCK), dtype=torch.float32, device=device)
        return pinned(Codes(empty(torch.uint8), scales), parameter), anchor
    return pinned(empty(importance_storage(parameter, importance_dtype)), parameter), anchor


def importance_storage(parameter: Tensor, importance_dtype: torch.dtype) -> torch.dtype:
    """The dtype of an Ω̄ that is not in codes: bfloat16, or that of the arithmetic."""
    return torch.bfloat16 if importance_dtype == torch.bfloat16 else op_dtype(parameter)


def store_importance(
    value: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None, parameter: Tensor | None = None
) -> Tensor | Codes:
    """Ω as it is kept: as it is for float32, one byte a weight for uint8; stochastically rounded with a generator.

    ``parameter`` decides the order of codes; None: the value's own.
    """
    if dtype == torch.uint8:
        return encode(value, value if parameter is None else parameter, generator)
    return to_bfloat16(value, generator) if dtype == torch.bfloat16 else value


def rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """w* as it is kept; stochastically rounded with a generator, where that is implemented: in bfloat16."""
    return to_bfloat16(value, generator) if dtype == torch.bfloat16 else value.to(dtype)


def to_bfloat16(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rounded to nearest, or with a generator stochastically: up in magnitude as often as it is far on the way."""
    if generator is None or value.dtype == torch.bfloat16:
        return value.to(torch.bfloat16)
    bits = value.to(torch.float32).view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def check_range(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """ValueError for an Ω̄ beyond what the dtype holds."""
    largest = {torch.uint8: LARGEST, torch.bfloat16: torch.finfo(torch.bfloat16).max}.get(dtype)
    if largest is not None and value.numel() and bool(value.max() > largest):
        raise ValueError(
            f"the importance of {name!r} reaches {value.max().item():g}, importance_dtype={dtype} holds up to "
            f"{largest:g}: scale it (Importance.scale or normalize), or keep it in torch.float32"
        )


def follow(
    held: Held, parameter: Tensor, importance_dtype: torch.dtype, anchor_dtype: torch.dtype | None, offload: bool
) -> Held:
    """Ω̄ and w* where and as the parameter wants them: its device or the host, its dtype and layout.

    The same objects where they are so.
    """
    omega, anchor = held
    device = home(parameter, offload)
    anchor = pinned(anchor.to(device, anchor_dtype or parameter.dtype), parameter)
    if isinstance(omega, Codes):
        return pinned(omega.to(device).relaid(parameter), parameter), anchor
    return pinned(omega.to(device, importance_storage(parameter, importance_dtype)), parameter), anchor


def grown(
    importance: Tensor | Codes, anchor: Tensor, parameter: Tensor, importance_dtype: torch.dtype, dtype: torch.dtype
) -> Held:
    """Copies of Ω̄ and w* in the leading corner of a parameter that may have grown; elsewhere 0 and the weight."""
    if isinstance(importance, Codes):
        importance = importance.to(parameter.device)
        if importance.shape == parameter.shape and importance_dtype == torch.uint8:
            return importance.relaid(parameter).clone(), anchor.to(parameter.device, dtype, copy=True)
    corner = tuple(slice(0, size) for size in importance.shape)
    omega = torch.zeros_like(parameter, dtype=op_dtype(parameter), requires_grad=False)
    omega[corner] = numbers(importance, omega.dtype).to(parameter.device)
    star = parameter.detach().to(dtype, copy=True)
    star[corner] = anchor.to(parameter.device, dtype)
    return store_importance(omega, importance_dtype, parameter=parameter), star


@dataclass
class AnchorRounding:
    """How far anchors in 16 bits are from the exact ones, over all parameters that were rounded."""

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Count one parameter in."""
        if stored.dtype.itemsize > 2 or exact.dtype == stored.dtype or exact.numel() == 0:
            return
        moved = stored.double() - exact.double() if exact.dtype == torch.float64 else stored.float() - exact.float()
        largest, norm = torch.stack([moved.abs().max(), torch.linalg.vector_norm(moved)]).double().tolist()
        self.count += exact.numel()
        self.squares += norm**2
        self.largest = max(self.largest, largest)

    def __str__(self) -> str:
        rms = math.sqrt(self.squares / max(self.count, 1))
        return f"root mean square {rms:.3g}, largest {self.largest:.3g}"
