"""Synaptic intelligence kept by the optimizer step: ω, where its path started, how many steps it saw (E7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastewc._names import op_dtype
from fastewc.optim._master_weights import PATH_TENSORS, MasterWeightState

if TYPE_CHECKING:
    from fastewc.ewc import EWC
    from fastewc.importance.si import PathTerm

PathIntegralMode = Literal[False, True, "regularized"]


class PathIntegralState(MasterWeightState):
    """What :func:`fastewc.si_importance` reads of a protected optimizer; the op itself sums ω."""

    ewc: EWC | None = None
    path_integral: PathIntegralMode = False

    def _path_of(self, p: Tensor) -> Tensor | None:
        """The ω of one parameter, made together with its start at its first step; None if it has no name."""
        if self.ewc is not None and self.ewc.name_of(p) is None:
            return None
        state = self.state[p]
        if "path_integral" not in state:
            state["path_integral"] = torch.zeros_like(p, dtype=op_dtype(p), requires_grad=False)
            state["path_integral_start"] = self._weight(p).detach().to(op_dtype(p), copy=True)
        omega: Tensor = state["path_integral"]
        return omega

    def _count_path_step(self, stepped: list[Tensor]) -> None:
        # Each parameter keeps the number of the optimizer's step that moved it last: the largest is the
        # count, even where gradients come and go.
        count = self.path_integral_steps + 1
        for p in stepped:
            if "path_integral" in self.state.get(p, {}):
                self.state[p]["path_integral_steps"] = count

    @property
    def path_integral_steps(self) -> int:
        """How many steps ω has been summed over since the latest reset; skipped steps do not count."""
        return max((int(state.get("path_integral_steps", 0)) for state in self._states()), default=0)

    def _states(self) -> list[dict[str, Any]]:
        # Hooks may keep things of their own in ``state``, under keys that are no parameters.
        return [state for key, state in self.state.items() if isinstance(key, Tensor)]

    def path_integrals(self) -> dict[str, PathTerm]:
        """E7 by parameter name, for :func:`fastewc.si_importance`: ω = −Σ g(w⁺ − w) and its start.

        Returns:
            name → PathTerm(parameter, omega, start): omega and start of the parameter's shape, float32
            (float64 for float64 parameters), both None where no step has moved the parameter yet. With
            ``master_weights`` the parameter is the float32 weight of both halves, a copy.

        Raises:
            ValueError: the optimizer was made without ``path_integral``.
        """
        from fastewc.importance.si import PathTerm

        if not self.path_integral:
            raise ValueError(f"this {type(self).__name__} keeps no path integral: make it with path_integral=True")
        terms = {}
        for group in self.param_groups:
            params = group["params"]
            names = group["param_names"] if self.ewc is None else [self.ewc.name_of(p) for p in params]
            for name, p in zip(names, params, strict=True):
                if name is not None:
                    state = self.state.get(p, {})
                    terms[name] = PathTerm(
                        self._weight(p), state.get("path_integral"), state.get("path_integral_start")
                    )
        return terms

    def reset_path_integral(self) -> None:
        """Start a new path: ω = 0, and the start is taken again at the next step."""
        for state in self._states():
            for key in (*PATH_TENSORS, "path_integral_steps"):
                state.pop(key, None)
