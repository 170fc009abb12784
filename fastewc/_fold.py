"""A task folded into Ω̄ and w*, some thousand weights at a time: beside what is held it needs no copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fastewc import _state, _storage
from fastewc._names import op_dtype
from fastewc._storage import Held
from fastewc.ops._parts import dense_order, lies_as
from fastewc.ops.importance_codes import BLOCK, Codes, in_memory, numbers

#: Weights at a time: whole blocks of codes, whose encoding has some ten temporaries of this size.
PIECE = 512 * BLOCK


@dataclass
class Fold:
    """What one task does to one parameter's Ω̄ and w*.

    Ω̄ ← γΩ̄ + Ω_K. "latest" (E11): w* = w_K. "weighted" (E10): w* ← w* + (Ω_K/Ω̄)(w_K − w*) with the new Ω̄, and w_K
    where Ω̄ = 0: the centred form, which does not cancel as ΣΩ_k w_k² − … would.

    Attributes:
        name: of the parameter, for errors and for what rounds it.
        parameter: its value is w_K.
        fresh: Ω_K, of its shape, on any device, in any float dtype.
        held: Ω̄ and w* so far, on its device or the host; None at the first task.
        options: of the EWC.
    """

    name: str
    parameter: Tensor
    fresh: Tensor
    held: Held | None
    options: _state.Options

    def check(self) -> None:
        """ValueError, naming the parameter, if Ω_K or the new Ω̄ is none that can be kept; changes nothing."""
        old = None if self.held is None else _flat(self.held[0], self._order)
        fresh = _flat(self.fresh, self._order)
        for begin, end in self._pieces():
            own, total = self._sum(old, fresh, begin, end)
            _state.check_finite({self.name: own}, "the importance")
            _state.check_finite({self.name: total}, "the summed importance (Ω̄ ← γΩ̄ + Ω)")
            _storage.check_range(self.name, total, self.options.importance_dtype)

    def write(self, task: int, rounding: _storage.AnchorRounding) -> Held:
        """The new Ω̄ and w*: what was held, overwritten; new tensors at the first task.

        Args:
            task: how many there were before; it seeds the stochastic rounding.
            rounding: told how far anchors were rounded.
        """
        p, order = self.parameter, self._order
        omega, anchor = self.held or _storage.blank(
            p, self.options.importance_dtype, self.options.anchor_dtype or p.dtype, self.options.offload
        )
        flat_omega, flat_anchor = _flat(omega, order), _flat(anchor, order)
        now, fresh = _flat(p.detach(), order), _flat(self.fresh, order)
        draws = None if self.held is None else _storage.draws(self.name, task, p)
        weighted = self.held is not None and self.options.anchor == "weighted"
        for begin, end in self._pieces():
            own, total = self._sum(None if self.held is None else flat_omega, fresh, begin, end)
            star, exact = flat_anchor[begin:end], now[begin:end]
            if weighted:
                share = torch.where(total > 0, own / total, 1.0)
                exact = torch.lerp(star.to(own), exact.to(own), share)
            stored = _storage.store_importance(total, self.options.importance_dtype, draws)
            flat_omega[begin:end].copy_(stored)  # type: ignore[arg-type]  # both are codes, or both are numbers
            kept = _storage.rounded(exact, star.dtype, draws if weighted else None)
            star.copy_(kept)
            rounding.add(exact, kept)
        _give_back(flat_omega, omega, order)
        _give_back(flat_anchor, anchor, order)
        return omega, anchor

    @property
    def _order(self) -> tuple[int, ...]:
        return dense_order(self.parameter)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        n = self.parameter.numel()
        return ((begin, min(begin + PIECE, n)) for begin in range(0, n, PIECE))

    def _sum(self, old: Tensor | Codes | None, fresh: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(Ω_K, γΩ̄ + Ω_K) of a piece, in the arithmetic's dtype."""
        p = self.parameter
        own = fresh[begin:end].to(p.device, op_dtype(p))
        if old is None:
            return own, own
        return own, self.options.gamma * numbers(old[begin:end].to(own.device), own.dtype) + own


@overload
def _flat(held: Tensor, order: tuple[int, ...]) -> Tensor: ...
@overload
def _flat(held: Tensor | Codes, order: tuple[int, ...]) -> Tensor | Codes: ...
def _flat(held: Tensor | Codes, order: tuple[int, ...]) -> Tensor | Codes:
    """The elements in the order of a parameter's memory, [n]: a view, or a copy of what lies otherwise."""
    if isinstance(held, Codes):  # these lie as the parameter does
        return held.flat()
    if not lies_as(held, order):
        held = torch.empty_strided(held.shape, order, dtype=held.dtype, device=held.device).copy_(held)
    return in_memory(held)


def _give_back(flat: Tensor | Codes, held: Tensor | Codes, order: tuple[int, ...]) -> None:
    """Write what :func:`_flat` had to copy back to where it came from."""
    if isinstance(held, Tensor) and isinstance(flat, Tensor) and not lies_as(held, order):
        held.copy_(flat.as_strided(held.shape, order))
